"""Observers: what calibration remembers of a stream of rows, in bounded memory.

Each can be merged with another of its kind. Merging is exact, associative and commutative: whatever the order, and
however the feeds are spread over processes, the same feeds leave the same state to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from ..errors import DataError

Rows = npt.NDArray[np.floating[Any]]
Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Arrays = dict[str, npt.NDArray[Any]]

#: Feeds that may wait to be taken in together.
MOST_WAITING = 256
#: Rows of one feed that a row sample can tell apart; the feeds' numbers take the bits above.
ROW_BITS = 32


class Observer:
    """What the observers share: their state as named arrays, for files and for comparisons.

    A subclass names its arrays and its inner observers in `_state`. Feeds may wait outside of it, as several taken in
    together cost less; the state never shows that, as whatever reads it calls `_settle` first.
    """

    _state: ClassVar[tuple[str, ...]]

    def arrays(self) -> Arrays:
        """Return the whole state as arrays by name."""
        return dict(self._items())

    def settle(self) -> None:
        """Take in all feeds that wait: several threads may read then, until there are others."""
        for _ in self._items():
            pass

    def _settle(self) -> None:
        """Take in the feeds that wait."""

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        return self.__dict__

    def _items(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        self._settle()
        for name in self._state:
            value = getattr(self, name)
            if isinstance(value, Observer):
                yield from ((f"{name}.{inner}", array) for inner, array in value._items())
            else:
                yield name, np.asarray(value)

    def restore(self, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take over a state that `arrays` gave; raises DataError for arrays that are not an observer's like this."""
        for name in self._state:
            value = getattr(self, name)
            if isinstance(value, Observer):
                prefix = f"{name}."
                value.restore({key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)})
                continue
            expected = np.asarray(value)
            found = arrays.get(name)
            if found is None or not self._fits(name, expected, found):
                raise DataError(f"the saved observers are of another form: {name}")
            setattr(self, name, found.item() if found.ndim == 0 else np.array(found, order="C"))

    def _fits(self, name: str, expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> bool:
        return found.shape == expected.shape and found.dtype == expected.dtype

    def merge(self, other: Self) -> None:
        """Take in what another observer of the same kind and size has seen."""
        self._settle()
        other._settle()
        for name in self._state:
            value = getattr(self, name)
            if isinstance(value, Observer):
                value.merge(getattr(other, name))
            else:
                setattr(self, name, value + getattr(other, name))


class MinMaxObserver(Observer):
    """The lowest and highest value of each channel.

    Attributes
    ----------
    low, high : ndarray of shape (n,), float64
    rows : int
    """

    _state = ("low", "high", "rows")

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
        low, high = channel_ranges(rows)
        bad = ~(np.isfinite(low) & np.isfinite(high))
        if bad.any():
            raise DataError(
                f"{int((~np.isfinite(rows)).sum())} values are NaN or infinite, in {int(bad.sum())} channels "
                f"of which the first is {int(np.argmax(bad))}"
            )
        self.extend(low, high, len(rows))

    def extend(self, low: Rows, high: Rows, rows: int) -> None:
        """Take in rows by their ranges."""
        np.minimum(self.low, low, out=self.low)
        np.maximum(self.high, high, out=self.high)
        self.rows += rows

    def merge(self, other: Self) -> None:
        """Take in what another observer of the same kind and size has seen."""
        self.extend(other.low, other.high, other.rows)


def channel_ranges(rows: Rows) -> tuple[Rows, Rows]:
    """Return each channel's lowest and highest value, without negative zeros: min(-0, 0) depends on the order."""
    zero = rows.dtype.type(0)
    return rows.min(axis=0) + zero, rows.max(axis=0) + zero


class ExactSum(Observer):
    """Sums of float32 numbers, one a channel, without any rounding: integers in limbs of 32 bits.

    A limb is an int64 that never carries, so that 2**31 numbers can be added in any order.
    """

    _state = ("_limbs", "count")
    _LIMBS = 10  # 2**-172, the lowest bit of the smallest float32, to 2**148
    _LOWEST = -172

    def __init__(self, n: int) -> None:
        self._limbs: Counts = np.zeros((self._LIMBS, n), dtype=np.int64)
        self.count = 0

    def add(self, values: Rows) -> None:
        """Add numbers of shape (numbers, n), each rounded to float32."""
        mantissa, exponent = np.frexp(values.astype(np.float32).astype(np.float64))
        position = exponent.astype(np.int64) - 24 - self._LOWEST
        shifted = ((mantissa * 2.0**24).astype(np.int64) << (position & 31)).reshape(-1)
        n = values.shape[1]
        places = ((position >> 5) * n + np.arange(n)).reshape(-1)
        np.add.at(self._limbs.reshape(-1), places, shifted & 0xFFFFFFFF)
        np.add.at(self._limbs.reshape(-1), places + n, shifted >> 32)
        self.count += len(values)

    def mean(self) -> Floats:
        """Return the mean of the numbers in each channel, correctly rounded."""
        divisor = self.count << -self._LOWEST
        columns = self._limbs.T.tolist()
        return np.array([sum(limb << (32 * k) for k, limb in enumerate(column)) / divisor for column in columns])


class RowSample(Observer):
    """At most `capacity` rows: those whose numbers have the smallest hashes, which is a fair draw in any order.

    Parameters
    ----------
    capacity : int
    n : int
        Length of a row.
    """

    _state = ("_ids", "_rows")

    def __init__(self, capacity: int, n: int) -> None:
        self._capacity = capacity
        self._ids: npt.NDArray[np.uint64] = np.zeros(0, dtype=np.uint64)
        self._rows: Rows = np.zeros((0, n), dtype=np.float32)
        self._waiting: list[tuple[Rows, npt.NDArray[np.uint64]]] = []

    def update(self, rows: Rows, ids: npt.NDArray[np.uint64]) -> None:
        """Take in an array of shape (rows, n), whose rows have the numbers `ids`; see `row_ids`."""
        if len(self._ids) == self._capacity:
            chosen = _hash(ids) < _hash(self._ids).max()
            rows, ids = rows[chosen], ids[chosen]
        count = len(ids) + sum(len(waiting) for _, waiting in self._waiting)
        full = count >= self._capacity or len(self._waiting) == MOST_WAITING
        self._waiting.append((rows if full else rows.copy(), ids))  # the caller may change its own
        if full:
            self._settle()

    def merge(self, other: Self) -> None:
        """Take in what another sample of the same capacity has seen."""
        self._waiting.append((other.rows(), other.ids))
        self._settle()

    @property
    def ids(self) -> npt.NDArray[np.uint64]:
        """The numbers of the rows kept, ascending."""
        self._settle()
        return self._ids

    def rows(self) -> Rows:
        """Return the rows kept, in the order of their numbers, as an array of shape (rows, n)."""
        self._settle()
        return self._rows

    def _settle(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = [(self._rows, self._ids), *self._waiting], []
        rows, ids = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
        kept = np.argsort(_hash(ids))[: self._capacity]
        kept = kept[np.argsort(ids[kept])]
        self._rows, self._ids = rows[kept], ids[kept]

    def _fits(self, name: str, expected: npt.NDArray[Any], found: npt.NDArray[Any]) -> bool:
        return (
            found.shape[1:] == expected.shape[1:]
            and len(found) <= self._capacity
            and (found.dtype == np.uint64 if name == "_ids" else found.dtype in (np.float32, np.float64))
        )


def row_ids(feed: int, first: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the numbers of a feed's rows from the `first` on: the feed's number in the upper half, the row's below."""
    return np.arange(first, first + count, dtype=np.uint64) + np.uint64(feed << ROW_BITS)


def _hash(ids: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64 of each number: a permutation of the 64-bit integers, so that no two share a hash."""
    z = ids + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
