"""Where the error comes from: the norm computed again with one stage exact at a time.

`compute` is the arithmetic of docs/arithmetic.md on arrays of rows, in which any set of stages may be exact: real
numbers that are not rounded. With no stage exact it returns the codes of `reference.run`, bit by bit (a test holds it
to that); with all of them exact, the float layer in output LSB, neither rounded nor clamped. A stage that follows an
exact one rounds the real number it gets just as it would round an integer.

`Attribution` uses this definition. With e the error of the integers against the float layer and e_k the error where
stage k is exact, the term of stage k is mean(e**2) - mean(e_k**2): what the error's power falls by when that stage
alone is made exact. What the terms leave of the total, mean(e**2) - sum of the terms, is the interaction: errors that
compensate or amplify each other. Terms and interaction sum up to the total by definition; a term below 0 means that
the stage's rounding happens to compensate for another's. Powers are in squared LSB of each channel's own output step,
and once more in squared real units, whose total is the noise of the SQNR.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import proof
from ..proof import NormKind
from ..spec import LayerNormSpec

#: Integers as int64, or real numbers.
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Stage(StrEnum):
    """The places where the integers lose something, in the order of the computation."""

    INPUT = "input"
    INPUT_SATURATION = "input saturation"
    EPS = "eps"
    ROOT = "root"
    MEAN = "mean"
    T = "t"
    GAMMA = "gamma"
    BETA = "beta"
    OUTPUT = "output"
    OUTPUT_SATURATION = "output saturation"

    @property
    def meaning(self) -> str:
        """What is exact where this stage is."""
        return _MEANINGS[self]


_MEANINGS = {
    Stage.INPUT: "input values are not rounded to codes (they are still clipped)",
    Stage.INPUT_SATURATION: "input codes are not clipped (they are still rounded)",
    Stage.EPS: "eps is the layer's, not E",
    Stage.ROOT: "the reciprocal root is real: r and R",
    Stage.MEAN: "the mean is real: c and D",
    Stage.T: "the normalized value is not cut to F bits: t",
    Stage.GAMMA: "the gain is the layer's, not G",
    Stage.BETA: "the offset is the layer's, not B",
    Stage.OUTPUT: "the output is not rounded to codes (it is still clipped)",
    Stage.OUTPUT_SATURATION: "the output is not clipped (it is still rounded)",
}


@dataclass(frozen=True)
class Computed:
    """Rows with what lies between; the names are those of docs/arithmetic.md.

    Attributes
    ----------
    u, p, t, a : ndarray of shape (rows, n)
        `a` includes the half that rounds the output.
    S, V, R, D : ndarray of shape (rows, 1)
    y : ndarray of shape (rows, n)
        Output, in LSB.
    """

    u: Array
    S: Array
    V: Array
    R: Array
    D: Array
    p: Array
    t: Array
    a: Array
    y: Array


def compute(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]], exact: Collection[Stage] = ()) -> Computed:
    """Return the norm of real rows with some stages exact.

    Parameters
    ----------
    spec : LayerNormSpec
    rows : ndarray of shape (rows, n)
        Finite real values.
    exact : collection of Stage
        The stages that don't round, or don't clip.
    """
    real = np.longdouble if spec.lane == 64 else np.float64  # float64 holds every product of the narrower lanes
    n = spec.n
    u = _input(spec, rows, exact).astype(real) if Stage.INPUT in exact else _input(spec, rows, exact)
    S: Array
    V0: Array
    S, V0 = _moments(u, spec.kind is NormKind.LAYERNORM)
    V = _add_epsilon(spec, V0, Stage.EPS in exact)
    R = np.where(V0 > 0, _reciprocal_root(spec, V, Stage.ROOT in exact), 0)

    if spec.kind is NormKind.RMSNORM:
        D = np.zeros_like(S)
        p = u * R.astype(u.dtype if _integers(R) else real)
    elif Stage.MEAN in exact:
        D = np.zeros_like(S)
        mean: Array = S.astype(np.longdouble) / n
        p = (u - mean).astype(real) * R.astype(real)
    else:
        c = (2 * S + n) // (2 * n) if _integers(S) else np.floor(S / n + 0.5)
        d = S - n * c
        D = (2 * d * R + n) // (2 * n) if _integers(d, R) else np.floor(d * R / n + 0.5)
        p = (u - c) * R - D
    p = p if _integers(p) else p.astype(real)

    t = np.ldexp(p.astype(real), -spec.s1) if Stage.T in exact else _shift(p, spec.s1)
    gain, offset = _output_parameters(spec, real, exact)
    a = t * gain + offset
    if Stage.OUTPUT in exact:
        y = np.ldexp(a.astype(real), -spec.s2)
    else:
        y = _shift(a, spec.s2)
        a = a + (1 << (spec.s2 - 1))
    if Stage.OUTPUT_SATURATION not in exact:
        y = np.clip(y, spec.output.lo, spec.output.hi)
    return Computed(u, S, V, R, D, p, t, a, y)


def float_layer(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]]) -> Floats:
    """Return the float layer of real rows, in output LSB, neither rounded nor clamped."""
    x = rows.astype(np.float64)
    if spec.kind is NormKind.LAYERNORM:
        x = x - x.mean(axis=1, keepdims=True)
    power = np.square(x).mean(axis=1, keepdims=True) + spec.eps
    normalized = x / np.sqrt(np.where(power > 0, power, 1.0))
    result: Floats = (normalized * np.array(spec.gamma) + np.array(spec.beta)) / output_steps(spec)
    return result + spec.output.zero_point


def output_steps(spec: LayerNormSpec) -> Floats:
    """Return the real value of an output LSB of each channel."""
    return spec.output.channel_steps(spec.n)


def input_positions(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]]) -> Floats:
    """Return where real inputs lie on the scale of their codes: neither rounded nor clipped, in input LSB."""
    steps = spec.input.channel_steps(spec.n)
    positions: Floats = rows.astype(np.float64) / steps + spec.input.zero_point
    return positions


def _integers(*arrays: Array) -> bool:
    return all(array.dtype.kind == "i" for array in arrays)


def _shift(values: Array, bits: int) -> Array:
    """Divide by a power of two and round half up, integers or real numbers."""
    if _integers(values):
        return (values + (1 << (bits - 1))) >> bits
    rounded: Array = np.floor(np.ldexp(values, -bits) + values.dtype.type(0.5))
    return rounded


def _input(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]], exact: Collection[Stage]) -> Array:
    params = spec.input
    exponents = np.array(params.channel_exponents(spec.n), dtype=np.int64)
    codes: Array = params.quantize(rows).astype(np.int64)
    u: Array
    if Stage.INPUT in exact or Stage.INPUT_SATURATION in exact:
        positions = input_positions(spec, rows)
        free = Stage.INPUT_SATURATION in exact
        outside = (positions < params.lo - 0.5) | (positions > params.hi + 0.5)
        if Stage.INPUT in exact:
            low, high = (-np.inf, np.inf) if free else (float(params.lo), float(params.hi))
            return (np.clip(positions, low, high) - params.zero_point) * np.exp2(exponents.astype(np.float64))
        if np.abs(positions).max() >= 2.0**46:  # beyond what exponents may be applied to as integers
            u = (np.where(outside, np.rint(positions), codes) - params.zero_point) * np.exp2(exponents.astype(float))
            return u
        codes = np.where(outside, np.rint(positions).astype(np.int64), codes)
    u = np.left_shift(codes - params.zero_point, exponents)
    return u


def _moments(u: Array, centred: bool) -> tuple[Array, Array]:
    """Return S and V0: exact for integers whose moments fit 62 bits, which those of codes always do."""
    n = u.shape[1]
    if _integers(u) and float(n) * np.square(u.astype(np.float64)).sum(axis=1).max(initial=0.0) < 2.0**62:
        S = u.sum(axis=1, keepdims=True)
        V0 = n * np.square(u).sum(axis=1, keepdims=True)
        return S, V0 - S * S if centred else V0
    wide = u.astype(np.longdouble)
    S = wide.sum(axis=1, keepdims=True)
    return S, n * np.square(wide - S / n if centred else wide).sum(axis=1, keepdims=True)


def _add_epsilon(spec: LayerNormSpec, V0: Array, exact: bool) -> Array:
    """Return V, with 2h fraction bits."""
    if exact:
        e = np.longdouble(spec.n) ** 2 * np.longdouble(spec.eps) / np.longdouble(spec.scale) ** 2
        V: Array = np.ldexp(V0.astype(np.longdouble) + e, 2 * spec.h)
        return V
    # codes keep V below 2**62, values that are not clipped need not
    if _integers(V0) and float(V0.max(initial=0)) < 2.0 ** (proof.V_BITS - 2 * spec.h):
        return (V0 << 2 * spec.h) + spec.E
    return np.ldexp(V0.astype(np.longdouble), 2 * spec.h) + spec.E


def _reciprocal_root(spec: LayerNormSpec, V: Array, exact: bool) -> Array:
    """Return n * 2**(K+h) / sqrt(V), by equation (4) or exactly."""
    n, m, x = spec.n, spec.m, spec.K + spec.h
    positive = np.where(V > 0, V, 1)
    quotient: Array
    if exact:
        quotient = np.ldexp(np.longdouble(n), x) / np.sqrt(positive.astype(np.longdouble))
        return quotient
    b = np.frexp(positive.astype(np.float64))[1].astype(np.int64)
    if _integers(V):
        b -= (positive >> np.maximum(b - 1, 0)) == 0  # float64 may have rounded up to the next power of two
    j = m - ((b + 1) >> 1)
    if _integers(V):
        w = np.where(j >= 0, positive << np.maximum(2 * j, 0), positive >> np.maximum(-2 * j, 0))
    else:
        w = np.floor(np.ldexp(positive, 2 * j)).astype(np.int64)
    r = np.sqrt(w.astype(np.float64)).astype(np.int64)
    r -= r * r > w
    r += (r + 1) * (r + 1) <= w
    y = np.maximum(x + j - proof.reciprocal_bits(n), 0) if spec.lane == 64 else np.zeros_like(j)
    if _integers(V):
        quotient = ((np.int64(n) << (x + j - y)) + (r >> 1)) // r << y
        return quotient
    dividend = np.ldexp(np.longdouble(n), x + j - y) + (r >> 1)
    quotient = np.ldexp(np.floor(dividend / r), y)
    return quotient


def _output_parameters(spec: LayerNormSpec, real: Any, exact: Collection[Stage]) -> tuple[Array, Array]:
    """Return the gain with s2 - F fraction bits and the offset with s2, as real numbers where they are exact."""
    gain, offset = np.array(spec.G, dtype=np.int64), np.array(spec.B, dtype=np.int64)
    if Stage.GAMMA in exact:
        gain = np.ldexp(proof.output_gain(spec.gamma, spec.output).to_float().astype(real), spec.s2 - spec.F)
    if Stage.BETA in exact:
        offset = np.ldexp(proof.output_offset(spec.beta, spec.output).to_float().astype(real), spec.s2)
    return gain, offset


@dataclass(frozen=True, kw_only=True)
class StageTerm:
    """What one stage contributes.

    Attributes
    ----------
    stage, meaning : str
    power_lsb2 : float
        What the error's mean square falls by with this stage exact, in LSB**2.
    share : float
        The same of the total, in real units: the share of the noise of the SQNR.
    rms_change_lsb, max_change_lsb : float
        By how much the output moves with this stage exact: root mean square and largest, in LSB.
    """

    stage: str
    meaning: str
    power_lsb2: float
    share: float
    rms_change_lsb: float
    max_change_lsb: float


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The error's power by stage; see the module's docstring for the definition.

    Attributes
    ----------
    rows : int
        How many rows it was measured on.
    terms : tuple of StageTerm
        In the order of the computation.
    total_lsb2 : float
        The error's mean square against the float layer, in LSB**2.
    interaction_lsb2, interaction_share : float
        What the terms leave of the total, and of the noise.
    """

    rows: int
    terms: tuple[StageTerm, ...]
    total_lsb2: float
    interaction_lsb2: float
    interaction_share: float

    def term(self, stage: Stage) -> StageTerm:
        """Return the term of a stage."""
        return next(term for term in self.terms if term.stage == stage)


#: Elements computed at once, to bound the memory.
BLOCK_ELEMENTS = 1 << 16


def attribute(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]]) -> Attribution:
    """Measure the error's power by stage on real rows of shape (rows, n)."""
    weight = np.square(output_steps(spec))
    stages = list(Stage)
    # for each stage, last the total: power in LSB**2, power in real units; and the change of the output
    power, noise = np.zeros(len(stages) + 1), np.zeros(len(stages) + 1)
    change, largest = np.zeros(len(stages)), np.zeros(len(stages))
    step = max(1, BLOCK_ELEMENTS // spec.n)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        expected = float_layer(spec, block)
        y = compute(spec, block).y.astype(np.float64)
        for index, stage in enumerate([*stages, None]):
            with_exact = y if stage is None else compute(spec, block, {stage}).y.astype(np.float64)
            squares = np.square(with_exact - expected)
            power[index] += squares.sum()
            noise[index] += (squares * weight).sum()
            if stage is not None:
                moved = np.abs(with_exact - y)
                change[index] += np.square(moved).sum()
                largest[index] = max(largest[index], moved.max())
    count = rows.size
    falls = (power[-1] - power[:-1]) / count
    shares = (noise[-1] - noise[:-1]) / noise[-1] if noise[-1] else np.zeros(len(stages))
    return Attribution(
        rows=len(rows),
        terms=tuple(
            StageTerm(
                stage=stage.value, meaning=stage.meaning, power_lsb2=float(falls[index]), share=float(shares[index]),
                rms_change_lsb=float(np.sqrt(change[index] / count)), max_change_lsb=float(largest[index]),
            )
            for index, stage in enumerate(stages)
        ),
        total_lsb2=float(power[-1] / count),
        interaction_lsb2=float(power[-1] / count - falls.sum()),
        interaction_share=float(1 - shares.sum()) if noise[-1] else 0.0,
    )  # fmt: skip
