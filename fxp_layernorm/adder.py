"""The input stage of a spec whose codes are not the integers u themselves: rescale, add, round (equation 0).

A residual add before the norm, accumulators of 32 bits, and scales that are no powers of two apart all have it. The sum
keeps its precision: it is an integer of about 16 bits and sign on a scale of its own, and never passes through 8 bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from .errors import InputError, PlanError
from .files import STRICT
from .proof import UP, Rationals
from .quantization import QuantParams

Integers = npt.NDArray[np.int64]

#: The largest magnitude of u that is planned, in bits, where the hardware sets no other.
SUM_BITS = 16
#: Products and sums of codes of at most 16 bits stay below 2**31, those of wider codes or of lane 64 below 2**62.
NARROW_BITS, WIDE_BITS = 31, 62
#: The largest shift between u and the sum's codes, which 64 bits hold together with a channel exponent.
MAX_SUM_SHIFT = 40


@dataclass(frozen=True, kw_only=True)
class Adder:
    """The integers of the input stage: ``u_i = (sum of (q_i - z) * M_i over the operands + half) >> shift``.

    Attributes
    ----------
    scale : float
        What one unit of u is worth, in real units.
    shift : int
        The rounding shift k; 0 where nothing is lost.
    multipliers : tuple of tuple of int
        M of each operand (the input, the residual): one for the tensor, or one a channel.
    sum_shift : int or None
        Where the sum is an output too: the shift from u to its codes at exponent 0, to the left where it is negative.
    """

    __pydantic_config__ = STRICT

    scale: float
    shift: int
    multipliers: tuple[tuple[int, ...], ...]
    sum_shift: int | None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"the adder's scale is {self.scale!r}; it must be finite and positive")
        if not 0 <= self.shift <= WIDE_BITS:
            raise InputError(f"the adder's shift is {self.shift}; it must be from 0 to {WIDE_BITS}")
        if self.sum_shift is not None and not -MAX_SUM_SHIFT <= self.sum_shift <= MAX_SUM_SHIFT:
            raise InputError(f"the sum's shift is {self.sum_shift}; it must be within {MAX_SUM_SHIFT} of 0")
        if not all(self.multipliers) or min(map(min, self.multipliers), default=0) < 1:
            raise InputError("the adder's multipliers must be positive")

    @property
    def half(self) -> int:
        """What is added before the shift, to round half up."""
        return (1 << self.shift) >> 1

    def check(self, n: int, operands: Sequence[QuantParams], lane: int) -> None:
        """Raise PlanError, with the figure, if a product or the sum could leave its width."""
        if any(len(M) not in (1, n) for M in self.multipliers) or len(self.multipliers) != len(operands):
            raise InputError(f"the adder needs 1 or {n} multipliers for each of {len(operands)} operands")
        largest = self.half + sum(_reach(params) * max(M) for params, M in zip(operands, self.multipliers, strict=True))
        bits = width(operands, lane)
        if largest >= 1 << bits:
            raise PlanError(f"the sum of the inputs is up to 2^{math.log2(largest):.1f}, beyond {bits} bits and sign")

    def check_sum(self, params: QuantParams | None, largest: int) -> None:
        """Raise an error if the sum's codes, shifted from u of this largest magnitude, are not those of `params`."""
        if (self.sum_shift is not None) != (params is not None):
            raise InputError("sum_output and the adder's sum_shift go together")
        if self.sum_shift is None or params is None:
            return
        scale = Fraction(self.scale) * Fraction(2) ** self.sum_shift
        if params.channel_scales is not None or scale != Fraction(params.scale):
            raise InputError(
                f"sum_output has the scale {params.scale!r}; the adder's is {self.scale!r} * 2^{self.sum_shift}"
            )
        if largest << max(-self.sum_shift, 0) >= 1 << WIDE_BITS:
            raise PlanError(f"the sum is beyond {WIDE_BITS} bits before it is clamped; use a larger sum_output scale")

    def error(self, n: int, operands: Sequence[QuantParams]) -> float:
        """Return how far u may be from the real sum in any channel, in units of u: its rounding, and that of M."""
        worths = [_worths(n, params, self.scale) for params in operands]
        return self._error(operands, worths)

    def _error(self, operands: Sequence[QuantParams], worths: Sequence[Rationals]) -> float:
        parts = [
            _reach(params) * worth.distance(M, self.shift)  # one value, or one a channel
            for params, worth, M in zip(operands, worths, self.multipliers, strict=True)
        ]
        return ((0.5 if self.shift else 0.0) + float(np.max(functools.reduce(np.add, parts)))) * UP


def code_ends(n: int, operands: Sequence[QuantParams], adder: Adder | None) -> tuple[Integers, Integers]:
    """Return the lowest and the highest u of each of `n` channels (equation 0)."""
    half, shift = (adder.half, adder.shift) if adder is not None else (0, 0)
    low, high = np.full(n, half, dtype=np.int64), np.full(n, half, dtype=np.int64)
    for params, M in zip(operands, code_multipliers(n, operands, adder), strict=True):
        zeros = params.channel_zeros(n)
        low += (params.lo - zeros) * M
        high += (params.hi - zeros) * M
    return low >> shift, high >> shift


def code_multipliers(n: int, operands: Sequence[QuantParams], adder: Adder | None) -> list[Integers]:
    """Return M of each operand, one a channel: powers of two where there is no adder."""
    if adder is not None:
        return [np.broadcast_to(np.array(M, dtype=np.int64), n) for M in adder.multipliers]
    return [np.left_shift(np.int64(1), np.array(params.channel_exponents(n), dtype=np.int64)) for params in operands]


def width(operands: Sequence[QuantParams], lane: int) -> int:
    """Return the bits, without the sign, of the products and sums of the input stage."""
    return NARROW_BITS if lane < 64 and all(params.dtype.bits <= 16 for params in operands) else WIDE_BITS


def is_needed(input: QuantParams, residual: QuantParams | None, sum_output: QuantParams | None) -> bool:
    """Whether codes take more than a shift to become the integers u."""
    several = residual is not None or sum_output is not None
    return several or input.channel_scales is not None or input.dtype.bits > SUM_BITS + 1


def plan_adder(
    n: int, operands: Sequence[QuantParams], sum_output: QuantParams | None, lane: int, *, most: int, rounding: int
) -> Adder:
    """Choose the scale of u and the multipliers.

    The scale is a power of two below that of the sum output, so that a shift makes its codes, or else below the
    coarsest operand's, whose multipliers are then exact. u has `most` bits, fewer where a row's variance would not
    fit its 62 bits. The multipliers have the fewest bits whose rounding adds no more than 2**-rounding to the error of
    u, or as many as there is room for.

    Raises
    ------
    PlanError
        If the operands' scales are too far apart for any multiplier, or have no common scale in float64's range.
    """
    steps = [params.channel_steps(n) for params in operands]
    if sum_output is not None and sum_output.channel_scales is not None:
        raise InputError("the sum's codes need one scale, with channel exponents or without")
    base = max(float(step.max()) for step in steps) if sum_output is None else sum_output.scale
    reaches = sum(_reach(params) * step for params, step in zip(operands, steps, strict=True))
    bits = min(most, (61 - 2 * n.bit_length()) // 2)
    octaves = math.floor(math.log2(base) + bits - math.log2(float(np.max(reaches))))
    with np.errstate(over="ignore"):
        scale = float(np.ldexp(base, -octaves))
    if not (math.isfinite(scale) and scale >= 2.0**-1000) or not abs(octaves) <= MAX_SUM_SHIFT:
        raise PlanError(f"the inputs' scales and {base:.4g} are too far apart for a common scale")
    worths = [_worths(n, params, scale) for params in operands]
    best: Adder | None = None
    for shift in range(WIDE_BITS):
        multipliers = [_multipliers(worth, shift) for worth in worths]
        if min(map(min, multipliers)) < 1:
            continue
        adder = Adder(
            scale=scale, shift=shift, multipliers=tuple(multipliers), sum_shift=octaves if sum_output else None
        )
        try:
            adder.check(n, operands, lane)
        except PlanError:
            break
        best = adder
        if adder._error(operands, worths) <= 0.5 + 2.0**-rounding:
            break
    if best is None:
        raise PlanError("the inputs' scales are too far apart: the finest would count for nothing in the sum")
    return best


def _worths(n: int, params: QuantParams, scale: float) -> Rationals:
    """Return what a code is worth in units of u: one value where all channels have the same, or one a channel."""
    steps = params.channel_steps(n if params.channels is not None else 1).tolist()
    return Rationals.over(steps, scale, (0,) * len(steps))


def _multipliers(worths: Rationals, shift: int) -> tuple[int, ...]:
    """Return the multipliers with `shift` fraction bits, one for the tensor where all are the same."""
    rounded = worths.to_fixed(shift)
    return rounded if len(set(rounded)) > 1 else rounded[:1]


def _reach(params: QuantParams) -> int:
    """Return the largest distance of a code from the zero point."""
    zeros = np.asarray(params.zero_point)
    return max(params.hi - int(zeros.min()), int(zeros.max()) - params.lo)
