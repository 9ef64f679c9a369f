"""`fxp-layernorm calibrate`: scales for all norms of a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from .. import files
from ..errors import InputError
from ..hardware import PRESETS
from ..quantization import DType
from . import common, model_output

#: By name, as `fxp_layernorm.calibration` is imported only when the command runs.
_METHODS = click.Choice(["minmax", "moving_average", "percentile", "mse", "entropy"])
#: Options that --target decides itself, by the names of their values.
_DECIDED_BY_TARGET = {
    "method": "--method", "input_method": "--input-method", "output_method": "--output-method",
    "percentile": "--percentile", "symmetric": "--symmetric or --asymmetric",
    "fuse_residual": "--fuse-residual",
}  # fmt: skip
_SCALES = click.Choice(["tensor", "exponents", "channel"])
_TYPES = click.Choice([dtype.value for dtype in DType if dtype.bits <= 16])


@click.command()
@common.model_argument
@common.optional_data_option
@click.option("-o", "--out", type=common.PATH, required=True, help="The parameter file to write (.json).")
@click.option(
    "--input", "input_type", type=_TYPES, metavar="TYPE", default="int8", show_default=True,
    help="Type of the input codes: int8, uint8, int16, uint16, or any width from int2 and uint2 on.",
)  # fmt: skip
@click.option(
    "--output", "output_type", type=_TYPES, metavar="TYPE", default="int8", show_default=True,
    help="Type of the output codes, likewise.",
)  # fmt: skip
@click.option(
    "--method",
    type=_METHODS,
    help="How ranges are chosen. minmax: all observed values. moving_average: the mean of the feeds' ranges. "
    "percentile: all but a small share of the values. mse: the least squared error. entropy: the codes' distribution "
    "most like the values'. [default: mse for codes of 8 bits, minmax for wider ones]",
)
@click.option("--input-method", type=_METHODS, help="The same for the inputs alone.")
@click.option("--output-method", type=_METHODS, help="The same for the outputs alone.")
@click.option(
    "--percentile", type=float, default=99.99, show_default=True, metavar="SHARE",
    help="The share of the values, in percent, that the method percentile keeps.",
)  # fmt: skip
@click.option(
    "--scales",
    type=_SCALES,
    help="How channels share a scale. tensor: one for all. exponents: one, times a power of two for each channel, a "
    "shift. channel: each has its own, which costs nothing for outputs, and a multiplication an element for inputs. "
    "[default: for codes of 8 bits exponents, but channel for outputs by the method mse; tensor for wider codes]",
)
@click.option("--input-scales", type=_SCALES, help="The same for the inputs alone.")
@click.option("--output-scales", type=_SCALES, help="The same for the outputs alone.")
@click.option(
    "--exponents", type=click.IntRange(0, 15), metavar="MAX",
    help="The largest exponent that a channel may have; 0 is one scale a tensor. [default: 7]",
)  # fmt: skip
@click.option(
    "--symmetric/--asymmetric", default=None,
    help="Whether zero points are the middle of the codes. Asymmetric, each channel with an exponent or a scale of its "
    "own has a zero point of its own. [default: asymmetric]",
)  # fmt: skip
@click.option(
    "--narrow-range", is_flag=True,
    help="Leave the lowest code of each type out, as symmetric quantization has it: -127 to 127.",
)  # fmt: skip
@click.option(
    "--fuse-residual", is_flag=True,
    help="Where a norm follows the sum of two tensors, let it take the codes of both and add them itself; of another "
    "norm's output, the codes that it has there.",
)  # fmt: skip
@click.option(
    "--lane", type=click.Choice(["24", "32", "64"]),
    help="Bits of the element stage's integers. [default: the narrowest with a small proved error]",
)  # fmt: skip
@click.option(
    "--hardware", type=click.Choice(list(PRESETS)),
    help="Keep to what a target's multiplier and accumulator hold: mac16x16-32 is a product of 16-bit factors in an "
    "accumulator of 32 bits. [default: 32-bit factors, and the accumulator that the lane needs]",
)  # fmt: skip
@click.option(
    "--resume",
    "state",
    type=common.PATH,
    metavar="STATE",
    help="Keep what is observed in this file (.npz): interrupted work goes on where it stood, and another method or "
    "type needs no second run of the model.",
)
@click.option(
    "--engine", type=click.Choice(["local", "dask"]), default="local", show_default=True,
    help="Where the model runs. dask: on the workers of a Dask cluster; the result is the same to the last bit.",
)  # fmt: skip
@click.option(
    "--scheduler", metavar="ADDRESS",
    help="The Dask cluster's scheduler, as tcp://host:8786. [default: worker processes on this machine]",
)  # fmt: skip
@click.option(
    "--objective", type=click.Choice(["norm", "model"]), default="norm", show_default=True,
    help="What the method mse serves. norm: each norm's own output. model: from there, the model's outputs on the "
    "first of the data, by clipping outliers; try both on data held back.",
)  # fmt: skip
@click.option(
    "--target", metavar="METRIC=VALUE",
    help="Find for each norm the cheapest format, of 8 and 16 bits with channel exponents or without, adding its "
    "residual or not, with which the model's outputs reach cosine=, sqnr_db= or max_lsb= (of 255 steps) against the "
    "float model's. Exits with 1 if none does.",
)  # fmt: skip
@common.json_option
def calibrate(
    model: Path, data: str | None, out: Path, input_type: str, output_type: str, lane: str | None, state: Path | None,
    engine: str, scheduler: str | None, fuse_residual: bool, objective: str, target: str | None, as_json: bool,
    **chosen: Any,
) -> None:  # fmt: skip
    """Run MODEL on real data, observe each of its norms, and write their integer parameters.

    The model runs once over the data, a feed on each core; memory is bounded by the activations of these feeds.
    With --objective model or --target it runs some dozens of times more, on the first few.

    Norms that stand between DequantizeLinear and QuantizeLinear keep the types and scales that MODEL has for them;
    where all do, no data is needed.

    \b
    Examples:
      fxp-layernorm calibrate model.onnx --data feeds/ -o params.json
      fxp-layernorm calibrate model.onnx --data feeds.npz -o params.json --input int16 --output int16
      fxp-layernorm calibrate model.onnx --data my.module:feeds -o params.json --exponents 3
      fxp-layernorm calibrate model.onnx --data feeds/ -o params.json --resume observed.npz --engine dask
      fxp-layernorm calibrate model.onnx --data feeds/ -o params.json --target cosine=0.999
      fxp-layernorm calibrate quantized.onnx -o params.json
    """
    from ..calibration import CalibrationOptions, ModelCalibration, quantized_norms
    from ..calibration.engine import parse_engine
    from ..runtime import Feeds

    output = common.Output(as_json)
    files.check_writable(out)
    common.check_apart([out], [model, data])
    if state is not None and state.resolve() == out.resolve():
        raise InputError(f"{out} can't hold both the parameters and what is observed; name two files")
    goal = model_output.parse(target, data, objective, _given(_DECIDED_BY_TARGET))
    options = CalibrationOptions.of(input_type, output_type, lane=int(lane) if lane else None, **chosen)
    if data is None:
        found = quantized_norms(model, lane=options.lane, hardware=options.hardware, fuse_residual=fuse_residual)
        outcome = model_output.Outcome(found.params)
        params, skipped, source = found.params, found.skipped, "with the model's own parameters"
    else:
        feeds = Feeds(data)
        calibration = ModelCalibration(model, fuse_residual=fuse_residual, observe_addends=goal is not None)
        with output.progress("Calibrating", len(feeds)) as advance:
            calibration.observe(feeds, advance, engine=parse_engine(engine, scheduler), state=state)
        if goal is not None:
            outcome = model_output.meet(model, calibration, feeds, options, goal, output)
        elif objective == "model":
            outcome = model_output.tune(model, calibration, feeds, options, output)
        else:
            outcome = model_output.Outcome(calibration.params(options))
        params = outcome.params
        skipped = {norm.name: norm.blocker or "" for norm in calibration.skipped}
        formats = f"{input_type} -> {output_type}" if goal is None else f"the cheapest formats for {goal}"
        source = f"{formats}, calibrated on {common.count(params.feeds, 'feed')}"
    params.save(out)
    document = {
        "norms": [
            {
                "name": norm.name, "n": norm.spec.n, "rows": norm.rows, "lane": norm.spec.lane,
                "excess_lsb": float(norm.spec.excess), "excess_terms_lsb": dict(norm.spec.excess.terms),
                "sqnr_db": norm.sqnr_db, "input_method": norm.input_record.method,
                "output_method": norm.output_record.method, "input_scale": norm.spec.input.scale,
                "output_scale": norm.spec.output.scale,
                "largest_input_exponent": max(norm.spec.input.channel_exponents(norm.spec.n)),
                "largest_output_exponent": max(norm.spec.output.channel_exponents(norm.spec.n)),
            }
            for norm in params.norms
        ],
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "warnings": [
            {"norm": warning.norm, "kind": warning.kind.value, "channels": warning.channels, "text": warning.text}
            for warning in params.warnings
        ],
        "feeds": params.feeds, "params": str(out),
    }  # fmt: skip
    document |= outcome.document
    columns = ("norm", "n", "rows", "lane", "proved excess, LSB", "SQNR, dB")
    rows = [
        (norm.name, norm.spec.n, norm.rows, norm.spec.lane, float(norm.spec.excess), norm.sqnr_db)
        for norm in params.norms
    ]
    tables = [common.table(f"{model.name}: {source}", columns, rows)]
    tables += outcome.tables
    if skipped:
        tables.append(common.table("Norms that stay float", ("norm", "because"), list(skipped.items())))
    output.result(document, *tables)
    for warning in params.warnings:
        click.echo(f"Warning: norm {warning.norm}: {warning.text}", err=True)
    warned = f", {common.count(len(params.warnings), 'warning')}" if params.warnings else ""
    left = f", {len(skipped)} stay float" if skipped else ""
    output.close(
        f"{common.count(len(params.norms), 'norm')} calibrated into {out}{left}{warned}{outcome.closing}",
        passed=outcome.met,
    )


def _given(names: Mapping[str, str]) -> Iterator[str]:
    """Yield how those of these options are written that stand on the command line."""
    context = click.get_current_context()
    for name, written in names.items():
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            yield written
