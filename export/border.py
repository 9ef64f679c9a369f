"""The float border of a norm in a model: real values to codes and back (section 8 of docs/arithmetic.md)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..axes import row_shape
from ..quantization import QuantParams
from ..spec import LayerNormSpec
from .graph import constant
from .subgraph import Writing


def quantize(tape: Tape, x: ir.Value, spec: LayerNormSpec, params: QuantParams, writing: Writing) -> ir.Value:
    """Append ``clamp(round(x / 2**e / scale) + zero_point)``, as `QuantParams.quantize` computes it in float32."""
    codes, shape = _quantized(tape, x, spec, params, writing), x.shape
    codes.type, codes.shape = ir.TensorType(writing.codes(params)), shape
    return codes


def _quantized(tape: Tape, x: ir.Value, spec: LayerNormSpec, params: QuantParams, writing: Writing) -> ir.Value:
    op = tape.op
    if x.dtype != ir.DataType.FLOAT:
        x = op("Cast", [x], {"to": ir.DataType.FLOAT})
    if params.exponents is not None:
        x = op("Mul", [x, constant(tape, _powers(spec, params, -1))])
    if params.channel_scales is not None:
        x = op("Div", [x, constant(tape, _scales(spec, params))])
    dtype, scale = params.dtype.numpy, constant(tape, _shared_scale(params))
    whole = (params.lo, params.hi) == (np.iinfo(dtype).min, np.iinfo(dtype).max)
    first = 13 if dtype.itemsize == 1 else 21  # the first opset whose QuantizeLinear has the type
    if whole and isinstance(params.zero_point, int) and writing.opset >= first:
        if writing.io is None:
            return op("QuantizeLinear", [x, scale, constant(tape, dtype.type(params.zero_point))])
        # accelerators have casts of unsigned codes, if of any
        unsigned = np.dtype(f"u{dtype.name.lstrip('u')}")
        codes = op("QuantizeLinear", [x, scale, constant(tape, unsigned.type(params.zero_point - params.lo))])
        codes = op("Cast", [codes], {"to": writing.codes(params)})
        return op("Add", [codes, constant(tape, np.int32(params.lo))]) if params.lo else codes
    x = op("Add", [op("Round", [op("Div", [x, scale])]), constant(tape, _zeros(spec, params))])
    low, high = (constant(tape, np.float32(end)) for end in (params.lo, params.hi))
    return op("Cast", [op("Clip", [x, low, high])], {"to": writing.codes(params)})


def dequantize(
    tape: Tape, q: ir.Value, spec: LayerNormSpec, params: QuantParams, writing: Writing, dtype: ir.DataType | None
) -> ir.Value:
    """Append ``(q - zero_point) * scale * 2**f``, as `QuantParams.dequantize` computes it, in the old output's type."""
    op = tape.op
    scale = constant(tape, _shared_scale(params))
    # the first opset whose DequantizeLinear has the type, and for 8 bits the first that ONNX's own reference runs
    first = 19 if params.dtype.numpy.itemsize == 1 else 21
    if writing.io is None and writing.opset >= first and isinstance(params.zero_point, int):
        y = op("DequantizeLinear", [q, scale, constant(tape, params.dtype.numpy.type(params.zero_point))])
    else:
        y = op("Cast", [q], {"to": ir.DataType.FLOAT})
        y = op("Mul", [op("Sub", [y, constant(tape, _zeros(spec, params))]), scale])
    if params.exponents is not None:
        y = op("Mul", [y, constant(tape, _powers(spec, params, 1))])
    if params.channel_scales is not None:
        y = op("Mul", [y, constant(tape, _scales(spec, params))])
    return y if dtype in (None, ir.DataType.FLOAT) else op("Cast", [y], {"to": dtype})


def _shared_scale(params: QuantParams) -> np.float32:
    """Return the scale of all channels, 1 where each has its own."""
    return np.float32(params.scale if params.channel_scales is None else 1)


def _zeros(spec: LayerNormSpec, params: QuantParams) -> npt.NDArray[np.float32]:
    """Return the zero point of all channels, or those of the channels."""
    zeros = np.asarray(params.zero_point, dtype=np.float32)
    return zeros.reshape(row_shape(spec.normalized_shape, spec.axes)) if zeros.ndim else zeros


def _scales(spec: LayerNormSpec, params: QuantParams) -> npt.NDArray[np.float32]:
    return params.channel_steps(spec.n).astype(np.float32).reshape(row_shape(spec.normalized_shape, spec.axes))


def _powers(spec: LayerNormSpec, params: QuantParams, sign: int) -> npt.NDArray[np.float32]:
    exponents = np.array(params.channel_exponents(spec.n), dtype=np.float32)
    return np.exp2(sign * exponents).reshape(row_shape(spec.normalized_shape, spec.axes))
