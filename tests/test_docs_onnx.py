"""docs/onnx.md names every attribute, input and operator that the subgraph has, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from rows import exponents_of, layer_of, params_of

import fxp_layernorm as fxp
from fxp_layernorm import NormKind
from fxp_layernorm.export import to_onnx

TEXT = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text()


def models() -> list[onnx.ModelProto]:
    """Return functions of all layouts together: both kinds and lanes, with exponents, and several dimensions."""
    built = []
    for kind, lane, form in ((NormKind.LAYERNORM, 32, "function"), (NormKind.RMSNORM, 64, "inline"),
                             (NormKind.LAYERNORM, 64, "function")):  # fmt: skip
        spec = fxp.plan(
            layer_of(kind, 64), params_of("int8", exponents=exponents_of(64, 2)), params_of("int16"), lane=lane
        )
        built.append(to_onnx(spec, form=form))
    flat = fxp.plan(fxp.LayerNorm((4, 6)), params_of("int8"), params_of("int8"))
    return [*built, to_onnx(flat), to_onnx(flat, form="function")]


def table(heading: str) -> set[str]:
    section = TEXT.split(f"### {heading}\n")[1].split("\n#")[0]
    cells = re.findall(r"^\| (`[^|]*`) ", section, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_attributes_and_inputs() -> None:
    functions = [function for model in models() for function in model.functions]
    assert {name for function in functions for name in function.attribute} == table("Attributes")
    names = {name for function in functions for name in (*function.input, *function.output)}
    assert names == table("Inputs and output")


def test_operators() -> None:
    used = set()
    for model in models():
        for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
            if node.domain == "":
                used.add(node.op_type)
    named = set(re.findall(r"[A-Z]\w+", TEXT.split("## The operators of int64\n")[1].split(", at opset")[0]))
    assert used == named


def test_function_names() -> None:
    pattern = r"(LayerNorm|RMSNorm)_int64(_uint(32|64)){3}_steps[12](_groups\d)?(_flatten)?"
    assert all(re.fullmatch(pattern, function.name) for model in models() for function in model.functions)
