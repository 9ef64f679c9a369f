"""From what was observed to quantization parameters: candidates, and the one that serves real rows best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..quantization import LARGEST_SCALE, SMALLEST_SCALE, QuantParams
from .norms import TensorObserver
from .observers import Floats
from .options import Method, SideOptions

#: Scales tried in each octave.
_STEPS = 8
#: How many octaves `Method.MSE` and `Method.ENTROPY` may shrink the observed range by.
_SHRINK = 2
#: Exponents tried below the one that holds a channel's range.
_CLIPS = 2
#: The share of a channel's cost that is left at the most where clipping is taken: other data go beyond the range of
#: these, and a smaller gain here is a loss there.
_CLIPPED_COST = 0.5
#: Zero points tried where channels with exponents share an asymmetric one: the share of the codes below it.
_ZERO_POINTS = (0.5, 0.25, 0.375, 0.625, 0.75)
#: Bins that a code's interval is divided into, to compare distributions.
_BINS_PER_CODE = 8
#: What a fraction of a code that holds only clipped values counts as, so that its logarithm is finite.
_LEAST_COUNT = 1e-4

Error = Callable[[QuantParams], float]


@dataclass(frozen=True)
class Sample:
    """Real values that parameters are tried on.

    Attributes
    ----------
    values : ndarray of shape (rows, n)
    weights : ndarray of shape (rows, n) or (1, 1)
        What a squared error of each value costs, while it is small.
    joint_cost : callable, optional
        What parameters cost with all their errors together, where that is not their sum.
    """

    values: Floats
    weights: Floats
    joint_cost: Error | None = None

    def cost(self, params: QuantParams) -> float:
        """Return what parameters cost."""
        return self.joint_cost(params) if self.joint_cost else float(self.channel_cost(params).sum())

    def channel_cost(self, params: QuantParams) -> Floats:
        """Return what parameters cost in each channel by the weights, up to a common factor."""
        unit, values, weights = self._relative
        steps = (params.channel_steps(values.shape[1]) / unit).astype(np.float32)
        errors = np.rint(values / steps)
        np.clip(errors, params.lo - params.zero_point, params.hi - params.zero_point, out=errors)
        errors *= steps
        errors -= values
        np.square(errors, out=errors)
        errors *= weights
        return np.asarray(errors.sum(axis=0, dtype=np.float64))

    @cached_property
    def _relative(self) -> tuple[float, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The largest magnitude, and values and weights relative to their largest, so that no square overflows."""
        unit, heaviest = float(np.abs(self.values).max()) or 1.0, float(self.weights.max()) or 1.0
        return unit, (self.values / unit).astype(np.float32), (self.weights / heaviest).astype(np.float32)


def choose(seen: TensorObserver, side: SideOptions, sample: Sample, smallest_scale: float = 0.0) -> QuantParams:
    """Return the parameters that a side's options ask for.

    Where the method leaves a choice, it is the one with the least cost on the sample: for ``mse`` that of ranges, and
    of exponents that clip rare values of a channel; for all methods that of the base scale under exponents. For
    ``entropy`` it is the one with the least divergence.

    Parameters
    ----------
    seen : TensorObserver
    side : SideOptions
    sample : Sample
    smallest_scale : float
        Bound of the scale from below.
    """
    tried = candidates(side, *observed_range(seen, side), smallest_scale=smallest_scale)
    if side.method is Method.ENTROPY:
        return least(tried, lambda params: divergence(params, sample.values))
    if side.method is Method.MSE:
        if side.per_channel:
            return _least_by_channel(tried, sample)
        if side.exponents:
            tried = (_clipped(params, sample) for params in tried)
    return least(tried, sample.cost)


def _clipped(params: QuantParams, sample: Sample) -> QuantParams:
    """Return parameters whose exponents are smaller by up to `_CLIPS` where that saves enough of a channel's cost."""
    exponents = np.array(params.channel_exponents(sample.values.shape[1]))
    tried = [np.maximum(exponents - clip, 0) for clip in range(_CLIPS + 1)]
    costs = [sample.channel_cost(replace(params, exponents=each)) for each in tried]
    costs[0] = costs[0] * _CLIPPED_COST
    return replace(params, exponents=np.choose(np.argmin(costs, axis=0), tried))


def _least_by_channel(tried: Iterable[QuantParams], sample: Sample) -> QuantParams:
    """Return, of parameters with scales for each channel, the scale with the least cost in each."""
    options = list(tried)
    n = sample.values.shape[1]
    best = np.argmin([sample.channel_cost(option) for option in options], axis=0)
    scales = np.choose(best, [option.channel_steps(n) for option in options])
    return replace(options[0], scale=float(scales.max()), channel_scales=scales.tolist())


def observed_range(seen: TensorObserver, side: SideOptions) -> tuple[Floats, Floats]:
    """Return the range that a method holds, by channel where channels are told apart."""
    if side.method is Method.MOVING_AVERAGE:
        return seen.mean_range()
    if side.method is Method.PERCENTILE:
        return seen.percentile_range(side.percentile, by_channel=side.by_channel)
    return seen.ranges.low, seen.ranges.high


def candidates(side: SideOptions, low: Floats, high: Floats, *, smallest_scale: float = 0.0) -> Iterator[QuantParams]:
    """Yield parameters to choose from, the widest first.

    Without exponents there is one for each range tried. Asymmetric ones have their zero point where the range, 0
    included, has it. With exponents, each channel has the smallest that holds its range at the base scale. With a scale
    for each channel, all shrink alike.

    Parameters
    ----------
    side : SideOptions
    low, high : ndarray of shape (n,)
        The range of each channel, or of the tensor.
    smallest_scale : float
        Bound of the scale from below.
    """
    dtype, lo = side.dtype, side.dtype.lo + side.narrow_range
    shrink = _SHRINK * _STEPS if side.method in (Method.MSE, Method.ENTROPY) else 0
    middle = (dtype.lo + dtype.hi + 1) // 2
    if not side.by_channel:
        bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
        if side.symmetric:
            width, zero_point = max(-bottom, top) / (dtype.hi - middle), middle
        else:
            width, zero_point = (top - bottom) / (dtype.hi - lo), 0
            if top > bottom:
                zero_point = round((lo * top - dtype.hi * bottom) / (top - bottom))
        for step in range(shrink + 1):
            scale = float32_scale(width * 2.0 ** (-step / _STEPS), smallest_scale)
            yield QuantParams(dtype, scale, min(max(zero_point, lo), dtype.hi), narrow_range=side.narrow_range)
        return
    zero_points = [middle]
    if not side.symmetric:
        zero_points = [dtype.lo + round(share * (dtype.hi - dtype.lo + 1)) for share in _ZERO_POINTS]
    for zero_point in zero_points:
        # codes on each side of the zero point; at the middle, as many on both
        above = dtype.hi - zero_point
        below = above if zero_point == middle else zero_point - lo
        step_of_one = np.maximum(np.maximum(high, 0) / above, np.maximum(-low, 0) / below)
        widest = float(step_of_one.max())
        if side.per_channel:
            for step in range(shrink + 1):
                scales = [float32_scale(wanted, smallest_scale) for wanted in step_of_one * 2.0 ** (-step / _STEPS)]
                yield QuantParams(dtype, max(scales), zero_point, channel_scales=scales, narrow_range=side.narrow_range)
            continue
        for step in range(_STEPS - 1, -shrink - 1, -1):
            scale = float32_scale(widest * 2.0 ** (step / _STEPS - side.exponents), smallest_scale)
            with np.errstate(divide="ignore"):
                needed = np.ceil(np.log2(step_of_one / scale) - 1e-6)  # float32 scales are rounded up
            exponents = np.clip(needed, 0, side.exponents).astype(np.int64)
            yield QuantParams(dtype, scale, zero_point, exponents, narrow_range=side.narrow_range)


def least(params: Iterable[QuantParams], error: Error) -> QuantParams:
    """Return the parameters with the least error, the first of them where several have it."""
    return min(params, key=error)


def divergence(params: QuantParams, values: Floats) -> float:
    """Return the Kullback-Leibler divergence of the codes' distribution from that of the values.

    The values are counted in fractions of a code, those beyond the codes at the end that they are clipped to. What the
    codes make of that is the count of the values within them alone, spread evenly over those fractions of a code that
    hold any; it is not made up for what is clipped, so that parameters which clip everything are no good match.
    Channels count together, each in its own step.

    Parameters
    ----------
    params : QuantParams
    values : ndarray of shape (rows, n)
    """
    lo, hi = params.lo, params.hi
    codes = values / params.channel_steps(values.shape[1]) + (params.zero_point - lo + 0.5)
    bins = (hi - lo + 1) * _BINS_PER_CODE
    # the first and the last bin are for what is clipped
    places = np.clip(np.floor(codes * _BINS_PER_CODE), -1, bins) + 1
    counts = np.bincount(places.astype(np.intp).reshape(-1), minlength=bins + 2)
    inside = counts[1:-1].reshape(-1, _BINS_PER_CODE).astype(np.float64)
    p = inside.copy()
    p[0, 0] += counts[0]
    p[-1, -1] += counts[-1]
    used = p > 0
    spread = inside.sum(axis=1, keepdims=True) / np.maximum(used.sum(axis=1, keepdims=True), 1)
    q = np.maximum(np.broadcast_to(spread, p.shape)[used], _LEAST_COUNT)
    return float(np.sum(p[used] * np.log(p[used] / q)) / p.sum())


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
