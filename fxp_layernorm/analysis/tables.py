"""A spec in tables: its formats in words, and the headroom of each accumulator."""

from __future__ import annotations

import math

import numpy as np

from .. import proof
from ..adder import width
from ..proof import NormKind
from ..quantization import QuantParams
from ..spec import LayerNormSpec
from .report import Property, Width
from .stages import Computed


def properties(spec: LayerNormSpec) -> tuple[Property, ...]:
    """Return the lines of the spec's table; a Q format gives the bits before and behind the binary point."""
    shape = " x ".join(map(str, spec.normalized_shape))
    gain_bits = spec.s2 - spec.F
    lines = [
        ("norm", f"{spec.kind.value}, {shape}", f"eps {spec.eps:.4g}{' outside the root' if spec.eps_outside else ''}"),
        ("input", str(spec.input.dtype), _quantization(spec.input)),
        *_inputs(spec),
        ("output", str(spec.output.dtype), _quantization(spec.output)),
        ("lane", f"{spec.lane} bits", "the element stage's integers"),
        ("r", _q(spec.m, 0), "integer square root of V, shifted to fill its bits"),
        _epsilon(spec),
        ("p", _q(spec.lane - 1 - spec.K, spec.K), "normalized value, (u - c)*R - D"),
        ("t", _q(_integer_bits(spec.row_stage.t_max(spec.s1), spec.F), spec.F), f"p >> {spec.s1}, rounded half up"),
        ("G", _q(_integer_bits(max(map(abs, spec.G)), gain_bits), gain_bits), "gain, in output LSB"),
        ("B", _q(_integer_bits(max(map(abs, spec.B)), spec.s2), spec.s2), "offset, in output LSB"),
        ("a", _q(spec.accumulator - 1 - spec.s2, spec.s2), f"t*G + B, then >> {spec.s2}, rounded half up"),
    ]
    return tuple(Property(name=name, value=value, meaning=meaning) for name, value, meaning in lines)


def _inputs(spec: LayerNormSpec) -> list[tuple[str, str, str]]:
    """Return what a spec has between the codes and u."""
    lines = []
    if spec.residual is not None:
        lines.append(("residual", str(spec.residual.dtype), _quantization(spec.residual)))
    if spec.sum_output is not None:
        lines.append(("sum", str(spec.sum_output.dtype), _quantization(spec.sum_output)))
    if spec.adder is not None:
        factors = " and ".join(
            f"{min(M):,}" if len(set(M)) == 1 else f"{min(M):,} to {max(M):,}" for M in spec.adder.multipliers
        )
        meaning = f"codes times {factors}, added, >> {spec.adder.shift}, rounded half up; one unit is {spec.scale:.6g}"
        lines.append(("u", _q(spec.row_stage.codes.largest.bit_length(), 0), meaning))
    return lines


def _epsilon(spec: LayerNormSpec) -> tuple[str, str, str]:
    if spec.eps_outside:
        return ("eps", f"A = {spec.A}", f"{spec.l} fraction bits, in units of n times the deviation in codes")
    return ("eps", f"E = {spec.E}", f"{2 * spec.h} fraction bits, in units of n^2 times the variance in squared codes")


def widths(spec: LayerNormSpec, seen: dict[str, float]) -> tuple[Width, ...]:
    """Return the headroom of each accumulator, seen (see `magnitudes`) and proved by `proof.check_widths`."""
    row, lane = spec.row_stage, spec.lane - 1.0
    codes, half1, half2 = row.codes, 2.0 ** (spec.s1 - 1), 2.0 ** (spec.s2 - 1)
    t_max = row.t_max(spec.s1)
    a_max = max(t_max * abs(G) + abs(B) for G, B in zip(spec.G, spec.B, strict=True)) + half2
    lines = [
        ("u", "input code without its zero point, shifted by its exponent", lane, codes.largest),
        ("S", "sum of u", 63.0, spec.n * codes.largest),
        ("V", "n^2 times the variance, and eps", float(proof.V_BITS), (codes.v0_max << 2 * spec.h) + spec.E),
        ("R", "reciprocal root", lane, row.r_max),
        ("2dR", "dividend of the mean's remainder", 63.0, spec.n * (row.r_max + 1)),
        ("p", "normalized value, with the half that rounds it", lane, row.r_max + codes.spread / 2 + 1 + half1),
        ("t", "normalized value, shortened", lane, t_max),
        ("a", "output before its shift, with the half", spec.accumulator - 1, a_max),
    ]
    sums = 0.0
    if spec.adder is not None:
        sums = 2.0**spec.adder.shift
        bits = float(width(spec.operands, spec.lane))
        lines.insert(0, ("sum", "weighted inputs, before the shift", bits, (codes.largest + 1) * sums))
        lines[1] = ("u", "sum of the inputs, shifted", lane, codes.largest)
    if spec.kind is NormKind.RMSNORM:
        lines = [line for line in lines if line[0] not in ("S", "2dR")]
    largest = {
        **seen,
        "sum": seen["u"] * sums,  # u is it, shifted
        "p": seen["p"] + half1,
        "2dR": 2 * spec.n * seen["D"],  # D is that dividend over 2n, rounded
    }
    return tuple(
        Width(
            name=name, meaning=meaning, bits=bits, seen=largest[name], proved=float(proved),
            headroom_seen=_headroom(bits, largest[name]), headroom_proved=_headroom(bits, float(proved)),
        )
        for name, meaning, bits, proved in lines
    )  # fmt: skip


def magnitudes(computed: Computed) -> dict[str, float]:
    """Return the largest magnitude of each accumulator of some rows."""
    return {name: float(np.abs(getattr(computed, name)).max()) for name in ("u", "S", "V", "R", "D", "p", "t", "a")}


def _headroom(bits: float, magnitude: float) -> float:
    return bits - math.log2(max(magnitude, 1.0))


def _q(integer: int, fraction: int) -> str:
    return f"Q{integer}.{fraction}"


def _integer_bits(magnitude: int, fraction: int) -> int:
    """Return the bits before the binary point, less than 0 where the leading fraction bits are 0 too."""
    return magnitude.bit_length() - fraction


def _quantization(params: QuantParams) -> str:
    text = f"scale {params.scale:.6g}, "
    if isinstance(params.zero_point, tuple):
        text += f"zero points of channels {min(params.zero_point)} to {max(params.zero_point)}"
    else:
        text += f"zero point {params.zero_point}"
    if params.narrow_range:
        text += f", codes from {params.lo}"
    if params.channel_scales is not None:
        return f"{text}, channel scales from {min(params.channel_scales):.6g}"
    if params.exponents is None:
        return f"{text}, no channel exponents"
    return f"{text}, channel exponents {min(params.exponents)} to {max(params.exponents)}"
