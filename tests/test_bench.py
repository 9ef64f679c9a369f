"""The benchmark: what it measures and how it reports it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from printed import refreshed

import fxp_layernorm as fxp
from fxp_layernorm import benchmark
from fxp_layernorm.cli.bench import bench


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "QUICK_SHAPES", ((1, 32), (40, 32)))
    monkeypatch.setattr(benchmark, "QUICK_SECONDS", 0.0)
    monkeypatch.setattr(benchmark, "REST", 0.001)
    monkeypatch.setattr(benchmark, "WARMING", 0.0)
    monkeypatch.setattr(benchmark, "SIDE", 0.0001)


def test_json_holds_every_pairing_and_peer() -> None:
    result = CliRunner().invoke(bench, ["--quick", "--json", "--threads", "2"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    peers = {"copy int8"}
    if importlib.util.find_spec("torch"):
        peers |= {"torch int8", "torch float32"}
    if importlib.util.find_spec("onnxruntime"):
        peers |= {"onnxruntime float32"}
    assert [case["case"] for case in document["cases"]] == [
        f"{pairing}, {rows} x 32" for rows in (1, 40) for pairing in benchmark.PAIRINGS
    ]
    for case in document["cases"]:
        assert case["gelem_per_s"] > 0
        assert set(case["ratio"]) == peers
        assert all(ratio > 0 for ratio in [case["scaling"], case["side_by_side"], *case["ratio"].values()])
    assert {(entry["peer"], entry["shape"]) for entry in document["peers"]} == {
        (peer, shape) for peer in peers for shape in ("1 x 32", "40 x 32")
    }
    assert [entry["way"] for entry in document["calls"]] == 2 * ["out=", "in place", "output in new pages"]
    assert set(document["compile_s"]) == set(map(str, benchmark.PAIRINGS))
    assert document["threads"] == 2
    assert document["environment"]["cpu"]
    assert {"python", "numpy", "numba"} <= set(document["environment"]["versions"])
    assert result.stderr.startswith("PASSED | 10 cases measured")


def test_ratios_are_of_calls_that_follow_each_other() -> None:
    slow, fast = [2.0, 3.0, 40.0], [1.0, 1.0, 20.0]  # the machine took a rest, and both calls took it
    assert benchmark._ratio(slow, fast) == 2


def test_the_table_names_the_cpu_and_every_case() -> None:
    result = CliRunner().invoke(bench, ["--quick"])
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    assert " ".join(benchmark.environment()["cpu"].split()) in words
    for pairing in benchmark.PAIRINGS:
        assert f"{pairing}, 40 x 32" in words


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    document = benchmark.run(quick=True)
    assert {entry["peer"] for entry in document["peers"]} == {"copy int8"}


@pytest.mark.parametrize("pairing", benchmark.PAIRINGS, ids=str)
def test_what_is_measured_is_exact(pairing: benchmark.Pairing) -> None:
    norm = pairing.norm(64)
    codes = benchmark._codes(pairing, 20, 64)
    assert (norm.spec.input.exponents is not None) == pairing.exponents
    assert len(np.unique(codes)) > 150
    np.testing.assert_array_equal(norm(codes), fxp.reference.run(norm.spec, codes))


def test_what_commands_print_is_put_below_their_names() -> None:
    page = "A\n<!-- printed by: echo new -->\n```\nold\n```\nB\n<!-- printed by: false -->\n```\nkept\n```\n"
    assert refreshed(page, "echo") == page.replace("old", "new")
    with pytest.raises(subprocess.CalledProcessError):
        refreshed(page, "")
