"""Norms that a model spells out in elementary operators, found by what they compute.

Every norm has a root. From a root's argument, `_Finder` walks back to the tensors that alone decide it, and asks of
each x whether the argument is var(x) + eps or mean(x**2) + eps over some axes; then it walks forward from x, and asks
of each value whether it is the norm of x with one gain and offset a channel. Both questions are put to ONNX's reference
operators, on random tensors of several shapes, scales and means. Constants and casts are widened to float64 for that,
so that a norm fits to the rounding of its constants, and what only resembles one does not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from ..proof import NormKind
from .constants import quantizes
from .evaluation import Array, Evaluator
from .regions import MOST_NODES, Regions
from .statistic import Statistic

_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"}
#: What a value of the same meaning passes through.
_PASSING = {"Cast", "CastLike", "Identity", "Reshape", "Expand", "Squeeze", "Unsqueeze", "Transpose"}
_AFFINE = {"Add", "Sub", "Mul", "Div"}
_ARITHMETIC = _AFFINE | {"Pow", "Sqrt", "Reciprocal", "Neg", "Abs", "Max", "Min", "Clip", "Relu"}
_SHAPES = {"Shape", "Size", "Gather", "Slice", "Concat", "ReduceProd", "ConstantOfShape"}
#: Norms of other axes, which TensorFlow's converter makes layer norms of: it gives them the statistics, or other axes.
_BATCH, _INSTANCE = "BatchNormalization", "InstanceNormalization"
#: What a norm in elementary operators is made of.
OPERATORS = _REDUCTIONS | _PASSING | _ARITHMETIC | _SHAPES | {_BATCH, _INSTANCE}
#: Without one of these there is none.
ROOTS = {"Sqrt", "Pow", "ReduceL2", _BATCH, _INSTANCE}

#: Nodes beyond the first x in search of one that more follows from.
_MORE_NODES = 8
#: Elements of a random tensor, at most.
_MOST_ELEMENTS = 1 << 19
#: How far a value may be off, in proportion: the rounding of constants such as 1/n, with means of three deviations.
_TOLERANCE = 1e-5
#: Means, in deviations, and scales of the random tensors: one where eps decides, and one beyond any reasonable clip.
_TRIALS = ((1.0, 0.7), (3.0, 1.0), (-1.0, 1e12))
#: What may stand under a root, and whether it is divided by n - 1.
_VARIANCES = ((NormKind.RMSNORM, False), (NormKind.LAYERNORM, False), (NormKind.LAYERNORM, True))


@dataclass(frozen=True)
class Decomposed:
    """A norm in elementary operators.

    Attributes
    ----------
    kind : NormKind
    axes : tuple of int
        The normalized axes, counted from the end.
    shape : tuple of int
        Their sizes; empty where they are not known.
    epsilon : float
    eps_outside : bool
        Whether it is added to the deviation instead of the variance.
    gamma, beta : ndarray
        Gain and offset of each element of the normalized axes, flattened. They and epsilon go with the biased variance,
        whichever one the model has.
    input, output : onnx_ir.Value
    nodes : tuple of onnx_ir.Node
        What computes the output from the input, and nothing else; the output's node is last.
    blocker : str or None
        Why it can't be replaced.
    """

    kind: NormKind
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    epsilon: float
    eps_outside: bool
    gamma: Array
    beta: Array
    input: ir.Value
    output: ir.Value
    nodes: tuple[ir.Node, ...]
    blocker: str | None


def find_decomposed(graph: ir.Graph, evaluator: Evaluator, known: Set[ir.Node] = frozenset()) -> list[Decomposed]:
    """Return the norms that the graph itself spells out, without its bodies, in the order of their roots.

    The nodes of those that are known already are left out.
    """
    finder = _Finder(graph, evaluator)
    found: dict[ir.Value, Decomposed] = {}
    with np.errstate(all="ignore"):
        for root in finder.roots(known):
            norm = finder.norm(root)
            if norm is not None:
                found.setdefault(norm.output, norm)
    return list(found.values())


@dataclass(frozen=True)
class _Root:
    """A square root's argument: a value, or the square of one, plus what the root's node itself adds.

    `node` is an InstanceNormalization, whose argument is no value of the graph but the variance of `value`.
    """

    value: ir.Value
    squared: bool = False
    added: float = 0.0
    node: ir.Node | None = None


class _Finder:
    """Walks a graph and evaluates parts of it."""

    def __init__(self, graph: ir.Graph, evaluator: Evaluator) -> None:
        self._regions = Regions(graph, evaluator)
        self._evaluator = evaluator

    def roots(self, known: Set[ir.Node]) -> Iterator[_Root]:
        """Yield the square roots."""
        for node in self._regions.nodes:
            argument = node.inputs[0] if node.inputs else None
            if node in known or not self._evaluator.runs(node) or argument is None or self._evaluator.given(argument):
                continue
            epsilon = node.attributes.get_float("epsilon", 1e-5)
            if node.op_type == "ReduceL2":
                yield _Root(node.outputs[0], squared=True)
            elif node.op_type == _BATCH and (variance := node.inputs[4]) and not self._evaluator.given(variance):
                yield _Root(variance, added=epsilon)
            elif node.op_type == _INSTANCE:
                yield _Root(argument, added=epsilon, node=node)
            elif node.op_type == "Sqrt":
                yield _Root(argument)
            elif node.op_type == "Pow" and (power := node.inputs[1]) is not None and power in self._evaluator.constants:
                exponent = self._evaluator.constant(power)
                if exponent.size == 1 and abs(exponent.item()) == 0.5:
                    yield _Root(argument)

    def norm(self, root: _Root) -> Decomposed | None:
        """Return the norm with this root: a LayerNorm before an RMSNorm, with the last output, of the nearest x."""
        if root.node is not None:
            return self._norm_of_instances(root)
        candidates: list[tuple[ir.Value, Statistic]] = []
        most = MOST_NODES
        for x, nodes in self._regions.inputs(root.value):
            if len(nodes) > most:
                break
            if not any(node.op_type in _REDUCTIONS for node in nodes):
                continue
            statistic = self._statistic(x, nodes, root.value, squared=root.squared)
            if statistic is not None:
                most = len(nodes) + _MORE_NODES if not candidates else most
                candidates.append((x, replace(statistic, epsilon=statistic.epsilon + root.added)))
        for kind in (NormKind.LAYERNORM, NormKind.RMSNORM):
            regions = [self._region(x, statistic) for x, statistic in candidates if statistic.kind is kind]
            found = [region for region in regions if region is not None]
            if found:
                return max(found, key=lambda region: self._regions.order[region.nodes[-1]])
        return None

    def _norm_of_instances(self, root: _Root) -> Decomposed | None:
        """Return the norm that an InstanceNormalization is part of.

        It has a gain and an offset for each row, and only those of the elements in a row, behind it, tell that it is
        none of instances.
        """
        if root.value.shape is None or len(root.value.shape) < 3:
            return None
        axes = tuple(range(2 - len(root.value.shape), 0))
        found = self._region(root.value, Statistic(NormKind.LAYERNORM, axes, unbiased=False, epsilon=root.added))
        return found if found is not None and (np.ptp(found.gamma) or np.ptp(found.beta)) else None

    def _statistic(self, x: ir.Value, nodes: list[ir.Node], argument: ir.Value, *, squared: bool) -> Statistic | None:
        """Return what `argument`, or its square, is of x, where it is a variance or a mean square plus eps.

        It may be n times as much, where there is no eps; then the root must be divided again to be one of a norm.
        """
        rng = np.random.default_rng(1)
        for whole in (False, True):
            shape = self._sizes(x, nodes, (-1,), whole=whole)
            if shape is None:
                return None
            value = rng.normal(loc=1.0, size=shape)
            results = [self._evaluator.run(nodes, x, tensor).get(argument) for tensor in (np.zeros(shape), value)]
            at_zero, at_value = results
            if at_zero is None or at_value is None:
                continue
            if squared:
                at_value = np.square(at_value)
            epsilon = float(at_zero.flat[0]) if at_zero.size else -1.0
            if not (0 <= epsilon < np.inf and np.all(at_zero == epsilon)):
                return None
            for count in range(1, len(shape) + 1):
                for axes in sorted(itertools.combinations(range(-len(shape), 0), count), reverse=True):
                    for kind, unbiased in _VARIANCES:
                        statistic = Statistic(kind, axes, unbiased, epsilon)
                        if unbiased and statistic.count(value) == 1:
                            continue
                        square = statistic.inner(value)[1]
                        if not _like(at_value, value.shape, square):
                            continue
                        if _close(at_value, square + epsilon, value.shape):
                            return statistic
                        if (
                            not unbiased
                            and not epsilon
                            and _close(at_value, square * statistic.count(value), value.shape)
                        ):
                            return replace(statistic, summed=True)
        return None

    def _region(self, x: ir.Value, statistic: Statistic) -> Decomposed | None:
        """Return the norm from x to the last value that is one."""
        nodes = self._regions.consumers(x)
        for whole in (False, True):
            itself = () if statistic.summed else (statistic,)
            for possible in (*itself, *self._with_eps_outside(x, statistic, nodes, whole=whole)):
                fits = self._fits(x, possible, nodes, whole=whole)
                if fits:
                    return self._found(x, possible, fits)
        return None

    def _with_eps_outside(
        self, x: ir.Value, statistic: Statistic, nodes: list[ir.Node], *, whole: bool
    ) -> Iterator[Statistic]:
        """Yield the statistic with what the nodes add to the root."""
        shape = self._sizes(x, nodes, statistic.axes, whole=whole)
        if shape is None:
            return
        probe = np.random.default_rng(3).normal(size=shape)
        square = statistic.inner(probe)[1]
        zero, at_probe = (self._evaluator.run(nodes, x, tensor) for tensor in (np.zeros(shape), probe))
        for value, at_zero in zero.items():
            result = at_probe.get(value)
            root = float(at_zero.flat[0]) if at_zero.size and at_zero.dtype == np.float64 else 0.0
            outside = root - math.sqrt(statistic.epsilon)
            if not (0 < outside < np.inf and np.all(at_zero == root)) or result is None:
                continue
            possible = replace(statistic, outside=outside, summed=False)
            if _like(result, shape, square) and _close(result, possible.divisor(square), shape):
                yield possible

    def _found(self, x: ir.Value, statistic: Statistic, fits: dict[ir.Value, tuple[Array, Array]]) -> Decomposed:
        """Return the norm from x to the last value that is one, with the parameters of the biased variance."""
        output = _last(fits)
        members, used = self._regions.members(x, output)
        sizes = list(x.shape) if x.shape is not None else [None]
        shape = [sizes[axis] if -axis <= len(sizes) else None for axis in statistic.axes]
        gamma, beta = fits[output]
        if statistic.axes[-1] == -1 and not isinstance(shape[-1], int):
            shape[-1] = self._width(members)
        known = tuple(size for size in shape if isinstance(size, int))
        known = known if len(known) == len(shape) else ()
        correction = statistic.correction(math.prod(known) if known else gamma.size)
        root = math.sqrt(correction)
        epsilon = statistic.outside / root if statistic.outside else statistic.epsilon / correction
        blocker = None if used is None else f"its inner value {used!r} is used elsewhere"
        if statistic.epsilon and statistic.outside:
            blocker = f"{statistic.epsilon:.3g} is added under its root, and {statistic.outside:.3g} to it"
        return Decomposed(
            statistic.kind, statistic.axes, known, epsilon, bool(statistic.outside), gamma / root, beta, x, output,
            members, blocker,
        )  # fmt: skip

    def _fits(
        self, x: ir.Value, statistic: Statistic, nodes: list[ir.Node], *, whole: bool
    ) -> dict[ir.Value, tuple[Array, Array]]:
        """Return gamma and beta of each value that is the norm of x on all trials, the nearest value first."""
        rng = np.random.default_rng(2)
        shape = self._sizes(x, nodes, statistic.axes, whole=whole)
        if shape is None:
            return {}
        probe = np.resize([1.0, -1.0], math.prod(shape) + 1)[1:].reshape(shape) * rng.uniform(1, 2, size=shape)
        zero, plus, minus = (self._evaluator.run(nodes, x, tensor) for tensor in (np.zeros(shape), probe, -probe))
        normalized = statistic.normalize(probe)[0]
        constants = self._evaluator.floats(nodes)
        dtype = np.float64 if x.dtype == ir.DataType.DOUBLE else np.float32
        fits: dict[ir.Value, tuple[Array, Array]] = {}
        for value, at_zero in zero.items():
            if value is x or at_zero.shape != shape or value not in plus or value not in minus:
                continue
            high, low = (statistic.rows(result[value])[0] for result in (plus, minus))
            gamma = (high - low) / 2 / normalized
            has_eps = bool(statistic.epsilon or statistic.outside)
            beta = statistic.rows(at_zero)[0] if has_eps else (high + low) / 2
            if not (np.isfinite(gamma).all() and np.isfinite(beta).all() and gamma.any()):
                continue
            if not has_eps:
                beta = np.where(np.abs(beta) < 1e-12 * np.abs(gamma), 0.0, beta)
            if statistic.kind is NormKind.LAYERNORM or not beta.any():  # RMSNorm has no offset
                fits[value] = _exact(gamma, constants, dtype), _exact(beta, constants, dtype)
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
                    if np.all(off <= _TOLERANCE * (np.abs(gamma) * np.maximum(np.abs(expected), 1) + np.abs(beta))):
                        continue
                del fits[value]
        return fits

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
                sizes.append(self._width(nodes) or 12 if axis == -1 else 2 + axis % 3)
            else:
                sizes.append(2 + (axis + trial) % 3)
        return tuple(sizes) if sizes and math.prod(sizes) <= _MOST_ELEMENTS else None

    def _width(self, nodes: Iterable[ir.Node]) -> int | None:
        """Return the size of the last dimension that the nodes' constants imply."""
        widths = [constant.shape[-1] for constant in self._evaluator.floats(nodes) if constant.ndim]
        return max((width for width in widths if width > 1), default=None)


def _like(statistic: Array, shape: tuple[int, ...], expected: Array) -> bool:
    """Tell whether a statistic has one element a row, or is expanded to the shape of x."""
    return statistic.size == expected.size or statistic.shape == shape


def _close(statistic: Array, expected: Array, shape: tuple[int, ...]) -> bool:
    if statistic.size != expected.size:
        expected = np.broadcast_to(expected, shape)
    return bool(np.allclose(statistic.ravel(), expected.ravel(), rtol=_TOLERANCE, atol=0))


def _exact(fitted: Array, constants: Iterable[Array], dtype: type[np.floating[Any]]) -> Array:
    """Return the constant of the graph that a fitted parameter is, or the parameter rounded to the graph's type."""
    for constant in constants:
        if constant.size in (1, fitted.size) and np.allclose(constant.ravel(), fitted, rtol=1e-6, atol=0):
            fitted = np.broadcast_to(constant.ravel(), fitted.shape)
            break
    return fitted.astype(dtype).astype(np.float64)


def _last(fits: dict[ir.Value, tuple[Array, Array]]) -> ir.Value:
    """Return the value behind one gain and one offset of the nearest that is a norm, as far as nothing else uses it."""
    current = output = next(iter(fits))
    while not current.is_graph_output() and len(current.uses()) == 1:
        node = current.consumers()[0]
        gamma, beta = fits[current]
        current = node.outputs[0]
        if current not in fits:
            break
        if node.op_type in _PASSING or quantizes(node):
            continue
        if beta.any() or node.op_type not in _AFFINE or (node.op_type in ("Mul", "Div") and np.any(gamma != 1)):
            break
        output = current
    return output
