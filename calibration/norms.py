"""Observing one norm: its input, its output, and a sample of its rows."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..axes import stacked
from ..errors import DataError, InputError
from ..layer import LayerNorm, RMSNorm
from ..quantization import LARGEST_SCALE
from .histograms import Histogram
from .observers import (
    MOST_WAITING,
    ROW_BITS,
    Counts,
    ExactSum,
    Floats,
    Observer,
    Rows,
    RowSample,
    channel_ranges,
    row_ids,
)

#: Elements kept of a norm's input, as whole rows, to choose scales and to measure what the integers lose.
SAMPLED_ELEMENTS = 1 << 18
#: Rows kept at the least.
SAMPLED_ROWS = 64
#: With fewer rows than this, new data leave a channel's observed range more often than one row in 65.
FEWEST_ROWS = 128
#: Parts of the rows whose ranges are told apart.
FOLDS = 8
#: Rows of a feed that belong to the same part, in a binary logarithm: neighbours, which are alike, mostly do.
_BLOCK_BITS = 6
#: Values of a tensor that may wait to be counted together: one by one, small feeds cost half as much again.
WAITING_VALUES = 1 << 18
#: Bins on each side of zero of a tensor's histogram.
TENSOR_BINS = 1 << 12
#: Bins of all channels' histograms together, and the fewest and most on each side of zero of one of them.
CHANNEL_BINS, FEWEST_BINS, MOST_BINS = 1 << 17, 16, 128


class FoldedRanges(Observer):
    """The lowest and highest value of each channel, in parts of the rows: what one is judged by, the others don't know.

    Attributes
    ----------
    lows, highs : ndarray of shape (FOLDS, n), float64
    counts : ndarray of shape (FOLDS,), int64
        Rows of each part.
    """

    _state = ("lows", "highs", "counts")

    def __init__(self, n: int) -> None:
        self.lows, self.highs = np.full((FOLDS, n), np.inf), np.full((FOLDS, n), -np.inf)
        self.counts: Counts = np.zeros(FOLDS, dtype=np.int64)

    @property
    def low(self) -> Floats:
        """The lowest values of all rows."""
        return np.asarray(self.lows.min(axis=0))

    @property
    def high(self) -> Floats:
        """The highest values of all rows."""
        return np.asarray(self.highs.max(axis=0))

    @property
    def rows(self) -> int:
        """The number of rows."""
        return int(self.counts.sum())

    def without(self, fold: int) -> tuple[Floats, Floats]:
        """Return the lowest and the highest values of the other parts."""
        return np.delete(self.lows, fold, axis=0).min(axis=0), np.delete(self.highs, fold, axis=0).max(axis=0)

    def extend(self, fold: int, low: Rows, high: Rows, rows: int) -> None:
        """Take in rows of one part by their ranges."""
        np.minimum(self.lows[fold], low, out=self.lows[fold])
        np.maximum(self.highs[fold], high, out=self.highs[fold])
        self.counts[fold] += rows

    def merge(self, other: Self) -> None:
        """Take in what another observer of the same size has seen."""
        np.minimum(self.lows, other.lows, out=self.lows)
        np.maximum(self.highs, other.highs, out=self.highs)
        self.counts += other.counts


class TensorObserver(Observer):
    """The values of one tensor: ranges, their means over the feeds, and histograms, by channel and of the tensor.

    Parameters
    ----------
    n : int
        Channels.

    Attributes
    ----------
    ranges : FoldedRanges
    """

    _state = ("ranges", "_lows", "_highs", "_tensor", "_channels")

    def __init__(self, n: int) -> None:
        self.ranges = FoldedRanges(n)
        self._lows, self._highs = ExactSum(n), ExactSum(n)
        self._tensor = Histogram(1, TENSOR_BINS)
        half = 1 << (CHANNEL_BINS // (2 * n)).bit_length() >> 1
        self._channels = Histogram(n, min(max(half, FEWEST_BINS), MOST_BINS))
        self._waiting: list[tuple[Rows, Rows, Rows]] = []

    def update(self, rows: Rows, folds: Counts) -> None:
        """Take in the finite rows of one feed, of shape (rows, n), and the fold of each; see `folds_of`."""
        borders = [0, *(np.flatnonzero(folds[1:] != folds[:-1]) + 1).tolist(), len(rows)]
        parts = [(int(folds[start]), rows[start:stop]) for start, stop in pairwise(borders)]
        ranges = [channel_ranges(part) for _, part in parts]
        low = np.minimum.reduce([bottom for bottom, _ in ranges])
        high = np.maximum.reduce([top for _, top in ranges])
        largest = max(-low.min(), high.max())
        if largest > LARGEST_SCALE:
            raise DataError(f"a value is {float(largest):.3g}, beyond float32's range")
        for (fold, part), (bottom, top) in zip(parts, ranges, strict=True):
            self.ranges.extend(fold, bottom, top, len(part))
        count = rows.size + sum(waiting.size for waiting, _, _ in self._waiting)
        full = count >= WAITING_VALUES or len(self._waiting) == MOST_WAITING
        self._waiting.append((rows if full else rows.copy(), low, high))  # the caller may change its own
        if full:
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        rows, lows, highs = map(list, zip(*waiting, strict=True))
        low, high = np.stack(lows), np.stack(highs)
        self._lows.add(low)
        self._highs.add(high)
        magnitude = np.maximum(-low.min(axis=0), high.max(axis=0))
        values = np.concatenate(rows)
        self._tensor.update(values.reshape(-1, 1), magnitude.max(keepdims=True))
        self._channels.update(values, magnitude)

    def mean_range(self) -> tuple[Floats, Floats]:
        """Return the mean over the feeds of each channel's lowest and highest value."""
        self._settle()
        return self._lows.mean(), self._highs.mean()

    def percentile_range(self, percentile: float, *, by_channel: bool) -> tuple[Floats, Floats]:
        """Return the range that holds this share of the values, of each channel or of the tensor in an array of one."""
        self._settle()
        outside = (1 - percentile / 100) / 2
        low, high = self.ranges.low, self.ranges.high
        if not by_channel:
            low, high = low.min(keepdims=True), high.max(keepdims=True)
        left, right = (self._channels if by_channel else self._tensor).quantiles((outside, 1 - outside))
        return np.clip(left, low, high), np.clip(right, low, high)


class NormObserver(Observer):
    """What was seen of one norm.

    Rows that hold NaN or infinite values, before or after the norm, are counted and left out.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm

    Attributes
    ----------
    input, output : TensorObserver
    sample : RowSample
        Of the inputs.
    left_out : int
        Rows that were left out.
    bad_inputs, bad_outputs : ndarray of shape (n,), int64
        How many values were NaN or infinite, by channel.
    """

    _state = ("input", "output", "sample", "left_out", "bad_inputs", "bad_outputs")

    def __init__(self, layer: LayerNorm | RMSNorm) -> None:
        self._layer = layer
        self.input, self.output = TensorObserver(layer.n), TensorObserver(layer.n)
        self.sample = RowSample(max(SAMPLED_ELEMENTS // layer.n, SAMPLED_ROWS), layer.n)
        self.left_out = 0
        self.bad_inputs: Counts = np.zeros(layer.n, dtype=np.int64)
        self.bad_outputs: Counts = np.zeros(layer.n, dtype=np.int64)

    @property
    def rows(self) -> int:
        """The number of rows observed, without those left out."""
        return self.input.ranges.rows

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike | None = None, *, feed: int = 0, first: int = 0) -> None:
        """Take in a feed's inputs, of shape (..., *normalized_shape), and the float outputs where they are at hand.

        `feed` is the feed's number, and `first` that of its first row where the feed comes in parts.
        """
        rows = _single_or_double(self._layer.rows(x))
        ids = row_ids(feed, first, len(rows))
        outputs = None if y is None else _single_or_double(self._layer.rows(y))
        if outputs is not None and len(outputs) != len(rows):
            raise InputError(f"there are {len(rows)} input rows and {len(outputs)} output rows")
        good = self._finite(rows, self.bad_inputs)
        if outputs is None:
            self.left_out += len(good) - int(np.count_nonzero(good))
            rows, ids = rows[good], ids[good]
            outputs = self._layer.rows(self._layer(shaped(self._layer, rows)))
            good = self._finite(outputs, self.bad_outputs)
        else:
            good = good & self._finite(outputs, self.bad_outputs)
        self.left_out += len(good) - int(np.count_nonzero(good))
        if not good.all():
            rows, outputs, ids = rows[good], outputs[good], ids[good]
        if not len(rows):
            return
        folds = folds_of(ids)
        self.input.update(rows, folds)
        self.output.update(outputs, folds)
        self.sample.update(rows, ids)

    @staticmethod
    def _finite(rows: Rows, bad: Counts) -> npt.NDArray[np.bool_]:
        """Return which rows are finite, and add the values that are not, by channel."""
        finite = np.isfinite(rows)
        if finite.all():
            return np.ones(len(rows), dtype=np.bool_)
        bad += np.count_nonzero(~finite, axis=0)
        return np.asarray(finite.all(axis=1))


def folds_of(ids: npt.NDArray[np.uint64]) -> Counts:
    """Return the part of the data that rows of these numbers belong to: feeds, and long ones by blocks, take turns."""
    turns = (ids >> np.uint64(ROW_BITS)) + ((ids & np.uint64((1 << ROW_BITS) - 1)) >> np.uint64(_BLOCK_BITS))
    return (turns % np.uint64(FOLDS)).astype(np.int64)


def shaped(layer: LayerNorm | RMSNorm, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return rows of shape (rows, n) as an array that the layer takes, with the rows along its first dimension."""
    return stacked(rows, layer.normalized_shape, layer.axes)


def _single_or_double(rows: Rows) -> Rows:
    return rows if rows.dtype in (np.float32, np.float64) else rows.astype(np.float32)
