"""The variance of a row, its root and the reciprocal of that, in the words int24 and float24: (3) and (4).

Numbers beyond 2**24 are held in parts of 12 bits, of which the last may have up to 24. Those of the variance V are
shifted until the last one has its 24 bits; it and the next one are then the radicand. The root is that of a table of
lower bounds, with its low bits by one division and a test of what is left; its reciprocal is a long division in digits
of 6 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from .bounded import LIMB, LIMB_BITS, LIMIT, Bounded, Limbs, Number
from .graph import Operand

#: What the parts of V hold.
V_BITS = 62
#: Bits of the root, and of a quotient's digits: a remainder below the root, times 2**6, stays below the limit.
ROOT_BITS, DIGIT = 18, 6
#: By the upper 12 of a number's 24 bits: 2**k, where 4**k brings it to [2**22, 2**24).
_TO_TOP = np.array([1 << (24 - max((k << 12).bit_length(), 13)) // 2 for k in range(1 << 12)])
_TO_TOP_BITS = 5
#: Powers of two up to this one are below the limit.
_POWER_BITS = LIMIT.bit_length() - 2
#: Lower bounds of a root, at most 4 too small, by the upper 10 of its argument's 24 bits.
_ROOTS = np.array([max(int(np.sqrt(k << 14)), 1 << 11) for k in range(1 << 10)])

#: A number in summands: each one times 2 to a power.
Terms: TypeAlias = list[tuple[Number, int]]


@dataclass(frozen=True)
class Squares:
    """A sum of squares in summands, with what is to be taken off them, and its bound."""

    terms: Terms
    most: int
    less: Terms = field(default_factory=list)


def named(letter: str, limbs: Limbs) -> dict[str, Operand]:
    """Return the parts of a number as stages."""
    values, at = dict[str, Operand](), 0
    for part, bits in zip((*limbs.low, limbs.top), (*limbs.bits, 0), strict=True):
        values[f"{letter}.{at}" if at else letter] = part.value
        at += bits
    return values


class Root:
    """Writes (3) and (4).

    Parameters
    ----------
    arithmetic : Bounded
    low : sequence of int
        Bits of the low parts that R is to have.

    Attributes
    ----------
    stages : dict of str to Operand
        The values of docs/arithmetic.md's letters, by these (see `int64.Body.stages`).
    """

    def __init__(self, arithmetic: Bounded, low: Sequence[int] = ()) -> None:
        self._arithmetic, self._spec, self._low = arithmetic, arithmetic.spec, tuple(low)
        self.stages: dict[str, Operand] = {}
        #: What _variance leaves for _reciprocal: the parts of V, and how far it is shifted at most.
        self._parts = self._most_shift = 0

    def reciprocal(self, Q: Squares, x: Number | None, *, centred: bool = False) -> Limbs:
        """Return R, with V0 = n*Q - x**2; `centred` tells that V0 is 0 only where Q is."""
        spec = self._spec
        upper, lower, shifts = self._top_of(self._variance(Q, x, centred or x is None))
        r = self._root(upper, lower).within(1 << ROOT_BITS - 1, (1 << ROOT_BITS) - 1)
        # each part beyond the radicand's took 12 bits off V
        exponent = spec.K + spec.h - DIGIT * (self._parts - 2)
        if spec.A:
            r, shifts, exponent = self._with_outer_epsilon(r, shifts, exponent)
        self.stages["r"] = r.value
        R = self._reciprocal(r, shifts, exponent)
        self.stages |= named("R", R)
        return R

    def _variance(self, Q: Squares, x: Number | None, centred: bool) -> list[Number]:
        """(3): the parts of V."""
        arithmetic, spec, n = self._arithmetic, self._spec, self._spec.n
        highest = Q.most << 2 * spec.h
        most = n * highest + spec.E
        parts = max(-(-most.bit_length() // LIMB_BITS) - 1, 2)
        if most >> V_BITS:
            raise arithmetic.too_wide(f"a variance of {most.bit_length()} bits")
        self._parts = parts
        columns, less = (
            self._placed([(number, shift + 2 * spec.h) for number, shift in each], parts) for each in (Q.terms, Q.less)
        )
        less = [[part] for part in self._carried(less, parts)] if Q.less else less
        squares = self._carried(columns, parts, "Q_offset", taken=less)
        squares[-1] = squares[-1].within(0, highest >> LIMB_BITS * (parts - 1))  # what is carried has looser bounds
        divisor = arithmetic.param("n", n)
        columns = [[arithmetic.mul(part, divisor)] for part in squares]
        taken = self._placed(self._squared(x, 2 * spec.h), parts) if x is not None else [[] for _ in columns]
        if max(sum(number.high for number in column) for column in taken) >= LIMIT >> 2:  # it is to fit beside n*Q
            taken = [[part] for part in self._carried(taken, parts)]
        # with one sum of squares, which is 1 at least, V0 is never 0
        positive = len(Q.terms) == 1 and Q.terms[0][0].low > 0 and centred
        added = [
            spec.E >> LIMB_BITS * k if k == parts - 1 else spec.E >> LIMB_BITS * k & LIMB - 1 for k in range(parts)
        ]
        V = self._carried(columns, parts, "V_offset", added if positive else [0] * parts, taken)
        codes = spec.row_stage.codes
        top = LIMB_BITS * (parts - 1)
        if positive:
            V[-1] = V[-1].within(0, (codes.v0_max << 2 * spec.h) + spec.E >> top)
        else:
            V[-1] = V[-1].within(0, codes.v0_max << 2 * spec.h >> top)
            V = self._at_least(V, codes.v0_min << 2 * spec.h)
            V = self._carried([[part] for part in V], parts, "eps", added) if spec.E else V
        self.stages |= {f"V.{LIMB_BITS * k}" if k else "V": part.value for k, part in enumerate(V)}
        return V

    def _squared(self, x: Number, shift: int) -> Terms:
        """Return the summands of a square."""
        arithmetic = self._arithmetic
        if max(-x.low, x.high) ** 2 < LIMIT:
            return [(arithmetic.square(x), shift)]
        negative = arithmetic.sub(arithmetic.constant(0), x)
        size = Number(arithmetic.writer.op("Max", x.value, negative.value), 0, max(-x.low, x.high))
        high, low = arithmetic.split(size)
        products = (arithmetic.square(low), arithmetic.mul(high, low), arithmetic.square(high))
        return [(product, shift + at) for product, at in zip(products, (0, LIMB_BITS + 1, 2 * LIMB_BITS), strict=True)]

    def _placed(self, terms: Terms, parts: int) -> list[list[Number]]:
        """Return what belongs to each part."""
        arithmetic = self._arithmetic
        columns: list[list[Number]] = [[] for _ in range(parts)]
        for number, shift in terms:
            index, bits = divmod(shift, LIMB_BITS)
            while index >= parts:
                index, bits = index - 1, bits + LIMB_BITS
            factor = arithmetic.constant(1 << bits)
            if number.high << bits < LIMIT:
                columns[index].append(arithmetic.mul(number, factor))
                continue
            if index == parts - 1:
                raise arithmetic.too_wide("a variance")
            high, low = arithmetic.split(number)
            columns[index].append(arithmetic.mul(low, factor))
            columns[index + 1].append(arithmetic.mul(high, factor))
        return columns

    def _carried(
        self, columns: Sequence[Sequence[Number]], parts: int, name: str = "", added: Sequence[int] | None = None,
        taken: Sequence[Sequence[Number]] | None = None,
    ) -> list[Number]:  # fmt: skip
        """Return the parts of sums, with constants of that name added and what is taken off; 12 bits but the last."""
        arithmetic = self._arithmetic
        found, above = list[Number](), list[Number]()
        borrowed = 0
        for index in range(parts):
            off = taken[index] if taken is not None else ()
            last = index == parts - 1
            lent = 0 if last else -(-(sum(number.high for number in off)) // LIMB)
            constant = (added[index] if added is not None else 0) + lent * LIMB - borrowed
            borrowed = lent
            summands, above = [*columns[index], *above], []
            total = summands[0] if summands else arithmetic.constant(0)
            room = LIMIT - max(constant, 0)
            for summand in summands[1:]:
                if total.high + summand.high >= room and not last:
                    high, summand = arithmetic.split(summand)
                    above.append(high)
                if total.high + summand.high >= room and not last:
                    high, total = arithmetic.split(total)
                    above.append(high)
                total = arithmetic.add(total, summand)
            if constant:
                total = arithmetic.add(total, arithmetic.param(f"{name}_{index}", constant))
            for number in off:
                total = arithmetic.sub(total, number)
            total = total.within(0, total.high)
            if not last and total.high >= LIMB:
                carry, total = arithmetic.split(total)
                above.append(carry)
            found.append(total)
        return found

    def _at_least(self, V: list[Number], least: int) -> list[Number]:
        """Return V, or at least this much where it is 0: there p is 0, whatever R is."""
        arithmetic, op = self._arithmetic, self._arithmetic.writer.op
        largest = V[0].value
        for part in V[1:]:
            largest = op("Max", largest, part.value)
        one = arithmetic.constant(1)
        absent = arithmetic.sub(one, Number(op("Min", largest, one.value), 0, 1))
        index = max((least.bit_length() - 1) // LIMB_BITS, 0)
        amount = -(-least >> LIMB_BITS * index)
        if amount == LIMB:
            index, amount = index + 1, 1
        index = min(index, len(V) - 1)
        filled = op("Max", V[index].value, arithmetic.mul(absent.within(0, 1), arithmetic.constant(amount)).value)
        return [part if at != index else Number(filled, 0, max(part.high, amount)) for at, part in enumerate(V)]

    def _top_of(self, V: list[Number]) -> tuple[Number, Number, list[Number]]:
        """Return the upper 36 bits of V, shifted until it has all its bits, as 24 and 12, and the factors.

        The last one is a power of two up to 32, the others are 1 or 64; V was multiplied by their square.
        """
        arithmetic, op, spec = self._arithmetic, self._arithmetic.writer.op, self._spec
        one, shifts, parts = arithmetic.constant(1), list[Number](), list(V)
        least = (spec.row_stage.codes.v0_min << 2 * spec.h) + spec.E
        self._most_shift = (LIMB_BITS * (len(V) + 1) - least.bit_length() + 1) // 2
        while least >> LIMB_BITS * len(V) == 0:  # at least the upper 12 bits may be 0
            least <<= LIMB_BITS
            present = Number(op("Min", arithmetic.floor(parts[-1], LIMB).value, one.value), 0, 1)
            absent = arithmetic.sub(one, present).within(0, 1)
            # each a Max: OpenVINO makes (x + b/a)*a of a*x + b in models with quantizers, which rounds if a is no power
            factor = Number(op("Max", arithmetic.mul(absent, arithmetic.constant(LIMB)).value, one.value), 1, LIMB)
            moved = [arithmetic.mul(part, absent) for part in parts[:-1]]
            shifted = Number(op("Mul", parts[-1].value, factor.value), 0, LIMIT - LIMB)
            kept = [
                arithmetic.sub(part, move).within(0, part.high) for part, move in zip(parts[:-1], moved, strict=True)
            ]
            parts = [
                kept[0],
                *(arithmetic.add(a, b).within(0, LIMB - 1) for a, b in zip(kept[1:], moved, strict=False)),
            ]
            parts.append(arithmetic.add(shifted, moved[-1].within(0, LIMB - 1)))
            step = op("Max", arithmetic.mul(absent, arithmetic.constant(1 << DIGIT)).value, one.value)
            shifts.append(Number(step, 1, 1 << DIGIT))
        top = arithmetic.floor(parts[-1].within(0, LIMIT - 1), LIMB)
        power = Number(arithmetic.look_up(_TO_TOP, top.value), 1, 1 << _TO_TOP_BITS)
        square = Number(op("Mul", power.value, power.value), 1, 1 << 2 * _TO_TOP_BITS)
        lower = arithmetic.mul(parts[-2], square)
        if len(parts) > 2:
            lower = arithmetic.add(lower, arithmetic.floor(arithmetic.mul(parts[-3], square), LIMB))
        carry, lower = arithmetic.split(lower)
        upper = op("Add", op("Mul", parts[-1].value, square.value), carry.value)
        return Number(upper, LIMIT >> 2, LIMIT - 1), lower, [*shifts, power]

    def _root(self, upper: Number, lower: Number) -> Number:
        """The root of upper * 2**12 + lower: a table's, its low bits by one division, and a test of what is left."""
        arithmetic, op = self._arithmetic, self._arithmetic.writer.op
        index = arithmetic.floor(upper, 1 << 14)
        top = Number(arithmetic.look_up(_ROOTS, index.value), 1 << 11, LIMB - 1)
        most = 11 * LIMB  # the root is at most 4 above the table's
        left = Number(op("Sub", upper.value, op("Mul", top.value, top.value)), 0, most)
        high, low = arithmetic.split(lower, 1 << 7)
        dividend = arithmetic.add(arithmetic.mul(left, arithmetic.constant(32)), high)
        digits = arithmetic.quotient(dividend, top, 352)  # the low 6 bits, with what the table lacks, or 1 more
        left = arithmetic.remainder(dividend, digits, top)
        left = arithmetic.add(arithmetic.mul(left, arithmetic.constant(1 << 7)), low)
        left = arithmetic.sub(left, arithmetic.square(digits))
        minus_one = arithmetic.constant(-1).value
        over = arithmetic.writer.cast(op("GreaterOrEqual", minus_one, left.value), arithmetic.dtype)
        root = arithmetic.add(arithmetic.mul(top, arithmetic.constant(1 << DIGIT)), digits)
        return arithmetic.sub(root, Number(over, 0, 1))

    def _with_outer_epsilon(self, r: Number, shifts: list[Number], exponent: int) -> tuple[Number, list[Number], int]:
        """Add eps outside the root: r >> (j-j') plus A >> (l-j') with j' = min(j, l), halved where it has a bit more.

        The factors in `shifts` make 2**j, but for what is constant; those that are returned make 2**(j'+1), or 2**j'
        where the sum was halved.
        """
        arithmetic, op, spec = self._arithmetic, self._arithmetic.writer.op, self._spec
        one, most = arithmetic.constant(1), self._most_shift
        at = spec.l + DIGIT * (self._parts - 2)  # the product of the factors that makes j equal to l, as a power of two
        if most >= LIMIT.bit_length() - 1:
            raise arithmetic.too_wide("the shifts of a root, with eps outside it,")
        power, *others = shifts
        for factor in others:
            power = Number(op("Mul", power.value, factor.value), 1, 1 << most)
        power = power.within(1, 1 << most)
        added = arithmetic.param("A", spec.A >> max(at - _POWER_BITS, 0))
        kept = power
        if at > 0:
            unit = arithmetic.param("A_unit", 1 << min(at, _POWER_BITS))
            shift = arithmetic.quotient(unit, power, unit.high)  # 0 where j is above l
            added = arithmetic.quotient(added, Number(op("Max", shift.value, one.value), 1, unit.high), added.high)
        if 0 < at < most:
            shift = arithmetic.quotient(power, unit, power.high)
            r = arithmetic.quotient(r, Number(op("Max", shift.value, one.value), 1, power.high), r.high)
            kept = Number(op("Min", power.value, unit.value), 1, unit.high)
        elif at <= 0:  # j is not below l; shifts by all bits of r or more are alike
            unit = arithmetic.param("A_unit", 1 << min(-at, ROOT_BITS))
            longest = arithmetic.constant((1 << _POWER_BITS) // unit.high)
            shift = Number(op("Min", power.value, longest.value), 1, min(power.high, longest.high))
            r = arithmetic.quotient(r, arithmetic.mul(shift, unit), r.high)
            kept, exponent = one, exponent + at
        total = arithmetic.add(r, added)
        over = arithmetic.floor(total, 1 << ROOT_BITS).within(0, 1)
        r = arithmetic.quotient(total, arithmetic.add(over, one), (1 << ROOT_BITS) - 1)
        kept = arithmetic.mul(kept, arithmetic.sub(arithmetic.constant(2), over))
        self._most_shift = bits = kept.high.bit_length() - 1
        factors = list[Number]()
        for left in range(bits - DIGIT, 0, -DIGIT):
            value = op("Min", kept.value, arithmetic.constant(1 << DIGIT).value)
            factors.append(Number(value, 1, 1 << DIGIT))
            kept = arithmetic.quotient(kept, factors[-1], 1 << left).within(1, 1 << left)
        return r.within(1 << ROOT_BITS - 1, r.high), [*factors, kept], exponent - 1

    def _reciprocal(self, r: Number, shifts: list[Number], exponent: int) -> Limbs:
        """R: n * 2**exponent, shifted, over r, rounded: long division, with one bit more than R has."""
        arithmetic, spec, n = self._arithmetic, self._spec, self._spec.n
        low = sum(self._low) + 1 if self._low else 0  # bits that are not in the upper part of the quotient
        largest = int(spec.row_stage.r_max) + 1
        most = 2 * largest + 1 >> low
        if most >= LIMIT:
            raise arithmetic.too_wide("the quotient of R")
        bits = exponent + 1 - low
        capacities = {}
        for own in range(len(shifts)):  # how many factors of 64 have a step of their own
            inside = min(self._most_shift, sum(factor.high.bit_length() - 1 for factor in shifts[own:]))
            if (capacity := LIMIT.bit_length() - 1 - n.bit_length() - inside) >= 0:
                capacities[own] = min(capacity, bits)
        if bits < 0 or not capacities:
            raise arithmetic.too_wide("the dividend of R")
        own = min(capacities, key=lambda count: count - (capacities[count] - bits) // DIGIT)
        digits = -((capacities[own] - bits) // DIGIT)
        first = max(bits - digits * DIGIT, 0)
        dividend = arithmetic.param("numerator", n << first)
        for factor in shifts[own:]:
            dividend = Number(arithmetic.writer.op("Mul", dividend.value, factor.value), 0, LIMIT - 1)
        left = bits - first
        total = quotient = arithmetic.quotient(dividend, r, most >> left)
        steps = [*shifts[:own], *(_step(arithmetic, at) for at in range(left, 0, -DIGIT))]
        for index, step in enumerate(steps):
            dividend, quotient = self._digit(dividend, quotient, r, step)
            left -= 0 if index < own else step.high.bit_length() - 1
            total = Number(arithmetic.writer.op("Mul", total.value, step.value), 0, most >> left)
            total = Number(arithmetic.writer.op("Add", total.value, quotient.value), 0, most >> left)
        if not low:
            R = arithmetic.floor(arithmetic.add(total, arithmetic.constant(1)), 2)
            return Limbs(R.within(0, largest))
        found = list[Number]()
        for width in (*self._low[:0:-1], self._low[0] + 1):
            part = arithmetic.constant(0)
            for at in range(width, 0, -DIGIT):
                step = _step(arithmetic, at)
                dividend, quotient = self._digit(dividend, quotient, r, step)
                part = arithmetic.add(arithmetic.mul(part, step), quotient) if at < width else quotient
            found.append(part.within(0, (1 << width) - 1))
        # the last bit rounds: the lowest part may become 1 more than its bits hold
        found[-1] = arithmetic.floor(arithmetic.add(found[-1], arithmetic.constant(1)), 2)
        return Limbs(total.within(0, largest >> sum(self._low)), tuple(reversed(found)), self._low)

    def _digit(self, dividend: Number, quotient: Number, r: Number, step: Number) -> tuple[Number, Number]:
        """Return the next dividend and digits of a long division."""
        rest = self._arithmetic.remainder(dividend, quotient, r)
        dividend = self._arithmetic.mul(rest, step)
        return dividend, self._arithmetic.quotient(dividend, r, step.high - 1)


def _step(arithmetic: Bounded, bits: int) -> Number:
    return arithmetic.constant(1 << min(bits, DIGIT))
