"""The normalized value t of the words int24 and float24: (6) and (7) of docs/arithmetic.md.

(u - c) * R takes one product in a lane of 24 bits. Of a wider one R comes in parts, of which only the upper one gives
a product that grows with the lane: the lower parts are as wide as u leaves room for, and each takes a product and the
floor of a quotient, as floor((x * 2**k + y) / 2**s) = floor((x + floor(y / 2**k)) / 2**(s - k)).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..proof import NormKind
from ..spec import LayerNormSpec
from .bounded import FLOAT, LIMIT, Bounded, Number
from .graph import Operand
from .narrow_rows import Row


def p_most(spec: LayerNormSpec) -> int:
    """Return a bound of p with half of 2**s1."""
    return int(spec.row_stage.r_max) + spec.row_stage.codes.spread // 2 + 2 + (1 << spec.s1 - 1)


def holds(spec: LayerNormSpec, t_bias: int, low: Sequence[int], *, halves: bool = False) -> bool:
    """Whether p stays below the limit, in units of the low parts of R, with what is added to t before.

    With halves of a unit, as float32 has them where half of one is added, it stays below half of the limit.
    """
    p = p_most(spec) + (t_bias << spec.s1)
    # what the low parts add comes last, and is not above u
    return (p >> sum(low)) + (_widest_u(spec) if low else 0) << halves < LIMIT


def low_bits(arithmetic: Bounded) -> tuple[int, ...]:
    """Return the bits of the low parts of R, the lowest first; none where one product is enough.

    Raises
    ------
    ModelError
        If no parts of R are short enough.
    """
    spec, floats = arithmetic.spec, arithmetic.floats
    t_bias = 0 if floats else spec.row_stage.t_max(spec.s1)
    if spec.lane == 24 or holds(spec, t_bias, (), halves=floats):  # a lane of 24 bits has p below half of the limit
        return ()
    total = next((bits for bits in range(1, spec.s1) if holds(spec, t_bias, (bits,), halves=floats)), 0)
    widest = ((LIMIT - 1) // _widest_u(spec) - 1).bit_length() - 1
    if not total or widest < 1:
        raise arithmetic.too_wide("the products of u and R")
    count = -(-total // widest)
    return tuple((total + index) // count for index in range(count))


def _widest_u(spec: LayerNormSpec) -> int:
    """Return a bound of u less the lowest of all, with room for what is added to its products."""
    codes = spec.row_stage.codes
    return (codes.spread if spec.kind is NormKind.LAYERNORM else 2 * codes.largest) + 8


def rounded_t(arithmetic: Bounded, row: Row) -> Operand:
    """Return t in float32: p and half of its smallest unit, so that there are no ties, over 2**s1 and rounded."""
    op = arithmetic.writer.op
    carry: Operand | None = None
    for R, D, bits in zip(row.R.low, row.D.low, row.R.bits, strict=True):
        unit = arithmetic.writer.constant(2.0**-bits, FLOAT)
        low = op("Sub", op("Mul", row.d.value, op("Mul", R.value, unit)), op("Mul", D.value, unit))
        carry = op("Floor", low if carry is None else op("Add", low, op("Mul", carry, unit)))
    below = arithmetic.factor("t_unit", 2.0 ** (sum(row.R.bits) - arithmetic.spec.s1))
    offset = op("Mul", op("Sub", arithmetic.writer.constant(0.5, FLOAT), row.D.top.value), below)
    p = op("Add", op("Mul", row.d.value, op("Mul", row.R.top.value, below)), offset)
    return op("Round", p if carry is None else op("Add", p, op("Mul", carry, below)))


def biased_t(arithmetic: Bounded, row: Row, bias: int) -> Operand:
    """Return t + bias in int32, where the bias makes it positive."""
    op, s1 = arithmetic.writer.op, arithmetic.spec.s1 - sum(row.R.bits)
    offset = arithmetic.sub(arithmetic.param("t_offset", (bias << s1) + (1 << s1 - 1)), row.D.top)
    carry: Operand | None = None
    if row.R.low:
        carry, taken = _carry(arithmetic, row)
        offset = arithmetic.sub(offset, taken)
    p = op("Add", op("Mul", row.d.value, row.R.top.value), offset.value)
    p = p if carry is None else op("Add", p, carry)
    return op("Div", p, arithmetic.param("t_unit", 1 << s1).value)


def _carry(arithmetic: Bounded, row: Row) -> tuple[Operand, Number]:
    """Return what the low parts of R add to the upper one's product, less what is to be taken off it again, a row.

    With w the lowest u of all rows, (u - c) * R - D is (u - w) * R, which is not negative, less (c - w) * R + D. The
    latter, one number a row, leaves what is to be taken off.
    """
    lowest = arithmetic.constant(row.u.low)
    u, c = arithmetic.sub(row.u, lowest), arithmetic.sub(row.c, lowest)
    carry = taken = arithmetic.constant(0)
    for R, D, bits in zip(row.R.low, row.D.low, row.R.bits, strict=True):
        unit = 1 << bits
        off = arithmetic.add(arithmetic.add(arithmetic.mul(c, R), D), taken)
        shift = -(off.low // unit)  # keeps the dividend positive
        high, low = arithmetic.split(arithmetic.add(off, arithmetic.constant(shift * unit)), unit)
        taken = arithmetic.sub(high, arithmetic.constant(shift - 1))
        total = arithmetic.add(arithmetic.mul(u, R), arithmetic.sub(arithmetic.constant(unit), low))
        total = total if carry.high == 0 else arithmetic.add(total, carry)
        carry = arithmetic.floor(total, unit)
    return carry.value, taken
