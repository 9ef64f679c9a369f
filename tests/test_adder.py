"""Residual adds, accumulators and scales a channel: the integers u, the sum's codes, and what their rounding costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rows import LANES, adversarial, exponents_of, layer_of, noise, params_of
from specs import NARROW, WIDE, rows_of, specs

from fxp_layernorm import (
    CodeTypeError,
    DType,
    FxpLayerNorm,
    InputError,
    LayerNorm,
    LayerNormSpec,
    NormKind,
    PlanError,
    QuantParams,
    plan,
    proof,
    reference,
)
from fxp_layernorm.adder import Adder

N = 24
Codes = np.ndarray[Any, np.dtype[Any]]


def fused(
    source: str = "int8", residual: str = "int8", sums: str | None = "int8", target: str = "int8", n: int = N
) -> LayerNormSpec:
    """Return the spec of a layer after an add, whose operands have scales that are no power of two apart."""
    return plan(
        layer_of(NormKind.LAYERNORM, n),
        params_of(source),
        params_of(target),
        residual=params_of(residual, 2.7),
        sum_output=params_of(sums, 9.1) if sums else None,
    )


def operands(spec: LayerNormSpec, rows: int, *, seed: int = 0) -> list[Codes]:
    return [noise(params, spec.n, rows, seed=seed + k) for k, params in enumerate(spec.operands)]


def test_a_sum_by_hand() -> None:
    """Scales 3/4 and 1/2 over the sum's 1 and 8 more bits; 5*0.75 + 3*0.5 = 5.25 is 5 as a code, 5.75 is 6."""
    spec = plan(
        LayerNorm(2), QuantParams("int8", 0.75, 1), QuantParams("int8", 0.05), residual=QuantParams("int8", 0.5, -2),
        sum_output=QuantParams("int8", 1.0, 10, [0, 1]),
    )  # fmt: skip
    assert spec.adder == Adder(scale=2.0**-8, shift=0, multipliers=((192,), (128,)), sum_shift=8)
    stages = reference.row_stages(spec, [6, 6], [1, 2])
    assert stages.u == [1344, 1472]  # 5.25 and 5.75, in steps of 1/256
    assert stages.w == [15, 13]  # the second one in steps of 2
    assert spec.input_error == 0.0


@pytest.mark.parametrize(
    ("sum_shift", "u", "expected"),
    [(2, (2, -2, 6, -6), (1, 0, 2, -1)), (0, (2, -2, 6, -6), (2, -2, 6, -6)), (-1, (2, -2, 6, -6), (4, -4, 12, -12))],
)
def test_the_codes_of_the_sum_round_half_up(sum_shift: int, u: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Ties at 1/2, -1/2, 3/2 and -3/2: to even would give 0, 0, 2, -2, and away from zero 1, -1, 2, -2."""
    adder = Adder(scale=2.0**-4, shift=0, multipliers=((1,),), sum_shift=sum_shift)
    spec = dataclasses.replace(
        plan(LayerNorm(4), QuantParams("int8", 2.0**-4), QuantParams("int8", 1.0)),
        adder=adder,
        sum_output=QuantParams("int8", 2.0 ** (sum_shift - 4)),
    )
    q = np.array([u], dtype=np.int8)
    assert reference.row_stages(spec, list(u)).w == list(expected)
    assert FxpLayerNorm(spec).with_sum(q)[1].tolist() == [list(expected)]


@settings(max_examples=40)
@given(
    specs(st.integers(1, 30), inputs=[*NARROW, *WIDE], residuals=[None, *NARROW, *NARROW, *WIDE]), st.integers(0, 99)
)
def test_the_rounding_of_the_inputs_is_within_its_bound(spec: LayerNormSpec, seed: int) -> None:
    """Of u, of the sum's codes and of the normalized values, against the exact real sums (docs, section 10)."""
    assume(spec.adder is not None)
    assert spec.adder is not None
    eta, one = Fraction(spec.input_error), 1 if spec.kind is NormKind.RMSNORM else 2
    rows = [codes[seed % 5 :: 5].tolist() for codes in rows_of(spec, seed=seed)]
    for row in zip(*rows, strict=True):
        u, real = naive.integers(spec, *row), naive.real_sums(spec, *row)
        assert max(abs(a - b) for a, b in zip(u, real, strict=True)) <= eta
        if spec.sum_output is not None and spec.adder.sum_shift is not None:
            params = spec.sum_output
            constants = zip(params.channel_exponents(spec.n), naive.zero_points(params, spec.n), strict=True)
            for w, exact, (f, z) in zip(naive.sum_codes(spec, u), real, constants, strict=True):
                unit = Fraction(2) ** (spec.adder.sum_shift + f)
                value = min(max(exact / unit + z, Fraction(params.lo)), Fraction(params.hi))
                assert abs(w - value) <= Fraction(1, 2) + eta / unit
        deviation = naive.deviation(spec, u)
        if not deviation:
            assert proof.sum_excess(spec, 0.0) == np.inf
            continue
        found, expected = naive.normalized(spec, u), naive.normalized(spec, real)
        for a, b in zip(found, expected, strict=True):
            assert abs(a - b) * deviation <= eta * (one + abs(b))
        gains = [abs(Fraction(g) / step) for g, step in zip(spec.gamma, naive.steps(spec.output, spec.n), strict=True)]
        lost = max(g * abs(a - b) for g, a, b in zip(gains, found, expected, strict=True))
        assert lost <= proof.sum_excess(spec, float(deviation)) * (1 + 2.0**-50)


@pytest.mark.parametrize(
    ("source", "residual", "sums", "target"),
    [
        ("int8", "int8", "int8", "int8"),
        ("int16", "int8", "int8", "int8"),
        ("uint8", "int16", "int16", "int8"),
        ("int32", "int4", "uint8", "int8"),
        ("int16", "int16", None, "int16"),
    ],
)
def test_kernel_and_reference_add_alike(source: str, residual: str, sums: str | None, target: str) -> None:
    spec = fused(source, residual, sums, target)
    naive.hold(spec, *rows_of(spec), kernel=True)


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("kind", NormKind)
def test_accumulators_of_32_bits_at_both_ends(kind: NormKind, lane: int) -> None:
    """Zero points at an end and in the middle: the largest distance that 32 bits have is 2**32 - 1."""
    for zero_point in (-(2**31), 0, 2**31 - 1):
        qi = QuantParams("int32", 2.0**-20, zero_point)
        spec = plan(layer_of(kind, N), qi, params_of("int8"), lane=lane)
        naive.hold(spec, np.concatenate([adversarial(qi, N), noise(qi, N, 3)]))


@pytest.mark.parametrize("octaves", [-30, -12, 12, 30])
def test_scales_far_apart(octaves: int) -> None:
    """The finer operand counts for as much as u can show, and not less."""
    residual = QuantParams("int8", 0.05 * 2.0**octaves)
    spec = plan(layer_of(NormKind.LAYERNORM, N), params_of("int8"), params_of("int8"), residual=residual)
    naive.hold(spec, *rows_of(spec))
    assert spec.input_error < 0.52


def test_scales_that_no_multiplier_brings_together_are_refused() -> None:
    far = QuantParams("int8", 2.0**-100)
    with pytest.raises(PlanError, match="the inputs' scales are too far apart: the finest would count for nothing"):
        plan(LayerNorm(N), params_of("int8"), params_of("int8"), residual=far)
    with pytest.raises(PlanError, match=r"the inputs' scales and 7\.\d+e-31 are too far apart for a common scale"):
        plan(LayerNorm(N), params_of("int8"), params_of("int8"), sum_output=far)


def test_a_row_of_70_000() -> None:
    """The sum has 13 bits there, as the variance of a row must fit 62."""
    n = 70_000
    spec = fused("int8", "int8", None, n=n)
    q, residual = (codes[:2] for codes in operands(spec, 2))
    y = FxpLayerNorm(spec)(q, residual=residual)
    naive.compare(spec, q, y, residual)
    np.testing.assert_array_equal(y[0], reference.run(spec, q[0], residual[0]))


LAYOUTS: list[Callable[[Codes], Codes]] = [
    lambda q: q,
    np.asfortranarray,
    lambda q: np.repeat(q, 2, axis=-1)[..., ::2],
    lambda q: np.ascontiguousarray(q[::-1])[::-1],
    lambda q: np.broadcast_to(q[:1], q.shape),
]


@pytest.mark.parametrize("second", range(len(LAYOUTS)))
@pytest.mark.parametrize("first", range(len(LAYOUTS)))
def test_operands_of_any_layout(first: int, second: int) -> None:
    spec = fused()
    q, residual = operands(spec, 6)
    a, b = LAYOUTS[first](q), LAYOUTS[second](residual)
    y, w = FxpLayerNorm(spec).with_sum(a, b, threads=2)
    expected = reference.run_with_sum(spec, a, b)
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(w, expected[1])


class TestOut:
    """Where the result overlaps an operand; there are more rows than any block has."""

    ROWS = 6000

    @pytest.mark.parametrize("place", [0, 1])
    def test_in_the_place_of_an_operand(self, place: int) -> None:
        spec = fused()
        codes = operands(spec, self.ROWS)
        expected = FxpLayerNorm(spec)(codes[0].copy(), residual=codes[1].copy())
        FxpLayerNorm(spec)(codes[0], out=codes[place], residual=codes[1])
        np.testing.assert_array_equal(codes[place], expected)

    @pytest.mark.parametrize("shift", [-N, -1, 1, N])
    @pytest.mark.parametrize("place", [0, 1])
    def test_overlapping_an_operand(self, place: int, shift: int) -> None:
        spec = fused()
        codes = operands(spec, self.ROWS)
        expected = FxpLayerNorm(spec)(codes[0].copy(), residual=codes[1].copy())
        size = codes[place].size
        buffer = np.concatenate([np.zeros(N, np.int8), codes[place].ravel(), np.zeros(N, np.int8)])
        codes[place] = buffer[N : N + size].reshape(-1, N)
        out = buffer[N + shift : N + shift + size].reshape(-1, N)
        FxpLayerNorm(spec)(codes[0], out=out, residual=codes[1], threads=2)
        np.testing.assert_array_equal(out, expected)

    def test_both_operands_are_one_array(self) -> None:
        spec = plan(LayerNorm(N), params_of("int8"), params_of("int8"), residual=params_of("int8"))
        q = noise(spec.input, N, self.ROWS)
        expected = FxpLayerNorm(spec)(q.copy(), residual=q.copy())
        FxpLayerNorm(spec)(q, out=q, residual=q)
        np.testing.assert_array_equal(q, expected)

    def test_no_rows(self) -> None:
        y, w = FxpLayerNorm(fused()).with_sum(np.zeros((0, N), np.int8), np.zeros((0, N), np.int8))
        assert y.shape == w.shape == (0, N)


@pytest.mark.parametrize("run", [reference.run, lambda spec, *codes: FxpLayerNorm(spec)(codes[0], residual=codes[1])])
def test_operands_that_do_not_fit_are_refused(run: Callable[..., Any]) -> None:
    spec, plain = fused("int8", "int16"), plan(LayerNorm(N), params_of("int8"), params_of("int8"))
    q, residual = operands(spec, 3)
    with pytest.raises(InputError, match="the spec adds a residual; give its codes"):
        run(spec, q, None)
    with pytest.raises(InputError, match="the spec adds no residual"):
        run(plain, q, residual)
    for other in (residual[:2], residual[0], residual[None]):
        with pytest.raises(InputError, match=r"the codes have the shape \(3, 24\), those of the residual"):
            run(spec, q, other)
    with pytest.raises(InputError, match=r"last dimensions must be \(24,\)"):
        run(spec, q, residual[:, :-1])
    with pytest.raises(CodeTypeError, match="codes of type int8 were given; the spec takes int16"):
        run(spec, q, q)
    with pytest.raises(CodeTypeError, match="codes of type int32 were given; the spec takes int8"):
        run(spec, q.astype(np.int32), residual)


@pytest.mark.parametrize(("dtype", "narrow"), [("int4", False), ("uint5", False), ("int8", True), ("int24", False)])
def test_codes_outside_their_range_are_refused(dtype: str, narrow: bool) -> None:
    """Which the type that holds them would take."""
    params = QuantParams(dtype, 0.01, 0, narrow_range=narrow)
    spec = plan(LayerNorm(4), params, params_of("int8"), residual=params)
    good, bad = np.zeros((1, 4), params.dtype.numpy), np.zeros((1, 4), params.dtype.numpy)
    bad[0, 2] = params.lo - 1 if params.dtype.signed else params.hi + 1
    for codes in ((bad, good), (good, bad)):
        for call in (reference.run, lambda spec, *codes: FxpLayerNorm(spec)(codes[0], residual=codes[1])):
            with pytest.raises(
                InputError, match=f"1 codes are outside the range {params.lo} to {params.hi} of {dtype}"
            ):
                call(spec, *codes)


def test_with_sum_needs_a_sum() -> None:
    spec = fused(sums=None)
    with pytest.raises(InputError, match="the spec has no sum_output"):
        FxpLayerNorm(spec).with_sum(*operands(spec, 1))


SPEC = fused("int8", "int8")
ADDER = SPEC.adder


@pytest.mark.parametrize(
    ("changes", "words", "error"),
    [
        ({"multipliers": ((1 << 24,), (1,))}, r"inputs is up to 2\^\S+, beyond 31 bits and sign", PlanError),
        ({"multipliers": ((10**400,), (1,))}, "beyond 31 bits", PlanError),
        ({"multipliers": ((1,),)}, "the adder needs 1 or 24 multipliers for each of 2 operands", InputError),
        ({"multipliers": ((1, 2), (1,))}, "the adder needs 1 or 24 multipliers", InputError),
        ({"multipliers": ((0,), (1,))}, "the adder's multipliers must be positive", InputError),
        ({"multipliers": ((), ())}, "the adder's multipliers must be positive", InputError),
        ({"multipliers": ()}, "the adder's multipliers must be positive", InputError),
        ({"shift": 63}, "the adder's shift is 63; it must be from 0 to 62", InputError),
        ({"shift": -1}, "the adder's shift is -1", InputError),
        ({"sum_shift": 41}, "the sum's shift is 41; it must be within 40 of 0", InputError),
        ({"sum_shift": None}, "sum_output and the adder's sum_shift go together", InputError),
        ({"sum_shift": 3}, "sum_output has the scale .*; the adder's is", InputError),
        ({"scale": 0.01}, "sum_output has the scale .*; the adder's is", InputError),
        ({"scale": 0.0}, r"the adder's scale is 0\.0; it must be finite and positive", InputError),
        ({"scale": float("nan")}, "the adder's scale is nan", InputError),
    ],
)  # fmt: skip
def test_an_adder_that_does_not_fit_is_refused(changes: dict[str, Any], words: str, error: type[Exception]) -> None:
    assert ADDER is not None
    with pytest.raises(error, match=words):
        dataclasses.replace(SPEC, adder=dataclasses.replace(ADDER, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adder": None}, "the inputs need an adder"),
        ({"residual": None}, "the adder needs 1 or 24 multipliers for each of 1 operands"),
        ({"sum_output": None}, "sum_output and the adder's sum_shift go together"),
        ({"sum_output": QuantParams("int32", 1.0)}, "sum_output is int32; outputs have at most 16 bits"),
        ({"residual": QuantParams("int8", 0.1, 0, [1, 0])}, "residual has parameters for 2 channels"),
    ],
)
def test_sides_that_do_not_go_together_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        dataclasses.replace(SPEC, **changes)


def test_a_sum_that_leaves_64_bits_on_its_way_to_the_clamp_is_refused() -> None:
    """A spec by hand: u of 31 bits, shifted up by 40."""
    spec = plan(LayerNorm(1), QuantParams("int32", 1.0), QuantParams("int8", 1.0), lane=64)
    adder = Adder(scale=1.0, shift=2, multipliers=((1,),), sum_shift=-40)
    with pytest.raises(PlanError, match="the sum is beyond 62 bits before it is clamped"):
        dataclasses.replace(spec, adder=adder, sum_output=QuantParams("int8", 2.0**-40))


def test_integers_beyond_32_bits_are_refused() -> None:
    """One element has no variance, whatever its size; only its own width is left to break."""
    wide = QuantParams("int17", 1.0, -65_536, [15])
    with pytest.raises(PlanError, match=r"u is up to 2\^32\.0, beyond 31 bits and sign"):
        plan(LayerNorm(1), wide, QuantParams("int8", 1.0), lane=64)


@pytest.mark.parametrize("side", ["output", "sum_output"])
def test_outputs_have_at_most_16_bits(side: str) -> None:
    options: dict[str, Any] = {"output": params_of("int8"), side: QuantParams("int17", 1.0)}
    with pytest.raises(InputError, match=f"{side} is int17; outputs have at most 16 bits"):
        plan(LayerNorm(4), params_of("int8"), **options)


def test_the_sum_has_one_scale() -> None:
    scales = QuantParams("int8", 1.0, channel_scales=[1.0, 0.7, 0.3, 0.2])
    with pytest.raises(InputError, match="the sum's codes need one scale"):
        plan(LayerNorm(4), params_of("int8"), params_of("int8"), sum_output=scales)


@pytest.mark.parametrize("name", ["input", "output", "residual", "sum_output"])
def test_parameters_for_other_channels_are_refused(name: str) -> None:
    options: dict[str, Any] = {"input": params_of("int8"), "output": params_of("int8")}
    for wrong, kind in (
        (params_of("int8", exponents=exponents_of(5, 2)), "channel exponents"),
        (QuantParams("int8", 1.0, channel_scales=[1.0] * 5), "scales"),
    ):
        with pytest.raises(InputError, match=f"{name} has 5 {kind}; the layer normalizes 6"):
            plan(LayerNorm(6), **{**options, name: wrong})
    with pytest.raises(InputError, match=f"{name} is 'int8'; it must be a QuantParams"):
        plan(LayerNorm(6), **{**options, name: "int8"})


@pytest.mark.parametrize("dtype", ["int17", "int20", DType.INT32])
def test_accumulators_make_the_way_from_floats_and_back(dtype: str) -> None:
    params = QuantParams(dtype, 2.0**-10, 3)
    codes = np.array([params.lo, -1, 0, 3, params.hi], dtype=np.int32)
    real = (codes.astype(np.float64) - 3) * 2.0**-10
    np.testing.assert_array_equal(params.quantize(real), codes)
    np.testing.assert_array_equal(params.dequantize(codes), real.astype(np.float32))
    assert params.quantize(np.array([-1e30, 1e30])).tolist() == [params.lo, params.hi]
