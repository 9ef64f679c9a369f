"""The proof behind a spec: the widths that no value leaves, and the bound on its error.

Everything here follows docs/arithmetic.md, sections 5 and 6; the stage names of the bound are those of its table.
The figures are float64, rounded up by `UP`, which is far more than the rounding of the few operations behind them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import PlanError
from .quantization import QuantParams

if TYPE_CHECKING:
    from .spec import LayerNormSpec

UP = 1.0 + 2.0**-40
Floats = npt.NDArray[np.float64]

#: V stays below this many bits, so that every shift of it stays within 64 (equation 3).
V_BITS = 62
#: Bits of the integer square root for each lane (equation 4), where the hardware has no wish of its own.
ROOT_BITS = {24: 18, 32: 24, 64: 31}
#: Bits, sign included, of the second product and its sum for each lane (equations 8 and 9), likewise.
ACCUMULATOR_BITS = {24: 32, 32: 32, 64: 63}
#: The relative error of a root with eps outside it, in units of that of the plain root (equation 4).
OUTSIDE_ERROR = 2.0


class NormKind(StrEnum):
    """Which norm a spec computes."""

    LAYERNORM = "layernorm"
    RMSNORM = "rmsnorm"


class Excess(float):
    """How far the output may be from the ideal beyond the half LSB of the final rounding, in LSB.

    A float, the largest sum of the terms over the channels, with:

    Attributes
    ----------
    terms : Mapping[str, float]
        The term of each stage, in LSB, in the channel where their sum is largest.
    channel : int
        That channel.
    """

    terms: Mapping[str, float]
    channel: int

    def __new__(cls, terms: Mapping[str, Floats]) -> Excess:
        """Take the terms of each stage, one value a channel."""
        total = np.sum(list(terms.values()), axis=0) * UP
        channel = int(np.argmax(total))
        self = super().__new__(cls, total[channel])
        self.terms = {stage: float(values[channel]) for stage, values in terms.items()}
        self.channel = channel
        return self

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_excess, (float(self), dict(self.terms), self.channel)


def _rebuild_excess(total: float, terms: dict[str, float], channel: int) -> Excess:
    rebuilt = float.__new__(Excess, total)
    rebuilt.terms, rebuilt.channel = terms, channel
    return rebuilt


@dataclass(frozen=True)
class CodeBounds:
    """What is known of the integers u of a row from the parameters of the inputs alone (equation 0).

    Attributes
    ----------
    deviation : ndarray of shape (n,)
        The largest distance of a channel's u from the row's mean (RMSNorm: from 0).
    spread : int
        The largest distance between any two u of a row (RMSNorm: from 0); bounds ``|u - c|``.
    largest : int
        The largest magnitude of u.
    v0_min, v0_max : int
        Bounds of V0 where it is not 0 (equation 3).
    x_max : float
        The largest normalized value (Samuelson's inequality).
    """

    n: int
    deviation: Floats
    spread: int
    largest: int
    v0_min: int
    v0_max: int
    x_max: float

    @classmethod
    def of(cls, kind: NormKind, low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]) -> CodeBounds:
        """Return the bounds for the ends of each channel's u, with ``low <= 0 <= high``."""
        n = len(low)
        magnitude = np.maximum(np.abs(low), np.abs(high))
        largest = int(magnitude.max())
        values, counts = np.unique(magnitude, return_counts=True)
        v0_max = n * sum(count * u**2 for u, count in zip(values.tolist(), counts.tolist(), strict=True))
        if kind is NormKind.RMSNORM:
            return cls(n, magnitude.astype(np.float64), largest, largest, n, v0_max, math.sqrt(n))
        spread = int(high.max() - low.min())
        # the mean when this channel is at its end and all others are at the opposite one
        lowest_mean = (int(low.sum()) + (high - low)) / n
        highest_mean = (int(high.sum()) - (high - low)) / n
        deviation = np.maximum(high - lowest_mean, highest_mean - low) * UP
        v0_max = min(v0_max, n * n * spread * spread // 4)
        return cls(n, deviation, spread, largest, max(n - 1, 1), v0_max, math.sqrt(n - 1))


@dataclass(frozen=True)
class RowStage:
    """The row stage's widths for one lane: everything of the spec that the sizes of R, D, p and t depend on."""

    codes: CodeBounds
    lane: int
    m: int
    K: int
    eps_outside: bool

    @property
    def root_error(self) -> float:
        """The largest relative error of r."""
        return 2.0 ** (1 - self.m) * (OUTSIDE_ERROR if self.eps_outside else 1.0)

    @property
    def cut_error(self) -> float:
        """The largest relative error of R from cutting x in lane 64."""
        return 2.0 ** (self.m - reciprocal_bits(self.codes.n) - 1) / self.codes.n if self.lane == 64 else 0.0

    @property
    def _relative(self) -> float:
        """1 + the largest relative error of R beyond its last unit."""
        return (1.0 + self.root_error) * (1.0 + self.cut_error) * UP

    @property
    def r_max(self) -> float:
        """Bound of R, of ``(u - c) * R`` up to the rounding of R, and so of D."""
        return 2.0**self.K * self.codes.n / math.sqrt(self.codes.v0_min) * self._relative + 0.5

    def check(self, s1: int, product: int | None = None) -> None:
        """Raise PlanError unless R, (u-c)*R, D, p and p's rounding fit the lane, or fewer bits, sign included."""
        bits = min(self.lane, product or self.lane)
        widest = self.r_max + self.codes.spread / 2 + 1 + 2.0 ** (s1 - 1)
        if not max(widest, self.codes.spread) < 2.0 ** (bits - 1):
            raise PlanError(f"products of up to {widest:.4g} don't fit a lane of {bits} bits with K = {self.K}")
        mean_dividend = self.codes.n * (self.r_max + 1)
        if not mean_dividend < 2.0**63:
            raise PlanError(f"the dividend of the mean is up to {mean_dividend:.4g}, beyond 63 bits, with K = {self.K}")

    def t_max(self, s1: int) -> int:
        """The largest magnitude of t (equation 7)."""
        p_max = 2.0**self.K * self.codes.x_max * self._relative + float(self.codes.deviation.max()) / 2 + 0.5
        return max(int((p_max * UP + 2.0 ** (s1 - 1)) / 2.0**s1), 1)


def reciprocal_bits(n: int) -> int:
    """How far n is shifted at most before it is divided by r in lane 64 (equation 4)."""
    return 62 - n.bit_length()


def epsilon_in_codes(n: int, eps: float, scale: float) -> Fraction:
    """Return e = n**2 * eps / s**2, what eps is in units of V0."""
    return n * n * Fraction(eps) / Fraction(scale) ** 2


@dataclass(frozen=True)
class Rationals:
    """Exact real values, one a channel: Python integers over one denominator, or each over its own."""

    numerators: npt.NDArray[np.object_]
    denominator: int | npt.NDArray[np.object_]

    @classmethod
    def in_lsb(cls, values: tuple[float, ...], params: QuantParams) -> Rationals:
        """Return ``values[c] / (scale * 2**exponents[c])``."""
        if params.channel_scales is not None:
            exact = [
                Fraction(value) / Fraction(scale) for value, scale in zip(values, params.channel_scales, strict=True)
            ]
            return cls(_objects(ratio.numerator for ratio in exact), _objects(ratio.denominator for ratio in exact))
        return cls.over(values, params.scale, params.channel_exponents(len(values)))

    @classmethod
    def over(cls, values: Sequence[float], step: float, exponents: Sequence[int]) -> Rationals:
        """Return ``values[c] / (step * 2**exponents[c])``."""
        scale, highest = Fraction(step), max(exponents)
        mantissas, powers = np.frexp(np.array(values, dtype=np.float64))
        whole = (mantissas * 2.0**53).astype(np.int64)  # values are odd * 2**powers, or 0
        zeros = np.where(whole == 0, 0, np.frexp((whole & -whole).astype(np.float64))[1] - 1)
        odd, powers = whole >> zeros, np.where(whole == 0, 0, powers.astype(np.int64) - 53 + zeros)
        lowest = min(int(powers.min()), 0)
        shifts = powers - lowest + (highest - np.array(exponents, dtype=np.int64))
        numerators = (odd.astype(object) * scale.denominator) << shifts.astype(object)
        return cls(numerators, scale.numerator << (highest - lowest))

    def plus(self, integers: npt.NDArray[np.int64]) -> Rationals:
        """Return the values with an integer added to each."""
        return Rationals(self.numerators + _objects(integers.tolist()) * self.denominator, self.denominator)

    def to_float(self) -> Floats:
        """Return the nearest float64 values."""
        return _quotient(self.numerators, self.denominator)

    def to_fixed(self, bits: int) -> tuple[int, ...]:
        """Return ``floor(value * 2**bits + 1/2)``, integers with `bits` fraction bits (which may be negative)."""
        up, down = 1 << max(bits, 0), self.denominator << max(-bits, 0)
        return tuple(((2 * up) * self.numerators + down) // (2 * down))

    def distance(self, fixed: tuple[int, ...], bits: int) -> Floats:
        """Return ``|fixed * 2**-bits - value|``, of an exact difference."""
        up, down = 1 << max(bits, 0), self.denominator << max(-bits, 0)
        difference = abs(_objects(fixed) * down - self.numerators * up)
        return _quotient(difference, up * self.denominator)


def _objects(integers: Iterable[int]) -> npt.NDArray[np.object_]:
    """Return an array of Python integers."""
    listed = list(integers)
    array = np.empty(len(listed), dtype=object)
    array[:] = listed
    return array


def _quotient(numerators: npt.NDArray[np.object_], denominator: int | npt.NDArray[np.object_]) -> Floats:
    """Divide Python integers, which rounds correctly."""
    try:
        return np.asarray(numerators / denominator, dtype=np.float64)
    except OverflowError:
        raise PlanError("gamma or beta is too large for the output scale: beyond 1e308 output LSB") from None


def output_gain(gamma: tuple[float, ...], params: QuantParams) -> Rationals:
    """Return gamma_c / s_out_c for each channel."""
    return Rationals.in_lsb(gamma, params)


def output_offset(beta: tuple[float, ...], params: QuantParams) -> Rationals:
    """Return beta_c / s_out_c + z_out for each channel."""
    return Rationals.in_lsb(beta, params).plus(params.channel_zeros(len(beta)))


def stage_terms(
    row: RowStage, *, h: int, E: int, e: Fraction, F: int, gain: Floats, offset: Floats, lo: int, hi: int,
    gain_error: Floats | float, offset_error: Floats | float,
) -> dict[str, Floats]:  # fmt: skip
    """Return the bound's terms by stage for each channel, in LSB (docs/arithmetic.md, section 6)."""
    codes = row.codes
    g = np.abs(gain)
    reach = np.maximum(np.abs(hi + 0.5 - offset), np.abs(lo - 0.5 - offset))
    with np.errstate(divide="ignore", over="ignore"):
        # the clamp ends the error's growth where the computed output grows with the ideal one: where G has gamma's sign
        grows = (g > 0) & (np.asarray(gain_error) <= g)
        x = np.where(grows, np.minimum(codes.x_max, reach / g), codes.x_max) * UP
    em = row.root_error
    v = codes.v0_min + float(Fraction(E, 4**h))
    e_error = float(abs(Fraction(E, 4**h) - e)) / (v + math.sqrt(v) * math.sqrt(codes.v0_min + float(e))) * UP
    r_error = codes.deviation * 2.0 ** (-row.K - 1)
    if row.lane == 64:  # the rows that have y > 0 have small deviations, in proportion
        r_error = np.maximum(r_error, x * (1 + e_error) * (1 + em) * row.cut_error)
    d_error, t_error = 2.0 ** (-row.K - 1), 2.0 ** (-F - 1)
    reached = x * (1 + e_error) * (1 + em) + r_error + d_error + t_error
    return {
        "R": g * r_error,
        "D": g * d_error,
        "r": g * x * em,
        "E": g * x * e_error * (1 + em),
        "t": g * t_error,
        "G": np.broadcast_to(gain_error, g.shape) * reached,
        "B": np.broadcast_to(offset_error, g.shape) * UP,
    }


def excess(spec: LayerNormSpec) -> Excess:
    """Return the proved bound of a spec, from its own integers."""
    gain, offset = output_gain(spec.gamma, spec.output), output_offset(spec.beta, spec.output)
    terms = stage_terms(
        spec.row_stage, h=spec.h, E=spec.E, e=spec.epsilon_in_codes, F=spec.F,
        gain=gain.to_float(), offset=offset.to_float(), lo=spec.output.lo, hi=spec.output.hi,
        gain_error=gain.distance(spec.G, spec.s2 - spec.F), offset_error=offset.distance(spec.B, spec.s2),
    )  # fmt: skip
    return Excess(terms)


def power_of_two(value: int | Fraction) -> str:
    """Return a positive number of any size as a power of two, for messages."""
    fraction = Fraction(value)
    bits = math.log2(fraction.numerator) - math.log2(fraction.denominator) if fraction else 0.0
    return f"2^{bits:.1f}"


def check_widths(spec: LayerNormSpec) -> None:
    """Raise PlanError, with the figure, if a value of the spec could leave its width."""
    row = spec.row_stage
    v_max = (row.codes.v0_max << 2 * spec.h) + spec.E
    widest_v = max(Fraction(v_max), spec.epsilon_in_codes)
    if widest_v >= 1 << V_BITS:
        raise PlanError(
            f"V is up to {power_of_two(widest_v)}, beyond {V_BITS} bits; use fewer input bits or a larger scale"
        )
    if row.codes.largest >= 1 << 31:
        raise PlanError(f"u is up to {power_of_two(row.codes.largest)}, beyond 31 bits and sign; use smaller exponents")
    j_min = spec.m - ((v_max.bit_length() + 1) >> 1)
    if spec.A:
        j_min = min(j_min, spec.l) - 1
    if spec.K + spec.h + j_min < 0:
        root = power_of_two(spec.A * Fraction(2) ** -spec.l) if spec.A else "0"
        raise PlanError(
            f"the reciprocal has no bits left with K = {spec.K}, V up to {power_of_two(v_max)} and n * eps of {root} "
            f"outside the root"
        )
    row.check(spec.s1)
    t_max, half = row.t_max(spec.s1), 1 << (spec.s2 - 1)
    widest = (t_max * abs(_objects(spec.G)) + abs(_objects(spec.B))).max() + half
    widest = max(widest, (spec.output.hi - spec.output.lo + 1) << spec.s2)
    if widest >= 1 << (spec.accumulator - 1):
        raise PlanError(f"outputs are up to {power_of_two(widest)} before their shift, beyond {spec.accumulator} bits")
    if widest >> spec.s2 >= 1 << 31:
        raise PlanError(
            f"outputs are up to {power_of_two(widest >> spec.s2)} LSB before they are clamped, beyond 32 bits"
        )


def sum_excess(spec: LayerNormSpec, deviation: float) -> float:
    """Return what the rounding of the input stage adds to the bound, in LSB, for a row of a given deviation.

    With u off the real sums by eta at most, the normalized values are off by eta * (2 + |x|) / deviation (RMSNorm:
    1 + |x|) at most, where x is the normalized value of the real sums.

    Parameters
    ----------
    spec : LayerNormSpec
    deviation : float
        What the row of u is divided by, in units of u: sqrt(var + eps / scale**2), sqrt(var) + eps / scale if eps is
        outside the root; of the mean square instead of the variance in RMSNorm. The error has no limit where it is 0.
    """
    if not deviation > 0:
        return math.inf
    gain = np.abs(output_gain(spec.gamma, spec.output).to_float())
    shift = 2.0 if spec.kind is NormKind.LAYERNORM else 1.0
    return float(gain.max()) * spec.input_error * (shift + spec.row_stage.codes.x_max) / deviation * UP
