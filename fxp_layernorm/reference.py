"""The normative definition in Python integers, and the real value that it stands for.

`row_stages` is docs/arithmetic.md in code, equation by equation; every other implementation returns the same integers.
It counts the bits of each intermediate value as it goes and raises WidthError if one leaves its proved width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import proof
from .errors import CodeTypeError, InputError, WidthError
from .proof import NormKind
from .spec import LayerNormSpec


@dataclass(frozen=True)
class RowStages:
    """Every intermediate integer of one row; lists hold one value a channel. The names are those of the equations."""

    u: list[int]
    S: int
    Q: int
    V: int
    r: int
    R: int
    c: int
    D: int
    t: list[int]
    y: list[int]


def row_stages(spec: LayerNormSpec, codes: list[int]) -> RowStages:
    """Compute one row of `spec.n` codes, keeping what lies between."""
    n, m, K, h, lane = spec.n, spec.m, spec.K, spec.h, spec.lane
    centred = spec.kind is NormKind.LAYERNORM
    exponents = spec.input.channel_exponents(n)

    u = [(q - spec.input.zero_point) << e for q, e in zip(codes, exponents, strict=True)]  # (0)
    S = _fit(sum(u), 63, "S")  # (1)
    Q = sum(v * v for v in u)  # (2); only V0 need be exact, so Q may wrap
    V0 = n * Q - (S * S if centred else 0)  # (3)
    V = _fit((V0 << 2 * h) + spec.E, proof.V_BITS + 1, "V")
    r, R = reciprocal_root(V, n=n, m=m, x=K + h, cut=proof.reciprocal_bits(n) if lane == 64 else None) if V0 else (0, 0)
    _fit(R, lane, "R")
    c = (2 * S + n) // (2 * n) if centred else 0  # (5)
    d = S - n * c if centred else 0
    D = (_fit(2 * d * R + n, 64, "2dR + n")) // (2 * n)

    t, y = [], []
    half1, half2 = 1 << (spec.s1 - 1), 1 << (spec.s2 - 1)
    for v, G, B in zip(u, spec.G, spec.B, strict=True):
        p = _fit(_fit(_fit(v - c, lane, "u - c") * R, lane, "(u - c) * R") - D, lane, "p")  # (6)
        t.append(_fit(p + half1, lane, "p + half") >> spec.s1)  # (7)
        a = _fit(t[-1] * G + B, proof.OUTPUT_BITS[lane], "a")  # (8)
        shifted = _fit(a + half2, proof.OUTPUT_BITS[lane], "a + half") >> spec.s2  # (9)
        y.append(min(max(shifted, spec.output.dtype.lo), spec.output.dtype.hi))
    return RowStages(u, S, Q, V, r, R, c, D, t, y)


def reciprocal_root(V: int, *, n: int, m: int, x: int, cut: int | None) -> tuple[int, int]:
    """Return r and R of equation (4): the root of V to m bits, and n * 2**x over it.

    Parameters
    ----------
    V : int
        From 1 to below 2**62.
    n : int
        Length of the row.
    m : int
        Bits of r.
    x : int
        K + h.
    cut : int or None
        The largest shift of n before the division, or None where it needs no limit.
    """
    j = m - ((V.bit_length() + 1) >> 1)
    r = math.isqrt(_fit(V << 2 * j if j >= 0 else V >> -2 * j, 63, "w"))
    x += j
    y = 0 if cut is None else max(x - cut, 0)
    dividend = _fit((n << (x - y)) + (r >> 1), 64, "the dividend of R")
    return _fit(r, m + 1, "r"), (dividend // r) << y


def run(spec: LayerNormSpec, q: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return the output codes of input codes, by the definition, in Python integers.

    Parameters
    ----------
    spec : LayerNormSpec
    q : array_like of shape (..., *spec.normalized_shape)
        Codes of the dtype ``spec.input.dtype``.

    Returns
    -------
    ndarray
        Of the shape of `q` and the dtype ``spec.output.dtype``.

    Raises
    ------
    CodeTypeError, InputError
        If the dtype or the trailing shape is another.
    WidthError
        If a value leaves its proved width, which would be a bug.
    """
    codes = check_codes(spec, q)
    rows = [row_stages(spec, row).y for row in codes.reshape(-1, spec.n).tolist()]
    return np.array(rows, dtype=spec.output.dtype.numpy).reshape(codes.shape)


def ideal(spec: LayerNormSpec, q: npt.ArrayLike) -> npt.NDArray[np.longdouble]:
    """Return the real value, in output LSB, that the codes stand for; neither rounded nor clamped.

    That is ``(gamma * (x - mean) / sqrt(var + eps) + beta) / s_out + z_out`` of the dequantized input. Sums and the
    variance are exact integers; the rest is NumPy's longdouble (64 bits of mantissa on x86, where the result is good
    to 1e-14 LSB; 53 or 113 bits elsewhere). A row of equal values gives beta, also where eps is 0.
    """
    codes = check_codes(spec, q)
    n, real = spec.n, np.longdouble
    shape = codes.shape
    u = codes.reshape(-1, n).astype(np.int64) - spec.input.zero_point
    u <<= np.asarray(spec.input.channel_exponents(n), dtype=np.int64)
    S = u.sum(axis=1, keepdims=True)
    V0 = n * np.square(u).sum(axis=1, keepdims=True)  # modulo 2**64, as V0 is below 2**62
    deviation = n * u
    if spec.kind is NormKind.LAYERNORM:
        V0 -= S * S
        deviation -= S
    e = real(n) ** 2 * real(spec.eps) / real(spec.input.scale) ** 2
    with np.errstate(invalid="ignore", divide="ignore"):
        normalized = np.where(V0 > 0, deviation.astype(real) / np.sqrt(V0.astype(real) + e), real(0))
    scale = real(spec.output.scale) * np.exp2(np.asarray(spec.output.channel_exponents(n), dtype=real))
    gamma, beta = np.asarray(spec.gamma, dtype=real), np.asarray(spec.beta, dtype=real)
    values: npt.NDArray[np.longdouble] = (gamma * normalized + beta) / scale + spec.output.zero_point
    return values.reshape(shape)


def check_codes(spec: LayerNormSpec, q: npt.ArrayLike) -> npt.NDArray[Any]:
    """Return `q` as an array after checking its dtype and its trailing shape against the spec."""
    codes = np.asarray(q)
    if codes.dtype != spec.input.dtype.numpy:
        raise CodeTypeError(f"codes of type {codes.dtype} were given; the spec takes {spec.input.dtype}")
    dims = len(spec.normalized_shape)
    if codes.ndim < dims or codes.shape[codes.ndim - dims :] != spec.normalized_shape:
        raise InputError(
            f"codes of shape {codes.shape} were given; the last dimensions must be {spec.normalized_shape}"
        )
    return codes


def _fit(value: int, bits: int, name: str) -> int:
    """Return the value if a two's complement number of `bits` bits holds it."""
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise WidthError(f"{name} = {value} doesn't fit {bits} bits")
    return value
