"""LayerNormSpec: every integer that defines the function, and the real parameters that it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import files, proof
from .errors import InputError
from .proof import Excess, NormKind
from .quantization import QuantParams

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerNormSpec:
    """One integer norm, defined to the last bit; the letters are those of docs/arithmetic.md.

    A spec exists only if its widths are proved: the constructor raises PlanError where a value could leave its own.

    Attributes
    ----------
    kind : NormKind
    normalized_shape : tuple of int
        The dimensions that are normalized together; n is their product.
    eps : float
    gamma, beta : tuple of float
        The layer's gain and offset, one a channel, as the planner saw them.
    input, output : QuantParams
    lane : int
        Bits of the element stage: 24, 32 or 64.
    m : int
        Bits of the integer square root r.
    K : int
        Fraction bits of the normalized value p.
    h : int
        V has 2h fraction bits.
    E : int
        eps in units of V.
    s1, s2 : int
        The shifts that end the first and the second multiplication.
    G, B : tuple of int
        Gain (s2 - F fraction bits) and offset (s2 fraction bits) of each channel, in output LSB.
    """

    __pydantic_config__ = files.STRICT

    kind: NormKind
    normalized_shape: tuple[int, ...]
    eps: float
    gamma: tuple[float, ...]
    beta: tuple[float, ...]
    input: QuantParams
    output: QuantParams
    lane: int
    m: int
    K: int
    h: int
    E: int
    s1: int
    s2: int
    G: tuple[int, ...]
    B: tuple[int, ...]

    def __post_init__(self) -> None:
        n = self.n
        if not self.normalized_shape or min(self.normalized_shape) < 1:
            raise InputError(f"normalized_shape is {self.normalized_shape}; it must hold positive integers")
        for name, values in (("gamma", self.gamma), ("beta", self.beta), ("G", self.G), ("B", self.B)):
            if len(values) != n:
                raise InputError(f"{name} has {len(values)} elements; the spec normalizes {n}")
        if not all(map(math.isfinite, (self.eps, *self.gamma, *self.beta))) or self.eps < 0:
            raise InputError("eps, gamma and beta must be finite, and eps not negative")
        for name, params in (("input", self.input), ("output", self.output)):
            if params.exponents is not None and len(params.exponents) != n:
                raise InputError(f"{name} has {len(params.exponents)} channel exponents; the spec normalizes {n}")
        if self.lane not in proof.ROOT_BITS:
            raise InputError(f"the lane is {self.lane}; it must be one of {', '.join(map(str, proof.ROOT_BITS))}")
        ranges = {"m": (2, 31), "K": (2, 62), "h": (0, 31), "s1": (1, 62), "s2": (1, 62), "E": (0, (1 << 62) - 1)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        if self.F < 0:
            raise InputError(f"s1 = {self.s1} is beyond K = {self.K}")
        proof.check_widths(self)

    @property
    def n(self) -> int:
        """The number of elements that are normalized together."""
        return math.prod(self.normalized_shape)

    @property
    def F(self) -> int:
        """Fraction bits of t, the normalized value that meets the gain."""
        return self.K - self.s1

    @cached_property
    def row_stage(self) -> proof.RowStage:
        """The widths of the row stage."""
        return proof.RowStage(proof.CodeBounds.of(self.kind, self.n, self.input), self.lane, self.m, self.K)

    @cached_property
    def excess(self) -> Excess:
        """The proved bound: ``|output - clamp(ideal)| <= 1/2 + excess`` LSB, with its terms by stage."""
        return proof.excess(self)

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON; the file appears whole or not at all."""
        files.save_json(self, path, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> LayerNormSpec:
        """Read a spec that `save` wrote.

        Raises
        ------
        SpecFileError
            If the file can't be read, is damaged, holds an unknown key, or has another schema version.
        """
        return files.load_json(cls, path, schema_version=SCHEMA_VERSION)
