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
    type=click.Choice(["function", "inline"]),
    default="function",
    show_default=True,
    help="function: each norm is one node of the domain fxp_layernorm, with the integer operators as its body. "
    "inline: the operators themselves, for consumers without model-local functions.",
)
@click.option(
    "--word", type=click.Choice(["int64"]), default="int64", show_default=True,
    help="The widest integers of the graph.",
)  # fmt: skip
@common.json_option
def export(model: Path, params: Path | None, out: Path, form: str, word: str, as_json: bool) -> None:
    """Replace the norms of MODEL by integer ones, with the parameters that `calibrate` wrote.

    Without PARAMS those norms are replaced that stand between DequantizeLinear and QuantizeLinear: such a norm takes
    and gives the model's own codes, and the quantizers around it go.

    \b
    Examples:
      fxp-layernorm export model.onnx params.json -o integer.onnx
      fxp-layernorm export model.onnx params.json -o integer.onnx --form inline
      fxp-layernorm export quantized.onnx -o integer.onnx
    """
    import onnx

    from ..export import quantize_model
    from ..files import atomic_path

    output = common.Output(as_json)
    loaded = common.parameters(model, params)
    proto = quantize_model(model, loaded, form=form, word=word)
    with atomic_path(out) as temporary:
        onnx.save(proto, temporary)
    before = len(onnx.load(model, load_external_data=False).graph.node)
    document = {
        "replaced": len(loaded.norms), "nodes_added": len(proto.graph.node) - before, "functions": len(proto.functions),
        "form": form, "word": word, "out": str(out),
    }  # fmt: skip
    rows = list(document.items())
    output.result(document, common.table(f"{model.name} with integer norms", ("", ""), rows))
    output.close(f"{common.count(len(loaded.norms), 'norm')} replaced in {out}")
