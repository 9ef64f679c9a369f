"""The planner: its integers are the nearest to the real parameters, its widths the largest, its lane the narrowest."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from naive import hold, nearest
from rows import KINDS, LANES, PAIRINGS, REACH, adversarial, exponents_of, layer_of, noise, params_of

from fxp_layernorm import DType, InputError, LayerNorm, NormKind, PlanError, QuantParams, plan, proof
from fxp_layernorm.planner import MAX_EXCESS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize(("source", "target"), PAIRINGS)
def test_the_integers_are_the_real_parameters_rounded_half_up(
    source: DType, target: DType, lane: int, kind: NormKind
) -> None:
    n = 48
    layer = layer_of(kind, n, eps=3e-4)
    qi = params_of(source, exponents=exponents_of(n, 2))
    qo = params_of(target, 2 * REACH, exponents=exponents_of(n, 3, seed=1))
    spec = plan(layer, qi, qo, lane=lane)
    assert (spec.kind, spec.normalized_shape, spec.eps, spec.input, spec.output) == (kind, (n,), 3e-4, qi, qo)
    assert (spec.lane, spec.m) == (lane, {24: 18, 32: 24, 64: 31}[lane])
    assert nearest(n**2 * Fraction(layer.eps) / Fraction(qi.scale) ** 2 * 4**spec.h) == spec.E
    for c, (gamma, beta) in enumerate(zip(layer.gamma.tolist(), layer.beta.tolist(), strict=True)):
        step = Fraction(qo.scale) * 2 ** qo.channel_exponents(n)[c]
        assert nearest(Fraction(gamma) / step * Fraction(2) ** (spec.s2 - spec.F)) == spec.G[c]
        assert nearest((Fraction(beta) / step + qo.zero_point) * 2**spec.s2) == spec.B[c]
    assert (spec.gamma, spec.beta) == (tuple(layer.gamma), tuple(layer.beta))


@pytest.mark.parametrize(
    ("kind", "n", "lane", "K"),
    [
        (NormKind.LAYERNORM, 768, 24, 18),
        (NormKind.LAYERNORM, 768, 64, 48),
        (NormKind.LAYERNORM, 4096, 64, 44),
        (NormKind.LAYERNORM, 65_536, 64, 38),
    ],
)
def test_bits_of_the_normalized_value(kind: NormKind, n: int, lane: int, K: int) -> None:
    """The figures of docs/arithmetic.md, section 5."""
    assert plan(layer_of(kind, n), params_of("int8"), params_of("int8"), lane=lane).K == K


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("n", [1, 2, 64, 768, 65_536])
def test_eps_gets_as_many_fraction_bits_as_V_can_hold(n: int, eps: float) -> None:
    spec = plan(layer_of(NormKind.LAYERNORM, n, eps=eps), params_of("int8"), params_of("int8"))
    v0_max = spec.row_stage.codes.v0_max
    assert (v0_max << 2 * spec.h) + spec.E < 1 << 62
    more = nearest(n**2 * Fraction(eps) / Fraction(spec.input.scale) ** 2 * 4 ** (spec.h + 1))
    assert spec.h == 30 or (v0_max << 2 * (spec.h + 1)) + more >= 1 << 62


@pytest.mark.parametrize(
    ("source", "target", "lane"),
    [
        ("int8", "int8", 24),
        ("int8", "uint8", 24),
        ("int16", "int8", 32),
        ("int8", "int16", 64),
        ("int16", "uint16", 64),
    ],
)
def test_the_narrowest_lane_that_can_be_defended(source: str, target: str, lane: int) -> None:
    layer, qi, qo = layer_of(NormKind.LAYERNORM, 768), params_of(source), params_of(target)
    spec = plan(layer, qi, qo)
    assert spec.lane == lane
    assert spec.excess <= MAX_EXCESS[DType(target).bits]
    assert spec == plan(layer, qi, qo, lane=lane)
    for narrower in (other for other in LANES if other < lane):
        assert plan(layer, qi, qo, lane=narrower).excess > MAX_EXCESS[DType(target).bits]


def test_the_excess_that_is_asked_for_chooses_the_lane() -> None:
    layer, qi, qo = layer_of(NormKind.LAYERNORM, 64), params_of("int16"), params_of("int16")
    by_lane = {lane: plan(layer, qi, qo, lane=lane).excess for lane in LANES}
    assert by_lane[24] > by_lane[32] > by_lane[64]
    for lane, next_lane in ((24, 32), (32, 64), (64, 64)):
        assert plan(layer, qi, qo, max_excess=by_lane[lane]).lane == lane
        assert plan(layer, qi, qo, max_excess=by_lane[lane] * 0.999).lane == next_lane
    assert plan(layer, qi, qo, max_excess=0.0).lane == 64  # none can, so the best of them


def test_a_lane_that_cannot_hold_the_layer_is_passed_over() -> None:
    """Outputs of up to 1.34e9 LSB before they are clamped, beyond 2**30: 32 bits leave no shift s2, and 64 bits do."""
    layer = LayerNorm(6)
    layer.weight = np.full(6, 3e7)
    qi, qo = params_of("int8"), QuantParams("int8", 0.05)
    for lane in (24, 32):
        with pytest.raises(PlanError, match=rf"gains of up to 6e\+08 and offsets of up to 0 .* n = 6, .* {lane} bits"):
            plan(layer, qi, qo, lane=lane)
    assert plan(layer, qi, qo).lane == 64


@pytest.mark.parametrize(
    ("gamma", "beta", "scale", "words"),
    [
        (1e9, 0.0, 0.05, r"gains of up to 2e\+10 and offsets of up to 0 output LSB, for n = 6, into a lane of 64 bits"),
        (0.0, 1e9, 0.05, r"gains of up to 0 and offsets of up to 2e\+10 output LSB"),
        (1.0, 0.0, 2.0**-126, r"gains of up to 8\.5\d+e\+37"),
        (1e300, 0.0, 2.0**-126, "gamma or beta is too large for the output scale"),
        (0.0, -1e300, 2.0**-126, "gamma or beta is too large for the output scale"),
    ],
)
def test_a_layer_too_large_for_its_output_scale(gamma: float, beta: float, scale: float, words: str) -> None:
    layer = LayerNorm(6)
    layer.weight, layer.bias = np.full(6, gamma), np.full(6, beta)
    with pytest.raises(PlanError, match=words):
        plan(layer, params_of("int8"), QuantParams("int8", scale))


@pytest.mark.parametrize(
    ("n", "eps", "qi"),
    [
        (6, 1e30, QuantParams("int8", 0.05)),
        (6, 1e300, QuantParams("int8", 2.0**-126)),  # beyond every float64
        (6, 1e-5, QuantParams("int8", 1e-12)),
        (200_000, 1e-5, QuantParams("uint16", 0.05)),
        (768, 1e-5, QuantParams("uint16", 0.05, exponents=exponents_of(768, 15))),
        (768, 1e-5, QuantParams("uint16", 0.05, exponents=[12] * 768)),  # the sum of squares is beyond 64 bits
        (1024, 1e-5, QuantParams("int16", 0.05, -32768, [13] * 1024)),
    ],
)
def test_a_row_too_wide_for_62_bits_is_refused_with_its_parts(n: int, eps: float, qi: QuantParams) -> None:
    with pytest.raises(PlanError, match=r"V is up to \S+, beyond 62 bits: .* by the codes and .* by eps; use a larger"):
        plan(LayerNorm(n, eps), qi, params_of("int8"))


@pytest.mark.parametrize("lane", [0, 16, 25, "24", True, float("nan")])
def test_lanes_that_there_are_not(lane: Any) -> None:
    with pytest.raises(InputError, match=r"the lane is .*; it must be one of 24, 32, 64"):
        plan(LayerNorm(6), params_of("int8"), params_of("int8"), lane=lane)


def test_exponents_for_another_number_of_channels_are_refused() -> None:
    wrong = params_of("int8", exponents=[0, 1, 2])
    with pytest.raises(InputError, match="input has 3 channel exponents; the layer normalizes 6"):
        plan(LayerNorm((2, 3)), wrong, params_of("int8"))
    with pytest.raises(InputError, match="output has 3 channel exponents; the layer normalizes 6"):
        plan(LayerNorm((2, 3)), params_of("int8"), wrong)


@pytest.mark.parametrize(
    ("gamma", "beta"),
    [(0.0, 0.0), (0.0, 0.3), (1e-300, 0.0), (5e-324, 5e-324), (-3.0, -2.0), (1e-3, 1e3), (1.0, 1e6)],
)
def test_gains_and_offsets_of_any_size_are_planned(gamma: float, beta: float) -> None:
    """Nothing (the output is then that of beta), subnormal numbers, and offsets that saturate whatever comes."""
    layer = LayerNorm(24)
    layer.weight, layer.bias = np.full(24, gamma), np.full(24, beta)
    for lane in (None, *LANES):
        spec = plan(layer, params_of("int8"), params_of("int8", 10.0), lane=lane)
        hold(spec, np.concatenate([adversarial(spec.input, 24), noise(spec.input, 24, 4)]))


def test_several_dimensions_are_one_row() -> None:
    flat = layer_of(NormKind.LAYERNORM, 24)
    layer = LayerNorm((2, 3, 4))
    layer.weight, layer.bias = flat.gamma.reshape(2, 3, 4), flat.beta.reshape(2, 3, 4)
    qi, qo = params_of("int8", exponents=exponents_of(24, 2)), params_of("int8")
    spec, expected = plan(layer, qi, qo), plan(flat, qi, qo)
    assert spec.normalized_shape == (2, 3, 4)
    assert (spec.G, spec.B, spec.K, spec.s1, spec.s2, spec.E) == (
        expected.G, expected.B, expected.K, expected.s1, expected.s2, expected.E,
    )  # fmt: skip


def test_a_bound_per_stage_that_adds_up() -> None:
    spec = plan(layer_of(NormKind.LAYERNORM, 64), params_of("int8"), params_of("int8"))
    assert list(spec.excess.terms) == ["R", "D", "r", "E", "t", "G", "B"]
    assert sum(spec.excess.terms.values()) == pytest.approx(float(spec.excess), rel=1e-9)
    assert 0 <= spec.excess.channel < 64
    assert isinstance(spec.excess, proof.Excess)
