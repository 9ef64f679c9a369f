"""What a norm costs in hardware, from the widths that are proved for its spec."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..spec import LayerNormSpec


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Three figures that nothing but the spec decides; of several norms, those of hardware that serves all of them.

    Attributes
    ----------
    bits_moved : float
        Bits of an element's codes in and out, those of a residual and of its sum too; of several norms, the mean over
        their elements.
    factors : tuple of int
        Bits, sign included, of the factors of the element stage: u - c and R, t and G.
    multiplier : int
        One-bit products of both multiplications: (u - c) times R and t times G. The area of an array multiplier is
        in proportion to it.
    adder : int
        One-bit products of the input stage: codes times M, of a residual too; 0 where codes are only shifted.
    row_bits : int
        Bits of V0 = n^2 * variance, without sign: the widest integer of the row stage that the codes decide. V is V0
        with 2h fraction bits more.
    """

    bits_moved: float
    factors: tuple[int, int, int, int]
    multiplier: int
    adder: int
    row_bits: int


def cost(norms: Iterable[tuple[LayerNormSpec, int]]) -> Cost:
    """Return what specs cost together, each with the number of rows that it is run on."""
    listed = list(norms)
    factors = [max(widths) for widths in zip(*(_factors(spec) for spec, _ in listed), strict=True)]
    elements = sum(spec.n * rows for spec, rows in listed)
    return Cost(
        bits_moved=sum(_bits_moved(spec) * spec.n * rows for spec, rows in listed) / elements,
        factors=(factors[0], factors[1], factors[2], factors[3]),
        multiplier=factors[0] * factors[1] + factors[2] * factors[3],
        adder=max(_adder(spec) for spec, _ in listed),
        row_bits=max(spec.row_stage.codes.v0_max.bit_length() for spec, _ in listed),
    )


def _bits_moved(spec: LayerNormSpec) -> int:
    outputs = [spec.output] if spec.sum_output is None else [spec.output, spec.sum_output]
    return sum(params.dtype.bits for params in (*spec.operands, *outputs))


def _adder(spec: LayerNormSpec) -> int:
    multipliers = () if spec.adder is None else spec.adder.multipliers
    return sum(
        params.dtype.bits * (max(M).bit_length() + 1) for params, M in zip(spec.operands, multipliers, strict=False)
    )


def _factors(spec: LayerNormSpec) -> tuple[int, int, int, int]:
    row = spec.row_stage
    magnitudes = (row.codes.spread, int(row.r_max), row.t_max(spec.s1), max(map(abs, spec.G)))
    u, R, t, G = (magnitude.bit_length() + 1 for magnitude in magnitudes)
    return u, R, t, G
