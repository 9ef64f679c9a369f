"""`fxp-layernorm inspect`: the norms of a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import common

if TYPE_CHECKING:
    from ..export import Border


@click.command()
@common.model_argument
@common.json_option
def inspect(model: Path, as_json: bool) -> None:
    """List the norms of MODEL, an .onnx file: where they are, and whether they can be replaced.

    \b
    Example:
      fxp-layernorm inspect model.onnx
    """
    from ..export import find_border, find_norms, load_model
    from ..export.constants import quantizes

    output = common.Output(as_json)
    norms = find_norms(load_model(model))
    borders = {norm.name: find_border(norm) for norm in norms}
    document = {
        "norms": [
            {
                "name": norm.name, "kind": norm.kind.value, "form": norm.form, "axes": list(norm.axes), "n": norm.n,
                "epsilon": norm.epsilon, "eps_outside": norm.eps_outside, "input": norm.input,
                "output": norm.output, "nodes": [node.name for node in norm.nodes if not quantizes(node)],
                "blocker": norm.blocker, "codes": _codes(borders[norm.name]),
            }
            for norm in norms
        ]
    }  # fmt: skip
    rows = [
        (
            norm.name,
            norm.form,
            " ".join(map(str, norm.axes)),
            norm.n,
            f"{norm.epsilon:g}" + (" outside" if norm.eps_outside else ""),
            norm.input,
            norm.blocker or ("yes" + _between(borders[norm.name])),
        )
        for norm in norms
    ]
    columns = ("norm", "form", "axes", "n", "epsilon", "input", "replaceable")
    output.result(document, common.table(f"Norms of {model.name}", columns, rows))
    replaceable = sum(norm.blocker is None for norm in norms)
    output.close(f"{common.count(len(norms), 'norm')}, {replaceable} can be replaced")


def _codes(border: Border | None) -> dict[str, object] | None:
    """Return the quantization parameters that the model has for a norm, as JSON has them."""
    if border is None:
        return None
    sides = {
        "input": border.input, "output": border.output, "residual": border.residual, "sum_output": border.sum_output,
    }  # fmt: skip
    return {
        role: {
            "dtype": params.dtype.value, "scale": params.channel_scales or params.scale,
            "zero_point": params.zero_point, "exponents": params.exponents,
        }
        for role, params in sides.items()
        if params is not None
    }  # fmt: skip


def _between(border: Border | None) -> str:
    if border is None:
        return ""
    return ", between quantizers" if border.add is None else ", between quantizers, with the residual add"
