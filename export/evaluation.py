"""Running parts of a graph in float64, node by node, on ONNX's reference operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from ..errors import ModelError
from .constants import constant, is_constant, quantizes
from .operators import GroupNormalization, MeanVarianceNormalization

Array = npt.NDArray[Any]
#: The operators that take nothing but the shape of their input.
MEASURES = {"Shape", "Size"}
#: The operators that sum or average with weights of their own, if with any.
AVERAGES = {"AveragePool", "GlobalAveragePool", "Mean", "Einsum", "MatMul", "Gemm", "Conv"}
_WEIGHTED = {"MatMul", "Gemm", "Conv"}


class Evaluator:
    """Computes values of a graph: constants and casts are widened to float64, so that rounding hides nothing.

    Parameters
    ----------
    graph : onnx_ir.Graph
        Its nodes must be in order.
    operators : container of str
        ONNX's operators that may be run to fold constants.
    opset : int
    around : Evaluator, optional
        That of the graph around it.
    through : bool
        Whether quantizers give what they take, as if nothing were rounded.
    """

    def __init__(
        self, graph: ir.Graph, operators: Container[str], opset: int, around: Evaluator | None = None, *,
        through: bool = False,
    ) -> None:  # fmt: skip
        self._known, self._opset, self._through = operators, opset, through
        self._operators: dict[ir.Node, ReferenceEvaluator] = {}
        self._folded: dict[ir.Value, Array] = {}
        #: What no input of the model decides.
        self.constants: set[ir.Value] = set() if around is None else set(around.constants)
        self.constants.update(value for value in graph.initializers.values() if value.const_value is not None)
        #: What the shapes of values decide, whatever they hold.
        self.shapes: set[ir.Value] = set() if around is None else set(around.shapes)
        for node in graph:
            inputs = [value for value in node.inputs if value is not None]
            folds = node.op_type in operators and inputs
            if (folds and self.constants.issuperset(inputs)) or (
                len(node.outputs) == 1 and is_constant(node.outputs[0])
            ):
                self.constants.update(node.outputs)
            elif node.op_type in MEASURES or (folds and all(map(self.given, inputs))):
                self.shapes.update(node.outputs)

    def given(self, value: ir.Value) -> bool:
        """Tell whether a value is known without any tensor: a constant, or what shapes decide."""
        return value in self.constants or value in self.shapes

    def within(self, body: ir.Graph) -> Evaluator:
        """Return the evaluator of a body in the graph."""
        return Evaluator(body, self._known, self._opset, self, through=self._through)

    def runs(self, node: ir.Node) -> bool:
        """Tell whether a node is one of those that may be run.

        A BatchNormalization in training is none, nor is a GroupNormalization of several, or what weighs differently.
        """
        if node.op_type == "GroupNormalization" and node.attributes.get_int("num_groups", 0) != 1:
            return False
        if node.op_type in _WEIGHTED and not self._is_uniform(node):
            return False
        if node.op_type == "BatchNormalization" and (
            len(node.outputs) > 1 or node.attributes.get_int("training_mode", 0) != 0
        ):
            return False
        return (node.op_type in self._known and node.domain in ("", "ai.onnx")) or (self._through and quantizes(node))

    def _is_uniform(self, node: ir.Node) -> bool:
        """Tell whether a node multiplies by one and the same number throughout; others are not read as a whole."""
        weights = [value for value in node.inputs if value is not None and value in self.constants]
        for value in weights:
            try:
                array = constant(value) if ir.convenience.get_const_tensor(value) is not None else None
            except ModelError:  # external data that are not there: a norm needs others
                return False
            flat = np.ravel(array) if array is not None else np.empty(0)
            if not flat.size or flat[0] != flat[-1] or np.any(flat != flat[0]):
                return False
        return bool(weights)

    def constant(self, value: ir.Value) -> Array:
        """Return a constant's value.

        Raises
        ------
        ModelError
            If its external data can't be read.
        """
        if value not in self._folded:
            array, producer = constant(value), value.producer()
            if array is None:
                assert producer is not None
                self._compute(producer, self._folded, {})
            else:
                floating = ir.DataType.from_numpy(array.dtype).is_floating_point()
                self._folded[value] = array.astype(np.float64) if floating else array
        return self._folded[value]

    def rounded(self, value: ir.Value) -> Array:
        """Return a constant's value as the graph computes it, in its own types.

        Raises
        ------
        ModelError
            If its external data can't be read.
        """
        array, node = constant(value), value.producer()
        if array is None:
            assert node is not None
            inputs = ((index, source) for index, source in enumerate(node.inputs) if source is not None)
            feed = {f"x{index}": self.rounded(source) for index, source in inputs}
            results = _operator(node, self._opset, widened=False).run(None, feed)
            array = np.asarray(list(results)[list(node.outputs).index(value)])
        return array

    def floats(self, nodes: Iterable[ir.Node]) -> list[Array]:
        """Return the float constants that nodes read."""
        read = (value for node in nodes for value in node.inputs if value is not None and value in self.constants)
        return [array for array in map(self.constant, read) if array.dtype == np.float64]

    def run(self, nodes: Iterable[ir.Node], x: ir.Value, value: Array) -> dict[ir.Value, Array]:
        """Return x and what nodes compute of its value; those that fail on its shape are left out.

        What nodes need of the shapes of other values is known where these have dimensions of x, by name. Where x has
        one such dimension only, other names are taken for it, too, as shape inference loses sight of which are equal:
        were they not, what is reshaped or expanded to them would not go with x.
        """
        values = {x: value}
        dims = list(x.shape) if x.shape is not None else []
        sizes = {str(dim): size for dim, size in zip(dims, value.shape, strict=False) if not isinstance(dim, int)}
        if len(sizes) == 1:
            (only,) = sizes.values()
            sizes = defaultdict(lambda: only, sizes)
        for node in nodes:
            try:
                self._compute(node, values, sizes)
            except ModelError:
                raise
            except Exception:  # the reference's operators raise anything where shapes or types don't fit
                continue
        return values

    def _compute(self, node: ir.Node, values: dict[ir.Value, Array], sizes: Mapping[str, int]) -> None:
        if self._through and quantizes(node) and (source := node.inputs[0]) is not None:
            values[node.outputs[0]] = self.constant(source) if source in self.constants else values[source]
            return
        operator = self._operators.get(node)
        if operator is None:
            operator = self._operators[node] = _operator(node, self._opset)
        feed = {}
        for index, value in enumerate(node.inputs):
            if value is None:
                continue
            if value in self.constants:
                feed[f"x{index}"] = self.constant(value)
                continue
            producer = value.producer()
            if value not in values and value in self.shapes and producer is not None:
                self._compute(producer, values, sizes)
            elif value not in values and node.op_type in MEASURES and value.shape is not None:
                shape = [dim if isinstance(dim, int) else sizes[str(dim)] for dim in value.shape]
                values[value] = np.broadcast_to(0.0, shape)
            feed[f"x{index}"] = values[value]
        for output, result in zip(node.outputs, operator.run(None, feed), strict=True):
            values[output] = np.asarray(result)


def _operator(node: ir.Node, opset: int, *, widened: bool = True) -> ReferenceEvaluator:
    """Return a node by itself, that gives float64 where it casts to floats if it is widened."""
    if node.op_type == "BatchNormalization":  # the reference takes older ones for those of training
        opset = max(opset, 15)
    proto = ir.to_proto(node)
    inputs = [f"x{index}" if name else "" for index, name in enumerate(proto.input)]
    outputs = [f"y{index}" for index in range(len(proto.output))]
    proto.input[:], proto.output[:] = inputs, outputs
    for attribute in proto.attribute:
        if (
            widened
            and node.op_type == "Cast"
            and attribute.name == "to"
            and ir.DataType(attribute.i).is_floating_point()
        ):
            attribute.i = onnx.TensorProto.DOUBLE
    graph = onnx.helper.make_graph([proto], "node", _untyped(inputs), _untyped(outputs))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return ReferenceEvaluator(model, new_ops=[GroupNormalization, MeanVarianceNormalization])


def _untyped(names: list[str]) -> list[onnx.ValueInfoProto]:
    return [onnx.helper.make_value_info(name, onnx.TypeProto()) for name in names if name]
