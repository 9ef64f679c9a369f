"""The form qdq: float norms between quantizers, and what verification can hold such a norm to."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, numpy_helper
from onnx_models import N, feeds, model_with_norms, run_onnxruntime, run_reference
from rows import adversarial, layer_of, noise, params_of, typical
from test_bodies import NODE, data, model_of
from test_bodies import norm as spelled
from test_qdq import Block

import fxp_layernorm as fxp
from fxp_layernorm import LayerNormSpec, ModelError, NormKind, export
from fxp_layernorm.calibration import calibrate_model, quantized_norms
from fxp_layernorm.cli import main
from fxp_layernorm.export.float_bound import beyond_float32, float32_norm
from fxp_layernorm.runtime import Feeds

Array = npt.NDArray[Any]

#: Options of the model and of its calibration, and the operators of the norm that is written.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "one scale": ({}, {"exponents": 0}, {"LayerNormalization"}),
    "channel exponents": ({}, {}, {"LayerNormalization"}),
    "uint8 to int8": ({}, {"input": "uint8", "exponents": 0}, {"LayerNormalization"}),
    "int16": ({"opset": 21, "ir_version": 10}, {"input": "int16", "output": "uint16"}, {"LayerNormalization"}),
    "float16": ({"dtype": TensorProto.FLOAT16}, {}, {"LayerNormalization"}),
    "no bias": ({"bias": False}, {}, {"LayerNormalization"}),
    "two axes": (
        {"shape": ("batch", 5, N), "axis": 1, "parameters": (5, N)}, {"exponents": 0}, {"LayerNormalization"}
    ),
    "RMSNorm before it had a node": (
        {"operator": "SimplifiedLayerNormalization", "bias": False}, {}, {"Sqrt", "ReduceMean", "Div"}
    ),
    "RMSNorm": (
        {"operator": "RMSNormalization", "bias": False, "opset": 23, "ir_version": 10}, {}, {"RMSNormalization"}
    ),
}  # fmt: skip


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("case", CASES)
def test_float_norms_between_quantizers(case: str) -> None:
    options, asked, written = CASES[case]
    if options.get("operator") == "RMSNormalization":
        pytest.importorskip("onnxruntime", "1.24", reason="the float operator came late to ONNX Runtime")
    data = feeds(dtype="float16" if "dtype" in options else "float32", count=1)
    model = model_with_norms(**options)
    params = calibrate_model(model, Feeds(data), **asked)
    exported = export.quantize_model(model, params, form="qdq")
    if options.get("operator") != "SimplifiedLayerNormalization":
        onnx.checker.check_model(exported, full_check=True)
    assert (operators(exported)["QuantizeLinear"], operators(exported)["DequantizeLinear"]) == (4, 4)
    assert written <= set(operators(exported))
    assert exported.opset_import[0].version == model.opset_import[0].version
    result = export.verify(model, exported, params, Feeds(data))
    assert result.passed
    assert result.codes == 2 * data[0]["x"].size
    assert all(norm.beyond == 0 and norm.largest <= 1 for norm in result.norms)
    assert all(check.cosine > 0.999 for check in result.outputs)
    written_gains = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    for norm in params.norms:
        gain = written_gains[f"{norm.name}/gamma"].reshape(-1)
        np.testing.assert_array_equal(gain, np.array(norm.spec.gamma, dtype=np.float32))


def test_the_exported_model_can_be_read_back() -> None:
    """What is written is a model that is quantized already, with the same parameters."""
    model = model_with_norms(opset=21, ir_version=10)
    params = calibrate_model(model, Feeds(feeds()))
    assert params.norms[0].spec.input.exponents is not None
    exported = export.quantize_model(model, params, form="qdq")
    for norm, again in zip(params.norms, quantized_norms(exported).params.norms, strict=True):
        for side in ("input", "output"):
            wanted, found = (getattr(spec, side) for spec in (norm.spec, again.spec))
            steps = (p.channel_steps(N).astype(np.float32) for p in (wanted, found))
            np.testing.assert_array_equal(*steps)
            assert (found.dtype, found.zero_point) == (wanted.dtype, wanted.zero_point)


@pytest.mark.parametrize("scale_type", [np.float32, np.float16])
def test_norms_between_quantizers_keep_them(scale_type: Any) -> None:
    block = Block()
    for name in ("s_in", "s_out", "gamma", "beta"):
        block.initializers[name] = np.asarray(block.initializers[name]).astype(scale_type)
    model, q = block.model(), block.codes()
    params = quantized_norms(model).params
    exported = export.quantize_model(model, params, form="qdq")
    onnx.checker.check_model(exported, full_check=True)
    assert operators(exported)["QuantizeLinear"] == operators(exported)["DequantizeLinear"] == 1
    result = export.verify(model, exported, params, Feeds({"q": q}))
    assert result.codes == q.size
    assert result.norms[0].largest <= 1
    if scale_type is np.float32:
        assert result.passed


@pytest.mark.parametrize(
    ("options", "asked", "message"),
    [
        ({}, {"input": "int16"}, "needs opset 21 for codes of int16; the model has 17. Raise it with --opset"),
        (
            {"shape": ("batch", 5, N), "axis": 1, "parameters": (5, N)}, {},
            "no scale a channel where 2 dimensions are normalized together; calibrate with --exponents 0",
        ),
        ({}, {"input": "int6", "exponents": 0}, "no codes of int6; QuantizeLinear has int8, uint8, int16, uint16"),
    ],
)  # fmt: skip
def test_what_quantizers_can_not_express(options: dict[str, Any], asked: dict[str, Any], message: str) -> None:
    model, data = model_with_norms(**options), feeds(1)
    params = calibrate_model(model, Feeds(data), **asked)
    with pytest.raises(ModelError, match=message):
        export.quantize_model(model, params, form="qdq")


def test_a_norm_by_itself_has_no_such_form() -> None:
    with pytest.raises(ModelError, match="no form qdq"):
        export.to_onnx(fxp.plan(fxp.LayerNorm(8), params_of("int8"), params_of("int8")), form="qdq")


def float32_norms(spec: LayerNormSpec, codes: Array) -> list[Array]:
    """Return the norm before its rounding, less the zero point, in float32: two sums, two variances, a reciprocal."""
    n, single = np.float32(spec.n), np.float32
    centred = spec.kind is NormKind.LAYERNORM
    x = (codes.astype(np.int32) - spec.input.zero_point).astype(single) * spec.input.channel_steps(spec.n).astype(
        single
    )
    gamma, beta, eps = (np.asarray(values, dtype=single) for values in (spec.gamma, spec.beta, spec.eps))
    step = spec.output.channel_steps(spec.n).astype(single)

    def in_turn(values: Array) -> Array:
        return np.add.accumulate(values, axis=1, dtype=single)[:, -1:]

    results = []
    for total in (in_turn, lambda values: values.sum(axis=1, keepdims=True, dtype=single)):
        mean = total(x) / n if centred else single(0)
        d = x - mean
        for variance in (total(d * d) / n, total(x * x) / n - mean * mean):
            with np.errstate(divide="ignore", invalid="ignore"):  # rounding may leave a variance below -eps
                results.append((d / np.sqrt(variance + eps) * gamma + beta) / step)
                results.append((d * (single(1) / np.sqrt(variance + eps)) * gamma + beta) * (single(1) / step))
    return results


@pytest.mark.parametrize("kind", list(NormKind))
@pytest.mark.parametrize("n", [4, 64, 768])
@pytest.mark.parametrize("types", [("int8", "int8"), ("int16", "int8"), ("uint16", "int16")])
def test_no_float32_norm_is_beyond_the_bound(kind: NormKind, n: int, types: tuple[str, str]) -> None:
    spec = fxp.plan(layer_of(kind, n), params_of(types[0]), params_of(types[1]))
    draws = (adversarial(spec.input, n), noise(spec.input, n, 10), typical(spec.input, n, 10))
    codes = np.concatenate(draws)
    value, error = float32_norm(spec, [codes])
    for result in float32_norms(spec, codes):
        known = np.isfinite(error)
        off = np.abs(result.astype(np.float64) + spec.output.zero_point - value)
        assert np.all(off[known] <= error[known])
    assert np.isfinite(error[-20:]).all()  # on rows as they are, something is known


def test_a_norm_that_is_off_by_one_is_seen() -> None:
    spec = fxp.plan(layer_of(NormKind.LAYERNORM, 768), params_of("int8"), params_of("int8"))
    codes = typical(spec.input, 768, 20)
    right = np.clip(np.rint(fxp.reference.ideal(spec, codes)), -128, 127).astype(np.int8)
    assert not beyond_float32(spec, [codes], right).any()
    assert beyond_float32(spec, [codes], np.minimum(right, 126) + 1).mean() > 0.9


def test_verification_fails_where_no_float32_norm_would_go() -> None:
    model = model_with_norms()
    params = calibrate_model(model, Feeds(feeds()))
    exported = export.quantize_model(model, params, form="qdq")
    beta = next(tensor for tensor in exported.graph.initializer if tensor.name == "norm1/beta")
    step = params.norms[1].spec.output.channel_steps(N)
    beta.CopyFrom(numpy_helper.from_array((numpy_helper.to_array(beta) + 0.6 * step).astype(np.float32), beta.name))
    result = export.verify(model, exported, params, Feeds(feeds()))
    assert not result.passed
    first, second = result.norms
    assert (first.passed, second.passed) == (True, False)
    assert second.largest == 1
    assert 0 < (second.beyond or 0) <= second.mismatches
    assert (len(first.differences), len(second.differences)) == (0, 5)  # what a float32 norm gives is none
    assert second.stage is None


def test_onnx_reference_passes_too() -> None:
    """Another float norm than ONNX Runtime's, by its results."""
    model = model_with_norms(opset=21, ir_version=10)
    params = calibrate_model(model, Feeds(feeds()))
    exported = export.quantize_model(model, params, form="qdq")
    probe = export.probe(exported)
    names = [value.name for value in probe.graph.output]
    results = [dict(zip(names, run_reference(probe, feed), strict=True)) for feed in feeds()]
    assert export.verify(model, exported, params, Feeds(feeds()), results=Feeds(results)).passed


def test_command_line(tmp_path: Path) -> None:
    onnx.save(model_with_norms(), tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for index, feed in enumerate(feeds()):
        np.savez(tmp_path / "data" / f"{index}.npz", **feed)

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    files = [tmp_path / name for name in ("model.onnx", "out.onnx", "params.json")]
    model, out, params = files
    run("calibrate", model, "--data", tmp_path / "data", "-o", params)
    assert run("export", model, params, "-o", out, "--form", "qdq")["replaced"] == 2
    document = run("verify", *files, "--data", tmp_path / "data")
    assert document["passed"]
    assert all(norm["beyond"] == 0 for norm in document["norms"])
    assert document["exact"] == (sum(norm["mismatches"] for norm in document["norms"]) == 0)


#: Two blocks whose norms follow sums; the first sum goes on to the second block.
SUMS = "h = Mul(x, weight) t = Tanh(h) s0 = Add(h, t) " + spelled(NODE, "s0", "o")
SUMS += "n1 = Tanh(o) s1 = Add(s0, n1) " + spelled(NODE, "s1", "y", 1)


@pytest.mark.parametrize("exponents", [0, 7])
def test_sums_before_float_norms(exponents: int) -> None:
    model = model_of(SUMS, opset=21)
    params = calibrate_model(model, Feeds(data()), fuse_residual=True, exponents=exponents)
    assert [entry.spec.sum_output is not None for entry in params.norms] == [True, False]
    exported = export.quantize_model(model, params, form="qdq")
    onnx.checker.check_model(exported, full_check=True)
    # both operands, the output, and the sum that is read elsewhere
    assert operators(exported)["QuantizeLinear"] == operators(exported)["DequantizeLinear"] == 3 + 1 + 3
    assert operators(exported)["Add"] == operators(model)["Add"]
    result = export.verify(model, exported, params, Feeds(data()))
    assert result.passed
    assert result.codes == sum(3 * feed["x"].size for feed in data())
    assert all(check.beyond == 0 and check.largest <= 1 for check in result.norms)
    assert all(output.cosine > 0.999 for output in result.outputs)
    # what is written is a model that is quantized already, whose norms add with the same parameters
    for entry, again in zip(params.norms, quantized_norms(exported, fuse_residual=True).params.norms, strict=True):
        for wanted, found in zip(entry.spec.operands, again.spec.operands, strict=True):
            steps = [side.channel_steps(N).astype(np.float32) for side in (wanted, found)]
            np.testing.assert_array_equal(steps[0], steps[1])
        assert (again.spec.sum_output is None) == (entry.spec.sum_output is None)


def test_a_sum_that_no_float32_gives_fails() -> None:
    model = model_of(SUMS, opset=21)
    params = calibrate_model(model, Feeds(data()), fuse_residual=True)
    exported = export.quantize_model(model, params, form="qdq")
    place = export.exported_norms(export.load_model(exported))[0]
    probe = export.probe(exported)
    names = [value.name for value in probe.graph.output]
    results = [dict(zip(names, run_onnxruntime(probe, feed), strict=True)) for feed in data()]
    assert export.verify(model, exported, params, Feeds(data()), results=Feeds(results)).passed
    assert place.codes_sum is not None
    for change in (place.codes_sum, place.residual or ""):
        wrong = [{**arrays, change: arrays[change] ^ 2} for arrays in results]
        found = export.verify(model, exported, params, Feeds(data()), results=Feeds(wrong))
        assert not found.passed
        assert (found.norms[0].beyond or 0) > 0


def test_the_sum_of_16_bits_needs_its_opset() -> None:
    model = model_of(SUMS)
    params = calibrate_model(model, Feeds(data()), fuse_residual=True)
    with pytest.raises(ModelError, match="needs opset 21 for codes of int16; the model has 17"):
        export.quantize_model(model, params, form="qdq")
    assert export.quantize_model(model, params, form="qdq", opset=21).opset_import[0].version == 21
