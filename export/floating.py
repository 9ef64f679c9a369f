"""The form qdq: a float norm between quantizers, for hardware that has a norm of its own behind this pattern.

Codes go in and out as in the integer norm's forms, on the same scales; what happens between them is the vendor's.
Scale and bias of the norm stay float, so that nothing of them can saturate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import ModelError
from ..proof import NormKind
from ..quantization import QuantParams
from ..spec import LayerNormSpec
from .graph import constant
from .subgraph import Subgraph, Writing

#: The first opset whose QuantizeLinear and DequantizeLinear have the type, and a scale a channel.
_OPSETS = {"int8": 10, "uint8": 10, "int16": 21, "uint16": 21}
_CHANNEL_OPSET = 13


def append(tape: Tape, spec: LayerNormSpec, operands: list[ir.Value], writing: Writing) -> Subgraph:
    """Append DequantizeLinear, the sum where there is a residual, the norm, and QuantizeLinear.

    Raises
    ------
    ModelError
        If the opset has no such quantizers, or no quantizer has such parameters.
    """
    reals = [
        dequantize(tape, codes, spec, params, writing, None)
        for codes, params in zip(operands, spec.operands, strict=True)
    ]
    x = reals[0] if len(reals) == 1 else tape.op("Add", reals)
    x.type, x.shape = ir.TensorType(ir.DataType.FLOAT), operands[0].shape
    y = norm(tape, spec, x, writing.opset)
    y.type, y.shape = x.type, x.shape
    codes_sum = None if spec.sum_output is None else quantize(tape, x, spec, spec.sum_output, writing)
    return Subgraph(quantize(tape, y, spec, spec.output, writing), codes_sum)


def quantize(tape: Tape, x: ir.Value, spec: LayerNormSpec, params: QuantParams, writing: Writing) -> ir.Value:
    """Append a QuantizeLinear."""
    shape = x.shape
    if x.dtype not in (None, ir.DataType.FLOAT):
        x = tape.op("Cast", [x], {"to": ir.DataType.FLOAT})
    codes = _quantizer(tape, "QuantizeLinear", x, spec, params, writing.opset, shape)
    codes.type, codes.shape = ir.TensorType(writing.codes(params)), shape
    return codes


def dequantize(
    tape: Tape, q: ir.Value, spec: LayerNormSpec, params: QuantParams, writing: Writing, dtype: ir.DataType | None
) -> ir.Value:
    """Append a DequantizeLinear, and a Cast where the type isn't float32."""
    y = _quantizer(tape, "DequantizeLinear", q, spec, params, writing.opset, q.shape)
    return y if dtype in (None, ir.DataType.FLOAT) else tape.op("Cast", [y], {"to": dtype})


def norm(tape: Tape, spec: LayerNormSpec, x: ir.Value, opset: int) -> ir.Value:
    """Append the float norm of a spec, in float32: one node where the opset has it, else its elementary operators."""
    dtype = x.dtype
    if dtype in (None, ir.DataType.FLOAT):
        return _norm(tape, spec, x, opset)
    y = _norm(tape, spec, tape.op("Cast", [x], {"to": ir.DataType.FLOAT}), opset)
    return tape.op("Cast", [y], {"to": dtype})


def _norm(tape: Tape, spec: LayerNormSpec, x: ir.Value, opset: int) -> ir.Value:
    layernorm = spec.kind is NormKind.LAYERNORM
    op, axes, shape = tape.op, spec.axes, spec.normalized_shape
    gamma, beta = (np.asarray(values, dtype=np.float32).reshape(shape) for values in (spec.gamma, spec.beta))
    last = axes == tuple(range(-len(axes), 0)) and not spec.eps_outside
    if last and opset >= (17 if layernorm else 23):
        parameters = [_initializer(tape, gamma, "gamma")]
        if beta.any():
            parameters.append(_initializer(tape, beta, "beta"))
        attributes = {"axis": axes[0], "epsilon": spec.eps}
        return op("LayerNormalization" if layernorm else "RMSNormalization", [x, *parameters], attributes)
    if layernorm:
        x = op("Sub", [x, _mean(tape, x, axes, opset)])
    variance, eps = _mean(tape, op("Mul", [x, x]), axes, opset), constant(tape, np.float32(spec.eps))
    if spec.eps_outside:
        deviation = op("Add", [op("Sqrt", [variance]), eps])
    else:
        deviation = op("Sqrt", [op("Add", [variance, eps])])
    # broadcast over the dimensions between and behind the normalized ones
    sizes = dict(zip(axes, shape, strict=True))
    along = [sizes.get(axis, 1) for axis in range(axes[0], 0)]
    y = op("Mul", [op("Div", [x, deviation]), _initializer(tape, gamma.reshape(along), "gamma")])
    return op("Add", [y, _initializer(tape, beta.reshape(along), "beta")]) if beta.any() else y


def _initializer(tape: Tape, values: npt.NDArray[np.float32], name: str) -> ir.Value:
    return tape.initializer(ir.tensor(values), name=name)


def _mean(tape: Tape, x: ir.Value, axes: tuple[int, ...], opset: int) -> ir.Value:
    if opset < 18:
        return tape.op("ReduceMean", [x], {"axes": list(axes), "keepdims": 1})
    return tape.op("ReduceMean", [x, constant(tape, np.array(axes, dtype=np.int64))], {"keepdims": 1})


def _quantizer(
    tape: Tape, operator: str, x: ir.Value, spec: LayerNormSpec, params: QuantParams, opset: int, shape: ir.Shape | None
) -> ir.Value:
    """Append a QuantizeLinear or a DequantizeLinear; channels of their own scales have the norm's axis."""
    name = params.dtype.value
    if name not in _OPSETS or params.narrow_range:
        kind = f"{name} without its lowest code" if params.narrow_range else name
        raise ModelError(f"the form qdq has no codes of {kind}; QuantizeLinear has {', '.join(_OPSETS)}, in full")
    channels = params.channels is not None
    needed = max(_OPSETS[name], _CHANNEL_OPSET if channels else 0)
    if opset < needed:
        what = f"{name} with a scale a channel" if channels else name
        raise ModelError(
            f"the form qdq needs opset {needed} for codes of {what}; the model has {opset}. Raise it with --opset"
        )
    if not channels:
        scale, zero_point = np.float32(params.scale), params.dtype.numpy.type(params.zero_point)
        return tape.op(operator, [x, constant(tape, scale), constant(tape, zero_point)])
    if len(spec.axes) > 1:
        raise ModelError(
            f"the form qdq has no scale a channel where {len(spec.axes)} dimensions are normalized together; calibrate "
            "with --exponents 0"
        )
    scales = params.channel_steps(spec.n).astype(np.float32)
    zero_points = params.channel_zeros(spec.n).astype(params.dtype.numpy)
    axis = spec.axes[0] + len(shape or ())  # counted from the front where that can be, as not all consumers take others
    return tape.op(operator, [x, constant(tape, scales), constant(tape, zero_points)], {"axis": axis})
