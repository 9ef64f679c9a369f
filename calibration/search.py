"""From what was observed to quantization parameters: candidates, and the one that serves real rows best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..errors import DataError
from ..quantization import LARGEST_SCALE, SMALLEST_SCALE, QuantParams
from .norms import TensorObserver
from .observers import Floats, Rows
from .options import Method, SideOptions

#: Scales tried in each octave.
_STEPS = 8
#: How many octaves `Method.MSE` and `Method.ENTROPY` may shrink the observed range by.
_SHRINK = 2
#: Zero points tried where channels with exponents share an asymmetric one: the share of the codes below it.
_ZERO_POINTS = (0.5, 0.25, 0.375, 0.625, 0.75)
#: Bins that a code's interval is divided into, to compare distributions.
_BINS_PER_CODE = 8

Error = Callable[[QuantParams], float]


def choose(
    seen: TensorObserver, side: SideOptions, error: Error, values: Rows, smallest_scale: float = 0.0
) -> QuantParams:
    """Return the parameters that a side's options ask for.

    Parameters
    ----------
    seen : TensorObserver
    side : SideOptions
    error : callable
        What parameters cost. ``mse`` minimizes it; so do the methods that fix the range, with exponents, over one
        octave of base scales.
    values : ndarray of shape (rows, n)
        Real values, for ``entropy``.
    smallest_scale : float
        Bound of the scale from below.
    """
    tried = candidates(side, *observed_range(seen, side), smallest_scale=smallest_scale)
    if side.method is Method.ENTROPY:
        return least(tried, lambda params: divergence(params, values))
    return least(tried, error)


def observed_range(seen: TensorObserver, side: SideOptions) -> tuple[Floats, Floats]:
    """Return the range that a method holds, by channel where channels are told apart."""
    if side.method is Method.MOVING_AVERAGE:
        return seen.mean_range()
    if side.method is Method.PERCENTILE:
        return seen.percentile_range(side.percentile, by_channel=side.exponents > 0)
    return seen.ranges.low, seen.ranges.high


def candidates(side: SideOptions, low: Floats, high: Floats, *, smallest_scale: float = 0.0) -> Iterator[QuantParams]:
    """Yield parameters to choose from, the widest first.

    Without exponents there is one for each range tried. Asymmetric ones have their zero point where the range, 0
    included, has it. With exponents, each channel has the smallest that holds its range at the base scale.

    Parameters
    ----------
    side : SideOptions
    low, high : ndarray of shape (n,)
        The range of each channel, or of the tensor.
    smallest_scale : float
        Bound of the scale from below.
    """
    dtype = side.dtype
    shrink = _SHRINK * _STEPS if side.method in (Method.MSE, Method.ENTROPY) else 0
    middle = (dtype.lo + dtype.hi + 1) // 2
    if not side.exponents:
        bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
        if side.symmetric:
            width, zero_point = max(-bottom, top) / (dtype.hi - middle), middle
        else:
            width, zero_point = (top - bottom) / (dtype.hi - dtype.lo), 0
            if top > bottom:
                zero_point = round((dtype.lo * top - dtype.hi * bottom) / (top - bottom))
        for step in range(shrink + 1):
            scale = float32_scale(width * 2.0 ** (-step / _STEPS), smallest_scale)
            yield QuantParams(dtype, scale, min(max(zero_point, dtype.lo), dtype.hi))
        return
    zero_points = [middle]
    if not side.symmetric:
        zero_points = [dtype.lo + round(share * (dtype.hi - dtype.lo + 1)) for share in _ZERO_POINTS]
    for zero_point in zero_points:
        # codes on each side of the zero point; at the middle, as many on both
        above = dtype.hi - zero_point
        below = above if zero_point == middle else zero_point - dtype.lo
        step_of_one = np.maximum(np.maximum(high, 0) / above, np.maximum(-low, 0) / below)
        widest = float(step_of_one.max())
        for step in range(_STEPS - 1, -shrink - 1, -1):
            scale = float32_scale(widest * 2.0 ** (step / _STEPS - side.exponents), smallest_scale)
            with np.errstate(divide="ignore"):
                needed = np.ceil(np.log2(step_of_one / scale) - 1e-6)  # float32 scales are rounded up
            yield QuantParams(dtype, scale, zero_point, np.clip(needed, 0, side.exponents).astype(np.int64))


def least(params: Iterable[QuantParams], error: Error) -> QuantParams:
    """Return the parameters with the least error, the first of them where several have it."""
    return min(params, key=error)


def divergence(params: QuantParams, values: Rows) -> float:
    """Return the Kullback-Leibler divergence of the codes' distribution from that of the values.

    The values are counted in fractions of a code, those beyond the codes at the end that they are clipped to. A code
    spreads its count evenly over those of its fractions that hold a value. Channels count together, each in its own
    step.

    Parameters
    ----------
    params : QuantParams
    values : ndarray of shape (rows, n)
    """
    steps = params.scale * np.exp2(np.asarray(params.channel_exponents(values.shape[1]), dtype=np.float64))
    lo, hi = params.dtype.lo, params.dtype.hi
    places = np.floor((values / steps + (params.zero_point - lo + 0.5)) * _BINS_PER_CODE)
    bins = (hi - lo + 1) * _BINS_PER_CODE
    counts = np.bincount(np.clip(places, 0, bins - 1).astype(np.intp).reshape(-1), minlength=bins)
    p = counts.reshape(-1, _BINS_PER_CODE).astype(np.float64)
    used = p > 0
    q = p.sum(axis=1, keepdims=True) / np.maximum(used.sum(axis=1, keepdims=True), 1)
    return float(np.sum(p[used] * np.log(p[used] / np.broadcast_to(q, p.shape)[used])) / p.sum())


def smallest_input_scale(n: int, eps: float) -> float:
    """Return the scale below which eps, in units of squared codes, would not fit the row stage.

    There one LSB of the input moves the normalized value by n * 2**-30, so that nothing is lost above it.
    """
    return n * math.sqrt(eps) * 2.0**-30


def smallest_output_scale(n: int, gamma: Floats, beta: Floats) -> float:
    """Return the scale below which the largest possible output would not fit 32 bits before it is clamped."""
    return float(np.max(math.sqrt(n) * np.abs(gamma) + np.abs(beta))) * 2.0**-30


def float32_scale(wanted: float, smallest: float) -> float:
    """Return the next float32 at or above a scale, so that a model's float32 border has the very same one."""
    wanted = max(wanted, smallest, SMALLEST_SCALE) if wanted > 0 else max(smallest, 1.0)
    if wanted > LARGEST_SCALE:
        raise DataError(f"the values need a scale of {wanted:.3g}, beyond float32's range")
    rounded = np.float32(wanted)
    return float(rounded if rounded >= wanted else np.nextafter(rounded, np.float32(np.inf)))
