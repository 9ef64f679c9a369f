"""The report: one file that needs nothing, whose links lead somewhere, and the command that writes it."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import onnx
import pytest
from onnx_models import feeds, model_with_norms
from pages import Page
from rows import layer_of

import fxp_layernorm as fxp
from fxp_layernorm import MissingDependencyError, NormKind
from fxp_layernorm.analysis import ModelAnalysis, NormAnalysis, analyze_model
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.cli import main
from fxp_layernorm.params import ModelParams
from fxp_layernorm.runtime import Feeds


@pytest.fixture(scope="module")
def plotting() -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    pytest.importorskip("jinja2", reason="needs the extra [report]")


@pytest.fixture(scope="module")
def norm_analysis() -> NormAnalysis:
    rows = np.random.default_rng(0).standard_normal((200, 48))
    rows[:, 5] *= 20
    spec = fxp.calibrate(layer_of(NormKind.LAYERNORM, 48), rows, exponents=0)
    return fxp.analyze(spec, 2 * rows, name="a <norm> & more")


@pytest.fixture(scope="module")
def model_analysis() -> ModelAnalysis:
    model, data = model_with_norms(3), Feeds(feeds())
    return analyze_model(model, calibrate_model(model, data, exponents=0), data)


def written(analysis: Any, path: Path) -> Page:
    analysis.to_html(path)
    return Page(path.read_text(encoding="utf-8"))


@pytest.mark.usefixtures("plotting")
def test_page_is_whole_and_needs_no_network(
    norm_analysis: NormAnalysis, model_analysis: ModelAnalysis, tmp_path: Path
) -> None:
    for analysis in (norm_analysis, model_analysis):
        page = written(analysis, tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()
        assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)
        assert "url(" not in re.sub(r'"url\(#\w+\)"', "", text)
        assert not page.values("src")
        assert text.count("<svg") == (4 if analysis is norm_analysis else 4 * 3 + 1)
        twice = [name for name, times in Counter(page.values("id")).items() if times > 1]
        assert not twice
        links = page.values("href") + page.values("xlink:href") + re.findall(r'"url\((#\w+)\)"', text)
        inner = {link for link in links if link.startswith("#")}
        assert {link[1:] for link in inner} <= set(page.values("id"))
        assert set(links) - inner == {"data:,"}
        assert "currentColor" in text
        assert "#010203" not in text
        assert "prefers-color-scheme: dark" in text
        for place in ("nan", "None", "Undefined"):
            assert place not in [word for words in page.text for word in words.split()]


@pytest.mark.usefixtures("plotting")
def test_page_says_what_was_found(norm_analysis: NormAnalysis, tmp_path: Path) -> None:
    text = " ".join(written(norm_analysis, tmp_path / "r.html").text)
    assert "a <norm> & more" in text
    assert norm_analysis.suggestions[0].text in text
    assert norm_analysis.suggestions[0].command in text
    for term in norm_analysis.attribution.terms:
        assert term.stage in text
        assert term.meaning in text
    assert f"{100 * norm_analysis.attribution.interaction_share:.2f} %" in text


@pytest.mark.usefixtures("plotting")
def test_harm_table_links_to_the_norms_in_its_order(model_analysis: ModelAnalysis, tmp_path: Path) -> None:
    written(model_analysis, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    table = text.split('class="sortable"')[1].split("</table>")[0]
    links = re.findall(r'<a href="#(\w+)">(\w+)</a>', table)
    assert [name for _, name in links] == [entry.norm for entry in model_analysis.harm]
    for link, name in links:
        part = text.split(f'id="{link}"')[1]
        assert part.split("<summary>")[1].startswith(name)


@pytest.mark.usefixtures("plotting")
def test_worst_rows_are_beside_the_page(model_analysis: ModelAnalysis, tmp_path: Path) -> None:
    written(model_analysis, tmp_path / "r.html")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:
        assert set(archive) == {f"norm{i}_{key}" for i in range(3) for key in ("codes", "float", "rows")}
        assert archive["norm1_codes"].dtype == np.int8
        assert archive["norm1_rows"].tolist() == [row.row for row in model_analysis.norms[1].worst]


@pytest.mark.usefixtures("plotting")
def test_pages_are_reproducible(norm_analysis: NormAnalysis, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        norm_analysis.to_html(tmp_path / name / "r.html")
    assert (tmp_path / "a" / "r.html").read_bytes() == (tmp_path / "b" / "r.html").read_bytes()


@pytest.mark.usefixtures("plotting")
def test_a_report_on_a_hundred_norms_stays_below_10_mb(norm_analysis: NormAnalysis, tmp_path: Path) -> None:
    by_channel = tuple(np.random.default_rng(0).uniform(0.3, 0.9, 4096).tolist())
    channels = dataclasses.replace(norm_analysis.channels, rms_lsb=by_channel)
    dataclasses.replace(norm_analysis, channels=channels).to_html(tmp_path / "r.html")
    assert (tmp_path / "r.html").stat().st_size < 10e6 / 100


@pytest.mark.usefixtures("plotting")
def test_degenerate_norm_has_a_page(tmp_path: Path) -> None:
    spec = fxp.plan(fxp.LayerNorm(1), fxp.QuantParams("int8", 1.0), fxp.QuantParams("int8", 1.0))
    written(fxp.analyze(spec, np.ones((1, 1))), tmp_path / "r.html")


@pytest.mark.usefixtures("plotting")
def test_a_norm_with_a_residual_has_a_page(tmp_path: Path) -> None:
    q8, rows = fxp.QuantParams("int8", 0.03), np.random.default_rng(0).standard_normal((20, 16))
    spec = fxp.plan(fxp.LayerNorm(16, eps_outside=True), q8, q8, residual=q8, sum_output=q8)
    page = written(fxp.analyze(spec, rows, rows[::-1]), tmp_path / "r.html")
    for name in ("residual", "sum", "outside the root", "weighted inputs"):
        assert any(name in text for text in page.text), name
    with np.load(tmp_path / "r.npz") as archive:
        command = next(text for text in page.text if text.startswith("rows = "))
        found: dict[str, Any] = {"np": np, "fxp": fxp, "spec": spec}
        exec(command.replace("r.npz", str(tmp_path / "r.npz")).replace("; ", "\ny = "), found)
        assert np.array_equal(
            found["y"], fxp.reference.run(spec, archive["norm0_codes"], archive["norm0_residual_codes"])
        )


@pytest.mark.usefixtures("plotting")
def test_notebook(norm_analysis: NormAnalysis) -> None:
    shown = norm_analysis._repr_html_()
    assert shown is not None
    assert Page(shown).attributes[0][:2] == ("iframe", "srcdoc")
    assert Page(Page(shown).attributes[0][2])


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_without_the_extra(
    missing: str, norm_analysis: NormAnalysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'fxp-layernorm[report]'")):
        norm_analysis.to_html(tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
    assert norm_analysis._repr_html_() is None
    arguments = ["report", "no.onnx", "no.json", "--data", "no.npz", "-o", str(tmp_path / "r.html")]
    result = click.testing.CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "pip install 'fxp-layernorm[report]'" in result.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = model_with_norms()
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for index, feed in enumerate(feeds()):
        np.savez(tmp_path / "data" / f"{index}.npz", **feed)
    calibrate_model(model, Feeds(feeds()), exponents=0).save(tmp_path / "params.json")
    return tmp_path


def command(folder: Path, *options: str, out: str = "report.html", code: int = 0) -> click.testing.Result:
    arguments = [str(folder / name) for name in ("model.onnx", "params.json")]
    arguments += ["--data", str(folder / "data"), "-o", str(folder / out), *options]
    result = click.testing.CliRunner().invoke(main, ["report", *arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


@pytest.mark.usefixtures("plotting")
def test_command(folder: Path) -> None:
    result = command(folder)
    assert "all norms" in result.stdout
    assert f"calibrate {folder / 'model.onnx'} --data {folder / 'data'} -o {folder / 'params.json'}" in result.stdout
    assert result.stderr.splitlines()[-1].startswith(f"PASSED | 2 norms analyzed into {folder / 'report.html'} | ")
    Page((folder / "report.html").read_text())
    beside = json.loads((folder / "report.json").read_text())
    assert beside["model"] == str(folder / "model.onnx")
    assert [norm["rows"] for norm in beside["norms"]] == [36, 36]
    assert json.loads(command(folder, "--json").stdout) == beside
    with np.load(folder / "report.npz") as archive:
        params = ModelParams.load(folder / "params.json")
        replayed = fxp.FxpLayerNorm(params.norms[0].spec)(archive["norm0_codes"])
    assert replayed.shape == (8, 16)


@pytest.mark.usefixtures("plotting")
def test_command_refuses_what_it_cannot_use(folder: Path) -> None:
    assert "name it report.html" in command(folder, out="report.json", code=2).stderr
    onnx.save(model_with_norms(1), folder / "model.onnx")
    assert "no norm 'norm1'" in command(folder, code=2).stderr
    (folder / "params.json").write_text("{")
    assert "is not JSON" in command(folder, code=2).stderr
    assert not (folder / "report.html").exists()


@pytest.mark.usefixtures("plotting")
def test_labels_keep_their_digits(model_analysis: ModelAnalysis) -> None:
    """Coordinates are shortened to a tenth of a point; a label of 0.05 must not become 0.0."""
    from fxp_layernorm.analysis import plots

    entry = model_analysis.harm[0]
    quiet = dataclasses.replace(entry, outputs=(dataclasses.replace(entry.outputs[0], sqnr_db=33.0),))  # 0.05 %
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", plots.harm((quiet, quiet)))
    assert any(re.fullmatch(r"0\.0[1-9]\d*", label.strip()) for label in labels)
