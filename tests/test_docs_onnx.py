"""docs/onnx.md names every attribute, input and operator that the subgraph has, and no other."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import onnx
import pytest
from rows import exponents_of, layer_of, params_of

import fxp_layernorm as fxp
from fxp_layernorm import NormKind
from fxp_layernorm.export import Word, to_onnx

TEXT = (Path(__file__).parent.parent / "docs" / "onnx.md").read_text()


def models(word: str) -> list[onnx.ModelProto]:
    """Return functions of all kinds together: lanes, types and exponents, several dimensions, and the odd sizes."""
    built = []
    if word == "int64":
        for kind, lane, form in ((NormKind.LAYERNORM, 32, "function"), (NormKind.RMSNORM, 64, "inline"),
                                 (NormKind.LAYERNORM, 64, "function")):  # fmt: skip
            spec = fxp.plan(
                layer_of(kind, 64), params_of("int8", exponents=exponents_of(64, 2)), params_of("int16"), lane=lane
            )
            built.append(to_onnx(spec, form=form))
        wide = params_of("int8", exponents=exponents_of(64, 15))
        built.append(
            to_onnx(fxp.plan(layer_of(NormKind.LAYERNORM, 64), wide, params_of("int8"), lane=32), form="function")
        )
        outside = fxp.LayerNorm(64, eps_outside=True)
        built.append(to_onnx(fxp.plan(outside, params_of("int8"), params_of("int8")), form="function"))
    else:
        for kind, n, output, exponents in (
            (NormKind.LAYERNORM, 120, "int16", 0), (NormKind.RMSNORM, 64, "int8", 0),
            (NormKind.LAYERNORM, 64, "int8", 7), (NormKind.LAYERNORM, 1500, "uint8", 0),
        ):  # fmt: skip
            params = params_of("uint8" if n == 1500 else "int8", exponents=exponents_of(n, exponents))
            params = params if exponents else params_of(params.dtype)
            spec = fxp.plan(layer_of(kind, n), params, params_of(output), hardware="carried24")
            shifted = dataclasses.replace(spec, B=tuple(value + 1 for value in spec.B))  # no multiple of 2**7
            built += [to_onnx(spec, word, form="function"), to_onnx(shifted, word, form="function")]
        for n in (120, 1500):
            wide = params_of("uint16")
            spec = fxp.plan(layer_of(NormKind.LAYERNORM, n), wide, wide, hardware="carried24")
            built.append(to_onnx(spec, word, form="function"))
        outside = fxp.LayerNorm(64, eps=0.1, eps_outside=True)
        spec = fxp.plan(outside, params_of("int8"), params_of("int8"), hardware="carried24")
        built.append(to_onnx(spec, word, form="function"))
    flat = fxp.plan(fxp.LayerNorm((4, 6)), params_of("int8"), params_of("int8"), hardware="carried24")
    return [*built, to_onnx(flat, word), to_onnx(flat, word, form="function")]


def table(heading: str) -> set[str]:
    section = TEXT.split(f"### {heading}\n")[1].split("\n#")[0]
    cells = re.findall(r"^\| (`[^|]*`) ", section, flags=re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}


def test_attributes_and_inputs() -> None:
    functions = [function for word in Word for model in models(word) for function in model.functions]
    assert {name for function in functions for name in function.attribute} == table("Attributes")
    names = {name for function in functions for name in (*function.input, *function.output)}
    assert names == table("Inputs and output")


@pytest.mark.parametrize("words", [("int64",), ("int24", "float24")])
def test_operators(words: tuple[str, ...]) -> None:
    used = set()
    for model in (model for word in words for model in models(word)):
        for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
            if node.domain == "":
                used.add(node.op_type)
    section = TEXT.split(f"## The operators of {' and '.join(words)}\n")[1].split("\n## ")[0]
    assert used == {name for name in re.findall(r"\b[A-Z]\w+", section) if onnx.defs.has(name)}


def test_function_names() -> None:
    pattern = r"(LayerNorm|RMSNorm)_(int64|int24|float24)_[0-9a-f]{8}"
    functions = (function for word in Word for model in models(word) for function in model.functions)
    assert all(re.fullmatch(pattern, function.name) for function in functions)
