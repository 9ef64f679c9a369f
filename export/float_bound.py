"""What float32 may give: how far a norm's or a quantizer's codes may be from the real value, whichever way it computes.

The bound holds for sums in any order, variances as the mean of squared deviations or as E[x^2] - E[x]^2, divisions or
products with reciprocals, with or without fused multiplications and additions. It is the standard analysis of rounding
errors, with gamma_k = k*u / (1 - k*u) for k roundings of at most u = 2^-24 each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..proof import NormKind
from ..quantization import QuantParams
from ..spec import LayerNormSpec

#: Squares beyond these powers of two may leave float32's normal numbers, and then nothing is known.
_SMALLEST, _LARGEST = 2.0**-100, 2.0**100

#: How often what a norm reads may have been rounded, in proportion to the magnitudes that are added: a scale, its
#: product with a code, the sum of two, and room for the rounding of what follows.
_ADDEND = 6

Rows = npt.NDArray[np.float64]


def beyond_float32(
    spec: LayerNormSpec, operands: Sequence[npt.NDArray[Any]], got: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Return which output codes no float32 norm gives.

    Parameters
    ----------
    spec : LayerNormSpec
    operands : sequence of ndarray of shape (rows, n)
        Input codes, and those of the residual where there is one.
    got : ndarray of shape (rows, n)
        Output codes.
    """
    value, error = float32_norm(spec, operands)
    return np.asarray(np.abs(got - np.clip(value, spec.output.lo, spec.output.hi)) > 0.5 + error)


def beyond_sum(
    spec: LayerNormSpec, operands: Sequence[npt.NDArray[Any]], got: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Return which codes of the sum of the operands no float32 quantizer gives."""
    assert spec.sum_output is not None
    total, size = _sum(spec, operands)
    return beyond_quantizer(spec.sum_output, total, got, _gamma(_ADDEND) * size)


def beyond_quantizer(
    params: QuantParams, x: npt.NDArray[Any], got: npt.NDArray[Any], x_error: npt.NDArray[Any] | float = 0.0
) -> npt.NDArray[np.bool_]:
    """Return which codes no float32 quantizer gives.

    It may divide, multiply by the reciprocal, or place the value between the ends of its range, as FakeQuantize does.

    Parameters
    ----------
    params : QuantParams
    x : ndarray of shape (rows, n)
        Real values.
    got : ndarray of shape (rows, n)
        Their codes.
    x_error : ndarray of shape (rows, n)
        How far what is quantized may be from x.
    """
    steps, zeros = params.channel_steps(x.shape[1]), params.channel_zeros(x.shape[1])
    code, code_error = x.astype(np.float64) / steps, x_error / steps
    error = code_error + _gamma(8) * (np.abs(code) + code_error + np.abs(zeros) + (params.hi - params.lo))
    with np.errstate(invalid="ignore"):  # an infinite value has its code, and any code may stand for a NaN
        value = np.clip(code + zeros, params.lo, params.hi)
        return np.asarray(np.abs(got - value) > 0.5 + error)


def beyond_dequantizer(params: QuantParams, codes: npt.NDArray[Any], y: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which real values no float32 dequantizer makes of codes.

    It may subtract the zero point from the code, or the zero point's product with the scale from that of the code.

    Parameters
    ----------
    params : QuantParams
    codes, y : ndarray of shape (rows, n)
    """
    steps, zeros = params.channel_steps(codes.shape[1]), params.channel_zeros(codes.shape[1])
    wide = codes.astype(np.float64)
    error = _gamma(6) * (np.abs(wide) + np.abs(zeros)) * steps
    return np.asarray(~(np.abs(y - (wide - zeros) * steps) <= error))


def float32_norm(spec: LayerNormSpec, operands: Sequence[npt.NDArray[Any]]) -> tuple[Rows, Rows]:
    """Return the real value of each output code before its rounding, and a float32 norm's largest error of it, in LSB.

    Both are computed in float64, whose own rounding the bound is enlarged by.

    Parameters
    ----------
    spec : LayerNormSpec
    operands : sequence of ndarray of shape (rows, n)
        Input codes, and those of the residual where there is one.
    """
    n = spec.n
    x, size = _sum(spec, operands)
    gain, offset = np.asarray(spec.gamma), np.asarray(spec.beta)
    step = spec.output.channel_steps(n)
    centred = spec.kind is NormKind.LAYERNORM
    mean = x.mean(axis=1, keepdims=True) if centred else np.zeros((len(x), 1))
    d = x - mean
    square, squares = np.square(d).mean(axis=1, keepdims=True), np.square(size).mean(axis=1, keepdims=True)
    # the mean and the deviations, from inputs and scales that are rounded themselves, and a sum that is
    mean_error = _gamma(n + _ADDEND) * size.mean(axis=1, keepdims=True) if centred else np.zeros((len(x), 1))
    d_error = _gamma(_ADDEND) * size + mean_error + _gamma(2) * np.abs(d)
    # the variance, by either formula
    two_pass = (2 * np.abs(d) * d_error + np.square(d_error)).mean(axis=1, keepdims=True)
    two_pass += _gamma(n + 5) * np.square(np.abs(d) + d_error).mean(axis=1, keepdims=True)
    one_pass = _gamma(n + 10) * (squares + np.square(mean)) + 2 * np.abs(mean) * mean_error + np.square(mean_error)
    total = square if spec.eps_outside else square + spec.eps
    error = np.maximum(two_pass, one_pass) + _gamma(3) * total
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(error < total, 1 / np.sqrt(1 - np.minimum(error / total, 1)) - 1, np.inf)
        relative = (1 + relative) * (1 + _gamma(6)) - 1
        deviation = np.sqrt(total) + (spec.eps if spec.eps_outside else 0.0)
        h = np.where(deviation > 0, d / deviation, 0.0)
        h_error = d_error * (1 + relative) / deviation + np.abs(h) * relative
        h_error += _gamma(6) * (size + np.abs(mean)) / deviation
        # scale and bias, and the division by the output's scale
        affine = np.abs(gain) * (h_error + _gamma(5) * (np.abs(h) + h_error)) + _gamma(5) * np.abs(offset)
        value = gain * h + offset
        bound = (affine + _gamma(5) * (np.abs(value) + affine)) / step * (1 + 2.0**-20)
    known = (square > _SMALLEST) & (squares < _LARGEST) & np.isfinite(bound)
    return value / step + spec.output.channel_zeros(n), np.where(known, bound, np.inf)


def _sum(spec: LayerNormSpec, operands: Sequence[npt.NDArray[Any]]) -> tuple[Rows, Rows]:
    """Return the sum of the operands' real values, and that of their magnitudes."""
    n = spec.n
    reals = [
        (codes.astype(np.float64) - params.channel_zeros(n)) * params.channel_steps(n)
        for codes, params in zip(operands, spec.operands, strict=True)
    ]
    return sum(reals[1:], start=reals[0]), sum(map(np.abs, reals[1:]), start=np.abs(reals[0]))


def _gamma(k: int) -> float:
    return k * 2.0**-24 / (1 - k * 2.0**-24)
