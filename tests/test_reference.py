"""The reference against oracles that read like the definition: the function in rationals, the ideal to 200 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import naive
import numpy as np
import pytest
from rows import KINDS, LANES, REACH, adversarial, exponents_of, layer_of, noise, params_of, typical

from fxp_layernorm import (
    CodeTypeError,
    InputError,
    LayerNorm,
    LayerNormSpec,
    NormKind,
    QuantParams,
    RMSNorm,
    plan,
    reference,
)


def outside(layer: LayerNorm | RMSNorm) -> LayerNorm | RMSNorm:
    """Take the layer's eps out of the root."""
    layer.eps_outside = True
    return layer


SPECS: dict[str, Callable[[NormKind, int], LayerNormSpec]] = {
    "8 to 8": lambda kind, lane: plan(layer_of(kind, 31), params_of("int8"), params_of("uint8"), lane=lane),
    "16 to 16": lambda kind, lane: plan(layer_of(kind, 16), params_of("uint16"), params_of("int16"), lane=lane),
    "8 to 16, exponents": lambda kind, lane: plan(
        layer_of(kind, 24, eps=0.0),
        params_of("int8", exponents=exponents_of(24, 6)),
        params_of("int16", 4 * REACH, exponents=exponents_of(24, 3, seed=1)),
        lane=lane,
    ),
    "16 to 8, a large eps": lambda kind, lane: plan(
        layer_of(kind, 20, eps=2.0),
        params_of("int16", 1.0),
        params_of("int8", exponents=exponents_of(20, 2)),
        lane=lane,
    ),
    "eps outside": lambda kind, lane: plan(
        outside(layer_of(kind, 18, eps=0.3)), params_of("int8", 1.0), params_of("int16"), lane=lane
    ),
    "accumulators": lambda kind, lane: plan(layer_of(kind, 18), params_of("int27"), params_of("int8"), lane=lane),
    "a scale a channel": lambda kind, lane: plan(
        layer_of(kind, 18),
        QuantParams("int8", 1.0, 3, channel_scales=np.geomspace(1.0, 0.01, 18)),
        params_of("int8"),
        lane=lane,
    ),
    "few bits": lambda kind, lane: plan(layer_of(kind, 18), params_of("int4"), params_of("uint5"), lane=lane),
    "two elements": lambda kind, lane: plan(layer_of(kind, 2), params_of("int8"), params_of("int8"), lane=lane),
    "one element": lambda kind, lane: plan(layer_of(kind, 1), params_of("int8"), params_of("int8"), lane=lane),
    "a scale near nothing": lambda kind, lane: plan(
        layer_of(kind, 8, eps=0.0), QuantParams("int8", 2.0**-126), params_of("int16"), lane=lane
    ),
}


def rows_for(spec: LayerNormSpec) -> np.ndarray[Any, np.dtype[Any]]:
    qi, n = spec.input, spec.n
    return np.concatenate([adversarial(qi, n), noise(qi, n, 4), typical(qi, n, 4)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("name", SPECS)
def test_the_function_is_its_definition_in_rationals(name: str, lane: int, kind: NormKind) -> None:
    spec = SPECS[name](kind, lane)
    q = rows_for(spec)
    assert reference.run(spec, q).tolist() == [naive.codes(spec, row) for row in q.tolist()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECS)
def test_the_ideal_is_good_to_ten_roundings(name: str, kind: NormKind) -> None:
    """Each operation rounds once, to half a unit of longdouble in the magnitude of the terms that are added."""
    spec = SPECS[name](kind, 64)
    q = rows_for(spec)
    eps = Fraction(float(np.finfo(np.longdouble).eps))
    for row, found in zip(q.tolist(), reference.ideal(spec, q), strict=True):
        for exact, value, beta in zip(naive.ideal(spec, row), found, spec.beta, strict=True):
            offset = abs(Fraction(beta) / Fraction(spec.output.scale)) + max(
                map(abs, naive.zero_points(spec.output, spec.n))
            )
            error = abs(Fraction(*value.as_integer_ratio()) - exact)
            assert error <= 10 * eps / 2 * (abs(exact) + 2 * offset)


def test_the_ideal_is_the_float_layer_of_the_same_values() -> None:
    """An oracle from outside the integers: LayerNorm and RMSNorm in float64, on well-conditioned rows."""
    for kind, change in itertools.product(KINDS, (lambda layer: layer, outside)):
        layer = change(layer_of(kind, 64, eps=0.01))
        spec = plan(layer, params_of("int16"), params_of("int8"))
        q = typical(spec.input, 64, 20)
        real = (q.astype(np.float64) - spec.input.zero_point) * spec.input.scale
        expected = layer(real) / spec.output.scale + spec.output.zero_point
        np.testing.assert_allclose(reference.ideal(spec, q).astype(np.float64), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_run_and_row_stages_are_one_function(kind: NormKind) -> None:
    spec = SPECS["8 to 16, exponents"](kind, 32)
    q = rows_for(spec)
    assert reference.run(spec, q).tolist() == [reference.row_stages(spec, row).y for row in q.tolist()]


@pytest.mark.parametrize(
    ("row", "c", "not_even", "not_away"),
    [((0, 1), 1, 0, 1), ((-1, 0), 0, 0, -1), ((1, 2), 2, 2, 2), ((-2, -1), -1, -2, -2), ((2, 3), 3, 2, 3)],
)
def test_the_mean_rounds_half_up(row: tuple[int, int], c: int, not_even: int, not_away: int) -> None:
    """Means of k + 1/2; the last two columns are what ties to even and ties away from zero would give instead."""
    spec = plan(LayerNorm(2), QuantParams("int8", 1.0), QuantParams("int8", 1.0), lane=32)
    stages = reference.row_stages(spec, list(row))
    assert stages.c == c
    assert -2 <= 2 * (stages.S - 2 * stages.c) < 2  # d's range, open above
    mean = (row[0] + row[1]) / 2
    assert (round(mean), int(mean + np.copysign(0.5, mean))) == (not_even, not_away)


def test_t_rounds_half_up_not_to_even_nor_away_from_zero() -> None:
    """A tie p = (k + 1/2) * 2**s1 gives k + 1: ties to even differ where k is even, ties away where p is negative."""
    spec = plan(layer_of(NormKind.LAYERNORM, 5), params_of("int8"), params_of("int8"), lane=24)
    ties = []
    for row in noise(spec.input, 5, 400).tolist():
        stages = reference.row_stages(spec, row)
        for u, t in zip(stages.u, stages.t, strict=True):
            k, rest = divmod((u - stages.c) * stages.R - stages.D, 2**spec.s1)
            assert t == k + (2 * rest >= 2**spec.s1)
            if 2 * rest == 2**spec.s1:
                ties.append(k)
    assert any(k % 2 == 0 for k in ties)
    assert min(ties) < 0


def test_stages_are_the_sums_of_the_row() -> None:
    spec = plan(LayerNorm(4), QuantParams("uint8", 0.1, 3, [0, 1, 2, 3]), QuantParams("int8", 0.1), lane=32)
    stages = reference.row_stages(spec, [3, 4, 5, 255])
    assert stages.u == [0, 2, 8, 2016]
    assert (stages.S, stages.Q) == (2026, 4 + 64 + 2016**2)
    assert ((4 * stages.Q - stages.S**2) << 2 * spec.h) + spec.E == stages.V
    assert stages.c == 507  # 506.5, half up


def test_rms_norm_has_no_mean() -> None:
    spec = plan(RMSNorm(4), QuantParams("int8", 0.1), QuantParams("int8", 0.1), lane=32)
    stages = reference.row_stages(spec, [5, 5, 5, 6])
    assert (stages.c, stages.D) == (0, 0)
    assert (4 * stages.Q << 2 * spec.h) + spec.E == stages.V


@pytest.mark.parametrize("run", [reference.run, reference.ideal])
@pytest.mark.parametrize("shape", [(2, 3), (0, 2, 3), (5, 0, 2, 3), (4, 2, 3), (2, 2, 2, 3)])
def test_any_leading_dimensions(run: Callable[..., Any], shape: tuple[int, ...]) -> None:
    spec = plan(LayerNorm((2, 3)), params_of("int8"), params_of("int16"))
    q = noise(spec.input, 6, int(np.prod(shape)) // 6).reshape(shape)
    y = run(spec, q)
    assert y.shape == shape
    if run is reference.run:
        assert y.dtype == np.int16
    np.testing.assert_array_equal(y.reshape(-1, 6), run(spec, q.reshape(-1, 2, 3)).reshape(-1, 6))


@pytest.mark.parametrize("run", [reference.run, reference.ideal])
def test_wrong_types_and_shapes_are_refused(run: Callable[..., Any]) -> None:
    spec = plan(LayerNorm((2, 3)), params_of("int16"), params_of("int16"))
    for dtype in ("int8", "uint16", "int64", "float32", "bool", ">i2"):
        with pytest.raises(CodeTypeError, match=f"codes of type {dtype} were given; the spec takes int16"):
            run(spec, np.zeros((2, 3), dtype=dtype))
    for shape in ((), (3,), (3, 2), (6,), (2, 3, 1)):
        with pytest.raises(InputError, match=r"last dimensions must be \(2, 3\)"):
            run(spec, np.zeros(shape, dtype=np.int16))
