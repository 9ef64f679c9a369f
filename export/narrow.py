"""The words int24 and float24: no value reaches 2**24, so that integers stay exact where float32 carries them.

int24 holds them in int32, and Div truncates, with no negative dividend; float24 holds them in float32, where Floor
makes a quotient whole. There a quotient of integers below 2**24, rounded correctly, has the floor of the exact one; for
the constant n, whose reciprocal compilers like to multiply by, that is done here, where it is exact. Both are one body.
It follows the bounds of every value, from the spec's own, and raises where one would reach 2**24.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError
from ..proof import NormKind
from ..spec import LayerNormSpec
from .graph import Operand, Writer

INT32, FLOAT = ir.DataType.INT32, ir.DataType.FLOAT

#: Magnitudes stay below this.
LIMIT = 1 << 24
#: V is held in a part of 24 bits and one of 12.
V_BITS, LIMB = 36, 1 << 12
#: Bits of the root, and of a quotient's digits: a remainder below the root, times 2**6, stays below the limit.
ROOT_BITS, DIGIT = 18, 6
#: By the upper 12 of a number's 24 bits: 2**k, where 4**k brings it to [2**22, 2**24).
_TO_TOP = np.array([1 << (24 - max((k << 12).bit_length(), 13)) // 2 for k in range(1 << 12)])
#: Lower bounds of a root, at most 4 too small, by the upper 10 of its argument's 24 bits.
_ROOTS = np.array([max(int(np.sqrt(k << 14)), 1 << 11) for k in range(1 << 10)])


@dataclass(frozen=True)
class Number:
    """A tensor of integers and its proved bounds."""

    value: Operand
    low: int
    high: int


@dataclass(frozen=True)
class Split:
    """The second product in two parts: G = high * 2**bits + low, and B and what is added with it likewise.

    Attributes
    ----------
    bits : int
    t_bias : int
        What is added to t beforehand: 0 in float24; in int24 at least t's bound, and a multiple of 2**bits.
    """

    bits: int
    t_bias: int
    G: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
    B: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

    @classmethod
    def of(cls, spec: LayerNormSpec, *, floats: bool) -> Split | None:
        """Return the split with the fewest bits that no value breaks, None where there is none.

        B has half of an output code added, and in int24 the lowest code taken off.
        """
        t_max, G = spec.row_stage.t_max(spec.s1), np.array(spec.G, dtype=np.int64)
        constant = np.array(spec.B, dtype=np.int64) + (1 << spec.s2 - 1)
        constant -= 0 if floats else spec.output.lo << spec.s2
        a_max = int(np.max(t_max * np.abs(G) + np.abs(constant)))
        for bits in range(1, min(spec.s2, 24)):
            # where t's bias is a multiple of 2**bits, B mostly has no low part
            t_bias = 0 if floats else -(-t_max >> bits) << bits
            t_bias = t_bias if _p_most(spec) + (t_bias << spec.s1) < LIMIT else t_max
            mask, t_most = (1 << bits) - 1, t_max + t_bias
            B = constant - t_bias * G
            low = t_most * int((G & mask).max()) + mask
            high = max(t_most * int(np.abs(G >> bits).max()), int(np.abs(B >> bits).max()), a_max >> bits) + t_most + 2
            if max(low, high) < LIMIT:
                return cls(bits, t_bias, (G & mask, G >> bits), (B & mask, B >> bits))
        return None


def _p_most(spec: LayerNormSpec) -> int:
    """Return a bound of p with half of 2**s1."""
    return int(spec.row_stage.r_max) + spec.row_stage.codes.spread // 2 + 2 + (1 << spec.s1 - 1)


class Body:
    """Writes the subgraph's nodes.

    Parameters
    ----------
    spec : LayerNormSpec
    dtype : onnx_ir.DataType
        INT32 or FLOAT: the word.
    writer : Writer
        What the attributes need is added to its own.
    output : onnx_ir.DataType
        Of the result.

    Raises
    ------
    ModelError
        If the word doesn't hold the spec.
    """

    def __init__(self, spec: LayerNormSpec, dtype: ir.DataType, writer: Writer, output: ir.DataType) -> None:
        self.spec, self.dtype, self.writer, self.output = spec, dtype, writer, output
        self.floats = dtype == FLOAT
        self.word = "float24" if self.floats else "int24"
        split = Split.of(spec, floats=self.floats)
        if split is None:
            raise _too_wide(self.word, "the products of t and G", spec)
        self.split = split
        writer.attributes["split"] = split.bits
        #: The values of docs/arithmetic.md's letters, by these (see `int64.Body.stages`).
        self.stages: dict[str, Operand] = {}

    @property
    def opset(self) -> int:
        """The lowest opset that has the operators: ReduceSum with its axes as an input."""
        return 13

    def channels(self) -> dict[str, npt.NDArray[Any]]:
        """Return the channel inputs of the subgraph."""
        (G_low, G_high), (B_low, B_high) = self.split.G, self.split.B
        dtype = self.dtype.numpy()
        below = 2.0**-self.split.bits if self.floats else 1
        values: dict[str, npt.NDArray[Any]] = {"G_high": G_high, "B_high": B_high}
        if G_low.any() or B_low.any():
            values["G_low"] = G_low * below
        if B_low.any():
            values["B_low"] = B_low * below
        if self.spec.input.exponents is not None:
            values["P"] = np.left_shift(1, np.array(self.spec.input.exponents))
        return {name: value.astype(dtype) for name, value in values.items()}

    def write(self, q: Operand, channels: Mapping[str, Operand]) -> Operand:
        """Append the nodes from the rows' input codes to their output codes, and return the latter."""
        op, spec = self.writer.op, self.spec
        d, R, D = self._row_stage(q, channels)
        # (6) and (7)
        bias = (self.split.t_bias << spec.s1) + (1 << spec.s1 - 1)
        offset = self._sub(self._param("t_offset", bias), D)
        if self.floats:
            below = self._factor("t_unit", 2.0**-spec.s1)
            t = op("Floor", op("Add", op("Mul", d.value, op("Mul", R.value, below)), op("Mul", offset.value, below)))
        else:
            p = op("Add", op("Mul", d.value, R.value), offset.value)
            t = op("Div", p, self._param("t_unit", 1 << spec.s1).value)
        self.stages["t"] = t
        return self._output(t, channels)

    def _output(self, t: Operand, channels: Mapping[str, Operand]) -> Operand:
        """(8) and (9), in units of 2**split.bits."""
        op, spec = self.writer.op, self.spec
        a = op("Add", op("Mul", t, channels["G_high"]), channels["B_high"])
        if "G_low" in channels:
            low = op("Mul", t, channels["G_low"])
            if "B_low" in channels:
                low = op("Add", low, channels["B_low"])
            unit = 1 << self.split.bits
            low = op("Floor", low) if self.floats else op("Div", low, self._param("G_unit", unit).value)
            a = op("Add", a, low)
        unit = 1 << spec.s2 - self.split.bits
        least, most = spec.output.lo, spec.output.hi
        if not self.floats:
            # the code less the lowest; what is negative is truncated towards 0, and clamped
            y = op("Div", a, self._param("y_unit", unit).value)
            y = op("Min", op("Max", y, self._int(0)), self._param("y_range", most - least).value)
            y = op("Add", y, self._param("y_low", least).value) if least else y
            return y if self.output == INT32 else self.writer.cast(y, self.output)
        y = op("Floor", op("Mul", a, self._factor("y_unit", 1.0 / unit)))
        # no QuantizeLinear, which makes OpenVINO's compiler rewrite what is before it in lower precision
        ends = (self.writer.scalar(self._param(name, end).value) for name, end in (("y_low", least), ("y_high", most)))
        y = op("Clip", y, *ends)
        return self.writer.cast(y, self.output)

    def _row_stage(self, q: Operand, channels: Mapping[str, Operand]) -> tuple[Number, Number, Number]:
        """(0) to (5): u - c, R and D."""
        spec, n = self.spec, self.spec.n
        codes = spec.row_stage.codes
        u = self._integers(q, channels)
        self.stages["u"] = u.value
        self._param("n", n)
        if spec.kind is NormKind.RMSNORM:
            R = self._reciprocal_root(self._squares(u, codes.v0_max // n), None)
            return u, R, self._number(0)
        S = self._sum(u)
        shift = max(-u.low, 0) + 1  # of the mean, to keep its dividend positive
        dividend = self._add(S, self._param("mean_offset", n * shift + n // 2))
        c = self._sub(self._over_n(dividend), self._param("mean_shift", shift))
        rest = self._sub(S, self._mul(c, self._param("n", n)))
        rest = Number(rest.value, -(n // 2), n // 2)
        d = self._sub(u, c)
        d = Number(d.value, -codes.spread, codes.spread)
        Q = self._squares(d, codes.v0_max // n + n // 4 + 1)
        R = self._reciprocal_root(Q, rest)
        self.stages |= {"S": S.value, "Q": Q[0].value, "c": c.value}
        D = self.stages["D"] = self._mean_part(R, rest)
        return d, R, Number(D, -(R.high // 2) - 1, R.high // 2 + 1)

    def _integers(self, q: Operand, channels: Mapping[str, Operand]) -> Number:
        """(0), with the zero point where it doesn't drop out."""
        params = self.spec.input
        u = q if isinstance(q, ir.Value) and q.dtype == self.dtype else self.writer.cast(q, self.dtype)
        low, high = params.lo, params.hi
        if params.exponents is not None or self.spec.kind is NormKind.RMSNORM:
            low, high = low - params.zero_point, high - params.zero_point
            if params.zero_point:
                u = self.writer.op("Sub", u, self._param("zero_point", params.zero_point).value)
        if params.exponents is not None:
            u = self.writer.op("Mul", u, channels["P"])
            low, high = low << max(params.exponents), high << max(params.exponents)
        return self._number_of(u, low, high)

    def _sum(self, values: Number) -> Number:
        # MatMul of integers is three times as fast in ONNX Runtime; accelerators, which want int32 borders, lack it
        if self.floats or self.output == INT32:
            total = self.writer.op("ReduceSum", values.value, np.array([-1]), keepdims=1)
        else:
            total = self.writer.op("MatMul", values.value, self.writer.ones(INT32))
        return self._number_of(total, self.spec.n * values.low, self.spec.n * values.high)

    def _squares(self, d: Number, most: int) -> tuple[Number, Number]:
        """Return the sum of squares, at least 1, in a part of 24 bits and one of 12; where all are 0, so is p."""
        square = self._mul(d, d)
        square = Number(square.value, 0, square.high)
        if most < LIMIT:
            total = self._sum(Number(square.value, 0, 0))
            total = Number(self.writer.op("Max", total.value, self._int(1)), 1, most)
            return self._split(total)
        upper, lower = (self._sum(part) for part in self._split(square))
        carry, lower = self._split(lower)
        upper = self._add(Number(upper.value, 0, most // LIMB), carry)
        absent = self.writer.op("Sub", self._int(1), self.writer.op("Min", upper.value, self._int(1)))
        lower = Number(self.writer.op("Max", lower.value, absent), 0, LIMB - 1)
        return Number(upper.value, 0, most // LIMB), lower

    def _reciprocal_root(self, Q: tuple[Number, Number], rest: Number | None) -> Number:
        """(3) and (4), with V0 = n*Q - rest**2: R."""
        V, shifted = self._top_of(self._variance(Q, rest))
        r = self.stages["r"] = self._root(*V).value
        return self._reciprocal(Number(r, 1 << ROOT_BITS - 1, (1 << ROOT_BITS) - 1), shifted)

    def _variance(self, Q: tuple[Number, Number], rest: Number | None) -> tuple[Number, Number]:
        """(3): V in a part of 24 bits and one of 12."""
        spec, n = self.spec, self._param("n", self.spec.n)
        upper, lower = (self._mul(part, n) for part in Q)
        most = spec.row_stage.codes.v0_max
        if rest is not None:
            square = self._mul(rest, rest)
            loan = -(-square.high // LIMB)
            lower = self._add(self._sub(lower, Number(square.value, 0, square.high)), self._param("loan", loan * LIMB))
            lower = Number(lower.value, 0, lower.high)
            upper = self._sub(upper, self._param("loan_parts", loan))
        carry, lower = self._split(lower)
        upper = self._add(upper, carry)
        upper = Number(upper.value, 0, most // LIMB)
        high_eps, low_eps = spec.E // LIMB, spec.E % LIMB
        if spec.h < DIGIT:
            factor = self._param("eps_unit", 4**spec.h)
            lower = self._add(self._mul(lower, factor), self._param("eps_low", low_eps))
            upper = self._add(self._mul(upper, factor), self._param("eps_high", high_eps))
            carry, lower = self._split(lower)
            upper = Number(self.writer.op("Add", upper.value, carry.value), 0, LIMIT - 1)
        else:  # V0 is below 2**24, and E's lower part stays alone
            whole = self._add(self._mul(upper, self._number(LIMB)), lower)
            factor = self._param("eps_unit", 4 ** (spec.h - DIGIT))
            upper = self._mul(Number(whole.value, 0, most), factor)
            upper = self._add(upper, self._param("eps_high", high_eps))
            lower = self._param("eps_low", low_eps)
        self.stages |= {"V.12": upper.value, "V": lower.value}
        return upper, lower

    def _top_of(self, V: tuple[Number, Number]) -> tuple[tuple[Number, Number], Number]:
        """Return V shifted to 35 or 36 bits, that is by 2*j, and 2**j."""
        op, spec = self.writer.op, self.spec
        upper, lower = V
        least = (spec.row_stage.codes.v0_min << 2 * spec.h) + spec.E
        shifted = self._number(1)
        while least < LIMB * LIMB:  # at least the upper 12 bits may be 0
            least = least * LIMB
            present = Number(op("Min", self._split(upper)[0].value, self._int(1)), 0, 1)
            absent = self._sub(self._number(1), present)
            absent = Number(absent.value, 0, 1)
            moved = self._mul(lower, absent)
            factor = self._add(self._mul(absent, self._number(LIMB - 1)), self._number(1))
            upper = self._add(
                Number(op("Mul", upper.value, factor.value), 0, LIMIT - LIMB), Number(moved.value, 0, LIMB - 1)
            )
            lower = self._sub(lower, moved)
            lower = Number(lower.value, 0, LIMB - 1)
            step = self._add(self._mul(absent, self._number((1 << DIGIT) - 1)), self._number(1))
            shifted = self._mul(shifted, step)
        power = Number(self._look_up(_TO_TOP, self._split(upper)[0].value), 1, 32)
        square = Number(op("Mul", power.value, power.value), 1, 1 << 10)
        carry, lower = self._split(self._mul(lower, square))
        upper = Number(op("Add", op("Mul", upper.value, square.value), carry.value), LIMIT >> 2, LIMIT - 1)
        return (upper, lower), Number(op("Mul", shifted.value, power.value), 1, 1 << ROOT_BITS - 1)

    def _root(self, upper: Number, lower: Number) -> Number:
        """The root of upper * 2**12 + lower: a table's, its low bits by one division, and a test of what is left."""
        op = self.writer.op
        index = self._floor(upper, 1 << 14)
        top = Number(self._look_up(_ROOTS, index.value), 1 << 11, LIMB - 1)
        most = 11 * LIMB  # the root is at most 4 above the table's
        left = Number(op("Sub", upper.value, op("Mul", top.value, top.value)), 0, most)
        high, low = self._split(lower, 1 << 7)
        dividend = self._add(self._mul(left, self._number(32)), high)
        digits = self._quotient(dividend, top, 352)  # the low 6 bits, with what the table lacks, or 1 more
        left = Number(op("Sub", dividend.value, op("Mul", digits.value, top.value)), 0, LIMB - 1)
        left = self._add(self._mul(left, self._number(1 << 7)), low)
        left = self._sub(left, self._mul(digits, digits))
        over = Number(self.writer.cast(op("GreaterOrEqual", self._int(-1), left.value), self.dtype), 0, 1)
        root = self._add(self._mul(top, self._number(1 << DIGIT)), digits)
        return self._sub(root, over)

    def _reciprocal(self, r: Number, shifted: Number) -> Number:
        """R: n * 2**(K+h) * `shifted` over r, rounded: long division, with one bit more than R has."""
        op, spec, n = self.writer.op, self.spec, self.spec.n
        most = int(spec.row_stage.r_max) + 1
        bits = spec.K + spec.h + 1
        first = max(min(bits, bits + LIMIT.bit_length() - 1 - (2 * most + 2 << ROOT_BITS).bit_length()), 0)
        digits = -(-(bits - first) // DIGIT)
        first = max(bits - digits * DIGIT, 0)
        dividend = Number(op("Mul", self._param("numerator", n << first).value, shifted.value), 0, LIMIT - 1)
        if 2 * most + 2 << ROOT_BITS > LIMIT << bits - first:
            raise _too_wide(self.word, "the dividend of R", spec)
        quotient = total = self._quotient(dividend, r, (2 * most + 1) >> bits - first)
        for left in range(bits - first, 0, -DIGIT):
            step = min(left, DIGIT)
            rest = Number(op("Sub", dividend.value, op("Mul", quotient.value, r.value)), 0, r.high - 1)
            dividend = self._mul(rest, self._number(1 << step))
            quotient = self._quotient(dividend, r, (1 << step) - 1)
            total = self._add(self._mul(total, self._number(1 << step)), quotient)
            total = Number(total.value, 0, (2 * most + 1) >> left - step)
        R = self._floor(self._add(total, self._number(1)), 2)
        self.stages["R"] = R.value
        return Number(R.value, 0, most)

    def _mean_part(self, R: Number, rest: Number) -> Operand:
        """(5): D, by long division of (rest + n) * R by n."""
        op, n = self.writer.op, self.spec.n
        divisor = self._param("n", n)
        positive = self._add(rest, divisor)
        room = (LIMIT >> 2 if self.floats else LIMIT) - n
        width = (room // (positive.high + n)).bit_length() - 1
        if width < 1:
            raise _too_wide(self.word, "the dividend of D", self.spec)
        parts = [R]
        while parts[0].high >> width:
            parts[:1] = self._split(parts[0], 1 << width)
        left = total = None
        for after in reversed(range(len(parts))):
            part = parts[-1 - after]
            dividend = self._mul(positive, part)
            if left is not None:
                dividend = self._add(self._mul(left, self._number(1 << width)), dividend)
            if not after:
                dividend = self._add(dividend, self._param("n_half", n // 2))
            quotient = self._over_n(dividend)
            left = Number(op("Sub", dividend.value, op("Mul", quotient.value, divisor.value)), 0, n - 1)
            total = quotient if total is None else self._add(self._mul(total, self._number(1 << width)), quotient)
            total = Number(total.value, 0, 3 * (R.high >> width * after) // 2 + 1)
        assert total is not None
        return op("Sub", total.value, R.value)

    def _split(self, number: Number, unit: int = LIMB) -> tuple[Number, Number]:
        """Return the quotient by a power of two and the remainder."""
        op = self.writer.op
        high = self._floor(number, unit)
        low = op("Sub", number.value, op("Mul", high.value, self._int(unit)))
        return high, Number(low, 0, unit - 1)

    def _floor(self, number: Number, unit: int) -> Number:
        """The floor of a quotient by a power of two, of what is not negative."""
        op = self.writer.op
        if self.floats:
            value = op("Floor", op("Mul", number.value, np.array([[1.0 / unit]], dtype=np.float32)))
        else:
            value = op("Div", number.value, self._int(unit))
        return Number(value, number.low // unit, number.high // unit)

    def _quotient(self, dividend: Number, divisor: Number, most: int) -> Number:
        value = self.writer.op("Div", dividend.value, divisor.value)
        return Number(self.writer.op("Floor", value) if self.floats else value, 0, most)

    def _over_n(self, dividend: Number) -> Number:
        """The floor of a quotient by n; in float32 a product with 1/n, exact as the dividend is below 2**22."""
        op, n = self.writer.op, self.spec.n
        if self.floats:
            if dividend.high >= LIMIT >> 2:
                raise _too_wide(self.word, "a dividend of n", self.spec)
            middle = op("Add", dividend.value, np.array([[0.5]], dtype=np.float32))
            value = op("Floor", op("Mul", middle, self._factor("n_reciprocal", 1.0 / n)))
        else:
            value = op("Div", dividend.value, self._param("n", n).value)
        return Number(value, dividend.low // n, dividend.high // n)

    def _look_up(self, table: npt.NDArray[Any], index: Operand) -> Operand:
        index = self.writer.cast(index, INT32) if self.floats else index
        return self.writer.op("Gather", table.astype(self.dtype.numpy()), index)

    def _add(self, a: Number, b: Number) -> Number:
        return self._number_of(self.writer.op("Add", a.value, b.value), a.low + b.low, a.high + b.high)

    def _sub(self, a: Number, b: Number) -> Number:
        return self._number_of(self.writer.op("Sub", a.value, b.value), a.low - b.high, a.high - b.low)

    def _mul(self, a: Number, b: Number) -> Number:
        products = [x * y for x, y in itertools.product((a.low, a.high), (b.low, b.high))]
        return self._number_of(self.writer.op("Mul", a.value, b.value), min(products), max(products))

    def _number_of(self, value: Operand, low: int, high: int) -> Number:
        if max(-low, high) >= LIMIT:
            raise _too_wide(self.word, f"a value of up to {max(-low, high)}", self.spec)
        return Number(value, low, high)

    def _param(self, name: str, value: int) -> Number:
        """Return an integer that follows from the spec: an attribute of the function."""
        self.writer.attributes[name] = value
        return self._number_of(self.writer.attribute(name, self.dtype), value, value)

    def _factor(self, name: str, value: float) -> Operand:
        """Return a float that follows from the spec: an attribute of the function."""
        self.writer.attributes[name] = value
        return self.writer.attribute(name, FLOAT)

    def _number(self, value: int) -> Number:
        return Number(self._int(value), value, value)

    def _int(self, value: int) -> Operand:
        return self.writer.constant(value, self.dtype)


def _too_wide(word: str, what: str, spec: LayerNormSpec) -> ModelError:
    return ModelError(
        f"the word {word} doesn't hold {what} of the spec with n = {spec.n}, {spec.input.dtype} input and a lane of "
        f'{spec.lane} bits: it would reach 2^24; the word int64 does. Plan with hardware="carried24" for {word}'
    )


def check(spec: LayerNormSpec, word: str) -> None:
    """Raise ModelError where a spec is not of the kind that the words of 24 bits hold."""
    codes = spec.row_stage.codes
    v_most = (codes.v0_max << 2 * spec.h) + spec.E
    reasons = {
        f"its lane has {spec.lane} bits, not 24": spec.lane != 24,
        f"its root has {spec.m} bits, not {ROOT_BITS}": spec.m != ROOT_BITS,
        f"its variance takes {v_most.bit_length()} bits, more than {V_BITS}": v_most >> V_BITS,
        "its sums take more than 32 bits": spec.accumulator > 32,
        "it adds a residual, or has accumulators or scales a channel as input": spec.adder is not None,
        "its eps is outside the root": spec.A > 0,
    }
    found = [reason for reason, applies in reasons.items() if applies]
    if found:
        raise ModelError(
            f"the word {word} doesn't hold this spec: {'; '.join(found)}. The word int64 does; for {word}, plan or "
            "calibrate with the hardware carried24, codes of 8 bits and one scale a tensor"
        )
