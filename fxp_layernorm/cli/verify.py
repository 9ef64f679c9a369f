"""`fxp-layernorm verify`: an exported model against the kernel and the float model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from rich.console import Group

    from ..export import Verification


@click.command()
@common.model_argument
@click.argument("out", type=common.PATH)
@common.optional_params_argument
@common.data_option
@click.option(
    "--results",
    metavar="DATA",
    help="What another consumer made of the model that --probe writes: arrays by the names of its outputs, in the form "
    "and the order of the feeds. They are held against the kernel; ONNX Runtime doesn't run OUT.",
)
@click.option(
    "--probe", type=common.PATH, help="Write OUT with every norm's codes and stages as outputs, to be run elsewhere."
)
@common.json_option
def verify(
    model: Path, out: Path, params: Path | None, data: str, results: str | None, probe: Path | None, as_json: bool
) -> None:  # fmt: skip
    """Run MODEL and OUT, its integer form, on data, and hold every replaced norm against the kernel, bit by bit.

    PARAMS is the file that `export` took, if it took one. The outputs are compared with the float model's. Of a norm
    that differs, the first codes are listed, and the first stage of its subgraph that is not what it should be. A float
    norm between quantizers (export --form qdq) can't be exact: it passes if each of its codes that differs from the
    kernel's is one that a float32 norm may give, by the bound on its rounding errors.

    \b
    Examples:
      fxp-layernorm verify model.onnx integer.onnx params.json --data feeds/
      fxp-layernorm verify model.onnx integer.onnx params.json --data feeds/ --probe probe.onnx
      fxp-layernorm verify model.onnx integer.onnx params.json --data feeds/ --results device/
    """
    from .. import files
    from ..export import export_probe, exported_norms, load_model
    from ..export import verify as run
    from ..runtime import Feeds

    output = common.Output(as_json)
    if probe is not None:
        files.check_writable(probe)
        written = [probe, probe.with_name(f"{probe.name}.data")]
        common.check_apart(written, [model, out, params, data, results])
    word = "" if params is not None else next((norm.word for norm in exported_norms(load_model(out))), "int64")
    feeds, loaded = Feeds(data), common.parameters(model, params, word)
    with output.progress("Verifying", len(feeds)) as advance:
        computed = None if results is None else Feeds(results)
        result = run(model, out, loaded, feeds, results=computed, advance=advance)
    if probe is not None:
        export_probe(out, probe)
    columns = (
        "norm", "codes", "differ", "at most, LSB", "no float32 norm's", "differ at the border",
        "no float32 quantizer's",
    )  # fmt: skip
    counts = [
        (
            norm.name, norm.codes, norm.mismatches, norm.largest, norm.beyond, norm.border_mismatches,
            norm.border_beyond,
        )
        for norm in result.norms
    ]  # fmt: skip
    norms = common.table(f"{out.name}: codes that differ from the kernel's", columns, counts)
    outputs = common.table(
        "Outputs against the float model",
        ("output", "cosine", "largest difference", "SQNR, dB"),
        [(check.name, f"{check.cosine:.6f}", check.max_abs, check.sqnr_db) for check in result.outputs],
    )
    output.result(document(result), norms, outputs, *_failures(result))
    output.close(summary(result), passed=result.passed)


def _failures(result: Verification) -> list[Group]:
    """Return tables of what differs."""
    codes = [(norm.name, *vars(code).values()) for norm in result.norms for code in norm.differences]
    stages = [(norm.name, str(norm.stage)) for norm in result.norms if norm.stage is not None]
    border = [(norm.name, *vars(value).values()) for norm in result.norms for value in norm.border_differences]
    where = ("norm", "side", "feed", "row", "channel")
    tables = [
        ("The first codes that differ", (*where, "expected", "got"), codes),
        ("The first stage that differs", ("norm", "stage"), stages),
        (
            "The first at the border that no float32 quantizer gives: see its scale, zero point and precision",
            (*where, "of", "expected", "got"),
            border,
        ),
    ]
    return [common.table(title, columns, rows) for title, columns, rows in tables if rows]


def document(result: Verification) -> dict[str, Any]:
    """Return a verification as JSON has it."""
    return {
        "exact": result.exact, "passed": result.passed,
        "norms": [
            {
                "name": norm.name, "codes": norm.codes, "mismatches": norm.mismatches,
                "border_mismatches": norm.border_mismatches, "border_beyond": norm.border_beyond,
                "largest": norm.largest, "beyond": norm.beyond,
                "differences": [vars(code) for code in norm.differences],
                "border_differences": [vars(value) for value in norm.border_differences],
                "stage": None if norm.stage is None else vars(norm.stage),
            }
            for norm in result.norms
        ],
        "outputs": [
            {"name": check.name, "cosine": check.cosine, "max_abs": check.max_abs, "sqnr_db": check.sqnr_db}
            for check in result.outputs
        ],
    }  # fmt: skip


def summary(result: Verification) -> str:
    """Return the middle of the closing line."""
    border = sum(norm.border_mismatches for norm in result.norms)
    differ = f"{result.mismatches - border:,} of {result.codes:,} codes differ"
    beside = f", {border:,} at the border" if border else ""
    beyond = sum(norm.border_beyond + (norm.beyond or 0) for norm in result.norms)
    floats = f", {beyond:,} as no float32's may" if beyond else ""
    if result.passed and not result.exact:
        floats = ", as float32's may"
    return f"{common.count(len(result.norms), 'norm')}, {differ}{beside}{floats}"
