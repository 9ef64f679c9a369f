"""The element stage of the words int24 and float24: (6) to (9) of docs/arithmetic.md.

Where the planner found a spec whose products t * G stay below 2**24 for all codes that are not clamped, one product is
enough. In int24 t is clamped before it, to what the output can hold. In float24 the output is clamped: products beyond
2**24 are rounded there, but rounding keeps the order of numbers, and only clamped codes have such products. Else G is
split into parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from .bounded import LIMIT, Bounded
from .graph import Operand
from .narrow_normalized import biased_t, holds, rounded_t
from .narrow_products import Channels, Products, shapes
from .narrow_rows import Row


class Elements(Protocol):
    """A way to write the element stage.

    Attributes
    ----------
    channels : dict of str to ndarray
        What it needs one of a channel.
    """

    channels: Channels

    def write(self, row: Row, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes to t, which may be shifted by constants, and the codes."""
        ...


def elements(arithmetic: Bounded, low: Sequence[int] = ()) -> Elements:
    """Return the way with the fewest nodes that holds the arithmetic's spec, with low parts of R of so many bits."""
    spec = arithmetic.spec
    t_max = spec.row_stage.t_max(spec.s1)
    unclamped = max(spec.output.hi + 1, -spec.output.lo) << spec.s2
    one_product = all(abs(G) <= 1 << spec.s2 for G in spec.G)
    if arithmetic.floats:
        # t*G and t*G + B are exact where the code isn't clamped, with one bit more for half of an output code
        offset = max(abs(2 * B + 1) for B in spec.B)
        if one_product and 2 * unclamped <= LIMIT and offset + 2 * unclamped <= 2 * LIMIT:
            return _Rounded(arithmetic)
    elif one_product and (spec.output.hi - spec.output.lo + 1) << spec.s2 <= LIMIT and holds(spec, t_max, low):
        return _Clamped(arithmetic)
    return _Split(arithmetic, low)


class _Rounded:
    """float24 with one product: t*G + B in output codes, rounded and clamped.

    Half of the smallest unit is added before each Round, so that there are no ties.
    """

    def __init__(self, arithmetic: Bounded) -> None:
        self._arithmetic, self._spec = arithmetic, arithmetic.spec
        s2 = self._spec.s2
        self.channels: Channels = {
            "G": np.array(self._spec.G) * 2.0**-s2,
            "B": (2 * np.array(self._spec.B) + 1) * 2.0 ** (-s2 - 1),
        }

    def write(self, row: Row, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes."""
        op = self._arithmetic.writer.op
        t = rounded_t(self._arithmetic, row)
        y = op("Round", op("Add", op("Mul", t, channels["G"]), channels["B"]))
        return t, clipped(self._arithmetic, y)


class _Clamped:
    """int24 with one product: t is clamped to what the output can hold, and counted from there."""

    def __init__(self, arithmetic: Bounded) -> None:
        self._arithmetic, self._spec = arithmetic, arithmetic.spec
        spec, unit = self._spec, 1 << self._spec.s2
        self._t_bias = t_max = spec.row_stage.t_max(spec.s1)  # what keeps t positive
        lo, hi = spec.output.lo, spec.output.hi
        G, B = np.array(spec.G, dtype=np.int64), np.array(spec.B, dtype=np.int64) + unit // 2
        # from the last t of the first code to the first t of the last; no step skips a code, as |G| <= 2**s2
        steps = np.where(G == 0, 1, np.abs(G))
        first = np.where(G < 0, B - hi * unit, (lo + 1) * unit - 1 - B) // steps
        last = np.where(G < 0, (B - (lo + 1) * unit) // steps + 1, -((B - hi * unit) // steps))
        first, last = np.clip(first, -t_max, t_max), np.clip(last, -t_max, t_max)
        G = np.where(last > first, G, 0)
        start = np.where(G == 0, np.clip(first * np.array(spec.G) + B, lo * unit, hi * unit), first * G + B)
        self.channels: Channels = {
            "G": G, "B": start - lo * unit, "t_first": t_max + first, "t_range": np.where(G == 0, 0, last - first),
        }  # fmt: skip

    def write(self, row: Row, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes."""
        arithmetic, spec, op = self._arithmetic, self._spec, self._arithmetic.writer.op
        t = biased_t(arithmetic, row, self._t_bias)
        v = op("Max", op("Sub", t, channels["t_first"]), arithmetic.constant(0).value)
        a = op("Add", op("Mul", op("Min", v, channels["t_range"]), channels["G"]), channels["B"])
        y = op("Div", a, arithmetic.param("y_unit", 1 << spec.s2).value)
        return t, from_lowest(arithmetic, y)


class _Split:
    """The second product in parts, as few as hold it.

    B has half of an output code added, and in int24 the lowest code taken off: what is negative then is clamped.
    """

    def __init__(self, arithmetic: Bounded, low: Sequence[int]) -> None:
        self._arithmetic, self._spec = arithmetic, arithmetic.spec
        spec, floats = self._spec, arithmetic.floats
        t_max, G = spec.row_stage.t_max(spec.s1), np.array(spec.G, dtype=np.int64)
        constant = np.array(spec.B, dtype=np.int64) + (1 << spec.s2 - 1)
        constant -= 0 if floats else spec.output.lo << spec.s2
        most = int(np.max(t_max * np.abs(G) + np.abs(constant)))
        for shape in shapes(spec.s2, least=2):
            # what keeps t positive in int24; where it is a multiple of 2**bits, B mostly has no low part
            t_bias = 0 if floats else -(-t_max >> shape.bits) << shape.bits
            t_bias = t_bias if holds(spec, t_bias, low) else t_max
            ends = (-t_max if floats else 0, t_max + t_bias)
            products = Products(
                arithmetic, [ends], {"G": G}, constant - t_bias * G, spec.s2, shape, most=most, result="y", clamped=True
            )
            if products.holds:
                break
        else:
            raise arithmetic.too_wide("the products of t and G")
        self._products, self._t_bias = products, t_bias
        self.channels: Channels = products.channels

    def write(self, row: Row, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes."""
        arithmetic, spec, op = self._arithmetic, self._spec, self._arithmetic.writer.op
        t = rounded_t(arithmetic, row) if arithmetic.floats else biased_t(arithmetic, row, self._t_bias)
        y = self._products.write([t], channels)
        if arithmetic.floats:
            return t, clipped(arithmetic, y)
        # the code less the lowest; what is negative is truncated towards 0, and clamped
        most = arithmetic.param("y_range", spec.output.hi - spec.output.lo).value
        return t, from_lowest(arithmetic, op("Min", op("Max", y, arithmetic.constant(0).value), most))


def clipped(arithmetic: Bounded, y: Operand) -> Operand:
    """Return float32 output codes, clamped.

    No QuantizeLinear, which makes OpenVINO's compiler rewrite all that is before it in lower precision.
    """
    ends = (("y_low", arithmetic.spec.output.lo), ("y_high", arithmetic.spec.output.hi))
    return arithmetic.writer.op("Clip", y, *(arithmetic.writer.scalar(arithmetic.param(*end).value) for end in ends))


def from_lowest(arithmetic: Bounded, y: Operand) -> Operand:
    """Return int32 output codes that are counted from the lowest."""
    least = arithmetic.spec.output.lo
    return arithmetic.writer.op("Add", y, arithmetic.param("y_low", least).value) if least else y
