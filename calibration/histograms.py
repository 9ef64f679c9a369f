"""Histograms that grow their range and lose no count."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt

from .observers import Counts, Floats, Observer, Rows

#: Bins are at least 2**_NARROWEST wide, so that the division by their width never overflows float32.
_NARROWEST = -100


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
        channels, bins = self.counts.shape
        scale = np.ldexp(rows.dtype.type(1), -self.width).astype(rows.dtype)
        places = (rows * scale).astype(np.intp)
        places += np.arange(channels, dtype=np.intp) * bins + self._half
        self.counts += np.bincount(places.reshape(-1), minlength=channels * bins).reshape(channels, bins)

    def merge(self, other: Self) -> None:
        """Take in what another histogram of the same size has counted."""
        self._grow(other.width)
        self.counts += _coarser(other.counts, self.width - other.width)

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
        if (grown > self.width).any():
            self.counts = _coarser(self.counts, grown - self.width)
            self.width = grown


def _coarser(counts: Counts, doublings: npt.NDArray[Any]) -> Counts:
    """Return counts with each channel's bins made wider by a power of two."""
    changed = np.flatnonzero(doublings)
    if not len(changed) or not counts.any():
        return counts
    half = counts.shape[1] // 2
    result = counts.copy()
    for doubling in np.unique(doublings[changed]).tolist():
        chosen = changed[doublings[changed] == doubling]
        together = 1 << min(doubling, half.bit_length() - 1)
        left = half // together
        above = counts[chosen, half:].reshape(-1, left, together).sum(axis=2)
        below = counts[chosen, half:0:-1]  # bins 0, -1, -2, ...
        below[:, 0] = 0
        below = below.reshape(-1, left, together).sum(axis=2)
        above[:, 0] += below[:, 0]
        result[chosen] = 0
        result[chosen, half : half + left] = above
        result[chosen, half - left + 1 : half] = below[:, :0:-1]
    return result
