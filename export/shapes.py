"""Inferring shapes, also behind ONNX Runtime's operators, which ONNX knows nothing of."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common
from onnx_ir.tape import Tape

from . import fused
from .constants import DEQUANTIZE, QUANTIZE, codes_type, is_quantizer

_RUNTIME = "com.microsoft"


def infer_shapes(model: ir.Model) -> None:
    """Give the values of a model the types and shapes that can be inferred."""
    infer = ir.passes.common.ShapeInferencePass()
    infer(model)
    if not any(_unknown(node) for node in model.graph.all_nodes()):
        return
    trial = model.clone()
    for node in list(trial.graph.all_nodes()):
        if _unknown(node):
            _stand_in(node)
    infer(trial)
    found = ir.convenience.create_value_mapping(trial.graph, include_subgraphs=True)
    for name, value in ir.convenience.create_value_mapping(model.graph, include_subgraphs=True).items():
        if value.shape is None and name in found:
            value.type, value.shape = value.type or found[name].type, found[name].shape


def _unknown(node: ir.Node) -> bool:
    """Whether ONNX doesn't infer a node's shape, which is that of its first input."""
    if not node.inputs or node.inputs[0] is None or node.outputs[0].shape is not None:
        return False
    quantizer = node.domain == _RUNTIME and (is_quantizer(node, QUANTIZE) or is_quantizer(node, DEQUANTIZE))
    if fused.kind(node) is None or node.op_type.startswith("Embed"):
        return quantizer
    return not any(output.uses() or output.is_graph_output() for output in node.outputs[1:3])


def _stand_in(node: ir.Node) -> None:
    """Replace a node by what has the same types and shapes."""
    tape, graph, x = Tape(), node.graph, node.inputs[0]
    assert isinstance(graph, ir.Graph)
    if is_quantizer(node, DEQUANTIZE):
        scale = node.inputs[1]
        new = [tape.op("Cast", [x], {"to": (scale.dtype if scale is not None else None) or ir.DataType.FLOAT})]
    elif is_quantizer(node, QUANTIZE):
        zeros = node.inputs[2] if len(node.inputs) > 2 else None
        kind = zeros.dtype if zeros is not None else None
        new = [tape.op("Cast", [x], {"to": kind or ir.DataType.from_numpy(codes_type(node))})]
    else:
        new = [tape.op("Identity", [x]) for _ in (node.outputs[0], *node.outputs[3:])]
    old = [node.outputs[0], *node.outputs[3:]]
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, old, new)
