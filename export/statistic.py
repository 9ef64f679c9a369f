"""What a norm divides by: the statistic that the finder fits to a model's values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

import numpy as np

from ..proof import NormKind
from .evaluation import Array

#: The least scale in place of one where eps decides, where it is 0.
_LEAST = 1e-15


class Per(Enum):
    """What a sum of squares is divided by."""

    N = auto()
    N_LESS_1 = auto()
    ONE = auto()


@dataclass(frozen=True)
class Statistic:
    """What the deviations are divided by: a root, with eps under it or beside it, or no less than some number.

    Attributes
    ----------
    kind : NormKind
    axes : tuple of int
    per : Per
    epsilon : float
    outside : float
        What is added to the root.
    least : float
        What is divided by where the root is smaller.
    factor : float
        What the mean square is multiplied by besides.
    """

    kind: NormKind
    axes: tuple[int, ...]
    per: Per
    epsilon: float
    outside: float = 0.0
    least: float = 0.0
    factor: float = 1.0

    @property
    def is_deviation(self) -> bool:
        """Whether the root is that of a variance, or of a mean square, and of no multiple."""
        return self.per is not Per.ONE and self.factor == 1

    def inner(self, x: Array) -> tuple[Array, Array]:
        """Return x, centred for LayerNorm, and what stands under the root but for eps; both keep their dimensions."""
        if self.kind is NormKind.LAYERNORM:
            x = x - x.mean(axis=self.axes, keepdims=True)
        return x, np.square(x).mean(axis=self.axes, keepdims=True) * self.correction(self.count(x))

    def count(self, x: Array) -> int:
        """Return n, the number of elements that are normalized together."""
        return math.prod(x.shape[axis] for axis in self.axes)

    def correction(self, n: int) -> float:
        """Return the ratio of what stands under the root to the biased variance, or to the mean square."""
        return self.factor * {Per.N: 1.0, Per.N_LESS_1: n / max(n - 1, 1), Per.ONE: float(n)}[self.per]

    def divisor(self, square: Array) -> Array:
        """Return what the deviations are divided by."""
        return np.asarray(np.maximum(np.sqrt(square + self.epsilon) + self.outside, self.least))

    @property
    def at_zero(self) -> float:
        """What is divided by where all deviations are 0."""
        return max(self.outside + math.sqrt(self.epsilon), self.least)

    @property
    def unit(self) -> float:
        """The deviation at which what is added, or the least divisor, decides."""
        return max(self.outside, math.sqrt(self.epsilon), self.least, _LEAST)

    def normalize(self, x: Array) -> Array:
        """Return the normalized x as a matrix, the normalized axes last."""
        x, square = self.inner(x)
        return self.rows(x / self.divisor(square))

    def rows(self, x: Array) -> Array:
        """Return x as a matrix, the normalized axes last."""
        last = range(-len(self.axes), 0)
        return np.moveaxis(x, self.axes, last).reshape(-1, self.count(x))
