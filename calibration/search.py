"""From observed ranges to quantization parameters."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..errors import InputError
from ..quantization import LARGEST_EXPONENT, LARGEST_SCALE, SMALLEST_SCALE, DType, QuantParams

Floats = npt.NDArray[np.float64]

#: Base scales tried in each octave.
_STEPS = 16


def default_exponents(dtype: DType) -> int:
    """Return the largest channel exponent allowed by default: 7 for codes of 8 bits, none for those of 16."""
    return 7 if dtype.numpy.itemsize == 1 else 0


def affine(dtype: DType, low: Floats, high: Floats, *, smallest_scale: float = 0.0) -> QuantParams:
    """Return one scale and zero point whose codes span all channels' ranges, 0 included."""
    bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    scale = _scale((top - bottom) / (dtype.hi - dtype.lo), smallest_scale)
    zero_point = round(dtype.lo - bottom / scale)
    return QuantParams(dtype, scale, min(max(zero_point, dtype.lo), dtype.hi))


def channel_exponents(
    dtype: DType, low: Floats, high: Floats, weight: Floats, limit: int, *, smallest_scale: float = 0.0
) -> QuantParams:
    """Return a base scale and the smallest exponents that hold each channel's largest magnitude.

    The base scale is the one, of 16 in each octave, with the least ``sum_c (weight_c * scale * 2**e_c)**2``, which is
    the power of the rounding noise as the norm's output sees it. The zero point is the middle of the codes: one that
    is shared by all channels helps only where all are skewed alike.

    Parameters
    ----------
    dtype : DType
    low, high : ndarray of shape (n,)
        Observed range of each channel.
    weight : ndarray of shape (n,)
        What an error of 1 in a channel costs.
    limit : int
        The largest exponent, from 0 to 15.
    smallest_scale : float
        Bound of the scale from below.
    """
    magnitude = np.maximum(np.abs(low), np.abs(high))
    zero_point = (dtype.lo + dtype.hi + 1) // 2
    codes = dtype.hi - zero_point
    largest = float(magnitude.max())
    best: tuple[float, float, npt.NDArray[np.int64]] | None = None
    for step in range(limit * _STEPS + 1):
        scale = _scale(largest / codes * 2.0 ** (-step / _STEPS), smallest_scale)
        with np.errstate(divide="ignore"):
            exponents = np.ceil(np.log2(magnitude / (scale * codes)) - 1e-6)
        exponents = np.clip(exponents, 0, limit).astype(np.int64)
        cost = float(np.sum(np.square(weight * scale * np.exp2(exponents))))
        if best is None or cost < best[0]:
            best = cost, scale, exponents
    assert best is not None
    return QuantParams(dtype, best[1], zero_point, best[2])


def find(
    dtype: DType, low: Floats, high: Floats, weight: Floats, exponents: int | None, *, smallest_scale: float = 0.0
) -> QuantParams:
    """Return the parameters of one side of a norm: affine without exponents, else with channel exponents."""
    limit = default_exponents(dtype) if exponents is None else exponents
    if not 0 <= limit <= LARGEST_EXPONENT or int(limit) != limit:
        raise InputError(f"the largest exponent is {limit!r}; it must be an integer from 0 to {LARGEST_EXPONENT}")
    if limit == 0:
        return affine(dtype, low, high, smallest_scale=smallest_scale)
    return channel_exponents(dtype, low, high, weight, limit, smallest_scale=smallest_scale)


def smallest_input_scale(n: int, eps: float) -> float:
    """Return the scale below which eps, in units of squared codes, would not fit the row stage.

    There eps exceeds the variance of any row by far, and one LSB of the input is less than 2**-28 of the output.
    """
    return n * math.sqrt(eps) * 2.0**-30


def _scale(wanted: float, smallest: float) -> float:
    """Return the next float32 at or above a scale, so that a model's float32 border has the very same one."""
    wanted = min(max(wanted, smallest, SMALLEST_SCALE), LARGEST_SCALE) if wanted > 0 else max(smallest, 1.0)
    rounded = np.float32(wanted)
    return float(rounded if rounded >= wanted else np.nextafter(rounded, np.float32(np.inf)))
