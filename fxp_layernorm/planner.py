"""The planner: a float layer and its quantization parameters become a spec with a proved bound."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from . import proof
from .adder import code_ends, is_needed, plan_adder
from .errors import InputError, PlanError
from .hardware import Hardware
from .layer import LayerNorm, RMSNorm
from .proof import CodeBounds, NormKind, RowStage
from .quantization import QuantParams
from .spec import LayerNormSpec

#: By default the planner takes the narrowest lane whose proved excess, in LSB, is at most this, for outputs of up to 8
#: bits and of more. Typical errors are a tenth of it: fewer than 0.6 % of 8-bit codes and 0.05 % of 16-bit codes differ
#: from the ideal.
MAX_EXCESS = {8: 1 / 8, 16: 1 / 256}
#: Fraction bits of t, and bits of G, that suffice for outputs of up to 8 bits where the bound allows it: products of
#: 16-bit words are several times as fast as wider ones on most hardware. t fits them up to 32 standard deviations.
WORD_F, WORD = 10, 16
#: What is cut off below t needs no more bits than u has, or this many more beside outputs of more than 8 bits.
LONG_GUARD = 4


def plan(
    layer: LayerNorm | RMSNorm,
    input: QuantParams,
    output: QuantParams,
    *,
    residual: QuantParams | None = None,
    sum_output: QuantParams | None = None,
    hardware: Hardware | str | None = None,
    lane: int | None = None,
    max_excess: float | None = None,
) -> LayerNormSpec:
    """Return the integer form of a layer for known quantization parameters.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm
    input, output : QuantParams
        With channel exponents, one scale a channel, or neither. The input may be an accumulator of up to 32 bits.
    residual : QuantParams, optional
        Of a second operand that is added to the input before the norm.
    sum_output : QuantParams, optional
        Of that sum as a second output, for the next residual.
    hardware : Hardware or str, optional
        Limits on the multiplier, the accumulator and the root, or the name of a preset (`hardware.PRESETS`).
    lane : {24, 32, 64}, optional
        Bits of the element stage. By default the narrowest lane whose bound is at most `max_excess`, else the lane
        with the smallest bound.
    max_excess : float, optional
        In LSB of the output; by default `MAX_EXCESS` by its bits.

    Raises
    ------
    PlanError
        If the layer doesn't fit; the message holds the figure that breaks it.
    InputError
        If gamma or beta is not finite or has another shape, or the parameters don't fit the layer.
    """
    limits = Hardware.parse(hardware)
    sides = {"input": input, "output": output, "residual": residual, "sum_output": sum_output}
    for name, params in sides.items():
        if params is None and name in ("residual", "sum_output"):
            continue
        if not isinstance(params, QuantParams):
            raise InputError(f"{name} is {params!r}; it must be a QuantParams")
        if params.channels not in (None, layer.n):
            kind = "scales" if params.channel_scales else "channel exponents" if params.exponents else "zero points"
            raise InputError(f"{name} has {params.channels} {kind}; the layer normalizes {layer.n}")
        if params.dtype.bits > 16 and name in ("output", "sum_output"):
            raise InputError(f"{name} is {params.dtype}; outputs have at most 16 bits")
    if not (math.isfinite(layer.eps) and layer.eps >= 0):
        raise InputError(f"eps is {layer.eps!r}; it must be finite and not negative")
    limits.check_codes(max(side.dtype.bits for side in (input, residual) if side is not None))
    widest = max(side.dtype.bits for side in (input, output, residual) if side is not None)
    limits = limits.of(widest, added=is_needed(input, residual, sum_output))
    problem = _Problem(layer, input, output, residual, sum_output, limits)
    if lane is not None:
        if not isinstance(lane, int | np.integer) or lane not in proof.ROOT_BITS:
            raise InputError(f"the lane is {lane!r}; it must be one of {', '.join(map(str, proof.ROOT_BITS))}")
        if lane not in limits.lanes:
            raise PlanError(f"the hardware has no lane of {lane} bits; it has {', '.join(map(str, limits.lanes))}")
        limits = replace(limits, lanes=(int(lane),))
    limit = max_excess if max_excess is not None else MAX_EXCESS[8 if output.dtype.bits <= 8 else 16]
    planned: list[LayerNormSpec] = []
    refusals: list[PlanError] = []
    for candidate, short in _candidates(limits, output, hardware is None):
        try:
            specs = problem.plan(candidate, short)
        except PlanError as error:
            refusals.append(error)
            continue
        for spec in specs:
            if spec.excess <= limit:
                return spec
        planned += specs
    if not planned:
        raise refusals[-1]
    return min(planned, key=lambda spec: spec.excess)


def hardware_costs(
    layer: LayerNorm | RMSNorm,
    input: QuantParams,
    output: QuantParams,
    hardware: Hardware | str,
    *,
    residual: QuantParams | None = None,
) -> dict[str, float]:
    """Return what a target's limits cost, in LSB: by how much the proved excess falls without each of them.

    Returns
    -------
    dict of str to float
        For each field of `Hardware` that limits anything, and under ``all`` without any limit. Below 0 where a limit
        happens to lead to a smaller bound: the planner goes by the expected error and the narrowest lane.

    Raises
    ------
    PlanError, InputError
        As `plan`.
    """
    limits, free = Hardware.parse(hardware), Hardware()
    present = plan(layer, input, output, residual=residual, hardware=limits).excess
    lifted = {
        field.name: replace(limits, **{field.name: getattr(free, field.name)})
        for field in fields(Hardware)
        if getattr(limits, field.name) != getattr(free, field.name)
    }
    return {
        name: float(present) - float(plan(layer, input, output, residual=residual, hardware=other).excess)
        for name, other in {**lifted, "all": free}.items()
    }


def _candidates(limits: Hardware, output: QuantParams, preferred: bool) -> list[tuple[int, bool]]:
    """Return the lanes in the order in which they are tried, and whether with short factors, if these are preferred."""
    lanes = limits.lanes
    if not preferred and (limits.unclamped is None or output.dtype.bits > 8):
        return [(lane, False) for lane in lanes]
    if output.dtype.bits <= 8:
        return [(lane, True) for lane in lanes if lane < 64] + [(lane, False) for lane in lanes]
    return [(lane, short) for lane in lanes for short in (True, False) if lane == 64 or not short]


@dataclass(frozen=True)
class _Problem:
    """What is planned for: everything but the lane."""

    layer: LayerNorm | RMSNorm
    input: QuantParams
    output: QuantParams
    residual: QuantParams | None
    sum_output: QuantParams | None
    hardware: Hardware

    @cached_property
    def _output(self) -> tuple[tuple[proof.Rationals, proof.Floats], tuple[proof.Rationals, proof.Floats]]:
        """The gain and the offset of each channel in output LSB, exact and as floats."""
        gain = proof.output_gain(tuple(self.layer.gamma.tolist()), self.output)
        offset = proof.output_offset(tuple(self.layer.beta.tolist()), self.output)
        return (gain, gain.to_float()), (offset, offset.to_float())

    def plan(self, lane: int, short: bool) -> list[LayerNormSpec]:
        """Return the spec with the least expected error in a lane, of all or of those with short factors.

        Where the hardware wants what is not clamped to be short, the next ones follow.
        """
        layer, output, hardware = self.layer, self.output, self.hardware
        n = layer.n
        kind = NormKind.RMSNORM if isinstance(layer, RMSNorm) else NormKind.LAYERNORM
        gamma, beta = tuple(layer.gamma.tolist()), tuple(layer.beta.tolist())
        m = hardware.root or proof.ROOT_BITS[lane]
        accumulator = min(hardware.accumulator or proof.ACCUMULATOR_BITS[lane], 63)
        operands = (self.input,) if self.residual is None else (self.input, self.residual)
        adder = (
            plan_adder(n, operands, self.sum_output, lane, most=hardware.sums, rounding=hardware.rounding)
            if is_needed(self.input, self.residual, self.sum_output)
            else None
        )
        codes = CodeBounds.of(kind, *code_ends(n, operands, adder))
        scale = adder.scale if adder is not None else self.input.scale
        h, E, A, l = _epsilon(layer, codes, scale, m, hardware.radicand)
        (gain, gain_float), (offset, offset_float) = self._output

        unclamped = hardware.unclamped if short else None
        words = short and unclamped is None and output.dtype.bits <= 8 and lane < 64
        u_bits = codes.spread.bit_length()
        longest = lane if not short or unclamped is not None else min(u_bits, WORD) if words else u_bits + LONG_GUARD
        found: list[tuple[float, int, int, int]] = []
        outside = A > 0
        for F in range(1, WORD_F + 1 if words else lane):
            K = _norm_bits(codes, lane, m, F, longest, outside, hardware.product or lane)
            if K is None:
                continue
            t_max = RowStage(codes, lane, m, K, outside).t_max(K - F)
            s2 = _output_shift(t_max, F, gain_float, offset_float, output, hardware, accumulator)
            if words and gain_float.any():
                room = (2.0 ** (WORD - 1) - 1) / (float(np.abs(gain_float).max()) * proof.UP)
                s2 = min(s2, F + math.frexp(room)[1] - 1)
            if unclamped is not None:
                s2 = min(s2, unclamped - max(output.hi, ~output.lo).bit_length())
            if s2 < 1:
                continue
            # What t and G lose at a typical normalized value, 1, in LSB. The F with the smallest bound instead would be
            # one less in most layers, where up to twice as many codes differ from the ideal.
            lost = float(np.mean(np.hypot(gain_float * 2.0**-F, 2.0 ** (F - s2))))
            found.append((lost, F, K, s2))
        if not found:
            raise PlanError(
                f"no shift brings gains of up to {np.abs(gain_float).max():.4g} and offsets of up to "
                f"{np.abs(offset_float).max():.4g} output LSB, for n = {n}, into a lane of {lane} bits with factors of "
                f"{hardware.multiplier[0]} and {hardware.multiplier[1]} bits and an accumulator of {accumulator} bits"
            )
        # where G is short, the bound may ask for one bit more of it, and less of t
        return [
            LayerNormSpec(
                kind=kind, normalized_shape=layer.normalized_shape, axes=layer.axes, eps=layer.eps,
                eps_outside=layer.eps_outside, gamma=gamma, beta=beta, input=self.input, output=output,
                residual=self.residual, sum_output=self.sum_output, adder=adder, lane=lane, accumulator=accumulator,
                m=m, K=K, h=h, E=E, A=A, l=l, s1=K - F, s2=s2, G=gain.to_fixed(s2 - F),
                B=tuple(value << hardware.offset for value in offset.to_fixed(s2 - hardware.offset)),
            )
            for _, F, K, s2 in sorted(found)[: 1 if unclamped is None else 3]
        ]  # fmt: skip


def _round(value: Fraction) -> int:
    """Round half up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def _epsilon(
    layer: LayerNorm | RMSNorm, codes: CodeBounds, scale: float, m: int, radicand: int
) -> tuple[int, int, int, int]:
    """Return the largest h, and E, with V below its limit (equation 3); or A and l, with eps outside the root."""
    if layer.eps_outside:
        if codes.v0_max >= 1 << radicand:
            raise PlanError(f"V is up to {proof.power_of_two(codes.v0_max)} by the codes alone, beyond {radicand} bits")
        return 0, 0, *_outer_epsilon(codes.n * Fraction(layer.eps) / Fraction(scale), m)
    e = proof.epsilon_in_codes(codes.n, layer.eps, scale)
    for h in range(30, -1, -1):
        E = _round(e * 4**h)
        if (codes.v0_max << 2 * h) + E < 1 << radicand:
            return h, E, 0, 0
    raise PlanError(
        f"V is up to {proof.power_of_two(codes.v0_max + e)}, beyond {radicand} bits: "
        f"{proof.power_of_two(codes.v0_max)} by the codes and {proof.power_of_two(e)} by eps; "
        f"use a larger input scale, fewer input bits or smaller exponents"
    )


def _outer_epsilon(e: Fraction, m: int) -> tuple[int, int]:
    """Return A of m bits and l with A = e * 2**l, rounded; zeros where e is 0."""
    if e == 0:
        return 0, 0
    l = m - (e.numerator.bit_length() - e.denominator.bit_length())
    A = _round(e * (Fraction(2) ** l))
    while A.bit_length() > m:  # by one too large at first, or rounded up to a power of two
        l -= 1
        A = _round(e * (Fraction(2) ** l))
    if l < -proof.V_BITS:  # no K leaves the reciprocal a bit
        raise PlanError(f"n * eps is {proof.power_of_two(e)} in units of the input, far above any deviation it has")
    return A, l


def _norm_bits(codes: CodeBounds, lane: int, m: int, F: int, longest: int, outside: bool, product: int) -> int | None:
    """Return the largest K that the lane holds with F fraction bits in t and at most `longest` below; or None."""
    for K in range(min(lane - 2, F + longest), F, -1):
        try:
            RowStage(codes, lane, m, K, outside).check(K - F, product)
        except PlanError:
            continue
        return K
    return None


def _output_shift(
    t_max: int, F: int, gain: proof.Floats, offset: proof.Floats, output: QuantParams, hardware: Hardware,
    accumulator: int,
) -> int:  # fmt: skip
    """Return the largest s2 with which (8) and (9) keep their width, less than 1 where there is none."""
    with np.errstate(over="ignore"):
        largest = float(np.max(t_max * 2.0**-F * np.abs(gain) + np.abs(offset))) + 0.5
    # t takes the narrower factor that holds it, and G the other one
    multiplier = hardware.multiplier
    fitting = [other for factor, other in (sorted(multiplier), sorted(multiplier)[::-1]) if t_max < 1 << (factor - 1)]
    if not (largest < 2.0**31 and fitting):
        return 0
    # G and B may each be half of their unit above their real values
    codes = output.hi - output.lo + 1.0
    room = (2.0 ** (accumulator - 1) - t_max / 2 - 2.0**hardware.offset) / (max(largest, codes) * proof.UP)
    # factors have 32 bits at most in lane 64 too: their product is then one instruction on most machines
    room = min(room, (2.0 ** (fitting[0] - 1) - 1) * 2.0**F / max(float(np.max(np.abs(gain))) * proof.UP, 2.0**-62))
    return math.frexp(room)[1] - 1 if room > 0 else 0
