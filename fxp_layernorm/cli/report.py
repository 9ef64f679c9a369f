"""`fxp-layernorm report`: where the error comes from, which norm hurts the model, and what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import files
from ..errors import InputError
from . import common

if TYPE_CHECKING:
    from ..analysis import ModelAnalysis


@click.command()
@common.model_argument
@common.optional_params_argument
@common.data_option
@click.option("-o", "--out", type=common.PATH, required=True, help="The report to write (.html).")
@common.json_option
def report(model: Path, params: Path | None, data: str, out: Path, as_json: bool) -> None:
    """Analyze the error of every norm in PARAMS on MODEL's real activations, and what each does to MODEL's outputs.

    Writes one HTML file that needs no network; beside it, with the suffixes .json and .npz, the same data and the worst
    rows. Needs the extra: pip install 'fxp-layernorm[report]'. MODEL runs once over the data, and once more with each
    norm replaced by itself. Without PARAMS the norms are those that stand between quantizers, with the model's own.

    \b
    Examples:
      fxp-layernorm report model.onnx params.json --data feeds/ -o report.html
      fxp-layernorm report quantized.onnx --data feeds/ -o report.html
    """
    from ..analysis import analyze_model
    from ..analysis.html import require
    from ..runtime import Feeds

    require()
    if out.suffix in (".json", ".npz"):
        raise InputError(f"{out} would be the name of what is written beside the report; name it {out.stem}.html")
    files.check_writable(out)
    common.check_apart([out, out.with_suffix(".json"), out.with_suffix(".npz")], [model, params, data])
    output = common.Output(as_json)
    feeds, loaded = Feeds(data), common.parameters(model, params, "int64")
    steps = len(feeds) + len(loaded.norms) + 1 if len(feeds) else 0
    with output.progress("Analyzing", steps) as advance:
        analysis = analyze_model(
            model, loaded, feeds, model_name=str(model), data_name=data, params_name=str(params or "PARAMS.json"),
            advance=advance,
        )  # fmt: skip
    analysis.to_html(out)
    beside = out.with_suffix(".json")
    analysis.to_json(beside)
    document: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8")) if as_json else {}
    output.result(document, _table(analysis))
    if not as_json:
        for suggestion in analysis.suggestions:
            click.echo(f"\n{suggestion.norms[0]}: {suggestion.text}\n  {suggestion.command}")
    output.close(f"{common.count(len(analysis.norms), 'norm')} analyzed into {out}")


def _table(analysis: ModelAnalysis) -> Any:
    norms = {norm.name: norm for norm in analysis.norms}
    rows = [
        (
            entry.norm, entry.worst.sqnr_db, f"{entry.worst.cosine:.6f}", norms[entry.norm].sqnr_db,
            max(norms[entry.norm].attribution.terms, key=lambda term: term.share).stage,
        )
        for entry in analysis.harm
        if entry.norm
    ]  # fmt: skip
    rows.append(("all norms", analysis.together.worst.sqnr_db, f"{analysis.together.worst.cosine:.6f}", None, ""))
    columns = ("norm", "model's SQNR, dB", "model's cosine", "norm's own SQNR, dB", "most noise from")
    return common.table("The model's output with one norm in integers, the most harmful first", columns, rows)
