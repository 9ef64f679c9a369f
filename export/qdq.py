"""Norms between quantizers: in models that are quantized already, DequantizeLinear before and QuantizeLinear behind.

Such a norm, or a residual add with the norm behind it, takes codes and gives codes: its quantization parameters stand
in the model, nothing is left to calibrate, and the integer norm takes its place together with the quantizers around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.tape import Tape

from ..errors import InputError
from ..hardware import Hardware
from ..layer import LayerNorm, RMSNorm
from ..planner import plan
from ..quantization import LARGEST_EXPONENT, DType, QuantParams
from ..spec import LayerNormSpec
from . import fused
from .constants import DEQUANTIZE, QUANTIZE, codes_type, constant, is_constant, is_quantizer
from .norms import Norm


@dataclass(frozen=True)
class Border:
    """The quantizers around a norm, or around a norm and the residual add before it.

    Attributes
    ----------
    input, output : QuantParams
        As the model has them.
    codes : onnx_ir.Value
        What the DequantizeLinear before the norm reads.
    quantizers : tuple of onnx_ir.Node
        The QuantizeLinear nodes that read the norm's output, with one and the same parameters.
    dequantized : tuple of onnx_ir.Value
        What the norm, or the add before it, reads.
    add : onnx_ir.Node or None
        The residual add. It is part of the integer norm: the sum between is not rounded to any codes.
    residual : QuantParams or None
    residual_codes : onnx_ir.Value or None
        The same of the add's second operand.
    sum_output : QuantParams or None
    sum_quantizers : tuple of onnx_ir.Node
        The same of the sum, where it is quantized for the next residual.
    requantized : onnx_ir.Node or None
        The DequantizeLinear of the sum's codes, where the norm reads these and takes the sum itself instead. Where
        nothing else reads them, they are no output, and their quantizers go.
    """

    input: QuantParams
    output: QuantParams
    codes: ir.Value
    quantizers: tuple[ir.Node, ...]
    dequantized: tuple[ir.Value, ...]
    add: ir.Node | None = None
    residual: QuantParams | None = None
    residual_codes: ir.Value | None = None
    sum_output: QuantParams | None = None
    sum_quantizers: tuple[ir.Node, ...] = ()
    requantized: ir.Node | None = None

    def plan(
        self, layer: LayerNorm | RMSNorm, lane: int | None = None, hardware: Hardware | str | None = None
    ) -> LayerNormSpec:
        """Return the spec of a layer between these quantizers; see `planner.plan`."""
        return plan(
            layer, self.input, self.output, residual=self.residual, sum_output=self.sum_output, lane=lane,
            hardware=hardware,
        )  # fmt: skip

    def fits(self, spec: LayerNormSpec) -> bool:
        """Whether a spec takes and gives the codes of this border."""
        own = self.input, self.output, self.residual, self.sum_output
        return own == (spec.input, spec.output, spec.residual, spec.sum_output)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """What goes, besides the norm, where the integer norm takes its place."""
        again = self.requantized if self.sum_output is None else None
        return (*self.quantizers, *self.sum_quantizers, *(node for node in (again, self.add) if node is not None))

    @property
    def unused(self) -> list[ir.Value]:
        """What nothing may need any more then."""
        again = () if self.requantized is None else (self.requantized,)
        readers = (*self.quantizers, *self.sum_quantizers, *again)
        sums = [node.outputs[0] for node in again]
        return [
            *self.dequantized,
            *sums,
            *(value for node in readers for value in node.inputs[1:] if value is not None),
        ]

    def place(self, norm: Norm) -> ir.Node:
        """Return the node that the integer norm can stand behind: what reads its sum may come before the norm."""
        return norm.nodes[-1] if self.add is None else self.add

    def results(self, tape: Tape, codes: ir.Value, sum_codes: ir.Value | None) -> dict[ir.Value, ir.Value]:
        """Return what takes the place of each quantizer's output: the codes, or a copy for a second graph output."""
        results = _results(tape, self.quantizers, codes)
        return results if sum_codes is None else results | _results(tape, self.sum_quantizers, sum_codes)


def _results(tape: Tape, quantizers: tuple[ir.Node, ...], codes: ir.Value) -> dict[ir.Value, ir.Value]:
    *others, last = sorted((node.outputs[0] for node in quantizers), key=ir.Value.is_graph_output)
    copies = {value: tape.op("Identity", [codes]) if value.is_graph_output() else codes for value in others}
    return copies | {last: codes}


def find_border(norm: Norm, *, fuse_residual: bool = False) -> Border | None:
    """Return the quantizers around a norm, None where its input or its output is needed in floats.

    The input must come from a DequantizeLinear, or be the sum of two; all that reads the output must be QuantizeLinear
    nodes with the same parameters, and all else that reads the sum, too. Parameters are constants, per tensor or one
    scale a channel of the normalized dimensions.

    Parameters
    ----------
    norm : Norm
    fuse_residual : bool
        Whether the norm is to take a sum that the model quantizes before it: the border is then that around the add.
    """
    if norm.layer is None:
        return None
    x = input_value(norm)
    rank = len(x.shape) if x.shape is not None else None
    quantizers, output = _quantizers(norm.nodes[-1].outputs[0], (), norm, rank)
    if not quantizers or output is None:
        return None
    if is_add(x.producer(), norm):
        return _around_add(x, quantizers, output, norm, rank)
    source, codes = _dequantized(x, norm, rank)
    if source is None or codes is None or codes.graph is not norm.nodes[-1].graph:
        return None
    border = Border(source, output, codes, quantizers, (x,))
    return (fuse_residual and _around_sum(border, x, norm, rank)) or border


def fitting_border(norm: Norm, spec: LayerNormSpec) -> Border | None:
    """Return the quantizers around a norm whose codes a spec takes and gives."""
    found = (find_border(norm, fuse_residual=fuse_residual) for fuse_residual in (False, True))
    return next((border for border in found if border is not None and border.fits(spec)), None)


def lack(norm: Norm) -> str:
    """Tell why there are no quantizers around a norm that can be replaced."""
    add = input_value(norm).producer()
    if add is not None and _adds_constant(add, norm):
        return "what it normalizes has a bias added in floats, which no codes are of; it needs data to be calibrated"
    return "it stands between no quantizers; it needs data to be calibrated"


def _adds_constant(node: ir.Node, norm: Norm) -> bool:
    if node is norm.nodes[0]:
        return fused.bias(node) is not None
    return is_add(node, norm) and any(map(is_constant, node.inputs))


def is_add(node: ir.Node | None, norm: Norm) -> bool:
    """Whether a node adds up two tensors for a norm: an Add, or the norm itself."""
    if node is None or (node is norm.nodes[0] and fused.is_skip(node)):
        return node is not None
    return node.op_type == "Add" and node.domain in ("", "ai.onnx")


def _around_add(
    total: ir.Value, quantizers: tuple[ir.Node, ...], output: QuantParams, norm: Norm, rank: int | None
) -> Border | None:
    """Return the border of a sum that a norm reads, both of whose operands come from codes."""
    add, graph = total.producer(), norm.nodes[-1].graph
    assert add is not None
    operands = [value for value in add.inputs[:2] if value is not None]
    (source, codes), (residual, residual_codes) = (_dequantized(value, norm, rank) for value in operands)
    inside = all(value is not None and value.graph is graph for value in (codes, residual_codes))
    if source is None or codes is None or residual is None or not inside or add.graph is not graph:
        return None
    if total.is_graph_output() or not same_shape(*operands):
        return None
    sum_quantizers, sum_output = _quantizers(total, norm.nodes, norm, rank)
    if sum_quantizers is None or (sum_output is not None and sum_output.channel_scales is not None):
        return None
    return Border(
        source, output, codes, quantizers, tuple(operands), add, residual, residual_codes, sum_output, sum_quantizers
    )


def _around_sum(border: Border, x: ir.Value, norm: Norm, rank: int | None) -> Border | None:
    """Return the border of a sum whose codes a norm reads, None where there is none."""
    quantizer = border.codes.producer()
    total = quantizer.inputs[0] if quantizer is not None and is_quantizer(quantizer, QUANTIZE) else None
    if total is None or not is_add(total.producer(), norm):
        return None
    around = _around_add(total, border.quantizers, border.output, norm, rank)
    if around is None:
        return None
    own = set(norm.nodes).issuperset(x.consumers()) and not x.is_graph_output()
    alone = own and len(around.sum_quantizers) == len(border.codes.uses()) == 1
    unread = alone and not border.codes.is_graph_output()
    return replace(around, requantized=x.producer(), sum_output=None if unread else around.sum_output)


def _dequantized(value: ir.Value, norm: Norm, rank: int | None) -> tuple[QuantParams | None, ir.Value | None]:
    """Return the parameters and the codes of a dequantized value, None where it is none."""
    node = value.producer()
    if node is None or not is_quantizer(node, DEQUANTIZE):
        return None, None
    return _params(node, norm, rank), node.inputs[0]


def _quantizers(
    value: ir.Value, readers: Sequence[ir.Node], norm: Norm, rank: int | None
) -> tuple[tuple[ir.Node, ...] | None, QuantParams | None]:
    """Return the QuantizeLinear nodes that read a value, besides other readers, and their parameters.

    The nodes are None where something else reads it, or their parameters differ.
    """
    nodes = tuple(node for node in dict.fromkeys(value.consumers()) if node not in readers)
    graph = norm.nodes[-1].graph
    if value.is_graph_output() or not all(
        is_quantizer(node, QUANTIZE) and node.inputs[0] is value and node.graph is graph for node in nodes
    ):
        return None, None
    found = [_params(node, norm, rank) for node in nodes]
    if not found:
        return (), None
    return (nodes, found[0]) if found[0] is not None and all(other == found[0] for other in found) else (None, None)


def same_shape(value: ir.Value, other: ir.Value) -> bool:
    """Whether two values surely have the same shape, so that their sum needs no broadcasting."""
    if value.shape is None or other.shape is None or len(value.shape) != len(other.shape):
        return False
    pairs = zip(value.shape, other.shape, strict=True)
    return all(a == b and (isinstance(a, int) or a.value is not None) for a, b in pairs)


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
    axis = node.attributes.get_int("axis", 1)
    zeros = np.zeros((), dtype=np.int64) if zeros is None else zeros
    zero_points = _channels(zeros, axis, norm, rank) if zeros.size > 1 else zeros
    if zero_points is None or zero_points.size == 0:
        return None
    zero_point = zero_points.astype(np.int64) if zero_points.size > 1 else int(zero_points.flat[0])
    scales = scale.astype(np.float64)
    try:
        dtype = DType.parse(known)
        if scales.size == 1:
            return QuantParams(dtype, float(scales.item()), zero_point)
        channels = _channels(scales, axis, norm, rank)
        if channels is None:
            return None
        exponents = _exponents(channels)
        if exponents is None:
            return QuantParams(dtype, float(channels.max()), zero_point, channel_scales=channels.tolist())
        return QuantParams(dtype, float(channels.min()), zero_point, exponents)
    except InputError:
        return None


def _channels(values: npt.NDArray[Any], axis: int, norm: Norm, rank: int | None) -> npt.NDArray[Any] | None:
    """Return what each element of the normalized dimensions has, None where the axis is none of them."""
    if axis >= 0 and rank is None:
        return None
    from_end = axis if axis < 0 else axis - (rank or 0)
    if values.ndim != 1 or from_end not in norm.axes:
        return None
    along = values.reshape([-1 if own == from_end else 1 for own in norm.axes])
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
