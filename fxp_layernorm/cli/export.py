"""`fxp-layernorm export`: a model with integer norms."""

from __future__ import annotations

from pathlib import Path

import click

from . import common


@click.command()
@common.model_argument
@common.optional_params_argument
@click.option("-o", "--out", type=common.PATH, required=True, help="The model to write (.onnx).")
@click.option(
    "--form",
    type=click.Choice(["function", "inline", "qdq"]),
    help="function: each norm is one node of the domain fxp_layernorm, with the integer operators as its body. "
    "inline: the operators themselves, for consumers without model-local functions. qdq: the float norm between "
    "DequantizeLinear and QuantizeLinear with these parameters, for hardware with a LayerNorm of its own, whose codes "
    "may differ from the kernel's. [default: function, or inline where the model's IR version has no functions]",
)
@click.option(
    "--word", type=click.Choice(["int64", "int24", "float24"]), default="int64", show_default=True,
    help="int64: integers of 64 and 32 bits. int24 and float24: int32 or float32 tensors in which no value reaches "
    "2^24, for hardware that carries integers in float32; calibrate with --hardware carried24.",
)  # fmt: skip
@click.option(
    "--io", type=click.Choice(["int32"]),
    help="The type that carries the codes between the border and the integer norm, for accelerators without the codes' "
    "own. [default: the codes' own]",
)  # fmt: skip
@click.option(
    "--opset", type=click.IntRange(1), metavar="N",
    help="Raise the model to this opset first, and its IR version with it. [default: both are kept]",
)  # fmt: skip
@common.json_option
def export(
    model: Path, params: Path | None, out: Path, form: str | None, word: str, io: str | None, opset: int | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Replace the norms of MODEL by integer ones, with the parameters that `calibrate` wrote.

    Without PARAMS those norms are replaced that stand between DequantizeLinear and QuantizeLinear: such a norm takes
    and gives the model's own codes, and the quantizers around it go.

    \b
    Examples:
      fxp-layernorm export model.onnx params.json -o integer.onnx
      fxp-layernorm export model.onnx params.json -o integer.onnx --form inline
      fxp-layernorm export quantized.onnx -o integer.onnx
    """
    import onnx_ir as ir

    from ..export import export_model

    output = common.Output(as_json)
    common.check_apart([out, out.with_name(f"{out.name}.data")], [model, params])
    reasons: dict[str, str] = {}
    warnings: list[str] = []
    if params is not None:
        loaded, warnings = common.saved_parameters(model, params)
    else:
        quantized = common.quantized(model, word)
        loaded, reasons = quantized.params, quantized.skipped
    done = export_model(model, loaded, out, form=form, word=word, io=io, opset=opset)
    left = done.left | {name: reasons[name] for name in done.left if name in reasons}
    before, after = (sum(1 for _ in graph.all_nodes()) for graph in (ir.load(model).graph, done.model.graph))
    replaced = [norm.name for norm in done.norms]
    document = {
        "replaced": len(replaced), "nodes_added": after - before,
        "functions": len(done.model.functions), "form": done.writing.form, "word": word, "io": io,
        "opset": done.model.opset_imports.get("", 0), "out": str(out),
    }  # fmt: skip
    tables = [
        common.table(f"{model.name} with integer norms", ("", ""), list(document.items())),
        common.table("Norms", ("norm", "is"), [*((name, "replaced") for name in replaced), *_left(left)]),
    ]
    output.result(
        document
        | {"norms": replaced, "left": [{"name": name, "reason": left[name]} for name in left], "warnings": warnings},
        *tables,
    )
    floats = f", {len(left)} stay float" if left else ""
    output.close(f"{common.count(len(replaced), 'norm')} replaced in {out}{floats}")


def _left(left: dict[str, str]) -> list[tuple[str, str]]:
    return [(name, f"float: {reason}") for name, reason in left.items()]
