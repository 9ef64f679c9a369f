"""`fxp-layernorm verify`: an exported model against the kernel and the float model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import common

if TYPE_CHECKING:
    from ..export import Verification


@click.command()
@common.model_argument
@click.argument("out", type=common.PATH)
@common.optional_params_argument
@common.data_option
@common.json_option
def verify(model: Path, out: Path, params: Path | None, data: str, as_json: bool) -> None:
    """Run MODEL and OUT, its integer form, on data, and hold every replaced norm against the kernel, bit by bit.

    PARAMS is the file that `export` took, if it took one. The outputs are compared with the float model's.

    \b
    Example:
      fxp-layernorm verify model.onnx integer.onnx params.json --data feeds/
    """
    from ..export import verify as run
    from ..runtime import Feeds

    output = common.Output(as_json)
    feeds, loaded = Feeds(data), common.parameters(model, params)
    with output.progress("Verifying", len(feeds)) as advance:
        result = run(model, out, loaded, feeds, advance=advance)
    norms = common.table(
        f"{out.name}: codes that differ from the kernel's",
        ("norm", "codes", "differ", "differ at the border"),
        [(norm.name, norm.codes, norm.mismatches, norm.border_mismatches) for norm in result.norms],
    )
    outputs = common.table(
        "Outputs against the float model",
        ("output", "cosine", "largest difference", "SQNR, dB"),
        [(check.name, f"{check.cosine:.6f}", check.max_abs, check.sqnr_db) for check in result.outputs],
    )
    output.result(document(result), norms, outputs)
    output.close(summary(result), passed=result.exact)


def document(result: Verification) -> dict[str, Any]:
    """Return a verification as JSON has it."""
    return {
        "exact": result.exact,
        "norms": [
            {
                "name": norm.name, "codes": norm.codes, "mismatches": norm.mismatches,
                "border_mismatches": norm.border_mismatches,
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
    return f"{common.count(len(result.norms), 'norm')}, {result.mismatches:,} of {result.codes:,} codes differ"
