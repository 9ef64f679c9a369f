"""Histograms that grow their range and lose no count."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

import numpy as np

from .observers import Counts, Floats, Observer, Rows

#: Bins are at least 2**_NARROWEST wide, so that the division by their width never overflows float32.
_NARROWEST = -100
#: Values counted at a time: what is computed of them stays in a core's cache.
_BLOCK = 1 << 14


class Histogram(Observer):
    """Counts of values in bins whose width is a power of two, a width for each channel.

    A value v is counted in bin ``trunc(v / 2**width)``. The widths are the narrowest at which all values so far fit,
    so they follow from the largest magnitude alone; and the bins of twice the width are exact unions of bins. So a
    histogram that has grown, or was merged, is the one that would have been made with the final width at once. The bin
    0 is twice as wide as the others, as it holds what rounds to zero from both sides.

    Parameters
    ----------
    channels : int
    half : int
        Bins on each side of zero, a power of two.

    Attributes
    ----------
    counts : ndarray of shape (channels, 2 * half), int64
        Bin b is at ``b + half``; the first is never used.
    width : ndarray of shape (channels,), int64
        The bins' widths as powers of two.
    """

    _state = ("counts", "width")

    def __init__(self, channels: int, half: int) -> None:
        self._half = half
        self.counts: Counts = np.zeros((channels, 2 * half), dtype=np.int64)
        self.width: Counts = np.full(channels, _NARROWEST, dtype=np.int64)

    def update(self, rows: Rows, magnitude: Rows) -> None:
        """Count finite values of shape (rows, channels), where `magnitude` is the largest of each channel."""
        width = np.frexp(magnitude)[1].astype(np.int64) - (self._half.bit_length() - 1)
        self._grow(np.where(magnitude > 0, width, _NARROWEST))
        scale = np.ldexp(rows.dtype.type(1), -self.width).astype(rows.dtype)
        channels, bins = self.counts.shape
        counts, middles = self.counts.reshape(-1), np.arange(channels, dtype=np.intp) * bins + self._half
        step = max(_BLOCK // channels, 1)
        for start in range(0, len(rows), step):
            places = (rows[start : start + step] * scale).astype(np.intp)
            places += middles
            np.add.at(counts, places.reshape(-1), 1)

    def merge(self, other: Self) -> None:
        """Take in what another histogram of the same size has counted."""
        self._grow(other.width)
        for doubling, chosen in _groups(self.width - other.width):
            found = other.counts[chosen]
            self.counts[chosen] += _coarser(found, doubling) if doubling else found

    def quantiles(self, shares: tuple[float, float]) -> tuple[Floats, Floats]:
        """Return, for each channel, the values below which these shares of the counts lie.

        Within a bin, values count as evenly spread.
        """
        half = self._half
        edges = np.arange(-half, half + 1, dtype=np.float64)
        edges[: half + 1] -= 1  # bin b < 0 reaches from b - 1 to b, bin 0 from -1 to 1
        found = np.empty((2, len(self.counts)))
        for channel, counts in enumerate(self.counts):
            total = np.cumsum(counts)
            for end, (share, side) in enumerate(zip(shares, ("right", "left"), strict=True)):
                wanted = share * float(total[-1])
                b = min(int(np.searchsorted(total, wanted, side)), 2 * half - 1)  # type: ignore[call-overload]
                inside = (wanted - float(total[b] - counts[b])) / max(int(counts[b]), 1)
                found[end, channel] = edges[b] + inside * (edges[b + 1] - edges[b])
        found *= np.exp2(self.width.astype(np.float64))
        return found[0], found[1]

    def _grow(self, width: Counts) -> None:
        grown = np.maximum(self.width, width)
        if (grown > self.width).any() and self.counts.any():
            for doubling, chosen in _groups(grown - self.width):
                if doubling:
                    self.counts[chosen] = _coarser(self.counts[chosen], doubling)
        self.width = grown


def _groups(doublings: Counts) -> Iterator[tuple[int, Counts]]:
    """Yield each number of doublings, and the channels that have it."""
    for doubling in np.unique(doublings).tolist():
        yield doubling, np.flatnonzero(doublings == doubling)


def _coarser(counts: Counts, doubling: int) -> Counts:
    """Return counts with bins made wider by a power of two."""
    half = counts.shape[1] // 2
    together = 1 << min(doubling, half.bit_length() - 1)
    left = half // together
    above = counts[:, half:].reshape(-1, left, together).sum(axis=2)
    below = counts[:, half:0:-1].copy()  # bins 0, -1, -2, ...
    below[:, 0] = 0
    below = below.reshape(-1, left, together).sum(axis=2)
    above[:, 0] += below[:, 0]
    result = np.zeros_like(counts)
    result[:, half : half + left] = above
    result[:, half - left + 1 : half] = below[:, :0:-1]
    return result
