"""Replacing one norm of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import ModelError
from ..params import NormParams
from ..spec import LayerNormSpec
from . import floating, subgraph
from .border import dequantize, quantize
from .names import unique_name
from .norms import Norm
from .qdq import Border, fitting_border, input_value
from .residual import find_residual
from .subgraph import Form, Word, Writing


@dataclass(frozen=True)
class ExportedNorm:
    """Where a replaced norm's values are in the exported model: its float input and output, and the codes between.

    A norm that stood between quantizers has no float input and output any more. `stages` names the values between the
    codes by their letters in docs/arithmetic.md; those of a function node are named so in the function itself. `form`
    and `word` are those that it was written in. `residual` and `codes_sum` are the codes that are added, and those of
    the sum, where the norm has them; `residual_input` and `sum_output` are their float values.
    """

    name: str
    input: str | None
    codes_in: str
    codes_out: str
    output: str | None
    stages: dict[str, str] = field(default_factory=dict)
    form: str = Form.FUNCTION
    word: str = Word.INT64
    residual: str | None = None
    codes_sum: str | None = None
    residual_input: str | None = None
    sum_output: str | None = None


@dataclass
class _Site:
    """What is written for a norm, and what it takes the place of.

    Attributes
    ----------
    codes_in, codes_out, residual, codes_sum : onnx_ir.Value
        The codes of the norm.
    results : dict of onnx_ir.Value to onnx_ir.Value
        What takes the place of each value that others read.
    nodes : tuple of onnx_ir.Node
        What goes.
    place : onnx_ir.Node
        What the new nodes stand behind.
    unused : list of onnx_ir.Value
        What nothing may need any more.
    x, y, residual_x, sum_y : onnx_ir.Value or None
        The float values of these codes, where there are such.
    """

    codes_in: ir.Value
    codes_out: ir.Value
    results: dict[ir.Value, ir.Value]
    nodes: tuple[ir.Node, ...]
    place: ir.Node
    unused: list[ir.Value] = field(default_factory=list)
    x: ir.Value | None = None
    y: ir.Value | None = None
    residual_x: ir.Value | None = None
    sum_y: ir.Value | None = None
    residual: ir.Value | None = None
    codes_sum: ir.Value | None = None
    stages: Mapping[str, ir.Value] = field(default_factory=dict)
    functions: dict[str, ir.Function] = field(default_factory=dict)


def replace_norm(
    norm: Norm, entry: NormParams, writing: Writing, taken: set[str]
) -> tuple[ExportedNorm, dict[str, ir.Function]]:
    """Replace one norm; returns where its codes are and the functions that it calls.

    Raises
    ------
    ModelError
        If the form or the word doesn't hold the spec, or the model lacks a residual add that the spec has.
    """
    spec, graph = entry.spec, norm.nodes[-1].graph
    assert isinstance(graph, ir.Graph)
    x, border = input_value(norm), fitting_border(norm, spec)
    unused = [value for node in norm.nodes for value in node.inputs if value is not None and value is not x]
    tape = Tape()
    if border is not None:
        site = _between_quantizers(tape, norm, spec, border, writing)
    elif writing.form is Form.QDQ:
        site = _between_new_quantizers(tape, norm, spec, writing)
    else:
        site = _among_floats(tape, norm, spec, writing)
    roles = {site.codes_in: "codes_in", site.codes_out: "codes_out"}
    roles |= {value: letter for letter, value in site.stages.items()}
    if site.codes_sum is not None:
        roles[site.codes_sum] = "codes_sum"
    if site.residual is not None:
        roles[site.residual] = "codes_residual"
    _name(tape, norm.name, taken, roles)
    codes = {
        site.codes_in: spec.input, site.codes_out: spec.output, site.residual: spec.residual,
        site.codes_sum: spec.sum_output,
    }  # fmt: skip
    for value, params in codes.items():
        if value is not None and params is not None:
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(params.dtype.numpy)), x.shape
    for value in tape.initializers:
        graph.register_initializer(value)
    old, new = list(site.results), list(site.results.values())
    ir.convenience.replace_nodes_and_values(graph, site.place, site.nodes, tape.nodes, old, new)
    _remove_unused(unused + site.unused)
    exported = ExportedNorm(
        name=norm.name, input=_named(site.x), codes_in=site.codes_in.name or "", codes_out=site.codes_out.name or "",
        output=_named(site.y), stages={letter: value.name or "" for letter, value in site.stages.items()},
        form=writing.form, word=writing.word, residual=_named(site.residual), codes_sum=_named(site.codes_sum),
        residual_input=_named(site.residual_x), sum_output=_named(site.sum_y),
    )  # fmt: skip
    return exported, site.functions


def _between_quantizers(tape: Tape, norm: Norm, spec: LayerNormSpec, border: Border, writing: Writing) -> _Site:
    """Write a norm that takes and gives the model's own codes."""
    if writing.form is Form.QDQ:
        if border.add is not None:
            raise ModelError(f"the norm {norm.name!r} is between quantizers already, with the residual add before it")
        y = floating.norm(tape, spec, input_value(norm), writing.opset)
        codes_out = border.quantizers[0].outputs[0]
        return _Site(border.codes, codes_out, {norm.nodes[-1].outputs[0]: y}, norm.nodes, norm.nodes[-1])
    operands = [border.codes] if border.residual_codes is None else [border.codes, border.residual_codes]
    written = _append(tape, norm, spec, operands, writing)
    return _Site(
        border.codes, written.codes, border.results(tape, written.codes, written.codes_sum),
        (*norm.nodes, *border.nodes), border.place(norm), unused=border.unused, residual=border.residual_codes,
        codes_sum=written.codes_sum, stages=written.stages, functions=written.functions,
    )  # fmt: skip


def _between_new_quantizers(tape: Tape, norm: Norm, spec: LayerNormSpec, writing: Writing) -> _Site:
    """Write a float norm between quantizers."""
    if spec.residual is not None:
        raise ModelError(f"the parameters of the norm {norm.name!r} add a residual, which the form qdq can't")
    x, old = input_value(norm), norm.nodes[-1].outputs[0]
    codes_in, codes_out, y = floating.quantizers(tape, spec, x, writing.opset, old.dtype)
    return _Site(codes_in, codes_out, {old: y}, norm.nodes, norm.nodes[-1], x=x, y=y)


def _among_floats(tape: Tape, norm: Norm, spec: LayerNormSpec, writing: Writing) -> _Site:
    """Write a norm that quantizes its input, or the addends of the sum before it, and dequantizes its output."""
    old, opset = norm.nodes[-1].outputs[0], writing.opset
    add = None if spec.residual is None else find_residual(norm)
    if add is None and spec.residual is not None:
        raise ModelError(f"the parameters of the norm {norm.name!r} add a residual; the model has none before it")
    values = [input_value(norm)] if add is None else list(add.addends)
    operands = [quantize(tape, value, spec, params, opset) for value, params in zip(values, spec.operands, strict=True)]
    written = _append(tape, norm, spec, operands, writing)
    y = dequantize(tape, written.codes, spec, spec.output, opset, old.dtype)
    site = _Site(
        operands[0], written.codes, {old: y}, norm.nodes, norm.nodes[-1], x=values[0], y=y, stages=written.stages,
        functions=written.functions, codes_sum=written.codes_sum,
    )  # fmt: skip
    if add is not None:
        site.residual, site.residual_x, site.place = operands[1], values[1], add.node
        if not add.shared or spec.sum_output is not None:
            site.nodes = (*norm.nodes, add.node)
        if spec.sum_output is not None and written.codes_sum is not None:
            site.sum_y = site.results[add.total] = dequantize(
                tape, written.codes_sum, spec, spec.sum_output, opset, add.total.dtype
            )
    return site


def _append(
    tape: Tape, norm: Norm, spec: LayerNormSpec, operands: list[ir.Value], writing: Writing
) -> subgraph.Subgraph:
    x = input_value(norm)
    rank = len(x.shape) if x.shape is not None else None
    return subgraph.append(tape, spec, operands, writing, rank=rank, name=norm.name)


def _named(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _remove_unused(values: list[ir.Value]) -> None:
    """Remove what only a replaced norm used: its scale and bias, and the nodes that made them."""
    for value in values:
        producer, graph = value.producer(), value.graph
        if value.uses() or value.is_graph_output() or value.is_graph_input() or not isinstance(graph, ir.Graph):
            continue
        if value.is_initializer():
            graph.initializers.pop(value.name or "", None)
        elif producer is not None and len(producer.outputs) == 1:
            inputs = [source for source in producer.inputs if source is not None]
            graph.remove(producer, safe=True)
            _remove_unused(inputs)


def _name(tape: Tape, norm: str, taken: set[str], roles: dict[ir.Value, str]) -> None:
    """Give each new value and node a name of its own under the norm's name."""
    values = [(output, roles.get(output, node.op_type)) for node in tape.nodes for output in node.outputs]
    values += [(value, (value.name or "").rpartition("/")[2]) for value in tape.initializers]
    for value, role in values:
        value.name = unique_name(f"{norm}/{role}", taken)
    for node in tape.nodes:
        node.name = node.outputs[0].name
