"""What a norm divides by: the statistic that the finder fits to a model's values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ..proof import NormKind
from .evaluation import Array

#: The least scale in place of one where eps decides, where it is 0.
_LEAST = 1e-15


@dataclass(frozen=True)
class Statistic:
    """What the deviations are divided by: a root, with eps under it or beside it.

    Attributes
    ----------
    kind : NormKind
    axes : tuple of int
    unbiased : bool
        Whether the sum of squares is divided by n - 1.
    epsilon : float
    outside : float
        What is added to the root.
    summed : bool
        Whether the sum of squares stands under the root instead of their mean.
    """

    kind: NormKind
    axes: tuple[int, ...]
    unbiased: bool
    epsilon: float
    outside: float = 0.0
    summed: bool = False

    def inner(self, x: Array) -> tuple[Array, Array]:
        """Return x, centred for LayerNorm, and its mean square; both keep their dimensions."""
        if self.kind is NormKind.LAYERNORM:
            x = x - x.mean(axis=self.axes, keepdims=True)
        return x, np.square(x).mean(axis=self.axes, keepdims=True) * self.correction(self.count(x))

    def count(self, x: Array) -> int:
        """Return n, the number of elements that are normalized together."""
        return math.prod(x.shape[axis] for axis in self.axes)

    def correction(self, n: int) -> float:
        """Return the ratio of the variance that is meant to the biased one."""
        return n / (n - 1) if self.unbiased else 1.0

    def divisor(self, square: Array) -> Array:
        """Return what the deviations are divided by."""
        return np.asarray(np.sqrt(square + self.epsilon) + self.outside)

    @property
    def unit(self) -> float:
        """The deviation at which eps decides."""
        return max(self.outside, math.sqrt(self.epsilon), _LEAST)

    def normalize(self, x: Array) -> Array:
        """Return the normalized x as a matrix, the normalized axes last."""
        x, square = self.inner(x)
        return self.rows(x / self.divisor(square))

    def rows(self, x: Array) -> Array:
        """Return x as a matrix, the normalized axes last."""
        last = range(-len(self.axes), 0)
        return np.moveaxis(x, self.axes, last).reshape(-1, self.count(x))
