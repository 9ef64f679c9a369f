"""The worst-case search behind docs/arithmetic.md, section 12: it computes the function, it climbs, and never wins."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import exactness
import numpy as np
import pytest

from fxp_layernorm import reference

TEXT = (Path(__file__).parent.parent / "docs" / "arithmetic.md").read_text(encoding="utf-8")
CONFIGURATIONS = {configuration.name: configuration for configuration in exactness.configurations(40)}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_search_judges_by_the_function_itself(name: str) -> None:
    """Its errors, vectorised over rows, are those of the reference's integers; so are S and Q after many changes."""
    configuration = CONFIGURATIONS[name]
    spec = configuration.plan(configuration.layer(40))
    search = exactness.Search(spec, 12, np.random.default_rng(0))
    before = search.best()[0]
    search.climb(120)
    assert search.best()[0] > before
    for row, (error, channel) in enumerate(zip(search.error, search.channel, strict=True)):
        codes = [operand[row] for operand in search.codes]
        stages = reference.row_stages(spec, *(operand.tolist() for operand in codes))
        assert (search.S[row], search.Q[row]) == (stages.S, stages.Q)
        if error >= 0:
            f = reference.ideal(spec, *exactness._stored(spec, codes))[channel]
            a = stages.t[channel] * spec.G[channel] + spec.B[channel]
            assert error == pytest.approx(float(abs(a / np.longdouble(2**spec.s2) - f)), rel=1e-6, abs=1e-13)
    found, _ = search.best()
    assert search.error.max() * (1 - 1e-6) <= found <= spec.excess


@pytest.mark.parametrize("name", ["8 -> 8, lane 24", "16 + 8 -> 8 and the sum at 8", "8 -> 8, `mac16x16-32`"])
def test_a_configuration_is_measured(name: str) -> None:
    effort = replace(exactness.QUICK, n=40)
    m = exactness.measure(CONFIGURATIONS[name], effort)
    assert m.largest <= 1
    assert m.differing <= 0.02
    assert 0.3 < m.seen / m.proved <= m.searched <= 1
    assert (m.cost is not None) == ("mac" in name)


def test_the_page_has_a_row_for_each_configuration_and_none_beyond_its_bound() -> None:
    page = TEXT[TEXT.index("<!-- printed -->") : TEXT.index("<!-- end -->")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == list(CONFIGURATIONS)
    for row in rows:
        seen, proved, ratio, any_layer = map(float, row[4:8])
        assert seen <= proved
        assert ratio <= any_layer <= 1
        assert any_layer > 0.75  # the bound is not much wider than the errors there are
    assert re.search(r"n = 768, 1,500 typical rows and 8,192,000 searched ones", page)
