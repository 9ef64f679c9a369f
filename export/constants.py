"""What no input of a model decides: tensors, and what quantizers make of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from ..errors import ModelError

Array = npt.NDArray[Any]

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
_DOMAINS = ("", "ai.onnx", "com.microsoft")


def is_quantizer(node: ir.Node | None, operator: str) -> bool:
    """Whether a node is a QuantizeLinear or a DequantizeLinear, of ONNX's or of ONNX Runtime's domain."""
    return node is not None and node.op_type == operator and node.domain in _DOMAINS and len(node.inputs) >= 2


def quantizes(node: ir.Node | None) -> bool:
    """Whether a node is any of the two."""
    return is_quantizer(node, QUANTIZE) or is_quantizer(node, DEQUANTIZE)


def is_constant(value: ir.Value | None) -> bool:
    """Whether `constant` can tell a value; nothing is read for that.

    A constant is an initializer or a Constant node, the same through Identity, by which exporters share equal weights,
    and through QuantizeLinear and DequantizeLinear, by which quantizers store weights as codes.
    """
    if value is None:
        return False
    producer = value.producer()
    if producer is None or producer.op_type == "Constant":
        return ir.convenience.get_const_tensor(value) is not None
    if producer.op_type == "Identity" or quantizes(producer):
        return all(source is None or is_constant(source) for source in producer.inputs)
    return False


def constant(value: ir.Value | None) -> Array | None:
    """Return a constant's value, None where an input of the model decides it.

    Raises
    ------
    ModelError
        If its external data can't be read.
    """
    return _read(value) if value is not None and is_constant(value) else None


def _read(value: ir.Value) -> Array:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        try:
            return tensor.numpy()
        except (OSError, ValueError) as error:
            raise ModelError(f"the model's external data can't be read: {error}") from error
    node = value.producer()
    assert node is not None
    inputs = [_read(source) for source in node.inputs if source is not None]
    return inputs[0] if node.op_type == "Identity" else _quantized(node, *inputs)


def _quantized(node: ir.Node, x: Array, scale: Array, zero_point: Array | None = None) -> Array:
    """Return what a quantizer makes of x, computed in float32 as the operators' definitions have it."""
    dtype = codes_type(node) if zero_point is None else zero_point.dtype
    zeros = np.zeros_like(scale, dtype=np.int64) if zero_point is None else zero_point.astype(np.int64)
    factor, zeros = (_along(parameter, node, x) for parameter in (scale.astype(np.float32), zeros))
    if node.op_type == DEQUANTIZE:
        centred = (x.astype(np.int64) - zeros).astype(np.float32)
        return (centred * factor).astype(scale.dtype).reshape(x.shape)
    ends = ir.DataType.from_numpy(dtype)
    codes = np.clip(np.rint(x.astype(np.float32) / factor) + zeros, float(ends.min), float(ends.max))
    return codes.astype(dtype).reshape(x.shape)


def _along(parameter: Array, node: ir.Node, x: Array) -> Array:
    """Return a quantizer's scale or zero point, one a tensor, a channel or a block, so that it broadcasts against x."""
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    if block:
        return np.repeat(parameter, block, axis=axis).take(range(x.shape[axis]), axis=axis)
    if parameter.size == 1:
        return parameter.reshape(())
    return parameter.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])


def codes_type(node: ir.Node) -> np.dtype[Any]:
    """Return the type of a QuantizeLinear's codes where no zero point tells it."""
    return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8).numpy()
