"""Small models with norms, and feeds for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

N = 16
Dims = Sequence[str | int | None]


def model_with_norms(
    norms: int = 2,
    *,
    shape: Dims = ("batch", "tokens", N),
    axis: int = -1,
    parameters: tuple[int, ...] = (N,),
    opset: int = 17,
    ir_version: int = 8,
    dtype: int = TensorProto.FLOAT,
    tied: bool = False,
    named: bool = True,
    bias: bool = True,
    operator: str = "LayerNormalization",
) -> onnx.ModelProto:
    """Return a chain of residual blocks, ``h = norm(h - tanh(h * w))``, with outputs ``y`` and ``pooled``."""
    rng = np.random.default_rng(1)
    np_type = helper.tensor_dtype_to_np_dtype(dtype)
    initializers: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: npt.NDArray[Any]) -> str:
        if not any(known.name == name for known in initializers):
            initializers.append(numpy_helper.from_array(value.astype(np_type), name))
        return name

    current = "x"
    for index in range(norms):
        last = index == norms - 1
        own = 0 if tied else index
        weight = constant(f"w{index}", rng.normal(size=parameters))
        gamma = constant(f"gamma{own}", np.exp(0.3 * rng.normal(size=parameters)))
        inputs = [f"sum{index}", gamma]
        if bias:
            inputs.append(constant(f"beta{own}", 0.2 * rng.normal(size=parameters)))
        output = "y" if last else f"h{index}"
        nodes += [
            helper.make_node("Mul", [current, weight], [f"m{index}"], name=f"mul{index}"),
            helper.make_node("Tanh", [f"m{index}"], [f"t{index}"], name=f"tanh{index}"),
            helper.make_node("Sub", [current, f"t{index}"], [f"sum{index}"], name=f"sub{index}"),
            helper.make_node(
                operator,
                inputs,
                [output],
                name=f"norm{index}" if named else "",
                axis=axis,
                epsilon=1e-5,
            ),
        ]
        current = output
    nodes.append(helper.make_node("ReduceMean", ["y"], ["pooled"], name="pool", axes=[1] if opset < 18 else None))
    graph = helper.make_graph(
        nodes,
        "blocks",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, shape), helper.make_tensor_value_info("pooled", dtype, None)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    model.metadata_props.add(key="author", value="someone")
    return model


def feeds(count: int = 3, *, shape: Sequence[int] = (2, 5, N), dtype: str = "float32") -> list[dict[str, Any]]:
    """Return feeds of growing middle dimension, with an outlier channel."""
    rng = np.random.default_rng(2)
    result = []
    for index in range(count):
        dims = list(shape)
        dims[1] += index
        x = rng.normal(size=dims)
        x[..., 3] *= 12
        result.append({"x": x.astype(dtype)})
    return result


def run_onnxruntime(model: onnx.ModelProto, feed: dict[str, Any]) -> list[npt.NDArray[Any]]:
    """Return a model's outputs from ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def run_reference(model: onnx.ModelProto, feed: dict[str, Any]) -> list[npt.NDArray[Any]]:
    """Return a model's outputs from ONNX's reference implementation."""
    with np.errstate(over="ignore"):  # sums and products may wrap where only their difference counts
        return list(ReferenceEvaluator(model).run(None, feed))
