"""Writing models: one norm by itself, and a whole model with its float norms replaced."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.tape import Tape

from .._version import __version__
from ..errors import ModelError
from ..params import ModelParams, NormParams
from ..quantization import DType, QuantParams
from ..runtime import load_external_data
from ..spec import LayerNormSpec
from . import floating, fused, subgraph
from .border import dequantize, quantize
from .loading import Model, load_model, restore
from .names import unique_name
from .norms import Norm, find_norms
from .qdq import find_border, input_value
from .residual import find_residual
from .subgraph import Form, Word

#: The opset of a norm that is exported by itself; in a model, the layout's `opset` is the lowest.
OPSET = 17
#: The IR version that goes with it; functions need 8.
IR_VERSION = 8
#: The metadata entry in which an exported model says where its norms' codes are.
METADATA_KEY = "fxp_layernorm.norms"


@dataclass(frozen=True)
class ExportedNorm:
    """Where a replaced norm's values are in the exported model: its float input and output, and the codes between.

    A norm that stood between quantizers has no float input and output any more. `stages` names the values between the
    codes by their letters in docs/arithmetic.md; those of a function node are named so in the function itself. `form`
    and `word` are those that it was written in. `residual` and `codes_sum` are the codes that are added, and those of
    the sum, where the norm has them.
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


def to_onnx(
    spec: LayerNormSpec,
    word: Word | str = Word.INT64,
    form: Form | str = Form.INLINE,
    *,
    leading: Sequence[str | int] = ("rows",),
    io: DType | str | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """Return a model that maps input codes ``q`` to output codes ``y``.

    Where the spec adds a residual, its codes are a second input, ``residual``; where the sum has codes of its own, they
    are a second output, ``sum``.

    Parameters
    ----------
    spec : LayerNormSpec
    word : Word
        ``int64``; or ``int24`` or ``float24``, in which no value reaches 2**24, for specs planned with the hardware
        ``carried24``.
    form : Form
        ``inline``, the nodes; or ``function``, one node of the domain ``fxp_layernorm`` with the nodes as its body.
    leading : sequence of str or int
        The dimensions that are not normalized: a name for each dynamic one, a number for each fixed one.
    io : {"int32"}, optional
        Type of the input codes and of ``y``, for consumers that don't take the codes' own types.
    opset : int
        The opset of the model, 13 or later.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec, there are fewer dimensions than the axes of the spec need, or an option is
        unknown.
    """
    form, word = _parse(form, word)
    if form is Form.QDQ:
        raise ModelError("a norm by itself has no form qdq: it is for norms of a model, with `quantize_model`")
    if io not in (None, DType.INT32):
        raise ModelError(f"io is {io!r}; it can be int32")
    border = None if io is None else ir.DataType.INT32
    shape = _shape(spec, leading)
    operands = [
        _typed(name, params, shape, dtype=border)
        for name, params in zip(("q", "residual"), spec.operands, strict=False)
    ]
    tape = Tape()
    y, functions, stages = _append(
        tape, spec, operands[0], rank=len(shape), form=form, word=word, name="", opset=opset, output=border,
        residual=operands[1] if len(operands) > 1 else None,
    )  # fmt: skip
    w = stages.pop("w", None)
    for letter, value in stages.items():
        value.name = letter
    outputs = [_typed("y", spec.output, shape, y, border)]
    if w is not None and spec.sum_output is not None:
        outputs.append(_typed("sum", spec.sum_output, shape, w))
    graph = ir.Graph(
        operands, outputs, nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": opset}, name="norm"
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="fxp-layernorm", producer_version=__version__)
    _add_functions(model, functions)
    return ir.to_proto(model)


def _typed(
    name: str, params: QuantParams, shape: Sequence[str | int], value: ir.Value | None = None,
    dtype: ir.DataType | None = None,
) -> ir.Value:  # fmt: skip
    """Return codes with a name, a type, by default their own, and a shape."""
    value = ir.Value() if value is None else value
    value.name, value.shape = name, ir.Shape(shape)
    value.type = ir.TensorType(dtype or ir.DataType.from_numpy(params.dtype.numpy))
    return value


@dataclass(frozen=True)
class Replacement:
    """A model with integer norms.

    Attributes
    ----------
    model : onnx_ir.Model
        Its external data stay where they are.
    norms : tuple of ExportedNorm
        Those that were replaced.
    left : dict of str to str
        Why each other norm stays float.
    """

    model: ir.Model
    norms: tuple[ExportedNorm, ...]
    left: dict[str, str]


def quantize_model(
    model: Model,
    params: ModelParams,
    form: Form | str = Form.FUNCTION,
    word: Word | str = Word.INT64,
    *,
    opset: int | None = None,
) -> onnx.ModelProto:
    """Return a copy of a model with its norms replaced by integer ones, its external data brought into it.

    Each norm becomes: quantize with the spec's input scales, the integer subgraph, dequantize with the output scales.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model
    params : ModelParams
        For the norms to replace, by name; others stay as they are.
    form, word
        As in `to_onnx`.
    opset : int, optional
        Raise the model to this opset first, and its IR version to the opset's; by default both are kept.

    Raises
    ------
    ModelError
        If the model can't be read, lacks a norm of `params`, or one of them has other weights than its spec.
    """
    replaced = replace_norms(model, params, form, word, opset=opset).model
    load_external_data(replaced)
    return ir.to_proto(replaced)


def replace_norms(
    model: Model,
    params: ModelParams,
    form: Form | str = Form.FUNCTION,
    word: Word | str = Word.INT64,
    *,
    opset: int | None = None,
) -> Replacement:
    """Return what `quantize_model` returns, with its external data left outside, and what was done."""
    form, word = _parse(form, word)
    graph_model = load_model(model, opset=opset).clone()
    version = graph_model.graph.opset_imports.get("", 0)
    if graph_model.ir_version < IR_VERSION and form is Form.FUNCTION:
        raise ModelError(
            f"functions need IR version {IR_VERSION}; the model has {graph_model.ir_version}. "
            "Use --form inline, or --opset to raise both"
        )
    norms = {norm.name: norm for norm in find_norms(graph_model)}
    taken = set(ir.convenience.create_value_mapping(graph_model.graph))
    taken.update(node.name for node in graph_model.graph.all_nodes() if node.name)
    exported: list[ExportedNorm] = []
    functions: dict[str, ir.Function] = {}
    for entry in params.norms:
        norm = norms.get(entry.name)
        _check_same(norm, entry)
        assert norm is not None
        if fused.adds(norm.nodes[0]):
            norm = dataclasses.replace(norm, nodes=(fused.split(norm.nodes[0], version),))
        where, needed = _replace(graph_model, norm, entry, form, word, version, taken)
        exported.append(dataclasses.replace(where, form=form, word=word))
        functions.update(needed)
    restore(graph_model, [norm.input for norm in exported])
    _add_functions(graph_model, functions)
    graph_model.metadata_props[METADATA_KEY] = json.dumps([vars(norm) for norm in exported])
    names = {norm.name for norm in exported}
    left = {name: norm.blocker or "there are no parameters for it" for name, norm in norms.items() if name not in names}
    return Replacement(graph_model, tuple(exported), left)


def exported_norms(model: ir.Model) -> list[ExportedNorm]:
    """Return where the codes of an exported model's norms are; raises ModelError for any other model."""
    try:
        return [ExportedNorm(**entry) for entry in json.loads(model.metadata_props[METADATA_KEY])]
    except KeyError:
        raise ModelError("the model has no integer norms; make it with fxp-layernorm export") from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"the model's entry {METADATA_KEY} is damaged: {error}") from error


def _parse(form: Form | str, word: Word | str) -> tuple[Form, Word]:
    for kind, value in ((Form, form), (Word, word)):
        if value not in list(kind):
            raise ModelError(f"the {kind.__name__.lower()} is {value!r}; it must be one of {', '.join(kind)}")
    return Form(form), Word(word)


def _check_same(norm: Norm | None, entry: NormParams) -> None:
    if norm is None:
        raise ModelError(f"the model has no norm {entry.name!r}; the parameters belong to another model")
    if norm.layer is None:
        raise ModelError(f"the norm {entry.name!r} can't be replaced: {norm.blocker}")
    spec, layer = entry.spec, norm.layer
    same = (
        spec.kind is norm.kind
        and (spec.normalized_shape, spec.axes) == (layer.normalized_shape, layer.axes)
        and (spec.eps, spec.eps_outside) == (layer.eps, layer.eps_outside)
        and spec.gamma == tuple(layer.gamma.tolist())
        and spec.beta == tuple(layer.beta.tolist())
    )
    if not same:
        raise ModelError(f"the norm {entry.name!r} has another shape, eps, scale or bias than its parameters")


def _replace(
    model: ir.Model, norm: Norm, entry: NormParams, form: Form, word: Word, opset: int, taken: set[str]
) -> tuple[ExportedNorm, dict[str, ir.Function]]:
    """Replace one norm; returns where its codes are and the functions that it calls."""
    spec, graph = entry.spec, norm.nodes[-1].graph
    assert isinstance(graph, ir.Graph)
    old = norm.nodes[-1].outputs[0]
    x, border = input_value(norm), find_border(norm)
    border = border if border is not None and border.fits(spec) else None
    add = find_residual(norm) if spec.residual is not None and border is None else None
    if add is not None:
        x = add.addends[0]
    elif spec.residual is not None and border is None:
        raise ModelError(f"the parameters of the norm {norm.name!r} add a residual; the model has none before it")
    unused = [value for node in norm.nodes for value in node.inputs if value is not None and value is not x]
    tape = Tape()
    functions, stages = dict[str, ir.Function](), dict[str, ir.Value]()
    nodes: tuple[ir.Node, ...] = norm.nodes
    place, residual = norm.nodes[-1], None
    if form is Form.QDQ and border:
        if border.add is not None:
            raise ModelError(f"the norm {norm.name!r} is between quantizers already, with the residual add before it")
        codes_in, codes_out = border.codes, border.quantizers[0].outputs[0]
        results = {old: floating.norm(tape, spec, x, opset)}
    elif form is Form.QDQ:
        if spec.residual is not None:
            raise ModelError(f"the parameters of the norm {norm.name!r} add a residual, which the form qdq can't")
        codes_in, codes_out, y = floating.quantizers(tape, spec, x, opset, old.dtype)
        results = {old: y}
    else:
        residual = None if border is None else border.residual_codes
        codes_in = border.codes if border else quantize(tape, x, spec, spec.input, opset)
        if add is not None and spec.residual is not None:
            residual = quantize(tape, add.addends[1], spec, spec.residual, opset)
        codes_out, functions, stages = _append(
            tape, spec, codes_in, rank=len(x.shape) if x.shape is not None else None, form=form, word=word,
            name=norm.name, opset=opset, residual=residual,
        )  # fmt: skip
        if border:
            results = border.results(tape, codes_out, stages.get("w"))
            nodes, place = (*norm.nodes, *border.nodes), border.place(norm)
            unused += border.unused
        else:
            results = {old: dequantize(tape, codes_out, spec, spec.output, opset, old.dtype)}
        if add is not None:
            place = add.node
            nodes = nodes if add.shared and spec.sum_output is None else (*nodes, add.node)
            if spec.sum_output is not None:
                results[add.total] = dequantize(tape, stages["w"], spec, spec.sum_output, opset, add.total.dtype)
    codes_sum = stages.pop("w", None)
    roles = {codes_in: "codes_in", codes_out: "codes_out", **{value: letter for letter, value in stages.items()}}
    if codes_sum is not None:
        roles[codes_sum] = "codes_sum"
    if residual is not None:
        roles[residual] = "codes_residual"
    _name(tape, norm.name, taken, roles)
    codes = {codes_in: spec.input, codes_out: spec.output, residual: spec.residual, codes_sum: spec.sum_output}
    for value, params in codes.items():
        if value is not None and params is not None:
            value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(params.dtype.numpy)), x.shape
    for value in tape.initializers:
        graph.register_initializer(value)
    ir.convenience.replace_nodes_and_values(graph, place, nodes, tape.nodes, list(results), list(results.values()))
    _remove_unused(unused)
    exported = ExportedNorm(
        name=norm.name, input=None if border else x.name, codes_in=codes_in.name or "",
        codes_out=codes_out.name or "", output=None if border else results[old].name,
        stages={letter: value.name or "" for letter, value in stages.items()},
        residual=None if residual is None else residual.name,
        codes_sum=None if codes_sum is None else codes_sum.name,
    )  # fmt: skip
    return exported, functions


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


def _append(
    tape: Tape,
    spec: LayerNormSpec,
    q: ir.Value,
    *,
    rank: int | None,
    form: Form,
    word: Word,
    name: str,
    opset: int,
    residual: ir.Value | None,
    output: ir.DataType | None = None,
) -> tuple[ir.Value, dict[str, ir.Function], dict[str, ir.Value]]:
    """Append what `subgraph.append` does, between transpositions where the axes are not the last."""
    last = tuple(range(-len(spec.axes), 0))
    if spec.axes == last:
        return subgraph.append(
            tape, spec, q, rank=rank, form=form, word=word, name=name, opset=opset, residual=residual,
            output=output,
        )  # fmt: skip
    if rank is None:
        raise ModelError(f"the norm {name!r} can't be replaced: the rank of its input is not known")
    normalized = [axis + rank for axis in spec.axes]
    order = [axis for axis in range(rank) if axis not in normalized] + normalized
    rows, others = (
        None if value is None else tape.op("Transpose", [value], {"perm": order}) for value in (q, residual)
    )
    assert rows is not None
    rows.type = q.type
    y, functions, stages = subgraph.append(
        tape, dataclasses.replace(spec, axes=last), rows, rank=rank, form=form, word=word, name=name, opset=opset,
        residual=others, output=output,
    )  # fmt: skip
    back = {"perm": np.argsort(order).tolist()}
    if "w" in stages:
        stages = {**stages, "w": tape.op("Transpose", [stages["w"]], back)}
    return tape.op("Transpose", [y], back), functions, stages


def _shape(spec: LayerNormSpec, leading: Sequence[str | int]) -> list[str | int]:
    """Return the leading dimensions and the normalized ones in their places."""
    rank = len(leading) + len(spec.axes)
    if rank < -spec.axes[0]:
        raise ModelError(f"the axes {spec.axes} need at least {-spec.axes[0] - len(spec.axes)} leading dimensions")
    sizes: dict[int, int] = dict(zip(spec.axes, spec.normalized_shape, strict=True))
    others = iter(leading)
    return [sizes[axis] if axis in sizes else next(others) for axis in range(-rank, 0)]


def _name(tape: Tape, norm: str, taken: set[str], roles: dict[ir.Value, str]) -> None:
    """Give each new value and node a name of its own under the norm's name."""
    values = [(output, roles.get(output, node.op_type)) for node in tape.nodes for output in node.outputs]
    values += [(value, (value.name or "").rpartition("/")[2]) for value in tape.initializers]
    for value, role in values:
        value.name = unique_name(f"{norm}/{role}", taken)
    for node in tape.nodes:
        node.name = node.outputs[0].name


def _add_functions(model: ir.Model, functions: dict[str, ir.Function]) -> None:
    if functions:
        model.graph.opset_imports[subgraph.DOMAIN] = subgraph.DOMAIN_VERSION
    for function in functions.values():
        model.functions[function.identifier()] = function
