"""The command line: results, closing lines and exit codes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import N, feeds, model_with_norms

from fxp_layernorm.cli import COMMANDS, main


def run(*arguments: object, code: int = 0) -> click.testing.Result:
    result = click.testing.CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def document(*arguments: object, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code).stdout)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    onnx.save(model_with_norms(), tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for index, feed in enumerate(feeds(shape=(2, 25, N))):  # enough rows that calibrate warns of nothing
        np.savez(tmp_path / "data" / f"{index}.npz", **feed)
    return tmp_path


@pytest.fixture
def calibrated(folder: Path) -> Path:
    run("calibrate", folder / "model.onnx", "--data", folder / "data", "-o", folder / "params.json")
    return folder


@pytest.fixture
def exported(calibrated: Path) -> Path:
    run("export", calibrated / "model.onnx", calibrated / "params.json", "-o", calibrated / "out.onnx")
    return calibrated


def test_inspect(folder: Path) -> None:
    norms = document("inspect", folder / "model.onnx")["norms"]
    assert [norm["name"] for norm in norms] == ["norm0", "norm1"]
    first = {"kind": "layernorm", "form": "LayerNormalization", "axes": [-1], "n": N, "input": "sum0", "output": "h0"}
    assert first.items() <= norms[0].items()
    assert norms[0]["epsilon"] == pytest.approx(1e-5)
    result = run("inspect", folder / "model.onnx")
    assert "LayerNormalization" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("PASSED | 2 norms, 2 can be replaced | ")


def test_whole_way(folder: Path) -> None:
    model, data, params, out = (folder / name for name in ("model.onnx", "data", "params.json", "out.onnx"))
    norms = document("calibrate", model, "--data", data, "-o", params, "--input", "uint8", "--exponents", 3)["norms"]
    assert [norm["name"] for norm in norms] == ["norm0", "norm1"]
    assert all(0 < norm["excess_lsb"] < 0.2 and norm["sqnr_db"] > 20 for norm in norms)
    assert json.loads(params.read_text())["norms"][0]["spec"]["input"]["dtype"] == "uint8"
    for form in ("function", "inline"):
        exported = document("export", model, params, "-o", out, "--form", form)
        assert exported["replaced"] == 2
        assert exported["nodes_added"] == len(onnx.load(out).graph.node) - len(onnx.load(model).graph.node)
        verified = document("verify", model, out, params, "--data", data)
        assert verified["exact"] is True
        assert [(norm["name"], norm["mismatches"]) for norm in verified["norms"]] == [("norm0", 0), ("norm1", 0)]
        assert {check["name"] for check in verified["outputs"]} == {"y", "pooled"}
        assert all(check["cosine"] > 0.999 and check["sqnr_db"] > 25 for check in verified["outputs"])


def test_closing_line_of_verify(exported: Path) -> None:
    arguments = (exported / "model.onnx", exported / "out.onnx", exported / "params.json", "--data", exported / "data")
    codes = sum(2 * feed["x"].size for feed in feeds(shape=(2, 25, N)))
    result = run("verify", *arguments)
    assert result.stderr.splitlines()[-1].startswith(f"PASSED | 2 norms, 0 of {codes:,} codes differ | ")
    model = onnx.load(exported / "out.onnx")
    gain = next(tensor for tensor in model.graph.initializer if tensor.name == "norm0/G")
    gain.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(gain) * 2, gain.name))
    onnx.save(model, exported / "out.onnx")
    result = run("verify", *arguments, code=1)
    assert result.stderr.splitlines()[-1].startswith("FAILED | 2 norms, ")
    assert document("verify", *arguments, code=1)["exact"] is False


def test_calibrating_twice_gives_the_same_file(calibrated: Path) -> None:
    again = calibrated / "again.json"
    run("calibrate", calibrated / "model.onnx", "--data", calibrated / "data", "-o", again)
    assert again.read_bytes() == (calibrated / "params.json").read_bytes()


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no command": (("frobnicate",), "No such command"),
    "no model": (("inspect", "{}/none.onnx"), "none.onnx can't be read: No such file"),
    "not a model": (("inspect", "{}/params.json"), "is not a valid ONNX model"),
    "no data": (("calibrate", "{}/model.onnx", "-o", "{}/p.json"), "--data"),
    "data that is nowhere": (("calibrate", "{}/model.onnx", "--data", "{}/none", "-o", "{}/p.json"), "neither a file"),
    "a lacking input": (
        ("calibrate", "{}/model.onnx", "--data", "{}/lacking.npz", "-o", "{}/p.json"), "lacks the input 'x'"
    ),
    "a wrong rank": (("calibrate", "{}/model.onnx", "--data", "{}/rank.npz", "-o", "{}/p.json"), "takes 3 dimensions"),
    "values that are not finite": (
        ("calibrate", "{}/model.onnx", "--data", "{}/nan.npz", "-o", "{}/p.json"), "NaN or infinite"
    ),
    "a later feed that is not finite": (
        ("verify", "{}/model.onnx", "{}/out.onnx", "{}/params.json", "--data", "{}/partly"),
        "partly/1.npz): the norm 'norm0' reads 'sum0', of which 16 of 160 values are NaN or infinite; verify with data",
    ),
    "a model without norms": (
        ("calibrate", "{}/plain.onnx", "--data", "{}/data", "-o", "{}/p.json"), "no norm that can be replaced"
    ),
    "a type that is none": (
        ("calibrate", "{}/model.onnx", "--data", "{}/data", "-o", "{}/p.json", "--input", "int1"), "int1"
    ),
    "an exponent out of range": (
        ("calibrate", "{}/model.onnx", "--data", "{}/data", "-o", "{}/p.json", "--exponents", "16"), "16"
    ),
    "a folder that is not there": (
        ("calibrate", "{}/model.onnx", "--data", "{}/data", "-o", "{}/none/p.json"), "can't be written: No such file"
    ),
    "a folder in the file's place": (
        ("export", "{}/model.onnx", "{}/params.json", "-o", "{}/data"), "Error: {}/data is a folder; name a file"
    ),
    "parameters that are truncated": (("export", "{}/model.onnx", "{}/cut.json", "-o", "{}/o.onnx"), "cut short"),
    "parameters of a later schema": (
        ("export", "{}/model.onnx", "{}/later.json", "-o", "{}/o.onnx"), "schema version 99"
    ),
    "parameters of another model": (("export", "{}/one.onnx", "{}/params.json", "-o", "{}/o.onnx"), "no norm 'norm1'"),
    "the model as the parameters": (
        ("calibrate", "{}/model.onnx", "--data", "{}/data", "-o", "{}/model.onnx"), "model.onnx is read, and would be"
    ),
    "the data as the parameters": (
        ("calibrate", "{}/model.onnx", "--data", "{}/rank.npz", "-o", "{}/rank.npz"), "rank.npz is read, and would be"
    ),
    "the model as the integer one": (
        ("export", "{}/model.onnx", "{}/params.json", "-o", "{}/data/../model.onnx"), "model.onnx is read, and would be"
    ),
    "the parameters beside the report": (
        ("report", "{}/model.onnx", "{}/params.json", "--data", "{}/data", "-o", "{}/params.html"),
        "params.json is read, and would be",
    ),
    "a feed beside the report": (
        ("report", "{}/model.onnx", "{}/params.json", "--data", "{}/data", "-o", "{}/data/0.html"),
        "0.npz is read, and would be",
    ),
    "the model as the probe": (
        ("verify", "{}/model.onnx", "{}/out.onnx", "{}/params.json", "--data", "{}/data", "--probe", "{}/model.onnx"),
        "model.onnx is read, and would be",
    ),
    "an array beyond memory": (
        ("calibrate", "{}/model.onnx", "--data", "{}/vast.npz", "-o", "{}/p.json"), "vast.npz can't be read"
    ),
    "a word that is none": (("export", "{}/model.onnx", "{}/params.json", "-o", "{}/o.onnx", "--word", "int9"), "int9"),
    "a model that was not exported": (
        ("verify", "{}/model.onnx", "{}/model.onnx", "{}/params.json", "--data", "{}/data"), "has no integer norms"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    onnx.save(model_with_norms(), path / "model.onnx")
    onnx.save(model_with_norms(1), path / "one.onnx")
    plain = model_with_norms(1)
    plain.graph.node[3].CopyFrom(onnx.helper.make_node("Identity", ["sum0"], ["y"]))
    onnx.save(plain, path / "plain.onnx")
    (path / "data").mkdir()
    for index, feed in enumerate(feeds()):
        np.savez(path / "data" / f"{index}.npz", **feed)
    x = feeds(1)[0]["x"]
    for name, feed in {"lacking": {"z": x}, "rank": {"x": x[0]}, "nan": {"x": x * np.float32(np.nan)}}.items():
        np.savez(path / f"{name}.npz", **feed)
    (path / "partly").mkdir()
    np.savez(path / "partly" / "0.npz", x=x)
    np.savez(path / "partly" / "1.npz", x=np.where(np.arange(10).reshape(2, 5, 1) == 3, np.float32(np.nan), x))
    vast = io.BytesIO()  # a header without its array
    np.lib.format.write_array_header_1_0(vast, {"descr": "<f4", "fortran_order": False, "shape": (1 << 45, 3)})
    with zipfile.ZipFile(path / "vast.npz", "w") as archive:
        archive.writestr("x.npy", vast.getvalue())
    run("calibrate", path / "model.onnx", "--data", path / "data", "-o", path / "params.json")
    run("export", path / "model.onnx", path / "params.json", "-o", path / "out.onnx")
    text = (path / "params.json").read_text()
    (path / "cut.json").write_text(text[: len(text) // 2])
    (path / "later.json").write_text(re.sub('"schema_version": [0-9]+', '"schema_version": 99', text, count=1))
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_use_is_told_in_a_line_or_two(case: str, bad_folder: Path) -> None:
    arguments, message = BAD[case]
    before = {path: path.read_bytes() for path in bad_folder.rglob("*") if path.is_file()}
    result = run(*(argument.format(bad_folder) for argument in arguments), code=2)
    assert message.format(bad_folder) in result.stderr
    assert result.stdout == ""
    assert len([line for line in result.stderr.splitlines() if line.startswith("Error")]) == 1
    assert {path: path.read_bytes() for path in bad_folder.rglob("*") if path.is_file()} == before


def test_old_file_survives_a_failed_run(bad_folder: Path) -> None:
    before = (bad_folder / "params.json").read_bytes()
    run(
        "calibrate",
        bad_folder / "model.onnx",
        "--data",
        bad_folder / "nan.npz",
        "-o",
        bad_folder / "params.json",
        code=2,
    )
    assert (bad_folder / "params.json").read_bytes() == before


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str) -> None:
    text = run(command, "--help").stdout
    assert "Usage: " in text
    assert len(text.splitlines()) > 8


def test_process_without_a_terminal(folder: Path) -> None:
    """As a script sees it: results alone on standard output, one closing line and nothing else on standard error."""
    arguments = ["calibrate", "model.onnx", "--data", "data", "-o", "params.json", "--json"]
    done = subprocess.run(
        [sys.executable, "-c", "from fxp_layernorm.cli import main; main()", *arguments],
        cwd=folder, env={**os.environ, "PYTHONWARNINGS": "error"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert len(json.loads(done.stdout)["norms"]) == 2
    assert done.stderr.startswith("PASSED | 2 norms calibrated")
    assert done.stderr.count("\n") == 1


def test_names_are_text_whatever_they_hold(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.node[3].name = "enc[/b][last]/ln:smile:"
    onnx.save(model, folder / "m[x].onnx")
    printed = run("inspect", folder / "m[x].onnx").stdout
    assert "enc[/b][last]/ln:smile:" in printed
    assert "m[x].onnx" in printed


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def feeds(): raise KeyError('lost')", "raised KeyError: 'lost'"),
        ("def feeds(): return None", "raised TypeError"),
        ("def feeds(required): yield {}", "raised TypeError"),
        ("1 / 0", "division by zero"),
        ("def (", "invalid syntax"),
    ],
)
def test_functions_that_fail(code: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "failing_feeds.py").write_text(code)
    monkeypatch.delitem(sys.modules, "failing_feeds", raising=False)
    result = run("calibrate", "model.onnx", "--data", "failing_feeds:feeds", "-o", "params.json", code=2)
    assert message in result.stderr


def test_interruption_is_told_apart_from_a_failed_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxp_layernorm.export.load_model", interrupt)
    assert "Interrupted" in run("inspect", folder / "model.onnx", code=130).stderr


def test_norms_that_stay_float_are_told(folder: Path) -> None:
    model = onnx.load(folder / "model.onnx")
    model.graph.node[3].output.extend(["", "deviation"])
    model.graph.output.append(onnx.helper.make_tensor_value_info("deviation", onnx.TensorProto.FLOAT, None))
    onnx.save(model, folder / "model.onnx")
    arguments = ("calibrate", folder / "model.onnx", "--data", folder / "data", "-o", folder / "params.json")
    assert document(*arguments)["skipped"] == [{"name": "norm0", "reason": "its mean or inverse deviation is used"}]
    result = run(*arguments)
    assert "params.json, 1 stay float | " in result.stderr
    assert "its mean or inverse deviation is used" in result.stdout


def test_doubtful_data_are_told(folder: Path) -> None:
    x = np.random.default_rng(0).normal(size=(1, 200, N)).astype(np.float32)
    x[..., 4] = 2
    x[0, 9, 1] = np.inf
    np.savez(folder / "doubtful.npz", x=x)
    arguments = ("calibrate", folder / "model.onnx", "--data", folder / "doubtful.npz", "-o", folder / "params.json")
    warnings = document(*arguments)["warnings"]
    assert {(warning["norm"], warning["kind"]) for warning in warnings} >= {
        ("norm0", "constant_channels"), ("norm0", "not_finite"), ("norm1", "not_finite")
    }  # fmt: skip
    lines = run(*arguments).stderr.splitlines()
    assert any(
        line.startswith("Warning: norm norm0: the input has one value in all 199 rows in channel 4;") for line in lines
    )
    assert f"{len(warnings)} warnings | " in lines[-1]


def test_resumed_calibration_needs_no_second_run(folder: Path) -> None:
    arguments = ("calibrate", folder / "model.onnx", "--data", folder / "data", "--resume", folder / "state.npz")
    run(*arguments, "-o", folder / "a.json")
    run(*arguments, "-o", folder / "b.json", "--method", "percentile", "--output-method", "entropy", "--exponents", 0)
    norms = document(*arguments, "-o", folder / "c.json", "--input-method", "moving_average")["norms"]
    assert {(norm["input_method"], norm["output_method"]) for norm in norms} == {("moving_average", "mse")}
    plain = ("calibrate", folder / "model.onnx", "--data", folder / "data", "-o", folder / "d.json")
    run(*plain, "--method", "percentile", "--output-method", "entropy", "--exponents", 0)
    assert (folder / "b.json").read_bytes() == (folder / "d.json").read_bytes()
    run("calibrate", folder / "model.onnx", "--data", folder / "data" / "0.npz", "-o", folder / "e.json", "--resume",
        folder / "state.npz", code=2)  # fmt: skip
