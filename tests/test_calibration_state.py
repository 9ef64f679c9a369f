"""Long calibrations: engines, state files, the record, and what is told of doubtful data."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx_models import N, feeds, model_with_norms
from test_bodies import NODE, model_of, norm
from test_bodies import data as bodies_data

import fxp_layernorm as fxp
from fxp_layernorm import DataError, SpecFileError
from fxp_layernorm.calibration import ModelCalibration, calibrate_model, engine, observation
from fxp_layernorm.params import CalibrationWarning, ModelParams, WarningKind
from fxp_layernorm.runtime import Feeds


def interrupted(data: list[dict[str, Any]], after: int) -> Iterator[dict[str, Any]]:
    yield from data[:after]
    raise KeyboardInterrupt


def save_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observation, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(observation, "SAVE_SHARE", 0.0)


def saved(params: ModelParams, path: Path) -> bytes:
    params.save(path)
    return path.read_bytes()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_any_number_of_threads_gives_the_same_file(threads: int, tmp_path: Path) -> None:
    model, data = model_with_norms(), feeds(6)
    expected = saved(calibrate_model(model, Feeds(data)), tmp_path / "a.json")
    calibration = ModelCalibration(model)
    calibration.observe(Feeds(data), engine=engine.LocalEngine(threads))
    assert saved(calibration.params(), tmp_path / "b.json") == expected


def test_feeds_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, run = threading.Barrier(3, timeout=20), observation.Job.observe

    def together(self: Any, *arguments: Any) -> None:
        barrier.wait()  # none passes before three are here
        run(self, *arguments)

    monkeypatch.setattr(observation.Job, "observe", together)
    calibration = ModelCalibration(model_with_norms())
    calibration.observe(Feeds(feeds(6)), engine=engine.LocalEngine(3))
    assert calibration.feeds == 6


@pytest.mark.parametrize("after", [0, 1, 4])
def test_interrupted_work_goes_on_where_it_stood(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost of what was done before an interrupt, however long ago the file was written."""
    model, data, state = model_with_norms(), feeds(5), tmp_path / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        ModelCalibration(model).observe(Feeds(lambda: interrupted(data, after)), state=state)
    assert state.exists() == (after > 0)

    ran: list[int] = []
    run = observation.Job.observe

    def counted(self: Any, feed: Any, number: int, into: Any) -> None:
        ran.append(number)
        run(self, feed, number, into)

    monkeypatch.setattr(observation.Job, "observe", counted)
    resumed = ModelCalibration(model)
    advanced: list[int] = []
    resumed.observe(Feeds(data), advanced.append, state=state)
    assert sorted(ran) == list(range(after, 5))
    assert sum(advanced) == 5
    expected = saved(calibrate_model(model, Feeds(data)), tmp_path / "a.json")
    assert saved(resumed.params(), tmp_path / "b.json") == expected

    ran.clear()
    again = ModelCalibration(model)
    again.observe(Feeds(data), state=state)
    assert not ran
    assert saved(again.params(), tmp_path / "c.json") == expected


def test_state_is_saved_only_with_all_feeds_up_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later feeds may be done before an earlier one; the file never holds them without it."""
    save_at_once(monkeypatch)
    run, save = observation.Job.observe, observation.StateFile.save
    kept: list[int] = []

    def slow_first(self: Any, feed: Any, number: int, into: Any) -> None:
        time.sleep(0.2 if number % 3 == 0 else 0)
        run(self, feed, number, into)

    def watched(self: Any, observer: observation.ModelObserver) -> None:
        numbers = {int(i) >> 32 for i in observer.norms["norm0"].arrays()["sample._ids"]}
        assert numbers == set(range(observer.feeds))
        kept.append(observer.feeds)
        save(self, observer)

    monkeypatch.setattr(observation.Job, "observe", slow_first)
    monkeypatch.setattr(observation.StateFile, "save", watched)
    monkeypatch.setattr(observation.StateFile, "due", property(lambda self: len(kept) < 2))
    calibration = ModelCalibration(model_with_norms())
    calibration.observe(Feeds(feeds(7)), engine=engine.LocalEngine(3), state=tmp_path / "s.npz")
    assert kept[-1] == 7
    assert len(kept) == 3


def test_state_of_other_data_or_another_model_is_refused(tmp_path: Path) -> None:
    data, state = feeds(3), tmp_path / "state.npz"
    ModelCalibration(model_with_norms()).observe(Feeds(data), state=state)
    with pytest.raises(DataError, match="other data than the first 3 feeds; remove it"):
        ModelCalibration(model_with_norms()).observe(Feeds(data[::-1]), state=state)
    with pytest.raises(DataError, match="other data"):
        ModelCalibration(model_with_norms()).observe(Feeds(data[:2]), state=state)
    with pytest.raises(SpecFileError, match="another model; remove it"):
        ModelCalibration(model_with_norms(3)).observe(Feeds(data), state=state)


def test_state_without_the_addends_is_refused(tmp_path: Path) -> None:
    model = model_of("t = Tanh(x) s = Add(t, x) " + norm(NODE, "s", "y"))
    data, state = Feeds(bodies_data()), tmp_path / "state.npz"
    ModelCalibration(model).observe(data, state=state)
    with pytest.raises(SpecFileError, match="--fuse-residual and --target observe"):
        ModelCalibration(model, observe_addends=True).observe(data, state=state)


def test_what_cannot_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    calibration = ModelCalibration(model_with_norms())
    with pytest.raises(fxp.InputError, match="can't be written"):
        calibration.observe(Feeds(lambda: pytest.fail("the data were read")), state=tmp_path / "no" / "s.npz")


def header_with(path: Path, **changes: Any) -> None:
    with np.load(path) as archive:
        arrays = dict(archive)
    header = {**json.loads(arrays["header"].tobytes()), **changes}
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path, **arrays)


@pytest.mark.parametrize("damage", ["cut", "text", "version", "header", "feeds"])
def test_damaged_states_are_refused(damage: str, tmp_path: Path) -> None:
    data, state = feeds(2), tmp_path / "state.npz"
    ModelCalibration(model_with_norms()).observe(Feeds(data), state=state)
    if damage == "cut":
        state.write_bytes(state.read_bytes()[:-200])
    elif damage == "text":
        state.write_text("not a state")
    elif damage == "version":
        header_with(state, schema_version=99)
    elif damage == "feeds":
        header_with(state, feeds="many")
    else:
        np.savez(state, header=np.zeros(3))
    with pytest.raises(SpecFileError, match=r"state\.npz(?!.*pickle)"):
        ModelCalibration(model_with_norms()).observe(Feeds(data), state=state)


def test_errors_name_the_feed(tmp_path: Path) -> None:
    data = [*feeds(2), {"y": np.zeros(3)}]
    with pytest.raises(DataError, match="feed 2: the data lacks the input 'x'"):
        calibrate_model(model_with_norms(), Feeds(data))


def kinds(warnings: Iterable[CalibrationWarning]) -> set[tuple[str, WarningKind, tuple[int, ...]]]:
    return {(warning.norm, warning.kind, warning.channels) for warning in warnings}


def test_doubtful_data_are_told_by_norm_and_channel(tmp_path: Path) -> None:
    model = model_with_norms()
    gamma = next(tensor for tensor in model.graph.initializer if tensor.name == "gamma1")
    values = onnx.numpy_helper.to_array(gamma).copy()
    values[[2, 9]] = 0
    gamma.CopyFrom(onnx.numpy_helper.from_array(values, "gamma1"))
    data = feeds(3)
    for feed in data:
        feed["x"][..., 5] = 1.5
    data[1]["x"][0, 0, 7] = np.nan
    params = calibrate_model(model, Feeds(data))
    rows = sum(feed["x"].size // N for feed in data) - 1
    found = kinds(params.warnings)
    assert ("norm0", WarningKind.CONSTANT, (5,)) in found
    assert ("norm1", WarningKind.DEAD, (2, 9)) in found
    assert ("norm0", WarningKind.FEW_ROWS, ()) in found
    # a NaN spoils the whole row of its norm, and of those that follow
    assert ("norm0", WarningKind.NOT_FINITE, tuple(range(N))) in found
    texts = [warning.text for warning in params.warnings if warning.norm == "norm0"]
    assert any(f"1 of {rows + 1} rows hold NaN" in text and "left out" in text for text in texts)
    assert [norm.left_out for norm in params.norms] == [1, 1]
    params.save(tmp_path / "p.json")
    assert ModelParams.load(tmp_path / "p.json") == params


def test_noise_of_a_norm_that_adds_its_residual_is_told() -> None:
    """It is that of the model's output, where that is the norm's."""
    model = model_of("h = Mul(x, weight) t = Tanh(h) s = Add(h, t) " + norm(NODE, "s", "y"))
    data = Feeds(bodies_data())
    params = calibrate_model(model, data, fuse_residual=True)
    (entry,) = params.norms
    assert entry.spec.residual is not None
    (output,) = fxp.export.verify(model, fxp.export.quantize_model(model, params), params, data).outputs
    assert entry.sqnr_db == pytest.approx(output.sqnr_db, rel=1e-5)


def test_data_without_doubts() -> None:
    x = np.random.default_rng(0).normal(size=(4, 64, N)).astype(np.float32)
    assert calibrate_model(model_with_norms(), Feeds({"x": x})).warnings == ()


def test_a_norm_with_no_finite_row_is_an_error() -> None:
    x = np.full((2, 5, N), np.nan, dtype=np.float32)
    with pytest.raises(DataError, match="norm 'norm0': all 10 rows hold NaN or infinite values"):
        calibrate_model(model_with_norms(), Feeds({"x": x}))


def test_record_of_ranges_and_samples() -> None:
    model, data = model_with_norms(), feeds()
    params = calibrate_model(model, Feeds(data), method="percentile", percentile=99.9, exponents=0, symmetric=True)
    norm = params.norms[1]
    record = norm.input_record
    assert (record.method, record.exponents, record.symmetric, record.percentile) == ("percentile", 0, True, 99.9)
    assert norm.rows == sum(feed["x"].size // N for feed in data)
    output = np.concatenate([_outputs(model, feed).reshape(-1, N) for feed in data])
    assert norm.output_record.low == pytest.approx(output.min(), rel=1e-6)
    assert norm.output_record.high == pytest.approx(output.max(), rel=1e-6)
    assert set(params.versions) == {"numpy", "onnx", "onnx-ir", "onnxruntime"}
    assert (params.lane, params.hardware, params.fuse_residual, params.objective) == (None, None, False, "norm")


@pytest.mark.parametrize("exponents", [0, 7])
@pytest.mark.parametrize("symmetric", [False, True])
def test_narrow_ranges_and_limits_on_record(symmetric: bool, exponents: int, tmp_path: Path) -> None:
    """No code is the lowest, even of values beyond the range; what was asked for is in the file."""
    data, limits = feeds(), fxp.Hardware(accumulator=48)
    params = calibrate_model(
        model_with_norms(), Feeds(data), narrow_range=True, exponents=exponents, symmetric=symmetric, lane=32,
        hardware=limits, fuse_residual=True,
    )  # fmt: skip
    for entry in params.norms:
        assert entry.input_record.narrow_range is entry.output_record.narrow_range is True
        for side in (entry.spec.input, entry.spec.output):
            assert side.quantize(np.full((1, N), -1e9)).min() == -127
    params.save(tmp_path / "p.json")
    loaded = ModelParams.load(tmp_path / "p.json")
    assert (loaded.lane, loaded.hardware, loaded.fuse_residual) == (32, repr(limits), True)
    named = calibrate_model(model_with_norms(), Feeds(data), hardware=fxp.Hardware.parse("mac32x32-64"))
    assert named.hardware == "mac32x32-64"


def _outputs(model: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    from fxp_layernorm.export import load_model
    from fxp_layernorm.runtime import Session

    return Session(load_model(model)).run(feed)["y"]


@pytest.mark.parametrize("opset", [17, 19])
def test_a_scale_for_each_output_channel_in_the_model(opset: int) -> None:
    model, data = model_with_norms(opset=opset), Feeds(feeds())
    params = calibrate_model(model, data, output_scales="channel")
    assert params.norms[0].output_record.scales == "channel"
    assert params.norms[0].spec.output.channel_scales is not None
    verified = fxp.export.verify(model, fxp.export.quantize_model(model, params), params, data)
    assert verified.exact
    assert all(output.sqnr_db is not None and output.sqnr_db > 30 for output in verified.outputs)


def test_model_hash_is_the_files_own_and_covers_external_data(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", Feeds(feeds())
    onnx.save(model_with_norms(), path)
    assert ModelCalibration(path).model_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    onnx.save(model_with_norms(), path, save_as_external_data=True, location="weights", size_threshold=0)
    before = calibrate_model(path, data)
    weights = bytearray((tmp_path / "weights").read_bytes())
    weights[0] ^= 1
    (tmp_path / "weights").write_bytes(weights)
    after = calibrate_model(path, data)
    assert after.model_sha256 != before.model_sha256
    assert after.data_sha256 == before.data_sha256


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(fxp.InputError, match="local or dask"):
        engine.parse_engine("ray")
    with pytest.raises(fxp.InputError, match="only the engine dask"):
        engine.parse_engine("local", "tcp://localhost:8786")
