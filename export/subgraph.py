"""The integer subgraph: the equations of docs/arithmetic.md in standard ONNX operators, in one of the words.

One body serves all specs of a layout: what differs between them are the attributes of the function's node and its
channel inputs. The inline form is the same body with all of them written out.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import ModelError
from ..spec import LayerNormSpec
from . import int64
from .graph import Operand, Writer

#: The domain of the function form, and its version.
DOMAIN, DOMAIN_VERSION = "fxp_layernorm", 1


class Form(StrEnum):
    """How a norm stands in the model: as one function node, as its nodes, or in floats between quantizers."""

    FUNCTION = "function"
    INLINE = "inline"
    QDQ = "qdq"


class Word(StrEnum):
    """The numbers that the graph's tensors hold."""

    INT64 = "int64"


def append(
    tape: Tape, spec: LayerNormSpec, q: ir.Value, *, rank: int | None, form: Form, word: Word, name: str, opset: int
) -> tuple[ir.Value, dict[str, ir.Function], dict[str, ir.Value]]:
    """Append an integer norm from codes to codes.

    Parameters
    ----------
    tape : onnx_ir.tape.Tape
    spec : LayerNormSpec
    q : onnx_ir.Value
        The input codes.
    rank : int or None
        The number of their dimensions, where it is known.
    form : Form
    word : Word
    name : str
        The norm's name.
    opset : int
        The graph's.

    Returns
    -------
    onnx_ir.Value
        The output codes.
    dict of str to onnx_ir.Function
        The functions that the nodes call, by name.
    dict of str to onnx_ir.Value
        The values between the codes, by their letters (`int64.Body.stages`); a function names its own ones so.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec, or the opset doesn't have its operators.
    """
    layout = int64.Layout.of(spec, flatten=len(spec.normalized_shape) > 1 or rank == 1)
    if opset < layout.opset:
        raise ModelError(
            f"the norm {name!r} needs opset {layout.opset} to be replaced; the model has {opset}. "
            "Raise it with --opset (opset=)"
        )
    attributes, channels = int64.attributes(spec), int64.tensors(spec, layout)
    if form is Form.INLINE:
        body = int64.Body(layout, Writer(tape, attributes), int64.reached_fours(spec))
        y = _write(body, q, channels)
        return y, {}, _values(body.stages)
    inputs = [
        tape.initializer(ir.tensor(value), name=f"{name}/{key}" if name else key) for key, value in channels.items()
    ]
    y = tape.op(layout.name, [q, *inputs], attributes, domain=DOMAIN, name=name or None)
    return y, {layout.name: _function(spec, layout, opset)}, {}


def _function(spec: LayerNormSpec, layout: int64.Layout, opset: int) -> ir.Function:
    """Return the model-local function that computes every spec of a layout, of which `spec` is one."""
    tape = Tape()
    inputs = {name: ir.Value(name=name) for name in ("q", *int64.tensors(spec, layout))}
    body = int64.Body(layout, Writer(tape))
    output = _write(body, inputs["q"], inputs)
    output.name = "y"
    for letter, value in _values(body.stages).items():
        value.name = letter
    graph = ir.Graph(list(inputs.values()), [output], nodes=tape.nodes, opset_imports={"": opset}, name=layout.name)
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in int64.attributes(spec)]
    return ir.Function(DOMAIN, layout.name, graph=graph, attributes=declared)


def _write(body: int64.Body, q: ir.Value, channels: Mapping[str, Operand]) -> ir.Value:
    writer = body.writer
    if not body.layout.flatten:
        return writer.value(body.write(q, channels))
    y = body.write(writer.op("Reshape", q, writer.shape([-1, "n"])), channels)
    return writer.value(writer.op("Reshape", y, writer.op("Shape", q), allowzero=1))


def _values(stages: Mapping[str, Operand]) -> dict[str, ir.Value]:
    return {letter: value for letter, value in stages.items() if isinstance(value, ir.Value)}
