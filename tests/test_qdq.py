"""Norms between quantizers: their parameters stand in the model, and the integer norm takes the quantizers' place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from onnx_models import N, feeds, model_with_norms, run_onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from fxp_layernorm import FxpLayerNorm, ModelError, QuantParams, export
from fxp_layernorm.calibration import calibrate_model, quantized_norms
from fxp_layernorm.cli import main
from fxp_layernorm.runtime import Feeds

GAMMA = np.exp(0.3 * np.random.default_rng(0).normal(size=N)).astype(np.float32)
BETA = (0.2 * np.random.default_rng(1).normal(size=N)).astype(np.float32)


class Block:
    """A model with one norm, q -> DequantizeLinear -> norm -> QuantizeLinear -> y, to be changed by hand."""

    def __init__(self, scale: npt.ArrayLike = 0.05, dtype: str = "int8", opset: int = 21, **dequantize: Any) -> None:
        self.opset, self.dtype, self.dequantize = opset, dtype, dequantize
        self.initializers: dict[str, Any] = {
            "s_in": np.asarray(scale, dtype=np.float32),
            "z_in": np.zeros(np.shape(scale), dtype=dtype) + np.dtype(dtype).type(3),
            "s_out": np.float32(0.04),
            "z_out": np.int8(-5),
            "gamma": GAMMA,
            "beta": BETA,
        }
        self.norm = [helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["h"], name="norm")]
        self.after = [helper.make_node("QuantizeLinear", ["h", "s_out", "z_out"], ["y"], name="quantize")]
        self.outputs = {"y": TensorProto.INT8}
        self.shape: list[str | int] = ["rows", N]

    def model(self) -> onnx.ModelProto:
        before = helper.make_node(
            "DequantizeLinear", ["q", "s_in", "z_in"], ["x"], name="dequantize", **self.dequantize
        )
        nodes = [before, *self.norm, *self.after]
        read = {name for node in nodes for name in node.input}
        graph = helper.make_graph(
            nodes,
            "block",
            [helper.make_tensor_value_info("q", helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype)), self.shape)],
            [helper.make_tensor_value_info(name, kind, self.shape) for name, kind in self.outputs.items()],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in self.initializers.items() if k in read],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def codes(self, rows: int = 40) -> npt.NDArray[Any]:
        ends, sizes = np.iinfo(self.dtype), [size for size in self.shape if isinstance(size, int)]
        codes = np.random.default_rng(3).integers(ends.min, ends.max, (rows, *sizes), endpoint=True)
        return codes.astype(self.dtype)


def border(model: onnx.ModelProto) -> export.Border | None:
    (norm,) = export.find_norms(export.load_model(model))
    return export.find_border(norm)


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def check(block: Block, form: str = "inline") -> onnx.ModelProto:
    """Replace the norm, hold its codes against the kernel and against the float model's, and return the new model."""
    model, q = block.model(), block.codes()
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    result = export.verify(model, exported, params, Feeds({"q": q}))
    assert result.exact
    assert result.codes == q.size
    expected = FxpLayerNorm(params.norms[0].spec)(q)
    for name, found, original in zip(
        block.outputs, run_onnxruntime(exported, {"q": q}), run_onnxruntime(model, {"q": q}), strict=True
    ):
        if block.outputs[name] == TensorProto.INT8:
            np.testing.assert_array_equal(found, expected)
            assert np.abs(found.astype(int) - original).max() <= 1
        else:
            np.testing.assert_array_equal(found, original)
    return exported


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """What quantize_static takes its data from."""

    def __init__(self) -> None:
        self._feeds = iter(feeds())

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


TYPES = {
    "int8": QuantType.QInt8, "uint8": QuantType.QUInt8, "int16": QuantType.QInt16, "uint16": QuantType.QUInt16,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a pair for each consumer": {"DedicatedQDQPair": True},
    "weights between quantizers": {"AddQDQPairToWeight": True},
}


@pytest.fixture
def quantized(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Return a model that ONNX Runtime's quantizer made, of the type and with the options asked for."""
    dtype, options = getattr(request, "param", ("int8", "plain"))
    model = model_with_norms(3, opset=21, ir_version=10)
    onnx.save(model, tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "quantized.onnx", Reader(), quant_format=QuantFormat.QDQ,
        activation_type=TYPES[dtype], weight_type=QuantType.QInt8, op_types_to_quantize=["LayerNormalization", "Mul"],
        extra_options=OPTIONS[options],
    )  # fmt: skip
    return tmp_path / "quantized.onnx"


@pytest.mark.parametrize(
    "quantized", [*((dtype, "plain") for dtype in TYPES), *(("int8", name) for name in OPTIONS)], indirect=True
)
@pytest.mark.parametrize("form", ["inline", "function"])
def test_models_of_onnxruntimes_quantizer(quantized: Path, form: str) -> None:
    model = onnx.load(quantized)
    found = quantized_norms(quantized)
    # the last norm's output leaves the model in floats, behind a DequantizeLinear
    assert [norm.name for norm in found.params.norms] == ["norm0", "norm1", "norm2"]
    exported = export.quantize_model(quantized, found.params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    result = export.verify(quantized, exported, found.params, Feeds(feeds()))
    assert result.exact
    assert result.codes == sum(3 * feed["x"].size for feed in feeds())
    assert all(check.cosine > 0.99 for check in result.outputs)
    before, after = operators(model), operators(exported)
    assert after["LayerNormalization"] == 0
    assert before["QuantizeLinear"] - after["QuantizeLinear"] >= 3
    assert before["DequantizeLinear"] - after["DequantizeLinear"] >= 3 + 6
    used = {name for node in exported.graph.node for name in node.input}
    assert {tensor.name for tensor in exported.graph.initializer} <= used


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("form", ["inline", "function"])
def test_codes_in_codes_out(dtype: str, form: str) -> None:
    exported = check(Block(0.05 if "8" in dtype else 0.0003, dtype), form)
    assert not {"QuantizeLinear", "DequantizeLinear", "LayerNormalization"} & set(operators(exported))
    assert [value.name for value in (*exported.graph.input, *exported.graph.output)] == ["q", "y"]
    if form == "function":
        assert len(exported.graph.node) == 1


@pytest.mark.parametrize("form", ["inline", "function"])
def test_accumulators_of_32_bits(form: str) -> None:
    """As an integer matmul before the norm leaves them."""
    block = Block(1e-9, "int32")
    block.initializers["z_in"] = np.int32(0)
    assert operators(check(block, form))["DequantizeLinear"] == 0


def test_parameters_are_the_models_own() -> None:
    found = border(Block().model())
    assert found is not None
    assert found.input == QuantParams("int8", float(np.float32(0.05)), 3)
    assert found.output == QuantParams("int8", float(np.float32(0.04)), -5)


def test_dequantize_stays_where_others_read_it() -> None:
    block = Block()
    block.after.append(helper.make_node("Neg", ["x"], ["other"]))
    block.outputs["other"] = TensorProto.FLOAT
    assert operators(check(block))["DequantizeLinear"] == 1


def test_several_quantizers_of_one_output() -> None:
    block = Block()
    block.after.append(helper.make_node("QuantizeLinear", ["h", "s_out", "z_out"], ["y2"]))
    block.after.append(helper.make_node("QuantizeLinear", ["h", "s_out", "z_out"], ["y3"]))
    block.after.append(helper.make_node("Identity", ["y3"], ["y4"]))
    block.outputs |= {"y2": TensorProto.INT8, "y4": TensorProto.INT8}
    assert operators(check(block))["QuantizeLinear"] == 0


def test_parameters_that_others_share_stay() -> None:
    block = Block()
    block.after.append(helper.make_node("DequantizeLinear", ["y", "s_out", "z_out"], ["other"]))
    block.outputs = {"y": TensorProto.INT8, "other": TensorProto.FLOAT}
    model, q = block.model(), block.codes()
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params, form="inline")
    y, other = run_onnxruntime(exported, {"q": q})
    np.testing.assert_array_equal(other, params.norms[0].spec.output.dequantize(y))
    assert {"s_out", "z_out"} <= {tensor.name for tensor in exported.graph.initializer}


def test_scales_of_half_precision() -> None:
    block = Block()
    for name in ("s_in", "s_out", "gamma", "beta"):
        block.initializers[name] = block.initializers[name].astype(np.float16)
    model = block.model()
    found = border(model)
    assert found is not None
    assert found.input.scale == float(np.float16(0.05))
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params)
    assert export.verify(model, exported, params, Feeds({"q": block.codes()})).exact


def test_zero_points_of_channels() -> None:
    rng = np.random.default_rng(4)
    block = Block(np.full(N, 0.05))
    block.initializers["z_in"] = rng.integers(-128, 128, N).astype(np.int8)
    block.initializers["s_out"] = np.full(N, 0.04, dtype=np.float32)
    block.initializers["z_out"] = rng.integers(-128, 128, N).astype(np.int8)
    found = border(block.model())
    assert found is not None
    assert found.input.zero_point == tuple(block.initializers["z_in"].tolist())
    assert found.output.zero_point == tuple(block.initializers["z_out"].tolist())
    assert found.input.exponents is None
    check(block)


def test_no_zero_points() -> None:
    block = Block(dtype="uint8")
    block.initializers["z_in"] = np.zeros((), dtype=np.uint8)
    block.after = [helper.make_node("QuantizeLinear", ["h", "s_out"], ["y"])]
    block.outputs = {"y": TensorProto.UINT8}
    found = border(block.model())
    assert found is not None
    assert (found.output.dtype, found.output.zero_point) == ("uint8", 0)
    block.after = [helper.make_node("QuantizeLinear", ["h", "s_out"], ["y"], output_dtype=TensorProto.INT16)]
    block.outputs = {"y": TensorProto.INT16}
    found = border(block.model())
    assert found is not None
    assert (found.output.dtype, found.output.zero_point) == ("int16", 0)


@pytest.mark.parametrize("axis", [1, -1])
def test_powers_of_two_a_channel(axis: int) -> None:
    exponents = np.arange(N) % 8
    block = Block(np.ldexp(0.01, exponents), axis=axis)
    found = border(block.model())
    assert found is not None
    assert found.input == QuantParams("int8", float(np.float32(0.01)), 3, exponents)
    check(block)


def decompose(block: Block, axis: int = -1) -> None:
    """Spell the block's norm out in elementary operators."""
    block.initializers |= {"axes": np.array([axis]), "eps": np.float32(1e-5), "two": np.float32(2)}
    steps = [
        ("ReduceMean", "x axes", "mean"), ("Sub", "x mean", "d"), ("Pow", "d two", "square"),
        ("ReduceMean", "square axes", "var"), ("Add", "var eps", "v"), ("Sqrt", "v", "root"), ("Div", "d root", "n"),
        ("Mul", "n gamma", "g"), ("Add", "g beta", "h"),
    ]  # fmt: skip
    block.norm = [helper.make_node(kind, inputs.split(), [output]) for kind, inputs, output in steps]


def test_a_decomposed_norm() -> None:
    block = Block(opset=18)
    decompose(block)
    assert not {"QuantizeLinear", "DequantizeLinear", "Sqrt"} & set(operators(check(block)))


@pytest.mark.parametrize("form", ["inline", "function"])
def test_axes_that_are_not_the_last(form: str) -> None:
    block = Block()
    block.shape = ["rows", N, 5]
    decompose(block, axis=1)
    for name in ("gamma", "beta"):
        block.initializers[name] = block.initializers[name].reshape(N, 1)
    exported = check(block, form)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(exported))
    probe, feed = export.probe(exported), {"q": block.codes()}
    params = quantized_norms(block.model()).params
    results = dict(zip([value.name for value in probe.graph.output], run_onnxruntime(probe, feed), strict=True))
    name = next(name for name in results if name.endswith("/R"))
    results[name], results["y"] = results[name] + 1, results["y"] ^ 1
    found = export.verify(block.model(), exported, params, Feeds(feed), results=Feeds(results)).norms[0].stage
    assert found is not None
    assert found.stage == "R"


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("scales", [np.float32(1 / 64), np.full(N, 1 / 64, dtype=np.float32)])
def test_gain_and_offset_stored_as_codes(decomposed: bool, scales: npt.NDArray[Any]) -> None:
    block = Block()
    if decomposed:
        decompose(block)
    gamma, beta = np.round(GAMMA * 64).astype(np.int8), np.round(BETA * 2**20).astype(np.int32)
    block.initializers |= {"g_q": gamma, "g_s": scales, "b_q": beta, "b_s": np.float32(2**-20)}
    block.norm = [
        helper.make_node("DequantizeLinear", ["g_q", "g_s"], ["gamma"], axis=0),
        helper.make_node("DequantizeLinear", ["b_q", "b_s"], ["beta"]),
        *block.norm,
    ]
    del block.initializers["gamma"], block.initializers["beta"]
    exported = check(block)
    spec = quantized_norms(block.model()).params.norms[0].spec
    np.testing.assert_array_equal(spec.gamma, gamma / 64)
    np.testing.assert_array_equal(spec.beta, beta / 2**20)
    assert operators(exported)["DequantizeLinear"] == 0
    assert not {"g_q", "b_q"} & {tensor.name for tensor in exported.graph.initializer}


def other_scales(block: Block) -> None:
    block.initializers["s2"] = np.float32(0.05)
    block.after.append(helper.make_node("QuantizeLinear", ["h", "s2", "z_out"], ["y2"]))
    block.outputs["y2"] = TensorProto.INT8


def float_consumer(block: Block) -> None:
    block.after.append(helper.make_node("Neg", ["h"], ["negative"]))
    block.outputs["negative"] = TensorProto.FLOAT


def float_output(block: Block) -> None:
    block.outputs["h"] = TensorProto.FLOAT


def computed_scale(block: Block) -> None:
    del block.initializers["s_out"]
    block.norm.append(helper.make_node("ReduceMax", ["x"], ["s_out"], keepdims=0))


def scales_along_the_rows(block: Block) -> None:
    block.initializers["s_out"] = np.full(40, 0.05, dtype=np.float32)
    block.initializers["z_out"] = np.zeros(40, dtype=np.int8)
    block.after = [helper.make_node("QuantizeLinear", ["h", "s_out", "z_out"], ["y"], axis=0)]


def no_scale(block: Block) -> None:
    block.initializers["s_in"] = np.float32(0)


@pytest.mark.parametrize(
    "change",
    [
        other_scales, float_consumer, float_output, computed_scale, scales_along_the_rows,
        no_scale,
    ],
)  # fmt: skip
def test_norms_that_floats_reach(change: Any) -> None:
    block = Block()
    assert border(block.model()) is not None
    change(block)
    assert border(block.model()) is None
    with pytest.raises(ModelError, match=r"norms \(1\), none stands between"):
        quantized_norms(block.model())


def test_calibration_keeps_the_models_parameters(quantized: Path) -> None:
    """The parameters of a norm between quantizers don't depend on the data, the others' do."""
    model = onnx.load(quantized)
    (last,) = (node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "h1")
    model.graph.output.append(helper.make_tensor_value_info("h1", TensorProto.FLOAT, None))
    own = {norm.name: norm.spec for norm in quantized_norms(quantized).params.norms}
    found = quantized_norms(model)
    assert [norm.name for norm in found.params.norms] == ["norm0", "norm2"]
    assert found.skipped == {"norm1": "it stands between no quantizers; it needs data to be calibrated"}
    params = calibrate_model(model, Feeds(feeds()), "uint8", "int16")
    specs = {norm.name: norm.spec for norm in params.norms}
    assert {name: specs[name] for name in ("norm0", "norm2")} == {name: own[name] for name in ("norm0", "norm2")}
    assert (specs["norm1"].input.dtype, specs["norm1"].output.dtype) == ("uint8", "int16")
    assert all(norm.rows > 0 and (norm.sqnr_db or 0) > 20 for norm in params.norms)
    exported = export.quantize_model(model, params)
    places = {place.name: place for place in export.exported_norms(export.load_model(exported))}
    assert places["norm0"].input is None
    assert places["norm1"].output == "h1"
    assert export.verify(model, exported, params, Feeds(feeds())).exact
    assert last.output[0] in {name for node in exported.graph.node for name in node.output}


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_command_line_without_parameters_or_data(quantized: Path) -> None:
    folder = quantized.parent
    out, params, data = folder / "out.onnx", folder / "params.json", folder / "data"
    data.mkdir()
    for index, feed in enumerate(feeds()):
        np.savez(data / f"{index}.npz", **feed)
    listed = json.loads(run("inspect", quantized, "--json").stdout)["norms"]
    assert [norm["codes"]["input"]["dtype"] for norm in listed] == ["int8"] * 3
    assert "between quantizers" in run("inspect", quantized).stdout
    assert json.loads(run("export", quantized, "-o", out, "--json").stdout)["replaced"] == 3
    verified = json.loads(run("verify", quantized, out, "--data", data, "--json").stdout)
    assert verified["exact"]
    assert [norm["mismatches"] for norm in verified["norms"]] == [0, 0, 0]
    run("export", quantized, "-o", out, "--word", "int24")
    assert json.loads(run("verify", quantized, out, "--data", data, "--json").stdout)["exact"]
    run("export", quantized, "-o", out)
    assert "3 norms calibrated" in run("calibrate", quantized, "-o", params).stderr
    run("verify", quantized, out, params, "--data", data)
    plain = folder / "float.onnx"
    assert json.loads(run("inspect", plain, "--json").stdout)["norms"][0]["codes"] is None
    for arguments in (("export", plain, "-o", out), ("calibrate", plain, "-o", params)):
        result = run(*arguments, code=2)
        assert "norms (3), none stands between" in result.stderr
        assert "calibrate --data" in result.stderr
