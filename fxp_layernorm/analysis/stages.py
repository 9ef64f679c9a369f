"""Where the error comes from: the norm computed again with one stage exact at a time.

`compute` is the arithmetic of docs/arithmetic.md on arrays of rows, in which any set of stages may be exact: real
numbers that are not rounded. With no stage exact it returns the codes of `reference.run`, bit by bit (a test holds it
to that); with all of them exact, the float layer in output LSB, neither rounded nor clamped. A stage that follows an
exact one rounds the real number it gets just as it would round an integer.

Rows of a spec that adds a residual hold the rows of both operands, side by side.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import proof
from ..adder import code_multipliers
from ..proof import NormKind
from ..quantization import QuantParams
from ..spec import LayerNormSpec

#: Elements computed at once, to bound the memory.
BLOCK_ELEMENTS = 1 << 16

#: Integers as int64, or real numbers.
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]


class Stage(StrEnum):
    """The places where the integers lose something, in the order of the computation."""

    INPUT = "input"
    INPUT_SATURATION = "input saturation"
    SUM = "sum"
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

    @classmethod
    def of(cls, spec: LayerNormSpec) -> list[Stage]:
        """Return the stages that a spec has."""
        return [stage for stage in cls if stage is not cls.SUM or spec.adder is not None]


_MEANINGS = {
    Stage.INPUT: "input values are not rounded to codes (they are still clipped)",
    Stage.INPUT_SATURATION: "input codes are not clipped (they are still rounded)",
    Stage.SUM: "inputs are brought to one scale and added as real numbers",
    Stage.EPS: "eps is the layer's, not E (outside the root, not A)",
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
    rows : ndarray of shape (rows, n), or (rows, 2n) with a residual
        Finite real values.
    exact : collection of Stage
        The stages that don't round, or don't clip.
    """
    real = np.longdouble if spec.lane == 64 else np.float64  # float64 holds every product of the narrower lanes
    n = spec.n
    u = _input(spec, rows, exact)
    u = u if _integers(u) else u.astype(real)
    S: Array
    V0: Array
    S, V0 = _moments(u, spec.kind is NormKind.LAYERNORM)
    V = _add_epsilon(spec, V0, Stage.EPS in exact)
    R = np.where(V0 > 0, _reciprocal_root(spec, V, exact), 0)

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
    x: Floats = np.sum([operand.astype(np.float64) for operand in operands(spec, rows)], axis=0)
    if spec.kind is NormKind.LAYERNORM:
        x = x - x.mean(axis=1, keepdims=True)
    power = np.square(x).mean(axis=1, keepdims=True)
    root = np.sqrt(power) + spec.eps if spec.eps_outside else np.sqrt(power + spec.eps)
    normalized = x / np.where(root > 0, root, 1.0)
    result: Floats = (normalized * np.array(spec.gamma) + np.array(spec.beta)) / output_steps(spec)
    return result + spec.output.channel_zeros(spec.n)


def output_steps(spec: LayerNormSpec) -> Floats:
    """Return the real value of an output LSB of each channel."""
    return spec.output.channel_steps(spec.n)


def operands(spec: LayerNormSpec, rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """Return the rows of each operand, the input's first: views."""
    return np.split(rows, len(spec.operands), axis=1)


def positions(params: QuantParams, rows: npt.NDArray[np.floating[Any]]) -> Floats:
    """Return where real values lie on the scale of their codes: neither rounded nor clipped, in LSB."""
    places: Floats = rows.astype(np.float64) / params.channel_steps(rows.shape[1]) + params.channel_zeros(rows.shape[1])
    return places


def _integers(*arrays: Array) -> bool:
    return all(array.dtype.kind == "i" for array in arrays)


def _shift(values: Array, bits: int) -> Array:
    """Divide by a power of two and round half up, integers or real numbers."""
    if _integers(values):
        return (values + (1 << (bits - 1))) >> bits
    rounded: Array = np.floor(np.ldexp(values, -bits) + values.dtype.type(0.5))
    return rounded


def _input(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]], exact: Collection[Stage]) -> Array:
    """Return u, equation (0)."""
    n, adder = spec.n, spec.adder
    codes = [_codes(params, values, exact) for params, values in zip(spec.operands, operands(spec, rows), strict=True)]
    if Stage.SUM in exact:
        steps = [params.channel_steps(n).astype(np.longdouble) / spec.scale for params in spec.operands]
        real: Array = np.sum([values * step for values, step in zip(codes, steps, strict=True)], axis=0)
        return real
    multipliers = code_multipliers(n, spec.operands, adder)
    # codes keep their products within 62 bits, values that are not clipped need not
    products = [values.astype(np.float64) * M for values, M in zip(codes, multipliers, strict=True)]
    if not all(np.abs(product).max(initial=0.0) < 2.0**61 for product in products) or not _integers(*codes):
        codes = [values.astype(np.longdouble) for values in codes]
    total: Array = np.sum([values * M for values, M in zip(codes, multipliers, strict=True)], axis=0)
    return total if adder is None or not adder.shift else _shift(total, adder.shift)


def _codes(params: QuantParams, rows: npt.NDArray[np.floating[Any]], exact: Collection[Stage]) -> Array:
    """Return the codes of an operand without their zero point."""
    codes: Array = params.quantize(rows).astype(np.int64)
    zeros = params.channel_zeros(rows.shape[1])
    if Stage.INPUT in exact or Stage.INPUT_SATURATION in exact:
        places = positions(params, rows)
        free = Stage.INPUT_SATURATION in exact
        if Stage.INPUT in exact:
            low, high = (-np.inf, np.inf) if free else (float(params.lo), float(params.hi))
            return np.clip(places, low, high) - zeros
        outside = (places < params.lo - 0.5) | (places > params.hi + 0.5)
        if np.abs(places).max(initial=0.0) >= 2.0**61:  # no integers any more
            return np.where(outside, np.rint(places), codes) - zeros
        codes = np.where(outside, np.rint(places).astype(np.int64), codes)
    return codes - zeros


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
    if exact and not spec.eps_outside:
        e = np.longdouble(spec.n) ** 2 * np.longdouble(spec.eps) / np.longdouble(spec.scale) ** 2
        V: Array = np.ldexp(V0.astype(np.longdouble) + e, 2 * spec.h)
        return V
    # codes keep V below 2**62, values that are not clipped need not
    if _integers(V0) and float(V0.max(initial=0)) < 2.0 ** (proof.V_BITS - 2 * spec.h):
        return (V0 << 2 * spec.h) + spec.E
    return np.ldexp(V0.astype(np.longdouble), 2 * spec.h) + spec.E


def _reciprocal_root(spec: LayerNormSpec, V: Array, exact: Collection[Stage]) -> Array:
    """Return n * 2**(K+h) / sqrt(V), with eps outside the root added to it: by equation (4), or exactly."""
    n, m, x = spec.n, spec.m, spec.K + spec.h
    positive = np.where(V > 0, V, 1)
    real_eps = np.longdouble(n) * np.longdouble(spec.eps) / np.longdouble(spec.scale) if spec.eps_outside else 0
    quotient: Array
    if Stage.ROOT in exact:
        eps = real_eps if Stage.EPS in exact else np.ldexp(np.longdouble(spec.A), -spec.l)
        quotient = np.ldexp(np.longdouble(n), x) / (np.sqrt(positive.astype(np.longdouble)) + eps)
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
    if spec.eps_outside and Stage.EPS in exact:
        root: Array = np.ldexp(r.astype(np.longdouble), -j) + real_eps
        y = _cut(spec, x + m - np.frexp(root)[1])
        quotient = np.ldexp(np.floor(np.ldexp(np.longdouble(n), x - y) / root + 0.5), y)
        return quotient
    if spec.A:
        k = np.minimum(j, spec.l)
        r = (r >> np.minimum(j - k, 63)) + (spec.A >> np.minimum(spec.l - k, 63))
        r, j = np.where(r >> m, r >> 1, r), k - (r >> m)
    y = _cut(spec, x + j)
    if _integers(V):
        quotient = ((np.int64(n) << (x + j - y)) + (r >> 1)) // r << y
        return quotient
    dividend = np.ldexp(np.longdouble(n), x + j - y) + (r >> 1)
    quotient = np.ldexp(np.floor(dividend / r), y)
    return quotient


def _cut(spec: LayerNormSpec, x: Array) -> Array:
    """Return by how many bits a shift of n is cut before the division, and the quotient shifted after it."""
    return np.maximum(x - proof.reciprocal_bits(spec.n), 0) if spec.lane == 64 else np.zeros_like(x)


def _output_parameters(spec: LayerNormSpec, real: Any, exact: Collection[Stage]) -> tuple[Array, Array]:
    """Return the gain with s2 - F fraction bits and the offset with s2, as real numbers where they are exact."""
    gain, offset = np.array(spec.G, dtype=np.int64), np.array(spec.B, dtype=np.int64)
    if Stage.GAMMA in exact:
        gain = np.ldexp(proof.output_gain(spec.gamma, spec.output).to_float().astype(real), spec.s2 - spec.F)
    if Stage.BETA in exact:
        offset = np.ldexp(proof.output_offset(spec.beta, spec.output).to_float().astype(real), spec.s2)
    return gain, offset
