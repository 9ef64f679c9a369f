"""What surrounds the norms: opsets, external data, and files that appear whole or not at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from onnx_models import N, feeds, model_with_norms
from test_decomposed import LAYERNORMS, data_of, model_of

from fxp_layernorm import InputError, ModelError, export
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.cli import main
from fxp_layernorm.runtime import Feeds, Session


def external(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    """Save a model with all its weights in a file of their own."""
    folder.mkdir(exist_ok=True)
    path = folder / "m.onnx"
    saved = onnx.ModelProto()
    saved.CopyFrom(model or model_with_norms())  # saving changes the model
    onnx.save(saved, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return path


def results_of(probe: Path, data: Feeds) -> Feeds:
    """Return what ONNX Runtime makes of a probe, by the names of its outputs."""
    session = Session(export.load_model(probe))
    return Feeds([session.run(feed) for feed in data])


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("form", ["inline", "function"])
@pytest.mark.parametrize("place", ["elsewhere", "beside", "in place"])
def test_external_data_stay_external(tmp_path: Path, form: str, place: str) -> None:
    large = model_with_norms(shape=("batch", "tokens", 512), parameters=(512,))
    data, source = Feeds(feeds(shape=(2, 5, 512))), external(tmp_path / "source", large)
    params = calibrate_model(source, data)
    kept = export.load_model(large)  # read before the file is overwritten
    out = {"elsewhere": tmp_path / "q.onnx", "beside": source.with_name("q.onnx"), "in place": source}[place]
    export.export_model(source, params, out, form=form)
    outside = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(out, load_external_data=False).graph.initializer
        if tensor.data_location == TensorProto.EXTERNAL
    }
    assert {"w0", "w1"} <= outside.keys()
    assert {entry["location"] for entry in outside.values()} == {f"{out.name}.data"}
    assert files_of(out.parent) >= {out.name, f"{out.name}.data"}
    assert not [name for name in files_of(out.parent) if name.startswith(".")]
    onnx.checker.check_model(str(out), full_check=True)
    if place == "elsewhere":
        shutil.rmtree(source.parent)
    assert export.verify(kept, out, params, data).exact
    probe = tmp_path / "probe.onnx"
    export.export_probe(out, probe)
    assert (tmp_path / "probe.onnx.data").stat().st_size > 1024
    assert export.verify(kept, out, params, data, results=results_of(probe, data)).exact


def test_nothing_is_left_of_an_export_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = external(tmp_path / "source")
    params = calibrate_model(source, Feeds(feeds()))
    out = tmp_path / "q.onnx"

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx, "save", full)
    with pytest.raises(InputError, match="No space left"):
        export.export_model(source, params, out)
    assert files_of(tmp_path) == {"source"}


def test_external_data_that_are_missing(tmp_path: Path) -> None:
    source = external(tmp_path / "source")
    (source.parent / "w.bin").unlink()
    with pytest.raises(ModelError, match="external data can't be read"):
        Session(export.load_model(source))


@pytest.mark.slow
def test_model_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    """A table of embeddings that is a hole in a file; memory stays below its size."""
    rows = (1 << 31) // (4 * N) + 1000
    table = TensorProto(name="table", data_type=TensorProto.FLOAT, dims=[rows, N], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(4 * N * rows))):
        table.external_data.add(key=key, value=value)
    model = model_with_norms()
    model.graph.node.insert(0, helper.make_node("Gather", ["table", "ids"], ["rows"]))
    model.graph.node.insert(1, helper.make_node("Add", ["x", "rows"], ["x0"]))
    for node in model.graph.node[2:]:
        node.input[:] = ["x0" if name == "x" else name for name in node.input]
    model.graph.input.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"]))
    model.graph.initializer.append(table)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(4 * N * rows)
    data = Feeds([{**feed, "ids": np.full(feed["x"].shape[1], rows - 1)} for feed in feeds()])
    params = calibrate_model(tmp_path / "m.onnx", data)
    export.export_model(tmp_path / "m.onnx", params, tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx.data").stat().st_size >= 4 * N * rows
    assert (tmp_path / "q.onnx").stat().st_size < 1 << 20
    assert export.verify(tmp_path / "m.onnx", tmp_path / "q.onnx", params, data).exact
    export.export_probe(tmp_path / "q.onnx", tmp_path / "p.onnx")
    results = results_of(tmp_path / "p.onnx", data)
    assert export.verify(tmp_path / "m.onnx", tmp_path / "q.onnx", params, data, results=results).exact


@pytest.mark.parametrize("form", ["inline", "function"])
def test_opset_and_ir_version_are_raised_when_asked(form: str) -> None:
    model = model_of(LAYERNORMS["torch"][0], opset=11, ir_version=6)
    model.metadata_props.add(key="author", value="someone")
    data = Feeds(data_of(2, 5, N))
    params = calibrate_model(model, data)
    with pytest.raises(ModelError, match="11"):
        export.quantize_model(model, params, form="inline")
    exported = export.quantize_model(model, params, form=form, opset=17)
    assert exported.opset_import[0].version == 17
    assert exported.ir_version == 8
    assert {entry.key: entry.value for entry in exported.metadata_props}["author"] == "someone"
    onnx.checker.check_model(exported, full_check=True)
    assert export.verify(model, exported, params, data).exact
    dims = exported.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 5, N]


def test_models_whose_ir_version_has_no_functions() -> None:
    """They get the operators themselves, unless functions are asked for."""
    model, data = model_of(LAYERNORMS["torch"][0], opset=14, ir_version=7), Feeds(data_of(2, 5, N))
    params = calibrate_model(model, data)
    done = export.replace_norms(model, params)
    assert (done.writing.form, len(done.model.functions), done.model.ir_version) == ("inline", 0, 7)
    assert export.verify(model, done.model, params, data).exact
    assert export.replace_norms(model, params, opset=15).writing.form == "function"
    with pytest.raises(ModelError, match=r"needs IR version 8; the model has 7. Leave .* or raise .* with --opset 15"):
        export.quantize_model(model, params, form="function")
    asked = export.quantize_model(model, params, form="function", opset=15)
    assert (asked.ir_version, len(asked.functions)) == (8, 1)


def test_the_ir_version_is_raised_to_that_of_the_models_own_opset() -> None:
    model = model_with_norms(ir_version=7)
    params = calibrate_model(model, Feeds(feeds()))
    with pytest.raises(ModelError, match="or raise the model with --opset 17"):
        export.quantize_model(model, params, form="function")
    assert export.quantize_model(model, params, form="function", opset=17).ir_version == 8


def test_opset_that_cannot_be_had() -> None:
    model = model_with_norms()
    params = calibrate_model(model, Feeds(feeds()))
    for opset in (16, 999):
        with pytest.raises(ModelError, match=f"from the model's 17 to .*, not to {opset}"):
            export.quantize_model(model, params, opset=opset)
    assert export.quantize_model(model, params, opset=17).ir_version == model.ir_version
    odd = model_with_norms()
    odd.graph.node.append(helper.make_node("NoSuchOperator", ["y"], ["z"]))
    with pytest.raises(ModelError, match="can't be raised from 17 to 18: "):
        export.quantize_model(odd, params, opset=18)


def test_opset_is_raised_with_external_data(tmp_path: Path) -> None:
    source, data = external(tmp_path / "source"), Feeds(feeds())
    params = calibrate_model(source, data)
    export.export_model(source, params, tmp_path / "q.onnx", opset=21)
    assert onnx.load(tmp_path / "q.onnx", load_external_data=False).opset_import[0].version == 21
    assert export.verify(source, tmp_path / "q.onnx", params, data).exact


def test_export_says_what_stays_float(tmp_path: Path) -> None:
    model = model_with_norms(3)
    model.graph.node[7].output.extend(["mean"])
    model.graph.output.append(helper.make_tensor_value_info("mean", TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", **feeds(1)[0])
    where = {name: str(tmp_path / name) for name in ("m.onnx", "data.npz", "p.json", "q.onnx")}
    runner = CliRunner()
    calibrated = ["calibrate", where["m.onnx"], "--data", where["data.npz"], "-o", where["p.json"]]
    assert runner.invoke(main, calibrated).exit_code == 0
    arguments = ["export", where["m.onnx"], where["p.json"], "-o", where["q.onnx"]]
    result = runner.invoke(main, arguments)
    assert "its mean or inverse deviation is used" in result.stdout
    assert "2 norms replaced" in result.stderr
    assert "1 stay float" in result.stderr
    document = json.loads(runner.invoke(main, [*arguments, "--json"]).stdout)
    assert document["norms"] == ["norm0", "norm2"]
    assert document["left"] == [{"name": "norm1", "reason": "its mean or inverse deviation is used"}]


def test_initializers_that_others_use_keep_their_values_and_names() -> None:
    """A gamma that feeds a norm, and a product besides."""
    model = model_with_norms(1)
    model.graph.node.append(helper.make_node("Mul", ["y", "gamma0"], ["scaled"]))
    model.graph.output.append(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, None))
    params = calibrate_model(model, Feeds(feeds()))
    exported = export.quantize_model(model, params)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    old = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(kept["gamma0"], old["gamma0"])
    assert "beta0" not in kept
    assert export.verify(model, exported, params, Feeds(feeds())).exact
