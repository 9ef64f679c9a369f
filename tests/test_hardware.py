"""Limits of the hardware: kept by every spec that is planned for them, and refused with the figure that breaks them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from naive import hold
from rows import KINDS, LANES, adversarial, layer_of, noise, params_of
from specs import hardware, layers, params

from fxp_layernorm import InputError, LayerNorm, LayerNormSpec, NormKind, PlanError, QuantParams, plan
from fxp_layernorm.calibration import CalibrationOptions
from fxp_layernorm.hardware import PRESETS, Hardware


def keeps(spec: LayerNormSpec, limits: Hardware) -> None:
    """Assert what the limits say, of the widths that are proved for the spec."""
    widest = max(params.dtype.bits for params in (*spec.operands, spec.output))
    limits = limits.of(widest, added=spec.adder is not None)
    t_bits = spec.row_stage.t_max(spec.s1).bit_length() + 1
    G_bits = max(min(G, ~G).bit_length() for G in spec.G) + 1
    narrow, wide = sorted(limits.multiplier)
    assert (t_bits <= narrow and G_bits <= wide) or (t_bits <= wide and G_bits <= narrow)
    assert spec.accumulator <= (limits.accumulator or 63)
    assert all(B % 2**limits.offset == 0 for B in spec.B)
    assert spec.lane in limits.lanes
    assert spec.input.dtype.bits <= limits.codes
    assert spec.row_stage.r_max < 2 ** ((limits.product or spec.lane) - 1)
    if spec.adder is not None:
        assert spec.row_stage.codes.largest <= 1 << limits.sums
    assert spec.m == (limits.root or {24: 18, 32: 24, 64: 31}[spec.lane])
    assert (spec.row_stage.codes.v0_max << 2 * spec.h) + spec.E < 1 << limits.radicand


@settings(max_examples=60)
@given(st.data())
def test_a_spec_keeps_the_limits_it_was_planned_for(data: st.DataObject) -> None:
    n, limits = data.draw(st.integers(1, 100)), data.draw(hardware())
    qi = data.draw(params(n))
    layer, qo = data.draw(layers(n, qi.scale)), data.draw(params(n, reach=8.0))
    try:
        spec = plan(layer, qi, qo, hardware=limits)
    except PlanError:
        reject()
    keeps(spec, Hardware.parse(limits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_hold_the_bound(name: str, kind: NormKind) -> None:
    spec = plan(layer_of(kind, 96), params_of("int8"), params_of("int8"), hardware=name)
    keeps(spec, PRESETS[name])
    hold(spec, np.concatenate([adversarial(spec.input, 96), noise(spec.input, 96, 4)]))


def test_a_wider_multiplier_or_accumulator_costs_no_accuracy() -> None:
    """By what t and G lose at a normalized value of 1, which the planner minimizes (26)."""
    layer, qi, qo = layer_of(NormKind.LAYERNORM, 64), params_of("int8"), params_of("int8")

    def lost(**limits: Any) -> float:
        spec = plan(layer, qi, qo, lane=24, hardware=Hardware(**limits))
        return float(np.mean(np.hypot(layer.gamma / qo.scale * 2.0**-spec.F, 2.0 ** (spec.F - spec.s2))))

    for limits in (
        [{"multiplier": (bits, bits)} for bits in (12, 14, 16, 20, 24)],
        [{"multiplier": (18, bits)} for bits in (12, 18, 25, 27)],
        [{"accumulator": bits} for bits in (20, 24, 28, 32, 40)],
    ):
        found = [lost(**each) for each in limits]
        assert found == sorted(found, reverse=True)
        assert found[0] > 4 * found[-1]
    excess = [plan(layer, qi, qo, hardware=Hardware(root=bits)).excess for bits in (8, 12, 18)]
    assert excess == sorted(excess, reverse=True)


def test_a_coarse_offset_leaves_room_for_its_rounding() -> None:
    """By up to 2**11 units of an accumulator of 2**17, which tips the balance for one of these output scales."""
    layer, limits = LayerNorm(16), Hardware(accumulator=18, offset=12, lanes=(24,))
    layer.bias = np.full(16, 3.0)
    for scale in np.geomspace(0.004, 0.02, 400):
        keeps(plan(layer, params_of("int8"), QuantParams("int8", float(scale)), hardware=limits), limits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"hardware": Hardware(multiplier=(4, 4), accumulator=8)},
            r"gains of up to 15\.\d+ .* factors of 4 and 4 bits",
        ),
        ({"hardware": Hardware(accumulator=9)}, "an accumulator of 9 bits"),
        ({"hardware": Hardware(radicand=20)}, r"V is up to \S+, beyond 20 bits"),
        ({"hardware": "mac16x16-32", "lane": 64}, "the hardware has no lane of 64 bits; it has 24, 32"),
        ({"hardware": Hardware(lanes=(64,)), "lane": 32}, "the hardware has no lane of 32 bits; it has 64"),
    ],
)
def test_what_the_hardware_cannot_do_is_refused_with_the_figure(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        plan(LayerNorm(64), params_of("int8"), params_of("int8"), **options)


@pytest.mark.parametrize(("input", "residual"), [("int32", None), ("int8", "int24")])
def test_codes_that_the_hardware_does_not_take(input: str, residual: str | None) -> None:
    added = None if residual is None else params_of(residual)
    with pytest.raises(PlanError, match=r"the input has (24|32) bits and the hardware takes codes of up to 23: use 23"):
        plan(LayerNorm(8), params_of(input), params_of("int8"), residual=added, hardware="carried24")
    with pytest.raises(PlanError, match="32 bits and the hardware takes codes of up to 23"):
        CalibrationOptions.of("int32", hardware="carried24")


@pytest.mark.parametrize("kind", KINDS)
def test_wide_codes_and_sums_have_limits_of_their_own(kind: NormKind) -> None:
    """Those of the preset for integers that are carried in float32: a wider lane, and sums of 15 bits."""
    layer, narrow = layer_of(kind, 96), params_of("int8")
    scaled = QuantParams("int8", 0.1, channel_scales=np.linspace(0.05, 0.1, 96))
    assert plan(layer, narrow, narrow, hardware="carried24").lane == 24
    for input, output, residual in (
        (narrow, params_of("int16"), None), (params_of("int16"), narrow, None), (params_of("int20"), narrow, None),
        (narrow, narrow, params_of("uint8", 3.0)), (scaled, narrow, None),
    ):  # fmt: skip
        spec = plan(layer, input, output, residual=residual, hardware="carried24")
        keeps(spec, PRESETS["carried24"])
        assert spec.lane == 32
        if output is narrow:
            assert spec.excess <= 1 / 8
        assert spec.input_error <= 1  # half from rounding u, half from its multipliers


@pytest.mark.parametrize("lane", LANES)
def test_a_lane_of_the_hardware_can_be_chosen(lane: int) -> None:
    assert plan(LayerNorm(8), params_of("int8"), params_of("int8"), lane=lane, hardware="mac32x32-64").lane == lane


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"multiplier": 16}, "the multiplier is 16; the bits of its two factors are expected"),
        ({"multiplier": (16,)}, r"the multiplier is \(16,\)"),
        ({"multiplier": (16, 3)}, "a factor of 3 bits can't be planned for; 4 to 32 bits can"),
        ({"multiplier": (None, 16)}, "a factor of None bits"),
        ({"accumulator": 65}, "the accumulator of 65 bits can't be planned for; 8 to 64"),
        ({"accumulator": float("nan")}, "the accumulator of nan bits"),
        ({"root": 32}, "the root of 32 bits can't be planned for; 2 to 31"),
        ({"radicand": None}, "the radicand of None bits"),
        ({"radicand": 63}, "the radicand of 63 bits"),
        ({"codes": 33}, "the input of 33 bits"),
        ({"unclamped": 9}, "the unclamped output of 9 bits"),
        ({"sums": 17}, "the sum of 17 bits can't be planned for; 8 to 16"),
        ({"rounding": None}, "the rounding of None bits"),
        ({"product": 65}, "the product of 65 bits"),
        ({"lanes": ()}, r"the lanes are \(\); a tuple of 24, 32, 64 is expected"),
        ({"lanes": (16,)}, r"the lanes are \(16,\)"),
        ({"lanes": 24}, "the lanes are 24"),
    ],
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Hardware(**limits)


@pytest.mark.parametrize("name", ["dsp", 3, ("mac16x16-32",)])
def test_unknown_hardware_is_refused_with_the_names_there_are(name: Any) -> None:
    with pytest.raises(InputError, match="it must be a Hardware or one of mac16x16-32, mac16x16-40"):
        plan(LayerNorm(8), params_of("int8"), QuantParams("int8", 0.1), hardware=name)


def test_the_documented_presets_are_those_there_are() -> None:
    text = (Path(__file__).parent.parent / "docs" / "arithmetic.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) x (\d+) \| (\d+) \| ([\d, ]+) \|", text, re.M)
    documented = {
        name: ((int(t), int(g)), int(bits), tuple(map(int, lanes.split(",")))) for name, t, g, bits, lanes in rows
    }
    # the 64th bit of an accumulator is never used
    expected = {
        name: (preset.multiplier, min(preset.accumulator or 63, 63), preset.lanes) for name, preset in PRESETS.items()
    }
    assert documented == expected
