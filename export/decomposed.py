"""Norms that a model spells out in elementary operators, found by what they compute.

Every norm has a root. From a root's argument, `_Finder` walks back to the tensors that alone decide it, and asks of
each x whether the argument is var(x) + eps or mean(x**2) + eps over some axes, or a multiple; then it walks forward
from x, and asks of each value whether it is the norm of x with one gain and offset a channel. Both questions are put to
ONNX's reference operators, on random tensors of several shapes, scales and means (`fitting`). Constants and casts are
widened to float64 for that, so that a norm fits to the rounding of its constants, and what only resembles one does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import onnx_ir as ir

from ..proof import NormKind
from .constants import quantizes
from .evaluation import AVERAGES, Array, Evaluator
from .fitting import TOLERANCE, Fits, Fitter
from .regions import MOST_NODES, Regions
from .statistic import Per, Statistic

_REDUCTIONS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"} | AVERAGES
#: What a value of the same meaning passes through.
_PASSING = {"Cast", "CastLike", "Identity", "Reshape", "Expand", "Squeeze", "Unsqueeze", "Transpose"}
_AFFINE = {"Add", "Sub", "Mul", "Div", "Neg", "Sum"}
_ARITHMETIC = _AFFINE | {"Pow", "Sqrt", "Reciprocal", "Abs", "Max", "Min", "Clip", "Relu"}
_SHAPES = {"Shape", "Size", "Gather", "Slice", "Concat", "ReduceProd", "ConstantOfShape"}
#: Operators that normalize, of which a norm may be a part or made: TensorFlow's converter gives BatchNormalization the
#: statistics of rows; exporters write one group's normalization as that of instances, between Reshapes.
_BATCH, _INSTANCE, _GROUP = "BatchNormalization", "InstanceNormalization", "GroupNormalization"
_MEAN_VARIANCE, _LP = "MeanVarianceNormalization", "LpNormalization"
_NORMALIZING = {_INSTANCE, _GROUP, _MEAN_VARIANCE, _LP}
#: What a norm in elementary operators is made of.
OPERATORS = _REDUCTIONS | _PASSING | _ARITHMETIC | _SHAPES | _NORMALIZING | {_BATCH}
#: Without one of these there is none.
ROOTS = {"Sqrt", "Pow", "ReduceL2", _BATCH} | _NORMALIZING

#: Nodes beyond the first x in search of one that more follows from.
_MORE_NODES = 8
#: What ONNX adds to the deviation in MeanVarianceNormalization.
_MEAN_VARIANCE_EPSILON = 1e-9
#: Codes of activations have larger scales.
_SMALLEST_SCALE = 1e-5
#: Of the deviation: its square is no more, as eps, than the accuracy that norms are told by.
_NEGLIGIBLE = math.sqrt(2 * TOLERANCE)


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

    `node` is an operator that normalizes by itself, whose argument is no value of the graph but follows from `value`.
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
        self._fitter = Fitter(evaluator)

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
            elif node.op_type in _NORMALIZING:
                yield _Root(argument, added=epsilon, node=node)
            elif node.op_type == "Sqrt":
                yield _Root(self._inverted(argument) or argument)
            elif node.op_type == "Pow" and (power := node.inputs[1]) is not None and power in self._evaluator.constants:
                exponent = self._evaluator.constant(power)
                if exponent.size == 1 and abs(exponent.item()) == 0.5:
                    yield _Root(argument)

    def _inverted(self, value: ir.Value) -> ir.Value | None:
        """Return what a value is a constant divided by."""
        node = value.producer()
        if node is None or not self._evaluator.runs(node) or node.op_type not in ("Reciprocal", "Div"):
            return None
        *dividend, divisor = node.inputs
        inverted = all(one in self._evaluator.constants for one in dividend)
        return divisor if inverted and divisor is not None and not self._evaluator.given(divisor) else None

    def norm(self, root: _Root) -> Decomposed | None:
        """Return the norm with this root: a LayerNorm before an RMSNorm, with the last output, of the nearest x."""
        if root.node is not None:
            return self._norm_of_operator(root, root.node)
        candidates: list[tuple[ir.Value, Statistic]] = []
        most = MOST_NODES
        for x, nodes in self._regions.inputs(root.value):
            if len(nodes) > most:
                break
            if not any(node.op_type in _REDUCTIONS for node in nodes):
                continue
            for statistic in self._fitter.statistics(x, nodes, root.value, squared=root.squared):
                most = len(nodes) + _MORE_NODES if not candidates else most
                candidates.append((x, replace(statistic, epsilon=statistic.epsilon + root.added)))
        for kind in (NormKind.LAYERNORM, NormKind.RMSNORM):
            found: dict[ir.Value, Decomposed] = {}
            for x, statistic in candidates:
                if statistic.kind is kind and x not in found and (region := self._region(x, statistic)) is not None:
                    found[x] = region
            if found:
                return max(found.values(), key=lambda region: self._regions.order[region.nodes[-1]])
        return None

    def _norm_of_operator(self, root: _Root, node: ir.Node) -> Decomposed | None:
        """Return the norm that an operator which normalizes is, or is part of.

        One of instances has a gain and an offset for each of these, and only those of the elements in a row, behind it,
        tell that it is none.
        """
        rank = 0 if root.value.shape is None else len(root.value.shape)
        if not rank:
            return None
        if node.op_type == _INSTANCE:
            for x, axes in self._rows(root.value):
                found = self._region(x, Statistic(NormKind.LAYERNORM, axes, Per.N, root.added))
                if found is not None and (np.ptp(found.gamma) or np.ptp(found.beta)):
                    return found
            return None
        if node.op_type == _LP:
            axis = node.attributes.get_int("axis", -1)
            if node.attributes.get_int("p", 2) != 2:
                return None
            return self._region(root.value, Statistic(NormKind.RMSNORM, (axis % rank - rank,), Per.ONE, 0.0))
        if node.op_type == _GROUP:
            axes, epsilon, outside = tuple(range(1 - rank, 0)), root.added, 0.0
        else:
            own = node.attributes.get_ints("axes", (0, 2, 3))
            axes, epsilon, outside = tuple(sorted(axis % rank - rank for axis in own)), 0.0, _MEAN_VARIANCE_EPSILON
        return self._region(root.value, Statistic(NormKind.LAYERNORM, axes, Per.N, epsilon, outside))

    def _rows(self, value: ir.Value) -> Iterator[tuple[ir.Value, tuple[int, ...]]]:
        """Yield a value, and each that it has been reshaped from, with the last axes that its rows may have."""
        values = [value]
        for x, nodes in self._regions.inputs(value):
            if not all(node.op_type in _PASSING for node in nodes):
                break
            values.append(x)
        for x in values:
            if x.shape is not None:
                yield from ((x, tuple(range(-count, 0))) for count in range(1, len(x.shape)))

    def _region(self, x: ir.Value, statistic: Statistic) -> Decomposed | None:
        """Return the norm from x to the last value that is one."""
        nodes = self._regions.consumers(x)
        for whole in (False, True):
            for possible in chain([statistic], self._fitter.divisors(x, statistic, nodes, whole=whole)):
                fits = self._fitter.fits(x, possible, nodes, whole=whole)
                if fits and (possible.is_deviation or _makes_good(fits)):
                    return self._found(x, possible, fits)
        return None

    def _found(self, x: ir.Value, statistic: Statistic, fits: Fits) -> Decomposed:
        """Return the norm from x to the last value that is one, with the parameters of the biased variance."""
        output = _last(fits)
        members, used = self._regions.members(x, output)
        sizes = list(x.shape) if x.shape is not None else [None]
        shape = [sizes[axis] if -axis <= len(sizes) else None for axis in statistic.axes]
        gamma, beta = fits[output]
        if statistic.axes[-1] == -1 and not isinstance(shape[-1], int):
            shape[-1] = self._fitter.width(members)
        known = tuple(size for size in shape if isinstance(size, int))
        known = known if len(known) == len(shape) else ()
        n = math.prod(known) if known else gamma.size
        correction = statistic.correction(n)
        root = math.sqrt(correction)
        epsilon = statistic.outside / root if statistic.outside else statistic.epsilon / correction
        blocker = None if used is None else f"its inner value {used!r} is used elsewhere"
        if statistic.epsilon and statistic.outside:
            blocker = f"{statistic.epsilon:.3g} is added under its root, and {statistic.outside:.3g} to it"
        if statistic.least:
            least, epsilon = statistic.least / root, statistic.least**2 / correction
            if least > _NEGLIGIBLE * _smallest_deviation(statistic.kind, n):
                blocker = f"it divides by no less than {least:.3g}, where the integers add eps"
        return Decomposed(
            statistic.kind, statistic.axes, known, epsilon, bool(statistic.outside), gamma, beta, x, output, members,
            blocker,
        )  # fmt: skip


def _smallest_deviation(kind: NormKind, n: int) -> float:
    """Return the smallest deviation, or root of the mean square, but 0 that n codes can have."""
    return _SMALLEST_SCALE * math.sqrt(max(n - (kind is NormKind.LAYERNORM), 1)) / n


def _makes_good(fits: Fits) -> bool:
    """Tell whether the root of a multiple is one of a norm: where a gain of 1 makes good for it, or gains differ."""
    return any(np.ptp(gamma) > 0 or np.allclose(gamma, 1, rtol=1e-5) for gamma, _ in fits.values())


def _last(fits: Fits) -> ir.Value:
    """Return the value behind the gains and one offset of the nearest that is a norm, unless others use it."""
    current = output = next(iter(fits))
    while not current.is_graph_output() and len(current.uses()) == 1:
        node = current.consumers()[0]
        offset = fits[current][1]
        current = node.outputs[0]
        if current not in fits:
            break
        if node.op_type in _PASSING or quantizes(node):
            continue
        if offset.any() or node.op_type not in _AFFINE:
            break
        output = current
    return output
