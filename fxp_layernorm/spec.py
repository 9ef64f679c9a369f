"""LayerNormSpec: every integer that defines the function, and the real parameters that it came from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from . import files, proof
from .adder import Adder, code_ends, is_needed
from .axes import parse_axes
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
    axes : tuple of int
        Which they are, counted from the end.
    eps : float
    eps_outside : bool
        Whether eps is added to the deviation instead of the variance.
    gamma, beta : tuple of float
        The layer's gain and offset, one a channel, as the planner saw them.
    input, output : QuantParams
    residual : QuantParams or None
        The second operand, where a residual is added before the norm.
    sum_output : QuantParams or None
        The sum's own codes, where it is an output too.
    adder : Adder or None
        The input stage; None where u is a shifted code.
    lane : int
        Bits of the element stage: 24, 32 or 64.
    accumulator : int
        Bits of the second product and its sum, sign included.
    m : int
        Bits of the integer square root r.
    K : int
        Fraction bits of the normalized value p.
    h : int
        V has 2h fraction bits.
    E : int
        eps in units of V.
    A, l : int
        eps outside the root: n * eps with l fraction bits, in units of u; 0 where there is none.
    s1, s2 : int
        The shifts that end the first and the second multiplication.
    G, B : tuple of int
        Gain (s2 - F fraction bits) and offset (s2 fraction bits) of each channel, in output LSB.
    """

    __pydantic_config__ = files.STRICT

    kind: NormKind
    normalized_shape: tuple[int, ...]
    axes: tuple[int, ...]
    eps: float
    eps_outside: bool
    gamma: tuple[float, ...]
    beta: tuple[float, ...]
    input: QuantParams
    output: QuantParams
    residual: QuantParams | None
    sum_output: QuantParams | None
    adder: Adder | None
    lane: int
    accumulator: int
    m: int
    K: int
    h: int
    E: int
    A: int
    l: int
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
        parse_axes(self.axes, self.normalized_shape)
        optional = {"residual": self.residual, "sum_output": self.sum_output}
        sides = {"input": self.input, "output": self.output, **{k: v for k, v in optional.items() if v is not None}}
        for name, params in sides.items():
            if params.channels not in (None, n):
                raise InputError(f"{name} has parameters for {params.channels} channels; the spec normalizes {n}")
            if params.dtype.bits > 16 and name in ("output", "sum_output"):
                raise InputError(f"{name} is {params.dtype}; outputs have at most 16 bits")
        if self.lane not in proof.ROOT_BITS:
            raise InputError(f"the lane is {self.lane}; it must be one of {', '.join(map(str, proof.ROOT_BITS))}")
        ranges = {
            "m": (2, 31), "K": (2, 62), "h": (0, 31), "s1": (1, 62), "s2": (1, 62), "E": (0, (1 << 62) - 1),
            "accumulator": (8, 63), "A": (0, (1 << 31) - 1), "l": (-62, 2200),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(f"{name} is {getattr(self, name)}; it must be from {low} to {high}")
        if self.F < 0:
            raise InputError(f"s1 = {self.s1} is beyond K = {self.K}")
        if self.A and not (self.eps_outside and self.A.bit_length() == self.m):
            raise InputError(f"A is {self.A}; it must have m = {self.m} bits where eps is outside the root, else be 0")
        if self.eps_outside and (self.E or self.h):
            raise InputError("eps is outside the root, where E and h must be 0")
        if self.adder is not None:
            self.adder.check(n, self.operands, self.lane)
        elif is_needed(self.input, self.residual, self.sum_output):
            raise InputError("the inputs need an adder")
        if self.adder is not None:
            self.adder.check_sum(self.sum_output, int(max(np.abs(end).max() for end in self.ends)))
        if self.eps_outside:
            e = self.n * Fraction(self.eps) / Fraction(self.scale)
            if bool(e) != bool(self.A) or abs(self.A - e * Fraction(2) ** self.l) > Fraction(1, 2):
                raise InputError(f"A is {self.A} with l = {self.l}; it must be n * eps in units of u, rounded")
        proof.check_widths(self)

    @property
    def n(self) -> int:
        """The number of elements that are normalized together."""
        return math.prod(self.normalized_shape)

    @property
    def F(self) -> int:
        """Fraction bits of t, the normalized value that meets the gain."""
        return self.K - self.s1

    @property
    def operands(self) -> tuple[QuantParams, ...]:
        """The parameters of the input and, where there is one, of the residual."""
        return (self.input,) if self.residual is None else (self.input, self.residual)

    @property
    def scale(self) -> float:
        """What one unit of u is worth, in real units."""
        return self.input.scale if self.adder is None else self.adder.scale

    @property
    def epsilon_in_codes(self) -> Fraction:
        """What eps under the root is in units of V0 (e in the bound)."""
        return Fraction(0) if self.eps_outside else proof.epsilon_in_codes(self.n, self.eps, self.scale)

    @cached_property
    def row_stage(self) -> proof.RowStage:
        """The widths of the row stage."""
        codes = proof.CodeBounds.of(self.kind, *self.ends)
        return proof.RowStage(codes, self.lane, self.m, self.K, bool(self.A))

    @property
    def ends(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The lowest and the highest u of each channel (equation 0)."""
        return code_ends(self.n, self.operands, self.adder)

    @property
    def input_error(self) -> float:
        """How far u may be from the real sum of the dequantized inputs, in units of u; 0 without an adder."""
        return 0.0 if self.adder is None else self.adder.error(self.n, self.operands)

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
