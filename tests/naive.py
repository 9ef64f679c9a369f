"""Oracles that read like docs/arithmetic.md: rationals and exact roots, of the package only the spec's fields.

`codes`, `ideal` and `excess_terms` restate the function, the real value behind it and the bound; `hold` is the one way
in which the suite compares the implementations with each other and with the bound.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fxp_layernorm import FxpLayerNorm, LayerNormSpec, NormKind, QuantParams, reference

Codes = npt.NDArray[Any]

ZERO = Fraction(0)


def nearest(x: Fraction) -> int:
    """Round half up."""
    return math.floor(x + Fraction(1, 2))


def integers(spec: LayerNormSpec, row: list[int], residual: list[int] | None = None) -> list[int]:
    """Return one row's integers u, equation (0): the operands times their multipliers, and one rounding."""
    return [nearest(value) for value in weighted(spec, multipliers(spec), row, residual)]


def weighted(
    spec: LayerNormSpec, weights: list[list[Fraction]], row: list[int], residual: list[int] | None
) -> list[Fraction]:
    """Return the sum over the operands of each channel's code, less its zero point, times its weight."""
    rows = [row] if residual is None else [row, residual]
    total = [ZERO] * spec.n
    for codes, params, weight in zip(rows, spec.operands, weights, strict=True):
        zeros = zero_points(params, spec.n)
        total = [a + (q - z) * w for a, q, z, w in zip(total, codes, zeros, weight, strict=True)]
    return total


def multipliers(spec: LayerNormSpec) -> list[list[Fraction]]:
    """Return what a code of each operand and channel is worth in units of u, as the spec's integers have it."""
    if spec.adder is None:
        return [[Fraction(2**e) for e in spec.input.exponents or (0,) * spec.n]]
    return [
        [Fraction(M, 2**spec.adder.shift) for M in (factors if len(factors) > 1 else factors * spec.n)]
        for factors in spec.adder.multipliers
    ]


def zero_points(params: QuantParams, n: int) -> list[int]:
    """Return the code of 0 in each of `n` channels."""
    return list(params.zero_point) if isinstance(params.zero_point, tuple) else [params.zero_point] * n


def steps(params: QuantParams, n: int) -> list[Fraction]:
    """Return the real value of one LSB in each of `n` channels."""
    if params.channel_scales is not None:
        return [Fraction(scale) for scale in params.channel_scales]
    return [Fraction(params.scale) * 2**e for e in params.exponents or (0,) * n]


def real_sums(spec: LayerNormSpec, row: list[int], residual: list[int] | None = None) -> list[Fraction]:
    """Return the sum of the dequantized operands, in units of u: what equation (0) rounds."""
    scale = Fraction(spec.input.scale if spec.adder is None else spec.adder.scale)
    worth = [[step / scale for step in steps(params, spec.n)] for params in spec.operands]
    return weighted(spec, worth, row, residual)


def sum_codes(spec: LayerNormSpec, u: list[int]) -> list[int]:
    """Return one row's codes of the sum (section 10): u over a power of two, rounded half up and clamped."""
    params = spec.sum_output
    if params is None:
        return []
    assert spec.adder is not None
    assert spec.adder.sum_shift is not None
    rounded = [
        nearest(v / Fraction(2) ** (spec.adder.sum_shift + f)) + z
        for v, f, z in zip(u, params.exponents or (0,) * spec.n, zero_points(params, spec.n), strict=True)
    ]
    return [min(max(w, params.lo), params.hi) for w in rounded]


def codes(spec: LayerNormSpec, row: list[int], residual: list[int] | None = None) -> list[int]:
    """Return one row's output codes: equations (0) to (9), each rounding as the rational that it rounds."""
    n = spec.n
    u = integers(spec, row, residual)
    mean = Fraction(sum(u), n) if spec.kind is NormKind.LAYERNORM else ZERO
    V0 = n * sum((v - mean) ** 2 for v in u)  # n**2 times the variance, an integer
    assert int(V0) == V0
    c, R, D = nearest(mean), 0, 0
    if V0:
        V = int(V0) * 4**spec.h + spec.E
        j = spec.m - math.ceil(V.bit_length() / 2)
        r = math.isqrt(math.floor(V * Fraction(4) ** j))
        if spec.A:  # both on the coarser one's unit, then again m bits
            k = min(j, spec.l)
            r, j = math.floor(r * Fraction(2) ** (k - j)) + math.floor(spec.A * Fraction(2) ** (k - spec.l)), k
            if r.bit_length() > spec.m:
                r, j = r // 2, j - 1
        x = spec.K + spec.h + j
        y = max(x - (62 - n.bit_length()), 0) if spec.lane == 64 else 0
        R = nearest(n * Fraction(2) ** (x - y) / r) * 2**y
        D = nearest((mean - c) * R)
    t = [nearest(Fraction((v - c) * R - D, 2**spec.s1)) for v in u]
    lo, hi = spec.output.lo, spec.output.hi
    return [
        min(max(nearest(Fraction(v * G + B, 2**spec.s2)), lo), hi) for v, G, B in zip(t, spec.G, spec.B, strict=True)
    ]


def root(x: Fraction) -> Fraction:
    """Return the square root of a rational, 0 or to a relative error below 2**-200."""
    bits = 200 + x.denominator.bit_length()
    return Fraction(math.isqrt((x.numerator << 2 * bits) // x.denominator), 1 << bits)


def deviation(spec: LayerNormSpec, u: list[int] | list[Fraction]) -> Fraction:
    """Return what a row is divided by, in units of u."""
    mean = Fraction(sum(u)) / spec.n if spec.kind is NormKind.LAYERNORM else ZERO
    variance = sum(((v - mean) ** 2 for v in u), ZERO) / spec.n
    scale = Fraction(spec.input.scale if spec.adder is None else spec.adder.scale)
    eps = Fraction(spec.eps)
    return root(variance) + eps / scale if spec.eps_outside else root(variance + eps / scale**2)


def normalized(spec: LayerNormSpec, u: list[int] | list[Fraction]) -> list[Fraction]:
    """Return the normalized values of a row; zeros where all its values are equal."""
    mean = Fraction(sum(u)) / spec.n if spec.kind is NormKind.LAYERNORM else ZERO
    inverse = 1 / deviation(spec, u) if any(v != mean for v in u) else ZERO
    return [(v - mean) * inverse for v in u]


def ideal(spec: LayerNormSpec, row: list[int], residual: list[int] | None = None) -> list[Fraction]:
    """Return one row's real values in output LSB, from the integers u and the layer's definition."""
    return [
        (Fraction(gamma) * x + Fraction(beta)) / step + z
        for x, gamma, beta, step, z in zip(
            normalized(spec, integers(spec, row, residual)),
            spec.gamma, spec.beta, steps(spec.output, spec.n), zero_points(spec.output, spec.n),
            strict=True,
        )
    ]  # fmt: skip


@functools.lru_cache(maxsize=1)
def ends(spec: LayerNormSpec) -> tuple[list[int], list[int]]:
    """Return the lowest and the highest integer u of each channel."""
    lowest = integers(spec, *([params.lo] * spec.n for params in spec.operands))
    return lowest, integers(spec, *([params.hi] * spec.n for params in spec.operands))


def excess_terms(spec: LayerNormSpec, channel: int) -> dict[str, float]:
    """Return the bound's terms for one channel (docs/arithmetic.md, section 6)."""
    n = spec.n
    centred = spec.kind is NormKind.LAYERNORM
    lowest, highest = ends(spec)
    low, high = lowest[channel], highest[channel]
    if centred:  # this channel at one end, all others at the opposite one
        rest_low, rest_high = sum(lowest) - low, sum(highest) - high
        dev = max(high - Fraction(high + rest_low, n), Fraction(low + rest_high, n) - low)
    else:
        dev = Fraction(max(abs(low), abs(high)))
    V0min = max(n - 1, 1) if centred else n
    xmax = math.sqrt(n - 1 if centred else n)

    step = steps(spec.output, n)[channel]
    gain = Fraction(spec.gamma[channel]) / step
    b = Fraction(spec.beta[channel]) / step + zero_points(spec.output, n)[channel]
    g = float(abs(gain))
    reach = float(max(abs(spec.output.hi + Fraction(1, 2) - b), abs(spec.output.lo - Fraction(1, 2) - b)))
    gain_error = float(abs(spec.G[channel] * Fraction(2) ** (spec.F - spec.s2) - gain))
    X = min(xmax, reach / g) if g and gain_error <= g else xmax
    em = 2.0 ** (1 - spec.m) * (2 if spec.A else 1)
    scale = Fraction(spec.input.scale if spec.adder is None else spec.adder.scale)
    e = ZERO if spec.eps_outside else n**2 * Fraction(spec.eps) / scale**2
    E = Fraction(spec.E, 4**spec.h)
    v = V0min + E
    eE = float(abs(E - e)) / (float(v) + math.sqrt(float(v * (V0min + e))))
    half_R, half_t = 2.0 ** -(spec.K + 1), 2.0 ** -(spec.F + 1)
    rR = float(dev) * half_R
    if spec.lane == 64:
        rR = max(rR, X * (1 + eE) * (1 + em) * 2.0 ** (spec.m - (62 - n.bit_length()) - 1) / n)
    return {
        "R": g * rR,
        "D": g * half_R,
        "r": g * X * em,
        "E": g * X * eE * (1 + em),
        "t": g * half_t,
        "G": gain_error * (X * (1 + eE) * (1 + em) + rR + half_R + half_t),
        "B": float(abs(Fraction(spec.B[channel], 2**spec.s2) - b)),
    }


@dataclass(frozen=True)
class Comparison:
    """How codes compare with the correctly rounded ideal: the part that differs, and by how many LSB at most."""

    differing: float
    steps: int


def compare(spec: LayerNormSpec, q: Codes, y: Codes, residual: Codes | None = None) -> Comparison:
    """Assert ``|y - clamp(ideal)| <= 1/2 + excess`` for every code, with the spec's own proved excess."""
    lo, hi = spec.output.lo, spec.output.hi
    real = reference.ideal(spec, q, residual)
    distance = float(np.abs(y - np.clip(real, lo, hi)).max(initial=0))
    assert distance <= 0.5 + spec.excess, f"an output is {distance} LSB from the ideal; 1/2 + {spec.excess} is proved"
    off = np.abs(y - np.clip(np.floor(real + 0.5), lo, hi))
    return Comparison(float(np.mean(off > 0)), int(off.max(initial=0)))


def hold(spec: LayerNormSpec, q: Codes, residual: Codes | None = None, *, kernel: bool = True) -> float:
    """Assert that kernel and reference agree in every code, and that both keep the proved bound.

    Before the final rounding the bound is `excess` alone. There each code shows its error, not only the few whose ideal
    lies next to a tie; the largest such error, in LSB, is returned. For rows of the last dimensions.
    """
    rows = [codes.reshape(-1, spec.n).tolist() for codes in (q, residual) if codes is not None]
    stages = [reference.row_stages(spec, *row) for row in zip(*rows, strict=True)]
    y = np.array([row.y for row in stages]).reshape(q.shape)
    if kernel:
        norm = FxpLayerNorm(spec)
        np.testing.assert_array_equal(norm(q, residual=residual), y)
        if spec.sum_output is not None:
            again, sums = norm.with_sum(q, residual)
            np.testing.assert_array_equal(again, y)
            np.testing.assert_array_equal(sums, np.array([row.w for row in stages]).reshape(q.shape))
    compare(spec, q, y, residual)

    t = np.array([row.t for row in stages])
    assert np.abs(t).max(initial=0) <= spec.row_stage.t_max(spec.s1)
    a = t * np.array(spec.G) + np.array(spec.B)
    real = reference.ideal(spec, q, residual).reshape(a.shape)
    inside = (real >= spec.output.lo - 0.5) & (real <= spec.output.hi + 0.5)
    error = float(np.abs(a / np.longdouble(2**spec.s2) - real)[inside].max(initial=0))
    assert error <= spec.excess, f"a value is {error} LSB from the ideal before its rounding; {spec.excess} is proved"
    return error
