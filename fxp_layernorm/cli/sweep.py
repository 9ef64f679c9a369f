"""`fxp-layernorm sweep`: formats tried one by one, with what each costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InputError
from . import common

if TYPE_CHECKING:
    from ..analysis import Sweep


def _several(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:
    """Split at commas; the library knows which names there are."""
    return None if value is None else [word.strip() for word in value.split(",")]


def _integers(context: click.Context, parameter: click.Parameter, value: str | None) -> list[int] | None:
    words = _several(context, parameter, value)
    try:
        return None if words is None else [int(word) for word in words]
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of integers with commas between") from None


@click.command()
@common.model_argument
@common.data_option
@click.option("-o", "--out", type=common.PATH, help="A page with plot and table to write (.html), and .json beside it.")
@click.option("--norm", metavar="NAME", help="Sweep this norm alone, by its own output; `inspect` lists the names.")
@click.option(
    "--input", "inputs", callback=_several, metavar="TYPES",
    help="Types of the input codes, separated by commas. [default: int4,int6,int8,int12,int16]",
)  # fmt: skip
@click.option(
    "--output", "outputs", callback=_several, metavar="TYPES",
    help="Types of the output codes, each with each of the input's. [default: the same as the input's]",
)  # fmt: skip
@click.option(
    "--method", "methods", callback=_several, metavar="METHODS",
    help="How scales are found, as in `calibrate`. [default: all methods]",
)  # fmt: skip
@click.option(
    "--exponents", callback=_integers, metavar="MAXIMA",
    help="Largest channel exponents; 0 is one scale a tensor. [default: 0,3,7]",
)  # fmt: skip
@click.option("--lane", type=click.Choice(["24", "32", "64"]), help="Bits of the element stage's integers.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads. [default: all cores]")
@common.json_option
def sweep(
    model: Path, data: str, out: Path | None, norm: str | None, inputs: list[str] | None, outputs: list[str] | None,
    methods: list[str] | None, exponents: list[int] | None, lane: str | None, workers: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Try all combinations of code types, methods and channel exponents for MODEL's norms on real data.

    Accuracy is that of MODEL's output with all norms in integers, against the float model. Formats that no other one
    beats, in accuracy and in all costs (bits moved, multipliers, width of the row stage), are marked with a star.

    \b
    Examples:
      fxp-layernorm sweep model.onnx --data feeds/ -o sweep.html
      fxp-layernorm sweep model.onnx --data feeds/ --norm norm_3 --input int8,int16 --output int8 --exponents 0,7
    """
    from ..analysis import formats
    from ..analysis import sweep as run
    from ..analysis.html import require
    from ..runtime import Feeds

    if out is not None:
        require()
        if out.suffix == ".json":
            raise InputError(f"{out} would be the name of what is written beside the page; name it {out.stem}.html")
        common.check_apart([out, out.with_suffix(".json")], [model, data])
    output = common.Output(as_json)
    given = {"inputs": inputs, "outputs": outputs, "methods": methods, "exponents": exponents}
    tried = formats(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    with output.progress("Sweeping", len(tried)) as advance:
        found = run(
            model, Feeds(data), tried, norm=norm, lane=int(lane) if lane else None, workers=workers,
            model_name=str(model), data_name=data, advance=advance,
        )  # fmt: skip
    written = ""
    if out is not None:
        found.to_html(out)
        found.to_json(out.with_suffix(".json"))
        written = f" into {out}"
    output.result(found.document(), *_tables(found))
    front = f"{len(found.front)} of them beaten by no other one"
    output.close(f"{common.count(len(found.points), 'format')} tried, {front}{written}")


def _tables(found: Sweep) -> list[Any]:
    rows = [
        (
            "*" if point.on_front else "", f"{point.format.input} -> {point.format.output}", point.format.method,
            point.format.exponents, point.sqnr_db, f"{point.cosine:.6f}", point.cost.bits_moved,
            "{} x {} + {} x {}".format(*point.cost.factors), point.cost.row_bits,
        )
        for point in found.points
    ]  # fmt: skip
    columns = (
        "front", "codes", "method", "exponents", "SQNR, dB", "cosine", "bits moved", "multipliers", "row stage, bits",
    )  # fmt: skip
    tables = [common.table(f"{found.name}: accuracy of {found.accuracy_of}, on {found.data}", columns, rows)]
    if found.refused:
        refused = [
            (
                f"{entry.format.input} -> {entry.format.output}",
                entry.format.method,
                entry.format.exponents,
                entry.reason,
            )
            for entry in found.refused
        ]
        tables.append(common.table("Formats that can't be had", ("codes", "method", "exponents", "because"), refused))
    return tables
