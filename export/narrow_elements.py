"""The element stage of the words int24 and float24: (6) to (9) of docs/arithmetic.md.

Where the planner found a spec whose products t * G stay below 2**24 for all codes that are not clamped, one product is
enough. In int24 t is clamped before it, to what the output can hold. In float24 the output is clamped: products beyond
2**24 are rounded there, but rounding keeps the order of numbers, and only clamped codes have such products. Else G is
split into two parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..spec import LayerNormSpec
from .bounded import FLOAT, LIMIT, Bounded, Number
from .graph import Operand

Channels = dict[str, npt.NDArray[Any]]


class Elements(Protocol):
    """A way to write the element stage.

    Attributes
    ----------
    channels : dict of str to ndarray
        What it needs one of a channel.
    """

    channels: Channels

    def write(self, d: Number, R: Number, D: Number, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes from u - c, R and D of (5) to t, which may be shifted by constants, and the codes."""
        ...


def elements(arithmetic: Bounded) -> Elements:
    """Return the way with the fewest nodes that holds the arithmetic's spec."""
    spec = arithmetic.spec
    unclamped = max(spec.output.hi + 1, -spec.output.lo) << spec.s2
    one_product = all(abs(G) <= 1 << spec.s2 for G in spec.G)
    if arithmetic.floats:
        # t*G and t*G + B are exact where the code isn't clamped, with one bit more for half of an output code
        offset = max(abs(2 * B + 1) for B in spec.B)
        if one_product and 2 * unclamped <= LIMIT and offset + 2 * unclamped <= 2 * LIMIT:
            return _Rounded(arithmetic)
    elif one_product and (spec.output.hi - spec.output.lo + 1) << spec.s2 <= LIMIT and _clamp_bias(spec) is not None:
        return _Clamped(arithmetic)
    return _Split(arithmetic)


def _clamp_bias(spec: LayerNormSpec) -> int | None:
    """Return what keeps t positive, None where there is no room for it."""
    t_max = spec.row_stage.t_max(spec.s1)
    return t_max if p_most(spec) + (t_max << spec.s1) < LIMIT else None


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

    def write(self, d: Number, R: Number, D: Number, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes."""
        op = self._arithmetic.writer.op
        t = rounded_t(self._arithmetic, d, R, D)
        y = op("Round", op("Add", op("Mul", t, channels["G"]), channels["B"]))
        return t, clipped(self._arithmetic, y)


class _Clamped:
    """int24 with one product: t is clamped to what the output can hold, and counted from there."""

    def __init__(self, arithmetic: Bounded) -> None:
        self._arithmetic, self._spec = arithmetic, arithmetic.spec
        spec, unit = self._spec, 1 << self._spec.s2
        t_bias = _clamp_bias(spec)
        assert t_bias is not None
        self._t_bias, t_max = t_bias, spec.row_stage.t_max(spec.s1)
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
            "G": G, "B": start - lo * unit, "t_first": t_bias + first, "t_range": np.where(G == 0, 0, last - first),
        }  # fmt: skip

    def write(self, d: Number, R: Number, D: Number, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes."""
        arithmetic, spec, op = self._arithmetic, self._spec, self._arithmetic.writer.op
        t = biased_t(arithmetic, d, R, D, self._t_bias)
        v = op("Max", op("Sub", t, channels["t_first"]), arithmetic.constant(0).value)
        a = op("Add", op("Mul", op("Min", v, channels["t_range"]), channels["G"]), channels["B"])
        y = op("Div", a, arithmetic.param("y_unit", 1 << spec.s2).value)
        return t, from_lowest(arithmetic, y)


class _Split:
    """The second product in two parts: G = high * 2**bits + low, and B and what is added with it likewise.

    B has half of an output code added, and in int24 the lowest code taken off.
    """

    def __init__(self, arithmetic: Bounded) -> None:
        self._arithmetic, self._spec = arithmetic, arithmetic.spec
        spec, floats = self._spec, arithmetic.floats
        t_max, G = spec.row_stage.t_max(spec.s1), np.array(spec.G, dtype=np.int64)
        constant = np.array(spec.B, dtype=np.int64) + (1 << spec.s2 - 1)
        constant -= 0 if floats else spec.output.lo << spec.s2
        a_max = int(np.max(t_max * np.abs(G) + np.abs(constant)))
        for bits in range(1, min(spec.s2, 24)):
            # what keeps t positive in int24; where it is a multiple of 2**bits, B mostly has no low part
            t_bias = 0 if floats else -(-t_max >> bits) << bits
            t_bias = t_bias if p_most(spec) + (t_bias << spec.s1) < LIMIT else t_max
            mask, t_most = (1 << bits) - 1, t_max + t_bias
            B = constant - t_bias * G
            low = t_most * int((G & mask).max()) + mask
            high = max(t_most * int(np.abs(G >> bits).max()), int(np.abs(B >> bits).max()), a_max >> bits) + t_most + 2
            if max(low, high) < LIMIT:
                break
        else:
            raise arithmetic.too_wide("the products of t and G")
        self._bits, self._t_bias = bits, t_bias
        below = 2.0**-bits if floats else 1
        self.channels: Channels = {"G_high": G >> bits, "B_high": B >> bits}
        if (G & mask).any() or (B & mask).any():
            self.channels["G_low"] = (G & mask) * below
        if (B & mask).any():
            self.channels["B_low"] = (B & mask) * below

    def write(self, d: Number, R: Number, D: Number, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """Append the nodes, in units of 2**bits."""
        arithmetic, spec, op = self._arithmetic, self._spec, self._arithmetic.writer.op
        t = rounded_t(arithmetic, d, R, D) if arithmetic.floats else biased_t(arithmetic, d, R, D, self._t_bias)
        a = op("Add", op("Mul", t, channels["G_high"]), channels["B_high"])
        if "G_low" in channels:
            low = op("Mul", t, channels["G_low"])
            if "B_low" in channels:
                low = op("Add", low, channels["B_low"])
            if arithmetic.floats:
                low = op("Floor", low)
            else:
                low = op("Div", low, arithmetic.param("G_unit", 1 << self._bits).value)
            a = op("Add", a, low)
        unit = 1 << spec.s2 - self._bits
        if arithmetic.floats:
            return t, clipped(arithmetic, op("Floor", op("Mul", a, arithmetic.factor("y_unit", 1.0 / unit))))
        # the code less the lowest; what is negative is truncated towards 0, and clamped
        y = op("Div", a, arithmetic.param("y_unit", unit).value)
        most = arithmetic.param("y_range", spec.output.hi - spec.output.lo).value
        return t, from_lowest(arithmetic, op("Min", op("Max", y, arithmetic.constant(0).value), most))


def p_most(spec: LayerNormSpec) -> int:
    """Return a bound of p with half of 2**s1."""
    return int(spec.row_stage.r_max) + spec.row_stage.codes.spread // 2 + 2 + (1 << spec.s1 - 1)


def rounded_t(arithmetic: Bounded, d: Number, R: Number, D: Number) -> Operand:
    """Return t in float32: p and half of its smallest unit, so that there are no ties, over 2**s1 and rounded."""
    op = arithmetic.writer.op
    below = arithmetic.factor("t_unit", 2.0**-arithmetic.spec.s1)
    offset = op("Mul", op("Sub", arithmetic.writer.constant(0.5, FLOAT), D.value), below)
    return op("Round", op("Add", op("Mul", d.value, op("Mul", R.value, below)), offset))


def biased_t(arithmetic: Bounded, d: Number, R: Number, D: Number, bias: int) -> Operand:
    """Return t + bias in int32, where the bias makes it positive."""
    op, s1 = arithmetic.writer.op, arithmetic.spec.s1
    offset = arithmetic.sub(arithmetic.param("t_offset", (bias << s1) + (1 << s1 - 1)), D)
    p = op("Add", op("Mul", d.value, R.value), offset.value)
    return op("Div", p, arithmetic.param("t_unit", 1 << s1).value)


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
