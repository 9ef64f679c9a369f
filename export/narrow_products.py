"""Sums of products with constants in the words int24 and float24: floor((sum of x * C + B) / 2**shift).

Where the products reach 2**24, C and B are in parts, and x in two where it is long itself. A product of two parts
belongs to a level, by the sum of their places, and each level takes the floor of the one below it, as
floor((x * 2**k + y) / 2**s) = floor((x + floor(y / 2**k)) / 2**(s - k)). Equation (0) with an adder is such a sum, and
so are (31), and (8) with (9).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .bounded import LIMIT, Bounded, Number
from .graph import Operand

Channels = dict[str, npt.NDArray[Any]]
Integers = npt.NDArray[np.int64]

#: In how many parts x and C may be, by what they cost.
_PARTS = ((1, 1), (1, 2), (2, 1), (1, 3), (1, 4), (2, 2), (1, 5), (2, 3))


@dataclass(frozen=True)
class Shape:
    """In how many parts x and C are, and the bits of all but the last one."""

    x: int
    C: int
    bits: int

    @property
    def last(self) -> int:
        """The number of the last level."""
        return self.x + self.C - 2


def shapes(shift: int, *, least: int = 1) -> Iterator[Shape]:
    """Yield the shapes in which products can be, with at least so many levels, those of the fewest nodes first."""
    for x, C in _PARTS:
        levels = x + C - 1
        if levels == 1 >= least:
            yield Shape(x, C, 0)
        elif levels >= least:
            yield from (Shape(x, C, bits) for bits in range(1, min(24, -(-shift // (levels - 1)))))


class Products:
    """Writes floor((sum of x * C + B) / 2**shift).

    Parameters
    ----------
    arithmetic : Bounded
    ends : sequence of tuple of int
        The lowest and the highest value of each x.
    C : mapping of str to ndarray of int64
        What each x is multiplied by, by the names of these constants, one for all channels or one a channel.
    B : ndarray of int64
    shift : int
    shape : Shape
    most : int
        What the magnitude of the sum of x * C + B doesn't exceed.
    result : str
        The name of what is written.
    clamped : bool
        Whether what is negative need not be rounded down, as it is clamped.

    Attributes
    ----------
    channels : dict of str to ndarray
        The parts of C and B.
    holds : bool
        Whether no value reaches 2**24.
    """

    def __init__(
        self, arithmetic: Bounded, ends: Sequence[tuple[int, int]], C: Mapping[str, Integers], B: Integers, shift: int,
        shape: Shape, *, most: int, result: str, clamped: bool = False,
    ) -> None:  # fmt: skip
        self._arithmetic, self._shape, self._result, self._name = arithmetic, shape, result, next(iter(C))
        self._ends = tuple(ends)
        self._rest = shift - shape.bits * shape.last
        #: Where only the lowest level takes the lowest parts of C, these are over its unit in float32.
        self._scaled = arithmetic.floats and shape.x == 1
        #: Of each level: which x, which part of it, and the name of the part of C.
        self._factors: list[list[tuple[int, int, str]]] = []
        self._bias = 0
        self.channels: Channels = {}
        floats = arithmetic.floats
        self.holds = floats or shape.x == 1 or min(low for low, _ in ends) >= 0
        rest, carry_low, carry_high = B, 0, 0
        for level in range(shape.last + 1):
            top = level == shape.last
            unit = 1 << (self._rest if top else shape.bits)
            scale = 1.0 / unit if self._scaled and level == 0 else 1
            key = self._place("B", level, shape.last)
            self.channels[key] = rest  # has its place here
            low, high = self._add_products(level, C, scale)
            part, rest = (rest, rest) if top else (rest & (unit - 1), rest >> shape.bits)
            total_low, total_high = low + int(part.min()) + carry_low, high + int(part.max()) + carry_high
            bias = 0
            if not floats and total_low < 0 and unit > 1 and not (top and clamped):  # dividends are not negative
                bias = -(total_low // unit)
                part, rest = part + bias * unit, rest - bias
                total_low, total_high = total_low + bias * unit, total_high + bias * unit
            carried = max(-carry_low, carry_high)
            if top:
                self._bias, total = bias, (most >> shape.bits * level) + bias * unit + 2
            else:
                total = max(-total_low, total_high)
            largest = max(-low, high, int(np.abs(part).max()), total + carried)
            self.holds = self.holds and largest < LIMIT
            carry_low, carry_high = total_low // unit, total_high // unit
            self.channels[key] = part * scale
            if not part.any():
                del self.channels[key]
        self.channels = dict(reversed(self.channels.items()))

    def _place(self, name: str, place: int, last: int) -> str:
        """Return the name of a part."""
        suffix = "" if not last else ("_low", "_high")[place] if last == 1 else f"_{place}"
        return f"{name}{suffix}"

    def _add_products(self, level: int, C: Mapping[str, Integers], scale: float) -> tuple[int, int]:
        """Choose the products of a level, and return their bounds."""
        shape, bits, last = self._shape, self._shape.bits, self._shape.C - 1
        self._factors.append([])
        low = high = 0
        for index, ((name, factors), (x_low, x_high)) in enumerate(zip(C.items(), self._ends, strict=True)):
            for part in range(shape.x):
                place = level - part
                if not 0 <= place <= last:
                    continue
                values = factors >> bits * place
                values = values if place == last else values & (1 << bits) - 1
                if not values.any():
                    continue
                key = self._place(name, place, last)
                self.channels[key] = values * scale
                self._factors[-1].append((index, part, key))
                if shape.x > 1:
                    ends = (x_low >> bits, x_high >> bits) if part else (0, (1 << bits) - 1)
                else:
                    ends = x_low, x_high
                found = [x * int(c) for x in ends for c in (values.min(), values.max())]
                low, high = low + min(0, *found), high + max(0, *found)
        return low, high

    def write(self, xs: Sequence[Operand], channels: Mapping[str, Operand]) -> Operand:
        """Append the nodes, and return the floor; where it is clamped, what is negative may be rounded up."""
        arithmetic, op = self._arithmetic, self._arithmetic.writer.op
        parts = [[x] for x in xs]
        if self._shape.x > 1:
            for index, (x, (low, high)) in enumerate(zip(xs, self._ends, strict=True)):
                upper, lower = arithmetic.split(Number(x, low, high), 1 << self._shape.bits)
                parts[index] = [lower.value, upper.value]
        value = self._level(self._shape.last, parts, channels)
        assert value is not None
        if not self._rest:
            return value
        if arithmetic.floats:
            if self._shape.last or not self._scaled:
                value = op("Mul", value, arithmetic.factor(f"{self._result}_unit", 2.0**-self._rest))
            return op("Floor", value)
        value = op("Div", value, arithmetic.param(f"{self._result}_unit", 1 << self._rest).value)
        return op("Sub", value, arithmetic.constant(self._bias).value) if self._bias else value

    def _level(self, level: int, parts: Sequence[Sequence[Operand]], channels: Mapping[str, Operand]) -> Operand | None:
        """Append a level's sum, from the last one down."""
        arithmetic, op, bits = self._arithmetic, self._arithmetic.writer.op, self._shape.bits
        total: Operand | None = None
        for index, part, key in self._factors[level]:
            factor, product = channels[key], parts[index][part]
            if isinstance(factor, ir.Value) or (factor != 1).any():
                product = op("Mul", product, factor)
            total = product if total is None else op("Add", total, product)
        if (key := self._place("B", level, self._shape.last)) in self.channels:
            total = channels[key] if total is None else op("Add", total, channels[key])
        below = self._level(level - 1, parts, channels) if level else None
        if below is None:
            return total
        if not arithmetic.floats:
            below = op("Div", below, arithmetic.param(f"{self._name}_unit", 1 << bits).value)
        elif level == 1 and self._scaled:
            below = op("Floor", below)
        else:
            below = op("Floor", op("Mul", below, arithmetic.factor(f"{self._name}_unit", 2.0**-bits)))
        return below if total is None else op("Add", total, below)
