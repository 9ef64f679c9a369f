"""Scales and formats chosen by the model's outputs, on small models."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import helper
from onnx_models import N, feeds, model_with_norms, run_onnxruntime
from test_adding_norms import skip_feeds, skip_model
from test_bodies import NODE, model_of, norm
from test_bodies import data as bodies_data
from test_residual import BLOCK

from fxp_layernorm import export
from fxp_layernorm.analysis import analyze_model
from fxp_layernorm.analysis.precision import BIT_MOVED_PJ, Format, Target, _hull, energy, measurements, meet_target
from fxp_layernorm.calibration import (
    CalibrationOptions,
    ModelCalibration,
    ModelObjective,
    calibrate_model,
    tune_model,
)
from fxp_layernorm.calibration.simulation import Sides, Simulation
from fxp_layernorm.cli import main
from fxp_layernorm.errors import InputError
from fxp_layernorm.params import ModelParams
from fxp_layernorm.quantization import QuantParams
from fxp_layernorm.runtime import Feeds, Session

OPTIONS = CalibrationOptions()


def calibrated(model: onnx.ModelProto, data: list[dict[str, Any]]) -> tuple[ModelCalibration, ModelParams]:
    calibration = ModelCalibration(model)
    calibration.observe(Feeds(data))
    return calibration, calibration.params(OPTIONS)


def test_outputs_that_the_float_model_cannot_compute_are_not_compared() -> None:
    """A batch whose second item is broken is as good as the first item alone, whatever its codes become."""
    whole = feeds(2)
    for feed in whole:
        feed["x"][1] = np.nan
        feed["x"][1, 0] = np.inf
    alone = [{"x": feed["x"][:1]} for feed in whole]
    model = model_with_norms()
    _, params = calibrated(model, alone)
    choice = {entry.name: Sides.of(entry.spec) for entry in params.norms}
    first, second = (ModelObjective(model, choice, Feeds(data)).measure(choice) for data in (whole, alone))
    # float32 sums may be rounded otherwise in another batch
    assert vars(first) == pytest.approx(vars(second), rel=1e-5)
    assert 0 < first.noise < 1


def names(params: ModelParams) -> list[str]:
    return [norm.name for norm in params.norms]


def outlier_feeds(count: int, seed: int) -> list[dict[str, npt.NDArray[Any]]]:
    """Return feeds whose first token holds an outlier, in a channel that has ordinary values elsewhere."""
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=(2, 12, N)).astype(np.float32) for _ in range(count)]
    for array in arrays:
        array[:, 0, 3] = 300
    return [{"x": array} for array in arrays]


def without_first_token() -> onnx.ModelProto:
    """Return the chain of norms, with the one output ``y[:, 1:]``."""
    model = model_with_norms(2)
    ends = {"starts": [1], "ends": [1 << 30], "axes": [1]}
    for name, value in ends.items():
        model.graph.initializer.append(helper.make_tensor(name, onnx.TensorProto.INT64, [1], value))
    model.graph.node.append(helper.make_node("Slice", ["y", *ends], ["rest"], name="rest"))
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info("rest", onnx.TensorProto.FLOAT, ("batch", "rest", N)))
    return model


@pytest.mark.parametrize("operator", ["LayerNormalization", "RMSNormalization"])
def test_simulation_without_a_choice_is_the_float_model(operator: str) -> None:
    rms = operator == "RMSNormalization"
    if rms:
        pytest.importorskip("onnxruntime", "1.24", reason="the float operator came late to ONNX Runtime")
    model = model_with_norms(operator=operator, bias=not rms, opset=23 if rms else 17, ir_version=10 if rms else 8)
    simulation, session = Simulation(model, ["norm0", "norm1"]), Session(export.load_model(model), threads=1)
    for feed in feeds():
        simulated, real = simulation.run(feed, {}), session.run(feed)
        assert list(simulated) == list(real)
        for name in real:
            np.testing.assert_array_equal(simulated[name], real[name])


@pytest.mark.parametrize("shape", [(N,), (4, 4)])
def test_simulated_codes_are_within_one_of_the_integers(shape: tuple[int, ...]) -> None:
    """Both are within 1/2 + excess of the same real value, where excess is below 1/2."""
    dims: list[str | int | None] = ["batch", "tokens", *shape]
    model = model_with_norms(1, shape=dims, parameters=shape, axis=-len(shape))
    data = [{"x": feed["x"].reshape(*feed["x"].shape[:2], *shape)} for feed in feeds()]
    calibration, params = calibrated(model, data)
    (norm,) = params.norms
    simulation = Simulation(model, ["norm0"])
    integer = export.quantize_model(model, params)
    assert norm.spec.excess < 0.5
    steps = norm.spec.output.channel_steps(N).reshape(shape)
    for feed in data:
        simulated = simulation.run(feed, {"norm0": Sides.of(norm.spec)})["y"] / steps
        codes = run_onnxruntime(integer, feed)[0] / steps
        np.testing.assert_allclose(simulated, np.rint(simulated), atol=1e-4)
        assert np.abs(np.rint(simulated) - np.rint(codes)).max() <= 1
    assert calibration.feeds == len(data)


def test_simulation_of_norms_that_add() -> None:
    """A SkipLayerNormalization is taken apart: what it adds up is rounded, what else it gives is not."""
    node = helper.make_node(
        "SkipLayerNormalization", ["x", "x", "gamma"], ["y", "", "", "sum"], name="skip", domain="com.microsoft",
        epsilon=1e-5,
    )  # fmt: skip
    tensors = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("b", "t", N)) for name in ("x", "y", "sum")]
    gamma = helper.make_tensor("gamma", onnx.TensorProto.FLOAT, [N], np.ones(N))
    graph = helper.make_graph([node], "skip", tensors[:1], tensors[1:], [gamma])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    (feed, *_) = feeds()
    coarse = QuantParams("int8", 0.5)
    result = Simulation(model, ["skip"]).run(feed, {"skip": Sides(coarse)})
    np.testing.assert_array_equal(result["sum"], 2 * feed["x"])
    rounded = coarse.dequantize(coarse.quantize(2 * feed["x"])).astype(np.float64)
    deviation = np.sqrt(rounded.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(result["y"], (rounded - rounded.mean(-1, keepdims=True)) / deviation, atol=1e-5)


def test_tuning_lowers_each_sides_noise() -> None:
    model, data = model_with_norms(), feeds()
    calibration, params = calibrated(model, data)
    objective = ModelObjective(model, names(params), Feeds(data))
    better, tuned = tune_model(calibration, objective, params, OPTIONS)
    assert len(tuned) == 4
    for side, result in tuned.items():
        spec = next(norm.spec for norm in better.norms if norm.name == side.norm)
        assert result.params == (spec.output if side.output else spec.input)
        assert result.noise <= result.noise_before
        assert result.noise == objective.measure(side.choice(result.params)).noise
    assert tune_model(calibration, objective, params, OPTIONS)[0] == better


def test_tuning_clips_outliers_that_the_model_does_not_use() -> None:
    """The first token's outlier keeps the steps of its channel coarse, as the norm's own output shows it."""
    model = without_first_token()
    calibration, params = calibrated(model, outlier_feeds(8, 1))
    objective = ModelObjective(model, names(params), Feeds(outlier_feeds(4, 1)))
    better, _ = tune_model(calibration, objective, params, OPTIONS)
    fresh = ModelObjective(model, names(params), Feeds(outlier_feeds(4, 2)))
    before, after = (
        fresh.measure({norm.name: Sides.of(norm.spec) for norm in each.norms}) for each in (params, better)
    )
    assert after.sqnr_db > before.sqnr_db + 3


def test_chosen_ranges_are_not_tuned() -> None:
    model, data = model_with_norms(), feeds()
    calibration, _ = calibrated(model, data)
    options = CalibrationOptions.of(method="minmax")
    params = calibration.params(options)
    objective = ModelObjective(model, names(params), Feeds(data))
    tuned, _ = tune_model(calibration, objective, params, options)
    assert tuned.norms == params.norms
    assert (tuned.objective, tuned.compared_feeds) == ("model", objective.feeds)


def test_hull_leaves_out_what_a_mixture_beats() -> None:
    rng = np.random.default_rng(3)
    spec: Any = None
    pairs = rng.integers(1, 40, size=(30, 2))
    formats = [Format("int8", "int8", False, float(noise), float(cost), spec, OPTIONS) for noise, cost in pairs]
    hull = _hull(formats)
    assert hull[0].cost_pj == pairs[:, 1].min()
    assert hull[-1].noise == pairs[:, 0].min()
    costs, noises = [each.cost_pj for each in hull], [each.noise for each in hull]
    for each in formats:
        assert each.noise >= np.interp(each.cost_pj, costs, noises)
    slopes = [(a.noise - b.noise) / (b.cost_pj - a.cost_pj) for a, b in itertools.pairwise(hull)]
    assert slopes == sorted(slopes, reverse=True)


def test_target_takes_the_cheapest_that_meets_it() -> None:
    model, data = model_with_norms(), outlier_feeds(3, 5)
    calibration, params = calibrated(model, data)
    objective = ModelObjective(model, names(params), Feeds(data))

    def found(text: str) -> Any:
        return meet_target(calibration, objective, OPTIONS, Target.parse(text))

    cheap = found("sqnr_db=-20")
    assert cheap.met
    assert cheap.chosen == cheap.curve[0]
    middle = found(f"sqnr_db={(cheap.curve[0].quality.sqnr_db + cheap.curve[-1].quality.sqnr_db) / 2}")
    assert middle.met
    assert cheap.chosen.cost_pj < middle.chosen.cost_pj <= cheap.curve[-1].cost_pj
    assert all(point.cost_pj >= middle.chosen.cost_pj for point in middle.curve if middle.target.met(point.quality))
    for entry in middle.params.norms:
        assert entry.spec == middle.chosen.formats[entry.name].spec
        assert entry.input_record.exponents == middle.chosen.formats[entry.name].options.input.exponents
    best = found("sqnr_db=290")
    assert not best.met
    assert best.chosen.quality.sqnr_db == max(point.quality.sqnr_db for point in best.curve)


def residual_stream() -> onnx.ModelProto:
    """Return two norms behind residual adds; the first one's sum goes on to the second."""
    return model_of(BLOCK + norm(NODE, "s0", "o") + "n1 = Tanh(o) s1 = Add(s0, n1) " + norm(NODE, "s1", "y", 1))


@pytest.mark.parametrize("operator", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_simulated_residuals_are_within_one_code_of_the_integers(operator: str) -> None:
    """Both the norm's output and the sum that it shows."""
    inputs = ["x", "skip", "gamma", "beta"] if operator == "SkipLayerNormalization" else ["x", "skip", "gamma"]
    model, data = skip_model(operator, inputs, ["n", "", "", "total"]), skip_feeds()
    model.graph.node[1].op_type = "Identity"  # that shows the norm's own output
    params = calibrate_model(model, Feeds(data), fuse_residual=True)
    (entry,) = params.norms
    assert entry.spec.sum_output is not None
    simulation = Simulation(model, ["norm"], residuals=True)
    for feed in data:
        simulated = simulation.run(feed, {"norm": Sides.of(entry.spec)})
        y, total = run_onnxruntime(export.quantize_model(model, params), feed)
        steps = entry.spec.output.channel_steps(entry.spec.n)
        assert np.abs(np.rint(simulated["y"] / steps) - np.rint(y / steps)).max() <= 1
        codes, exact = (np.rint(values / entry.spec.sum_output.scale) for values in (simulated["total"], total))
        assert np.abs(codes - exact).max() <= 1
        assert not np.array_equal(simulated["total"], simulation.run(feed, {})["total"])


def test_targets_take_residuals_where_that_is_cheaper(tmp_path: Path) -> None:
    model, feeds_ = residual_stream(), bodies_data()
    calibration = ModelCalibration(model, observe_addends=True)
    calibration.observe(Feeds(feeds_))
    objective = ModelObjective(model, calibration.names, Feeds(feeds_), residuals=True)
    done: list[None] = []
    found = meet_target(calibration, objective, OPTIONS, Target.parse("sqnr_db=35"), lambda: done.append(None))
    assert found.met
    assert len(done) == measurements(calibration) == 2 * 12
    assert any(each.residual for each in found.chosen.formats.values())
    for name, each in found.chosen.formats.items():
        entry = next(entry for entry in found.params.norms if entry.name == name)
        assert entry.spec == each.spec
        assert (entry.spec.residual is not None) == each.residual
        assert each.cost_pj == energy(entry.spec, adds_before=True)
    # what is simulated is what the integers do
    verified = export.verify(model, export.quantize_model(model, found.params), found.params, Feeds(feeds_))
    assert verified.exact
    assert verified.outputs[0].sqnr_db == pytest.approx(found.chosen.quality.sqnr_db, abs=1.0)
    # an Add outside counts: the same codes cost more without the residual
    outside = calibration.spec(calibration.names[0], OPTIONS, fuse=False)
    assert energy(outside, adds_before=True) == energy(outside, adds_before=False) + 24 * BIT_MOVED_PJ
    found.params.save(tmp_path / "p.json")
    assert ModelParams.load(tmp_path / "p.json") == found.params
    record = found.params.target
    assert record is not None
    assert (record.chosen, record.curve) == (found.chosen.record(), tuple(each.record() for each in found.curve))
    page = analyze_model(model, found.params, Feeds(feeds_))
    assert page.target == record


@pytest.mark.parametrize(
    ("text", "match"),
    [("cosine", "give one of cosine, sqnr_db, max_lsb"), ("loss=1", "give one of"), ("cosine=high", "give one of"),
     ("cosine=1.0", "above -1 and below 1"), ("max_lsb=0", "above 0"), ("sqnr_db=nan", "above")],
)  # fmt: skip
def test_targets_that_are_none(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        Target.parse(text)


def test_command(tmp_path: Path) -> None:
    onnx.save(model_with_norms(), tmp_path / "model.onnx")
    (tmp_path / "feeds").mkdir()
    for index, feed in enumerate(feeds()):
        np.savez(tmp_path / "feeds" / f"{index}.npz", **feed)

    def run(*extra: str) -> tuple[int, Any, str]:
        arguments = ["calibrate", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "feeds"), "--json"]
        result = click.testing.CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "p.json"), *extra])
        return result.exit_code, json.loads(result.stdout) if result.stdout else None, result.stderr

    code, document, _ = run("--objective", "model")
    assert code == 0
    assert len(document["objective"]["norms"]) == 4
    assert ModelParams.load(tmp_path / "p.json").objective == "model"
    assert run()[0] == 0
    assert ModelParams.load(tmp_path / "p.json") == calibrated(model_with_norms(), feeds())[1]

    code, document, errors = run("--target", "cosine=0.99")
    assert code == 0, errors
    assert document["target"] | {"metric": "cosine", "value": 0.99, "met": True} == document["target"]
    assert document["chosen"]["cosine"] >= 0.99
    assert [point["cost_pj"] for point in document["curve"]] == sorted(point["cost_pj"] for point in document["curve"])
    assert "cosine 0.99" in errors.splitlines()[-1]
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    page = tmp_path / "r.html"
    arguments = ["report", str(tmp_path / "model.onnx"), str(tmp_path / "p.json"), "--data", str(tmp_path / "feeds")]
    result = click.testing.CliRunner().invoke(main, [*arguments, "-o", str(page)])
    assert result.exit_code == 0, result.stderr
    assert "at least 0.99, on" in page.read_text()
    assert json.loads(page.with_suffix(".json").read_text())["target"]["curve"] == document["curve"]

    code, document, errors = run("--target", "sqnr_db=250")
    assert code == 1
    assert document["target"]["met"] is False
    assert errors.splitlines()[-1].startswith("FAILED | ")
    assert "sqnr_db at least 250 is out of reach" in errors
    assert len(ModelParams.load(tmp_path / "p.json").norms) == 2

    assert run("--target", "cosine=2")[0] == 2
    code, _, errors = run("--target", "cosine=0.99", "--asymmetric")
    assert code == 2
    assert "--symmetric or --asymmetric" in errors
