"""Showing what is inside an exported model's norms: their codes and their stages, as outputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from ..exposure import expose
from ..runtime import load_external_data
from .diagnosis import LETTER
from .loading import Model, load_model
from .model import exported_norms
from .replacing import ExportedNorm
from .writing import save_model

#: What may stand between a function's output and the norm's codes: axes that are not the last, codes in another type.
_BEHIND = ("Transpose", "Cast")


def with_stages(model: ir.Model, places: list[ExportedNorm]) -> tuple[ir.Model, list[dict[str, str]]]:
    """Return a copy of a model whose norms' stages have names in its graph, and these names for each norm.

    In the function form the functions are given further outputs for that.
    """
    model = model.clone()
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=True)
    names: list[dict[str, str]] = []
    for place in places:
        node = values[place.codes_out].producer() if place.codes_out in values else None
        while node is not None and node.op_type in _BEHIND and node.inputs[0] is not None:
            node = node.inputs[0].producer()
        function = None if node is None else model.functions.get(node.op_identifier())
        if function is None:
            names.append({letter: name for letter, name in place.stages.items() if name in values})
            continue
        stages = [value for inner in function for value in inner.outputs if LETTER.fullmatch(value.name or "")]
        stages = [value for value in stages if value not in function.outputs[:1]]
        if len(function.outputs) == 1:
            function.outputs.extend(stages)
        assert node is not None
        node.resize_outputs(1 + len(stages))
        own: dict[str, str] = {}
        for value, stage in zip(node.outputs[1:], stages, strict=True):
            letter = stage.name or ""
            own[letter] = value.name = _free(f"{place.name}/{letter}", values)
            values[value.name] = value
        names.append(own)
    return model, names


def _free(name: str, taken: Mapping[str, ir.Value]) -> str:
    while name in taken:
        name += "_"
    return name


def compared_values(places: list[ExportedNorm]) -> list[tuple[str, str]]:
    """Return the names of the values that are compared in every run, each with that of its norm."""
    return [
        (value, place.name)
        for place in places
        for side in place.sides
        for value in (side.codes, side.real)
        if value is not None
    ]


def probe(exported: Model) -> onnx.ModelProto:
    """Return an exported model with the norms' codes and stages as further outputs, its external data brought into it.

    Run elsewhere, it gives what `Verifier` takes as results.

    Raises
    ------
    ModelError
        If the model can't be read, or has no integer norms.
    """
    staged = _staged(load_model(exported))
    load_external_data(staged)
    return ir.to_proto(staged)


def export_probe(exported: Model, out: str | Path) -> None:
    """Write what `probe` returns to a file that appears whole or not at all; external data are copied beside it."""
    save_model(_staged(load_model(exported)), out)


def _staged(model: ir.Model) -> ir.Model:
    places = exported_norms(model)
    staged, stages = with_stages(model, places)
    proto = ir.to_proto(staged)
    names = [name for name, _ in compared_values(places)] + [name for own in stages for name in own.values()]
    expose(proto, dict.fromkeys(names, ()))
    shown = ir.from_proto(onnx.shape_inference.infer_shapes(proto))  # outputs must have types
    held = {value.name: value.const_value for graph in staged.graphs() for value in graph.initializers.values()}
    for graph in shown.graphs():
        for value in graph.initializers.values():
            value.const_value = held.get(value.name, value.const_value)  # external data know their folder
    return shown
