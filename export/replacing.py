"""Replacing one norm of a model."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import ModelError
from ..params import NormParams
from ..quantization import QuantParams
from ..spec import LayerNormSpec
from . import border, floating, subgraph
from .names import unique_name
from .norms import Norm
from .qdq import Border, fitting_border, input_value
from .residual import find_residual
from .subgraph import Form, Subgraph, Word, Writing

#: By the field of the spec that holds a border's parameters: the fields of `ExportedNorm` that name its codes and their
#: float values, and what new codes are called.
_SIDES = {
    "input": ("codes_in", "input", "codes_in"),
    "residual": ("residual", "residual_input", "codes_residual"),
    "output": ("codes_out", "output", "codes_out"),
    "sum_output": ("codes_sum", "sum_output", "codes_sum"),
}


@dataclass(frozen=True)
class Side:
    """A border of an exported norm.

    Attributes
    ----------
    role : str
        The field of the spec that holds its parameters.
    codes : str
    real : str or None
        The float value of the codes, where the model has it.
    """

    role: str
    codes: str
    real: str | None

    @property
    def enters(self) -> bool:
        """Whether the norm takes the codes."""
        return self.role in ("input", "residual")

    def params(self, spec: LayerNormSpec) -> QuantParams | None:
        """Return the parameters of the codes, None where the spec has no such border."""
        found: QuantParams | None = getattr(spec, self.role)
        return found


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

    @property
    def sides(self) -> list[Side]:
        """The norm's borders."""
        own = vars(self)
        sides = (Side(role, own[codes], own[real]) for role, (codes, real, _) in _SIDES.items())
        return [side for side in sides if side.codes is not None]


@dataclass
class _Site:
    """What is written for a norm, and what it takes the place of.

    Attributes
    ----------
    sides : dict of str to tuple of onnx_ir.Value
        By the field of the spec that holds its parameters, the codes of each border and their float value.
    written : Subgraph
    results : dict of onnx_ir.Value to onnx_ir.Value
        What takes the place of each value that others read.
    nodes : tuple of onnx_ir.Node
        What goes.
    place : onnx_ir.Node
        What the new nodes stand behind.
    unused : list of onnx_ir.Value
        What nothing may need any more.
    """

    sides: dict[str, tuple[ir.Value | None, ir.Value | None]]
    written: Subgraph
    results: dict[ir.Value, ir.Value]
    nodes: tuple[ir.Node, ...]
    place: ir.Node
    unused: list[ir.Value] = field(default_factory=list)


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
    x, around = input_value(norm), fitting_border(norm, spec)
    unused = [value for node in norm.nodes for value in node.inputs if value is not None and value is not x]
    tape = Tape()
    if around is None:
        site = _among_floats(tape, norm, spec, writing)
    elif writing.form is Form.QDQ:
        site = _between_quantizers_in_floats(tape, norm, spec, around, writing)
    else:
        site = _between_quantizers(tape, norm, spec, around, writing)
    stages = site.written.stages
    names = {codes: _SIDES[role][-1] for role, (codes, _) in site.sides.items() if codes is not None}
    _name(tape, norm.name, taken, names | {value: letter for letter, value in stages.items()})
    for value in tape.initializers:
        graph.register_initializer(value)
    old, new = list(site.results), list(site.results.values())
    ir.convenience.replace_nodes_and_values(graph, site.place, site.nodes, tape.nodes, old, new)
    _remove_unused(unused + site.unused)
    found = {
        name: value.name
        for role, side in site.sides.items()
        for name, value in zip(_SIDES[role], side, strict=False)
        if value is not None
    }
    exported = ExportedNorm(
        name=norm.name, input=found.pop("input", None), codes_in=found.pop("codes_in") or "",
        codes_out=found.pop("codes_out") or "", output=found.pop("output", None),
        stages={letter: value.name or "" for letter, value in stages.items()}, form=writing.form, word=writing.word,
        **found,
    )  # fmt: skip
    return exported, site.written.functions


def _between_quantizers(tape: Tape, norm: Norm, spec: LayerNormSpec, around: Border, writing: Writing) -> _Site:
    """Write a norm that takes and gives the model's own codes."""
    operands = [codes for codes in (around.codes, around.residual_codes) if codes is not None]
    pairs = zip(operands, spec.operands, strict=True)
    written = _append(
        tape, norm, spec, [_cast(tape, codes, _own(params), writing.codes(params)) for codes, params in pairs], writing
    )
    codes_out = _cast(tape, written.codes, writing.codes(spec.output), _own(spec.output))
    codes_sum = written.codes_sum
    if codes_sum is not None and spec.sum_output is not None:
        codes_sum = _cast(tape, codes_sum, writing.codes(spec.sum_output), _own(spec.sum_output))
    sides = {"input": around.codes, "residual": around.residual_codes, "output": codes_out, "sum_output": codes_sum}
    return _Site(
        {role: (codes, None) for role, codes in sides.items()}, written, around.results(tape, codes_out, codes_sum),
        (*norm.nodes, *around.nodes), around.place(norm), around.unused,
    )  # fmt: skip


def _between_quantizers_in_floats(
    tape: Tape, norm: Norm, spec: LayerNormSpec, around: Border, writing: Writing
) -> _Site:
    """Write a float norm between the model's own quantizers, which reads the sum itself where the spec adds."""
    x = input_value(norm)
    total = x if around.requantized is None else around.sum_quantizers[0].inputs[0]
    assert total is not None
    y = floating.norm(tape, spec, total, writing.opset)
    codes_out = around.quantizers[0].outputs[0]
    codes_sum = around.sum_quantizers[0].outputs[0] if around.sum_output is not None else None
    sides = {"input": around.codes, "residual": around.residual_codes, "output": codes_out, "sum_output": codes_sum}
    return _Site(
        {role: (codes, None) for role, codes in sides.items()}, Subgraph(codes_out), {norm.nodes[-1].outputs[0]: y},
        norm.nodes, norm.nodes[-1], [x],
    )  # fmt: skip


def _among_floats(tape: Tape, norm: Norm, spec: LayerNormSpec, writing: Writing) -> _Site:
    """Write a norm that quantizes its input, or the addends of the sum before it, and dequantizes its output."""
    old = norm.nodes[-1].outputs[0]
    add = None if spec.residual is None else find_residual(norm)
    if add is None and spec.residual is not None:
        raise ModelError(f"the parameters of the norm {norm.name!r} add a residual; the model has none before it")
    values = [input_value(norm)] if add is None else list(add.addends)
    module = floating if writing.form is Form.QDQ else border
    operands = [
        module.quantize(tape, value, spec, params, writing) for value, params in zip(values, spec.operands, strict=True)
    ]
    written = _append(tape, norm, spec, operands, writing)
    y = module.dequantize(tape, written.codes, spec, spec.output, writing, old.dtype)
    sides = dict(zip(("input", "residual"), zip(operands, values, strict=True), strict=False))
    site = _Site(sides | {"output": (written.codes, y)}, written, {old: y}, norm.nodes, norm.nodes[-1])
    if add is not None:
        site.place = add.node
        if not add.shared or spec.sum_output is not None:
            site.nodes = (*norm.nodes, add.node)
        if spec.sum_output is not None and written.codes_sum is not None:
            total = module.dequantize(tape, written.codes_sum, spec, spec.sum_output, writing, add.total.dtype)
            site.sides["sum_output"] = written.codes_sum, total
            site.results[add.total] = total
    return site


def _append(tape: Tape, norm: Norm, spec: LayerNormSpec, operands: list[ir.Value], writing: Writing) -> Subgraph:
    if writing.form is Form.QDQ:
        return floating.append(tape, spec, operands, writing)
    x = input_value(norm)
    rank = len(x.shape) if x.shape is not None else None
    return subgraph.append(tape, spec, operands, writing, rank=rank, name=norm.name)


def _own(params: QuantParams) -> ir.DataType:
    """Return the type of the tensors that hold codes in a model of its own."""
    return ir.DataType.from_numpy(params.dtype.numpy)


def _cast(tape: Tape, codes: ir.Value, source: ir.DataType, target: ir.DataType) -> ir.Value:
    return codes if source == target else tape.op("Cast", [codes], {"to": target})


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
