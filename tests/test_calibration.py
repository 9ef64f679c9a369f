"""Calibration: ranges, choices, streams, and what is said of bad data."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx_models import N, feeds, model_with_norms
from rows import DTYPES

import fxp_layernorm as fxp
from fxp_layernorm import DataError, DType, InputError, export
from fxp_layernorm.calibration import (
    CalibrationOptions,
    Method,
    ModelCalibration,
    NormCalibration,
    SideOptions,
    calibrate,
    calibrate_model,
    search,
)
from fxp_layernorm.calibration.engine import LocalEngine
from fxp_layernorm.runtime import Feeds, Session

RNG = np.random.default_rng(0)


def samples(n: int = 48, rows: int = 300) -> np.ndarray[Any, np.dtype[np.float64]]:
    x = np.random.default_rng(3).normal(size=(rows, n))
    x[:, 5] *= 30
    x[:, 7] += 4
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponents", [0, 3, 7])
def test_minmax_scales_hold_every_value(dtype: DType, exponents: int) -> None:
    x = samples()
    tried = list(search.candidates(SideOptions(dtype, method="minmax", exponents=exponents), x.min(0), x.max(0)))
    for params in tried:
        error = np.abs(params.dequantize(params.quantize(x)) - x)
        step = params.scale * np.exp2(params.channel_exponents(48))
        # half a step, and the zero point's rounding at the ends
        assert (error <= step * 1.01).all()
        assert max(params.channel_exponents(48)) <= exponents
        assert np.float32(params.scale) == params.scale  # a float32 border has the very same scale
    assert len(tried) == (1 if exponents == 0 else 8)


def test_exponents_are_the_smallest_that_hold_a_channel() -> None:
    x = samples()
    for symmetric in (True, False):
        side = SideOptions("int8", method="minmax", symmetric=symmetric)
        width = 2 * np.abs(x).max(0) if symmetric else np.maximum(x.max(0), 0) - np.minimum(x.min(0), 0)
        for params in search.candidates(side, x.min(0), x.max(0)):
            reach = params.scale * (254 if symmetric else 255) * np.exp2(np.array(params.channel_exponents(48)) - 1.0)
            smaller_would_do = (reach >= width * 1.001) & (np.array(params.channel_exponents(48)) > 0)
            assert not smaller_would_do.any()


def test_mse_is_never_worse_than_minmax_on_its_samples() -> None:
    layer, x = fxp.LayerNorm(48), samples()
    for exponents in (0, 7):
        noise = {}
        for method in (Method.MINMAX, Method.MSE):
            spec = calibrate(layer, x, method=method, exponents=exponents)
            seen = spec.input.dequantize(spec.input.quantize(x))
            noise[method] = float(np.sum(np.square(layer(seen.astype(np.float64)) - layer(x))))
        assert noise[Method.MSE] <= noise[Method.MINMAX]


def test_exponents_serve_outlier_channels() -> None:
    layer, x = fxp.LayerNorm(48), samples()
    noise = []
    for exponents in (0, 7):
        norm = fxp.FxpLayerNorm(calibrate(layer, x, exponents=exponents))
        noise.append(float(np.mean(np.square(norm.forward(x) - layer(x)))))
    assert noise[1] * 9 < noise[0]


def test_defaults_by_width() -> None:
    x = samples()
    assert calibrate(fxp.LayerNorm(48), x).input.exponents is not None
    wide = calibrate(fxp.LayerNorm(48), x, "int16", "int16")
    assert wide.input.exponents is None
    assert wide.output.exponents is None


def test_stream_gives_the_same_spec_as_one_array() -> None:
    x = samples().astype(np.float32)
    whole = calibrate(fxp.LayerNorm(48), x)
    assert calibrate(fxp.LayerNorm(48), iter(np.array_split(x, 9))) == whole
    assert calibrate(fxp.LayerNorm(48), x.tolist()).normalized_shape == (48,)
    assert calibrate(fxp.LayerNorm(48), [x[:100], x[100:]]) == whole


@pytest.mark.parametrize("value", [0.0, 3.25, -2.0, 1e-30, 1e30])
def test_constant_samples(value: float) -> None:
    """Constant rows have no variance: the output is that of beta, whatever the scale."""
    layer = fxp.LayerNorm(8)
    layer.bias = np.linspace(-1, 1, 8)
    x = np.full((5, 8), value)
    norm = fxp.FxpLayerNorm(calibrate(layer, x))
    step = norm.spec.output.scale * 2.0 ** max(norm.spec.output.channel_exponents(8))
    np.testing.assert_allclose(norm.forward(x), layer(np.zeros((5, 8))), atol=(0.5 + norm.spec.excess) * step)


def test_inputs_far_below_eps_still_plan() -> None:
    layer = fxp.LayerNorm(64, eps=1e-2)
    x = RNG.normal(size=(50, 64)) * 1e-9
    norm = fxp.FxpLayerNorm(calibrate(layer, x, "int16", "int16"))
    step = norm.spec.input.scale / np.sqrt(1e-2)  # what one LSB of the input moves the output by
    assert step < 1e-7
    np.testing.assert_allclose(norm.forward(x), layer(x), atol=step + norm.spec.output.scale)


def test_several_normalized_dimensions() -> None:
    layer = fxp.LayerNorm((4, 12))
    x = samples().reshape(300, 4, 12)
    norm = fxp.FxpLayerNorm(calibrate(layer, x))
    assert norm.forward(x).shape == x.shape
    assert float(np.mean(np.square(norm.forward(x) - layer(x)))) < 1e-3


def test_dimensions_that_are_not_the_last() -> None:
    """As the channels of (batch, channels, height, width): the same rows give the same parameters and noise."""
    x = samples(48, 300).reshape(3, 10, 10, 48)
    last, first = fxp.LayerNorm(48), fxp.LayerNorm(48, axes=-3)
    for layer in (last, first):
        layer.weight = np.linspace(0.5, 2, 48)
    channels_first = np.moveaxis(x, -1, 1)
    ours, theirs = NormCalibration(first), NormCalibration(last)
    ours.observer.update(channels_first)
    theirs.observer.update(x)
    options = CalibrationOptions()
    spec = ours.spec(options)
    assert (spec.input, spec.output) == (theirs.spec(options).input, theirs.spec(options).output)
    assert ours.sqnr_db(spec) == theirs.sqnr_db(theirs.spec(options))
    assert fxp.FxpLayerNorm(spec).forward(channels_first).shape == channels_first.shape


def test_exponents_that_clip_where_it_pays() -> None:
    """A channel with one rare spike is better off with finer steps for all its other values."""
    x = np.random.default_rng(0).normal(size=(600, 48))
    x[5, 7] = 60
    layer = fxp.LayerNorm(48)
    noise, reach = {}, {}
    for method in ("minmax", "mse"):
        params = calibrate(layer, x, method=method).input
        errors = params.dequantize(params.quantize(x)) - x
        noise[method] = float(np.mean(np.square(np.delete(errors, 5, axis=0))))
        reach[method] = float((params.hi - params.channel_zeros(48)[7] + 0.5) * params.channel_steps(48)[7])
    assert reach["minmax"] >= 60 > reach["mse"]
    assert noise["mse"] < noise["minmax"]


def test_channels_own_scales_are_as_wide_as_other_rows_need() -> None:
    """Even values never go beyond what was seen by much, those with heavy tails do; and few rows tell neither."""
    rng, layer = np.random.default_rng(5), fxp.LayerNorm(64)
    drawn = {"even": rng.uniform(-1, 1, size=(1024, 64)), "heavy": rng.standard_t(3, size=(1024, 64))}
    width = {}
    for name, x in (*drawn.items(), ("few", drawn["heavy"][:100])):
        calibration = NormCalibration(layer)
        calibration.observer.update(x)
        seen, output = calibration.observer.output.ranges, calibration.spec(CalibrationOptions()).output
        width[name] = float(np.median(255 * output.channel_steps(64) / (seen.high - seen.low)))
    assert width["few"] == pytest.approx(1.25)
    assert 1 <= width["even"] < width["few"] < width["heavy"] <= 2


def test_scales_by_default() -> None:
    def scales(*types: str, **options: Any) -> tuple[str, str]:
        chosen = CalibrationOptions.of(*types, **options)
        assert (chosen.input.exponents > 0) == (chosen.input.scales == "exponents")
        return chosen.input.scales.value, chosen.output.scales.value

    assert scales() == scales("uint8", "uint8", exponents=3) == ("exponents", "channel")
    assert CalibrationOptions() == CalibrationOptions.of()
    assert scales(method="minmax") == scales(output_method="entropy") == ("exponents", "exponents")
    assert scales("int16", "int16") == scales(exponents=0) == ("tensor", "tensor")
    assert scales("int16", "int8", method="mse") == ("tensor", "channel")
    assert scales("int16", "int16", exponents=7) == scales(scales="exponents") == ("exponents", "exponents")
    assert scales(exponents=0, output_scales="channel") == ("tensor", "channel")
    assert scales(exponents=5, input_scales="channel", output_scales="exponents") == ("channel", "exponents")


@pytest.mark.parametrize("method", list(Method))
def test_a_scale_for_each_channel(method: Method) -> None:
    layer, x = fxp.LayerNorm(48), samples()
    layer.weight = np.geomspace(0.05, 3, 48)
    spec = calibrate(layer, x, method=method, scales="channel")
    for params in (spec.input, spec.output):
        assert params.channel_scales is not None
        assert params.exponents is None
    norm = fxp.FxpLayerNorm(spec)
    noise = np.square(norm.forward(x) - layer(x)).mean()
    assert noise < np.square(fxp.FxpLayerNorm(calibrate(layer, x, exponents=0)).forward(x) - layer(x)).mean()
    codes = norm.quantize(x)
    np.testing.assert_array_equal(norm(codes[:5]), fxp.reference.run(spec, codes[:5]))


@pytest.mark.parametrize("method", list(Method))
def test_every_method_on_skewed_values(method: Method) -> None:
    """Zero points are the middle where asked; one scale for skewed values is better off without that."""
    layer = fxp.LayerNorm(48)
    layer.bias = np.full(48, 4.0)
    x = np.random.default_rng(1).exponential(size=(400, 48)) + 1
    noise = []
    for symmetric in (True, False):
        spec = calibrate(layer, x, method=method, exponents=0, symmetric=symmetric)
        assert (spec.input.zero_point == 0) == symmetric
        assert (spec.output.zero_point == 0) == symmetric
        noise.append(float(np.mean(np.square(fxp.FxpLayerNorm(spec).forward(x) - layer(x)))))
    assert noise[1] < noise[0]
    noise = []
    for symmetric in (True, False):
        spec = calibrate(layer, x, method=method, exponents=3, symmetric=symmetric)
        for params in (spec.input, spec.output):
            assert params.zero_point == 0 if symmetric else isinstance(params.zero_point, tuple)
        noise.append(float(np.mean(np.square(fxp.FxpLayerNorm(spec).forward(x) - layer(x)))))
    assert noise[1] < noise[0]


def test_divergence_is_that_of_the_lost_detail() -> None:
    """Values spread evenly over all codes lose nothing; the narrower the codes, the more of them is clipped."""
    values = ((np.arange(256 * 8) + 0.5) / 8 - 128.5)[:, None] / 16
    assert search.divergence(fxp.QuantParams("int8", 1 / 16), values) == 0
    clipped = [search.divergence(fxp.QuantParams("int8", 1 / step), values) for step in (20, 32, 1600)]
    assert 0 < clipped[0] < clipped[1] < clipped[2]


def test_channel_costs_are_the_weighted_squares_of_the_errors() -> None:
    x = samples()
    weights = np.random.default_rng(0).uniform(size=x.shape)
    sample = search.Sample(x, weights, np.zeros(len(x), dtype=np.int64))
    for params in search.candidates(SideOptions("int8", exponents=3), x.min(0), x.max(0)):
        errors = params.dequantize(params.quantize(x)) - x
        exact = (weights * np.square(errors)).sum(axis=0)
        costs = sample.channel_cost(params)
        # float32 values are off by up to 2**-24 of the largest, and so are their errors
        slack = np.abs(x).max() * 2.0**-22
        assert (np.abs(np.sqrt(costs / costs.sum() * exact.sum()) - np.sqrt(exact)) <= slack * len(x)).all()


def test_model_observes_what_the_arrays_hold() -> None:
    model, data = model_with_norms(), feeds()
    params = calibrate_model(model, Feeds(data))
    for norm, entry in zip(export.find_norms(export.load_model(model)), params.norms, strict=True):
        session = Session(export.load_model(model), [norm.input])
        assert norm.layer is not None
        arrays = [session.run(feed)[norm.input] for feed in data]
        spec = calibrate(norm.layer, arrays)
        # the model's own float32 output may differ from the layer's float64 in the last bit, and so the output scale
        assert entry.spec.input == spec.input
        assert entry.spec.output.scale == pytest.approx(spec.output.scale, rel=1e-5)
        assert entry.rows == sum(array.size // N for array in arrays)
        assert entry.sqnr_db is not None
        assert 25 < entry.sqnr_db < 60


def test_feeds_are_run_once_and_let_go() -> None:
    alive: list[weakref.ref[Any]] = []
    most = 0

    def stream() -> Iterator[dict[str, Any]]:
        nonlocal most
        for index in range(12):
            x = np.random.default_rng(index).normal(size=(2, 5, N)).astype(np.float32)
            alive.append(weakref.ref(x))
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            yield {"x": x}

    calibration = ModelCalibration(model_with_norms())
    calibration.observe(Feeds(stream), engine=LocalEngine(threads=1))
    assert len(alive) == 12
    assert most <= 3  # one runs, one waits, one is made
    assert calibration.params().feeds == 12


def test_record_of_what_went_in() -> None:
    model, data = model_with_norms(), feeds()
    first, again = (calibrate_model(model, Feeds(data)) for _ in range(2))
    assert first == again
    other = calibrate_model(model, Feeds(data[:2]))
    assert other.data_sha256 != first.data_sha256
    assert other.model_sha256 == first.model_sha256
    norm = first.norms[0]
    assert (norm.input_record.method, norm.output_record.method) == ("mse", "mse")
    assert norm.input_record.exponents == 7
    assert first.versions["onnxruntime"] == onnxruntime.__version__


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(bad: float) -> None:
    x = samples()
    x[17, 3] = bad
    with pytest.raises(
        DataError, match="sample 0: 1 values are NaN or infinite, in 1 channels of which the first is 3"
    ):
        calibrate(fxp.LayerNorm(48), x)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_model_goes_on_without_rows_that_are_not_finite(bad: float) -> None:
    data = feeds()
    clean = calibrate_model(model_with_norms(), Feeds(data))
    data[1]["x"][0, 0, 2] = bad
    params = calibrate_model(model_with_norms(), Feeds(data))
    assert [norm.rows for norm in params.norms] == [norm.rows - 1 for norm in clean.norms]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (([],), DataError, "no row"),
        ((np.zeros((0, 48)),), DataError, "no row"),
        ((np.zeros((3, 47)),), InputError, r"sample 0: .*\(3, 47\).*\(48,\)"),
        ((np.float64(3),), InputError, "sample 0: .*shape"),
        (([np.zeros((2, 48)), np.array(["a"])],), InputError, "sample 1: real values"),
        ((samples(), "int1"), InputError, "int1.*int8, uint8, int16, uint16"),
        ((samples(), "int8", "float32"), InputError, "float32"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        calibrate(fxp.LayerNorm(48), *arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [({"method": "best"}, "minmax, .*mse"), ({"exponents": -1}, "from 0 to 15"), ({"exponents": 16}, "from 0 to 15"),
     ({"exponents": 2.5}, "from 0 to 15"), ({"scales": "row"}, "tensor, exponents, channel"),
     ({"scales": "exponents", "exponents": 0}, "above 0"), ({"scales": "channel", "exponents": 3}, "neither side"),
     ({"lane": 48}, "24, 32, 64")],
)  # fmt: skip
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        calibrate(fxp.LayerNorm(48), samples(), **options)


def test_values_beyond_float32_are_refused() -> None:
    with pytest.raises(DataError, match="beyond float32's range"):
        calibrate(fxp.LayerNorm(48), samples() * 1e45)


def test_norm_without_eps_of_constant_rows() -> None:
    """Their float output is NaN, as in torch; the message says that it is the output."""
    with pytest.raises(DataError, match="in the norm's output, 480 values are NaN"):
        calibrate(fxp.LayerNorm(48, eps=0.0), np.ones((10, 48)))


@pytest.mark.parametrize("samples", [None, 3.0])
def test_samples_that_are_none(samples: Any) -> None:
    with pytest.raises(DataError, match="an array or an iterable of arrays"):
        calibrate(fxp.LayerNorm(48), samples)
