"""What verification tells of a consumer that goes wrong: the codes, the first stage, and what has such an effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from onnx_models import N, feeds, model_with_norms, run_onnxruntime, run_reference
from rows import noise
from test_subgraph import spec_of

from fxp_layernorm import DataError, FxpLayerNorm, ModelError, NormKind, export, runtime
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.cli import main
from fxp_layernorm.export.diagnosis import expected_stages, first_difference
from fxp_layernorm.params import ModelParams
from fxp_layernorm.runtime import Feeds

FORMS = pytest.mark.parametrize("form", ["inline", "function"])
Nodes = list[onnx.NodeProto]
Array = npt.NDArray[Any]
Arrays = dict[str, Array]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return model_with_norms()


@pytest.fixture(scope="module")
def params(model: onnx.ModelProto) -> ModelParams:
    return calibrate_model(model, Feeds(feeds()))


def sabotage(exported: onnx.ModelProto, stage: str, between: Callable[[str, str], Nodes]) -> None:
    """Put nodes between a stage of the second norm and what reads it: the calls have the stage's own name last."""
    functions = {function.name: function for function in exported.functions}
    calls = [node for node in exported.graph.node if node.domain == "fxp_layernorm"]
    if calls:
        body: Any = functions[calls[1].op_type]
        changed = body
        if calls[0].op_type == calls[1].op_type:  # a function of its own, as both norms share one
            changed = exported.functions.add()
            changed.CopyFrom(body)
            changed.name += "_sabotaged"
            calls[1].op_type = changed.name
        nodes, name = changed.node, stage
    else:
        nodes, name = exported.graph.node, f"norm1/{stage}"
    index, producer = next((i, node) for i, node in enumerate(nodes) if name in node.output)
    right = f"{name}_right"
    producer.output[list(producer.output).index(name)] = right
    rest = [*nodes]
    del nodes[:]
    nodes.extend([*rest[: index + 1], *between(right, name), *rest[index + 1 :]])


def doubled(source: str, target: str) -> Nodes:
    return [helper.make_node("Add", [source, source], [target])]


def negated(source: str, target: str) -> Nodes:
    twice = f"{target}_twice"  # unsigned integers, which wrap, have no Neg
    return [helper.make_node("Add", [source, source], [twice]), helper.make_node("Sub", [source, twice], [target])]


@FORMS
@pytest.mark.parametrize(
    ("stage", "change"), [("u", negated), *((stage, doubled) for stage in ("S", "Q", "V", "r", "R", "D", "t"))]
)
def test_the_first_stage_that_differs_is_named(
    model: onnx.ModelProto, params: ModelParams, form: str, stage: str, change: Callable[[str, str], Nodes]
) -> None:
    exported = export.quantize_model(model, params, form=form)
    sabotage(exported, stage, change)
    first, second = export.verify(model, exported, params, Feeds(feeds())).norms
    assert (first.mismatches, first.differences, first.stage) == (0, [], None)
    assert second.mismatches > 0
    assert second.stage is not None
    assert (second.stage.stage, second.stage.value) == (stage, f"norm1/{stage}")
    right = second.stage.expected or 0
    assert second.stage.got == (-right if change is negated else 2 * right)
    assert 0 < second.stage.differ <= second.stage.values


@pytest.mark.parametrize(
    ("word", "form", "stage"),
    [
        ("int24", "inline", "S"), ("int24", "function", "r"), ("int24", "function", "t"), ("float24", "inline", "R"),
        ("float24", "function", "D"),
    ],
)  # fmt: skip
def test_stages_of_the_narrow_words_are_named_too(model: onnx.ModelProto, word: str, form: str, stage: str) -> None:
    params = calibrate_model(model, Feeds(feeds()), exponents=0, hardware="carried24")
    exported = export.quantize_model(model, params, form=form, word=word)
    sabotage(exported, stage, doubled)
    check = export.verify(model, exported, params, Feeds(feeds())).norms[1]
    assert check.stage is not None
    assert check.stage.stage == stage
    assert "--word" not in check.stage.hint


def test_the_last_stage_is_named_where_a_gain_differs(model: onnx.ModelProto, params: ModelParams) -> None:
    exported = export.quantize_model(model, params)
    gain = next(tensor for tensor in exported.graph.initializer if tensor.name == "norm1/G")
    gain.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(gain) * 2, gain.name))
    check = export.verify(model, exported, params, Feeds(feeds())).norms[1]
    assert check.stage is not None
    assert check.stage.stage == "y"
    assert "gain, offset, shift and clamp" in str(check.stage)


def test_the_first_codes_that_differ_are_listed(model: onnx.ModelProto, params: ModelParams) -> None:
    exported = export.quantize_model(model, params, form="inline")
    sabotage(exported, "t", doubled)
    check = export.verify(model, exported, params, Feeds(feeds())).norms[1]
    place = export.exported_norms(export.load_model(exported))[1]
    for name in (place.codes_in, place.codes_out):
        exported.graph.output.append(helper.make_tensor_value_info(name, TensorProto.INT8, None))
    *_, codes_in, codes_out = run_onnxruntime(exported, feeds()[0])
    expected = FxpLayerNorm(params.norms[1].spec)(codes_in)
    assert len(check.differences) == 5
    for difference in check.differences:
        assert difference.feed == 0
        where = difference.row, difference.channel
        got, right = (codes.reshape(-1, codes.shape[-1])[where] for codes in (codes_out, expected))
        assert (difference.got, difference.expected) == (got, right)
        assert difference.got != difference.expected


def one_rounded(values: Array) -> Array:
    """Return values of which one is rounded to float16, and differs by more than one."""
    rounded, values = values.astype(np.float16), values.copy()
    where = tuple(np.argwhere(np.abs(rounded.astype(values.dtype) - values) > 1)[0])
    values[where] = rounded[where]
    return values


CARRIERS: dict[str, tuple[str, Callable[[Array], Array], str]] = {
    "32 bits": ("V", lambda v: v.astype(np.int32), "wrapped to 32 bits: the consumer has no 64-bit integers"),
    "saturation": ("V", lambda v: np.minimum(v, 2**31 - 1), "saturated to 32 bits. Words with narrower"),
    "floats": ("V", lambda v: v.astype(np.float32), "rounded to float32: the consumer carries integers in floats"),
    "half floats": ("Q", lambda v: v.astype(np.float16), "rounded to float16"),
    "brain floats": ("Q", lambda v: v.astype(ml_dtypes.bfloat16), "rounded to bfloat16"),
    "rounding": ("R", lambda v: v - 1, "All are off by one"),
    "anything": ("V", lambda v: v * 3, "floats carry integers to 2^24 only. Words with narrower"),
    "anything small": ("r", lambda v: v * 0 + 7, "should be"),
    "unsigned integers": ("u", lambda v: v.astype(np.int64) * 0 + 2**32 - 7, "the first, in row 0, is -7 and"),
    "a division by zero": ("t", lambda v: v / 0.0, "not finite"),
    "one value, as float16 would have it": ("t", one_rounded, "No stage before it differs: see the operators"),
    "another shape": ("S", lambda v: np.repeat(v, 2, axis=-1), "S has 2 values a row; it must have 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CARRIERS)
def test_what_consumers_are_known_to_do_is_told(case: str) -> None:
    stage, change, hint = CARRIERS[case]
    spec = spec_of(NormKind.LAYERNORM, 768, "int8", "int8", 0, None)
    codes = noise(spec.input, 768, 4)
    stages = expected_stages(spec, "int64", [codes])
    got = stages.pop("y")
    with np.errstate(all="ignore"):
        stages[stage] = change(stages[stage])
    found = first_difference(spec, "int64", [codes], got, stages)
    assert found.stage == stage
    assert hint in str(found)
    json.dumps(vars(found), allow_nan=False)


def test_an_optimization_that_goes_when_stages_are_shown(model: onnx.ModelProto, params: ModelParams) -> None:
    """As a consumer's that fuses nodes only where nothing else reads what lies between."""
    right, wrong = (export.quantize_model(model, params, form="inline") for _ in range(2))
    sabotage(wrong, "t", doubled)
    verifier, runs = export.Verifier(wrong, params), runtime.Session(export.load_model(model))
    verifier._model = export.load_model(right)
    verifier.update(feeds()[0], runs.run(feeds()[0]))
    check = verifier.result().norms[1]
    assert check.mismatches > 0
    assert check.stage is not None
    assert check.stage.stage == ""
    assert "the consumer's optimizations" in str(check.stage)


Run = Callable[[onnx.ModelProto, Arrays], list[Array]]


def results_of(exported: onnx.ModelProto, run: Run) -> list[Arrays]:
    """Return what a consumer makes of a model's probe, as a device's results come: by the names of its outputs."""
    probe = export.probe(exported)
    onnx.checker.check_model(probe, full_check=True)
    names = [value.name for value in probe.graph.output]
    return [dict(zip(names, run(probe, feed), strict=True)) for feed in feeds()]


@FORMS
@pytest.mark.parametrize("run", [run_onnxruntime, run_reference])
def test_results_of_other_consumers(model: onnx.ModelProto, params: ModelParams, form: str, run: Run) -> None:
    exported = export.quantize_model(model, params, form=form)
    results = results_of(exported, run)
    checked = export.verify(model, exported, params, Feeds(feeds()), results=Feeds(results))
    assert checked.exact
    assert checked.codes == sum(2 * feed["x"].size for feed in feeds())
    assert all(check.cosine > 0.999 for check in checked.outputs)

    stages = [name for name in results[0] if name.startswith("norm1/") and name.rpartition("/")[2] in ("R", "D", "t")]
    assert len(stages) == 3
    for name in stages:
        results[1][name] = results[1][name] + 1
    results[1]["norm1/codes_out"] = results[1]["norm1/codes_out"] ^ 1
    check = export.verify(model, exported, params, Feeds(feeds()), results=Feeds(results)).norms[1]
    assert check.mismatches == results[1]["norm1/codes_out"].size
    assert check.differences[0].feed == 1
    assert check.stage is not None
    assert check.stage.stage == "R"
    assert "All are off by one" in check.stage.hint


def test_a_quantizer_that_rounds_otherwise_is_no_error_of_the_norm() -> None:
    """OpenVINO's does: codes of values near the middle between two go the other way, and no others may."""
    norm = model_with_norms(1)
    (feed,) = feeds(1)
    params = calibrate_model(norm, Feeds(feed), exponents=0)
    spec = params.norms[0].spec
    step = np.float32(spec.input.scale)
    feed["x"][0, 0] = (np.arange(N, dtype=np.float32) - 7.5) * step  # ties, as far as float32 has them
    exported = export.quantize_model(norm, params)
    place = export.exported_norms(export.load_model(exported))[0]

    def results(codes: Array) -> Feeds:
        q = np.clip(codes + spec.input.zero_point, spec.input.lo, spec.input.hi).astype(np.int8)
        values = {place.codes_in: q, place.codes_out: FxpLayerNorm(spec)(q), place.input or "": feed["x"]}
        return Feeds(values)

    product = np.rint(np.nextafter(feed["x"] * (1 / step), np.float32(np.inf)))
    checked = export.verify(norm, exported, params, Feeds(feed), results=results(product))
    assert checked.norms[0].border_mismatches > 0
    assert (checked.exact, checked.passed, checked.norms[0].border_beyond) == (False, True, 0)
    checked = export.verify(norm, exported, params, Feeds(feed), results=results(np.floor(feed["x"] / step)))
    assert (checked.passed, checked.norms[0].mismatches) == (False, 0)
    assert 0 < checked.norms[0].border_beyond < checked.norms[0].border_mismatches
    assert len(checked.norms[0].border_differences) == 5
    for difference in checked.norms[0].border_differences:
        of = feed["x"].reshape(-1, N)[difference.row, difference.channel]
        assert (difference.side, difference.feed, difference.of) == ("input", 0, of)
        assert difference.got == np.floor(of / step) + spec.input.zero_point
        assert difference.expected == spec.input.quantize(np.array(of))


def test_a_dequantizer_that_subtracts_behind_the_product_is_no_error() -> None:
    """OpenVINO's does where channels have zero points: the last bits differ, and no more may."""
    norm, (feed,) = model_with_norms(1), feeds(1)
    params = calibrate_model(norm, Feeds(feed))
    output = params.norms[0].spec.output
    assert isinstance(output.zero_point, tuple)
    exported = export.quantize_model(norm, params, form="inline")
    place = export.exported_norms(export.load_model(exported))[0]
    (results, *_) = results_of(exported, run_onnxruntime)
    steps, zeros = (values.astype(np.float32) for values in (output.channel_steps(N), output.channel_zeros(N)))
    right = results[place.output or ""]

    def checked(y: Array) -> export.Verification:
        values = {**results, (place.output or ""): y}
        return export.verify(norm, exported, params, Feeds(feed), results=Feeds(values))

    y = results[place.codes_out].astype(np.float32) * steps - zeros * steps
    assert np.any(y != right)
    assert (checked(y).exact, checked(y).passed) == (False, True)
    assert checked(y).norms[0].border_mismatches == np.count_nonzero(y != right)
    assert not checked(right + steps / 1000).passed


def test_floats_that_are_quantized_elsewhere_are_seen_as_they_are() -> None:
    """ONNX Runtime moves a QuantizeLinear before a Transpose, and gives its input as an output of the model wrong."""
    norm = model_with_norms(1)
    last = next(index for index, node in enumerate(norm.graph.node) if node.op_type == "LayerNormalization")
    del norm.graph.node[last + 1 :]
    y = norm.graph.node[last].output[0]
    for tensor in (np.array(0.25, dtype=np.float32), np.array(3, dtype=np.int8)):
        norm.graph.initializer.append(numpy_helper.from_array(tensor, f"to_{tensor.dtype}"))
    norm.graph.node.extend(
        [
            helper.make_node("Transpose", [y], ["turned"], perm=[1, 0, 2]),
            helper.make_node("QuantizeLinear", ["turned", "to_float32", "to_int8"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "to_float32", "to_int8"], ["z"]),
        ]
    )
    del norm.graph.output[:]
    norm.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    params = calibrate_model(norm, Feeds(feeds()))
    assert export.verify(norm, export.quantize_model(norm, params, form="inline"), params, Feeds(feeds())).exact


def test_results_in_wider_types_and_without_stages(model: onnx.ModelProto, params: ModelParams) -> None:
    exported = export.quantize_model(model, params)
    full = results_of(exported, run_onnxruntime)
    codes = [{name: a for name, a in arrays.items() if "/codes_" in name} for arrays in full]
    for dtype in (np.int32, np.float32):
        wide = [{name: array.astype(dtype) for name, array in arrays.items()} for arrays in codes]
        assert export.verify(model, exported, params, Feeds(feeds()), results=Feeds(wide)).exact
    codes[0]["norm1/codes_out"] = codes[0]["norm1/codes_out"] ^ 1
    check = export.verify(model, exported, params, Feeds(feeds()), results=Feeds(codes)).norms[1]
    assert len(check.differences) == 5
    assert check.stage is None


def lacking(results: list[Arrays]) -> None:
    del results[1]["norm1/codes_in"]


def too_few(results: list[Arrays]) -> None:
    results.pop()


def too_many(results: list[Arrays]) -> None:
    results.append(results[0])


def fractions(results: list[Arrays]) -> None:
    results[0]["norm0/codes_out"] = results[0]["norm0/codes_out"] + np.float32(0.5)


def other_shape(results: list[Arrays]) -> None:
    results[0]["norm0/codes_out"] = results[0]["norm0/codes_out"][:, :-1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lacking, "lack 'norm1/codes_in'; write the model that gives it"),
        (too_few, "results of 2 feeds only"),
        (too_many, "more results than feeds, of which there are 3"),
        (fractions, "hold 'norm0/codes_out' in float32, with values that are no int8"),
        (other_shape, "'norm0/codes_out' has the shape"),
    ],
)
def test_results_that_do_not_fit(
    model: onnx.ModelProto, params: ModelParams, change: Callable[[list[Arrays]], None], message: str
) -> None:
    exported = export.quantize_model(model, params)
    results = results_of(exported, run_onnxruntime)
    change(results)
    with pytest.raises(DataError, match=message):
        export.verify(model, exported, params, Feeds(feeds()), results=Feeds(results))


def test_probes_of_other_models() -> None:
    with pytest.raises(ModelError, match="has no integer norms"):
        export.probe(model_with_norms())


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def test_command_line(model: onnx.ModelProto, params: ModelParams, tmp_path: Path) -> None:
    for folder in ("data", "results"):
        (tmp_path / folder).mkdir()
    onnx.save(model, tmp_path / "model.onnx")
    params.save(tmp_path / "params.json")
    onnx.save(export.quantize_model(model, params), tmp_path / "out.onnx")
    for index, feed in enumerate(feeds()):
        np.savez(tmp_path / "data" / f"{index}.npz", **feed)
    arguments = [
        "verify", *(tmp_path / name for name in ("model.onnx", "out.onnx", "params.json")), "--data", tmp_path / "data",
    ]  # fmt: skip
    run(*arguments, "--probe", tmp_path / "probe.onnx")
    probe = onnx.load(tmp_path / "probe.onnx")
    names = [value.name for value in probe.graph.output]
    assert {"norm0/codes_in", "norm0/S", "norm1/t", "y"} <= set(names)
    for index, feed in enumerate(feeds()):
        results = dict(zip(names, run_onnxruntime(probe, feed), strict=True))
        np.savez(tmp_path / "results" / f"{index}.npz", **results)
    arguments += ["--results", tmp_path / "results"]
    run(*arguments)
    results["norm0/t"], results["norm0/codes_out"] = results["norm0/t"] + 1, results["norm0/codes_out"] ^ 1
    np.savez(tmp_path / "results" / "2.npz", **results)
    result = run(*arguments, code=1)
    assert "The first codes that differ" in result.stdout
    assert "t, the normalized value" in " ".join(result.stdout.split())
    first, second = json.loads(run(*arguments, "--json", code=1).stdout)["norms"]
    assert first["stage"]["stage"] == "t"
    assert {"side", "feed", "row", "channel", "expected", "got"} == set(first["differences"][0])
    assert second["stage"] is None
    assert second["differences"] == []
