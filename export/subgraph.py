"""The integer subgraph: the equations of docs/arithmetic.md in standard ONNX operators, in one of the words.

One body serves all specs of a layout: what differs between them are the attributes of the function's node and its
channel inputs. The inline form is the same body with all of them written out.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import ModelError
from ..proof import NormKind
from ..quantization import DType, QuantParams
from ..spec import LayerNormSpec
from . import bounded, input_stage, int64, narrow, narrow_sums
from .graph import Operand, Writer

#: The domain of the function form, its version, the IR version that functions need, and the first opset with it.
DOMAIN, DOMAIN_VERSION, IR_VERSION, FUNCTION_OPSET = "fxp_layernorm", 1, 8, 15


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


#: What carries the integers of the words below 2**24.
_CARRIERS = {Word.INT24: bounded.INT32, Word.FLOAT24: bounded.FLOAT}


@dataclass(frozen=True)
class Writing:
    """How norms are written; `io` is the type that carries codes which have no other, None for their own."""

    form: Form
    word: Word
    opset: int
    io: DType | None

    @classmethod
    def of(cls, form: Form | str, word: Word | str, opset: int, io: DType | str | None = None) -> Writing:
        """Return it for names; raises ModelError for one that is none."""
        for kind, value in ((Form, form), (Word, word)):
            if value not in list(kind):
                raise ModelError(f"the {kind.__name__.lower()} is {value!r}; it must be one of {', '.join(kind)}")
        if io not in (None, DType.INT32):
            raise ModelError(f"io is {io!r}; it can be int32")
        if io is not None and form == Form.QDQ:
            raise ModelError("the form qdq has the codes of QuantizeLinear; leave out --io (io=), or use another form")
        return cls(Form(form), Word(word), opset, None if io is None else DType.INT32)

    def codes(self, params: QuantParams) -> ir.DataType:
        """Return the type of the tensors that hold codes of these parameters."""
        return ir.DataType.from_numpy((self.io or params.dtype).numpy)


@dataclass(frozen=True)
class Subgraph:
    """An integer norm's values.

    Attributes
    ----------
    codes : onnx_ir.Value
        The output codes.
    codes_sum : onnx_ir.Value or None
        Those of the sum, where the spec has them.
    stages : dict of str to onnx_ir.Value
        The values between the codes, by their letters (`int64.Body.stages`); a function names its own ones so.
    functions : dict of str to onnx_ir.Function
        The functions that the nodes call, by name.
    """

    codes: ir.Value
    codes_sum: ir.Value | None = None
    stages: dict[str, ir.Value] = field(default_factory=dict)
    functions: dict[str, ir.Function] = field(default_factory=dict)


def append(
    tape: Tape,
    spec: LayerNormSpec,
    operands: Sequence[ir.Value],
    writing: Writing,
    *,
    rank: int | None,
    name: str,
) -> Subgraph:
    """Append an integer norm from codes to codes, between transpositions where its axes are not the last.

    Parameters
    ----------
    tape : onnx_ir.tape.Tape
    spec : LayerNormSpec
    operands : sequence of onnx_ir.Value
        The input codes, and those that are added where the spec has a residual.
    writing : Writing
    rank : int or None
        The number of their dimensions, where it is known.
    name : str
        The norm's name.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec, or the opset doesn't have its operators.
    """
    written = _between_transpositions(tape, spec, operands, writing, rank, name)
    for codes, params in ((written.codes, spec.output), (written.codes_sum, spec.sum_output)):
        if codes is not None and params is not None:
            codes.type, codes.shape = ir.TensorType(writing.codes(params)), operands[0].shape
    return written


def _between_transpositions(
    tape: Tape, spec: LayerNormSpec, operands: Sequence[ir.Value], writing: Writing, rank: int | None, name: str
) -> Subgraph:
    last = tuple(range(-len(spec.axes), 0))
    if spec.axes == last:
        return _append(tape, spec, operands, writing, rank, name)
    if rank is None:
        raise ModelError(f"the norm {name!r} can't be replaced: the rank of its input is not known")
    normalized = [axis + rank for axis in spec.axes]
    order = [axis for axis in range(rank) if axis not in normalized] + normalized
    rows = [tape.op("Transpose", [value], {"perm": order}) for value in operands]
    for value, codes in zip(rows, operands, strict=True):
        value.type = codes.type
    written = _append(tape, dataclasses.replace(spec, axes=last), rows, writing, rank, name)
    back = {"perm": [order.index(axis) for axis in range(rank)]}
    return dataclasses.replace(
        written,
        codes=tape.op("Transpose", [written.codes], back),
        codes_sum=None if written.codes_sum is None else tape.op("Transpose", [written.codes_sum], back),
    )


def _append(
    tape: Tape, spec: LayerNormSpec, operands: Sequence[ir.Value], writing: Writing, rank: int | None, name: str
) -> Subgraph:
    """Append a norm over the last dimensions."""
    if writing.word is not Word.INT64:
        narrow.check(spec, writing.word)
    codes_sum: ir.Value | None = None
    if spec.adder is not None:
        if writing.word is Word.INT64:
            carried, (u, codes_sum) = ir.DataType.INT32, input_stage.append(tape, spec, list(operands))
        else:
            carried = _CARRIERS[writing.word]
            u, codes_sum = narrow_sums.append(tape, spec, operands, carried)
        if codes_sum is not None and spec.sum_output is not None and writing.codes(spec.sum_output) != carried:
            codes_sum = tape.op("Cast", [codes_sum], {"to": writing.codes(spec.sum_output)})
        operands, spec = [u], input_stage.behind(spec)
    (q,) = operands
    flatten = len(spec.normalized_shape) > 1 or rank == 1
    inline = writing.form is Form.INLINE
    writer = Writer(tape if inline else Tape(), attributes(spec), inline=inline)
    body = _body(spec, writing, writer, writing.codes(spec.output))
    lowest = max(body.opset, 14 if flatten else 0)  # for Reshape's allowzero
    if writing.opset < lowest:
        raise ModelError(
            f"the norm {name!r} needs opset {lowest} to be replaced; the model has {writing.opset}. "
            "Raise it with --opset (opset=)"
        )
    channels = body.channels()
    if inline:
        y = _write(body, q, channels, flatten)
        return Subgraph(y, codes_sum, _values(body.stages, q))
    function = _function(body, writing, flatten)
    inputs = [
        tape.initializer(ir.tensor(value), name=f"{name}/{key}" if name else key) for key, value in channels.items()
    ]
    y = tape.op(function.name, [q, *inputs], writer.attributes, domain=DOMAIN, name=name or None)
    return Subgraph(y, codes_sum, functions={function.name: function})


def add_functions(model: ir.Model, functions: Mapping[str, ir.Function]) -> None:
    """Add the functions that norms call to a model."""
    if functions:
        model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION
    for function in functions.values():
        model.functions[function.identifier()] = function


def attributes(spec: LayerNormSpec) -> dict[str, int | float]:
    """Return the attributes that every function node has: every integer of the spec that is not one a channel."""
    shared = spec.input.zero_point if isinstance(spec.input.zero_point, int) else 0
    return {
        "n": spec.n, "zero_point": shared, "h": spec.h, "E": spec.E, "m": spec.m, "K": spec.K,
        "s1": spec.s1, "s2": spec.s2, "y_low": spec.output.lo, "y_high": spec.output.hi,
    }  # fmt: skip


def _body(spec: LayerNormSpec, writing: Writing, writer: Writer, output: ir.DataType) -> int64.Body | narrow.Body:
    if writing.word is Word.INT64:
        return int64.Body(spec, writer, output, writing.opset)
    return narrow.Body(spec, _CARRIERS[writing.word], writer, output)


def _function(body: int64.Body | narrow.Body, writing: Writing, flatten: bool) -> ir.Function:
    """Return the model-local function; all specs that have the same nodes share it, by its name."""
    inputs = {name: ir.Value(name=name) for name in ("q", *body.channels())}
    output = _write(body, inputs["q"], inputs, flatten)
    output.name = "y"
    for letter, value in _values(body.stages, inputs["q"]).items():
        value.name = letter
    writer, kind = body.writer, "LayerNorm" if body.spec.kind is NormKind.LAYERNORM else "RMSNorm"
    graph = ir.Graph(
        list(inputs.values()), [output], nodes=writer.tape.nodes, opset_imports={"": writing.opset}, name="norm"
    )
    declared = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in writer.attributes]
    function = ir.Function(DOMAIN, f"{kind}_{writing.word}", graph=graph, attributes=declared)
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
