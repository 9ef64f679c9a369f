"""Reading a model, and bringing its norms to where they can be observed and replaced.

A function that holds a norm is inlined, as each of its calls has parameters and activations of its own; values of
sibling bodies that share a name get names of their own; and ONNX Runtime's nodes that add and normalize in one show
their sum. What has no norm stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Set
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from ..errors import ModelError
from . import fused, versions
from .decomposed import ROOTS
from .names import unique_name
from .norms import find_norms
from .shapes import infer_shapes
from .subgraph import DOMAIN

Model = str | PathLike[str] | onnx.ModelProto | ir.Model

#: Marks in the nodes' meta: the function that a node comes from, and that it brings a value into a body.
_FUNCTION, _INSIDE = "fxp_layernorm.function", "fxp_layernorm.inside"
_Identifier = tuple[str, str, str]


def load_model(model: Model, *, opset: int | None = None) -> ir.Model:
    """Return a model as onnx_ir.Model, prepared for `find_norms`, with its shapes inferred where they can be.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model
        An onnx_ir.Model must be the result of an earlier call, and is returned as it is, unless its opset is raised.
    opset : int, optional
        Raise the model to this opset.

    Raises
    ------
    ModelError
        If the file can't be read, is no valid ONNX model, or its opset can't be raised.
    """
    if isinstance(model, ir.Model) and opset is None:
        return model
    name = Path(model) if isinstance(model, str | PathLike) else "the model"
    try:
        loaded = _read(model)
    except OSError as error:
        raise ModelError(f"{name} can't be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf and onnx_ir share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name} is not a valid ONNX model: {reason}") from error
    if not loaded.graph.opset_imports or not len(loaded.graph):
        raise ModelError(f"{name} is not a valid ONNX model: it has no opset or no node; it may be cut short")
    if opset is not None:
        loaded = versions.raised(loaded, opset)
    with _silent():
        _inline_functions_of_norms(loaded)
        _separate_names(loaded)
        infer_shapes(loaded)
    taken = set(ir.convenience.create_value_mapping(loaded.graph))
    for node in loaded.graph.all_nodes():
        fused.show_sum(node, taken)
    _bring_inputs_inside(loaded, taken)
    return loaded


def _read(model: Model) -> ir.Model:
    if isinstance(model, ir.Model):
        restored = model.clone()
        restore(restored, ())
        return restored
    return ir.from_proto(model) if isinstance(model, onnx.ModelProto) else ir.load(model)


def _inline_functions_of_norms(model: ir.Model) -> None:
    """Inline the functions that hold a norm, found in a trial with all of those that could."""
    candidates = _callers(model, {key for key, function in model.functions.items() if _may_hold_norm(function)})
    if not candidates:
        return
    trial = model.clone()
    for key, function in trial.functions.items():
        for node in function.all_nodes():
            node.meta[_FUNCTION] = key
    if not _inline(trial, candidates):
        return
    infer_shapes(trial)
    nodes = (node for norm in find_norms(trial) for node in norm.nodes)
    _inline(model, _callers(model, {node.meta[_FUNCTION] for node in nodes if _FUNCTION in node.meta}))


def _may_hold_norm(function: ir.Function) -> bool:
    return function.domain != DOMAIN and any(
        node.op_type in ROOTS or fused.kind(node) is not None for node in function.all_nodes()
    )


def _callers(model: ir.Model, functions: Set[_Identifier]) -> set[_Identifier]:
    """Return functions with all that call them, directly or not."""
    found = set(functions)
    calls = {key: {node.op_identifier() for node in function.all_nodes()} for key, function in model.functions.items()}
    while True:
        more = {key for key, called in calls.items() if called & found} - found
        if not more:
            return found
        found |= more


def _inline(model: ir.Model, functions: Set[_Identifier]) -> bool:
    """Inline functions, where their opsets allow it; tells whether they do."""
    same = all(
        model.opset_imports.get(domain, version) == version
        for key in functions
        for domain, version in model.functions[key].opset_imports.items()
    )
    if not same:
        return False
    ir.passes.common.InlinePass(lambda function: function.identifier() in functions)(model)
    used = {node.domain for node in model.graph.all_nodes()} | {domain for domain, *_ in model.functions}
    for domain in {domain for domain, *_ in functions} - used:
        model.graph.opset_imports.pop(domain, None)
    return True


def _separate_names(model: ir.Model) -> None:
    """Give values of bodies names that no other value of the model has."""
    bodies = list(model.graph.subgraphs())
    if not bodies:
        return
    taken = set(ir.convenience.create_value_mapping(model.graph, include_subgraphs=False))
    for body in bodies:
        outputs = (value for node in body for value in node.outputs)
        for value in [*body.inputs, *body.initializers.values(), *outputs]:
            if value.name:
                value.name = unique_name(value.name, taken)


def _bring_inputs_inside(model: ir.Model, taken: set[str]) -> None:
    """Let norms of bodies read a value from outside through an Identity, so that it is seen when they run."""
    if not any(model.graph.subgraphs()):
        return
    for norm in find_norms(model):
        graph = norm.nodes[0].graph
        x = next((value for node in norm.nodes for value in node.inputs if value and value.name == norm.input), None)
        if x is None or graph is model.graph or not isinstance(graph, ir.Graph) or x.graph is graph:
            continue
        inside = ir.node("Identity", [x], name=unique_name(f"{norm.name}/input", taken))
        inside.meta[_INSIDE] = True
        value = inside.outputs[0]
        value.name, value.type, value.shape = inside.name, x.type, x.shape
        graph.insert_before(graph[0], inside)
        for user, index in list(x.uses()):
            if user.graph is graph and user is not inside:
                user.replace_input_with(index, value)


def restore(model: ir.Model, inputs: Container[str | None]) -> None:
    """Undo what `load_model` prepared, but for the replaced norms' inputs."""
    for node in list(model.graph.all_nodes()):
        fused.hide_sum(node)
        if _INSIDE in node.meta and node.outputs[0].name not in inputs and node.inputs[0] is not None:
            ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
            if isinstance(node.graph, ir.Graph):
                node.graph.remove(node, safe=True)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep onnx_ir from logging: shapes that can't be inferred are no news, as a norm that needs them says so."""
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
