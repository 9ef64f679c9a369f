"""The sweep: what it measures is what the parts measure, the front is what its definition says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import feeds, model_with_norms
from pages import Page
from rows import layer_of

import fxp_layernorm as fxp
from fxp_layernorm import DataError, InputError, ModelError, NormKind
from fxp_layernorm.analysis import Format, Sweep, analyze_model, formats
from fxp_layernorm.analysis.cost import cost
from fxp_layernorm.calibration import Method, calibrate_model
from fxp_layernorm.cli import main
from fxp_layernorm.runtime import Feeds

FEW = formats(["int4", "int8", "int16"], methods=["minmax", "mse"], exponents=[0, 3])


def real_rows() -> Any:
    rows = np.random.default_rng(0).standard_normal((100, 48))
    rows[:, 5] *= 20
    return rows


@pytest.fixture(scope="module")
def of_layer() -> Sweep:
    return fxp.sweep(layer_of(NormKind.LAYERNORM, 48), real_rows(), FEW)


@pytest.fixture(scope="module")
def of_model() -> Sweep:
    return fxp.sweep(model_with_norms(), Feeds(feeds()), FEW[:6])


def test_formats_are_all_combinations_once() -> None:
    assert len(FEW) == 3 * 2 * 2
    assert len(formats()) == 5 * len(Method) * 3
    pairs = formats(["int8", "int8"], ["int8", "uint16"], ["mse"], [0])
    assert [(entry.input, entry.output) for entry in pairs] == [("int8", "int8"), ("int8", "uint16")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inputs": []}, "nothing to try"),
        ({"inputs": ["float16"]}, "float16"),
        ({"outputs": ["int99"]}, "int99"),
        ({"methods": ["best"]}, "best"),
        ({"exponents": [16]}, "16"),
    ],
)
def test_bad_formats(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        formats(**arguments)


def test_a_layer_is_measured_by_its_own_output(of_layer: Sweep) -> None:
    layer, rows = layer_of(NormKind.LAYERNORM, 48), real_rows()
    assert len(of_layer.points) == len(FEW)
    for point in of_layer.points:
        tried = point.format
        spec = fxp.calibrate(layer, rows, tried.input, tried.output, method=tried.method, exponents=tried.exponents)
        error = fxp.FxpLayerNorm(spec).forward(rows) - layer(rows)
        assert point.sqnr_db == pytest.approx(10 * np.log10(np.square(layer(rows)).sum() / np.square(error).sum()))
        assert (point.lanes, point.excess_lsb) == ((spec.lane,), float(spec.excess))
        assert point.cost == cost([(spec, 1)])
        words = f"input='{tried.input.value}', output='{tried.output.value}', method='{tried.method.value}'"
        assert point.command == f"spec = fxp.calibrate(layer, samples, {words}, exponents={tried.exponents})"


def test_cost() -> None:
    """Codes of 8 bits around -5: |u - c| up to 255; of 15 channels V0 is at most 15^2 * 255^2 / 4."""
    layer = fxp.LayerNorm(15)
    spec = fxp.plan(layer, fxp.QuantParams("int8", 0.1, -5), fxp.QuantParams("int16", 0.001), lane=32)
    found = cost([(spec, 10)])
    assert found.bits_moved == 8 + 16
    assert found.row_bits == (15**2 * 255**2 // 4).bit_length()
    u, R, t, G = found.factors
    assert u == 8 + 1
    assert int(spec.row_stage.r_max).bit_length() + 1 == R
    assert t == spec.row_stage.t_max(spec.s1).bit_length() + 1
    assert max(map(abs, spec.G)).bit_length() + 1 == G
    assert found.multiplier == u * R + t * G

    small = fxp.plan(layer, fxp.QuantParams("int4", 1.0), fxp.QuantParams("int4", 1.0), lane=24)
    both = cost([(spec, 10), (small, 30)])
    assert both.bits_moved == (10 * 24 + 30 * 8) / 40
    assert both.row_bits == found.row_bits
    assert both.factors == tuple(map(max, zip(found.factors, cost([(small, 1)]).factors, strict=True)))


def test_a_residual_and_its_sum_are_moved_too() -> None:
    q8, q16 = fxp.QuantParams("int8", 0.05), fxp.QuantParams("int16", 0.001)
    spec = fxp.plan(fxp.LayerNorm(8), q8, q8, residual=q16, sum_output=q8)
    assert cost([(spec, 1)]).bits_moved == 8 + 16 + 8 + 8


def test_the_front(of_layer: Sweep) -> None:
    def figures(point: Any) -> list[float]:
        return [-point.accuracy, point.cost.bits_moved, point.cost.multiplier, point.cost.row_bits]

    accuracy = [point.accuracy for point in of_layer.points]
    assert accuracy == sorted(accuracy, reverse=True)
    assert of_layer.points[0].on_front
    for point in of_layer.points:
        mine = figures(point)
        others = [figures(other) for other in of_layer.points if figures(other) != mine]
        beaten = any(all(x <= y for x, y in zip(other, mine, strict=True)) for other in others)
        equal = [other for other in of_layer.points if figures(other) == mine]
        assert point.on_front is (not beaten and point is min(equal, key=lambda entry: FEW.index(entry.format)))
    assert 1 < len(of_layer.front) < len(of_layer.points)


def test_order_and_threads_make_no_difference(of_layer: Sweep) -> None:
    steps: list[None] = []
    again = fxp.sweep(
        layer_of(NormKind.LAYERNORM, 48), [real_rows()], FEW, workers=1, advance=lambda: steps.append(None)
    )
    assert again == of_layer
    assert len(steps) == len(FEW)


def test_a_model_is_measured_by_its_outputs(of_model: Sweep) -> None:
    model, data = model_with_norms(), Feeds(feeds())
    best = of_model.points[0]
    tried = best.format
    options: dict[str, Any] = {"method": tried.method, "exponents": tried.exponents}
    params = calibrate_model(model, data, tried.input, tried.output, **options)
    together = analyze_model(model, params, data).together.worst
    assert (best.sqnr_db, best.cosine) == (together.sqnr_db, together.cosine)
    assert best.cost == cost([(norm.spec, norm.rows) for norm in params.norms])
    assert best.command.startswith("fxp-layernorm calibrate MODEL.onnx --data DATA -o PARAMS.json --input int8 ")
    assert of_model.data == "3 of 3 feeds"


def test_one_norm_of_a_model() -> None:
    model, data = model_with_norms(), Feeds(feeds())
    (point,) = fxp.sweep(model, data, FEW[-1:], norm="norm1").points
    params = calibrate_model(model, data, "int16", "int16", method="mse", exponents=3)
    assert point.sqnr_db == pytest.approx(params.norms[1].sqnr_db)
    with pytest.raises(ModelError, match="no norm 'norm7'; it has norm0, norm1"):
        fxp.sweep(model, data, FEW, norm="norm7")


def test_axes_that_are_not_the_last() -> None:
    layer, x = fxp.LayerNorm(8, axes=-2), np.random.default_rng(0).standard_normal((30, 8, 5))
    (point,) = fxp.sweep(layer, x, FEW[-1:]).points
    spec = fxp.calibrate(layer, x, "int16", "int16", method="mse", exponents=3)
    error = fxp.FxpLayerNorm(spec).forward(x) - layer(x)
    assert point.sqnr_db == pytest.approx(10 * np.log10(np.square(layer(x)).sum() / np.square(error).sum()))


def test_what_cannot_be_had_is_told(of_layer: Sweep) -> None:
    """A channel 2^15 times the others brings sums of squares beyond 62 bits."""
    rows = real_rows()
    rows[:, 5] *= 2e4
    layer = layer_of(NormKind.LAYERNORM, 48)
    found = fxp.sweep(layer, rows, formats(["int8", "int16"], methods=["minmax"], exponents=[0, 15]))
    (refusal,) = found.refused
    assert refusal.format == Format(
        input=fxp.DType("int16"), output=fxp.DType("int16"), method=Method.MINMAX, exponents=15
    )
    assert "beyond 62 bits" in refusal.reason
    with pytest.raises(InputError, match="no format can be had; the first is refused because"):
        fxp.sweep(layer, rows, [refusal.format])


def test_outputs_that_become_infinite_are_refused() -> None:
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma"], ["n"], name="norm"),
        helper.make_node("Log", ["n"], ["y"]),
    ]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 16]) for name in "xy")
    gamma = onnx.numpy_helper.from_array(np.ones(16, dtype=np.float32), "gamma")
    graph = helper.make_graph(nodes, "log", [x], [y], [gamma])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = [{"x": np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)}]
    with pytest.raises(InputError, match="the output y has NaN or infinite values in one of the two models only"):
        fxp.sweep(model, data, FEW[:1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tried": []}, InputError, "no format to try"),
        ({"workers": 0}, InputError, "workers is 0"),
        ({"norm": "a"}, InputError, "leave `norm` out"),
        ({"lane": 17}, InputError, "the lane is 17"),
        ({"data": np.empty((0, 48))}, DataError, "no row"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = layer_of(NormKind.LAYERNORM, 48)
    with pytest.raises(error, match=message):
        fxp.sweep(layer, **{"data": real_rows(), "tried": FEW[:1], **arguments})


def test_json_and_page(of_layer: Sweep, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    of_layer.to_json(tmp_path / "s.json")
    document = json.loads((tmp_path / "s.json").read_text())
    assert document["schema_version"] == 1
    assert [entry["sqnr_db"] for entry in document["points"]] == [point.sqnr_db for point in of_layer.points]
    of_layer.to_html(tmp_path / "s.html")
    page = Page((tmp_path / "s.html").read_text(encoding="utf-8"))
    words = " ".join(page.text)
    for point in of_layer.front:
        assert point.command in words
    assert page.text.count("yes") == len(of_layer.front)
    shown = of_layer._repr_html_()
    assert shown is not None
    assert Page(Page(shown).attributes[0][2])


def test_command(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    onnx.save(model_with_norms(), tmp_path / "model.onnx")
    np.savez(tmp_path / "feed.npz", **feeds(1)[0])
    start = ["sweep", str(tmp_path / "model.onnx"), "--data", str(tmp_path / "feed.npz")]
    few = ["--input", "int8, int16", "--output", "int8", "--method", "mse", "--exponents", "0,7"]

    def run(*arguments: str, code: int = 0) -> click.testing.Result:
        result = click.testing.CliRunner().invoke(main, [*start, *arguments])
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    page = tmp_path / "sweep.html"
    result = run(*few, "-o", str(page))
    assert "int16 -> int8" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("PASSED | 4 formats tried, ")
    Page(page.read_text(encoding="utf-8"))
    beside = json.loads((tmp_path / "sweep.json").read_text())
    assert json.loads(run(*few, "--json").stdout) == beside
    assert f"calibrate {tmp_path / 'model.onnx'} --data {tmp_path / 'feed.npz'} -o PARAMS.json" in page.read_text()
    one = json.loads(run(*few, "--norm", "norm1", "--lane", "64", "--workers", "1", "--json").stdout)
    assert {tuple(point["lanes"]) for point in one["points"]} == {(64,)}
    assert "--lane 64" in one["points"][0]["command"]

    assert "'int9000'" in run("--input", "int9000", code=2).stderr
    assert "no list of integers" in run("--exponents", "0;7", code=2).stderr
    assert "name it s.html" in run("-o", str(tmp_path / "s.json"), code=2).stderr
