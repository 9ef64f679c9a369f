"""From what was observed to quantization parameters: candidates, and the one that serves real rows best."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..quantization import LARGEST_SCALE, SMALLEST_SCALE, QuantParams
from .norms import FEWEST_ROWS, TensorObserver
from .observers import Counts, Floats
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
#: How much farther from the middle of its range a channel's values are taken to be where clipping is judged: other data
#: go beyond the range of these. So much wider than what was observed are channels' own scales where there are too few
#: rows to find out, or one part of them has a larger share than this.
_HEADROOM = 1.25
_LARGEST_FOLD = 0.5
#: The costliest channels whose steps are tried one by one, those with a share of all cost, and the factor of a trial.
_REFINED, _COSTLY, _FINE = 12, 0.02, 2.0**0.25
#: Bins that a code's interval is divided into, to compare distributions.
_BINS_PER_CODE = 8
#: What a fraction of a code that holds only clipped values counts as, so that its logarithm is finite.
_LEAST_COUNT = 1e-4

_ALL = slice(None)

Error = Callable[[QuantParams], float]


@dataclass(frozen=True)
class Sample:
    """Real values that parameters are tried on.

    Attributes
    ----------
    values : ndarray of shape (rows, n)
    weights : ndarray of shape (rows, n) or (1, 1)
        What a squared error of each value costs, while it is small.
    folds : ndarray of shape (rows,)
        The part of the data that each row belongs to, see `folds_of`.
    joint_cost : callable, optional
        What parameters cost with all their errors together, where that is not their sum.
    """

    values: Floats
    weights: Floats
    folds: Counts
    joint_cost: Error | None = None

    def cost(self, params: QuantParams) -> float:
        """Return what parameters cost."""
        return self.joint_cost(params) if self.joint_cost else float(self.channel_cost(params).sum())

    def channel_cost(
        self, params: QuantParams, *, farther: bool = False, rows: npt.NDArray[np.bool_] | slice = _ALL
    ) -> Floats:
        """Return what parameters cost in each channel by the weights, on some of the rows, up to a common factor.

        With `farther` it is what they would cost if all values were `_HEADROOM` times as far from their middle.
        """
        unit, values, weights = self._relative
        values = (self._farther if farther else values)[rows]
        weights = weights[rows] if len(weights) > 1 else weights
        steps = (params.channel_steps(values.shape[1]) / unit).astype(np.float32)
        errors = np.rint(values / steps)
        zeros = params.channel_zeros(values.shape[1])
        np.clip(errors, params.lo - zeros, params.hi - zeros, out=errors)
        errors *= steps
        errors -= values
        np.square(errors, out=errors)
        errors *= weights
        return np.asarray(errors.sum(axis=0, dtype=np.float64))

    @cached_property
    def medians(self) -> Floats:
        """The median of each channel."""
        return np.asarray(np.median(self.values, axis=0))

    @cached_property
    def _farther(self) -> npt.NDArray[np.float32]:
        values = self._relative[1]
        middle = (values.min(axis=0) + values.max(axis=0)) / 2
        return np.asarray(middle + (values - middle) * np.float32(_HEADROOM))

    @cached_property
    def _relative(self) -> tuple[float, npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The largest magnitude, and values and weights relative to their largest, so that no square overflows."""
        unit, heaviest = float(np.abs(self.values).max()) or 1.0, float(self.weights.max()) or 1.0
        return unit, (self.values / unit).astype(np.float32), (self.weights / heaviest).astype(np.float32)


def choose(seen: TensorObserver, side: SideOptions, sample: Sample, smallest_scale: float = 0.0) -> QuantParams:
    """Return the parameters that a side's options ask for.

    Where the method leaves a choice, it is the one with the least cost on the sample: for ``mse`` that of ranges, and
    of steps that clip rare values of a channel; for all methods that of the base scale under exponents. For ``entropy``
    it is the one with the least divergence.

    Parameters
    ----------
    seen : TensorObserver
    side : SideOptions
    sample : Sample
    smallest_scale : float
        Bound of the scale from below.
    """
    low, high = observed_range(seen, side)
    if side.by_channel and side.method is Method.MSE:
        channels = _Channels(side, low, high, sample.medians, smallest_scale)
        wider = channels if side.exponents else channels.wider(_headroom(channels, seen, sample))
        return _refined(_least_by_channel(wider, sample), channels, sample)
    tried = candidates(side, low, high, sample.medians, smallest_scale=smallest_scale)
    if side.method is Method.ENTROPY:
        return least(tried, lambda params: divergence(params, sample.values))
    return least(tried, sample.cost)


@dataclass(frozen=True)
class _Channels:
    """Parameters with steps for each channel, for what its codes are to hold.

    Attributes
    ----------
    side : SideOptions
    low, high : ndarray of shape (n,)
        The range of each channel.
    medians : ndarray of shape (n,)
        What the codes lie around where they don't hold the range.
    smallest_scale : float
        Bound of the scale from below.
    """

    side: SideOptions
    low: Floats
    high: Floats
    medians: Floats
    smallest_scale: float = 0.0

    @cached_property
    def needed(self) -> Floats:
        """The steps with which the codes hold the ranges, and 0 besides."""
        lo, hi = self.side.lo, self.side.hi
        if self.side.symmetric:
            return np.asarray(np.maximum(np.abs(self.low), np.abs(self.high)) / (hi - self.side.middle))
        return np.asarray((np.maximum(self.high, 0) - np.minimum(self.low, 0)) / (hi - lo))

    def wider(self, factor: float) -> Self:
        """Return the same for ranges wider by a factor, about their middles."""
        middle, half = (self.low + self.high) / 2, (self.high - self.low) / 2 * factor
        return replace(self, low=middle - half, high=middle + half)

    def with_scales(self, steps: Floats) -> QuantParams:
        """Return the parameters with a scale for each channel."""
        scales = np.array([float32_scale(wanted, self.smallest_scale) for wanted in steps.tolist()])
        return QuantParams(
            self.side.dtype, float(scales.max()), self._zero_points(scales), channel_scales=scales,
            narrow_range=self.side.narrow_range,
        )  # fmt: skip

    def with_exponents(self, scale: float, exponents: npt.NDArray[np.int64]) -> QuantParams:
        """Return the parameters with one scale and channel exponents."""
        zero_points = self._zero_points(np.ldexp(scale, exponents))
        return QuantParams(
            self.side.dtype, scale, zero_points, exponents, narrow_range=self.side.narrow_range
        )  # fmt: skip

    def candidates(self) -> Iterator[QuantParams]:
        """Yield parameters to choose from, the widest first; see `candidates`."""
        shrink = _SHRINK * _STEPS if self.side.method in (Method.MSE, Method.ENTROPY) else 0
        if not self.side.exponents:
            for step in range(shrink + 1):
                yield self.with_scales(self.needed * 2.0 ** (-step / _STEPS))
            return
        widest = float(self.needed.max())
        for step in range(_STEPS - 1, -shrink - 1, -1):
            scale = float32_scale(widest * 2.0 ** (step / _STEPS - self.side.exponents), self.smallest_scale)
            with np.errstate(divide="ignore"):
                exponents = np.ceil(np.log2(self.needed / scale) - 1e-6)  # float32 scales are rounded up
            yield self.with_exponents(scale, np.clip(exponents, 0, self.side.exponents).astype(np.int64))

    def moved(self, params: QuantParams, channel: int, direction: int) -> QuantParams | None:
        """Return parameters with the next step up or down in one channel, None where there is none."""
        if params.channel_scales is not None:
            steps = np.array(params.channel_scales)
            steps[channel] *= _FINE**direction
            return self.with_scales(steps)
        exponents = np.array(params.channel_exponents(len(self.low)))
        exponents[channel] += direction
        inside = 0 <= exponents[channel] <= self.side.exponents
        return self.with_exponents(params.scale, exponents) if inside else None

    def _zero_points(self, steps: Floats) -> int | npt.NDArray[np.int64]:
        """Return the zero points with which codes lie in the middle of the ranges, or near the medians within them."""
        lo, hi = self.side.lo, self.side.hi
        if self.side.symmetric:
            return self.side.middle
        bottom, top, width = np.minimum(self.low, 0), np.maximum(self.high, 0), steps * (hi - lo)
        clipped = np.clip(self.medians - width / 2, bottom, np.maximum(top - width, bottom))
        start = np.where(width >= top - bottom, (bottom + top - width) / 2, clipped)
        return np.clip(np.rint(lo - start / steps), lo, hi).astype(np.int64)


def _least_by_channel(channels: _Channels, sample: Sample) -> QuantParams:
    """Return the parameters with the least cost, where steps that clip rare values of a channel are tried too."""
    if channels.side.exponents:
        return least((_clipped(params, channels, sample) for params in channels.candidates()), sample.cost)
    tried = list(channels.candidates())
    if sample.joint_cost is None:  # the sample's rows count alike, and too few of them are rare to tell one channel's
        return tried[0]
    costs = [sample.channel_cost(params, farther=True) for params in tried]
    costs[0] = costs[0] * _CLIPPED_COST
    steps = [params.channel_steps(len(channels.low)) for params in tried]
    return channels.with_scales(np.choose(np.argmin(costs, axis=0), steps))


def _headroom(channels: _Channels, seen: TensorObserver, sample: Sample) -> float:
    """Return how many times as wide as observed ranges are best for rows that they don't know.

    Each part of the sampled rows is judged by the ranges of all other parts of the data.
    """
    counts = np.bincount(sample.folds)
    if counts.sum() < FEWEST_ROWS or counts.max() > _LARGEST_FOLD * counts.sum():
        return _HEADROOM
    others = []
    for fold in np.flatnonzero(counts).tolist():
        low, high = seen.ranges.without(fold)
        others.append((replace(channels, low=low, high=high), sample.folds == fold))

    def cost(factor: float) -> float:
        made = ((other.wider(factor), rows) for other, rows in others)
        costs = [sample.channel_cost(wide.with_scales(wide.needed), rows=rows) for wide, rows in made]
        return float(np.sum(costs))

    return min((math.exp2(step / _STEPS) for step in range(-_SHRINK * _STEPS, _STEPS + 1)), key=cost)


def _clipped(params: QuantParams, channels: _Channels, sample: Sample) -> QuantParams:
    """Return parameters whose exponents are smaller by up to `_CLIPS` where that saves enough of a channel's cost."""
    exponents = np.array(params.channel_exponents(len(channels.low)))
    tried = [np.maximum(exponents - clip, 0) for clip in range(_CLIPS + 1)]
    costs = [sample.channel_cost(channels.with_exponents(params.scale, each), farther=True) for each in tried]
    costs[0] = costs[0] * _CLIPPED_COST
    return channels.with_exponents(params.scale, np.choose(np.argmin(costs, axis=0), tried))


def _refined(params: QuantParams, channels: _Channels, sample: Sample) -> QuantParams:
    """Return parameters with other steps in the costliest channels, as long as all errors together cost less.

    A channel's cost by the weights is that of small errors. Clipping the one outlier of a row is none: it changes the
    row's deviation, and so all of its outputs.
    """
    if sample.joint_cost is None:
        return params
    cost, costs = sample.joint_cost(params), sample.channel_cost(params)
    costly = [channel for channel in np.argsort(-costs)[:_REFINED].tolist() if costs[channel] > _COSTLY * costs.sum()]
    for channel in costly:
        for direction in (-1, 1):
            while (tried := channels.moved(params, channel, direction)) is not None:
                found = sample.joint_cost(tried)
                if not found < cost:
                    break
                params, cost = tried, found
    return params


def observed_range(seen: TensorObserver, side: SideOptions) -> tuple[Floats, Floats]:
    """Return the range that a method holds, by channel where channels are told apart."""
    if side.method is Method.MOVING_AVERAGE:
        return seen.mean_range()
    if side.method is Method.PERCENTILE:
        return seen.percentile_range(side.percentile, by_channel=side.by_channel)
    return seen.ranges.low, seen.ranges.high


def candidates(
    side: SideOptions, low: Floats, high: Floats, medians: Floats | None = None, *, smallest_scale: float = 0.0
) -> Iterator[QuantParams]:
    """Yield parameters to choose from, the widest first.

    Without exponents there is one for each range tried. Asymmetric ones have their zero point where the range, 0
    included, has it. With exponents, each channel has the smallest that holds its range at the base scale. With a scale
    for each channel, all shrink alike. Zero points are the channels' own then.

    Parameters
    ----------
    side : SideOptions
    low, high : ndarray of shape (n,)
        The range of each channel, or of the tensor.
    medians : ndarray of shape (n,), optional
        What a channel's codes lie around where they don't hold its range; by default its middle.
    smallest_scale : float
        Bound of the scale from below.
    """
    if side.by_channel:
        around = (low + high) / 2 if medians is None else medians
        yield from _Channels(side, low, high, around, smallest_scale).candidates()
        return
    shrink = _SHRINK * _STEPS if side.method in (Method.MSE, Method.ENTROPY) else 0
    bottom, top = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    if side.symmetric:
        width, zero_point = max(-bottom, top) / (side.hi - side.middle), side.middle
    else:
        width, zero_point = (top - bottom) / (side.hi - side.lo), 0
        if top > bottom:
            zero_point = round((side.lo * top - side.hi * bottom) / (top - bottom))
    for step in range(shrink + 1):
        scale = float32_scale(width * 2.0 ** (-step / _STEPS), smallest_scale)
        yield QuantParams(
            side.dtype, scale, min(max(zero_point, side.lo), side.hi), narrow_range=side.narrow_range
        )  # fmt: skip


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
    n = values.shape[1]
    codes = values / params.channel_steps(n) + (params.channel_zeros(n) - lo + 0.5)
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
