"""Integers below 2**24, carried in int32 or in float32: each operation follows the bounds of what it computes.

int32 divides with Div, which truncates, and gets no negative dividend, but where either rounding will do; float32 makes
a quotient whole with Floor. There a quotient of integers below 2**24, rounded correctly, has the floor of the exact;
for the constant n, whose reciprocal compilers like to multiply by, that is done here, where it is exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError
from ..spec import LayerNormSpec
from .graph import Operand, Writer

INT32, FLOAT = ir.DataType.INT32, ir.DataType.FLOAT

#: Magnitudes stay below this.
LIMIT = 1 << 24
#: A number in parts has 12 bits in each but the last, so that a product of two of them stays below the limit.
LIMB_BITS = 12
LIMB = 1 << LIMB_BITS


@dataclass(frozen=True)
class Number:
    """A tensor of integers and its proved bounds."""

    value: Operand
    low: int
    high: int

    def within(self, low: int, high: int) -> Number:
        """Return the same tensor with bounds that are proved otherwise."""
        return Number(self.value, low, high)


@dataclass(frozen=True)
class Limbs:
    """A tensor of integers in parts: `low`, the lowest first, each with its bits below the next one, and what is above.

    The parts need not be within their bits.
    """

    top: Number
    low: tuple[Number, ...] = ()
    bits: tuple[int, ...] = ()


class Bounded:
    """Writes operations on bounded integers.

    Parameters
    ----------
    spec : LayerNormSpec
        For the messages, and for n.
    dtype : onnx_ir.DataType
        INT32 or FLOAT: what carries them.
    writer : Writer
        What the attributes need is added to its own.

    Raises
    ------
    ModelError
        By every operation whose result could reach 2**24.
    """

    def __init__(self, spec: LayerNormSpec, dtype: ir.DataType, writer: Writer) -> None:
        self.spec, self.dtype, self.writer = spec, dtype, writer
        self.floats = dtype == FLOAT
        self.word = "float24" if self.floats else "int24"

    def too_wide(self, what: str) -> ModelError:
        """Return the error of a value that the word doesn't hold."""
        spec = self.spec
        largest, bits = max(spec.input.channel_exponents(spec.n)), spec.input.dtype.bits
        sums = f"{spec.row_stage.codes.largest.bit_length()}-bit sums"  # of an input stage
        codes = sums if bits > 16 else f"{spec.input.dtype} input"
        codes += f" with exponents up to {largest}" if largest else ""
        smaller = " and smaller exponents (calibrate --exponents N)" if largest else ""
        smaller += " and codes of fewer bits, or shorter rows" if bits > 8 else ""
        return ModelError(
            f"the word {self.word} doesn't hold {what} of the spec with n = {spec.n}, {codes} and a lane of "
            f"{spec.lane} bits: it would reach 2^24; the word int64 does. For {self.word}, plan with "
            f'hardware="carried24"{smaller}'
        )

    def bounded(self, value: Operand, low: int, high: int) -> Number:
        """Return a number that is proved to lie below the limit."""
        if max(-low, high) >= LIMIT:
            raise self.too_wide(f"a value of up to {max(-low, high)}")
        return Number(value, low, high)

    def constant(self, value: int) -> Number:
        """Return a constant."""
        return self.bounded(self.writer.constant(value, self.dtype), value, value)

    def param(self, name: str, value: int) -> Number:
        """Return an integer that follows from the spec: an attribute of the function."""
        assert self.writer.attributes.setdefault(name, value) == value
        return self.bounded(self.writer.attribute(name, self.dtype), value, value)

    def factor(self, name: str, value: float) -> Operand:
        """Return a float that follows from the spec: an attribute of the function."""
        self.writer.attributes[name] = value
        return self.writer.attribute(name, FLOAT)

    def add(self, a: Number, b: Number) -> Number:
        """Return a sum."""
        return self.bounded(self.writer.op("Add", a.value, b.value), a.low + b.low, a.high + b.high)

    def sub(self, a: Number, b: Number) -> Number:
        """Return a difference."""
        return self.bounded(self.writer.op("Sub", a.value, b.value), a.low - b.high, a.high - b.low)

    def mul(self, a: Number, b: Number) -> Number:
        """Return a product; nothing is written for a factor that is always 1."""
        for one, other in ((a, b), (b, a)):
            if one.low == one.high == 1 and not isinstance(one.value, ir.Value):
                return other
        products = [x * y for x, y in itertools.product((a.low, a.high), (b.low, b.high))]
        return self.bounded(self.writer.op("Mul", a.value, b.value), min(products), max(products))

    def square(self, a: Number) -> Number:
        """Return the product with itself."""
        product = self.mul(a, a)
        return product.within(0, product.high)

    def floor(self, number: Number, unit: int) -> Number:
        """Return the floor of a quotient by a power of two, in int32 of what is not negative."""
        op = self.writer.op
        if self.floats:
            value = op("Floor", op("Mul", number.value, self.writer.constant(1.0 / unit, FLOAT)))
        else:
            value = op("Div", number.value, self.constant(unit).value)
        return Number(value, number.low // unit, number.high // unit)

    def split(self, number: Number, unit: int = LIMB) -> tuple[Number, Number]:
        """Return the quotient by a power of two and the remainder."""
        op = self.writer.op
        high = self.floor(number, unit)
        low = op("Sub", number.value, op("Mul", high.value, self.constant(unit).value))
        return high, Number(low, 0, unit - 1)

    def quotient(self, dividend: Number, divisor: Number, most: int) -> Number:
        """Return the floor of a quotient of numbers that are not negative."""
        value = self.writer.op("Div", dividend.value, divisor.value)
        return Number(self.writer.op("Floor", value) if self.floats else value, 0, most)

    def remainder(self, dividend: Number, quotient: Number, divisor: Number) -> Number:
        """Return what a division leaves."""
        op = self.writer.op
        value = op("Sub", dividend.value, op("Mul", quotient.value, divisor.value))
        return Number(value, 0, divisor.high - 1)

    def divided(
        self, number: Number, factor: Number, offset: Number | None, low: Sequence[tuple[Number, int]] = ()
    ) -> tuple[list[Number], Number]:
        """Return the floor of (number * factor + offset) / n and what it leaves, by long division where it is needed.

        The number is not negative, and only in float32 the factor may be. It may have low parts, from the upper one to
        the lowest, each with its bits: then the quotient has parts of the same bits, which may be negative or longer.
        """
        n, divisor = self.spec.n, self.param("n", self.spec.n)
        room = self._dividend_limit - (offset.high if offset is not None else 0)
        largest = max(-factor.low, factor.high)
        bits = max((room // (largest + n)).bit_length() - 1, 0)
        parts = [number]
        while parts[0].high * largest >= room:
            if not bits:
                raise self.too_wide("a dividend of n")
            parts[:1] = self.split(parts[0], 1 << bits)
        total = rest = None
        found = list[Number]()
        for index, (part, width) in enumerate([*((part, bits) for part in parts), *low]):
            dividend = self.mul(factor, part)
            if rest is not None:
                dividend = self.add(self.mul(rest, self.constant(1 << width)), dividend)
            after = len(parts) - 1 - index
            if index == len(parts) + len(low) - 1 and offset is not None:
                dividend = self.add(dividend, offset)
            if max(-dividend.low, dividend.high) >= self._dividend_limit:
                raise self.too_wide("a dividend of n")
            digits = self._over_n(dividend)
            rest = self.remainder(dividend, digits, divisor)
            if after < 0:
                found.append(digits)
                continue
            total = digits if total is None else self.add(self.mul(total, self.constant(1 << bits)), digits)
            whole = number.high >> bits * after
            total = total.within(min(factor.low * whole // n - 1, 0), factor.high * whole // n + 1)
        assert total is not None
        assert rest is not None
        return [total, *found], rest

    @property
    def _dividend_limit(self) -> int:
        """What is divided by n stays below this: a product with 1/n in float32 is exact below 2**22."""
        return LIMIT >> 2 if self.floats else LIMIT

    def _over_n(self, dividend: Number) -> Number:
        op, n = self.writer.op, self.spec.n
        if self.floats:
            middle = op("Add", dividend.value, self.writer.constant(0.5, FLOAT))
            value = op("Floor", op("Mul", middle, self.factor("n_reciprocal", 1.0 / n)))
        else:
            value = op("Div", dividend.value, self.param("n", n).value)
        return Number(value, dividend.low // n, dividend.high // n)

    def look_up(self, table: npt.NDArray[Any], index: Operand) -> Operand:
        """Return a table's entries."""
        index = self.writer.cast(index, INT32) if self.floats else index
        return self.writer.op("Gather", table.astype(self.dtype.numpy()), index)
