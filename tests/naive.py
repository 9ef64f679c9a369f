"""Oracles that read like docs/arithmetic.md: rationals and exact roots, of the package only the spec's fields.

`codes`, `ideal` and `excess_terms` restate the function, the real value behind it and the bound; `hold` is the one way
in which the suite compares the implementations with each other and with the bound.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from fxp_layernorm import FxpLayerNorm, LayerNormSpec, NormKind, reference

Codes = npt.NDArray[Any]


def nearest(x: Fraction) -> int:
    """Round half up."""
    return math.floor(x + Fraction(1, 2))


def codes(spec: LayerNormSpec, row: list[int]) -> list[int]:
    """Return one row's output codes: equations (0) to (9), each rounding as the rational that it rounds."""
    n = spec.n
    exponents = spec.input.exponents or (0,) * n
    u = [(q - spec.input.zero_point) * 2**e for q, e in zip(row, exponents, strict=True)]
    mean = Fraction(sum(u), n) if spec.kind is NormKind.LAYERNORM else Fraction(0)
    V0 = n * sum((v - mean) ** 2 for v in u)  # n**2 times the variance, an integer
    assert int(V0) == V0
    c, R, D = nearest(mean), 0, 0
    if V0:
        V = int(V0) * 4**spec.h + spec.E
        j = spec.m - math.ceil(V.bit_length() / 2)
        r = math.isqrt(math.floor(V * Fraction(4) ** j))
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
    """Return the square root of a positive rational to a relative error below 2**-200."""
    bits = 200 + x.denominator.bit_length()
    return Fraction(math.isqrt((x.numerator << 2 * bits) // x.denominator), 1 << bits)


def ideal(spec: LayerNormSpec, row: list[int]) -> list[Fraction]:
    """Return one row's real values in output LSB, from the dequantized input and the layer's definition."""
    n, scale = spec.n, Fraction(spec.input.scale)
    exponents = spec.input.exponents or (0,) * n
    x = [scale * 2**e * (q - spec.input.zero_point) for q, e in zip(row, exponents, strict=True)]
    mean = sum(x) / n if spec.kind is NormKind.LAYERNORM else Fraction(0)
    variance = sum((v - mean) ** 2 for v in x) / n
    inverse = 1 / root(variance + Fraction(spec.eps)) if variance else Fraction(0)
    steps = [Fraction(spec.output.scale) * 2**f for f in spec.output.exponents or (0,) * n]
    return [
        (Fraction(gamma) * (v - mean) * inverse + Fraction(beta)) / step + spec.output.zero_point
        for v, gamma, beta, step in zip(x, spec.gamma, spec.beta, steps, strict=True)
    ]


def excess_terms(spec: LayerNormSpec, channel: int) -> dict[str, float]:
    """Return the bound's terms for one channel (docs/arithmetic.md, section 6)."""
    n, z, q = spec.n, spec.input.zero_point, spec.input
    centred = spec.kind is NormKind.LAYERNORM
    ends = [((q.lo - z) * 2**e, (q.hi - z) * 2**e) for e in spec.input.exponents or (0,) * n]
    low, high = ends[channel]
    if centred:  # this channel at one end, all others at the opposite one
        rest_low, rest_high = sum(a for a, _ in ends) - low, sum(b for _, b in ends) - high
        dev = max(high - Fraction(high + rest_low, n), Fraction(low + rest_high, n) - low)
    else:
        dev = Fraction(max(abs(low), abs(high)))
    V0min = max(n - 1, 1) if centred else n
    xmax = math.sqrt(n - 1 if centred else n)

    step = Fraction(spec.output.scale) * 2 ** (spec.output.exponents or (0,) * n)[channel]
    gain, b = Fraction(spec.gamma[channel]) / step, Fraction(spec.beta[channel]) / step + spec.output.zero_point
    g = float(abs(gain))
    reach = float(max(abs(spec.output.hi + Fraction(1, 2) - b), abs(spec.output.lo - Fraction(1, 2) - b)))
    gain_error = float(abs(spec.G[channel] * Fraction(2) ** (spec.F - spec.s2) - gain))
    X = min(xmax, reach / g) if g and gain_error <= g else xmax
    em = 2.0 ** (1 - spec.m)
    e, E = n**2 * Fraction(spec.eps) / Fraction(spec.input.scale) ** 2, Fraction(spec.E, 4**spec.h)
    v = V0min + E
    eE = float(abs(E - e)) / (float(v) + math.sqrt(float(v * (V0min + e))))
    half_R, half_t = 2.0 ** -(spec.K + 1), 2.0 ** -(spec.F + 1)
    rR = float(dev) * half_R
    if spec.lane == 64:
        rR = max(rR, X * (1 + eE) * 2.0 ** (spec.m - (62 - n.bit_length()) - 1) / n)
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


def compare(spec: LayerNormSpec, q: Codes, y: Codes) -> Comparison:
    """Assert ``|y - clamp(ideal)| <= 1/2 + excess`` for every code, with the spec's own proved excess."""
    lo, hi = spec.output.lo, spec.output.hi
    real = reference.ideal(spec, q)
    distance = float(np.abs(y - np.clip(real, lo, hi)).max(initial=0))
    assert distance <= 0.5 + spec.excess, f"an output is {distance} LSB from the ideal; 1/2 + {spec.excess} is proved"
    off = np.abs(y - np.clip(np.floor(real + 0.5), lo, hi))
    return Comparison(float(np.mean(off > 0)), int(off.max(initial=0)))


def hold(spec: LayerNormSpec, q: Codes, *, kernel: bool = True) -> float:
    """Assert that kernel and reference agree in every code, and that both keep the proved bound.

    Before the final rounding the bound is `excess` alone. There each code shows its error, not only the few whose ideal
    lies next to a tie; the largest such error, in LSB, is returned.
    """
    stages = [reference.row_stages(spec, row) for row in q.reshape(-1, spec.n).tolist()]
    y = np.array([row.y for row in stages]).reshape(q.shape)
    if kernel:
        np.testing.assert_array_equal(FxpLayerNorm(spec)(q), y)
    compare(spec, q, y)

    t = np.array([row.t for row in stages])
    assert np.abs(t).max(initial=0) <= spec.row_stage.t_max(spec.s1)
    a = t * np.array(spec.G) + np.array(spec.B)
    real = reference.ideal(spec, q).reshape(a.shape)
    inside = (real >= spec.output.lo - 0.5) & (real <= spec.output.hi + 0.5)
    error = float(np.abs(a / np.longdouble(2**spec.s2) - real)[inside].max(initial=0))
    assert error <= spec.excess, f"a value is {error} LSB from the ideal before its rounding; {spec.excess} is proved"
    return error
