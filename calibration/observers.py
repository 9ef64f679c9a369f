"""Observers: what calibration remembers of a stream of rows, in bounded memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Rows = npt.NDArray[np.floating[Any]]


class MinMaxObserver:
    """The lowest and highest value of each channel.

    Attributes
    ----------
    low, high : ndarray of shape (n,), float64
    rows : int
    """

    def __init__(self, n: int) -> None:
        self.low = np.full(n, np.inf)
        self.high = np.full(n, -np.inf)
        self.rows = 0

    def update(self, rows: Rows) -> None:
        """Take in an array of shape (rows, n).

        Raises
        ------
        DataError
            If a value is NaN or infinite; the observer is then as it was.
        """
        if not len(rows):
            return
        low, high = rows.min(axis=0), rows.max(axis=0)
        bad = ~(np.isfinite(low) & np.isfinite(high))
        if bad.any():
            raise DataError(
                f"{int((~np.isfinite(rows)).sum())} values are NaN or infinite, in {int(bad.sum())} channels "
                f"of which the first is {int(np.argmax(bad))}"
            )
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        self.rows += len(rows)


class RowSample:
    """At most `capacity` rows, evenly spaced over all that passed: every row, then every second, every fourth, ..."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._stride = 1
        self._seen = 0
        self._kept: list[Rows] = []

    def update(self, rows: Rows) -> None:
        """Take in an array of shape (rows, n)."""
        for index in range(-self._seen % self._stride, len(rows), self._stride):
            if (self._seen + index) % self._stride:  # the stride has doubled since
                continue
            self._kept.append(rows[index].copy())
            if len(self._kept) > self._capacity:
                self._kept = self._kept[::2]
                self._stride *= 2
        self._seen += len(rows)

    def rows(self) -> Rows:
        """Return the rows kept, as an array of shape (rows, n)."""
        return np.stack(self._kept)
