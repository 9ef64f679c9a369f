"""ONNX Runtime's nodes that add before they normalize: split into the sum and the integer norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import run_onnxruntime

from fxp_layernorm import export
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.runtime import Feeds

N = 16
RNG = np.random.default_rng(21)
PARAMETERS = {
    "gamma": np.exp(0.3 * RNG.normal(size=N)), "beta": 0.2 * RNG.normal(size=N), "bias": RNG.normal(size=N),
    "words": RNG.normal(size=(20, N)), "positions": RNG.normal(size=(8, N)), "segments": RNG.normal(size=(2, N)),
}  # fmt: skip
SHAPE = ["batch", "tokens", N]


def model_of(node: onnx.NodeProto, inputs: dict[str, Any], outputs: dict[str, Any], opset: int = 14) -> Any:
    """Return a model with a node; inputs and outputs are given as type and shape."""
    node.domain = "com.microsoft"
    graph = helper.make_graph(
        [node, helper.make_node("Tanh", ["n"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, *described) for name, described in inputs.items()],
        [helper.make_tensor_value_info(name, *described) for name, described in outputs.items()],
        [
            numpy_helper.from_array(value.astype(np.float32), name)
            for name, value in PARAMETERS.items()
            if name in node.input
        ],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def skip_model(operator: str, inputs: list[str], outputs: list[str], *, skip_shape: Any = None, **more: Any) -> Any:
    float_ = TensorProto.FLOAT
    found: dict[str, Any] = {"y": (float_, SHAPE)}
    node = helper.make_node(operator, inputs, outputs, name="norm", epsilon=1e-5)
    found.update({name: (float_, SHAPE if name == "total" else None) for name in outputs[1:] if name})
    return model_of(node, {"x": (float_, SHAPE), "skip": (float_, skip_shape or SHAPE)}, found, **more)


def skip_feeds(skip_shape: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
    rng = np.random.default_rng(22)
    x = rng.normal(size=(2, 3, N)).astype(np.float32)
    return [{"x": x, "skip": rng.normal(size=skip_shape or x.shape).astype(np.float32)}]


def check(model: onnx.ModelProto, feeds: list[dict[str, Any]]) -> onnx.ModelProto:
    params = calibrate_model(model, Feeds(feeds), "int16", "int16")
    assert len(params.norms) == 1
    exported = export.quantize_model(model, params, form="inline")
    result = export.verify(model, exported, params, Feeds(feeds))
    assert result.exact
    assert all(output.cosine > 0.9999 for output in result.outputs)
    assert not [node for node in exported.graph.node if node.domain]
    return exported


SKIPS = {
    "LayerNorm": ("SkipLayerNormalization", ["x", "skip", "gamma", "beta"], ["n"]),
    "without beta": ("SkipLayerNormalization", ["x", "skip", "gamma"], ["n"]),
    "with a bias": ("SkipLayerNormalization", ["x", "skip", "gamma", "beta", "bias"], ["n"]),
    "bias without beta": ("SkipLayerNormalization", ["x", "skip", "gamma", "", "bias"], ["n"]),
    "with its sum": ("SkipLayerNormalization", ["x", "skip", "gamma", "beta"], ["n", "", "", "total"]),
    "RMSNorm": ("SkipSimplifiedLayerNormalization", ["x", "skip", "gamma"], ["n"]),
    "RMSNorm with a bias and its sum": (
        "SkipSimplifiedLayerNormalization", ["x", "skip", "gamma", "bias"], ["n", "", "", "total"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SKIPS)
def test_skip(case: str) -> None:
    operator, inputs, outputs = SKIPS[case]
    model = skip_model(operator, inputs, outputs)
    (norm,) = export.find_norms(export.load_model(model))
    assert (norm.form, norm.name, norm.axes, norm.normalized_shape, norm.blocker) == (
        operator, "norm", (-1,), (N,), None,
    )  # fmt: skip
    assert norm.epsilon == float(np.float32(1e-5))
    exported = check(model, skip_feeds())
    adds = [node for node in exported.graph.node if node.op_type == "Add" and node.output[0] == norm.input]
    assert len(adds) == 1


@pytest.mark.parametrize("shape", [(1, 3, N), (3, N)])
def test_skip_that_is_broadcast(shape: tuple[int, ...]) -> None:
    operator, inputs, outputs = SKIPS["LayerNorm"]
    check(skip_model(operator, inputs, outputs, skip_shape=shape), skip_feeds(shape))


def test_epsilon_by_default() -> None:
    model = skip_model(*SKIPS["LayerNorm"])
    del model.graph.node[0].attribute[:]
    assert export.find_norms(export.load_model(model))[0].epsilon == 1e-12


def test_statistics_that_are_used() -> None:
    model = skip_model("SkipLayerNormalization", ["x", "skip", "gamma"], ["n", "mean"])
    (norm,) = export.find_norms(export.load_model(model))
    assert norm.blocker == "its mean or inverse deviation is used"


def test_norms_that_stay_are_left_as_they_are() -> None:
    model = skip_model(*SKIPS["LayerNorm"])
    second = helper.make_node("SkipLayerNormalization", ["x", "n", "gamma"], ["n2"], "norm2", domain="com.microsoft")
    model.graph.node.insert(1, second)
    model.graph.node[2].input[0] = "n2"
    params = calibrate_model(model, Feeds(skip_feeds()))
    some = export.quantize_model(model, dataclasses.replace(params, norms=params.norms[:1]))
    assert [node for node in some.graph.node if node.domain == "com.microsoft"] == [second]


def embed_model(inputs: list[str], outputs: list[str], opset: int = 14) -> Any:
    integer, ids = TensorProto.INT32, ["batch", "tokens"]
    node = helper.make_node(
        "EmbedLayerNormalization", inputs, outputs, name="norm", mask_index_type=int("mask" in inputs)
    )
    described: dict[str, Any] = {
        name: (integer, ids) for name in ("ids", "segment_ids", "mask", "where") if name in inputs
    }
    found: dict[str, Any] = {"y": (TensorProto.FLOAT, SHAPE)}
    if "mask_index" in outputs:
        found["mask_index"] = (integer, ["batch"])
    if "total" in outputs:
        found["total"] = (TensorProto.FLOAT, SHAPE)
    return model_of(node, described, found, opset)


EMBEDDINGS = {
    "words and positions": (["ids", "", "words", "positions", "", "gamma", "beta"], ["n"]),
    "with segments": (["ids", "segment_ids", "words", "positions", "segments", "gamma", "beta"], ["n"]),
    "with places": (["ids", "", "words", "positions", "", "gamma", "beta", "", "where"], ["n"]),
    "with a mask": (["ids", "", "words", "positions", "", "gamma", "beta", "mask"], ["n", "mask_index"]),
    "with its sum": (["ids", "", "words", "positions", "", "gamma", "beta"], ["n", "", "total"]),
}


@pytest.mark.parametrize("opset", [12, 17])
@pytest.mark.parametrize("case", EMBEDDINGS)
def test_embeddings(case: str, opset: int) -> None:
    rng = np.random.default_rng(23)
    model = embed_model(*EMBEDDINGS[case], opset=opset)
    (norm,) = export.find_norms(export.load_model(model))
    assert (norm.form, norm.normalized_shape, norm.epsilon, norm.blocker) == (
        "EmbedLayerNormalization", (N,), 1e-12, None,
    )  # fmt: skip
    arrays = {
        "ids": rng.integers(20, size=(2, 5)), "segment_ids": rng.integers(2, size=(2, 5)),
        "mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]), "where": rng.integers(8, size=(2, 5)),
    }  # fmt: skip
    feed = {value.name: arrays[value.name].astype(np.int32) for value in model.graph.input}
    exported = check(model, [feed])
    names = [value.name for value in model.graph.output]
    if "mask_index" in names:
        place = names.index("mask_index")
        np.testing.assert_array_equal(run_onnxruntime(exported, feed)[place], [3, 5])


def test_mask_index_without_a_mask() -> None:
    model = embed_model(["ids", "", "words", "positions", "", "gamma", "beta"], ["n", "mask_index"])
    (norm,) = export.find_norms(export.load_model(model))
    assert norm.blocker == "its mask index is used, and it has no mask"
