"""docs/arithmetic.md agrees with the code: its generated blocks, its equation numbers, the functions that it names."""

from __future__ import annotations

import importlib
import re
import runpy
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "arithmetic.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
#: number and body of each equation, which ends where the next one or the block does
EQUATIONS = [found for block in BLOCKS for found in re.findall(r"^\((\d+)\) (.*?)(?=^\(\d+\) |\Z)", block, re.M | re.S)]
#: the blocks of section 11 carry the numbers of section 3 and 4 again
DEFINITIONS = [(int(number), body) for number, body in EQUATIONS if "[" in body]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "worked_example.py"))


@pytest.mark.parametrize("name", ["ties", "example"])
def test_generated_block_is_what_the_script_prints(script: dict[str, Any], name: str) -> None:
    assert script[name]() in BLOCKS, f"put the output of docs/worked_example.py into arithmetic.md: {script[name]()}"


def test_equations_are_numbered_consecutively() -> None:
    assert [number for number, _ in DEFINITIONS] == list(range(len(DEFINITIONS)))
    assert len(DEFINITIONS) > 10


def test_references_are_to_existing_equations() -> None:
    referenced = {int(number) for number in re.findall(r"\((\d+)\)", TEXT)}
    assert referenced <= {number for number, _ in DEFINITIONS}


def test_each_equation_names_one_function() -> None:
    for number, body in DEFINITIONS:
        assert len(re.findall(r"\[[a-z_]+\.[A-Za-z_.]+\]$", body, re.M)) == 1, f"equation ({number})"


def test_named_functions_exist() -> None:
    names = set(re.findall(r"\[([a-z_]+\.[A-Za-z_.]+)\]$", TEXT, re.M))
    names |= set(
        re.findall(
            r"`((?:adder|errors|hardware|kernels|planner|proof|quantization|reference|spec)\.[A-Za-z_.]+)`", TEXT
        )
    )
    assert len(names) > 10
    for name in sorted(names):
        module, _, attribute = name.partition(".")
        attrgetter(attribute)(importlib.import_module(f"fxp_layernorm.{module}"))


def test_spec_fields_of_the_table_exist() -> None:
    from fxp_layernorm import LayerNormSpec, QuantParams

    table = TEXT[TEXT.index("| symbol | field") : TEXT.index("The one rounding rule")]
    cells = [row.split("|")[2] for row in table.splitlines()[2:] if row.startswith("|")]
    names = [name for cell in cells for name in re.findall(r"`([\w.]+)`", cell)]
    assert len(names) > 10
    for name in names:
        field, _, parameter = name.partition(".")
        assert field in LayerNormSpec.__dataclass_fields__, name
        assert not parameter or parameter in QuantParams.__dataclass_fields__, name


def test_figures_that_the_text_quotes() -> None:
    from fxp_layernorm import LayerNorm, QuantParams, plan, planner

    layer, wide = LayerNorm(768), QuantParams("int16", 0.001)
    assert plan(layer, wide, wide, lane=64, max_excess=0.0).K == 48
    assert plan(LayerNorm(65_536), wide, wide, lane=64, max_excess=0.0).K == 38
    assert planner.MAX_EXCESS == {8: 1 / 8, 16: 1 / 256}
    assert (planner.WORD_F, planner.WORD, planner.LONG_GUARD) == (10, 16, 4)
