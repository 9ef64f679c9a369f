"""Norms between quantizers: in models that are quantized already, a DequantizeLinear before and QuantizeLinear behind.

Such a norm takes codes and gives codes: its quantization parameters stand in the model, nothing is left to calibrate,
and the integer norm takes the place of the float norm together with the quantizers around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import InputError
from ..quantization import LARGEST_EXPONENT, DType, QuantParams
from ..spec import LayerNormSpec
from . import fused
from .constants import DEQUANTIZE, QUANTIZE, codes_type, constant, is_quantizer
from .norms import Norm


@dataclass(frozen=True)
class Border:
    """The quantizers around a norm.

    Attributes
    ----------
    input, output : QuantParams
        As the model has them.
    codes : onnx_ir.Value
        What the norm's DequantizeLinear reads.
    dequantized : onnx_ir.Value
        What the norm reads.
    quantizers : tuple of onnx_ir.Node
        The QuantizeLinear nodes that read the norm's output, with one and the same parameters.
    """

    input: QuantParams
    output: QuantParams
    codes: ir.Value
    dequantized: ir.Value
    quantizers: tuple[ir.Node, ...]

    def fits(self, spec: LayerNormSpec) -> bool:
        """Whether a spec takes and gives the codes of this border."""
        return (spec.input, spec.output) == (self.input, self.output)

    def results(self, tape: Tape, codes: ir.Value) -> dict[ir.Value, ir.Value]:
        """Return what takes the place of each quantizer's output: the codes, or a copy for a second graph output."""
        *others, last = sorted((node.outputs[0] for node in self.quantizers), key=ir.Value.is_graph_output)
        copies = {value: tape.op("Identity", [codes]) if value.is_graph_output() else codes for value in others}
        return copies | {last: codes}


def find_border(norm: Norm) -> Border | None:
    """Return the quantizers around a norm, None where its input or its output is needed in floats.

    The input must come from a DequantizeLinear, and all that reads the output must be QuantizeLinear nodes with the
    same parameters: constants, per tensor or one scale a channel of the normalized dimensions.
    """
    if norm.layer is None:
        return None
    x, y = input_value(norm), norm.nodes[-1].outputs[0]
    dequantizer = x.producer()
    quantizers = tuple(dict.fromkeys(y.consumers()))
    if dequantizer is None or not is_quantizer(dequantizer, DEQUANTIZE) or y.is_graph_output() or not quantizers:
        return None
    graph = norm.nodes[-1].graph
    if not all(is_quantizer(node, QUANTIZE) and node.inputs[0] is y and node.graph is graph for node in quantizers):
        return None
    codes = dequantizer.inputs[0]
    if codes is None or codes.graph is not graph:
        return None
    rank = len(x.shape) if x.shape is not None else None
    source = _params(dequantizer, norm, rank)
    targets = [_params(node, norm, rank) for node in quantizers]
    if source is None or targets[0] is None or any(target != targets[0] for target in targets):
        return None
    return Border(source, targets[0], codes, x, quantizers)


def input_value(norm: Norm) -> ir.Value:
    """Return the value that a norm reads: found by its name, as what came before it may have been replaced."""
    if fused.adds(norm.nodes[0]) and (total := fused.value(norm.nodes[0])) is not None:
        return total
    return next(value for node in norm.nodes for value in node.inputs if value is not None and value.name == norm.input)


def _params(node: ir.Node, norm: Norm, rank: int | None) -> QuantParams | None:
    """Return a quantizer's parameters, None where they are no constants, or none that a norm can take."""
    scale = constant(node.inputs[1])
    stored = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = constant(stored)
    if scale is None or (stored is not None and zeros is None) or node.attributes.get_int("block_size", 0) != 0:
        return None
    codes = node.inputs[0] if node.op_type == DEQUANTIZE else node.outputs[0]
    known = zeros.dtype if zeros is not None else codes.dtype.numpy() if codes and codes.dtype else codes_type(node)
    if zeros is not None and np.unique(zeros).size != 1:
        return None  # channels may differ in their scales only
    zero_point = int(zeros.flat[0]) if zeros is not None else 0
    scales = scale.astype(np.float64)
    try:
        dtype = DType.parse(known)
        if scales.size == 1:
            return QuantParams(dtype, float(scales.item()), zero_point)
        channels = _channels(scales, node.attributes.get_int("axis", 1), norm, rank)
        exponents = None if channels is None else _exponents(channels)
        if channels is None or exponents is None:
            return None
        return QuantParams(dtype, float(channels.min()), zero_point, exponents)
    except InputError:
        return None


def _channels(
    scales: npt.NDArray[np.float64], axis: int, norm: Norm, rank: int | None
) -> npt.NDArray[np.float64] | None:
    """Return the scale of each element of the normalized dimensions, None where the axis is none of them."""
    if axis >= 0 and rank is None:
        return None
    from_end = axis if axis < 0 else axis - (rank or 0)
    if scales.ndim != 1 or from_end not in norm.axes:
        return None
    along = scales.reshape([-1 if own == from_end else 1 for own in norm.axes])
    try:
        return np.broadcast_to(along, norm.normalized_shape).reshape(-1)
    except ValueError:
        return None


def _exponents(scales: npt.NDArray[np.float64]) -> npt.NDArray[np.int64] | None:
    """Return the powers of two between the smallest scale and the others, None where they are no such powers."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mantissas, exponents = np.frexp(scales / scales.min())
    if not np.all(mantissas == 0.5) or exponents.max() - 1 > LARGEST_EXPONENT:
        return None
    powers: npt.NDArray[Any] = exponents.astype(np.int64) - 1
    return powers
