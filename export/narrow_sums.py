"""The input stage in the words int24 and float24: the residual add, accumulators and scales a channel (0) and (31).

Like `input_stage`, it stands before the norm's subgraph, which then takes the integers u, here in the word's own type.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..adder import code_multipliers
from ..spec import LayerNormSpec
from .bounded import Bounded
from .graph import Operand, Writer
from .input_stage import sum_shifts
from .narrow_products import Channels, Integers, Products, shapes


def append(
    tape: Tape, spec: LayerNormSpec, operands: Sequence[ir.Value], dtype: ir.DataType
) -> tuple[ir.Value, ir.Value | None]:
    """Append the input stage of a spec that has an adder.

    Parameters
    ----------
    tape : onnx_ir.tape.Tape
    spec : LayerNormSpec
    operands : sequence of onnx_ir.Value
        The input codes, and those of the residual where there is one; the normalized dimensions are the last.
    dtype : onnx_ir.DataType
        INT32 or FLOAT: the word.

    Returns
    -------
    onnx_ir.Value
        The integers u, in the word's type.
    onnx_ir.Value or None
        The codes of the sum in that type, where it is an output.

    Raises
    ------
    ModelError
        If the word doesn't hold a product or a sum.
    """
    assert spec.adder is not None
    arithmetic = Bounded(spec, dtype, Writer(tape, {}, inline=True, rank=0))
    writer = arithmetic.writer
    B = np.full(spec.n, spec.adder.half, dtype=np.int64)
    factors = dict[str, Integers]()
    multipliers = code_multipliers(spec.n, spec.operands, spec.adder)
    for name, params, M in zip(("M", "N"), spec.operands, multipliers, strict=False):
        B -= params.channel_zeros(spec.n) * M
        factors[name] = M
    values = [value if value.dtype == dtype else writer.cast(value, dtype) for value in operands]
    ends = [(params.lo, params.hi) for params in spec.operands]
    u = _floor(arithmetic, values, ends, factors, B, spec.adder.shift, "u")
    u = writer.value(u)
    u.type = ir.TensorType(dtype)
    return u, None if spec.sum_output is None else writer.value(_sum_codes(arithmetic, u))


def _sum_codes(arithmetic: Bounded, u: ir.Value) -> Operand:
    """Append equation (31): shift u to the left or to the right, and clamp."""
    spec, op = arithmetic.spec, arithmetic.writer.op
    params = spec.sum_output
    assert params is not None
    right, left, most = sum_shifts(spec)
    low, high = (int(end) for end in (spec.ends[0].min(), spec.ends[1].max()))
    value: Operand = u
    if left.any():
        limits = _constants(arithmetic, {"low": -most, "high": most, "factor": np.left_shift(1, left)})
        value = op("Min", op("Max", value, limits["low"]), limits["high"])
        value = op("Mul", value, limits["factor"])
        high = int((most << left).max())
        low = -high
        arithmetic.bounded(value, low, high)
    shift = int(right.max())
    factors, zeros = np.left_shift(1, shift - right), params.channel_zeros(spec.n)
    B = (zeros << shift) + ((np.left_shift(1, right) >> 1) * factors)
    value = _floor(arithmetic, [value], [(low, high)], {"P": factors}, B, shift, "w")
    if arithmetic.floats:
        ends = (arithmetic.constant(end).value for end in (params.lo, params.hi))
        return op("Clip", value, *ends)
    value = op("Max", value, arithmetic.constant(params.lo).value)
    return op("Min", value, arithmetic.constant(params.hi).value)


def _floor(
    arithmetic: Bounded, values: Sequence[Operand], ends: Sequence[tuple[int, int]], factors: Mapping[str, Integers],
    B: Integers, shift: int, result: str,
) -> Operand:  # fmt: skip
    """Append floor((sum of values * factors + B) / 2**shift) in as few parts as hold it."""
    totals = sum(
        (np.maximum(np.abs(low * M), np.abs(high * M)) for (low, high), M in zip(ends, factors.values(), strict=True)),
        start=np.abs(B),
    )
    for shape in shapes(shift):
        products = Products(arithmetic, ends, factors, B, shift, shape, most=int(totals.max()), result=result)
        if products.holds:
            return products.write(values, _constants(arithmetic, products.channels))
    raise arithmetic.too_wide("the sum of the inputs")


def _constants(arithmetic: Bounded, channels: Channels) -> dict[str, Operand]:
    """Return constants with one value a channel, or with one for all where they are the same."""
    found = dict[str, Operand]()
    for name, values in channels.items():
        typed = values.astype(arithmetic.dtype.numpy())
        found[name] = typed[0] if (typed == typed[0]).all() else typed.reshape(arithmetic.spec.normalized_shape)
    return found
