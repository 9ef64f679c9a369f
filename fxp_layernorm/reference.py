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
from .adder import code_multipliers, width
from .axes import check_shape, from_rows, to_rows
from .errors import CodeTypeError, InputError, WidthError
from .proof import NormKind
from .quantization import QuantParams
from .spec import LayerNormSpec


@dataclass(frozen=True)
class RowStages:
    """Every intermediate integer of one row; lists hold one value a channel. The names are those of the equations.

    `w` holds the codes of the sum where it is an output, else nothing.
    """

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
    w: list[int]


def row_stages(spec: LayerNormSpec, codes: list[int], residual: list[int] | None = None) -> RowStages:
    """Compute one row of `spec.n` codes, and as many of the residual, keeping what lies between."""
    n, m, K, h, lane = spec.n, spec.m, spec.K, spec.h, spec.lane
    centred = spec.kind is NormKind.LAYERNORM

    u = input_stage(spec, [codes] if residual is None else [codes, residual])  # (0)
    S = _fit(sum(u), 63, "S")  # (1)
    Q = sum(v * v for v in u)  # (2); only V0 need be exact, so Q may wrap
    V0 = n * Q - (S * S if centred else 0)  # (3)
    V = _fit((V0 << 2 * h) + spec.E, proof.V_BITS + 1, "V")
    cut = proof.reciprocal_bits(n) if lane == 64 else None
    r, R = reciprocal_root(V, n=n, m=m, x=K + h, cut=cut, A=spec.A, l=spec.l) if V0 else (0, 0)
    _fit(R, lane, "R")
    c = (2 * S + n) // (2 * n) if centred else 0  # (5)
    d = S - n * c if centred else 0
    D = (_fit(2 * d * R + n, 64, "2dR + n")) // (2 * n)

    t, y = [], []
    half1, half2 = 1 << (spec.s1 - 1), 1 << (spec.s2 - 1)
    for v, G, B in zip(u, spec.G, spec.B, strict=True):
        p = _fit(_fit(_fit(v - c, lane, "u - c") * R, lane, "(u - c) * R") - D, lane, "p")  # (6)
        t.append(_fit(p + half1, lane, "p + half") >> spec.s1)  # (7)
        a = _fit(t[-1] * G + B, spec.accumulator, "a")  # (8)
        shifted = _fit(a + half2, spec.accumulator, "a + half") >> spec.s2  # (9)
        y.append(min(max(shifted, spec.output.lo), spec.output.hi))
    return RowStages(u, S, Q, V, r, R, c, D, t, y, sum_codes(spec, u))


def input_stage(spec: LayerNormSpec, operands: list[list[int]]) -> list[int]:
    """Return u of equation (0) from the codes of each operand."""
    n, adder = spec.n, spec.adder
    half, shift = (adder.half, adder.shift) if adder is not None else (0, 0)
    bits = 1 + width(spec.operands, spec.lane)
    total = [half] * n
    multipliers = code_multipliers(n, spec.operands, adder)
    for codes, params, M in zip(operands, spec.operands, multipliers, strict=True):
        products = [
            _fit((q - z) * factor, bits, "(q - z) * M")
            for q, z, factor in zip(codes, params.channel_zeros(n).tolist(), M.tolist(), strict=True)
        ]
        total = [_fit(a + b, bits, "the sum of the inputs") for a, b in zip(total, products, strict=True)]
    return [_fit(value >> shift, 32, "u") for value in total]


def sum_codes(spec: LayerNormSpec, u: list[int]) -> list[int]:
    """Return the codes of the sum, equation (31), where it is an output."""
    params = spec.sum_output
    if params is None or spec.adder is None or spec.adder.sum_shift is None:
        return []
    codes = []
    constants = zip(params.channel_exponents(spec.n), params.channel_zeros(spec.n).tolist(), strict=True)
    for value, (exponent, zero_point) in zip(u, constants, strict=True):
        shift = spec.adder.sum_shift + exponent
        rounded = (value + ((1 << shift) >> 1)) >> shift if shift >= 0 else _fit(value << -shift, 63, "u << -shift")
        codes.append(min(max(rounded + zero_point, params.lo), params.hi))
    return codes


def reciprocal_root(V: int, *, n: int, m: int, x: int, cut: int | None, A: int = 0, l: int = 0) -> tuple[int, int]:
    """Return r and R of equation (4): the root of V to m bits, with eps outside it added, and n * 2**x over it.

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
    A, l : int
        eps outside the root: A * 2**-l is added to the root of V.
    """
    j = m - ((V.bit_length() + 1) >> 1)
    r = math.isqrt(_fit(V << 2 * j if j >= 0 else V >> -2 * j, 63, "w"))
    if A:
        k = min(j, l)
        r, j = (r >> (j - k)) + (A >> (l - k)), k
        if r >> m:
            r, j = r >> 1, j - 1
    x += j
    y = 0 if cut is None else max(x - cut, 0)
    dividend = _fit((n << (x - y)) + (r >> 1), 64, "the dividend of R")
    return _fit(r, m + 1, "r"), (dividend // r) << y


def run(spec: LayerNormSpec, q: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> npt.NDArray[Any]:
    """Return the output codes of input codes, by the definition, in Python integers.

    Parameters
    ----------
    spec : LayerNormSpec
    q : array_like
        Codes of the dtype ``spec.input.dtype``, with the dimensions ``spec.normalized_shape`` at ``spec.axes``.
    residual : array_like, optional
        Codes of ``spec.residual`` of the same shape, where the spec has one.

    Returns
    -------
    ndarray
        Of the shape of `q` and the dtype ``spec.output.dtype``.

    Raises
    ------
    CodeTypeError, InputError
        If the dtype or the shape is another, or a code is out of its range.
    WidthError
        If a value leaves its proved width, which would be a bug.
    """
    return _run(spec, q, residual)[0]


def run_with_sum(
    spec: LayerNormSpec, q: npt.ArrayLike, residual: npt.ArrayLike | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the output codes, as `run` does, and the codes of the sum, of the dtype ``spec.sum_output.dtype``."""
    y, w = _run(spec, q, residual)
    if w is None:
        raise InputError("the spec has no sum_output")
    return y, w


def _run(
    spec: LayerNormSpec, q: npt.ArrayLike, residual: npt.ArrayLike | None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    operands = check_operands(spec, q, residual)
    rows = [to_rows(codes, spec.normalized_shape, spec.axes).tolist() for codes in operands]
    stages = [row_stages(spec, *row) for row in zip(*rows, strict=True)]

    def result(codes: list[list[int]], params: QuantParams) -> npt.NDArray[Any]:
        array = np.array(codes, dtype=params.dtype.numpy).reshape(-1, spec.n)
        return from_rows(array, operands[0].shape, spec.axes)

    y = result([row.y for row in stages], spec.output)
    return y, None if spec.sum_output is None else result([row.w for row in stages], spec.sum_output)


def ideal(spec: LayerNormSpec, q: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> npt.NDArray[np.longdouble]:
    """Return the real value, in output LSB, that the integers u stand for; neither rounded nor clamped.

    That is ``(gamma * (x - mean) / sqrt(var + eps) + beta) / s_out + z_out`` of the dequantized input, or of the sum
    after the input stage has rounded it. Sums and the variance are exact integers; the rest is NumPy's longdouble (64
    bits of mantissa on x86, where the result is good to 1e-14 LSB; 53 or 113 bits elsewhere). A row of equal values
    gives beta, also where eps is 0.
    """
    operands = check_operands(spec, q, residual)
    n, real = spec.n, np.longdouble
    u = np.full((operands[0].size // n, n), 0 if spec.adder is None else spec.adder.half, dtype=np.int64)
    for codes, params, M in zip(operands, spec.operands, code_multipliers(n, spec.operands, spec.adder), strict=True):
        u += (to_rows(codes, spec.normalized_shape, spec.axes).astype(np.int64) - params.channel_zeros(n)) * M
    u >>= 0 if spec.adder is None else spec.adder.shift
    S = u.sum(axis=1, keepdims=True)
    V0 = n * np.square(u).sum(axis=1, keepdims=True)  # modulo 2**64, as V0 is below 2**62
    deviation = n * u
    if spec.kind is NormKind.LAYERNORM:
        V0 -= S * S
        deviation -= S
    eps, scale = real(spec.eps), real(spec.scale)
    wide = V0.astype(real)
    root = np.sqrt(wide) + n * eps / scale if spec.eps_outside else np.sqrt(wide + real(n) ** 2 * eps / scale**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        normalized = np.where(V0 > 0, deviation.astype(real) / root, real(0))
    steps = spec.output.channel_steps(n).astype(real)
    gamma, beta = np.asarray(spec.gamma, dtype=real), np.asarray(spec.beta, dtype=real)
    values: npt.NDArray[np.longdouble] = (gamma * normalized + beta) / steps + spec.output.channel_zeros(n)
    return from_rows(values, operands[0].shape, spec.axes)


def check_operands(spec: LayerNormSpec, q: npt.ArrayLike, residual: npt.ArrayLike | None) -> list[npt.NDArray[Any]]:
    """Return the codes of each operand as arrays after checking them against the spec."""
    if (residual is not None) != (spec.residual is not None):
        raise InputError("the spec adds a residual; give its codes" if spec.residual else "the spec adds no residual")
    codes = [check_codes(spec, q, spec.input)]
    if residual is not None and spec.residual is not None:
        codes.append(check_codes(spec, residual, spec.residual))
        if codes[0].shape != codes[1].shape:
            raise InputError(f"the codes have the shape {codes[0].shape}, those of the residual {codes[1].shape}")
    return codes


def check_codes(spec: LayerNormSpec, q: npt.ArrayLike, params: QuantParams) -> npt.NDArray[Any]:
    """Return `q` as an array after checking its dtype, its shape and its range."""
    codes = np.asarray(q)
    if codes.dtype != params.dtype.numpy:
        raise CodeTypeError(f"codes of type {codes.dtype} were given; the spec takes {params.dtype.numpy}")
    check_shape(codes.shape, spec.normalized_shape, spec.axes)
    if outside := params.outside(codes):
        raise InputError(f"{outside} codes are outside the range {params.lo} to {params.hi} of {params.dtype}")
    return codes


def _fit(value: int, bits: int, name: str) -> int:
    """Return the value if a two's complement number of `bits` bits holds it."""
    if not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
        raise WidthError(f"{name} = {value} doesn't fit {bits} bits")
    return value
