"""From observed ranges to quantization parameters: candidates, and the one with the least error on real rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from ..errors import DataError, InputError
from ..quantization import LARGEST_EXPONENT, LARGEST_SCALE, SMALLEST_SCALE, DType, QuantParams

Floats = npt.NDArray[np.float64]

#: Scales tried in each octave.
_STEPS = 8
#: How many octaves `Method.MSE` may shrink the observed range by.
_SHRINK = 2


class Method(StrEnum):
    """Which scales are tried.

    ``minmax`` tries those that hold every observed value: one without channel exponents, and one octave of base scales
    with them. ``mse`` also tries ranges down to a quarter of the observed one, where clipping rare values buys the
    others more than it costs.
    """

    MINMAX = "minmax"
    MSE = "mse"


def default_method(dtype: DType) -> Method:
    """Return ``mse`` for codes of 8 bits, and ``minmax`` for those of 16, which need no clipping."""
    return Method.MSE if dtype.numpy.itemsize == 1 else Method.MINMAX


def default_exponents(dtype: DType) -> int:
    """Return the largest channel exponent allowed by default: 7 for codes of 8 bits, none for those of 16."""
    return 7 if dtype.numpy.itemsize == 1 else 0


def parse_method(dtype: DType, method: Method | str | None) -> Method:
    """Return the method of that name, or the default; raises InputError if there is none of that name."""
    if method is None:
        return default_method(dtype)
    if method not in list(Method):
        raise InputError(f"the method is {method!r}; it must be one of {', '.join(Method)}")
    return Method(method)


def parse_exponents(dtype: DType, exponents: int | None) -> int:
    """Return the largest exponent allowed, or the default; raises InputError outside [0, 15]."""
    if exponents is None:
        return default_exponents(dtype)
    if not isinstance(exponents, int) or not 0 <= exponents <= LARGEST_EXPONENT:
        raise InputError(f"the largest exponent is {exponents!r}; it must be an integer from 0 to {LARGEST_EXPONENT}")
    return exponents


def candidates(
    dtype: DType, low: Floats, high: Floats, *, method: Method, exponents: int, smallest_scale: float = 0.0
) -> Iterator[QuantParams]:
    """Yield parameters to choose from.

    Without exponents they are affine: the zero point is where the range, 0 included, has it. With exponents, each
    channel has the smallest that holds its largest magnitude at the base scale, and the zero point is the middle of
    the codes: one that is shared by all channels helps only where all are skewed alike.

    Parameters
    ----------
    dtype : DType
    low, high : ndarray of shape (n,)
        Observed range of each channel.
    method : Method
    exponents : int
        The largest channel exponent; 0 means one scale for the tensor.
    smallest_scale : float
        Bound of the scale from below.
    """
    shrink = _SHRINK * _STEPS if method is Method.MSE else 0
    if exponents == 0:
        bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
        for step in range(shrink + 1):
            scale = _scale((top - bottom) / (dtype.hi - dtype.lo) * 2.0 ** (-step / _STEPS), smallest_scale)
            zero_point = round((dtype.lo * top - dtype.hi * bottom) / (top - bottom)) if top > bottom else 0
            yield QuantParams(dtype, scale, min(max(zero_point, dtype.lo), dtype.hi))
        return
    magnitude = np.maximum(np.abs(low), np.abs(high))
    zero_point = (dtype.lo + dtype.hi + 1) // 2
    codes = dtype.hi - zero_point
    for step in range(-shrink, _STEPS):
        base = float(magnitude.max()) / codes * 2.0 ** (step / _STEPS - exponents)
        scale = _scale(base, smallest_scale)
        with np.errstate(divide="ignore"):
            needed = np.ceil(np.log2(magnitude / (scale * codes)) - 1e-6)  # float32 scales are rounded up
        yield QuantParams(dtype, scale, zero_point, np.clip(needed, 0, exponents).astype(np.int64))


def least(params: Iterable[QuantParams], error: Callable[[QuantParams], float]) -> QuantParams:
    """Return the parameters with the least error, the first of them where several have it."""
    return min(params, key=error)


def smallest_input_scale(n: int, eps: float) -> float:
    """Return the scale below which eps, in units of squared codes, would not fit the row stage.

    There one LSB of the input moves the normalized value by n * 2**-30, so that nothing is lost above it.
    """
    return n * math.sqrt(eps) * 2.0**-30


def smallest_output_scale(n: int, gamma: Floats, beta: Floats) -> float:
    """Return the scale below which the largest possible output would not fit 32 bits before it is clamped."""
    return float(np.max(math.sqrt(n) * np.abs(gamma) + np.abs(beta))) * 2.0**-30


def _scale(wanted: float, smallest: float) -> float:
    """Return the next float32 at or above a scale, so that a model's float32 border has the very same one."""
    wanted = max(wanted, smallest, SMALLEST_SCALE) if wanted > 0 else max(smallest, 1.0)
    if wanted > LARGEST_SCALE:
        raise DataError(f"the values need a scale of {wanted:.3g}, beyond float32's range")
    rounded = np.float32(wanted)
    return float(rounded if rounded >= wanted else np.nextafter(rounded, np.float32(np.inf)))
