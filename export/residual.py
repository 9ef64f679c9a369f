"""Residual adds before norms: where both addends are tensors of one shape, the integer norm can add them itself."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from .norms import Norm
from .qdq import input_value, is_add, same_shape


@dataclass(frozen=True)
class ResidualAdd:
    """The sum that a norm normalizes.

    Attributes
    ----------
    node : onnx_ir.Node
        What adds: an Add, or the norm itself.
    addends : tuple of onnx_ir.Value
    total : onnx_ir.Value
    shared : bool
        Whether more than the norm reads the sum.
    """

    node: ir.Node
    addends: tuple[ir.Value, ir.Value]
    total: ir.Value
    shared: bool


def find_residual(norm: Norm) -> ResidualAdd | None:
    """Return the residual add before a norm, None where there is none of two tensors of surely the same shape."""
    if norm.layer is None:
        return None
    total = input_value(norm)
    node = total.producer()
    if node is None or node.graph is not norm.nodes[-1].graph or not is_add(node, norm):
        return None
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None or not same_shape(first, second):
        return None
    if any(value.graph is not node.graph or value.is_initializer() for value in (first, second)):
        return None
    shared = total.is_graph_output() or not set(norm.nodes).issuperset(total.consumers())
    return ResidualAdd(node, (first, second), total, shared)
