"""A float model whose norms are quantized as it runs, with parameters that need no new session.

What a choice of scales costs the model is measured on this one: every norm rounds its input and its output as its codes
would, and computes in floats between them. The integers in between lose a hundredth of that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..axes import row_shape
from ..export import fused
from ..export.loading import Model, load_model
from ..export.norms import Norm, find_norms
from ..export.qdq import input_value
from ..export.residual import ResidualAdd, find_residual
from ..layer import LayerNorm, RMSNorm
from ..quantization import QuantParams
from ..runtime import Feed, Session
from ..spec import LayerNormSpec

_PREFIX = "fxp_layernorm.simulated"
#: A step so fine that float32 values pass as they are, and codes that clip nothing, infinities neither.
_UNQUANTIZED_STEP, _UNQUANTIZED_CODE = 2.0**-40, np.inf
#: What may be quantized, in the order of `Sides.placed`.
_PLACES = ("input", "output", "first", "second", "sum")


class Sides(NamedTuple):
    """The quantization of the tensors around a norm; None is float.

    Attributes
    ----------
    input, output : QuantParams or None
    residual : QuantParams or None
        Where the norm adds: of the second addend. `input` is then the first one's, and the sum keeps its precision.
    sum_output : QuantParams or None
        Of the sum, for those others that read it.
    """

    input: QuantParams | None = None
    output: QuantParams | None = None
    residual: QuantParams | None = None
    sum_output: QuantParams | None = None

    @classmethod
    def of(cls, spec: LayerNormSpec) -> Self:
        """Return the quantization that a spec has."""
        return cls(spec.input, spec.output, spec.residual, spec.sum_output)

    def placed(self) -> tuple[QuantParams | None, ...]:
        """Return what to quantize: the norm's input, its output, both addends, and the sum for others."""
        if self.residual is None:
            return self.input, self.output, None, None, None
        return None, self.output, self.input, self.residual, self.sum_output


class Simulation:
    """Runs a model with the input and output of its norms quantized.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model
    norms : iterable of str
        The names of the norms that may be quantized; all others stay float.
    residuals : bool
        Whether norms that follow the sum of two tensors may add these themselves.
    """

    def __init__(self, model: Model, norms: Iterable[str], *, residuals: bool = False) -> None:
        graph_model = load_model(model).clone()
        found = {norm.name: norm for norm in find_norms(graph_model)}
        version = graph_model.graph.opset_imports.get("", 0)
        self._inputs: dict[str, tuple[_SideInputs, ...]] = {}
        adds: list[tuple[ResidualAdd, ir.Node, Sequence[_SideInputs]]] = []
        for index, name in enumerate(norms):
            norm, layer = found[name], found[name].layer
            assert layer is not None
            if fused.adds(norm.nodes[0]):
                norm = dataclasses.replace(norm, nodes=(fused.split(norm.nodes[0], version),))
            add = find_residual(norm) if residuals else None
            places = _PLACES[: 2 if add is None else 4 + add.shared]
            sides = tuple(_SideInputs(f"{_PREFIX}/{index}/{place}", layer) for place in places)
            graph_model.graph.inputs.extend(value for side in sides for value in side.values)
            own = _quantize_input(norm, sides[0])
            _quantize_output(norm, sides[1])
            if add is not None:
                adds.append((add, own, sides[2:]))
            self._inputs[name] = sides
        for add, own, addends in adds:  # behind all others: what a norm reads is found by its name
            _quantize_residual(add, own, addends)
        self._session = Session(graph_model, threads=1)  # the last bits then are the same on every number of cores

    def run(self, feed: Feed, choice: Mapping[str, Sides]) -> dict[str, npt.NDArray[Any]]:
        """Return the model's outputs for one feed, with the norms in `choice` quantized so.

        Addends stay as they are where norms don't add them.
        """
        arrays = dict(feed)
        for name, sides in self._inputs.items():
            placed = choice.get(name, Sides()).placed()
            for side, params in zip(sides, placed, strict=False):  # addends are in place where the model has quantizers
                arrays.update(side.arrays(params))
        outputs = self._session.run(arrays)
        return {name: outputs[name] for name in self._session.outputs}


class _SideInputs:
    """The inputs of the simulated model for one side of a norm: the steps, and the lowest and highest code."""

    def __init__(self, name: str, layer: LayerNorm | RMSNorm) -> None:
        self._n = layer.n
        self._shape = row_shape(layer.normalized_shape, layer.axes)
        shapes = dict.fromkeys(("step", "low", "high"), ir.Shape(self._shape))
        self.values = [
            ir.Value(name=f"{name}/{part}", type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
            for part, shape in shapes.items()
        ]

    def append(self, tape: Tape, x: ir.Value, dtype: ir.DataType | None) -> ir.Value:
        """Append ``clamp(round(x / step)) * step``."""
        op, (step, low, high) = tape.op, self.values
        if dtype not in (None, ir.DataType.FLOAT):
            x = op("Cast", [x], {"to": ir.DataType.FLOAT})
        codes = op("Min", [op("Max", [op("Round", [op("Div", [x, step])]), low]), high])
        y = op("Mul", [codes, step])
        return y if dtype in (None, ir.DataType.FLOAT) else op("Cast", [y], {"to": dtype})

    def arrays(self, params: QuantParams | None) -> dict[str, npt.NDArray[np.float32]]:
        """Return what to feed for quantization parameters."""
        if params is None:
            values = [np.full(self._n, each) for each in (_UNQUANTIZED_STEP, -_UNQUANTIZED_CODE, _UNQUANTIZED_CODE)]
        else:
            zeros = params.channel_zeros(self._n)
            values = [params.channel_steps(self._n), params.lo - zeros, params.hi - zeros]
        arrays = [each.astype(np.float32).reshape(self._shape) for each in values]
        return {value.name or "": array for value, array in zip(self.values, arrays, strict=True)}


def _quantize_input(norm: Norm, side: _SideInputs) -> ir.Node:
    """Quantize what a norm reads, and return the node that reads it now."""
    x, tape = input_value(norm), Tape()
    quantized = side.append(tape, x, x.dtype)
    graph = norm.nodes[0].graph
    assert isinstance(graph, ir.Graph)
    first = min((node for node in norm.nodes if x in node.inputs), key=list(graph).index)
    graph.insert_before(first, tape.nodes)
    _name(tape, side)
    for node in norm.nodes:
        for index, value in enumerate(node.inputs):
            if value is x:
                node.replace_input_with(index, quantized)
    return tape.nodes[0]


def _quantize_output(norm: Norm, side: _SideInputs) -> None:
    y = norm.nodes[-1].outputs[0]
    _quantize_value(y, list(y.uses()), norm.nodes[-1], side)


def _quantize_residual(add: ResidualAdd, own: ir.Node, sides: Sequence[_SideInputs]) -> None:
    """Quantize both addends, and the sum where it is read by others than the node `own`."""
    graph, total = add.node.graph, add.total
    assert isinstance(graph, ir.Graph)
    for index, side in enumerate(sides[:2]):
        value, tape = add.node.inputs[index], Tape()
        assert value is not None
        quantized = side.append(tape, value, value.dtype)
        graph.insert_before(add.node, tape.nodes)
        _name(tape, side)
        add.node.replace_input_with(index, quantized)
    for side in sides[2:]:
        _quantize_value(total, [(node, index) for node, index in total.uses() if node is not own], add.node, side)


def _quantize_value(y: ir.Value, users: Sequence[tuple[ir.Node, int]], node: ir.Node, side: _SideInputs) -> None:
    """Quantize what `node` writes, for these users and as an output."""
    tape = Tape()
    quantized = side.append(tape, y, y.dtype)
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    graph.insert_after(node, tape.nodes)
    _name(tape, side)
    quantized.type, quantized.shape = y.type, y.shape
    quantized.name, y.name = y.name, quantized.name  # a norm behind this one is found by the name of what it reads
    for user, index in users:
        user.replace_input_with(index, quantized)
    if y.is_graph_output():
        for index, value in enumerate(graph.outputs):
            if value is y:
                graph.outputs[index] = quantized


def _name(tape: Tape, side: _SideInputs) -> None:
    base = (side.values[0].name or "").rpartition("/")[0]
    for index, node in enumerate(tape.nodes):
        node.name = node.outputs[0].name = f"{base}/{index}"
