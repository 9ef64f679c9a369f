"""The error analysis: its arithmetic is the norm's, its figures add up, and its words follow from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx_models import N, feeds, model_with_norms
from rows import KINDS, LANES, adversarial, exponents_of, layer_of, noise, params_of, typical

import fxp_layernorm as fxp
from fxp_layernorm import DataError, InputError, LayerNormSpec, ModelError, NormKind, reference
from fxp_layernorm.analysis import SCHEMA_VERSION, NormAnalysis, Stage, analyze_model, norms, stages
from fxp_layernorm.analysis.attribution import attribute
from fxp_layernorm.analysis.report import Harm, OutputError
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.runtime import Feeds

Reals = npt.NDArray[np.float64]
FORMATS = [("int8", "int8", 0), ("uint8", "int16", 3), ("int16", "int8", 0), ("int16", "uint16", 4)]


def spec_of(kind: NormKind, input: str, output: str, exponents: int, *, lane: int | None = None, n: int = 48) -> Any:
    of_channels = exponents_of(n, exponents) if exponents else None
    return fxp.plan(layer_of(kind, n), params_of(input, exponents=of_channels), params_of(output), lane=lane)


def real_rows(n: int = 48, count: int = 200, seed: int = 0) -> Reals:
    """Return rows with one channel that is much larger than the others."""
    rows = np.random.default_rng(seed).standard_normal((count, n))
    rows[:, 5] *= 20
    return rows


def calibrated(**options: Any) -> LayerNormSpec:
    return fxp.calibrate(layer_of(NormKind.LAYERNORM, 48), real_rows(), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("input", "output", "exponents"), FORMATS)
def test_with_no_stage_exact_it_is_the_reference(
    kind: NormKind, lane: int, input: str, output: str, exponents: int
) -> None:
    spec = spec_of(kind, input, output, exponents, lane=lane)
    codes = np.concatenate(
        [adversarial(spec.input, 48), noise(spec.input, 48, 20), typical(spec.input, 48, 20)]
    )  # fmt: skip
    rows = spec.input.dequantize(codes)
    assert np.array_equal(spec.input.quantize(rows), codes)
    computed = stages.compute(spec, rows)
    assert np.array_equal(computed.y, reference.run(spec, codes))
    one = reference.row_stages(spec, codes[-1].tolist())
    assert (computed.V[-1, 0], computed.R[-1, 0], computed.D[-1, 0]) == (one.V, one.R, one.D)
    assert computed.t[-1].tolist() == one.t


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane", LANES)
def test_with_all_stages_exact_it_is_the_float_layer(kind: NormKind, lane: int) -> None:
    spec = spec_of(kind, "int8", "int8", 0, lane=lane)
    rows = 3 * real_rows()
    exact = stages.compute(spec, rows, set(Stage)).y.astype(np.float64)
    layer = layer_of(kind, 48)
    expected = layer(rows) / spec.output.scale + spec.output.zero_point
    assert np.allclose(exact, expected, rtol=1e-9, atol=1e-7)
    assert np.allclose(stages.float_layer(spec, rows), expected, rtol=1e-9, atol=1e-9)


def test_a_stage_that_costs_nothing_has_no_term() -> None:
    spec = calibrated(method="minmax")
    attribution = attribute(spec, real_rows())
    for stage in (Stage.INPUT_SATURATION, Stage.OUTPUT_SATURATION):
        assert attribution.term(stage).power_lsb2 == 0
        assert attribution.term(stage).max_change_lsb == 0


@pytest.mark.parametrize("options", [{}, {"exponents": 0}, {"input": "int16", "output": "int16"}, {"lane": 24}])
def test_terms_and_interaction_sum_up_to_the_total(options: dict[str, Any]) -> None:
    rows = real_rows(seed=1)
    spec = calibrated(**options)
    attribution = attribute(spec, rows)
    terms = attribution.terms
    assert sum(term.power_lsb2 for term in terms) + attribution.interaction_lsb2 == pytest.approx(
        attribution.total_lsb2
    )
    assert sum(term.share for term in terms) + attribution.interaction_share == pytest.approx(1)
    error = stages.compute(spec, rows).y - stages.float_layer(spec, rows)
    assert attribution.total_lsb2 == pytest.approx(float(np.square(error).mean()))
    # both saturations meet the same values, and their errors add up as far as Cauchy and Schwarz allow
    ends = [attribution.term(stage).share for stage in (Stage.INPUT_SATURATION, Stage.OUTPUT_SATURATION)]
    assert abs(attribution.interaction_share) < 0.1 + 2 * np.sqrt(np.prod(ends))


def test_what_is_coarse_has_the_largest_term() -> None:
    """Each constructed spec has one stage that is much coarser than all others."""
    rows = real_rows(seed=2)
    spec = calibrated(input="int16", output="int16", lane=64)
    shift = 22
    coarse = {
        Stage.GAMMA: {"G": tuple((G >> shift) << shift for G in spec.G)},
        Stage.BETA: {"B": tuple((B >> spec.s2 + 5) << spec.s2 + 5 for B in spec.B)},
        Stage.EPS: {"E": spec.E + (round(0.2 * spec.n**2 / spec.input.scale**2) << 2 * spec.h)},
        Stage.T: {
            "s1": spec.s1 + 20, "s2": spec.s2 - 2, "G": tuple(G << 18 for G in spec.G),
            "B": tuple(B >> 2 for B in spec.B),
        },
    }  # fmt: skip
    for stage, changed in coarse.items():
        attribution = attribute(dataclasses.replace(spec, **changed), rows)  # type: ignore[arg-type]
        assert attribution.term(stage).share > 0.8, stage
    for stage, options in {
        Stage.INPUT: {"input": "int8", "output": "int16", "exponents": 0},
        Stage.OUTPUT: {"input": "int16", "output": "int8", "method": "minmax"},
    }.items():
        assert attribute(calibrated(**options), real_rows()).term(stage).share > 0.8, stage  # type: ignore[arg-type]
    narrow = fxp.plan(layer_of(NormKind.LAYERNORM, 48), spec.input, fxp.QuantParams("int8", 1.0))
    assert attribute(calibrated(method="minmax"), 3 * rows).term(Stage.INPUT_SATURATION).max_change_lsb > 1
    clipped = dataclasses.replace(narrow.output, scale=0.005)
    saturating = fxp.plan(layer_of(NormKind.LAYERNORM, 48), spec.input, clipped)
    assert attribute(saturating, rows).term(Stage.OUTPUT_SATURATION).share > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("input", "output", "exponents"), FORMATS)
def test_figures_are_those_of_the_definitions(kind: NormKind, input: str, output: str, exponents: int) -> None:
    spec = spec_of(kind, input, output, exponents)
    rows = 3 * real_rows(seed=3)
    analysis = fxp.analyze(spec, rows)
    codes = spec.input.quantize(rows)
    y = reference.run(spec, codes)
    clamped = np.clip(reference.ideal(spec, codes), spec.output.dtype.lo, spec.output.dtype.hi)
    assert analysis.arithmetic.max_lsb == pytest.approx(float(np.abs(y - clamped).max()))
    assert analysis.arithmetic.max_lsb <= analysis.proved_bound_lsb == 0.5 + spec.excess
    real, integer = layer_of(kind, 48)(rows), spec.output.dequantize(y).astype(np.float64)
    assert analysis.sqnr_db == pytest.approx(10 * np.log10((real**2).sum() / ((integer - real) ** 2).sum()), abs=1e-4)
    cosine = (real * integer).sum() / np.sqrt((real**2).sum() * (integer**2).sum())
    assert analysis.cosine == pytest.approx(float(cosine))
    positions = rows / (spec.input.scale * np.exp2(spec.input.channel_exponents(48))) + spec.input.zero_point
    below, above = positions < spec.input.dtype.lo - 0.5, positions > spec.input.dtype.hi + 0.5
    saturation = analysis.input_saturation
    assert (saturation.low, saturation.high, saturation.values) == (below.sum(), above.sum(), rows.size)
    assert sum(analysis.input_histogram.counts) == sum(analysis.output_histogram.counts) == rows.size
    assert sum(analysis.channels.noise_share) == pytest.approx(1)


def test_seen_headroom_is_never_below_the_proved() -> None:
    for kind, (input, output, exponents) in ((kind, entry) for kind in KINDS for entry in FORMATS):
        spec = spec_of(kind, input, output, exponents)
        rows = spec.input.dequantize(adversarial(spec.input, 48))
        for width in fxp.analyze(spec, rows).widths:
            assert 0 <= width.headroom_proved <= width.headroom_seen <= width.bits, width


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("factor", [4, 40, 400])
def test_values_far_beyond_the_codes_are_attributed_to_saturation(lane: int, factor: float) -> None:
    """Their variance exceeds what the proof holds for codes: it must not wrap where the clipping is exact."""
    rows = real_rows()
    spec = calibrated(lane=lane)
    rows[::50, 7] = factor * spec.input.scale * 2.0 ** max(spec.input.channel_exponents(48)) * 127
    free = stages.compute(spec, rows, {Stage.INPUT_SATURATION})
    assert free.V.min() > 0
    analysis = fxp.analyze(spec, rows)
    assert analysis.attribution.term(Stage.INPUT_SATURATION).share > 0.5
    assert abs(analysis.attribution.interaction_share) < 0.5


def q(dtype: str, scale: float, zero_point: int = 0, **options: Any) -> fxp.QuantParams:
    return fxp.QuantParams(dtype, scale, zero_point, **options)


def outside(shape: int | tuple[int, ...] = 48, eps: float = 0.01, **options: Any) -> fxp.LayerNorm:
    layer = fxp.LayerNorm(shape, eps, eps_outside=True, **options)
    layer.weight = 1 + 0.3 * np.random.default_rng(0).standard_normal(layer.normalized_shape)
    return layer


SCALES = np.geomspace(0.05, 1.0, 48)
#: Specs with an input stage, eps outside the root, or both, by what is odd about them.
ODD = {
    "residual": lambda lane: fxp.plan(
        layer_of(NormKind.LAYERNORM, 48), q("int8", 0.5, 3), q("int8", 0.05), residual=q("int16", 0.001), lane=lane
    ),
    "sum output": lambda lane: fxp.plan(
        layer_of(NormKind.RMSNORM, 48), q("int8", 0.5, 3), q("int16", 0.001), residual=q("uint8", 0.3, 100),
        sum_output=q("int8", 0.6, -2), lane=lane,
    ),
    "accumulators": lambda lane: fxp.plan(
        layer_of(NormKind.LAYERNORM, 48), q("int32", 1e-6), q("int8", 0.05), residual=q("int8", 0.01), lane=lane
    ),
    "channel scales": lambda lane: fxp.plan(
        layer_of(NormKind.LAYERNORM, 48), q("int8", 1.0, channel_scales=tuple(SCALES)),
        q("int8", 0.1, channel_scales=tuple(SCALES / 10)), lane=lane,
    ),
    "eps outside": lambda lane: fxp.plan(outside(), q("int8", 0.5), q("int8", 0.05), lane=lane),
    "eps outside, none": lambda lane: fxp.plan(outside(eps=0.0), q("int8", 0.5), q("int8", 0.05), lane=lane),
    "eps outside, residual": lambda lane: fxp.plan(
        outside(eps=3.0), q("int8", 0.5), q("int16", 0.0005), residual=q("int8", 0.1), lane=lane
    ),
    "few codes": lambda lane: fxp.plan(
        layer_of(NormKind.LAYERNORM, 48), q("int5", 2.0, narrow_range=True), q("uint4", 0.5, 8), lane=lane
    ),
}  # fmt: skip


def codes_of(spec: LayerNormSpec, count: int, seed: int = 0) -> list[npt.NDArray[Any]]:
    """Return random codes of each operand, of large and small deviation."""
    rng = np.random.default_rng(seed)
    found = []
    for params in spec.operands:
        reach = (params.hi - params.lo) // 2 * rng.uniform(0.05, 1, (count, 1))
        values = np.rint(rng.uniform(-1, 1, (count, spec.n)) * reach) + params.zero_point
        found.append(np.clip(values, params.lo, params.hi).astype(params.dtype.numpy))
    return found


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", ODD)
def test_odd_specs_are_the_reference_and_the_float_layer(kind: str, lane: int) -> None:
    spec: LayerNormSpec = ODD[kind](lane)
    codes = codes_of(spec, 40)
    # float64, in which every code comes back from its value
    values = [
        (array.astype(np.float64) - params.zero_point) * params.channel_steps(48)
        for array, params in zip(codes, spec.operands, strict=True)
    ]  # fmt: skip
    rows = np.concatenate(values, axis=1)
    for params, array, found in zip(spec.operands, codes, stages.operands(spec, rows), strict=True):
        assert np.array_equal(params.quantize(found), array)
    assert np.array_equal(stages.compute(spec, rows).y, reference.run(spec, *codes))
    one = reference.row_stages(spec, *(array[-1].tolist() for array in codes))
    computed = stages.compute(spec, rows)
    assert computed.u[-1].tolist() == one.u
    assert (computed.V[-1, 0], computed.R[-1, 0], computed.D[-1, 0]) == (one.V, one.R, one.D)

    exact = stages.compute(spec, rows, set(Stage)).y.astype(np.float64)
    assert np.allclose(stages.float_layer(spec, rows), exact, rtol=1e-9, atol=1e-9)
    layer = norms._layer(spec, spec.axes)
    real = layer(np.sum(values, axis=0)) / spec.output.channel_steps(48) + spec.output.zero_point
    assert np.allclose(real, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ODD)
def test_odd_specs_are_analyzed(kind: str) -> None:
    spec: LayerNormSpec = ODD[kind](None)
    rng = np.random.default_rng(0)
    values = [
        rng.standard_normal((60, 48)) * params.channel_steps(48) * min(params.hi / 3, 2e5) for params in spec.operands
    ]  # fmt: skip
    analysis = fxp.analyze(spec, *values)
    found = analysis.attribution
    assert sum(term.power_lsb2 for term in found.terms) + found.interaction_lsb2 == pytest.approx(found.total_lsb2)
    assert [term.stage for term in found.terms] == Stage.of(spec)
    assert analysis.arithmetic.max_lsb <= analysis.proved_bound_lsb
    codes = [params.quantize(array) for params, array in zip(spec.operands, values, strict=True)]
    expected = norms._layer(spec, spec.axes)(np.sum(values, axis=0))
    error = spec.output.dequantize(reference.run(spec, *codes)) - expected
    assert analysis.sqnr_db == pytest.approx(
        10 * np.log10(np.square(expected).sum() / np.square(error).sum()), abs=1e-4
    )
    assert all(width.headroom_seen >= width.headroom_proved - 1e-9 for width in analysis.widths)
    assert (analysis.residual_saturation is not None) == (analysis.residual_histogram is not None) == len(values) - 1
    assert (analysis.sum_saturation is not None) == (spec.sum_output is not None)
    names = {line.name for line in analysis.spec}
    assert ("residual" in names, "u" in names) == (spec.residual is not None, spec.adder is not None)
    arrays = analysis.worst_rows
    replayed = fxp.FxpLayerNorm(spec)(arrays["codes"], residual=arrays.get("residual_codes"))
    row = np.concatenate([arrays[name] for name in ("float", "residual_float") if name in arrays], axis=1)
    error = replayed - stages.float_layer(spec, row)
    assert np.abs(error).max(axis=1).tolist() == pytest.approx([entry.max_lsb for entry in analysis.worst])


def test_the_rounding_of_the_sum_has_a_term() -> None:
    """Two operands of codes alone: with a coarse common scale, all of the noise is that of the sum."""
    spec = ODD["residual"](None)
    assert spec.adder is not None
    adder = dataclasses.replace(
        spec.adder, shift=spec.adder.shift + 9, scale=spec.adder.scale * 512
    )  # fmt: skip
    eps = dict(zip(("h", "E"), (0, 0), strict=True))
    coarse = dataclasses.replace(spec, adder=adder, **eps)  # type: ignore[arg-type]
    values = [params.dequantize(array) for params, array in zip(spec.operands, codes_of(spec, 50), strict=True)]
    rows = np.concatenate(values, axis=1).astype(np.float64)
    shares = {term.stage: term.share for term in attribute(coarse, rows).terms}
    assert max(shares, key=lambda stage: shares[stage]) == Stage.SUM


def test_axes_that_are_not_the_last() -> None:
    layer = outside((4, 6), axes=(-3, -1))
    x = np.random.default_rng(0).standard_normal((5, 4, 3, 6))
    spec = fxp.plan(layer, q("int8", 0.03), q("int8", 0.05))
    analysis = fxp.analyze(spec, [x[:2], x[2:]])
    assert analysis.rows == 15
    error = spec.output.dequantize(fxp.FxpLayerNorm(spec)(spec.input.quantize(x))) - layer(x)
    assert analysis.sqnr_db == pytest.approx(
        10 * np.log10(np.square(layer(x)).sum() / np.square(error).sum()), abs=1e-4
    )
    arrays = analysis.worst_rows
    assert arrays["codes"].shape == (8, 4, 1, 6)
    again = fxp.FxpLayerNorm(spec)(arrays["codes"]) - (layer(arrays["float"]) / 0.05)
    assert np.abs(again).reshape(8, -1).max(axis=1).tolist() == pytest.approx([row.max_lsb for row in analysis.worst])


@pytest.mark.parametrize(
    ("kind", "samples", "residuals", "message"),
    [
        ("residual", np.ones((2, 48)), None, "give its values too"),
        ("eps outside", np.ones((2, 48)), np.ones((2, 48)), "adds no residual"),
        ("residual", np.ones((2, 48)), np.ones((3, 48)), r"shape \(3, 48\); the input has \(2, 48\)"),
        ("residual", [np.ones((2, 48))] * 2, [np.ones((2, 48))], "give its values too"),
        ("residual", [np.ones((2, 48))], [np.ones((2, 48))] * 2, "more residuals than samples"),
    ],
)
def test_bad_residuals(kind: str, samples: Any, residuals: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fxp.analyze(ODD[kind](None), samples, residuals)


def test_outlier_channels_are_named() -> None:
    analysis = fxp.analyze(calibrated(), real_rows())
    (outlier,) = analysis.channels.outliers
    assert outlier.channel == 5
    assert outlier.magnitude > 10
    assert outlier.input_exponent > 0


def test_worst_rows_can_be_replayed() -> None:
    rows = real_rows(seed=4)
    rows[137] *= 40  # clipped
    spec = calibrated()
    analysis = fxp.analyze(spec, [rows[:100], rows[100:]])
    assert (analysis.worst[0].row, analysis.worst[0].sample, analysis.worst[0].sample_row) == (137, 1, 37)
    assert [entry.rms_lsb for entry in analysis.worst] == sorted((e.rms_lsb for e in analysis.worst), reverse=True)
    arrays = analysis.worst_rows
    assert np.array_equal(arrays["float"], rows[arrays["rows"]])
    error = fxp.FxpLayerNorm(spec)(arrays["codes"]) - stages.float_layer(spec, arrays["float"])
    assert np.abs(error).max(axis=1).tolist() == pytest.approx([entry.max_lsb for entry in analysis.worst])


def test_arrays_and_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, spec = real_rows(seed=5), calibrated()
    whole = fxp.analyze(spec, rows.reshape(4, 50, 48))
    monkeypatch.setattr(stages, "BLOCK_ELEMENTS", 48 * 7)
    parts = fxp.analyze(spec, iter([rows[:30], rows[30:30], rows[30:]]))
    assert parts.arithmetic.max_lsb == whole.arithmetic.max_lsb
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    assert parts.attribution.total_lsb2 == pytest.approx(whole.attribution.total_lsb2)
    assert [entry.row for entry in parts.worst] == [entry.row for entry in whole.worst]


def test_distributions_are_from_a_bounded_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "SAMPLED_ELEMENTS", 1)
    analysis = fxp.analyze(calibrated(), real_rows())
    assert analysis.rows == 200
    assert analysis.sampled_rows == analysis.attribution.rows <= norms.SAMPLED_ROWS


def test_suggestions_follow_from_the_numbers() -> None:
    per_tensor = fxp.analyze(calibrated(exponents=0), real_rows())
    first, *_ = per_tensor.suggestions
    assert "exponents up to 3" in first.text
    assert first.command == "spec = fxp.calibrate(layer, samples, input='int8', output='int8', exponents=3)"
    improved = fxp.analyze(calibrated(exponents=3), real_rows())
    assert per_tensor.sqnr_db is not None
    assert improved.sqnr_db is not None
    promised = float(first.text.split("(")[-1].split(" dB")[0])
    assert improved.sqnr_db - per_tensor.sqnr_db > promised - 1  # the output's side gains too

    even = np.random.default_rng(0).standard_normal((200, 48))
    fine = fxp.calibrate(layer_of(NormKind.LAYERNORM, 48, gamma=0, beta=0), even, "int16", "int16")
    assert not fxp.analyze(fine, even).suggestions
    narrow = fxp.plan(layer_of(NormKind.LAYERNORM, 48), params_of("int16"), params_of("int16"), lane=24)
    wide = np.random.default_rng(0).uniform(-7, 7, (200, 48))
    assert any("lane=32" in suggestion.command for suggestion in fxp.analyze(narrow, wide).suggestions)


def test_clipping_is_reported_and_a_range_without_it_suggested() -> None:
    rows = real_rows()
    layer = layer_of(NormKind.LAYERNORM, 48)
    spec = fxp.plan(layer, fxp.QuantParams("int16", 0.01), fxp.QuantParams("int8", 0.01))
    analysis = fxp.analyze(spec, rows)
    assert analysis.output_saturation.clipped > 0.05 * rows.size
    first = analysis.suggestions[0]
    assert f"of channel {analysis.output_saturation.worst_channel}" in first.text
    assert "method='minmax'" in first.command


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ([], DataError, "no row"),
        (np.empty((0, 48)), DataError, "no row"),
        (np.full((2, 48), np.nan), DataError, "sample 0: 96 values are NaN"),
        (iter([np.ones((2, 48)), np.full((2, 48), np.inf)]), DataError, "sample 1: 96 values"),
        (np.ones((2, 47)), InputError, r"\(2, 47\) was given; the last dimensions must be \(48,\)"),
        (np.array(["a"] * 48), InputError, "real values"),
        (np.full((2, 48), 1e200), DataError, "a value is 1e.200, beyond"),
        (5, DataError, "the samples are 5; an array"),
    ],
)
def test_bad_samples(samples: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fxp.analyze(calibrated(), samples)


def test_degenerate_rows() -> None:
    constant = fxp.analyze(calibrated(), np.ones((3, 48)))
    assert constant.arithmetic.max_lsb <= constant.proved_bound_lsb
    single = fxp.plan(fxp.LayerNorm(1), params_of("int8"), params_of("int8"))
    exact = fxp.analyze(single, np.ones((3, 1)))
    assert (exact.sqnr_db, exact.cosine, exact.attribution.total_lsb2) == (None, None, 0)
    for size in (1e30, 5e36):
        huge = fxp.analyze(calibrated(), size * real_rows(count=3))
        assert huge.input_saturation.clipped == 3 * 48
    tiny = fxp.analyze(calibrated(), 1e-40 * real_rows(count=3))
    assert tiny.arithmetic.max_lsb <= tiny.proved_bound_lsb


def test_normalized_shape_of_several_dimensions() -> None:
    x = np.random.default_rng(0).standard_normal((20, 4, 6))
    analysis = fxp.analyze(fxp.calibrate(fxp.LayerNorm((4, 6)), x), x)
    assert analysis.rows == 20
    assert analysis.worst_rows["codes"].shape == (8, 4, 6)


def test_json(tmp_path: Path) -> None:
    analysis = fxp.analyze(calibrated(), real_rows(), name="first")
    analysis.to_json(tmp_path / "r.json")
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["schema_version"] == SCHEMA_VERSION
    assert document["producer"].startswith("fxp-layernorm ")
    fields = {field.name for field in dataclasses.fields(NormAnalysis)} - {"worst_rows"}
    assert set(document) == fields | {"schema_version", "producer"}
    assert document["attribution"]["total_lsb2"] == analysis.attribution.total_lsb2
    assert [term["stage"] for term in document["attribution"]["terms"]] == Stage.of(calibrated())


def test_model() -> None:
    model, data = model_with_norms(), Feeds(feeds())
    params = calibrate_model(model, data, exponents=0)
    steps: list[None] = []
    analysis = analyze_model(model, params, data, advance=lambda: steps.append(None))
    assert len(steps) == 3 + 2 + 1
    assert [norm.name for norm in analysis.norms] == ["norm0", "norm1"]
    assert analysis.norms[0].rows == sum(feed["x"].size // N for feed in feeds())
    assert {entry.norm for entry in analysis.harm} == {"norm0", "norm1"}
    sqnr = [entry.worst.sqnr_db for entry in analysis.harm]
    assert all(value is not None for value in sqnr)
    assert sqnr == sorted(sqnr, key=lambda value: value or 0)
    together = analysis.together.worst.sqnr_db
    assert together is not None
    assert together < min(value for value in sqnr if value is not None) + 1
    assert {output.name for output in analysis.together.outputs} == {"y", "pooled"}
    commands = [suggestion.command for suggestion in analysis.suggestions]
    assert len(set(commands)) == len(commands) > 0
    assert all(command.startswith("fxp-layernorm calibrate MODEL.onnx --data DATA -o ") for command in commands)
    named = analyze_model(model, params, data, model_name="a b.onnx", data_name="seen/", calibration_name="other/")
    assert (named.model, named.data) == ("a b.onnx", "seen/")
    assert "calibrate 'a b.onnx' --data other/ -o PARAMS.json" in named.suggestions[0].command


def test_only_the_norm_of_a_line_is_replaced() -> None:
    """With a norm of 16 bits and one of 8, the one of 8 does the harm."""
    model, data = model_with_norms(), Feeds(feeds())
    coarse, fine = calibrate_model(model, data, exponents=0), calibrate_model(model, data, "int16", "int16")
    mixed = dataclasses.replace(coarse, norms=(fine.norms[0], coarse.norms[1]))
    first, second = analyze_model(model, mixed, data).harm
    assert (first.norm, second.norm) == ("norm1", "norm0")
    assert first.worst.sqnr_db is not None
    assert second.worst.sqnr_db is not None
    assert first.worst.sqnr_db < second.worst.sqnr_db - 20


def test_harm_is_measured_on_as_many_feeds_as_may_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxp_layernorm.analysis.models.HELD_BYTES", 1)
    model, data = model_with_norms(), Feeds(feeds())
    analysis = analyze_model(model, calibrate_model(model, data), data)
    assert (analysis.feeds, analysis.harm_feeds) == (3, 1)


def test_an_output_that_became_nan_is_the_worst() -> None:
    def output(sqnr: float | None, max_abs: float | None) -> OutputError:
        return OutputError(name="y", cosine=1.0, sqnr_db=sqnr, max_abs=max_abs)

    ranked = [output(30.0, None), output(10.0, 1.0), output(20.0, 1.0), output(None, 0.0)]
    assert sorted((ranked[i] for i in (2, 0, 3, 1)), key=lambda entry: entry.severity) == ranked
    assert Harm(norm=None, outputs=(ranked[2], ranked[0])).worst is ranked[0]


def test_bad_models_and_feeds() -> None:
    model, data = model_with_norms(), Feeds(feeds())
    params = calibrate_model(model, data)
    with pytest.raises(ModelError, match="norm1"):
        analyze_model(model_with_norms(1), params, data)
    with pytest.raises(DataError, match="no feed"):
        analyze_model(model, params, Feeds([]))
    bad = feeds(2)
    bad[1]["x"][0, 0, 0] = np.nan
    with pytest.raises(DataError, match="feed 1, norm 'norm0'"):
        analyze_model(model, params, Feeds(bad))
