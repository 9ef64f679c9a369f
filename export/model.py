"""Replacing the float norms of a whole model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from ..errors import ModelError
from ..params import ModelParams, NormParams
from ..quantization import DType
from ..runtime import load_external_data
from . import fused, subgraph
from .loading import Model, load_model, restore
from .norms import Norm, find_norms
from .replacing import ExportedNorm, replace_norm
from .subgraph import Form, Word, Writing

#: The metadata entry in which an exported model says where its norms' codes are.
METADATA_KEY = "fxp_layernorm.norms"


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
    writing : Writing
        How they are written.
    """

    model: ir.Model
    norms: tuple[ExportedNorm, ...]
    left: dict[str, str]
    writing: Writing


def quantize_model(
    model: Model,
    params: ModelParams,
    form: Form | str | None = None,
    word: Word | str = Word.INT64,
    *,
    io: DType | str | None = None,
    opset: int | None = None,
) -> onnx.ModelProto:
    """Return a copy of a model with its norms replaced by integer ones, its external data brought into it.

    Each norm becomes: quantize with the spec's input scales, the integer subgraph, dequantize with the output scales.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model
    params : ModelParams
        For the norms to replace, by name; others stay as they are.
    form : Form, optional
        As in `to_onnx`, or ``qdq``. By default ``function``, or ``inline`` where the model's IR version has no
        functions.
    word, io
        As in `to_onnx`; where the model has codes of its own, these keep their type.
    opset : int, optional
        Raise the model to this opset first, and its IR version to the opset's; by default both are kept.

    Raises
    ------
    ModelError
        If the model can't be read, lacks a norm of `params`, or one of them has other weights than its spec.
    """
    replaced = replace_norms(model, params, form, word, io=io, opset=opset).model
    load_external_data(replaced)
    return ir.to_proto(replaced)


def replace_norms(
    model: Model,
    params: ModelParams,
    form: Form | str | None = None,
    word: Word | str = Word.INT64,
    *,
    io: DType | str | None = None,
    opset: int | None = None,
) -> Replacement:
    """Return what `quantize_model` returns, with its external data left outside, and what was done."""
    Writing.of(Form.FUNCTION if form is None else form, word, 0, io)  # before the model is read
    graph_model = load_model(model, opset=opset).clone()
    has_functions = graph_model.ir_version >= subgraph.IR_VERSION
    if form is None:
        form = Form.FUNCTION if has_functions else Form.INLINE
    writing = Writing.of(form, word, graph_model.graph.opset_imports.get("", 0), io)
    if writing.form is Form.FUNCTION and not has_functions:
        raise ModelError(
            f"the form function needs IR version {subgraph.IR_VERSION}; the model has {graph_model.ir_version}. Leave "
            f"the form out, or raise the model with --opset {max(writing.opset, subgraph.FUNCTION_OPSET)}"
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
            norm = dataclasses.replace(norm, nodes=(fused.split(norm.nodes[0], writing.opset),))
        where, needed = replace_norm(norm, entry, writing, taken)
        exported.append(where)
        functions.update(needed)
    restore(graph_model, [norm.input for norm in exported])
    subgraph.add_functions(graph_model, functions)
    graph_model.metadata_props[METADATA_KEY] = json.dumps([vars(norm) for norm in exported])
    names = {norm.name for norm in exported}
    left = {name: norm.blocker or "there are no parameters for it" for name, norm in norms.items() if name not in names}
    return Replacement(graph_model, tuple(exported), left, writing)


def exported_norms(model: ir.Model) -> list[ExportedNorm]:
    """Return where the codes of an exported model's norms are; raises ModelError for any other model."""
    try:
        return [ExportedNorm(**entry) for entry in json.loads(model.metadata_props[METADATA_KEY])]
    except KeyError:
        raise ModelError("the model has no integer norms; make it with fxp-layernorm export") from None
    except (ValueError, TypeError) as error:
        raise ModelError(f"the model's entry {METADATA_KEY} is damaged: {error}") from error


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
