"""The peers' formulas, on vectors worked out by hand; and what the benchmark makes of them."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
from accuracy import __main__ as page
from accuracy import formulas, peers
from accuracy.cases import CASES, Case, Problem, layer_of, problem

from fxp_layernorm import LayerNorm


def row(*values: int) -> Any:
    return np.array([values], dtype=np.int64)


def test_division_truncates() -> None:
    assert formulas.tdiv(row(7, -7, 6, 0), 2).tolist() == [[3, -3, 3, 0]]


def test_high_product_rounds_half_up_in_the_product() -> None:
    """2^30 * 1 is half a unit: up; its negative lands on the tie's other side, towards zero."""
    assert formulas.high_product(row(1 << 30, -(1 << 30), 3 << 29), row(1, 1, 1 << 30)).tolist() == [[1, 0, 3 << 28]]


def test_rounding_shift_goes_away_from_zero() -> None:
    assert formulas.rounding_shift(row(5, -5, 3, -3, 1, -1, 4), 1).tolist() == [[3, -3, 2, -2, 1, -1, 2]]


@pytest.mark.parametrize(("value", "expected"), [(0.5, (1 << 30, 0)), (1.0, (1 << 30, 1)), (3.0, (3 << 29, 2))])
def test_multiplier_of_31_bits(value: float, expected: tuple[int, int]) -> None:
    assert formulas.quantized_multiplier(value) == expected
    assert formulas.quantized_product(np.array([1000]), *expected) == 1000 * value


def test_inverse_root_is_five_newton_steps() -> None:
    v = np.array([2, 3, 4, 250_000, (1 << 27) - 1, 1 << 29, (1 << 31) - 1], dtype=np.int64)
    inverse, right = formulas.inverse_root(v)
    reduced = v / 2.0 ** (2 * np.floor(np.log2(v / 2) / 2) + 3)  # in [1/4, 1)
    x = np.ones_like(reduced)
    for _ in range(5):
        x = 1.5 * x - 0.5 * reduced * x**3
    exact = x * np.sqrt(reduced / v)
    # Q3.28, where a step's difference, three roundings, is taken times 8
    np.testing.assert_allclose(inverse * 2.0 ** -(31 + right), exact, rtol=3 * 8 * 2.0**-28)
    assert formulas.inverse_root(np.array([1]))[0] == (1 << 31) - 1


def test_tflite() -> None:
    """Mean 0, variance 50,000: 300 * 1024 / sqrt(50,000) = 1373.8; times 16384, over 1024 and 2."""
    y = formulas.tflite(row(-300, -100, 100, 300), row(*[1 << 14] * 4), row(0, 0, 0, 1 << 11), 1 << 30, 0)
    assert y.tolist() == [[-10992, -3664, 3664, 10993]]


def test_tflite_loses_the_variance_where_n_is_no_power_of_two() -> None:
    """2^20 over 3 is cut: 349,525 * 3 * 10^8 is 5 * 10^8 below 2^20 * 10^8, which leaves less than no variance."""
    level = row(10_001, 10_000, 9_999)
    y = formulas.tflite(level, row(*[1 << 14] * 3), row(0, 0, 0), 1 << 30, 0, variance_limit=4)
    assert y.tolist() == [[4096, 0, -4096]]  # 1024 / sqrt(4) * 16384 / 1024 / 2, the variance being 2/3


def test_i_vit_stops_before_the_root() -> None:
    """V = 1024: ten steps from 2^16 end at 68 where the root is 32."""
    assert formulas.i_vit(row(16, -16, 16, -16), np.zeros(4, np.int64)).tolist() == [
        [8 * ((2**31 - 1) // 68), -8 * ((2**31 - 1) // 68)] * 2
    ]


def test_fq_vit() -> None:
    """Standard deviation 1, A = 3: N = 6, M = 192, B = 32; y = 3.5 and -2.5, ties to even."""
    assert formulas.fq_vit(row(-1, 1), np.full(2, 3.0), np.full(2, 0.5)).tolist() == [[-2, 4]]
    # 1.999 is cut to 255 / 128
    assert formulas.fq_vit(row(-100, 100), np.full(2, 199.9), np.zeros(2)).tolist() == [[-199, 199]]
    assert not np.isfinite(formulas.fq_vit(row(5, 5), np.ones(2), np.zeros(2))).any()


def test_deeploy() -> None:
    """Variance 250 + 1: the root is 15; 80 / 15 and 160 / 15 are cut towards zero, the shift is a floor."""
    x = row(10, -10, 20, -20)
    assert formulas.deeploy(x, row(8, 8, 8, 8), row(2, 2, 2, 2), 1).tolist() == [[3, -2, 6, -4]]
    large = row(2000, 0, 0, 0)
    assert formulas.deeploy(x, large, row(0, 0, 0, 0), 0)[0, 0] == 1333 - 5 * 256
    assert formulas.deeploy(x, large, row(0, 0, 0, 0), 0, wraps=False)[0, 0] == 127


@pytest.fixture(scope="module", params=[8, 16])
def small(request: pytest.FixtureRequest) -> Problem:
    return problem(layer_of(64), np.random.default_rng(0).standard_normal((20, 64)), request.param)


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peers_are_on_the_common_grid(peer: peers.Peer, small: Problem) -> None:
    """Fed wrongly, with a scale, an offset or an order of its own, a peer would be off by tens of codes of 8 bits."""
    if not importlib.util.find_spec(peer.module):
        pytest.skip(f"needs {peer.module}")
    if small.bits not in peer.bits:
        pytest.skip(f"has no {small.bits} bits")
    y = np.clip(np.asarray(peer.run(small), dtype=np.float64), small.output.dtype.lo, small.output.dtype.hi)
    off = np.abs(y - small.ideal) > 4 * 2.0 ** (small.bits - 8)
    assert np.count_nonzero(off) <= (2 if peer.name == "Deeploy" else 0)  # the ends of its codes wrap


def test_measure_counts_what_is_not_finite() -> None:
    flat = problem(LayerNorm(4), np.ones((2, 4)), 8)
    broken = peers.Peer("broken", "", lambda problem: np.where(np.arange(4) == 1, np.nan, problem.ideal))
    assert page.measure(broken, [flat, flat]) == page.Measured(None, None, None, None, 0.25)


def test_a_better_figure_is_bold(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [peer for peer in peers.PEERS if peer.name in (page.IDEAL, page.OURS)]
    better = peers.Peer("better", "", chosen[0].run, (8,))
    worse = peers.Peer("worse", "", lambda problem: chosen[0].run(problem) + 1, (8,))
    broken = peers.Peer("broken", "", lambda problem: np.full_like(problem.ideal, np.nan), (8,))
    monkeypatch.setattr(page, "PEERS", (*chosen, better, worse, broken))
    rows = np.random.default_rng(0).standard_normal((200, 64))
    found = page.run([Case("few", "", lambda bits: iter([problem(layer_of(64), rows, bits)]))])
    table = page.tables({8: found[8]}).split("differ")[1]
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "**0**" in lines["better"]
    assert "**" not in lines["worse"]
    assert "NaN (100 %)" in lines["broken"]
    assert "**" not in lines[page.IDEAL] + lines[page.OURS]


def test_the_page_is_of_these_cases_and_peers() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    for name, words in [(case.name, case.meaning) for case in CASES] + [(peer.name, peer.fed) for peer in peers.PEERS]:
        assert f"- **{name}**: {words}" in text
