"""Runs one ONNX model in one consumer: ``python consumer.py NAME MODEL.onnx INPUT.npz OUTPUT.npz``.

`benchmarks.targets` calls it with the interpreter of each consumer's own virtual environment. So it imports nothing but
NumPy and that consumer, and one that hangs or crashes ends its own process only.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def onnxruntime(path: str, feed: Arrays) -> Arrays:
    """ONNX Runtime's own kernels."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


def reference(path: str, feed: Arrays) -> Arrays:
    """ONNX's reference implementation in NumPy."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    with np.errstate(over="ignore"):
        return dict(zip(evaluator.output_names, evaluator.run(None, feed), strict=True))


def openvino(path: str, feed: Arrays) -> Arrays:
    """OpenVINO on the CPU."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU")
    results = compiled(feed)
    return {output.any_name: results[output] for output in compiled.outputs}


def tract(path: str, feed: Arrays) -> Arrays:
    """Tract, optimized."""
    import tract as tr

    model = tr.onnx().load(path)
    names = [model.output_name(index) for index in range(model.output_count())]
    inputs = [feed[model.input_name(index)] for index in range(model.input_count())]
    for index, array in enumerate(inputs):
        kind = {"int8": "i8", "uint8": "u8", "int16": "i16", "uint16": "u16", "int32": "i32"}[array.dtype.name]
        model.set_input_fact(index, ",".join([*map(str, array.shape), kind]))
    results = model.into_model().into_runnable().run(inputs)
    return {name: value.to_numpy() for name, value in zip(names, results, strict=True)}


def tvm(path: str, feed: Arrays) -> Arrays:
    """Apache TVM, Relax on LLVM."""
    import onnx
    import tvm as apache_tvm
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    proto = onnx.load(path)
    module = from_onnx(proto, keep_params_in_input=False)
    executable = apache_tvm.compile(module, target="llvm")
    machine = relax.VirtualMachine(executable, apache_tvm.cpu())
    result = machine["main"](*(apache_tvm.runtime.tensor(feed[value.name]) for value in proto.graph.input))
    results = [result] if hasattr(result, "numpy") else list(result)
    return {value.name: found.numpy() for value, found in zip(proto.graph.output, results, strict=True)}


def emx(path: str, feed: Arrays) -> Arrays:
    """emx-onnx-cgen's C, compiled by gcc."""
    import ctypes

    import onnx

    graph = onnx.load(path).graph
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "norm.c", Path(folder) / "norm.so"
        for command in (
            [str(Path(sys.executable).parent / "emx-onnx-cgen"), "compile", path, str(source), "--model-name", "norm"],
            ["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError((done.stderr or done.stdout).strip())
        outputs = {}
        for value in graph.output:
            tensor = value.type.tensor_type
            shape = [dim.dim_value for dim in tensor.shape.dim]
            outputs[value.name] = np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        arrays = [*(np.ascontiguousarray(feed[value.name]) for value in graph.input), *outputs.values()]
        ctypes.CDLL(str(library)).norm(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))
        return outputs


def qnn(path: str, feed: Arrays) -> Arrays:
    """onnxruntime-qnn's HTP backend on x86, with nodes that it refuses on ONNX Runtime's CPU."""
    import onnxruntime as ort
    import onnxruntime_qnn as ep

    ort.register_execution_provider_library(ep.EP_NAME, ep.get_library_path())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    devices = [device for device in ort.get_ep_devices() if device.ep_name == ep.EP_NAME]
    options.add_provider_for_devices(devices, {"backend_path": ep.get_qnn_htp_path()})
    session = ort.InferenceSession(path, options)
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, feed), strict=True))


CONSUMERS = {run.__name__: run for run in (onnxruntime, reference, openvino, tract, tvm, emx, qnn)}


def main() -> None:
    """Run the model that the command line names."""
    name, model, source, target = sys.argv[1:]
    with np.load(source) as file:
        feed = dict(file)
    np.savez(target, **CONSUMERS[name](model, feed))


if __name__ == "__main__":
    main()
