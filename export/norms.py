"""Reading a model and finding its norms."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnx_ir.passes.common

from ..errors import ModelError
from ..layer import LayerNorm, RMSNorm
from ..proof import NormKind
from .constants import constant
from .decomposed import Decomposed, find_decomposed

_KINDS = {
    "LayerNormalization": NormKind.LAYERNORM,
    "RMSNormalization": NormKind.RMSNORM,
    "SimplifiedLayerNormalization": NormKind.RMSNORM,  # ONNX Runtime's, which stands in ONNX's own domain
}

Model = str | PathLike[str] | onnx.ModelProto | ir.Model


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
    input: str
    output: str
    nodes: tuple[ir.Node, ...]
    layer: LayerNorm | RMSNorm | None
    blocker: str | None

    @property
    def n(self) -> int:
        """The number of elements that are normalized together, 0 where it is not known."""
        return math.prod(self.normalized_shape) if self.normalized_shape else 0


def load_model(model: Model) -> ir.Model:
    """Return a model as onnx_ir.Model, with its shapes inferred where they can be.

    Raises
    ------
    ModelError
        If the file can't be read or is no valid ONNX model.
    """
    if isinstance(model, ir.Model):
        return model
    name = "the model" if isinstance(model, onnx.ModelProto) else Path(model)
    try:
        loaded = ir.from_proto(model) if isinstance(model, onnx.ModelProto) else ir.load(model)
    except OSError as error:
        raise ModelError(f"{name} can't be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf and onnx_ir share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{name} is not a valid ONNX model: {reason}") from error
    if not loaded.graph.opset_imports or not len(loaded.graph):
        raise ModelError(f"{name} is not a valid ONNX model: it has no opset or no node; it may be cut short")
    logger = logging.getLogger("onnx_ir")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # shapes that can't be inferred are no news: a norm that needs them says so
    try:
        ir.passes.common.ShapeInferencePass()(loaded)
    finally:
        logger.setLevel(level)
    return loaded


def find_norms(model: ir.Model) -> list[Norm]:
    """Return the norms of a model's main graph, in its order.

    These are the nodes LayerNormalization (opset 17 and later), RMSNormalization (opset 23 and later) and ONNX
    Runtime's SimplifiedLayerNormalization, and what computes the same in elementary operators, whatever its spelling.
    """
    names = Counter(node.name for node in model.graph)
    fused = [node for node in model.graph if node.op_type in _KINDS and node.domain in ("", "ai.onnx")]
    norms = [_norm(node, _name(node, names)) for node in fused]
    norms += [_decomposed(region, _name(region.nodes[-1], names)) for region in find_decomposed(model.graph)]
    order = {node: index for index, node in enumerate(model.graph)}
    return sorted(norms, key=lambda norm: order[norm.nodes[-1]])


def _name(node: ir.Node, names: Counter[str | None]) -> str:
    return (node.name if node.name and names[node.name] == 1 else node.outputs[0].name) or ""


def _norm(node: ir.Node, name: str) -> Norm:
    if not node.inputs or node.inputs[0] is None:
        raise ModelError(f"the {node.op_type} node {name!r} has no input")
    x, output = node.inputs[0], node.outputs[0]
    kind = _KINDS[node.op_type]
    axis = node.attributes.get_int("axis", -1)
    epsilon = node.attributes.get_float("epsilon", 1e-5)
    optional = [*node.inputs[1:3], None, None][:2]
    gamma, beta = map(constant, optional)
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
        elif any(used.uses() or used.is_graph_output() for used in node.outputs[1:]):
            blocker = "its mean or inverse deviation is used"
        elif not shape:
            blocker = "the size of the normalized dimensions is not known"
        else:
            try:
                layer = _layer(kind, shape, epsilon, gamma, beta)
            except ValueError as error:  # an eps below 0, or shapes that don't go together
                blocker = str(error)
    return Norm(
        name=name, kind=kind, form=node.op_type, axes=axes, normalized_shape=shape, epsilon=epsilon,
        input=x.name or "", output=output.name or "", nodes=(node,), layer=layer, blocker=blocker,
    )  # fmt: skip


def _decomposed(region: Decomposed, name: str) -> Norm:
    blocker: str | None = None
    if region.axes != tuple(range(-len(region.axes), 0)):
        blocker = f"its axes {', '.join(map(str, region.axes))} are not the last"
    elif region.used_elsewhere is not None:
        blocker = f"its inner value {region.used_elsewhere!r} is used elsewhere"
    elif not region.shape:
        blocker = "the size of the normalized dimensions is not known"
    layer = None
    if blocker is None:
        gamma, beta = (parameter.reshape(region.shape) for parameter in (region.gamma, region.beta))
        layer = _layer(region.kind, region.shape, region.epsilon, gamma, beta)
    return Norm(
        name=name, kind=region.kind, form="decomposed", axes=region.axes, normalized_shape=region.shape,
        epsilon=region.epsilon, input=region.input.name or "", output=region.output.name or "", nodes=region.nodes,
        layer=layer, blocker=blocker,
    )  # fmt: skip


def _layer(
    kind: NormKind, shape: tuple[int, ...], epsilon: float, gamma: npt.NDArray[Any], beta: npt.NDArray[Any] | None
) -> LayerNorm | RMSNorm:
    layer = LayerNorm(shape, epsilon) if kind is NormKind.LAYERNORM else RMSNorm(shape, epsilon)
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
