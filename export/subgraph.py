"""The integer subgraph: the equations of docs/arithmetic.md in standard ONNX operators, in one of the words.

One body serves all specs of a layout: what differs between them are the attributes of the function's node and its
channel inputs. The inline form is the same body with all of them written out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from enum import StrEnum

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import ModelError
from ..proof import NormKind
from ..spec import LayerNormSpec
from . import input_stage, int64, narrow
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
    INT24 = "int24"
    FLOAT24 = "float24"


def append(
    tape: Tape,
    spec: LayerNormSpec,
    q: ir.Value,
    *,
    rank: int | None,
    form: Form,
    word: Word,
    name: str,
    opset: int,
    residual: ir.Value | None = None,
    output: ir.DataType | None = None,
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
    residual : onnx_ir.Value, optional
        The codes that are added, where the spec has a residual.
    output : onnx_ir.DataType, optional
        The result's type, by default that of the output codes.

    Returns
    -------
    onnx_ir.Value
        The output codes.
    dict of str to onnx_ir.Function
        The functions that the nodes call, by name.
    dict of str to onnx_ir.Value
        The values between the codes, by their letters (`int64.Body.stages`); a function names its own ones so. ``w``
        are the codes of the sum, where the spec has them.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec, or the opset doesn't have its operators.
    """
    if word is not Word.INT64:
        narrow.check(spec, word)
    if spec.adder is not None:
        u, w = input_stage.append(tape, spec, [q] if residual is None else [q, residual])
        y, functions, stages = append(
            tape, input_stage.behind(spec), u, rank=rank, form=form, word=word, name=name, opset=opset, output=output
        )
        return y, functions, stages if w is None else {**stages, "w": w}
    flatten = len(spec.normalized_shape) > 1 or rank == 1
    writer = Writer(tape if form is Form.INLINE else Tape(), attributes(spec), inline=form is Form.INLINE)
    body = _body(spec, word, writer, output or ir.DataType.from_numpy(spec.output.dtype.numpy))
    lowest = max(body.opset, 14 if flatten else 0)  # for Reshape's allowzero
    if opset < lowest:
        raise ModelError(
            f"the norm {name!r} needs opset {lowest} to be replaced; the model has {opset}. "
            "Raise it with --opset (opset=)"
        )
    channels = body.channels()
    if form is Form.INLINE:
        y = _write(body, q, channels, flatten)
        return y, {}, _values(body.stages, q)
    function = _function(body, word, flatten, opset)
    inputs = [
        tape.initializer(ir.tensor(value), name=f"{name}/{key}" if name else key) for key, value in channels.items()
    ]
    y = tape.op(function.name, [q, *inputs], writer.attributes, domain=DOMAIN, name=name or None)
    return y, {function.name: function}, {}


def attributes(spec: LayerNormSpec) -> dict[str, int | float]:
    """Return the attributes that every function node has: every integer of the spec that is not one a channel."""
    return {
        "n": spec.n, "zero_point": spec.input.zero_point, "h": spec.h, "E": spec.E, "m": spec.m, "K": spec.K,
        "s1": spec.s1, "s2": spec.s2, "y_low": spec.output.lo, "y_high": spec.output.hi,
    }  # fmt: skip


def _body(spec: LayerNormSpec, word: Word, writer: Writer, output: ir.DataType) -> int64.Body | narrow.Body:
    if word is Word.INT64:
        return int64.Body(spec, writer, output)
    return narrow.Body(spec, narrow.INT32 if word is Word.INT24 else narrow.FLOAT, writer, output)


def _function(body: int64.Body | narrow.Body, word: Word, flatten: bool, opset: int) -> ir.Function:
    """Return the model-local function; all specs that have the same nodes share it, by its name."""
    inputs = {name: ir.Value(name=name) for name in ("q", *body.channels())}
    output = _write(body, inputs["q"], inputs, flatten)
    output.name = "y"
    for letter, value in _values(body.stages, inputs["q"]).items():
        value.name = letter
    writer, kind = body.writer, "LayerNorm" if body.spec.kind is NormKind.LAYERNORM else "RMSNorm"
    graph = ir.Graph(list(inputs.values()), [output], nodes=writer.tape.nodes, opset_imports={"": opset}, name="norm")
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in writer.attributes]
    function = ir.Function(DOMAIN, f"{kind}_{word}", graph=graph, attributes=declared)
    digest = hashlib.sha256(ir.to_proto(function).SerializeToString(deterministic=True)).hexdigest()
    function.name = f"{function.name}_{digest[:8]}"
    return function


def _write(body: int64.Body | narrow.Body, q: ir.Value, channels: Mapping[str, Operand], flatten: bool) -> ir.Value:
    writer = body.writer
    if not flatten:
        return writer.value(body.write(q, channels))
    y = body.write(writer.op("Reshape", q, writer.shape([-1, "n"])), channels)
    return writer.value(writer.op("Reshape", y, writer.op("Shape", q), allowzero=1))


def _values(stages: Mapping[str, Operand], q: ir.Value) -> dict[str, ir.Value]:
    """Return the stages that nodes compute."""
    return {letter: value for letter, value in stages.items() if isinstance(value, ir.Value) and value is not q}
