"""Norms in whole models: found, replaced, and exact to the last bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import N, feeds, model_with_norms, run_onnxruntime, run_reference

import fxp_layernorm as fxp
from fxp_layernorm import DataError, FxpLayerNorm, ModelError, QuantParams, export
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.params import ModelParams
from fxp_layernorm.runtime import Feeds

FORMS = pytest.mark.parametrize("form", ["inline", "function"])

#: What differs between models: the builder's options, and those of the feeds.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "last axis": ({}, {}),
    "positive axis": ({"axis": 2}, {}),
    "two axes": ({"shape": ("batch", 5, N), "axis": 1, "parameters": (5, N)}, {"shape": (2, 5, N), "count": 1}),
    "all axes": ({"shape": (3, N), "axis": 0, "parameters": (3, N)}, {"shape": (3, N), "count": 1}),
    "no bias": ({"bias": False}, {}),
    "tied weights": ({"tied": True}, {}),
    "no names": ({"named": False}, {}),
    "float16": ({"dtype": TensorProto.FLOAT16}, {"dtype": "float16"}),
    "RMSNormalization": ({"operator": "RMSNormalization", "bias": False, "opset": 23, "ir_version": 10}, {}),
    "opset 21": ({"opset": 21, "ir_version": 10}, {}),
    "four dimensions": ({"shape": ("a", "b", "c", N)}, {"shape": (2, 3, 2, N)}),
}


def replaced(
    model: onnx.ModelProto, data: list[dict[str, Any]], form: str = "inline", **options: Any
) -> tuple[onnx.ModelProto, ModelParams]:
    params = calibrate_model(model, Feeds(data), **options)
    return export.quantize_model(model, params, form=form), params


@pytest.mark.parametrize("case", MODELS)
@FORMS
def test_replaced_norms_are_exact(case: str, form: str) -> None:
    options, feed_options = MODELS[case]
    if "operator" in options:
        pytest.importorskip("onnxruntime", "1.24", reason="the float operator came late to ONNX Runtime")
    model, data = model_with_norms(**options), feeds(**feed_options)
    exported, params = replaced(model, data, form)
    assert len(params.norms) == 2
    result = export.verify(model, exported, params, Feeds(data))
    assert result.exact
    assert result.mismatches == 0
    assert result.norms[0].border_mismatches == 0
    assert result.codes == sum(2 * feed["x"].size for feed in data)
    assert all(check.cosine > 0.999 for check in result.outputs)
    onnx.checker.check_model(exported, full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("types", [("int4", "int4"), ("uint6", "int2"), ("int12", "uint10"), ("int9", "int16")])
def test_codes_narrower_than_their_array(types: tuple[str, str]) -> None:
    """They are clipped to their own range at the border; being few, they leave many bits behind the point."""
    model, data = model_with_norms(opset=21, ir_version=10), feeds()
    data[0]["x"] *= 3  # beyond what is calibrated
    exported, params = replaced(model, data[1:], input=types[0], output=types[1], method="minmax")
    assert export.verify(model, exported, params, Feeds(data)).exact


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("types", [("int16", "uint16"), ("uint8", "int16"), ("int16", "int8")])
def test_types_of_the_border(opset: int, types: tuple[str, str]) -> None:
    """16-bit QuantizeLinear came with opset 21; below it the border is spelled out, with the same codes."""
    model, data = model_with_norms(opset=opset, ir_version=10), feeds()
    exported, params = replaced(model, data, input=types[0], output=types[1], symmetric=True)
    assert export.verify(model, exported, params, Feeds(data)).exact
    operators = {node.op_type for node in exported.graph.node}
    assert ("QuantizeLinear" in operators) == (opset == 21 or types[0] == "uint8")


@FORMS
def test_onnx_reference_gives_the_same_outputs(form: str) -> None:
    model, data = model_with_norms(1), feeds(1)
    exported, params = replaced(model, data, form)
    place = export.exported_norms(export.load_model(exported))[0]
    for name, dtype in ((place.codes_in, TensorProto.INT8), (place.codes_out, TensorProto.INT8)):
        exported.graph.output.append(helper.make_tensor_value_info(name, dtype, None))
    *_, codes_in, codes_out = run_reference(exported, data[0])
    np.testing.assert_array_equal(FxpLayerNorm(params.norms[0].spec)(codes_in), codes_out)


def test_rest_of_the_model_is_left_alone() -> None:
    model = model_with_norms(3, tied=True)
    params = calibrate_model(model, Feeds(feeds()))
    some = dataclasses.replace(params, norms=params.norms[:2])
    exported = export.quantize_model(model, some, form="inline")
    kept = [node for node in exported.graph.node if node.op_type == "LayerNormalization"]
    assert [node.name for node in kept] == ["norm2"]
    old = {tensor.name: tensor for tensor in model.graph.initializer}
    new = {tensor.name: tensor for tensor in exported.graph.initializer}
    for name in kept[0].input[1:]:
        np.testing.assert_array_equal(numpy_helper.to_array(new[name]), numpy_helper.to_array(old[name]))
    assert exported.opset_import[0].version == 17
    assert exported.ir_version == model.ir_version
    assert {entry.key: entry.value for entry in exported.metadata_props}["author"] == "someone"
    assert exported.graph.input == model.graph.input
    assert [value.name for value in exported.graph.output] == ["y", "pooled"]
    dims = exported.graph.output[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", "tokens", N]


@FORMS
def test_every_initializer_that_is_left_is_used(form: str) -> None:
    model = model_with_norms(3, tied=True)
    exported, _ = replaced(model, feeds(), form)
    used = {name for node in exported.graph.node for name in node.input}
    assert {tensor.name for tensor in exported.graph.initializer} <= used
    assert not any(tensor.name.startswith(("gamma", "beta")) for tensor in exported.graph.initializer)


@FORMS
def test_names_are_unique(form: str) -> None:
    model = model_with_norms()
    model.graph.node[2].name = "norm0/codes_out"
    model.graph.node[0].output[0] = model.graph.node[1].input[0] = "norm0/codes_in"  # a name that export would take
    exported, _ = replaced(model, feeds(), form)
    values = [name for node in exported.graph.node for name in node.output]
    values += [tensor.name for tensor in exported.graph.initializer]
    assert len(set(values)) == len(values)
    names = [node.name for node in exported.graph.node]
    assert len(set(names)) == len(names)


def test_norms_between_input_and_output_of_the_graph() -> None:
    """A norm that reads the model's input and writes its output has no other value to go by."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", N])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", N])
    gamma = numpy_helper.from_array(np.ones(N, dtype=np.float32), "gamma")
    graph = helper.make_graph([helper.make_node("LayerNormalization", ["x", "gamma"], ["y"])], "g", [x], [y], [gamma])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = [{"x": np.random.default_rng(0).normal(size=(9, N)).astype(np.float32)}]
    exported, params = replaced(model, data)
    assert params.norms[0].name == "y"  # a node without a name goes by its output
    assert export.verify(model, exported, params, Feeds(data)).exact


def test_inspect_says_why_a_norm_stays() -> None:
    def blockers(model: onnx.ModelProto) -> list[str | None]:
        return [norm.blocker for norm in export.find_norms(export.load_model(model))]

    assert blockers(model_with_norms()) == [None, None]
    computed = model_with_norms(1)
    computed.graph.node.insert(0, helper.make_node("Identity", ["x_gamma"], ["gamma0"]))
    del computed.graph.initializer[1]
    computed.graph.input.append(helper.make_tensor_value_info("x_gamma", TensorProto.FLOAT, [N]))
    assert blockers(computed) == ["its scale or bias is computed by the model"]
    statistics = model_with_norms(1)
    statistics.graph.node[3].output.extend(["mean", "deviation"])
    statistics.graph.output.append(helper.make_tensor_value_info("deviation", TensorProto.FLOAT, None))
    assert blockers(statistics) == ["its mean or inverse deviation is used"]
    with pytest.raises(ModelError, match="no norm that can be replaced; norm0: its mean"):
        calibrate_model(statistics, Feeds(feeds()))


def test_verify_sees_a_changed_code_and_a_changed_border() -> None:
    model, data = model_with_norms(), feeds()
    exported, params = replaced(model, data, "function", symmetric=True)
    offsets = next(tensor for tensor in exported.graph.initializer if tensor.name == "norm1/B")
    changed = numpy_helper.to_array(offsets).copy()
    changed[3] += 1 << (params.norms[1].spec.s2 - 2)  # a quarter of an LSB in one channel
    offsets.CopyFrom(numpy_helper.from_array(changed, offsets.name))
    result = export.verify(model, exported, params, Feeds(data))
    assert not result.exact
    assert [norm.mismatches > 0 for norm in result.norms] == [False, True]
    assert result.norms[1].border_mismatches == 0

    exported, params = replaced(model, data, "function", symmetric=True)
    quantize = next(node for node in exported.graph.node if node.op_type == "QuantizeLinear")
    scale = next(node for node in exported.graph.node if node.output[0] == quantize.input[1])
    value = numpy_helper.to_array(scale.attribute[0].t) * np.float32(1.001)
    scale.attribute[0].t.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype=np.float32)))
    result = export.verify(model, exported, params, Feeds(data))
    assert not result.exact
    assert [norm.mismatches for norm in result.norms] == [0, 0]
    assert result.norms[0].border_mismatches > 0

    exported, params = replaced(model, data, "function", symmetric=True)
    place = export.exported_norms(export.load_model(exported))[0]
    producer = next(node for node in exported.graph.node if place.output in node.output)
    scale = next(node for node in exported.graph.node if producer.input[1] in node.output)
    value = numpy_helper.to_array(scale.attribute[0].t) * np.float32(2)
    scale.attribute[0].t.CopyFrom(numpy_helper.from_array(np.asarray(value, dtype=np.float32)))
    result = export.verify(model, exported, params, Feeds(data))
    assert [norm.mismatches for norm in result.norms] == [0, 0]
    assert result.norms[0].border_mismatches > 0


def test_parameters_of_another_model_are_refused() -> None:
    model = model_with_norms(2)
    params = calibrate_model(model, Feeds(feeds()))
    with pytest.raises(ModelError, match="no norm 'norm1'"):
        export.quantize_model(model_with_norms(1), params)
    with pytest.raises(ModelError, match="'norm1' has another shape, eps, scale or bias"):
        export.quantize_model(model_with_norms(2, tied=True), params)
    exported = export.quantize_model(model, dataclasses.replace(params, norms=params.norms[:1]))
    with pytest.raises(ModelError, match="'norm1' is in only one of"):
        export.verify(model, exported, params, Feeds(feeds()))
    with pytest.raises(ModelError, match="has no integer norms"):
        export.verify(model, model, params, Feeds(feeds()))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08\x12\x04abcd" * 3])
def test_files_that_are_no_models(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        export.load_model(path)


def test_truncated_model(tmp_path: Path) -> None:
    whole = model_with_norms().SerializeToString()
    for length in range(1, len(whole), 97):
        path = tmp_path / "model.onnx"
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"model\.onnx"):
            export.load_model(path)


def test_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="can't be read"):
        export.load_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="can't be read"):
        export.load_model(tmp_path)


def test_models_are_left_as_they_were() -> None:
    model = model_with_norms()
    before = model.SerializeToString(deterministic=True)
    replaced(model, feeds())
    assert model.SerializeToString(deterministic=True) == before


def test_float_outputs_are_those_of_the_kernel() -> None:
    """The whole way by hand: quantize, kernel and dequantize give the exported model's floats, to the last bit."""
    model, data = model_with_norms(1), feeds()
    exported, params = replaced(model, data, "inline")
    spec = params.norms[0].spec
    model.graph.output.append(helper.make_tensor_value_info("sum0", TensorProto.FLOAT, None))
    for feed in data:
        *_, x = run_onnxruntime(model, feed)
        y, _ = run_onnxruntime(exported, feed)
        np.testing.assert_array_equal(FxpLayerNorm(spec).forward(x), y)


def test_external_data_goes_along_to_another_folder(tmp_path: Path) -> None:
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    onnx.save(model_with_norms(), source / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    params = calibrate_model(source / "m.onnx", Feeds(feeds()))
    onnx.save(export.quantize_model(source / "m.onnx", params), elsewhere / "q.onnx")
    assert export.verify(source / "m.onnx", elsewhere / "q.onnx", params, Feeds(feeds())).exact
    (source / "w.bin").unlink()
    with pytest.raises(ModelError, match="external data"):
        calibrate_model(source / "m.onnx", Feeds(feeds()))


def test_outputs_that_are_not_finite_are_compared_by_equality() -> None:
    model = model_with_norms(1)
    model.graph.node.append(helper.make_node("Log", ["clipped"], ["log"]))
    model.graph.node.insert(len(model.graph.node) - 1, helper.make_node("Relu", ["y"], ["clipped"]))
    model.graph.output.append(helper.make_tensor_value_info("log", TensorProto.FLOAT, None))
    exported, params = replaced(model, feeds())
    check = next(c for c in export.verify(model, exported, params, Feeds(feeds())).outputs if c.name == "log")
    assert np.isfinite(check.cosine)
    assert check.max_abs is None or np.isfinite(check.max_abs)


def test_no_rows_are_nothing_to_verify() -> None:
    model = model_with_norms(1)
    exported, params = replaced(model, feeds())
    with pytest.raises(DataError, match="no code was compared"):
        export.verify(model, exported, params, Feeds([{"x": np.zeros((0, 5, N), dtype=np.float32)}]))


def test_parameters_of_another_type() -> None:
    model = model_with_norms(1)
    exported, _ = replaced(model, feeds())
    other = calibrate_model(model, Feeds(feeds()), "int16", "int16")
    with pytest.raises(ModelError, match="'norm0' was exported with other parameters: codes of type int8"):
        export.verify(model, exported, other, Feeds(feeds()))


def test_constants_shared_through_identity_are_followed() -> None:
    """As torch's exporter writes equal weights."""
    model = model_with_norms(2)
    model.graph.node.insert(0, helper.make_node("Identity", ["gamma0"], ["alias"]))
    next(node for node in model.graph.node if node.name == "norm1").input[1] = "alias"
    exported, params = replaced(model, feeds())
    assert len(params.norms) == 2
    assert params.norms[1].spec.gamma == params.norms[0].spec.gamma
    assert not any("gamma0" in node.input for node in exported.graph.node)


def test_one_bad_norm_is_told_by_its_name() -> None:
    def first(model: onnx.ModelProto) -> str | None:
        return export.find_norms(export.load_model(model))[0].blocker

    short = model_with_norms(2)
    short.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.ones(N - 1, dtype=np.float32), "gamma0"))
    assert "shape" in str(first(short))
    negative = model_with_norms(2)
    negative.graph.node[3].attribute[1].f = -1.0
    assert "not negative" in str(first(negative))
    lacking = model_with_norms(2)
    del lacking.graph.node[3].input[:]
    with pytest.raises(ModelError, match="'norm0' has no input"):
        first(lacking)


def test_float24_bears_offsets_that_are_taken_into_products() -> None:
    """OpenVINO makes (x - (c + b/a)) * -a of a*(c - x) + b in models with quantizers, and b/a rounds."""
    layer = fxp.LayerNorm(384, 1e-12)
    spec = fxp.plan(layer, QuantParams("int8", 0.05), QuantParams("int8", 0.03), hardware="carried24")
    nodes = export.to_onnx(spec, word="float24").graph.node
    values = {node.output[0]: node for node in nodes}

    def scalar(name: str) -> np.float32 | None:
        node = values.get(name)
        value = numpy_helper.to_array(node.attribute[0].t) if node and node.op_type == "Constant" else np.zeros(0)
        return np.float32(value.item()) if value.size == 1 else None

    x, checked = np.arange(2, dtype=np.float32), 0
    for difference in (node for node in nodes if node.op_type == "Sub" and scalar(node.input[0]) is not None):
        for product in (node for node in nodes if node.op_type == "Mul" and difference.output[0] in node.input):
            c, a = scalar(difference.input[0]), next(filter(None, map(scalar, product.input)), None)
            for total in (node for node in nodes if node.op_type == "Add" and product.output[0] in node.input):
                b = next(filter(None, map(scalar, total.input)), None)
                if c is not None and a is not None and b is not None:
                    np.testing.assert_array_equal((x - (c + b / a)) * -a, (c - x) * a + b)
            checked += a is not None
    assert checked
