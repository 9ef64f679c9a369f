"""The proof: the bound is its table, no width is ever left, and what isn't proved doesn't exist."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
from fractions import Fraction
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import DTYPES, KINDS, LANES, adversarial, layer_of, params_of
from specs import rows_of, specs

from fxp_layernorm import (
    DType,
    InputError,
    LayerNorm,
    LayerNormSpec,
    NormKind,
    PlanError,
    QuantParams,
    WidthError,
    plan,
    proof,
    reference,
)
from fxp_layernorm.adder import code_ends
from fxp_layernorm.arguments import kernel_arguments


def unproved(spec: LayerNormSpec, **changes: Any) -> LayerNormSpec:
    """Return a changed spec past the checks of its constructor."""
    changed = object.__new__(LayerNormSpec)
    for field in dataclasses.fields(spec):
        object.__setattr__(changed, field.name, changes.get(field.name, getattr(spec, field.name)))
    return changed


#: The kernel is compiled for each combination of types; so many of the random specs' combinations are.
COMBINATIONS = 5


def types_of(spec: LayerNormSpec) -> tuple[Any, ...]:
    """Return what the kernel is compiled for."""
    arguments: list[Any] = []
    for argument in kernel_arguments(spec):
        arguments += argument if isinstance(argument, tuple) else [argument]
    types = [getattr(argument, "dtype", argument is None) for argument in arguments]
    return (*types, spec.output.dtype.numpy, *(params.dtype.numpy for params in spec.operands))


@pytest.fixture(scope="module")
def compiled() -> set[tuple[Any, ...]]:
    return set()


@settings(max_examples=70, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs(), st.integers(0, 99))
def test_no_width_and_no_bound_is_ever_broken(compiled: set[tuple[Any, ...]], spec: LayerNormSpec, seed: int) -> None:
    """The reference raises WidthError by itself, and its values keep the bound before their last rounding and after."""
    if len(compiled) < COMBINATIONS:
        compiled.add(types_of(spec))
    naive.hold(spec, *rows_of(spec, seed=seed), kernel=types_of(spec) in compiled)


@settings(max_examples=5)
@given(specs(st.integers(700, 5000), residuals=(None, DType.INT8)), st.integers(0, 99))
def test_long_rows_keep_their_widths_and_bounds(spec: LayerNormSpec, seed: int) -> None:
    naive.hold(spec, *rows_of(spec, seed=seed), kernel=False)


@settings(max_examples=40)
@given(specs(st.integers(1, 40)), st.integers(0, 99))
def test_the_function_is_its_definition_in_rationals(spec: LayerNormSpec, seed: int) -> None:
    rows = [codes[seed % 7 :: 7].tolist() for codes in rows_of(spec, seed=seed)]
    for row in zip(*rows, strict=True):
        stages = reference.row_stages(spec, *row)
        assert stages.u == naive.integers(spec, *row)
        assert stages.y == naive.codes(spec, *row)
        assert stages.w == naive.sum_codes(spec, stages.u)


@settings(max_examples=40)
@given(specs())
def test_the_bound_is_its_table(spec: LayerNormSpec) -> None:
    terms = spec.excess.terms
    expected = naive.excess_terms(spec, spec.excess.channel)
    assert terms.keys() == expected.keys()
    for stage, value in expected.items():
        assert terms[stage] == pytest.approx(value, rel=1e-9, abs=1e-18)
    assert float(spec.excess) == pytest.approx(sum(terms.values()), rel=1e-9)
    for channel in range(spec.n):
        assert sum(naive.excess_terms(spec, channel).values()) <= spec.excess


def test_excess_survives_copying_and_pickling_with_its_spec() -> None:
    spec = plan(layer_of(NormKind.LAYERNORM, 8), params_of("int8"), params_of("int8"))
    for other in (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec))):
        assert other == spec
        assert other.excess == spec.excess
        assert other.excess.terms == spec.excess.terms
        assert other.excess.channel == spec.excess.channel


SPEC = plan(layer_of(NormKind.LAYERNORM, 64), params_of("int8"), params_of("int8"), lane=32, max_excess=0.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"K": SPEC.K + 1, "s1": SPEC.s1 + 1}, r"products of up to \S+ don't fit a lane of 32 bits with K = "),
        ({"s1": 31, "K": 31}, "don't fit a lane of 32 bits"),
        ({"lane": 24}, "don't fit a lane of 24 bits"),
        ({"s2": SPEC.s2 + 1, "G": tuple(2 * g for g in SPEC.G)}, r"up to \S+ before their shift, beyond 32 bits"),
        ({"G": tuple(10 * g for g in SPEC.G)}, "before their shift, beyond 32 bits"),
        ({"G": (1 << 31,) * 64}, "before their shift, beyond 32 bits"),
        ({"B": (1 << 31,) * 64}, "before their shift, beyond 32 bits"),
        ({"B": (-(1 << 40),) * 64}, "before their shift, beyond 32 bits"),
        ({"s2": 30}, "before their shift, beyond 32 bits"),
        ({"E": (1 << 62) - 1}, r"V is up to \S+, beyond 62 bits"),
        ({"h": SPEC.h + 1, "E": 4 * SPEC.E}, r"V is up to \S+, beyond 62 bits"),
        ({"input": QuantParams("uint16", 0.05)}, "V is up to"),
        ({"input": QuantParams("int8", 0.05, exponents=[15] * 64)}, "V is up to"),
        ({"m": 2, "K": 2, "s1": 1, "h": 0, "E": 1 << 61}, "the reciprocal has no bits left with K = 2"),
    ],
)  # fmt: skip
def test_what_breaks_a_width_is_refused_with_the_figure(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"K": 63}, "K is 63; it must be from 2 to 62"),
        ({"K": 1}, "K is 1"),
        ({"m": 32}, "m is 32; it must be from 2 to 31"),
        ({"h": -1}, "h is -1"),
        ({"s1": 0}, "s1 is 0; it must be from 1"),
        ({"s2": 0}, "s2 is 0; it must be from 1"),
        ({"s2": 63}, "s2 is 63"),
        ({"E": -1}, "E is -1"),
        ({"E": 1 << 62}, "E is 4611686018427387904"),
        ({"s1": SPEC.K + 1}, f"s1 = {SPEC.K + 1} is beyond K = {SPEC.K}"),
        ({"lane": 48}, "the lane is 48; it must be one of 24, 32, 64"),
        ({"G": SPEC.G[:-1]}, "G has 63 elements; the spec normalizes 64"),
        ({"B": (*SPEC.B, 0)}, "B has 65 elements"),
        ({"gamma": ()}, "gamma has 0 elements"),
        ({"beta": (0.0,)}, "beta has 1 elements"),
        ({"normalized_shape": ()}, r"normalized_shape is \(\)"),
        ({"normalized_shape": (-8, -8)}, r"normalized_shape is \(-8, -8\)"),
        ({"normalized_shape": (63,)}, "the spec normalizes 63"),
        ({"eps": float("nan")}, "must be finite"),
        ({"eps": -1e-5}, "not negative"),
        ({"gamma": (float("inf"),) * 64}, "must be finite"),
        ({"beta": (float("nan"),) * 64}, "must be finite"),
        ({"input": QuantParams("int8", 0.05, exponents=[1, 2])}, "input has parameters for 2 channels; .* 64"),
        ({"output": QuantParams("int8", 0.05, exponents=[1] * 65)}, "output has parameters for 65 channels"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize("changes", [{"G": (10**400,) * 64}, {"B": (-(10**400),) * 64}], ids=["G", "B"])
def test_integers_beyond_every_float_are_refused_like_others(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="beyond 32 bits"):
        dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("n", [3, 64, 768])
def test_one_more_bit_of_the_normalized_value_is_refused(n: int, lane: int, kind: NormKind) -> None:
    spec = plan(layer_of(kind, n), params_of("int8"), params_of("int16"), lane=lane, max_excess=0.0)
    with pytest.raises(PlanError, match=r"don't fit a lane|beyond 63 bits"):
        dataclasses.replace(spec, K=spec.K + 1, s1=spec.s1 + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane", [24, 32])
@pytest.mark.parametrize("n", [3, 64, 768])
def test_two_more_bits_do_leave_the_lane(n: int, lane: int, kind: NormKind) -> None:
    """The widths are tight, and the reference notices; lane 64 has bits to spare, as its limit is D's dividend."""
    spec = plan(layer_of(kind, n), params_of("int8"), params_of("int16"), lane=lane, max_excess=0.0)
    wider = unproved(spec, K=spec.K + 2, s1=spec.s1 + 2)
    with pytest.raises(WidthError, match=rf"= -?\d+ doesn't fit {lane} bits"):
        reference.run(wider, adversarial(spec.input, n))


def test_the_output_width_is_tight() -> None:
    """With two more bits of s2 the sum of (8) leaves 32 bits on a row whose spike meets the largest gain."""
    layer = LayerNorm(64)
    spec = plan(layer, params_of("int8"), QuantParams("int8", 0.01), lane=32, max_excess=0.0)
    wider = unproved(spec, s2=spec.s2 + 2, G=tuple(4 * g for g in spec.G), B=tuple(4 * b for b in spec.B))
    with pytest.raises(WidthError, match=r"a( \+ half)? = -?\d+ doesn't fit 32 bits"):
        reference.run(wider, adversarial(spec.input, 64))


def test_integers_that_differ_from_their_real_values_count_in_the_bound() -> None:
    """A spec's integers are normative: one gain off by d units raises its bound by that, and the outputs keep it."""
    gains = (SPEC.G[0] + SPEC.G[0] // 10, *SPEC.G[1:])
    spec = dataclasses.replace(SPEC, G=gains)
    assert spec.excess.channel == 0
    assert spec.excess.terms["G"] > 100 * SPEC.excess.terms["G"]
    naive.hold(spec, adversarial(spec.input, 64))
    assert dataclasses.replace(SPEC, E=SPEC.E * 2).excess.terms["E"] > 100 * SPEC.excess.terms["E"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exponents", [None, (0, 2, 1, 0)])
def test_bounds_on_codes_hold_for_every_row(kind: NormKind, exponents: tuple[int, ...] | None) -> None:
    """Every row of codes at an end or next to the zero point; deviations and the smallest V0 are reached by some."""
    qi, n = QuantParams("uint8", 1.0, 3, exponents), 4
    bounds = proof.CodeBounds.of(kind, *code_ends(n, [qi], None))
    deviation, distance, magnitude, V0s = [Fraction(0)] * n, 0, 0, set()
    for codes in itertools.product((0, 3, 4, 255), repeat=n):
        u = [(q - 3) << e for q, e in zip(codes, qi.channel_exponents(n), strict=True)]
        mean = Fraction(sum(u), n) if kind is NormKind.LAYERNORM else Fraction(0)
        V0 = int(n * sum((v - mean) ** 2 for v in u))
        V0s.add(V0)
        deviation = [max(d, abs(v - mean)) for d, v in zip(deviation, u, strict=True)]
        distance = max(distance, max(u) - min(u))
        magnitude = max(magnitude, *map(abs, u))
        assert n**2 * max(abs(v - mean) for v in u) ** 2 <= round(bounds.x_max**2) * V0
    np.testing.assert_allclose(bounds.deviation, [float(d) for d in deviation], rtol=1e-9)
    assert bounds.largest == magnitude
    assert bounds.spread >= (distance if kind is NormKind.LAYERNORM else magnitude)
    assert min(V0s - {0}) == bounds.v0_min
    assert bounds.v0_max == max(V0s) if exponents is None else bounds.v0_max >= max(V0s)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("n", [2, 768])
def test_the_width_of_R_allows_for_its_own_rounding(n: int, lane: int) -> None:
    """By a share of em for r, and in lane 64 by a share of 2**-32 for the cut of x (docs/arithmetic.md, (14))."""
    spec = plan(layer_of(NormKind.LAYERNORM, n), params_of("int8"), params_of("int8"), lane=lane)
    cut = Fraction(2) ** (spec.m - (62 - n.bit_length()) - 1) / n if lane == 64 else Fraction(0)
    em = Fraction(2) ** (1 - spec.m)
    expected = 2**spec.K * n / naive.root(Fraction(max(n - 1, 1))) * (1 + em) * (1 + cut) + Fraction(1, 2)
    assert expected <= Fraction(spec.row_stage.r_max) <= expected * (1 + Fraction(1, 2**37))


@pytest.mark.parametrize("n", [64, 768, 65_536])
@pytest.mark.parametrize("exponent", [0, 8, 15])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_variance_is_exact_beyond_64_bits(dtype: DType, exponent: int, n: int) -> None:
    """Half of the codes at each end; RMSNorm: all of them at the end that is farther from the zero point."""
    qi = QuantParams(dtype, 1.0, dtype.lo, [exponent] * n if exponent else None)
    full = (dtype.hi - dtype.lo) << exponent
    assert proof.CodeBounds.of(NormKind.LAYERNORM, *code_ends(n, [qi], None)).v0_max == n**2 * full**2 // 4
    assert proof.CodeBounds.of(NormKind.RMSNORM, *code_ends(n, [qi], None)).v0_max == n**2 * full**2


@pytest.mark.parametrize(
    ("value", "bits", "expected", "not_even", "not_away"),
    [
        (0.5, 0, 1, 0, 1),
        (-0.5, 0, 0, 0, -1),
        (2.5, 0, 3, 2, 3),
        (-2.5, 0, -2, -2, -3),
        (0.625, 2, 3, 2, 3),
        (12, -3, 2, 2, 2),
    ],
)
def test_real_parameters_round_half_up(value: float, bits: int, expected: int, not_even: int, not_away: int) -> None:
    """Gains, offsets and eps: the last two columns are ties to even and ties away from zero instead."""
    scaled = value * 2.0**bits
    assert (round(scaled), int(scaled + np.copysign(0.5, scaled))) == (not_even, not_away)
    rational = proof.Rationals.in_lsb((value,), QuantParams("int8", 1.0))
    assert rational.to_fixed(bits) == (expected,)
    assert rational.distance((expected,), bits).item() == abs(expected * 2.0**-bits - value)


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30), min_size=1, max_size=5),
    st.floats(2.0**-40, 2.0**40),
    st.integers(-128, 127),
    st.integers(-20, 60),
)
def test_real_parameters_are_exact_rationals(values: list[float], scale: float, zero_point: int, bits: int) -> None:
    qo = QuantParams("int8", scale, zero_point, list(range(len(values))))
    exact = [Fraction(v) / Fraction(scale) / 2**c + zero_point for c, v in enumerate(values)]
    rationals = proof.output_offset(tuple(values), qo)
    assert rationals.to_float().tolist() == [float(x) for x in exact]
    fixed = rationals.to_fixed(bits)
    assert fixed == tuple(naive.nearest(x * Fraction(2) ** bits) for x in exact)
    distance = [float(abs(f * Fraction(2) ** -bits - x)) for f, x in zip(fixed, exact, strict=True)]
    assert rationals.distance(fixed, bits).tolist() == distance
