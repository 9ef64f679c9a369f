"""`fxp-layernorm calibrate`: scales for all norms of a model."""

from __future__ import annotations

from pathlib import Path

import click

from ..quantization import DType
from . import common

_TYPES = click.Choice([dtype.value for dtype in DType])


@click.command()
@common.model_argument
@common.optional_data_option
@click.option("-o", "--out", type=common.PATH, required=True, help="The parameter file to write (.json).")
@click.option("--input", "input_type", type=_TYPES, default="int8", show_default=True, help="Type of the input codes.")
@click.option(
    "--output", "output_type", type=_TYPES, default="int8", show_default=True, help="Type of the output codes."
)
@click.option(
    "--method",
    type=click.Choice(["minmax", "mse"]),
    help="minmax: scales that hold all observed values. mse: also smaller ones that clip, where the error is less. "
    "[default: mse for codes of 8 bits, minmax for 16 bits]",
)
@click.option(
    "--exponents",
    type=click.IntRange(0, 15),
    metavar="MAX",
    help="Give each channel a power of two, at most 2**MAX; 0 is one scale a tensor. [default: 7 for codes of 8 bits, "
    "0 for 16 bits]",
)
@click.option(
    "--lane", type=click.Choice(["24", "32", "64"]),
    help="Bits of the element stage's integers. [default: the narrowest with a small proved error]",
)  # fmt: skip
@common.json_option
def calibrate(
    model: Path, data: str | None, out: Path, input_type: str, output_type: str, method: str | None,
    exponents: int | None, lane: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Run MODEL on real data, observe each of its norms, and write their integer parameters.

    The model runs once over the data; memory is bounded by one feed. Norms that stand between DequantizeLinear and
    QuantizeLinear keep the types and scales that MODEL has for them; where all do, no data is needed.

    \b
    Examples:
      fxp-layernorm calibrate model.onnx --data feeds/ -o params.json
      fxp-layernorm calibrate model.onnx --data feeds.npz -o params.json --input int16 --output int16
      fxp-layernorm calibrate model.onnx --data my.module:feeds -o params.json --exponents 3
      fxp-layernorm calibrate quantized.onnx -o params.json
    """
    from ..calibration import CalibrationOptions, ModelCalibration, quantized_norms
    from ..runtime import Feeds

    output = common.Output(as_json)
    options = CalibrationOptions.of(
        input_type, output_type, method=method, exponents=exponents, lane=int(lane) if lane else None
    )
    if data is None:
        found = quantized_norms(model, lane=options.lane)
        params, skipped, source = found.params, found.skipped, "with the model's own parameters"
    else:
        feeds = Feeds(data)
        calibration = ModelCalibration(model)
        with output.progress("Calibrating", len(feeds)) as advance:
            calibration.observe(feeds, advance)
        params = calibration.params(options)
        skipped = {norm.name: norm.blocker or "" for norm in calibration.skipped}
        source = f"{input_type} -> {output_type}, calibrated on {common.count(params.feeds, 'feed')}"
    params.save(out)
    document = {
        "norms": [
            {
                "name": norm.name, "n": norm.spec.n, "rows": norm.rows, "lane": norm.spec.lane,
                "excess_lsb": float(norm.spec.excess), "excess_terms_lsb": dict(norm.spec.excess.terms),
                "sqnr_db": norm.sqnr_db, "input_scale": norm.spec.input.scale, "output_scale": norm.spec.output.scale,
                "largest_input_exponent": max(norm.spec.input.channel_exponents(norm.spec.n)),
                "largest_output_exponent": max(norm.spec.output.channel_exponents(norm.spec.n)),
            }
            for norm in params.norms
        ],
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped.items()],
        "feeds": params.feeds, "params": str(out),
    }  # fmt: skip
    columns = ("norm", "n", "rows", "lane", "proved excess, LSB", "SQNR, dB")
    rows = [
        (norm.name, norm.spec.n, norm.rows, norm.spec.lane, float(norm.spec.excess), norm.sqnr_db)
        for norm in params.norms
    ]
    tables = [common.table(f"{model.name}: {source}", columns, rows)]
    if skipped:
        tables.append(common.table("Norms that stay float", ("norm", "because"), list(skipped.items())))
    output.result(document, *tables)
    left = f", {len(skipped)} stay float" if skipped else ""
    output.close(f"{common.count(len(params.norms), 'norm')} calibrated into {out}{left}")
