"""Integer LayerNorms of other projects, written anew from their published formulas, for rows of integers.

Each function states its formula; ``tdiv`` is division rounded towards zero as in C, ``//`` and ``>>`` are floors.
Arrays are int64 of shape (rows, n), and no value wraps unless the formula says so: where the original computes in 32
bits, its callers here keep within them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

#: sqrt(1/2) in Q0.31.
_HALF_SQRT_2 = 1_518_500_250


def tdiv(a: Any, b: Any) -> Integers:
    """Return a / b rounded towards zero; b is positive."""
    quotient: Integers = np.sign(a) * (np.abs(a) // b)
    return quotient


def high_product(a: Any, b: Any) -> Integers:
    """Return gemmlowp's SaturatingRoundingDoublingHighMul: ``tdiv(ab + (2^30 or 1 - 2^30), 2^31)`` by the sign of ab.

    It saturates for a = b = -2^31 alone, which doesn't occur here.
    """
    product = np.asarray(a, dtype=np.int64) * b
    return tdiv(product + np.where(product >= 0, 1 << 30, 1 - (1 << 30)), 1 << 31)


def rounding_shift(x: Any, bits: Any) -> Integers:
    """Return gemmlowp's RoundingDivideByPOT: ``x >> bits``, ties away from zero."""
    x, bits = np.asarray(x, dtype=np.int64), np.asarray(bits, dtype=np.int64)
    remainder = x & ((np.int64(1) << bits) - 1)
    threshold = (((np.int64(1) << bits) - 1) >> 1) + (x < 0)
    shifted: Integers = (x >> bits) + (remainder > threshold)
    return shifted


def quantized_product(x: Any, multiplier: Any, shift: Any) -> Integers:
    """Return TFLite's MultiplyByQuantizedMultiplier: x * multiplier * 2^(shift - 31), rounded twice."""
    left, right = np.maximum(shift, 0), np.maximum(np.negative(shift), 0)
    return rounding_shift(high_product(np.asarray(x, dtype=np.int64) << left, multiplier), right)


def quantized_multiplier(value: float) -> tuple[int, int]:
    """Return the multiplier of 31 bits and the shift of TFLite for a real factor."""
    fraction, exponent = np.frexp(value)
    multiplier = round(float(fraction) * 2**31)
    return (multiplier // 2, int(exponent) + 1) if multiplier == 2**31 else (multiplier, int(exponent))


def inverse_root(v: Integers) -> tuple[Integers, Integers]:
    """Return TFLite's 1 / sqrt(v), 1 <= v < 2^31, as a multiplier of 31 bits and a right shift.

    v is brought to [2^27, 2^29); five Newton steps x = 3/2 x - v/2 x^3 in Q3.28 from x = 1; times sqrt(1/2).
    """
    large = v >= 1 << 29
    w = np.where(large, v >> 2, v)
    pairs = (31 - np.frexp(w.astype(np.float64))[1].astype(np.int64)) // 2 - 1
    shift = 11 + large - pairs
    half = rounding_shift((w << 2 * pairs) >> 1, 1)
    x = np.full_like(w, 1 << 28)
    for _ in range(5):
        cube = _saturated(high_product(high_product(x, x), x) << 6)
        x = _saturated((high_product(x, 3 << 27) - high_product(half, cube)) << 3)
    x = high_product(x, _HALF_SQRT_2) << np.maximum(-shift, 0)
    one = v <= 1
    return np.where(one, 2**31 - 1, x), np.where(one, 0, np.maximum(shift, 0))


def tflite(
    x: Integers, weight: Integers, bias: Integers, multiplier: int, shift: int, variance_limit: int = 1
) -> Integers:
    """Return the LayerNorm of TFLite's integer LSTM: int16 in, int16 out.

    ``m = tdiv(1024 S, n)``, ``v = tdiv(Q * tdiv(2^20, n) - m^2, 2^20)``, the limit where that is below 1;
    ``r = (1024 x - m) / sqrt(v)`` with 10 fraction bits; ``a = r * weight + bias``, rounded by 10 bits; then the
    multiplier. `weight` is int16, `bias` has 10 fraction bits more.
    """
    n = x.shape[1]
    mean = tdiv(1024 * x.sum(axis=1, keepdims=True), n)
    squares = np.square(x).sum(axis=1, keepdims=True)
    variance = tdiv(squares * tdiv(1 << 20, n) - mean * mean, 1 << 20)
    inverse, right = inverse_root(np.where(variance < 1, variance_limit, variance))
    r = quantized_product(1024 * x - mean, inverse, -right)
    a = r * weight + bias
    y = quantized_product(tdiv(np.where(a > 0, a + 512, a - 512), 1024), multiplier, shift)
    clamped: Integers = np.clip(y, -(1 << 15), (1 << 15) - 1)
    return clamped


def i_vit(x: Integers, offset: Integers) -> Integers:
    """Return I-ViT's integers: the normalized value and the offset with 30 - log2(sqrt n) fraction bits.

    ``y = x - round(mean)``, ``V = sum y^2``; k = 2^16, ten times ``k = (k + V // k) // 2``;
    ``z = (y * ((2^31 - 1) // k)) // 2 + offset``, the offset being floor(beta / gamma * 2^30 / sqrt n).
    """
    y = x - np.rint(x.mean(axis=1, keepdims=True)).astype(np.int64)
    V = np.square(y).sum(axis=1, keepdims=True)
    k = np.full_like(V, 1 << 16)
    for _ in range(10):
        k = (k + V // k) // 2
    normalized: Integers = (y * ((2**31 - 1) // k)) // 2 + offset
    return normalized


def fq_vit(x: Integers, gamma: Floats, beta: Floats) -> Floats:
    """Return FQ-ViT's output in LSB, for gamma and beta in LSB; only its last line is in integers.

    ``A = gamma / std``, ``N = clamp(7 - floor(log2 |A|), 0, 31)``, ``M = min(255, floor(|A| 2^N))``,
    ``y = round((sgn(A) M x + round((beta - mean / std * gamma) 2^N)) / 2^N)``; not finite where std is 0.
    """
    n = x.shape[1]
    total = x.sum(axis=1, keepdims=True)
    std = np.sqrt((n * np.square(x).sum(axis=1, keepdims=True) - total * total).astype(np.float64)) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        A = gamma / std
        N = np.clip(7 - np.floor(np.log2(np.abs(A))), 0, 31)
        M = np.clip(np.floor(np.abs(A) * 2**N), 0, 255)
        B = np.rint((beta - total / n / std * gamma) * 2**N)
        y: Floats = np.rint((np.sign(A) * M * x + B) / 2**N)
    return y


def deeploy(x: Integers, weight: Integers, bias: Integers, log2_d: int, *, wraps: bool = True) -> Integers:
    """Return Deeploy's iLayerNorm: int8 in, int8 out, where its C kernel wraps and quantlib's definition clamps.

    ``m = tdiv(S, n)``, ``std = isqrt(tdiv(sum (x - m)^2, n) + 1)``,
    ``y = (tdiv((x - m) * weight, std) + bias) >> log2_d``.
    """
    n = x.shape[1]
    y = x - tdiv(x.sum(axis=1, keepdims=True), n)
    variance = np.square(y).sum(axis=1, keepdims=True) // n + 1
    std = np.sqrt(variance.astype(np.float64)).astype(np.int64)  # exact: variances of int8 stay below 2^17
    shifted = (tdiv(y * weight, std) + bias) >> log2_d
    return shifted.astype(np.int8).astype(np.int64) if wraps else np.clip(shifted, -128, 127)


def _saturated(x: Any) -> Integers:
    clipped: Integers = np.clip(x, -(1 << 31), (1 << 31) - 1)
    return clipped
