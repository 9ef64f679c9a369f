"""The planner: a float layer and its quantization parameters become a spec with a proved bound."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from . import proof
from .errors import InputError, PlanError
from .layer import LayerNorm, RMSNorm
from .proof import CodeBounds, NormKind, RowStage
from .quantization import DType, QuantParams
from .spec import LayerNormSpec

#: By default the planner takes the narrowest lane whose proved excess, in LSB, is at most this.
#: Typical errors are a tenth of it: fewer than 0.6 % of 8-bit codes and 0.05 % of 16-bit codes differ from the ideal.
MAX_EXCESS = {DType.INT8: 1 / 8, DType.UINT8: 1 / 8, DType.INT16: 1 / 256, DType.UINT16: 1 / 256}


def plan(
    layer: LayerNorm | RMSNorm,
    input: QuantParams,
    output: QuantParams,
    *,
    lane: int | None = None,
    max_excess: float | None = None,
) -> LayerNormSpec:
    """Return the integer form of a layer for known quantization parameters.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm
    input, output : QuantParams
        With channel exponents, or without.
    lane : {24, 32, 64}, optional
        Bits of the element stage. By default the narrowest lane whose bound is at most `max_excess`, else the lane
        with the smallest bound.
    max_excess : float, optional
        In LSB of the output; by default ``MAX_EXCESS`` of its type.

    Raises
    ------
    PlanError
        If the layer doesn't fit; the message holds the figure that breaks it.
    InputError
        If gamma or beta is not finite or has another shape, or the exponents don't fit the layer.
    """
    if lane is not None:
        if not isinstance(lane, int | np.integer) or lane not in proof.ROOT_BITS:
            raise InputError(f"the lane is {lane!r}; it must be one of {', '.join(map(str, proof.ROOT_BITS))}")
        return _plan_lane(layer, input, output, int(lane))
    limit = max_excess if max_excess is not None else MAX_EXCESS[getattr(output, "dtype", DType.INT8)]
    planned: list[LayerNormSpec] = []
    refusals: list[PlanError] = []
    for candidate in proof.ROOT_BITS:
        try:
            spec = _plan_lane(layer, input, output, candidate)
        except PlanError as error:
            refusals.append(error)
            continue
        if spec.excess <= limit:
            return spec
        planned.append(spec)
    if not planned:
        raise refusals[-1]
    return min(planned, key=lambda spec: spec.excess)


def _plan_lane(layer: LayerNorm | RMSNorm, input: QuantParams, output: QuantParams, lane: int) -> LayerNormSpec:
    kind = NormKind.RMSNORM if isinstance(layer, RMSNorm) else NormKind.LAYERNORM
    gamma, beta = tuple(layer.gamma.tolist()), tuple(layer.beta.tolist())
    if not (math.isfinite(layer.eps) and layer.eps >= 0):
        raise InputError(f"eps is {layer.eps!r}; it must be finite and not negative")
    for name, params in (("input", input), ("output", output)):
        if not isinstance(params, QuantParams):
            raise InputError(f"{name} is {params!r}; it must be a QuantParams")
        if params.exponents is not None and len(params.exponents) != layer.n:
            raise InputError(f"{name} has {len(params.exponents)} channel exponents; the layer normalizes {layer.n}")
    codes = CodeBounds.of(kind, layer.n, input)
    e = proof.epsilon_in_codes(layer.n, layer.eps, input.scale)
    h, E = _epsilon(codes, e)
    gain, offset = proof.output_gain(gamma, output), proof.output_offset(beta, output)
    gain_float, offset_float = gain.to_float(), offset.to_float()

    best: tuple[float, int, int, int] | None = None
    for F in range(1, lane):
        K = _norm_bits(codes, lane, F)
        if K is None:
            continue
        t_max = RowStage(codes, lane, proof.ROOT_BITS[lane], K).t_max(K - F)
        s2 = _output_shift(t_max, F, gain_float, offset_float, output, lane)
        if s2 < 1:
            continue
        # What t and G lose at a typical normalized value, 1, in LSB. The F with the smallest bound instead would be one
        # less in most layers, where up to twice as many codes differ from the ideal.
        lost = float(np.mean(np.hypot(gain_float * 2.0**-F, 2.0 ** (F - s2))))
        if best is None or lost < best[0]:
            best = lost, F, K, s2
    if best is None:
        raise PlanError(
            f"no shift brings gains of up to {np.abs(gain_float).max():.4g} and offsets of up to "
            f"{np.abs(offset_float).max():.4g} output LSB, for n = {layer.n}, into a lane of {lane} bits"
        )
    _, F, K, s2 = best
    return LayerNormSpec(
        kind=kind, normalized_shape=layer.normalized_shape, eps=layer.eps, gamma=gamma, beta=beta,
        input=input, output=output, lane=lane, m=proof.ROOT_BITS[lane], K=K, h=h, E=E, s1=K - F, s2=s2,
        G=gain.to_fixed(s2 - F), B=offset.to_fixed(s2),
    )  # fmt: skip


def _round(value: Fraction) -> int:
    """Round half up."""
    return (2 * value.numerator + value.denominator) // (2 * value.denominator)


def _epsilon(codes: CodeBounds, e: Fraction) -> tuple[int, int]:
    """Return the largest h, and E, with V below its limit (equation 3)."""
    for h in range(30, -1, -1):
        E = _round(e * 4**h)
        if (codes.v0_max << 2 * h) + E < 1 << proof.V_BITS:
            return h, E
    raise PlanError(
        f"V is up to {proof.power_of_two(codes.v0_max + e)}, beyond {proof.V_BITS} bits: "
        f"{proof.power_of_two(codes.v0_max)} by the codes and {proof.power_of_two(e)} by eps; "
        f"use a larger input scale, fewer input bits or smaller exponents"
    )


def _norm_bits(codes: CodeBounds, lane: int, F: int) -> int | None:
    """Return the largest K that the lane holds with F fraction bits in t, or None."""
    for K in range(lane - 2, F, -1):
        try:
            RowStage(codes, lane, proof.ROOT_BITS[lane], K).check(K - F)
        except PlanError:
            continue
        return K
    return None


def _output_shift(t_max: int, F: int, gain: proof.Floats, offset: proof.Floats, output: QuantParams, lane: int) -> int:
    """Return the largest s2 with which (8) and (9) keep their width, less than 1 where there is none."""
    with np.errstate(over="ignore"):
        largest = float(np.max(t_max * 2.0**-F * np.abs(gain) + np.abs(offset))) + 0.5
    if not (largest < 2.0**31 and t_max < 2**31):
        return 0
    # G and B may each be half a unit above their real values
    codes = output.dtype.hi - output.dtype.lo + 1.0
    room = (proof.output_limit(lane) - t_max / 2 - 1) / (max(largest, codes) * proof.UP)
    # t and G are factors of 32 bits in lane 64 too: their product is then one instruction on most machines
    room = min(room, (2.0**31 - 1) * 2.0**F / max(float(np.max(np.abs(gain))) * proof.UP, 2.0**-62))
    return math.frexp(room)[1] - 1 if room > 0 else 0
