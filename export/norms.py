"""Finding the norms of a model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError
from ..exposure import CONTROL_FLOW
from ..layer import LayerNorm, RMSNorm
from ..proof import NormKind
from . import fused
from .constants import QUANTIZE, constant, is_quantizer, quantizes
from .decomposed import OPERATORS, Decomposed, find_decomposed
from .evaluation import Evaluator


@dataclass(frozen=True)
class Norm:
    """A norm of a model.

    Attributes
    ----------
    name : str
        The node's name, or that of its output where nodes share a name or have none; of several nodes, the last one's.
    kind : NormKind
    form : str
        How it is written: the operator's name, or ``decomposed``.
    axes : tuple of int
        The normalized axes, counted from the end.
    normalized_shape : tuple of int
        Their sizes; empty where they are not known.
    epsilon : float
    eps_outside : bool
        Whether epsilon is added to the deviation instead of the variance.
    input, output : str
        The names of the tensors that it reads and writes.
    nodes : tuple of onnx_ir.Node
        What computes it and can be replaced; the last one writes the output.
    layer : LayerNorm, RMSNorm or None
        The float layer, where the norm can be replaced.
    blocker : str or None
        Why it can't be replaced.
    """

    name: str
    kind: NormKind
    form: str
    axes: tuple[int, ...]
    normalized_shape: tuple[int, ...]
    epsilon: float
    eps_outside: bool
    input: str
    output: str
    nodes: tuple[ir.Node, ...]
    layer: LayerNorm | RMSNorm | None
    blocker: str | None

    @property
    def n(self) -> int:
        """The number of elements that are normalized together, 0 where it is not known."""
        return math.prod(self.normalized_shape) if self.normalized_shape else 0


def find_norms(model: ir.Model) -> list[Norm]:
    """Return the norms of a model that `load_model` read, in its order, those of its graph's bodies among them.

    These are the nodes LayerNormalization (opset 17 and later), RMSNormalization (opset 23 and later) and ONNX
    Runtime's SimplifiedLayerNormalization, SkipLayerNormalization, SkipSimplifiedLayerNormalization and
    EmbedLayerNormalization, and what computes the same in elementary operators, whatever its spelling. Functions that
    hold norms and could not be inlined are searched for nodes. Norms whose inner values are quantized are listed, too.
    """
    opset = model.opset_imports.get("", 0)
    found: list[Norm] = []
    names = Counter(node.name for node in model.graph.all_nodes())
    for graph, evaluator, around in _scopes(model.graph, Evaluator(model.graph, OPERATORS, opset), ()):
        inner = _unobservable(around)
        fused_nodes = [node for node in graph if fused.kind(node) is not None]
        norms = [_norm(node, _name(node, names), evaluator) for node in fused_nodes]
        norms += [_decomposed(region, _name(region.nodes[-1], names)) for region in find_decomposed(graph, evaluator)]
        found += norms if inner is None else [replace(norm, layer=None, blocker=inner) for norm in norms]
    if any(map(quantizes, model.graph.all_nodes())):
        known = {node for norm in found for node in norm.nodes}
        for graph, evaluator, _ in _scopes(model.graph, Evaluator(model.graph, OPERATORS, opset, through=True), ()):
            regions = find_decomposed(graph, evaluator, known)
            found += [norm for region in regions if (norm := _cut(region, _name(region.nodes[-1], names))) is not None]
    order = {node: index for index, node in enumerate(model.graph.all_nodes())}
    found.sort(key=lambda norm: order[norm.nodes[-1]])
    for function in model.functions.values():
        reason = f"it is in the function {function.name!r}, which has another opset than the model and can't be inlined"
        for node in function.all_nodes():
            if fused.kind(node) is not None:
                norm = _norm(node, f"{function.name}/{node.name or node.outputs[0].name}")
                found.append(replace(norm, layer=None, blocker=reason))
    return found


def _scopes(
    graph: ir.Graph, evaluator: Evaluator, around: tuple[ir.Node, ...]
) -> Iterator[tuple[ir.Graph, Evaluator, tuple[ir.Node, ...]]]:
    """Yield a graph and all bodies in it, with the nodes around them."""
    yield graph, evaluator, around
    for node in graph:
        for attribute in node.attributes.values():
            bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else []
            bodies += attribute.as_graphs() if attribute.type == ir.AttributeType.GRAPHS else []
            for body in bodies:
                yield from _scopes(body, evaluator.within(body), (*around, node))


def _unobservable(around: tuple[ir.Node, ...]) -> str | None:
    """Tell why the values of a body can't be observed."""
    for node in around:
        if node.op_type not in CONTROL_FLOW or node.domain not in ("", "ai.onnx"):
            return f"it is in a body of a {node.op_type} node, whose values can't be observed"
    return None


def _name(node: ir.Node, names: Counter[str | None]) -> str:
    return (node.name if node.name and names[node.name] == 1 else node.outputs[0].name) or ""


def _norm(node: ir.Node, name: str, evaluator: Evaluator | None = None) -> Norm:
    x, output, kind = fused.value(node), node.outputs[0], fused.kind(node)
    if x is None:
        raise ModelError(f"the {node.op_type} node {name!r} has no input")
    assert kind is not None
    axis = node.attributes.get_int("axis", -1)
    epsilon = node.attributes.get_float("epsilon", 1e-12 if fused.adds(node) else 1e-5)
    optional = fused.parameters(node)
    gamma, beta = (_parameter(value, evaluator) for value in optional)
    rank = len(x.shape) if x.shape is not None else None
    layer: LayerNorm | RMSNorm | None = None
    blocker: str | None = None
    shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    if axis >= 0 and rank is None:
        blocker = f"the rank of {x.name!r} is not known, and the axis {axis} is counted from the front"
    else:
        axes = tuple(range(axis - (rank or 0) if axis >= 0 else axis, 0))
        shape = _trailing_shape(x, len(axes), gamma)
        if gamma is None or (optional[1] is not None and beta is None):
            blocker = "its scale or bias is computed by the model"
        elif (reason := fused.blocker(node)) is not None:
            blocker = reason
        elif not shape:
            blocker = "the size of the normalized dimensions is not known"
        else:
            try:
                layer = _layer(kind, shape, epsilon, gamma, beta)
            except ValueError as error:  # an eps below 0, or shapes that don't go together
                blocker = str(error)
    return Norm(
        name=name, kind=kind, form=node.op_type, axes=axes, normalized_shape=shape, epsilon=epsilon, eps_outside=False,
        input=x.name or "", output=output.name or "", nodes=(node,), layer=layer, blocker=blocker,
    )  # fmt: skip


def _parameter(value: ir.Value | None, evaluator: Evaluator | None) -> npt.NDArray[Any] | None:
    """Return a scale or bias, also where nodes compute it of constants."""
    if value is None or evaluator is None or value not in evaluator.constants:
        return constant(value)
    return evaluator.rounded(value)


def _decomposed(region: Decomposed, name: str) -> Norm:
    blocker = region.blocker
    if blocker is None and not region.shape:
        blocker = "the size of the normalized dimensions is not known"
    layer = None
    if blocker is None:
        gamma, beta = (parameter.reshape(region.shape) for parameter in (region.gamma, region.beta))
        layer = _layer(
            region.kind, region.shape, region.epsilon, gamma, beta, axes=region.axes, eps_outside=region.eps_outside
        )
    return Norm(
        name=name, kind=region.kind, form="decomposed", axes=region.axes, normalized_shape=region.shape,
        epsilon=region.epsilon, eps_outside=region.eps_outside, input=region.input.name or "",
        output=region.output.name or "", nodes=region.nodes, layer=layer, blocker=blocker,
    )  # fmt: skip


def _cut(region: Decomposed, name: str) -> Norm | None:
    """Return a norm whose inner values are quantized, None where they are not."""
    rounded = [node.outputs[0].name for node in region.nodes if is_quantizer(node, QUANTIZE)]
    if not rounded:
        return None
    more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
    blocker = (
        f"its inner values are quantized ({rounded[0]}{more}); quantize the float model again without this norm's "
        "nodes (nodes_to_exclude of ONNX Runtime's quantize_static), which inspect --json lists"
    )
    return replace(_decomposed(region, name), layer=None, blocker=blocker)


def _layer(
    kind: NormKind,
    shape: tuple[int, ...],
    epsilon: float,
    gamma: npt.NDArray[Any],
    beta: npt.NDArray[Any] | None,
    *,
    axes: tuple[int, ...] | None = None,
    eps_outside: bool = False,
) -> LayerNorm | RMSNorm:
    make = LayerNorm if kind is NormKind.LAYERNORM else RMSNorm
    layer = make(shape, epsilon, eps_outside=eps_outside, axes=axes)
    layer.weight = _shaped(gamma, shape)
    if isinstance(layer, LayerNorm):
        layer.bias = None if beta is None else _shaped(beta, shape)
    return layer


def _shaped(parameter: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    return np.broadcast_to(parameter, shape).astype(np.float64)


def _trailing_shape(x: ir.Value, dims: int, gamma: npt.NDArray[Any] | None) -> tuple[int, ...]:
    """Return the sizes of the last dimensions, by the input's shape or else by a gamma without broadcasting."""
    if x.shape is not None and all(isinstance(size, int) for size in x.shape[-dims:]):
        return tuple(int(size) for size in x.shape[-dims:])  # type: ignore[arg-type]
    return gamma.shape if gamma is not None and gamma.ndim == dims and gamma.size > 1 else ()
