"""The row stage of the words int24 and float24: (0) to (5) of docs/arithmetic.md; (3) and (4) are `narrow_root`.

Sums of codes of 8 bits are sums of channels in groups, where one doesn't hold them; wider integers are split into parts
whose sums, and whose products' sums, one holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..proof import NormKind
from .bounded import FLOAT, LIMIT, Bounded, Limbs, Number
from .graph import Operand
from .narrow_root import Root, Squares, named


@dataclass(frozen=True)
class Row:
    """What the element stage takes: u and c of a row, u - c, R and D, the latter in parts of the same bits."""

    u: Number
    c: Number
    d: Number
    R: Limbs
    D: Limbs


class Rows:
    """Writes the row stage.

    Parameters
    ----------
    arithmetic : Bounded
    columns : bool
        Whether sums are MatMul by columns of weights; else they are ReduceSum.
    low : sequence of int
        Bits of the low parts that R and D are to have.

    Attributes
    ----------
    channels : dict of str to ndarray
        What it needs one of a channel.
    stages : dict of str to Operand
        The values of docs/arithmetic.md's letters, by these (see `int64.Body.stages`).
    """

    def __init__(self, arithmetic: Bounded, *, columns: bool, low: Sequence[int] = ()) -> None:
        self._arithmetic, self._spec, self._columns = arithmetic, arithmetic.spec, columns
        self.channels: dict[str, npt.NDArray[Any]] = {}
        self._root = Root(arithmetic, low)
        self.stages = self._root.stages
        params, n, codes = self._spec.input, self._spec.n, self._spec.row_stage.codes
        exponents = np.array(params.channel_exponents(n))
        #: A bound of the sum of squares of u - c.
        self._most = codes.v0_max // n + n // 4 + 1
        self._centred = self._spec.kind is NormKind.LAYERNORM and max(self._most, codes.spread**2) < LIMIT
        # where the zero point drops out, the squares are smallest without it or with the middle
        zeros = params.channel_zeros(n)
        if params.channels is None and self._spec.kind is NormKind.LAYERNORM:
            zeros = np.full(n, 0 if self._centred else (params.lo + params.hi + 1) // 2)
        self._zeros = zeros
        self._low, self._high = params.lo - int(zeros.max()), params.hi - int(zeros.min())
        if params.dtype.bits > 16:  # no codes of that many bits: u itself
            self._low, self._high = max(self._low, -codes.largest), min(self._high, codes.largest)
        if isinstance(params.zero_point, tuple):
            self.channels["Z"] = zeros
        self._sum_of_powers = int(np.left_shift(1, exponents).sum())
        if params.exponents is not None:
            self.channels["P"] = np.left_shift(1, exponents)
        self._largest = max(-self._low, self._high) ** 2
        #: Where one sum doesn't hold the squares of u: those of q - z in groups of channels, by their exponents.
        self._groups = list[tuple[int, npt.NDArray[np.int64]]]()
        single = self._centred or int((4**exponents).sum()) * self._largest < LIMIT
        self._sum_low, self._sum_high = self._low * self._sum_of_powers, self._high * self._sum_of_powers
        #: Whether one sum holds u.
        self._summed = max(-self._sum_low, self._sum_high) < LIMIT
        #: Whether u, or u - c, is split for its squares.
        self._split = not single and (params.dtype.bits > 8 or not self._summed)
        if not single and not self._split:
            self._groups = _groups(exponents, self._largest)
        for index, (_, weights) in enumerate(self._groups):
            self.channels[f"W{index}"] = weights[:, None] if columns else weights

    def write(self, q: Operand, channels: Mapping[str, Operand]) -> Row:
        """Append the nodes from the rows' codes to what the element stage takes."""
        arithmetic, n = self._arithmetic, self._spec.n
        v, u = self._integers(q, channels)
        self.stages["u"] = u.value
        if self._spec.kind is NormKind.RMSNORM:
            squares = self._squares_of_parts(u, self._spec.row_stage.codes.v0_max // n) if self._split else None
            R = self._root.reciprocal(squares or self._squares(v, u, channels), None)
            zero = arithmetic.constant(0)
            return Row(u, zero, u, R, Limbs(zero, (zero,) * len(R.low), R.bits))
        c, rest, S = self._mean(u)
        rest = arithmetic.sub(rest, arithmetic.param("n_half", n // 2))
        spread = self._spec.row_stage.codes.spread
        d = Number(arithmetic.writer.op("Sub", u.value, c.value), -spread, spread)
        self.stages["c"] = c.value
        if self._centred:
            squares = Squares([(self._sum_of_squares(d, self._most), 0)], self._most)
            R = self._root.reciprocal(squares, rest, centred=True)
        elif self._split:
            R = self._root.reciprocal(self._squares_of_parts(d, self._most), rest)
        else:
            assert S is not None
            R = self._root.reciprocal(self._squares(v, u, channels), S)
        return Row(u, c, d, R, self._mean_part(R, rest))

    def _mean(self, u: Number) -> tuple[Number, Number, Number | None]:
        """(5): c, what the division leaves and half of n, and S where it is one number."""
        arithmetic, n = self._arithmetic, self._spec.n
        S = self._sum(u, self._sum_low, self._sum_high) if self._summed else None
        one = arithmetic.constant(1)
        shift = max(-(self._sum_low // n), 0)  # of the mean, to keep its dividend positive
        if S is not None:
            self.stages["S"] = S.value
            if S.high + n * (shift + 1) < LIMIT:
                dividend = arithmetic.add(S, arithmetic.param("mean_offset", n * shift + n // 2))
                (mean,), rest = arithmetic.divided(dividend, one, None)
                return arithmetic.sub(mean, arithmetic.param("mean_shift", shift)) if shift else mean, rest, S
            bits = max(20 - n.bit_length(), 1)
            upper, lower = arithmetic.split(S, 1 << bits)
            lower = lower.within(-(1 << bits), 1 << bits)  # quotients of negative numbers may be rounded either way
        else:
            bits = max(min((max(-u.low, u.high).bit_length() + 1) // 2, 20 - n.bit_length()), 1)
            lower, upper = (self._sum(part, n * part.low, n * part.high) for part in self._parts_of(u, [bits]))
            self.stages |= {"S": lower.value, f"S.{bits}": upper.value}
        shifts = [-(part.low // n) for part in (lower, upper)]
        offsets = [arithmetic.param(f"mean_offset_{k}", n * shifts[k] + (0 if k else n // 2)) for k in (0, 1)]
        (mean, last), rest = arithmetic.divided(
            arithmetic.add(upper, offsets[1]), one, None, [(arithmetic.add(lower, offsets[0]), bits)]
        )
        mean = arithmetic.add(arithmetic.mul(mean, arithmetic.constant(1 << bits)), last)
        c = arithmetic.sub(mean, arithmetic.param("mean_shift", (shifts[1] << bits) + shifts[0]))
        return c.within(u.low, u.high), rest, S

    def _integers(self, q: Operand, channels: Mapping[str, Operand]) -> tuple[Number, Number]:
        """(0): the codes less the zero point, and u."""
        arithmetic, op = self._arithmetic, self._arithmetic.writer.op
        same = isinstance(q, ir.Value) and q.dtype == arithmetic.dtype
        v = q if same else arithmetic.writer.cast(q, arithmetic.dtype)
        if "Z" in channels:
            v = op("Sub", v, channels["Z"])
        elif zero_point := int(self._zeros[0]):
            name = "zero_point" if zero_point == self._spec.input.zero_point else "middle"
            v = op("Sub", v, arithmetic.param(name, zero_point).value)
        number = arithmetic.bounded(v, self._low, self._high)
        if "P" not in channels:
            return number, number
        most = max(self._spec.input.channel_exponents(self._spec.n))
        return number, arithmetic.bounded(op("Mul", v, channels["P"]), self._low << most, self._high << most)

    def _sum(self, values: Number, low: int, high: int, weights: Operand | None = None) -> Number:
        """Return the sum of a row with its bounds, which no part of it exceeds."""
        arithmetic, op, value = self._arithmetic, self._arithmetic.writer.op, values.value
        # MatMul of integers is three times as fast in ONNX Runtime; accelerators, which want int32 borders, lack it
        if self._columns:
            total = op("MatMul", value, arithmetic.writer.ones(arithmetic.dtype) if weights is None else weights)
        else:
            value = value if weights is None else op("Mul", value, weights)
            total = op("ReduceSum", value, np.array([-1]), keepdims=1)
        return arithmetic.bounded(total, low, high)

    def _sum_of_squares(self, values: Number, most: int) -> Number:
        """Return it, or 1 where all are 0: then p is 0, whatever R is."""
        arithmetic = self._arithmetic
        total = self._sum(arithmetic.square(values), 0, most)
        total = total.within(1, most)
        self.stages["Q"] = value = arithmetic.writer.op("Max", total.value, arithmetic.constant(1).value)
        return Number(value, 1, most)

    def _squares(self, v: Number, u: Number, channels: Mapping[str, Operand]) -> Squares:
        """(2): the sums of the groups."""
        exponents = np.array(self._spec.input.channel_exponents(self._spec.n))
        most = int((4**exponents).sum()) * self._largest
        if not self._groups:
            return Squares([(self._sum_of_squares(u, most), 0)], most)
        squares, terms = self._arithmetic.square(v), list[tuple[Number, int]]()
        for index, (base, weights) in enumerate(self._groups):
            total = self._sum(squares, 0, int(weights.sum()) * self._largest, channels[f"W{index}"])
            self.stages[f"Q.{index}"] = total.value
            terms.append((total, 2 * base))
        return Squares(terms, most)

    def _parts_of(self, x: Number, bits: Sequence[int]) -> list[Number]:
        """Return the parts of a number, the lowest first, all but the last of so many bits, with either sign."""
        arithmetic, op = self._arithmetic, self._arithmetic.writer.op
        parts = list[Number]()
        for width in bits:
            unit, half = 1 << width, 1 << width - 1
            if arithmetic.floats:
                value = op("Round", op("Mul", x.value, arithmetic.writer.constant(1.0 / unit, FLOAT)))
                upper = Number(value, (x.low - half) // unit, (x.high + half) // unit)
            else:
                shift = -(x.low // unit)  # keeps the dividend positive
                dividend = arithmetic.add(x, arithmetic.constant(shift * unit + half))
                upper = arithmetic.sub(arithmetic.floor(dividend, unit), arithmetic.constant(shift))
            lower = arithmetic.sub(x, arithmetic.mul(upper, arithmetic.constant(unit)))
            parts.append(lower.within(-half, half))
            x = upper
        return [*parts, x]

    def _squares_of_parts(self, x: Number, most: int) -> Squares:
        """(2) of u, or of u - c: the sums of the products of its parts, which may be negative."""
        arithmetic, op, n = self._arithmetic, self._arithmetic.writer.op, self._spec.n
        largest = max(-x.low, x.high)
        bits = next(
            ([width] * count for count in (1, 2, 3) for width in range(2, 12) if _hold(n, largest, most, width, count)),
            None,
        )
        if bits is None:
            raise arithmetic.too_wide("the sums of squares")
        parts = self._parts_of(x, bits)
        zero = arithmetic.constant(0)
        terms, less = list[tuple[Number, int]](), list[tuple[Number, int]]()
        for i, a in enumerate(parts):
            for j, b in enumerate(parts[i:], start=i):
                at = sum(bits[:i]) + sum(bits[:j])
                bound = _sum_bound(n, largest, most, bits[0], len(bits), i, j)
                product = Number(op("Mul", a.value, b.value), 0 if i == j else -bound, bound)
                total = self._sum(product, product.low, product.high)
                self.stages[f"Q.{i}{j}"] = total.value
                if i == j:
                    terms.append((total, at))
                    continue
                terms.append((Number(op("Max", total.value, zero.value), 0, bound), at + 1))
                negative = arithmetic.sub(zero, total)
                less.append((Number(op("Max", negative.value, zero.value), 0, bound), at + 1))
        return Squares(terms, most, less)

    def _mean_part(self, R: Limbs, rest: Number) -> Limbs:
        """(5): D, by long division of rest * R by n, with a dividend that is not negative in int32."""
        arithmetic, n = self._arithmetic, self._spec.n
        half = arithmetic.param("n_half", n // 2)
        factor = rest if arithmetic.floats else arithmetic.add(rest, arithmetic.param("n", n))
        (top, *low), _ = arithmetic.divided(R.top, factor, half, [*zip(reversed(R.low), reversed(R.bits), strict=True)])
        low.reverse()
        if not arithmetic.floats:
            top = arithmetic.sub(top, R.top)
            low = [arithmetic.sub(part, own) for part, own in zip(low, R.low, strict=True)]
        D = Limbs(top.within(-(R.top.high // 2) - 2, R.top.high // 2 + 2), tuple(low), R.bits)
        self.stages |= named("D", D)
        return D


def _groups(exponents: npt.NDArray[np.int64], largest: int) -> list[tuple[int, npt.NDArray[np.int64]]]:
    """Return the channels in groups, each the least of its exponents and the weights 4**(e - least), 0 for others.

    No sum of as many squares up to `largest` with these weights reaches the limit.
    """
    groups: list[tuple[int, npt.NDArray[np.int64]]] = []
    room = 0
    for channel in np.argsort(exponents, kind="stable").tolist():
        exponent = int(exponents[channel])
        if groups:
            room -= largest << 2 * (exponent - groups[-1][0])
        if not groups or room <= 0:
            groups.append((exponent, np.zeros(len(exponents), dtype=np.int64)))
            room = LIMIT - largest
        base, weights = groups[-1]
        weights[channel] = 4 ** (exponent - base)
    return groups


def _hold(n: int, largest: int, most: int, width: int, count: int) -> bool:
    """Whether the sums of products of parts stay below the limit."""
    return all(
        _sum_bound(n, largest, most, width, count, i, j) < LIMIT for i in range(count + 1) for j in range(i, count + 1)
    )


def _sum_bound(n: int, largest: int, most: int, width: int, count: int, i: int, j: int) -> int:
    """Return what no sum of products of the parts i <= j reaches, of numbers whose sum of squares has a bound.

    All parts but the last, which `count` come before, have magnitudes of up to half of 2**width; the last one is within
    2/3 of the quotient by what is below it, as width is 2 at least. Also parts of a sum stay below it.
    """
    half, unit = 1 << width - 1, 1 << width * count
    if j < count:
        return n * half * half
    top = largest // unit + 1
    if i < count:
        return half * min(n * top, math.isqrt(n * most) // unit + n + 2)
    return min(n * top * top, most // unit**2 + 2 * (math.isqrt(n * most) // unit + 2) + n)
