"""Which dimensions of an array a norm normalizes, the way from there to rows and back, and where rows lie in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

Shape = tuple[int, ...]


def parse_axes(axes: int | Sequence[int] | None, normalized_shape: Shape) -> Shape:
    """Return the normalized axes, counted from the end, in ascending order; None means the last ones.

    Raises
    ------
    InputError
        If they are not as many different negative integers, in ascending order, as `normalized_shape` has sizes.
    """
    if axes is None:
        return tuple(range(-len(normalized_shape), 0))
    given = tuple(axes) if isinstance(axes, Iterable) else (axes,)
    valid = all(isinstance(axis, int | np.integer) and not isinstance(axis, bool) and axis < 0 for axis in given)
    if not valid or list(given) != sorted(set(given)) or len(given) != len(normalized_shape):
        raise InputError(
            f"the axes are {axes!r}; {len(normalized_shape)} different negative integers in ascending order are "
            f"expected, one for each size of the normalized shape {normalized_shape}"
        )
    return tuple(int(axis) for axis in given)


def check_shape(shape: Shape, normalized_shape: Shape, axes: Shape) -> None:
    """Raise InputError unless an array of this shape can be normalized."""
    if len(shape) < -axes[0] or tuple(shape[axis] for axis in axes) != normalized_shape:
        last = axes == tuple(range(-len(axes), 0))
        place = "the last dimensions" if last else f"the dimensions {', '.join(map(str, axes))}"
        raise InputError(f"an array of shape {shape} was given; {place} must be {normalized_shape}")


def row_shape(normalized_shape: Shape, axes: Shape) -> Shape:
    """Return the shape of one row as it lies in an array, from the first normalized dimension on; 1 in the others."""
    sizes = dict(zip(axes, normalized_shape, strict=True))
    return tuple(sizes.get(axis, 1) for axis in range(axes[0], 0))


def to_rows(array: npt.NDArray[Any], normalized_shape: Shape, axes: Shape) -> npt.NDArray[Any]:
    """Return an array as rows of shape (rows, n): a view where the axes are the last, in C order; else a copy.

    Raises
    ------
    InputError
        If the array has another size in one of the axes.
    """
    check_shape(array.shape, normalized_shape, axes)
    moved = np.moveaxis(array, axes, range(-len(axes), 0))
    return moved.reshape(-1, math.prod(normalized_shape))


def from_rows(rows: npt.NDArray[Any], shape: Shape, axes: Shape) -> npt.NDArray[Any]:
    """Return rows as an array of `shape`, the inverse of `to_rows`: always a view."""
    normalized = {axis + len(shape) for axis in axes}
    leading = [size for axis, size in enumerate(shape) if axis not in normalized]
    moved = rows.reshape(*leading, *(shape[axis] for axis in axes))
    return np.moveaxis(moved, range(-len(axes), 0), axes)


def stacked(rows: npt.NDArray[Any], normalized_shape: Shape, axes: Shape) -> npt.NDArray[Any]:
    """Return rows as an array of as few dimensions as its axes take, a row for each index of the first."""
    return from_rows(rows, (len(rows), *row_shape(normalized_shape, axes)), axes)


def long_rows(array: npt.NDArray[Any], dims: int) -> npt.NDArray[Any] | None:
    """Return a view of rows in C order that reach to the next row, of which the last `dims` dimensions are the start.

    None where these dimensions are not contiguous, or the others not a fixed step apart.
    """
    if not array.flags.aligned:
        return None
    n = math.prod(array.shape[array.ndim - dims :])
    if array.flags.c_contiguous:
        return array.reshape(-1, n)
    step = array.itemsize
    for axis in range(array.ndim - 1, array.ndim - 1 - dims, -1):
        if array.shape[axis] > 1 and array.strides[axis] != step:
            return None
        step *= array.shape[axis]
    leading = [axis for axis in range(array.ndim - dims) if array.shape[axis] > 1]
    if not leading or not array.size:
        return None
    row = array.strides[leading[-1]]
    for outer, inner in itertools.pairwise(leading):
        if array.strides[outer] != array.strides[inner] * array.shape[inner]:
            return None
    if row < step or row % array.itemsize:
        return None
    # of the last row, no more than its first n elements are ever touched
    return np.lib.stride_tricks.as_strided(array, (array.size // n, row // array.itemsize), (row, array.itemsize))


def same_place(out: npt.NDArray[Any], codes: npt.NDArray[Any]) -> bool:
    """Whether each element of one array lies exactly where that of the other does."""
    return out.ctypes.data == codes.ctypes.data and out.strides == codes.strides and out.itemsize == codes.itemsize
