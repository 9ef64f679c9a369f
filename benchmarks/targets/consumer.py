"""Runs ONNX models in one consumer, in its own environment and each in its own process: ``python consumer.py NAME``.

A line of JSON on standard input is a job, {"model", "inputs", "outputs", "seconds"}, with the paths of an .onnx file
and of two .npz files; a line on standard output answers it: {"error": null}, or what went wrong. The file imports
nothing but NumPy and that consumer. A consumer that hangs or crashes ends its job's process only.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]


def onnxruntime(path: str, feed: Arrays) -> list[Any]:
    """ONNX Runtime's own kernels."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def reference(path: str, feed: Arrays) -> list[Any]:
    """ONNX's reference implementation in NumPy."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(path)
    with np.errstate(over="ignore"):
        return list(evaluator.run(None, feed))


def openvino(path: str, feed: Arrays) -> list[Any]:
    """OpenVINO on the CPU."""
    import openvino as ov

    compiled = ov.Core().compile_model(path, "CPU")
    results = compiled(feed)
    return [results[output] for output in compiled.outputs]


def tract(path: str, feed: Arrays) -> list[Any]:
    """Tract, optimized."""
    import tract as tr

    model = tr.onnx().load(path)
    inputs = [feed[model.input_name(index)] for index in range(model.input_count())]
    for index, array in enumerate(inputs):
        kind = {"int8": "i8", "uint8": "u8", "int16": "i16", "uint16": "u16", "int32": "i32"}[array.dtype.name]
        model.set_input_fact(index, ",".join([*map(str, array.shape), kind]))
    return [value.to_numpy() for value in model.into_model().into_runnable().run(inputs)]


def tvm(path: str, feed: Arrays) -> list[Any]:
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
    return [value.numpy() for value in results]


def emx(path: str, feed: Arrays) -> list[Any]:
    """emx-onnx-cgen's C, compiled by gcc."""
    import ctypes

    import onnx

    graph = onnx.load(path).graph
    if any(dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim):
        raise RuntimeError("static shapes only")  # it takes the others too, but then the C has other arguments
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "norm.c", Path(folder) / "norm.so"
        for command in (
            [str(Path(sys.executable).parent / "emx-onnx-cgen"), "compile", path, str(source), "--model-name", "norm"],
            ["gcc", "-O2", "-shared", "-fPIC", str(source), "-o", str(library), "-lm"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError((done.stderr or done.stdout).strip())
        outputs = []
        for value in graph.output:
            tensor = value.type.tensor_type
            shape = [dim.dim_value for dim in tensor.shape.dim]
            outputs.append(np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
        arrays = [*(np.ascontiguousarray(feed[value.name]) for value in graph.input), *outputs]
        ctypes.CDLL(str(library)).norm(*(array.ctypes.data_as(ctypes.c_void_p) for array in arrays))
        return outputs


def _qnn(path: str, feed: Arrays, fallback: bool) -> list[Any]:
    import onnxruntime as ort
    import onnxruntime_qnn as ep

    ort.register_execution_provider_library(ep.EP_NAME, ep.get_library_path())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    devices = [device for device in ort.get_ep_devices() if device.ep_name == ep.EP_NAME]
    options.add_provider_for_devices(devices, {"backend_path": ep.get_qnn_htp_path()})
    session = ort.InferenceSession(path, options)
    return list(session.run(None, feed))


def qnn(path: str, feed: Arrays) -> list[Any]:
    """onnxruntime-qnn's HTP backend on x86, with the nodes that it refuses on ONNX Runtime's CPU."""
    return _qnn(path, feed, fallback=True)


def qnn_alone(path: str, feed: Arrays) -> list[Any]:
    """The same with nothing on the CPU: the whole graph is on the accelerator, or it is refused."""
    return _qnn(path, feed, fallback=False)


CONSUMERS = {run.__name__: run for run in (onnxruntime, reference, openvino, tract, tvm, emx, qnn, qnn_alone)}
MODULES = {
    "reference": ("onnx.reference",), "tvm": ("tvm.relax.frontend.onnx",), "emx": ("onnx",),
    "qnn": ("onnxruntime", "onnxruntime_qnn"), "qnn_alone": ("onnxruntime", "onnxruntime_qnn"),
}  # fmt: skip


def _run(name: str, job: Arrays) -> None:
    """Run one job; in a process of its own."""
    try:
        with np.load(job["inputs"]) as file:
            feed = dict(file)
        np.savez(job["outputs"], *CONSUMERS[name](job["model"], feed))
        error = ""
    except BaseException as raised:
        lines = [line.strip() for line in str(raised).splitlines() if line.strip()]
        error = f"{type(raised).__name__}: {' '.join(lines)}"
    Path(job["outputs"] + ".error").write_text(error)


def main() -> None:
    """Answer the jobs of the consumer that the command line names."""
    name = sys.argv[1]
    for module in MODULES.get(name, (name,)):
        importlib.import_module(module)  # once, and not in each job's process
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        process = multiprocessing.get_context("fork").Process(target=_run, args=(name, job))
        process.start()
        process.join(job["seconds"])
        report = Path(job["outputs"] + ".error")
        if process.is_alive():
            process.kill()
            process.join()
            error = f"no result after {job['seconds']} seconds"
        elif not report.exists():
            error = f"the process ended with {process.exitcode}"
        else:
            error = report.read_text()
        print(json.dumps({"error": error or None}), flush=True)


if __name__ == "__main__":
    main()
