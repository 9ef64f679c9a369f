"""The compiled row kernel equals the reference in every code, and both keep the proved bound."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from naive import compare, hold
from rows import (
    DTYPES,
    KINDS,
    LANES,
    REACH,
    adversarial,
    equal_integers,
    exponents_of,
    layer_of,
    noise,
    params_of,
    typical,
)

from fxp_layernorm import DType, FxpLayerNorm, LayerNorm, LayerNormSpec, NormKind, QuantParams, plan, reference

LENGTHS = [
    1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 300, 384, 511, 512,
    513, 768, 1000, 1023, 1024, 1025, 2048, 3000, 4096, 5000, 8191, 16384, 32769, 65_535, 65_536,
]  # fmt: skip
#: What the oldest Numba is tried with.
QUICK_LENGTHS = [1, 2, 63, 64, 65, 129, 1000]
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]
#: The reference is Python: the rows of a longer n together have about this many codes.
BUDGET = 8000


def attack(spec: LayerNormSpec, limit: int | None = None) -> None:
    """Hold kernel, reference and bound on adversarial, random and typical rows."""
    rows = [adversarial(spec.input, spec.n, limit)]
    if limit is None:
        rows += [noise(spec.input, spec.n, 3), typical(spec.input, spec.n, 3)]
    hold(spec, np.concatenate(rows))


def marks(i: int, j: int, k: int) -> Any:
    """Choose one lane of each pairing, so that every type meets every lane, and of these one pairing of each type."""
    return EXHAUSTIVE if (i + j + k) % 3 else () if j == (i + 1) % 4 else pytest.mark.slow


#: Every pairing in every lane. The kernel compiles for each.
PAIRINGS_IN_LANES = [
    pytest.param(source, target, lane, marks=marks(i, j, k))
    for (i, source), (j, target), (k, lane) in itertools.product(enumerate(DTYPES), enumerate(DTYPES), enumerate(LANES))
]


@pytest.mark.parametrize(("source", "target", "lane"), PAIRINGS_IN_LANES)
def test_every_pairing_of_types(source: DType, target: DType, lane: int) -> None:
    for kind in KINDS:
        attack(plan(layer_of(kind, 100), params_of(source), params_of(target), lane=lane))


@pytest.mark.parametrize("n", [pytest.param(n, marks=() if n in QUICK_LENGTHS else pytest.mark.slow) for n in LENGTHS])
@pytest.mark.parametrize(
    ("source", "target", "lane", "kind"),
    [
        ("int8", "int8", 24, NormKind.LAYERNORM),
        ("uint8", "int8", 32, NormKind.RMSNORM),
        ("uint16", "int16", 64, NormKind.LAYERNORM),
    ],
)
def test_every_length(n: int, source: str, target: str, lane: int, kind: NormKind) -> None:
    spec = plan(layer_of(kind, n, seed=n), params_of(source), params_of(target, 4 * REACH), lane=lane)
    attack(spec, None if n * 20 < BUDGET else max(BUDGET // n, 4))


@pytest.mark.parametrize(
    ("source", "target", "e_in", "e_out", "lane"),
    [
        ("int8", "int8", 7, 7, 24),
        ("int8", "int8", 7, 7, 64),
        ("uint8", "uint8", 4, 0, 32),
        ("int8", "int8", 0, 15, 32),
        ("int16", "int8", 1, 0, 32),
        ("int16", "int8", 3, 7, 32),
        ("uint16", "uint16", 7, 3, 64),
        pytest.param("int8", "uint8", 7, 7, 32, marks=EXHAUSTIVE),
        pytest.param("uint8", "int16", 4, 0, 64, marks=EXHAUSTIVE),
        pytest.param("int16", "int8", 3, 7, 24, marks=EXHAUSTIVE),
        pytest.param("uint16", "int8", 7, 7, 32, marks=EXHAUSTIVE),
        pytest.param("int16", "uint16", 8, 0, 64, marks=EXHAUSTIVE),
    ],
)
def test_channel_exponents(source: str, target: str, e_in: int, e_out: int, lane: int) -> None:
    n = 96
    qi = params_of(source, REACH / 2 ** (e_in / 2), exponents=exponents_of(n, e_in, seed=1))
    qo = params_of(target, REACH / 2 ** (e_out / 2), exponents=exponents_of(n, e_out, seed=2))
    for kind in KINDS:
        attack(plan(layer_of(kind, n), qi, qo, lane=lane))


@pytest.mark.parametrize(("n", "rows"), [(1, 130), (24, 1), (24, 63), (24, 64), (24, 65), (24, 131), (8200, 17)])
def test_a_row_does_not_depend_on_its_neighbours(n: int, rows: int) -> None:
    """Whatever blocks of rows and channels the kernel works in, also where the last one is not full."""
    norm = FxpLayerNorm(plan(layer_of(NormKind.LAYERNORM, n), params_of("int8"), params_of("int8")))
    q = noise(norm.spec.input, n, rows)
    np.testing.assert_array_equal(norm(q), [norm(row) for row in q])


@pytest.mark.parametrize(
    ("source", "n", "F", "noise", "rows"),
    [("uint8", 1088, 10, 0.0065, 30), ("int16", 1088, 10, 0.0065, 30), ("int16", 4096, 12, 0.0235, 10)],
)
def test_rows_whose_t_just_fits_words_and_whose_t_just_does_not(
    source: str, n: int, F: int, noise: float, rows: int
) -> None:
    """They go different ways: a spike at the end of the codes, over more and more noise. Words hold 32 of its size."""
    spec = plan(layer_of(NormKind.LAYERNORM, n), params_of(source), params_of("int8", 6.0), lane=32)
    assert spec.F == F
    size = (spec.input.hi - spec.input.lo) * np.linspace(0.9 * noise, 1.1 * noise, rows)[:, None]
    q = np.rint(spec.input.zero_point + size * np.random.default_rng(0).uniform(-1, 1, n))
    q[:, 700] = spec.input.hi
    q = q.astype(spec.input.dtype.numpy)
    spikes = np.array([reference.row_stages(spec, row.tolist()).t[700] for row in q])
    assert ((spikes > 31 << F) & (spikes < 32 << F)).any()
    assert ((spikes < 33 << F) & (spikes >= 32 << F)).any()
    np.testing.assert_array_equal(FxpLayerNorm(spec)(q), reference.run(spec, q))


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(
    ("source", "zero_in", "target", "zero_out"),
    [
        ("int8", -128, "int8", 127),
        ("int8", 127, "int8", -128),
        ("uint16", 0, "int8", 0),
        ("uint16", 65_535, "int8", -1),
        ("int16", -32_768, "int16", 32_767),
    ],
)
def test_zero_points_at_the_ends(source: str, zero_in: int, target: str, zero_out: int, lane: int) -> None:
    qi, qo = QuantParams(source, 0.01, zero_in), QuantParams(target, 0.05, zero_out)
    for kind in KINDS:
        attack(plan(layer_of(kind, 64), qi, qo, lane=lane))


@pytest.mark.slow
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("lane", LANES)
def test_eps_from_nothing_to_more_than_the_variance(eps: float, lane: int) -> None:
    for kind in KINDS:
        for source in ("int8", "int16"):
            attack(plan(layer_of(kind, 48, eps=eps), params_of(source), params_of("int16"), lane=lane))


@pytest.mark.parametrize("lane", LANES)
def test_rows_of_equal_integers_give_beta(lane: int) -> None:
    """V0 = 0 although the codes differ, by their channel exponents; with eps = 0 nothing else stops a division by 0."""
    n = 24
    layer = layer_of(NormKind.LAYERNORM, n, eps=0.0)
    qi = params_of("int8", exponents=exponents_of(n, 5))
    spec = plan(layer, qi, params_of("int8"), lane=lane)
    row = equal_integers(qi, n).astype(np.int8)
    assert len(np.unique(row)) > 2
    expected = np.floor(layer.beta / spec.output.scale + 0.5) + spec.output.zero_point
    np.testing.assert_array_equal(FxpLayerNorm(spec)(row), expected)
    hold(spec, row)


def test_the_final_rounding_is_half_up_not_to_even_nor_away_from_zero() -> None:
    """Ties at -1.5, -0.5, 0.5 and 1.5 LSB: even gives -2, 0, 0, 2; away gives -2, -1, 1, 2; half up -1, 0, 1, 2."""
    layer = LayerNorm(2, eps=0.0)  # (1, -1) normalizes to exactly itself
    layer.weight = np.array([1.0, 1.0])
    found = []
    for beta in (-2.5, -1.5, -0.5, 0.5):
        layer.bias = np.array([beta, beta])
        spec = plan(layer, QuantParams("int8", 1.0), QuantParams("int8", 1.0), lane=32)
        y = FxpLayerNorm(spec)(np.array([1, -1], dtype=np.int8))
        np.testing.assert_array_equal(y, reference.run(spec, np.array([1, -1], dtype=np.int8)))
        found.append(int(y[0]))
    assert found == [-1, 0, 1, 2]


def test_outputs_saturate_at_both_ends_of_the_type() -> None:
    for target in DTYPES:
        spec = plan(layer_of(NormKind.LAYERNORM, 64), params_of("int8"), params_of(target, 0.5))
        q = noise(spec.input, 64, 8)
        hold(spec, q)
        y = FxpLayerNorm(spec)(q)
        assert y.min() == target.lo
        assert y.max() == target.hi


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 100, 256, 768, 1000, 4096])
@pytest.mark.parametrize(
    ("source", "target"), [("int8", "int8"), ("int16", "int8"), ("uint8", "uint16"), ("int16", "int16")]
)
def test_few_codes_differ_from_the_correctly_rounded_ideal(source: str, target: str, n: int) -> None:
    """In the planner's own lane; flat and lognormal gains, with outlier channels and with channel exponents."""
    allowed = 0.006 if target == "int8" else 0.0005
    for gamma, e in ((0.0, 0), (1.0, 0), (0.3, 3)):
        exponents = exponents_of(n, e) if e else None
        qi, qo = params_of(source, exponents=exponents), params_of(target, REACH * np.exp(gamma), exponents=exponents)
        spec = plan(layer_of(NormKind.LAYERNORM, n, gamma=gamma, seed=n), qi, qo)
        q = typical(spec.input, n, 100_000 // n + 1)
        seen = compare(spec, q, FxpLayerNorm(spec)(q))
        assert seen.steps <= 1
        assert seen.differing <= allowed


@pytest.mark.slow
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("source", "target"), [("int8", "int8"), ("int16", "uint8"), ("int16", "int16")])
def test_the_bound_is_not_idle(source: str, target: str, lane: int) -> None:
    """Spikes over faint noise come to half of the proved excess, so that a bound twice too wide would show."""
    n = 64
    spec = plan(layer_of(NormKind.LAYERNORM, n), params_of(source), params_of(target), lane=lane)
    faint = noise(spec.input, n, 24 * n) // 8 + (spec.input.dtype.lo - spec.input.dtype.lo // 8)
    spikes = np.where(np.arange(n) == np.arange(24 * n)[:, None] // 24, spec.input.dtype.hi, faint)
    assert hold(spec, spikes.astype(spec.input.dtype.numpy)) > spec.excess / 2
