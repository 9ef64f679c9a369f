"""The operators that are norms: ONNX's, and those of ONNX Runtime, of which some add before they normalize."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..proof import NormKind
from .names import unique_name

_ONNX = ("", "ai.onnx")
_RUNTIME = "com.microsoft"
_KINDS = {
    "LayerNormalization": NormKind.LAYERNORM,
    "RMSNormalization": NormKind.RMSNORM,
    "SimplifiedLayerNormalization": NormKind.RMSNORM,  # ONNX Runtime's, which stands in ONNX's own domain
}
_ADDING = {
    "SkipLayerNormalization": NormKind.LAYERNORM,
    "SkipSimplifiedLayerNormalization": NormKind.RMSNORM,
    "EmbedLayerNormalization": NormKind.LAYERNORM,
}
#: Where a node that adds has gamma, beta and what it adds besides among its inputs, and the sum among its outputs.
_PLACES = {
    "SkipLayerNormalization": (2, 3, 4, 3),
    "SkipSimplifiedLayerNormalization": (2, None, 3, 3),
    "EmbedLayerNormalization": (5, 6, None, 2),
}
_SHOWN = "fxp_layernorm.outputs"


def kind(node: ir.Node) -> NormKind | None:
    """Return what norm a node is, if it is one."""
    if node.domain in _ONNX:
        return _KINDS.get(node.op_type)
    return _ADDING.get(node.op_type) if node.domain == _RUNTIME else None


def adds(node: ir.Node) -> bool:
    """Tell whether a norm adds up its input itself."""
    return node.domain == _RUNTIME


def is_skip(node: ir.Node) -> bool:
    """Tell whether a node adds up two tensors and nothing else before it normalizes."""
    skips = node.domain == _RUNTIME and node.op_type.startswith("Skip") and kind(node) is not None
    return skips and bias(node) is None


def bias(node: ir.Node) -> ir.Value | None:
    """Return what a norm that adds two tensors adds besides."""
    place = _PLACES[node.op_type][2] if adds(node) else None
    return None if place is None else _input(node, place)


def value(node: ir.Node) -> ir.Value | None:
    """Return what a norm normalizes: its input, or the sum that it shows."""
    if adds(node):
        place = _PLACES[node.op_type][-1]
        return node.outputs[place] if place < len(node.outputs) else None  # in functions, no sum is shown
    return _input(node, 0)


def parameters(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return a norm's gamma and beta."""
    gamma, beta = _PLACES[node.op_type][:2] if adds(node) else (1, 2)
    return _input(node, gamma), None if beta is None else _input(node, beta)


def blocker(node: ir.Node) -> str | None:
    """Tell which output of a norm nothing but the node itself can give."""
    used = [value.uses() or value.is_graph_output() for value in node.outputs]
    if node.op_type == "EmbedLayerNormalization":
        lacking = any(used[1:2]) and _input(node, 7) is None
        return "its mask index is used, and it has no mask" if lacking else None
    return "its mean or inverse deviation is used" if any(used[1:3]) else None


def show_sum(node: ir.Node, taken: set[str]) -> None:
    """Give a node that adds an output for its sum, if it has none, of a name that is not taken."""
    if kind(node) is None or not adds(node):
        return
    place = _PLACES[node.op_type][-1]
    before = len(node.outputs)
    if before <= place:
        node.resize_outputs(place + 1)
        for added in node.outputs[before:]:
            added.name = ""
    shown, y = node.outputs[place], node.outputs[0]
    if not shown.name:
        node.meta[_SHOWN] = before
        shown.name, shown.type, shown.shape = unique_name(f"{y.name}/sum", taken), y.type, y.shape


def hide_sum(node: ir.Node) -> None:
    """Take away the output that `show_sum` added."""
    if _SHOWN in node.meta:
        place = _PLACES[node.op_type][-1]
        node.outputs[place].name = ""
        node.resize_outputs(max(node.meta[_SHOWN], 1))


def split(node: ir.Node, opset: int) -> ir.Node:
    """Replace a norm that adds by the sum and a norm without, and return the latter."""
    tape = Tape()
    total = _embeddings(tape, node) if node.op_type == "EmbedLayerNormalization" else _sum(tape, node)
    gamma, beta = parameters(node)
    attributes = {"epsilon": node.attributes.get_float("epsilon", 1e-12), "axis": -1}
    # the last of its kind: ONNX Runtime's own, which runs in models of every opset
    name = [name for name, found in _KINDS.items() if found is kind(node)][-1]
    inputs = [total, gamma] if beta is None else [total, gamma, beta]  # ONNX Runtime crashes on an empty last input
    y = tape.op(name, inputs, attributes, name=node.name)
    old, new = [node.outputs[0], node.outputs[_PLACES[node.op_type][-1]]], [y, total]
    if node.op_type == "EmbedLayerNormalization" and len(node.outputs) > 1 and node.outputs[1].name:
        old.append(node.outputs[1])
        new.append(_mask_index(tape, node, opset))
    graph = node.graph
    assert graph is not None
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, old, new)
    normalized = y.producer()
    assert normalized is not None
    return normalized


def _sum(tape: Tape, node: ir.Node) -> ir.Value:
    """Append input + skip + bias."""
    total, besides = tape.op("Add", [node.inputs[0], node.inputs[1]]), bias(node)
    return total if besides is None else tape.op("Add", [total, besides])


def _embeddings(tape: Tape, node: ir.Node) -> ir.Value:
    """Append the sum of the embeddings of words, positions and segments."""
    ids, segments, words, positions, kinds = (_input(node, index) for index in range(5))
    where = _input(node, 8)
    total = tape.op("Gather", [words, ids])
    if where is not None:
        placed = tape.op("Gather", [positions, where])
    else:
        zero, one, two = (tape.op("Constant", [], {"value": ir.tensor([index])}) for index in range(3))
        length = tape.op("Slice", [tape.op("Shape", [ids]), one, two])
        placed = tape.op("Slice", [positions, zero, length, zero])
    total = tape.op("Add", [total, placed])
    if segments is None or kinds is None:
        return total
    return tape.op("Add", [total, tape.op("Gather", [kinds, segments])])


def _mask_index(tape: Tape, node: ir.Node, opset: int) -> ir.Value:
    """Append the number of ones in each row of the mask."""
    mask = _input(node, 7)
    one = tape.op("Constant", [], {"value": ir.tensor([1], dtype=ir.DataType.INT32)})
    ones = tape.op("Cast", [tape.op("Equal", [mask, one])], {"to": ir.DataType.INT32})
    if opset < 13:
        return tape.op("ReduceSum", [ones], {"axes": [1], "keepdims": 0})
    return tape.op("ReduceSum", [ones, tape.op("Constant", [], {"value": ir.tensor([1])})], {"keepdims": 0})


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None
