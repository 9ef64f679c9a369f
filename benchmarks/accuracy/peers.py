"""The peers, each fed with the best parameters that its own scheme allows; all return codes of the common grid."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxp_layernorm import FxpLayerNorm, plan

from . import formulas
from .cases import Floats, Problem


@dataclass(frozen=True)
class Peer:
    """One row of the tables.

    Attributes
    ----------
    name : str
    fed : str
        How it was fed.
    run : callable
        Returns a problem's outputs in LSB, before they are clamped; they may be NaN.
    bits : tuple of int
        The code widths that it has.
    module : str
        What must be installed.
    """

    name: str
    fed: str
    run: Callable[[Problem], npt.NDArray[np.generic]]
    bits: tuple[int, ...] = (8, 16)
    module: str = "numpy"


def _best_shifted(run: Callable[[Problem, int], npt.NDArray[np.generic]], bits: int, problem: Problem) -> Floats:
    """Return the outputs with the least error over all shifts of the input codes that fit a peer's `bits` bits."""

    def loss(outputs: Floats) -> float:
        clamped = np.clip(outputs, problem.output.dtype.lo, problem.output.dtype.hi)
        return float(np.square(clamped - problem.ideal).sum())  # NaN where an output is, with every shift then

    tried = [np.asarray(run(problem, shift), dtype=np.float64) for shift in range(bits - problem.bits + 1)]
    return min(tried, key=loss)


def _rounded_ideal(problem: Problem) -> Floats:
    return np.floor(problem.ideal + 0.5)


def _ours(problem: Problem, lane: int | None = None) -> npt.NDArray[np.generic]:
    norm = FxpLayerNorm(plan(problem.layer, problem.input, problem.output, lane=lane))
    return norm(problem.codes.astype(problem.input.dtype.numpy))


def _crfix(problem: Problem) -> npt.NDArray[np.generic]:
    import crfix

    layer, step = problem.layer, problem.output.scale
    finer = 16 - problem.bits
    epsilon = layer.eps / problem.input.scale**2 * 4**finer

    def fixed(values: Floats) -> tuple[npt.NDArray[np.int64], int]:
        fraction = min(max(30 - int(np.frexp(np.abs(values).max())[1]), 0), 31)
        return np.rint(values * 2.0**fraction).astype(np.int64), fraction

    eps, fe = fixed(np.array([epsilon]))
    gamma, fg = fixed(layer.gamma / step)
    beta, fb = fixed(layer.beta / step)
    found: npt.NDArray[np.generic] = crfix.layernorm(
        problem.codes << finer, 0, 0, eps=int(eps[0]), fe=fe, gamma=gamma, fg=fg, beta=beta, fb=fb, bits=32
    )
    return found


def _onnxruntime(problem: Problem) -> npt.NDArray[np.generic]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    layer, kind = problem.layer, getattr(TensorProto, f"INT{problem.bits}")
    constants = {
        "scale": np.float32(problem.input.scale), "step": np.float32(problem.output.scale),
        "zero": np.zeros((), problem.input.dtype.numpy), "gamma": layer.gamma.astype(np.float32),
        "beta": layer.beta.astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"]),
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["y"], epsilon=layer.eps),
        helper.make_node("QuantizeLinear", ["y", "step", "zero"], ["out"]),
    ]
    tensors = [helper.make_tensor_value_info(name, kind, ["rows", problem.n]) for name in ("q", "out")]
    held = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "norm", tensors[:1], tensors[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.generic] = session.run(None, {"q": problem.codes.astype(problem.input.dtype.numpy)})[0]
    return result


def _torch(problem: Problem) -> npt.NDArray[np.generic]:
    import torch

    layer = problem.layer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, but their kernel is there
        codes = torch.from_numpy(problem.codes.astype(np.int8))
        quantized = torch._make_per_tensor_quantized_tensor(codes, problem.input.scale, 0)
        weight, bias = (torch.from_numpy(values.astype(np.float32)) for values in (layer.gamma, layer.beta))
        y = torch.ops.quantized.layer_norm(quantized, [problem.n], weight, bias, layer.eps, problem.output.scale, 0)
    result: npt.NDArray[np.generic] = y.int_repr().numpy()
    return result


def _i_bert(problem: Problem, shift: int) -> npt.NDArray[np.generic]:
    import torch
    from transformers.models.ibert.quant_modules import FixedPointMul, IntLayerNorm

    norm = IntLayerNorm(problem.n, problem.layer.eps, output_bit=problem.bits, quant_mode=True).double()
    norm.weight.data = torch.from_numpy(problem.layer.gamma.copy())
    norm.bias.data = torch.from_numpy(problem.layer.beta.copy())
    x = torch.from_numpy((problem.codes << shift).astype(np.float64))[None]
    unit = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        norm.train()(x, unit)  # finds the shift that keeps the sum of squares below 2**32
        integers, scale = norm.eval()(x, unit)
        step = torch.tensor([problem.output.scale], dtype=torch.float64)
        if not torch.isfinite(integers).all():  # the fixed-point multiplier of infinity can't be made
            return np.where(torch.isfinite(integers[0]).numpy(), (integers[0] / step).round().numpy(), np.nan)
        result: npt.NDArray[np.generic] = FixedPointMul.apply(integers, scale, problem.bits, step)[0].numpy()
    return result


def _i_vit(problem: Problem, shift: int) -> Floats:
    layer = problem.layer
    unit = np.sqrt(problem.n) / 2**30
    with np.errstate(divide="ignore", invalid="ignore"):
        offset = np.floor(layer.beta / layer.gamma / unit)
    finite = np.isfinite(offset)
    z = formulas.i_vit(problem.codes << shift, np.where(finite, offset, 0).astype(np.int64))
    return np.where(finite, np.rint(z * (unit * layer.gamma / problem.output.scale)), np.nan)


def _fq_vit(problem: Problem) -> Floats:
    layer, step = problem.layer, problem.output.scale
    return formulas.fq_vit(problem.codes, layer.gamma / step, layer.beta / step)


def _tflite(problem: Problem, finer: int) -> npt.NDArray[np.int64]:
    layer = problem.layer
    scale = float(np.abs(layer.gamma).max()) / 32767
    weight = np.rint(layer.gamma / scale).astype(np.int64)
    bias = np.rint(layer.beta / scale * 1024).astype(np.int64)
    multiplier, shift = formulas.quantized_multiplier(scale / problem.output.scale)
    limit = max(1, int(10_000 * scale))
    return formulas.tflite(problem.codes << finer, weight, bias, multiplier, shift, limit)


def _deeploy(problem: Problem, *, wraps: bool) -> npt.NDArray[np.int64]:
    layer, step = problem.layer, problem.output.scale
    largest = max(float(np.abs(layer.gamma).max()), float(np.abs(layer.beta).max())) / step
    log2_d = min(24, 30 - int(np.frexp(largest)[1]))
    weight = np.rint(layer.gamma / step * 2**log2_d).astype(np.int64)
    bias = np.rint((layer.beta / step + 0.5) * 2**log2_d).astype(np.int64)
    return formulas.deeploy(problem.codes, weight, bias, log2_d, wraps=wraps)


#: The first two are what the others are measured by.
PEERS = (
    Peer("ideal, rounded", "the real value of the same codes, rounded half up: nothing can be closer", _rounded_ideal),
    Peer("fxp-layernorm", "as `plan` has it by default: lane 24 or 32 for 8-bit codes, 64 for 16-bit ones", _ours),
    Peer("fxp-layernorm, lane 32", "`plan(..., lane=32)`", functools.partial(_ours, lane=32)),
    Peer("fxp-layernorm, lane 64", "`plan(..., lane=64)`, 16 bits' default", functools.partial(_ours, lane=64), (8,)),
    Peer(
        "crfix", "`layernorm`, correctly rounded, ties to even; codes shifted to 16 bits, which makes room for eps; "
        "gains, offsets and eps with all the bits that its int32 constants hold", _crfix, module="crfix",
    ),
    Peer(
        "onnxruntime QDQ", "DequantizeLinear, LayerNormalization in float32, QuantizeLinear", _onnxruntime,
        module="onnxruntime",
    ),
    Peer(
        "torch quantized", "`quantized::layer_norm`: integer sums, the rest in float32; 8 bits only", _torch, (8,),
        "torch",
    ),
    Peer(
        "I-BERT", "transformers' IntLayerNorm in float64, which keeps its integers exact; codes shifted by what suits "
        "the rows best within its 22 bits; its own shift found on the same rows; then its own requantization; no eps",
        functools.partial(_best_shifted, _i_bert, 22), module="transformers",
    ),
    Peer(
        "I-ViT", "codes shifted by what suits the rows best within its 16 bits; its sums may exceed 32 bits; no eps",
        functools.partial(_best_shifted, _i_vit, 16),
    ),
    Peer(
        "FQ-ViT", "statistics in float64; its channel factors, a matter of the input's codes, are 1; no eps; 8 bits "
        "only", _fq_vit, (8,),
    ),
    Peer(
        "TFLite LSTM", "codes shifted by what suits the rows best within its 16 bits; gains of 16 bits; the scale of "
        "its output is that of the common grid instead of 2^-12; no eps", functools.partial(_best_shifted, _tflite, 16),
    ),
    Peer(
        "Deeploy", "D = 2^24, or less where gains would exceed 32 bits; the half that rounds is in its bias; its eps "
        "is 1 squared code; outputs beyond the codes wrap, as in its C kernel; 8 bits only",
        functools.partial(_deeploy, wraps=True), (8,),
    ),
    Peer(
        "Deeploy, clamped", "the same with the clamp that quantlib's definition of it has",
        functools.partial(_deeploy, wraps=False), (8,),
    ),
)  # fmt: skip
