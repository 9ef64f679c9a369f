"""The word int64: the row stage in int64, sums and elements in unsigned integers of 32 or 64 bits.

Unsigned integers wrap, in ONNX too, so that one addition makes a number in two's complement positive, and a shift to
the right is then a floor. Only what ONNX Runtime and ONNX's reference compute exactly is used: Div truncates, and
gets no negative dividend; Max, Min and Clip of 64 bits are avoided (microsoft/onnxruntime#25280); sums are MatMul,
as ONNX Runtime's ReduceSum goes through float64 beyond 2**53, keeps the shape of a tensor without rows, and takes three
to five times as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from .. import proof
from ..errors import ModelError
from ..proof import NormKind
from ..spec import LayerNormSpec
from .graph import Operand, Writer

INT32, INT64, FLOAT = ir.DataType.INT32, ir.DataType.INT64, ir.DataType.FLOAT
UINT32, UINT64 = ir.DataType.UINT32, ir.DataType.UINT64

#: How many powers of 4 a number of 62 bits may reach.
_FOURS = 31
#: Upper bounds of a square root by its argument's top 10 bits, with 11 fraction bits.
_ROOT_SEEDS = np.array([int(np.ceil(np.sqrt(k + 1) * 2**11)) for k in range(1024)], dtype=np.int64)
#: The longest root for which one step of Heron's method is enough.
_ONE_STEP = 18
#: Added to a mean before its division by n, to keep the dividend positive; beyond any code.
_MEAN_BIAS = 1 << 32
#: Where all u are up to 2**16 and n is below 2**15, S*R/n is below 2**47 in lanes of up to 32 bits, and n*2**48 fits.
_WHOLE_MEAN, _LONGEST = 1 << 16, 1 << 15
_PRODUCT_BITS = 47
#: Channels whose exponents agree in all but their last two bits are summed together, so that sums fit 32 bits.
_GROUP = 4


@dataclass(frozen=True)
class Layout:
    """What decides the nodes of the subgraph, beyond its attributes.

    Attributes
    ----------
    kind : NormKind
    lane : onnx_ir.DataType
        Type of the element stage up to t.
    sums : onnx_ir.DataType
        Type of the second product and its sum.
    codes : onnx_ir.DataType
        Type of the input's integers u and of their sum.
    squares : onnx_ir.DataType
        Type of the sum of squares.
    groups : int
        How many weighted sums of the squares of q - z there are, 0 where one sum is enough without weights.
    steps : int
        Steps of Heron's method.
    short_mean : bool
        Whether int64 holds S*R.
    requantized : bool
        Whether the output codes are those of a QuantizeLinear by a power of two; elements are then int32.
    """

    kind: NormKind
    lane: ir.DataType
    sums: ir.DataType
    codes: ir.DataType
    squares: ir.DataType
    groups: int
    steps: int
    short_mean: bool
    requantized: bool

    @classmethod
    def of(cls, spec: LayerNormSpec, output: ir.DataType) -> Layout:
        """Return the layout of a spec and the type of its result; raises ModelError if the word doesn't hold it."""
        if spec.m < 16:
            raise ModelError(f"the word int64 needs a root of at least 16 bits; the spec has m = {spec.m}")
        exponents, zeros = np.array(spec.input.channel_exponents(spec.n)), _zeros(spec)
        largest = max(spec.input.hi - int(zeros.min()), int(zeros.max()) - spec.input.lo)
        if (
            spec.input.exponents is None and (zeros == spec.input.channel_zeros(spec.n)).all()
        ):  # the codes' bounds may be narrower than their type's
            largest = min(largest, spec.row_stage.codes.largest)
        narrow = spec.lane < 64 and largest < 1 << 16 and (spec.n * largest) << int(exponents.max()) < 1 << 31
        squares = int((4**exponents).sum()) * largest**2
        whole = narrow and squares < 1 << 32
        grouped = narrow and not whole and spec.n * largest**2 << 2 * (_GROUP - 1) < 1 << 32
        groups = int(exponents.max()) // _GROUP + 1 if grouped else int(narrow and not whole and exponents.any())
        u_max = largest << int(exponents.max())
        requantized = narrow and squares < 1 << 31 and _is_requantized(spec, output, u_max)
        words = INT32 if requantized else UINT32
        return cls(
            kind=spec.kind,
            lane=UINT64 if spec.lane == 64 else words,
            sums=UINT64 if spec.lane == 64 or spec.accumulator > 32 else words,
            codes=words if narrow else UINT64,
            squares=words if whole or grouped else UINT64,
            groups=groups,
            steps=1 if spec.m <= _ONE_STEP else 2,
            short_mean=spec.lane < 64 and u_max <= _WHOLE_MEAN and spec.n < _LONGEST,
            requantized=requantized,
        )


def _is_requantized(spec: LayerNormSpec, output: ir.DataType, u_max: int) -> bool:
    """Return whether a QuantizeLinear gives the codes exactly, and no int32 before it wraps.

    It takes 2*a + 1, which has no ties, in float32: exact up to 2**24, which is past the ends of the codes; beyond it
    rounding keeps the order of numbers, and all are clamped.
    """
    lo, hi, t_most = spec.output.lo, spec.output.hi, 2 * spec.row_stage.t_max(spec.s1) + 1
    limits = np.iinfo(output.numpy())
    if output.itemsize > 1 or (lo, hi) != (limits.min, limits.max) or max(hi + 1, -lo) << spec.s2 + 1 > 1 << 24:
        return False
    p_most = u_max * int(spec.row_stage.r_max) + (t_most << spec.s1)
    a_most = 2 * max(t_most * abs(G) + abs(B) + 1 for G, B in zip(spec.G, spec.B, strict=True))
    return max(p_most, a_most) < 1 << 31


def _zeros(spec: LayerNormSpec) -> npt.NDArray[np.int64]:
    """Return what is taken off each channel's codes: in LayerNorm one zero point without exponents drops out."""
    return spec.input.channel_zeros(spec.n) if _is_centred(spec) else np.zeros(spec.n, dtype=np.int64)


def _is_centred(spec: LayerNormSpec) -> bool:
    return spec.kind is NormKind.RMSNORM or spec.input.channels is not None


def reached_fours(spec: LayerNormSpec) -> tuple[int, int]:
    """Return how many powers of 4 V reaches at least where V0 isn't 0, and at most."""
    codes = spec.row_stage.codes
    least, most = ((v0 << 2 * spec.h) + spec.E for v0 in (codes.v0_min, codes.v0_max))
    return (least.bit_length() + 1) // 2, (most.bit_length() + 1) // 2


class Body:
    """Writes the subgraph's nodes.

    Parameters
    ----------
    spec : LayerNormSpec
    writer : Writer
    output : onnx_ir.DataType
        Of the result.
    opset : int

    Raises
    ------
    ModelError
        If the word doesn't hold the spec.
    """

    def __init__(self, spec: LayerNormSpec, writer: Writer, output: ir.DataType, opset: int) -> None:
        self.spec, self.writer, self.output, self._opset = spec, writer, output, opset
        self.layout = Layout.of(spec, output)
        if spec.lane == 64:
            writer.attributes["cut"] = proof.reciprocal_bits(spec.n)
        #: How many powers of 4 V reaches, at least and at most.
        self.fours = reached_fours(spec) if writer.inline else (0, _FOURS)
        #: The values of docs/arithmetic.md's letters, by these, for whoever must find the stage that a consumer gets
        #: wrong. Of a value in parts, "V.12" is the part that counts 2**12 fold. They may be shifted by a constant.
        self.stages: dict[str, Operand] = {}

    @property
    def opset(self) -> int:
        """The lowest opset that has the operators: Clip of integers."""
        return 12

    def channels(self) -> dict[str, npt.NDArray[Any]]:
        """Return the channel inputs: G and B; zero points Z; with exponents P = 2**e and the weights W of squares."""
        spec = self.spec
        lane = np.int64 if self.layout.sums == UINT64 else np.int32
        values: dict[str, npt.NDArray[Any]] = {"G": np.array(spec.G, dtype=lane), "B": np.array(spec.B, dtype=lane)}
        if spec.A:
            values |= self._outer_epsilon()
        if isinstance(spec.input.zero_point, tuple):
            values["Z"] = spec.input.channel_zeros(spec.n).astype(self.layout.codes.numpy())
        if spec.input.exponents is not None:
            exponents = np.array(spec.input.channel_exponents(spec.n), dtype=np.int64)
            values["P"] = np.left_shift(1, exponents).astype(self.layout.codes.numpy())
            for group in range(self.layout.groups):
                own = (exponents // _GROUP == group) | (self.layout.groups == 1)
                weights = np.where(own, 4 ** np.maximum(exponents - group * _GROUP, 0), 0)
                values[f"W{group}"] = weights[:, None].astype(self.layout.squares.numpy())
        return values

    def _outer_epsilon(self) -> dict[str, npt.NDArray[np.int64]]:
        """Return what the root of V is divided by, what is added, and the exponent k, by the powers of 4 in V."""
        spec = self.spec
        divisors, added, exponents = [], [], []
        for half_bits in range(self.fours[0], self.fours[1] + 1):
            j = spec.m - half_bits
            k = min(j, spec.l)
            divisors.append(1 << min(j - k, 62))  # r has 31 bits at most
            added.append(spec.A >> (spec.l - k))
            exponents.append(k)
        return {"r_divisor": np.array(divisors), "A": np.array(added), "k": np.array(exponents)}

    def write(self, q: Operand, channels: Mapping[str, Operand]) -> Operand:
        """Append the nodes from the rows' input codes to their output codes, and return the latter."""
        w, op, lane = self.writer, self.writer.op, self.layout.lane
        v = w.cast(q, self.layout.codes)
        if _is_centred(self.spec):
            v = self._centre(v, channels)
        u = op("Mul", v, channels["P"]) if "P" in channels else v  # (0)
        S, Q = self._sums(u, v, channels)
        self.stages |= {"u": u, "Q": Q} if S is Q else {"u": u, "S": S, "Q": Q}
        R, mean = self._row_stage(S, Q, channels)
        u = u if lane == self.layout.codes else w.cast(u, lane)
        # (6) and (7): p, with half of 2^s1 and made positive, from two numbers that may wrap where they are unsigned
        if self.layout.requantized:
            w.attributes["t_bias"] = self.spec.row_stage.t_max(self.spec.s1) + 1
            t_bias = w.attribute("t_bias", lane)
        else:
            t_bias = w.power(op("Sub", w.constant(8 * lane.itemsize - 1), w.attribute("s1")), lane)
        offset = op("Add", self._half("s1", lane), op("Mul", t_bias, w.power(w.attribute("s1"), lane)))
        if mean is not None:
            offset = op("Sub", offset, mean)
        t = self._shifted(op("Add", op("Mul", u, R), offset), "s1")
        self.stages["t"] = t
        return self._requantized(t, t_bias, channels) if self.layout.requantized else self._output(t, t_bias, channels)

    def _shifted(self, value: Operand, shift: str) -> Operand:
        """Return the floor of what is not negative over 2**shift."""
        w = self.writer
        if self.layout.requantized:
            return w.op("Div", value, w.power(w.attribute(shift), INT32))
        return w.op("BitShift", value, w.attribute(shift, self.layout.lane), direction="RIGHT")

    def _requantized(self, t: Operand, t_bias: Operand, channels: Mapping[str, Operand]) -> Operand:
        """(8) and (9) by QuantizeLinear, of a t that is t_bias too large."""
        w, op = self.writer, self.writer.op
        G, B = (op("Add", channels[name], channels[name]) for name in "GB")
        constant = op("Sub", op("Add", B, w.constant(1, INT32)), op("Mul", t_bias, G))
        a = w.cast(op("Add", op("Mul", t, G), constant), FLOAT)
        scale = w.scalar(w.cast(w.power(op("Add", w.attribute("s2"), w.constant(1))), FLOAT))
        return op("QuantizeLinear", a, scale, np.zeros((), dtype=self.output.numpy()))

    def _output(self, t: Operand, t_bias: Operand, channels: Mapping[str, Operand]) -> Operand:
        """(8) and (9), of a t that is t_bias too large."""
        w, op, sums = self.writer, self.writer.op, self.layout.sums
        t, t_bias = (value if sums == self.layout.lane else w.cast(value, sums) for value in (t, t_bias))
        # a is made positive in its turn, and then y is too large by 2**above
        highest = 8 * int(sums.itemsize) - 1
        above = op("Min", w.constant(31), op("Sub", w.constant(highest), w.attribute("s2")))
        G, B = (w.cast(channels[name], sums) for name in "GB")
        constant = op("Add", self._half("s2", sums), w.power(op("Add", above, w.attribute("s2")), sums))
        constant = op("Sub", constant, op("Mul", t_bias, G))
        a = op("Add", op("Mul", t, G), op("Add", B, constant))
        y = op("BitShift", a, w.attribute("s2", sums), direction="RIGHT")
        y = y if sums == UINT32 else w.cast(y, UINT32)
        ends = (op("Add", w.attribute(name), w.power(above)) for name in ("y_low", "y_high"))
        y = op("Clip", y, *(w.scalar(w.cast(end, UINT32)) for end in ends))
        if min(31, highest - self.spec.s2) < 8 * self.output.itemsize:
            y = w.cast(op("Sub", y, w.power(above, UINT32)), INT32)
        # else 2**above is a multiple of what the type holds: the low bits are the code
        return w.cast(y, self.output)

    def _centre(self, v: Operand, channels: Mapping[str, Operand]) -> Operand:
        if "Z" in channels:
            return self.writer.op("Sub", v, channels["Z"])
        zero = self.writer.attribute("zero_point", self.layout.codes)
        known = isinstance(zero, np.ndarray) and not zero.any()
        return v if known else self.writer.op("Sub", v, zero)

    def _half(self, shift: str, dtype: ir.DataType) -> Operand:
        """Return half of what a shift takes for one."""
        w = self.writer
        return w.power(w.op("Sub", w.attribute(shift), w.constant(1)), dtype)

    def _sums(self, u: Operand, v: Operand, channels: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """(1) and (2) in int64."""
        w, op, layout = self.writer, self.writer.op, self.layout
        Q: Operand
        if layout.groups or layout.squares != layout.codes:
            squares = op("Mul", v, v)
            squares = squares if layout.squares == layout.codes else w.cast(squares, layout.squares)
            weights = [channels[f"W{group}"] for group in range(layout.groups)] or [w.ones(layout.squares)]
            # one MatMul a group is faster than one of several columns in ONNX Runtime
            Q, *others = (w.cast(op("MatMul", squares, column), INT64) for column in weights)
            for group, part in enumerate(others, 1):
                Q = op("Add", Q, op("Mul", part, w.constant(4 ** (_GROUP * group))))
        else:
            Q = w.cast(self._sum_of_squares(u), INT64)
        if layout.kind is NormKind.RMSNORM:
            return Q, Q  # there is no mean, and the sum is not used
        S = op("MatMul", u, w.ones(layout.codes))
        S = w.cast(S, INT32) if layout.codes == UINT32 else S  # as a signed number
        return w.cast(S, INT64), Q

    def _sum_of_squares(self, u: Operand) -> Operand:
        """Return each row times itself, without a tensor of squares where Unsqueeze has its axes as an input."""
        w, op = self.writer, self.writer.op
        if self._opset < 13:
            return op("MatMul", op("Mul", u, u), w.ones(self.layout.codes))
        axes = [np.array([axis], dtype=np.int64) for axis in (-2, -1)]
        row, column = (op("Unsqueeze", u, axis) for axis in axes)
        return op("Squeeze", op("MatMul", row, column), axes[-1])

    def _row_stage(self, S: Operand, Q: Operand, tables: Mapping[str, Operand]) -> tuple[Operand, Operand | None]:
        """(3) to (5): R, and c*R + D where there is a mean, in the type of the elements."""
        w, op, lane = self.writer, self.writer.op, self.layout.lane
        n = w.attribute("n")
        centred = self.layout.kind is NormKind.LAYERNORM
        V0 = op("Mul", Q, n)  # (3)
        if centred:
            V0 = op("Sub", V0, op("Mul", S, S))
        V = op("Add", op("Mul", V0, w.power(op("Add", w.attribute("h"), w.attribute("h")))), w.attribute("E"))
        r, R = self.reciprocal_root(V, tables)
        R = op("Where", w.cast(V0, ir.DataType.BOOL), R, w.constant(0))
        self.stages |= {"V": V, "r": r, "R": R}
        if not centred:
            return w.cast(R, lane), None
        half = op("Div", n, w.constant(2))
        if self.layout.short_mean:
            # (5) for c = 0, with a multiple of 2^lane that keeps the dividend positive
            dividend = op("Add", op("Mul", S, R), op("Add", op("Mul", n, w.constant(1 << _PRODUCT_BITS)), half))
            D = self.stages["D"] = op("Div", dividend, n)
            return w.cast(R, lane), w.cast(D, lane)
        # (5) with d in [0, n): c*R + D is the same for every c
        bias = w.constant(_MEAN_BIAS)
        dividend = op("Add", S, op("Mul", n, bias))
        above = op("Div", dividend, n)
        d = op("Sub", dividend, op("Mul", above, n))
        D = op("Div", op("Add", op("Mul", d, R), half), n)
        c = op("Sub", above, bias)
        self.stages |= {"c": c, "D": D}
        if lane != UINT64:  # c*R fits 63 bits
            return w.cast(R, lane), w.cast(op("Add", op("Mul", c, R), D), lane)
        R, c, D = (w.cast(value, lane) for value in (R, c, D))
        return R, op("Add", op("Mul", c, R), D)

    def reciprocal_root(self, V: Operand, tables: Mapping[str, Operand]) -> tuple[Operand, Operand]:
        """(4) for V > 0: r and R; for V = 0 they are of no meaning, but no operator fails."""
        w, op = self.writer, self.writer.op
        # ceil(b/2) is the number of powers of 4 that V reaches; what depends on it alone is looked up
        first, last = self.fours
        reached = w.cast(op("GreaterOrEqual", V, 4 ** np.arange(first, last)[None]), INT64)
        index = op("MatMul", reached, np.ones((last - first, 1), dtype=np.int64))
        j = op("Sub", w.attribute("m"), np.arange(first, last + 1))
        r = self._root(V, index)
        if self.spec.A:
            r = op("Add", op("Div", r, self._look_up(tables["r_divisor"], index)), self._look_up(tables["A"], index))
            # a root of m+1 bits is halved, and the second half of the tables has the exponents that go with it
            over = w.cast(op("GreaterOrEqual", r, w.power(w.attribute("m"))), INT64)
            r = op("Div", r, op("Add", over, w.constant(1)))
            index = op("Add", index, op("Mul", over, w.constant(last - first + 1)))
            j = op("Concat", tables["k"], op("Sub", tables["k"], np.ones(1, dtype=np.int64)), axis=0)
        x = op("Add", op("Add", j, w.attribute("K")), w.attribute("h"))
        y = None
        if self.spec.lane == 64:
            shortened = op("Min", x, w.attribute("cut"))
            x, y = shortened, w.power(op("Sub", x, shortened))
        numerators = op("Mul", w.attribute("n"), w.power(x))
        R = op("Div", op("Add", self._look_up(numerators, index), op("Div", r, w.constant(2))), r)
        if y is not None:
            R = op("Mul", R, self._look_up(y, index))
        return r, R

    def _root(self, V: Operand, half_bits: Operand) -> Operand:
        """The integer square root of V shifted into 2m bits: an upper bound, Heron's method, a correction.

        The seed is at most 2**-9 too large, in proportion; the steps leave 2**-19 and 2**-39, less than one unit of
        18 and 31 bits; and from an upper bound, Heron's method on integers never falls below the root.
        """
        w, op, two, m = self.writer, self.writer.op, self.writer.constant(2), self.writer.attribute("m")
        # to the left until the lowest of these powers is the highest, which no int64 loses, and back by a constant
        first, last = self.fours
        highest = max(last, self.spec.m)
        shifted = op("Mul", V, self._look_up(4 ** (highest - np.arange(first, last + 1)), half_bits))
        back = w.power(op("Mul", op("Sub", w.constant(highest), m), two))
        if isinstance(back, ir.Value) or back > 1:
            shifted = op("Div", shifted, back)
        top = op("Div", shifted, w.power(op("Sub", op("Mul", m, two), w.constant(10))))
        r = self._look_up(op("Mul", _ROOT_SEEDS, w.power(op("Sub", m, w.constant(16)))), top)
        for _ in range(self.layout.steps):
            r = op("Div", op("Add", r, op("Div", shifted, r)), two)
        return op("Sub", r, w.cast(op("Greater", op("Mul", r, r), shifted), INT64))

    def _look_up(self, table: Operand, index: Operand) -> Operand:
        return self.writer.op("Gather", self.writer.op("Reshape", table, np.array([-1])), index)
