"""Asking of a graph's values whether they are a norm's statistic, or the norm, of a tensor: by random tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..proof import NormKind
from .evaluation import Array, Evaluator
from .statistic import Per, Statistic

#: By value, the gain and the offset with which it is the norm.
Fits = dict[ir.Value, tuple[Array, Array]]

#: Elements of a random tensor, at most.
_MOST_ELEMENTS = 1 << 19
#: How far a value may be off, in proportion: the rounding of constants such as 1/n, with means of three deviations.
TOLERANCE = 1e-5
#: Means, in deviations, and scales of the random tensors: one where eps decides, and one beyond any reasonable clip.
_TRIALS = ((1.0, 0.7), (3.0, 1.0), (-1.0, 1e12))


class Fitter:
    """Runs nodes behind a tensor x on random values of it."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    def statistics(
        self, x: ir.Value, nodes: list[ir.Node], argument: ir.Value, *, squared: bool
    ) -> Iterator[Statistic]:
        """Yield what `argument`, or its square, is of x, where it is a variance or a mean square.

        It may be a multiple, with eps added, or be no less than some number.
        """
        rng = np.random.default_rng(1)
        known = set[Statistic]()
        for whole in (False, True):
            shape = self._sizes(x, nodes, (-1,), whole=whole)
            if shape is None:
                return
            probes = rng.normal(loc=1.0, size=shape), rng.normal(loc=-2.0, scale=3.0, size=shape)
            at_zero, *found = (
                self._evaluator.run(nodes, x, tensor).get(argument) for tensor in (np.zeros(shape), *probes)
            )
            results = [np.square(result) if squared else result for result in found if result is not None]
            if at_zero is None or len(results) < len(probes):
                continue
            epsilon = float(at_zero.flat[0]) if at_zero.size else -1.0
            if not (0 <= epsilon < np.inf and np.all(at_zero == epsilon)):
                return
            for count in range(1, len(shape) + 1):
                for axes in sorted(itertools.combinations(range(-len(shape), 0), count), reverse=True):
                    for kind in NormKind:
                        statistic = Statistic(kind, axes, Per.N, epsilon)
                        fitting = set(_matches(statistic, probes, results)) - known
                        known |= fitting
                        yield from fitting
            if any(statistic.is_deviation for statistic in known):  # of whatever sizes
                return

    def divisors(self, x: ir.Value, statistic: Statistic, nodes: list[ir.Node], *, whole: bool) -> Iterator[Statistic]:
        """Yield the statistic with what the nodes add to the root, or hold it above."""
        shape = self._sizes(x, nodes, statistic.axes, whole=whole)
        if shape is None:
            return
        probe = np.random.default_rng(3).normal(size=shape)
        zero, at_probe = (self._evaluator.run(nodes, x, tensor) for tensor in (np.zeros(shape), probe))
        roots = {statistic, replace(statistic, per=Per.N) if statistic.per is Per.ONE else statistic}
        known = set[Statistic]()
        for value, at_zero in zero.items():
            result = at_probe.get(value)
            root = float(at_zero.flat[0]) if at_zero.size and at_zero.dtype == np.float64 else 0.0
            outside = root - math.sqrt(statistic.epsilon)
            if not (0 < outside < np.inf and np.all(at_zero == root)) or result is None:
                continue
            limits = {replace(one, outside=outside) for one in roots}
            limits |= {replace(one, least=root) for one in roots if not one.epsilon}
            for limit in limits - known:
                square = limit.inner(probe)[1]
                if _like(result, shape, square.size) and _close(result, limit.divisor(square), shape):
                    known.add(limit)
                    yield limit

    def fits(self, x: ir.Value, statistic: Statistic, nodes: list[ir.Node], *, whole: bool) -> Fits:
        """Return gamma and beta of each value that is the norm of x on all trials, the nearest value first."""
        rng = np.random.default_rng(2)
        shape = self._sizes(x, nodes, statistic.axes, whole=whole)
        if shape is None:
            return {}
        probe = np.resize([1.0, -1.0], math.prod(shape) + 1)[1:].reshape(shape) * rng.uniform(1, 2, size=shape)
        zero, plus, minus = (self._evaluator.run(nodes, x, tensor) for tensor in (np.zeros(shape), probe, -probe))
        normalized = statistic.normalize(probe)[0]
        fits: Fits = {}
        for value, at_zero in zero.items():
            if value is x or at_zero.shape != shape or value not in plus or value not in minus:
                continue
            high, low = (statistic.rows(result[value])[0] for result in (plus, minus))
            gamma = (high - low) / 2 / normalized
            has_eps = statistic.at_zero > 0
            beta = statistic.rows(at_zero)[0] if has_eps else (high + low) / 2
            if not (np.isfinite(gamma).all() and np.isfinite(beta).all() and gamma.any()):
                continue
            if not has_eps:
                beta = np.where(np.abs(beta) < 1e-12 * np.abs(gamma), 0.0, beta)
            if statistic.kind is NormKind.LAYERNORM or not beta.any():  # RMSNorm has no offset
                fits[value] = gamma, beta
        for trial, (mean, scale) in enumerate(_TRIALS):
            sizes = self._sizes(x, nodes, statistic.axes, whole=whole, trial=trial)
            if sizes is None or not fits:
                return {}
            unit = scale if trial else scale * statistic.unit
            spread = np.exp(rng.normal(size=(*sizes[:-1], 1)))
            tensor = unit * spread * (rng.normal(size=sizes) + mean)
            results, expected = self._evaluator.run(nodes, x, tensor), statistic.normalize(tensor)
            for value, (gamma, beta) in list(fits.items()):
                result = results.get(value)
                if result is not None and result.shape == sizes:
                    off = np.abs(statistic.rows(result) - (expected * gamma + beta))
                    if np.all(off <= TOLERANCE * (np.abs(gamma) * np.maximum(np.abs(expected), 1) + np.abs(beta))):
                        continue
                del fits[value]
        constants = self._evaluator.floats(nodes)
        dtype = np.float64 if x.dtype == ir.DataType.DOUBLE else np.float32
        root = math.sqrt(statistic.correction(normalized.size))
        return {
            value: (_gain(gamma, root, constants, dtype), _exact(beta, constants, dtype))
            for value, (gamma, beta) in fits.items()
        }

    def width(self, nodes: Iterable[ir.Node]) -> int | None:
        """Return the size of the last dimension that the nodes' constants imply."""
        widths = [constant.shape[-1] for constant in self._evaluator.floats(nodes) if constant.ndim]
        return max((width for width in widths if width > 1), default=None)

    def _sizes(
        self, x: ir.Value, nodes: list[ir.Node], axes: Sequence[int], *, whole: bool, trial: int = 0
    ) -> tuple[int, ...] | None:
        """Return a shape for x: the true sizes on `axes`, or on all, as far as they are known; others are small."""
        dims: list[Any] = list(x.shape) if x.shape is not None else [None] * (3, 2, 4)[trial]
        sizes = []
        for axis, size in zip(range(-len(dims), 0), dims, strict=True):
            if isinstance(size, int) and size and (whole or axis in axes):
                sizes.append(size)
            elif axis in axes:
                sizes.append(self.width(nodes) or 12 if axis == -1 else 2 + axis % 3)
            else:
                sizes.append(2 + (axis + trial) % 3)
        return tuple(sizes) if sizes and math.prod(sizes) <= _MOST_ELEMENTS else None


def _matches(statistic: Statistic, probes: Sequence[Array], results: Sequence[Array]) -> Iterator[Statistic]:
    """Yield the statistic as it is, or with another divisor or factor, that gives these results."""
    shape, epsilon = probes[0].shape, statistic.epsilon
    rows = probes[0].size // statistic.count(probes[0])
    if not all(_like(result, shape, rows) for result in results):
        return
    squares = [statistic.inner(probe)[1] for probe in probes]
    limits = [statistic, replace(statistic, epsilon=0.0, least=math.sqrt(epsilon))] if epsilon else [statistic]
    for limit in limits:
        ratios = [_ratio(result - limit.epsilon, square) for result, square in zip(results, squares, strict=True)]
        factor = ratios[0]
        if factor is None or ratios[1] is None or not math.isclose(factor, ratios[1], rel_tol=TOLERANCE):
            continue
        pers = Per if limit.kind is NormKind.LAYERNORM else (Per.N, Per.ONE)
        named = (replace(limit, per=per) for per in pers)
        exact = [one for one in named if math.isclose(one.correction(one.count(probes[0])), factor, rel_tol=TOLERANCE)]
        yield exact[0] if exact else replace(limit, factor=factor)


def _ratio(result: Array, square: Array) -> float | None:
    """Return what a result is a multiple of a square by, None where it is none."""
    if result.size != square.size:
        square = np.broadcast_to(square, result.shape)
    ratios = result.ravel() / square.ravel()
    factor = float(ratios[0])
    return factor if factor > 0 and np.allclose(ratios, factor, rtol=TOLERANCE, atol=0) else None


def _like(statistic: Array, shape: tuple[int, ...], rows: int) -> bool:
    """Tell whether a statistic has one element a row, or is expanded to the shape of x."""
    return statistic.size == rows or statistic.shape == shape


def _close(statistic: Array, expected: Array, shape: tuple[int, ...]) -> bool:
    if statistic.size != expected.size:
        expected = np.broadcast_to(expected, shape)
    return bool(np.allclose(statistic.ravel(), expected.ravel(), rtol=TOLERANCE, atol=0))


def _gain(fitted: Array, root: float, constants: list[Array], dtype: type[np.floating[Any]]) -> Array:
    """Return a gain on the normalized x of one fitted beside a multiple of the root: a constant, if either is one."""
    if _constant(fitted / root, constants) is not None:
        return _exact(fitted / root, constants, dtype)
    return _exact(fitted, constants, dtype) / root


def _exact(fitted: Array, constants: Iterable[Array], dtype: type[np.floating[Any]]) -> Array:
    """Return the constant of the graph that a fitted parameter is, or the parameter rounded to the graph's type."""
    found = _constant(fitted, constants)
    return (fitted if found is None else found).astype(dtype).astype(np.float64)


def _constant(fitted: Array, constants: Iterable[Array]) -> Array | None:
    for constant in constants:
        if constant.size in (1, fitted.size) and np.allclose(constant.ravel(), fitted, rtol=1e-6, atol=0):
            return np.broadcast_to(constant.ravel(), fitted.shape)
    return None
