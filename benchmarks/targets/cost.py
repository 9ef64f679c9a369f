"""What each word costs: its nodes, and its time in ONNX Runtime against the fused float node, on one thread."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

import fxp_layernorm as fxp
from fxp_layernorm.export import to_onnx

ROWS, N = 512, 768
#: Each figure is the least of as many runs, a few of every model in turn, so that all see the same machine.
ROUNDS, RUNS = 40, 15


def cost_tables() -> list[str]:
    """Return the lines of the tables."""
    rng = np.random.default_rng(0)
    layer = fxp.LayerNorm(N)
    layer.weight, layer.bias = np.exp(0.3 * rng.standard_normal(N)), 0.2 * rng.standard_normal(N)
    side, fine = fxp.QuantParams("int8", 16 / 255), fxp.QuantParams("int16", 16 / 65535)
    exponents = fxp.QuantParams("int8", 16 / 255, 0, np.arange(N) % 8)
    narrow = fxp.plan(layer, side, side, hardware="carried24")
    fine_narrow = fxp.plan(layer, side, side, hardware="carried24", max_excess=0.06)
    wide_narrow = fxp.plan(layer, exponents, side, hardware="carried24")
    added, total = fxp.QuantParams("int8", 10 / 255), fxp.QuantParams("int8", 20 / 255)
    wide = [
        ("int8 + int8 to int8", fxp.plan(layer, side, side, residual=added, hardware="carried24")),
        (
            "the same, and the sum",
            fxp.plan(layer, side, side, residual=added, sum_output=total, hardware="carried24"),
        ),
        ("int8 to int16", fxp.plan(layer, side, fine, hardware="carried24")),
        ("int16 to int8", fxp.plan(layer, fine, side, hardware="carried24")),
        ("int16", fxp.plan(layer, fine, fine, hardware="carried24")),
    ]
    cases = [
        ("float24, int8", "float24", narrow), ("int24, int8", "int24", narrow),
        ("float24, int8, two products", "float24", fine_narrow), ("int24, int8, two products", "int24", fine_narrow),
        ("float24, int8, exponents to 7", "float24", wide_narrow),
        ("int24, int8, exponents to 7", "int24", wide_narrow),
        *((f"{word}, {name}", word, spec) for name, spec in wide for word in ("float24", "int24")),
        ("int64, int8, carried24", "int64", narrow),
        ("int64, int8, lane 32", "int64", fxp.plan(layer, side, side, lane=32)),
        ("int64, int8, exponents to 7, lane 32", "int64", fxp.plan(layer, exponents, side, lane=32)),
        ("int64, int16, lane 64", "int64", fxp.plan(layer, fine, fine, lane=64)),
    ]  # fmt: skip
    models = [(name, to_onnx(spec, word), spec) for name, word, spec in cases]
    sessions = [_session(_fused(layer)), *(_session(model) for _, model, _ in models)]
    feeds = [{"q": rng.standard_normal((ROWS, N)).astype(np.float32)}]
    feeds += [
        {
            name: rng.integers(params.lo, params.hi, (ROWS, N), dtype=params.dtype.numpy)
            for name, params in zip(("q", "residual"), spec.operands, strict=False)
        }
        for _, _, spec in models
    ]
    best = [np.inf] * len(sessions)
    for _ in range(ROUNDS):
        for index, (session, feed) in enumerate(zip(sessions, feeds, strict=True)):
            binding = session.io_binding()
            for name, codes in feed.items():
                binding.bind_cpu_input(name, codes)
            for output in session.get_outputs():
                binding.bind_output(output.name)
            for _ in range(RUNS):
                start = time.perf_counter()
                session.run_with_iobinding(binding)
                best[index] = min(best[index], time.perf_counter() - start)
    lines = [
        "## What each word costs", "",
        f"In ONNX Runtime {ort.__version__}, {ROWS} rows of {N}, one thread, against its fused float node "
        f"({best[0] * 1e3:.2f} ms); the least of {ROUNDS * RUNS} runs. Full-size nodes are those whose output has all "
        "elements of the rows.", "",
        "| word and spec | nodes | of them full-size | time | proved excess, LSB |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for (name, model, spec), seconds in zip(models, best[1:], strict=True):
        nodes = [node for node in model.graph.node if node.op_type != "Constant"]
        lines.append(f"| {name} | {len(nodes)} | {_full_size(model)} | {seconds / best[0]:.1f}x | {spec.excess:.2g} |")
    return lines


def _fused(layer: fxp.LayerNorm) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", N]) for name in "qy"]
    parameters = {"scale": layer.gamma, "bias": layer.beta}
    node = helper.make_node("LayerNormalization", ["q", *parameters], ["y"])
    tensors = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in parameters.items()]
    graph = helper.make_graph([node], "norm", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _full_size(model: onnx.ModelProto) -> int:
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in (*inferred.graph.value_info, *inferred.graph.output)
    }
    return sum(
        len(dims) == 2 and dims[1].dim_value == N and dims[0].dim_value != 1
        for node in inferred.graph.node
        if (dims := shapes.get(node.output[0]))
    )
