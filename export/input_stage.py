"""The input stage in ONNX: the residual add, accumulators and scales a channel (equations 0 and 31), in 32 or 64 bits.

It stands before the norm's subgraph, which then takes the integers u in int32. Unsigned integers wrap, so that one
addition makes a sum positive, and a shift to the right is then a floor.
"""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..adder import NARROW_BITS, code_ends, code_multipliers, width
from ..quantization import DType, QuantParams
from ..spec import LayerNormSpec
from .graph import constant

Integers = npt.NDArray[np.int64]

#: 2 to this power is beyond the distance of any code of 16 bits from its zero point.
_BEYOND = 17


def append(tape: Tape, spec: LayerNormSpec, operands: list[ir.Value]) -> tuple[ir.Value, ir.Value | None]:
    """Append the input stage of a spec that has an adder.

    Parameters
    ----------
    tape : onnx_ir.tape.Tape
    spec : LayerNormSpec
    operands : list of onnx_ir.Value
        The input codes, and those of the residual where there is one; the normalized dimensions are the last.

    Returns
    -------
    onnx_ir.Value
        The integers u, in int32.
    onnx_ir.Value or None
        The codes of the sum in int32, where it is an output.
    """
    assert spec.adder is not None
    op, shift = tape.op, spec.adder.shift
    bits = 32 if width(spec.operands, spec.lane) == NARROW_BITS else 64
    unsigned = ir.DataType.UINT32 if bits == 32 else ir.DataType.UINT64
    offset = np.full(spec.n, spec.adder.half, dtype=np.int64)
    total: ir.Value | None = None
    multipliers = code_multipliers(spec.n, spec.operands, spec.adder)
    for codes, params, M in zip(operands, spec.operands, multipliers, strict=True):
        offset = offset - params.channel_zeros(spec.n) * M
        product = op("Mul", [op("Cast", [codes], {"to": unsigned}), _channels(tape, M, spec, unsigned)])
        total = product if total is None else op("Add", [total, product])
    assert total is not None
    # the true sum is within the width: what wraps on the way comes back
    total = op("Add", [total, _channels(tape, offset.view(np.uint64) + np.uint64(1 << (bits - 1)), spec, unsigned)])
    if shift:
        total = op("BitShift", [total, constant(tape, unsigned.numpy().type(shift))], {"direction": "RIGHT"})
    u = op("Sub", [total, constant(tape, unsigned.numpy().type(1 << (bits - 1 - shift)))])
    u = op("Cast", [u], {"to": ir.DataType.INT32})
    return u, None if spec.sum_output is None else _sum_codes(tape, spec, u)


def behind(spec: LayerNormSpec) -> LayerNormSpec:
    """Return a spec as its subgraph is behind the input stage, whose codes are the integers u themselves.

    It is no spec to be stored: its widths were proved for the true ends of u, which no type has.
    """
    low, high = code_ends(spec.n, spec.operands, spec.adder)
    bits = max(int(high.max()).bit_length(), int(-1 - low.min()).bit_length()) + 1
    seen = copy.copy(spec)
    params = QuantParams(DType(f"int{max(bits, 17)}"), spec.scale)
    changes = {"row_stage": spec.row_stage, "input": params, "residual": None, "sum_output": None, "adder": None}
    vars(seen).update(changes)
    return seen


def sum_shifts(spec: LayerNormSpec) -> tuple[Integers, Integers, Integers]:
    """Return how far (31) shifts u to the right or to the left in each channel, and what limits u before the latter.

    Shifts that are farther give the same codes: 0, or what is beyond 16 bits and a zero point.
    """
    params, adder = spec.sum_output, spec.adder
    assert params is not None
    assert adder is not None
    assert adder.sum_shift is not None
    low, high = spec.ends
    bits = max(int(high.max()).bit_length(), int(-1 - low.min()).bit_length())
    shifts = adder.sum_shift + np.array(params.channel_exponents(spec.n), dtype=np.int64)
    right, left = np.clip(shifts, 0, bits + 1), np.clip(-shifts, 0, _BEYOND + 1)
    return right, left, ((1 << _BEYOND) >> left) + 1


def _sum_codes(tape: Tape, spec: LayerNormSpec, u: ir.Value) -> ir.Value:
    """Append equation (31): shift u to the right or to the left, in 32 bits, and clamp; the codes are int32."""
    params = spec.sum_output
    assert params is not None
    op, unsigned, signed = tape.op, ir.DataType.UINT32, ir.DataType.INT32
    right, left, most = sum_shifts(spec)
    half = np.left_shift(1, right) >> 1
    value, zeros = u, params.channel_zeros(spec.n)
    if left.any():
        value = op("Max", [value, _channels(tape, -most, spec, signed)])
        value = op("Min", [value, _channels(tape, most, spec, signed)])
        value = op("Mul", [value, _channels(tape, np.left_shift(1, left), spec, signed)])
    if right.any():
        value = op("Add", [op("Cast", [value], {"to": unsigned}), _channels(tape, half + (1 << 31), spec, unsigned)])
        value = op("BitShift", [value, _channels(tape, right, spec, unsigned)], {"direction": "RIGHT"})
        value = op("Cast", [value], {"to": signed})
        zeros = zeros - ((1 << 31) >> right)
    if zeros.any():
        value = op("Add", [value, _channels(tape, zeros, spec, signed)])
    ends = (constant(tape, np.int32(end)) for end in (params.lo, params.hi))
    value = op("Max", [value, next(ends)])
    return op("Min", [value, next(ends)])


def _channels(tape: Tape, values: npt.NDArray[np.generic], spec: LayerNormSpec, dtype: ir.DataType) -> ir.Value:
    """Append a constant with one value a channel, or with one for all where they are the same."""
    wrapped = values.astype(dtype.numpy())
    if (wrapped == wrapped[0]).all():
        return constant(tape, wrapped[0])
    return constant(tape, wrapped.reshape(spec.normalized_shape))
