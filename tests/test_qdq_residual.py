"""The residual add before a norm, and scales a channel, in models that are quantized already."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx_models import N, run_onnxruntime

import fxp_layernorm as fxp
from fxp_layernorm import FxpLayerNorm, NormKind, QuantParams, export, reference
from fxp_layernorm.analysis import Stage
from fxp_layernorm.calibration import calibrate_model, quantized_norms
from fxp_layernorm.cli import main
from fxp_layernorm.runtime import Feeds

Array = npt.NDArray[Any]
FORMS = pytest.mark.parametrize("form", ["inline", "function"])
KIND = {np.dtype("int8"): TensorProto.INT8, np.dtype("uint8"): TensorProto.UINT8, np.dtype("int16"): TensorProto.INT16}


class Residual:
    """Two layers, each DQ(h) + DQ(branch) -> LayerNormalization -> Q; the first sum is requantized for the second."""

    def __init__(self, dtype: str = "int8") -> None:
        rng = np.random.default_rng(4)
        self.dtype = np.dtype(dtype)
        step = 1.0 if self.dtype.itemsize == 1 else 2.0**-8
        self.initializers: dict[str, Any] = {
            f"s_{name}": np.float32(step * scale)
            for name, scale in (("a", 0.05), ("b", 0.023), ("sum", 0.07), ("y", 0.04), ("c", 0.031), ("z", 0.035))
        }
        self.initializers |= {"zero": self.dtype.type(3)}
        self.initializers |= {f"gamma{i}": np.exp(0.3 * rng.normal(size=N)).astype(np.float32) for i in range(2)}
        self.initializers |= {f"beta{i}": (0.2 * rng.normal(size=N)).astype(np.float32) for i in range(2)}
        self.nodes = [
            *self.dequantized("qa", "a"), *self.dequantized("qb", "b"), *self.dequantized("qc", "c"),
            helper.make_node("Add", ["a", "b"], ["sum"], name="add0"),
            helper.make_node("QuantizeLinear", ["sum", "s_sum", "zero"], ["q_sum"]),
            helper.make_node("DequantizeLinear", ["q_sum", "s_sum", "zero"], ["again"]),
            helper.make_node("LayerNormalization", ["sum", "gamma0", "beta0"], ["h"], name="norm0"),
            helper.make_node("QuantizeLinear", ["h", "s_y", "zero"], ["y"]),
            helper.make_node("Add", ["again", "c"], ["sum1"], name="add1"),
            helper.make_node("LayerNormalization", ["sum1", "gamma1", "beta1"], ["h1"], name="norm1"),
            helper.make_node("QuantizeLinear", ["h1", "s_z", "zero"], ["z"]),
        ]  # fmt: skip
        self.outputs = {"y": KIND[self.dtype], "z": KIND[self.dtype]}
        self.inputs: dict[str, list[str | int]] = {name: ["rows", N] for name in ("qa", "qb", "qc")}

    @staticmethod
    def dequantized(codes: str, name: str) -> list[onnx.NodeProto]:
        return [helper.make_node("DequantizeLinear", [codes, f"s_{name}", "zero"], [name])]

    def model(self, domains: tuple[str, ...] = ()) -> onnx.ModelProto:
        read = {name for node in self.nodes for name in node.input}
        graph = helper.make_graph(
            self.nodes,
            "residual",
            [helper.make_tensor_value_info(name, KIND[self.dtype], shape) for name, shape in self.inputs.items()],
            [helper.make_tensor_value_info(name, kind, ["rows", N]) for name, kind in self.outputs.items()],
            [numpy_helper.from_array(np.asarray(v), name) for name, v in self.initializers.items() if name in read],
        )
        imports = [helper.make_opsetid("", 21), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def feed(self, rows: int = 50) -> dict[str, Array]:
        ends, rng = np.iinfo(self.dtype), np.random.default_rng(6)
        return {
            name: rng.integers(ends.min, ends.max, (rows, N), endpoint=True).astype(self.dtype) for name in self.inputs
        }


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def borders(model: onnx.ModelProto) -> list[export.Border | None]:
    return [export.find_border(norm) for norm in export.find_norms(export.load_model(model))]


def test_norms_with_residuals_are_analyzed() -> None:
    """The rows are those of both operands, and what the model has for their scales is no matter of advice."""
    block = Residual()
    model, feed = block.model(), block.feed()
    params = quantized_norms(model).params
    analysis = fxp.analysis.analyze_model(model, params, Feeds(feed))
    first = analysis.norms[0]
    spec = params.norms[0].spec
    assert spec.residual is not None
    alone = fxp.analyze(spec, spec.input.dequantize(feed["qa"]), spec.residual.dequantize(feed["qb"]), name="norm0")
    assert first == dataclasses.replace(alone, suggestions=())
    assert first.attribution.term(Stage.INPUT).power_lsb2 == 0  # they are codes already
    assert first.attribution.term(Stage.SUM).power_lsb2 != 0
    assert not analysis.suggestions


def test_a_quantized_model_is_reported_without_parameters(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    block = Residual()
    onnx.save(block.model(), tmp_path / "q.onnx")
    np.savez(tmp_path / "feed.npz", **block.feed())  # type: ignore[arg-type]
    page = tmp_path / "r.html"
    arguments = ["report", str(tmp_path / "q.onnx"), "--data", str(tmp_path / "feed.npz"), "-o", str(page)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert '<th scope="row">residual</th>' in page.read_text(encoding="utf-8")


@FORMS
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16"])
def test_sums_are_part_of_the_integer_norm(form: str, dtype: str) -> None:
    block = Residual(dtype)
    model, feed = block.model(), block.feed()
    params = quantized_norms(model).params
    first, second = (norm.spec for norm in params.norms)
    assert (first.input.scale, first.residual and first.residual.scale) == tuple(
        float(block.initializers[name]) for name in ("s_a", "s_b")
    )
    assert first.sum_output == QuantParams(dtype, float(block.initializers["s_sum"]), 3)
    assert second.residual is not None
    assert second.sum_output is None
    exported = export.quantize_model(model, params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear", "LayerNormalization"} & set(operators(exported))
    result = export.verify(model, exported, params, Feeds(feed))
    assert result.exact
    assert result.codes == 3 * feed["qa"].size  # two norms, and one sum
    y, z = run_onnxruntime(exported, feed)
    wanted, total = reference.run_with_sum(first, feed["qa"], feed["qb"])
    np.testing.assert_array_equal(y, wanted)
    np.testing.assert_array_equal(z, reference.run(second, total, feed["qc"]))
    if dtype != "int16":  # whose sum has more bits than the integers u
        for found, original in zip((y, z), run_onnxruntime(model, feed), strict=True):
            assert np.abs(found.astype(int) - original).max() <= 1


def test_a_changed_sum_is_seen() -> None:
    block = Residual()
    model, feed = block.model(), block.feed()
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params, form="inline")
    place = export.exported_norms(export.load_model(exported))[0]
    producer = next(node for node in exported.graph.node if place.codes_sum in node.output)
    clamped = next(node for node in exported.graph.node if producer.input[0] in node.output)
    constant = next(node for node in exported.graph.node if clamped.input[1] in node.output)
    constant.attribute[0].t.CopyFrom(numpy_helper.from_array(np.array(100, dtype=np.int32)))
    result = export.verify(model, exported, params, Feeds(feed))
    assert [norm.mismatches > 0 for norm in result.norms] == [True, False]
    assert {(code.side, code.got) for code in result.norms[0].differences} == {("sum_output", 100)}


def test_the_first_stage_behind_a_sum_is_named() -> None:
    block = Residual()
    model, feed = block.model(), block.feed()
    params = quantized_norms(model).params
    probe = export.probe(export.quantize_model(model, params))
    names = [value.name for value in probe.graph.output]
    results = dict(zip(names, run_onnxruntime(probe, feed), strict=True))
    exported = export.quantize_model(model, params)
    assert export.verify(model, exported, params, Feeds(feed), results=Feeds(results)).exact
    results["norm0/R"] = results["norm0/R"] + 1
    y = export.exported_norms(export.load_model(exported))[0].codes_out
    results[y] = results[y] ^ 1
    stage = export.verify(model, exported, params, Feeds(feed), results=Feeds(results)).norms[0].stage
    assert stage is not None
    assert stage.stage == "R"


def float_consumer(block: Residual) -> None:
    block.nodes.append(helper.make_node("Neg", ["sum"], ["negative"]))
    block.outputs["negative"] = TensorProto.FLOAT


def float_output(block: Residual) -> None:
    block.outputs["sum"] = TensorProto.FLOAT


def broadcast(block: Residual) -> None:
    block.inputs["qb"] = [1, N]


def float_operand(block: Residual) -> None:
    block.nodes[1] = helper.make_node("Cast", ["qb"], ["b"], to=TensorProto.FLOAT)
    del block.initializers["s_b"]


@pytest.mark.parametrize("change", [float_consumer, float_output, broadcast, float_operand])
def test_sums_that_floats_reach(change: Any) -> None:
    block = Residual()
    assert [found is not None for found in borders(block.model())] == [True, True]
    change(block)
    assert [found is not None for found in borders(block.model())] == [False, True]


def quantized_sum(block: Residual) -> None:
    """The norm reads the sum's codes, as does the next residual: a transformer with its norms before the layers."""
    block.nodes[6] = helper.make_node("LayerNormalization", ["again", "gamma0", "beta0"], ["h"], name="norm0")


def quantized_sum_for_the_norm_alone(block: Residual) -> None:
    """What quantize_static makes of a transformer with its norms behind the adds."""
    quantized_sum(block)
    block.nodes[8] = helper.make_node("Add", ["a", "c"], ["sum1"], name="add1")


def quantized_sum_in_two_pairs(block: Residual) -> None:
    """What quantize_static makes of it with DedicatedQDQPair."""
    quantized_sum_for_the_norm_alone(block)
    block.nodes[8:9] = [
        helper.make_node("QuantizeLinear", ["sum", "s_sum", "zero"], ["q_sum2"]),
        helper.make_node("DequantizeLinear", ["q_sum2", "s_sum", "zero"], ["again2"]),
        helper.make_node("Add", ["again2", "c"], ["sum1"], name="add1"),
    ]


@FORMS
@pytest.mark.parametrize(
    "change", [quantized_sum, quantized_sum_for_the_norm_alone, quantized_sum_in_two_pairs], ids=lambda c: c.__name__
)
def test_sums_that_the_model_quantizes_are_fused_when_asked(change: Any, form: str) -> None:
    block = Residual()
    change(block)
    model, feed = block.model(), block.feed()
    assert [bool(found and found.add) for found in borders(model)] == [False, True]
    params = quantized_norms(model, fuse_residual=True).params
    spec = params.norms[0].spec
    assert spec.residual is not None
    assert (spec.sum_output is None) == (change is quantized_sum_for_the_norm_alone)
    assert calibrate_model(model, Feeds(feed), fuse_residual=True).norms[0].spec == spec
    exported = export.quantize_model(model, params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    assert not {"QuantizeLinear", "DequantizeLinear", "LayerNormalization"} & set(operators(exported))
    assert export.verify(model, exported, params, Feeds(feed)).exact
    y, _ = run_onnxruntime(exported, feed)
    np.testing.assert_array_equal(y, reference.run(spec, feed["qa"], feed["qb"]))
    alone = fxp.analyze(
        spec, spec.input.dequantize(feed["qa"]), spec.residual.dequantize(feed["qb"]), name=params.norms[0].name
    )
    analyzed = fxp.analysis.analyze_model(model, params, Feeds(feed)).norms[0]
    assert analyzed == dataclasses.replace(alone, suggestions=())


@FORMS
@pytest.mark.parametrize("sum_is_read", [True, False])
def test_onnxruntimes_nodes_that_add_and_normalize(form: str, sum_is_read: bool) -> None:
    block = Residual()
    outputs = ["h", "", "", "sum"] if sum_is_read else ["h"]
    skip = helper.make_node(
        "SkipLayerNormalization", ["a", "b", "gamma0", "beta0"], outputs, name="norm0", domain="com.microsoft",
        epsilon=1e-5,
    )  # fmt: skip
    del block.nodes[6]
    block.nodes[3:4] = [skip]
    if not sum_is_read:
        del block.nodes[4:6]
        block.nodes[5] = helper.make_node("Add", ["a", "c"], ["sum1"], name="add1")
    model, feed = block.model(domains=("com.microsoft",)), block.feed()
    assert [bool(found and found.add) for found in borders(model)] == [True, True]
    params = quantized_norms(model).params
    assert (params.norms[0].spec.sum_output is not None) == sum_is_read
    exported = export.quantize_model(model, params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    left = {"QuantizeLinear", "DequantizeLinear", "LayerNormalization", "SkipLayerNormalization"}
    assert not left & set(operators(exported))
    assert export.verify(model, exported, params, Feeds(feed)).exact
    for found, original in zip(run_onnxruntime(exported, feed), run_onnxruntime(model, feed), strict=True):
        assert np.abs(found.astype(int) - original).max() <= 1


@pytest.mark.parametrize("spelled", [True, False])
def test_a_bias_besides_is_told(spelled: bool, tmp_path: Path) -> None:
    """It is a real number a channel, of which there are no codes."""
    block = Residual()
    if spelled:
        block.nodes[3] = helper.make_node("Add", ["a", "b"], ["two"])
        block.nodes.insert(4, helper.make_node("Add", ["two", "beta1"], ["sum"]))
    else:
        inputs = ["a", "b", "gamma0", "beta0", "beta1"]
        skip = helper.make_node(
            "SkipLayerNormalization", inputs, ["h", "", "", "sum"], domain="com.microsoft", name="norm0"
        )
        del block.nodes[6]
        block.nodes[3:4] = [skip]
    model, feed = block.model(domains=("com.microsoft",)), block.feed()
    onnx.save(model, tmp_path / "q.onnx")
    result = CliRunner().invoke(main, ["export", str(tmp_path / "q.onnx"), "-o", str(tmp_path / "i.onnx"), "--json"])
    document = json.loads(result.stdout)
    assert document["norms"] == ["norm1"]
    assert document["left"][0]["name"] == "norm0"
    assert "a bias added in floats" in document["left"][0]["reason"]
    params = calibrate_model(model, Feeds(feed))
    assert export.verify(model, export.quantize_model(model, params), params, Feeds(feed)).exact


def test_quantizers_of_onnxruntimes_domain() -> None:
    """ONNX infers no shapes behind them, and without shapes no sum is known to need no broadcasting."""
    block = Residual("int16")
    for node in block.nodes:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = "com.microsoft"
    quantized_sum(block)
    model, feed = block.model(domains=("com.microsoft",)), block.feed()
    params = quantized_norms(model, fuse_residual=True).params
    assert all(norm.spec.residual is not None for norm in params.norms)
    exported = export.quantize_model(model, params)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(operators(exported))
    assert export.verify(model, exported, params, Feeds(feed)).exact


def test_another_norm_that_reads_the_sum_leaves_the_first_alone() -> None:
    """Its add is the first norm itself, which must not go with it."""
    block = Residual()
    skip = helper.make_node(
        "SkipLayerNormalization", ["a", "b", "gamma0", "beta0"], ["h", "", "", "sum"], name="norm0",
        domain="com.microsoft",
    )  # fmt: skip
    second = helper.make_node("LayerNormalization", ["sum", "gamma1", "beta1"], ["h1"], name="norm1")
    quantizers = [helper.make_node("QuantizeLinear", [x, "s_y", "zero"], [q]) for x, q in (("h", "y"), ("h1", "z"))]
    block.nodes[3:] = [skip, second, *quantizers]
    model, feed = block.model(domains=("com.microsoft",)), block.feed()
    params = calibrate_model(model, Feeds(feed), fuse_residual=True)
    exported = export.quantize_model(model, params)
    assert export.verify(model, exported, params, Feeds(feed)).exact


def test_calibration_with_data_keeps_the_sums() -> None:
    block = Residual()
    model, feed = block.model(), block.feed()
    own = [norm.spec for norm in quantized_norms(model).params.norms]
    params = calibrate_model(model, Feeds(feed))
    assert [norm.spec for norm in params.norms] == own
    assert [norm.rows for norm in params.norms] == [50, 50]


@pytest.mark.parametrize("change", [None, quantized_sum, quantized_sum_for_the_norm_alone])
def test_float_norms_read_the_sum_itself(change: Any) -> None:
    """The form qdq leaves the model's quantizers, but for those of a sum that the norm doesn't read any more."""
    block = Residual()
    if change is not None:
        change(block)
    model, feed = block.model(), block.feed()
    params = quantized_norms(model, fuse_residual=True).params
    exported = export.quantize_model(model, params, form="qdq")
    onnx.checker.check_model(exported, full_check=True)
    before, after = operators(model), operators(exported)
    gone = int(change is quantized_sum_for_the_norm_alone)
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        assert after[operator] == before[operator] - gone
    norm = next(node for node in exported.graph.node if node.op_type == "LayerNormalization")
    assert norm.input[0] == "sum"
    result = export.verify(model, exported, params, Feeds(feed))
    assert result.passed
    assert [check.beyond for check in result.norms] == [0, 0]
    assert all(check.largest <= 1 for check in result.norms)
    assert result.codes == (2 + (params.norms[0].spec.sum_output is not None)) * feed["qa"].size


@FORMS
@pytest.mark.parametrize("side", ["s_in", "s_out"])
def test_scales_a_channel(form: str, side: str) -> None:
    rng = np.random.default_rng(7)
    scales = (0.05 * np.exp(rng.normal(size=N))).astype(np.float32)
    parameters: dict[str, Any] = {"s_in": np.float32(0.05), "s_out": np.float32(0.04)} | {side: scales}
    zeros = {f"z_{name}": np.full(np.shape(parameters[f"s_{name}"]), 2, dtype=np.int8) for name in ("in", "out")}
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "s_in", "z_in"], ["x"], axis=1),
        helper.make_node("LayerNormalization", ["x", "gamma"], ["h"], name="norm"),
        helper.make_node("QuantizeLinear", ["h", "s_out", "z_out"], ["y"], axis=-1),
    ]
    parameters |= zeros | {"gamma": np.ones(N, dtype=np.float32)}
    graph = helper.make_graph(
        nodes, "channels", [helper.make_tensor_value_info("q", TensorProto.INT8, ["rows", N])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, ["rows", N])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in parameters.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    params = quantized_norms(model).params
    spec = params.norms[0].spec
    found = spec.input if side == "s_in" else spec.output
    assert found.channel_scales == tuple(scales.astype(float).tolist())
    exported = export.quantize_model(model, params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    q = rng.integers(-128, 127, (60, N), endpoint=True).astype(np.int8)
    assert export.verify(model, exported, params, Feeds({"q": q})).exact
    (y,), (original,) = (run_onnxruntime(m, {"q": q}) for m in (exported, model))
    np.testing.assert_array_equal(y, FxpLayerNorm(spec)(q))
    assert np.abs(y.astype(int) - original).max() <= 1


@pytest.mark.parametrize("kind", list(NormKind))
@FORMS
def test_a_norm_by_itself_adds_too(kind: NormKind, form: str) -> None:
    layer = fxp.LayerNorm(N) if kind is NormKind.LAYERNORM else fxp.RMSNorm(N, 1e-5)
    a, b, total = (QuantParams("int8", scale, 1) for scale in (0.05, 0.02, 0.06))
    spec = fxp.plan(layer, a, QuantParams("int8", 0.03), residual=b, sum_output=total)
    model = export.to_onnx(spec, form=form)
    onnx.checker.check_model(model, full_check=True)
    rng = np.random.default_rng(0)
    q, residual = rng.integers(-128, 127, (2, 30, N), endpoint=True).astype(np.int8)
    y, w = run_onnxruntime(model, {"q": q, "residual": residual})
    wanted = reference.run_with_sum(spec, q, residual)
    np.testing.assert_array_equal(y, wanted[0])
    np.testing.assert_array_equal(w, wanted[1])
