"""The kernels against their peers, in one run, on the same data and with the same number of threads."""

from __future__ import annotations

import importlib
import importlib.metadata
import mmap
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .inference import FxpLayerNorm
from .layer import LayerNorm
from .planner import plan
from .quantization import QuantParams
from .threads import TEAM

SHAPES = ((1, 768), (512, 768), (4096, 768), (512, 4096), (8192, 64), (64, 65536))
QUICK_SHAPES = ((1, 768), (4096, 768), (8192, 64))
#: Seconds that each shape is measured for, and the fewest rounds of all its calls.
SECONDS, QUICK_SECONDS, ROUNDS = 4.0, 0.5, 7
#: Measurements of a call in each of its turns, of which the median counts, and calls before them that are not timed.
TURN, UNTIMED = 3, 3
#: Seconds until the threads of every pool sleep: OpenMP's look for work for some 5 ms, ONNX Runtime's for 30. And
#: seconds of calls that are not timed then, as a core that has slept is slower for a while.
REST, WARMING = 0.05, 0.01
#: Seconds for which calls of one thread are made side by side.
SIDE = 0.01

Call = Callable[[], object]


@dataclass(frozen=True)
class Pairing:
    """Types of the codes on both sides of a norm, and whether the input has channel exponents."""

    input: str
    output: str
    exponents: bool = False

    def __str__(self) -> str:
        return f"{self.input} -> {self.output}" + (", exponents" if self.exponents else "")

    def norm(self, n: int) -> FxpLayerNorm:
        """Return a norm with parameters like a transformer's, its input scale 1/16 of the standard deviation."""
        rng = np.random.default_rng(0)
        layer = LayerNorm(n)
        layer.weight = rng.lognormal(0.0, 0.3, n)
        layer.bias = rng.normal(0.0, 0.2, n)
        exponents = rng.integers(0, 4, n) if self.exponents else None
        scale = 1.0 if self.input.endswith("8") else 2.0**-8
        out_range = np.iinfo(self.output)
        output = QuantParams(self.output, 12.0 / (int(out_range.max) - int(out_range.min)))
        return FxpLayerNorm(plan(layer, QuantParams(self.input, scale / 16, 0, exponents), output))


PAIRINGS = (
    Pairing("int8", "int8"),
    Pairing("int8", "int8", exponents=True),
    Pairing("uint8", "uint8"),
    Pairing("int16", "int8"),
    Pairing("int16", "int16"),
)


def run(*, threads: int = 1, quick: bool = False, advance: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Measure every pairing and every peer that is installed, for every shape.

    Parameters
    ----------
    threads : int
        For the kernels, the peers and the copy alike.
    quick : bool
        Fewer shapes, for less time.
    advance : callable
        Called after each shape.

    Returns
    -------
    dict
        ``cases``: for each shape and pairing the median rate, in 1e9 elements a second, its ratio to that of each
        peer, and, with several threads, ``scaling``, its ratio to that of one, and ``side_by_side``, that of as many
        calls of one thread on shares of the rows, which is what the machine's cores and caches allow; ``peers``: their
        rates; ``calls``: those of other ways to call the first pairing, and what they gain; ``compile_s``: how long the
        first call of each pairing took, apart from its run; ``environment``: the CPU and the versions.
    """
    cases: list[dict[str, Any]] = []
    peers: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    first_call: dict[str, dict[str, Any]] = {}
    with _threads_of_torch(threads):
        for rows, n in QUICK_SHAPES if quick else SHAPES:
            norms = {str(pairing): (pairing, pairing.norm(n)) for pairing in PAIRINGS}
            codes = {name: _codes(pairing, rows, n) for name, (pairing, _) in norms.items()}
            for name, (_, norm) in norms.items():
                first_call.setdefault(name, _compile(norm, codes[name]))
            ours: dict[str, Call] = {}
            sides: dict[str, Callable[[], float]] = {}
            for name, (_, norm) in norms.items():
                ours[name] = _bind(norm, codes[name], threads)
                if threads > 1:
                    ours[f"{name}, 1 thread"] = _bind(norm, codes[name], 1)
                    sides[f"{name}, side by side"] = _side_by_side(norm, codes[name], threads)
            plain = "int8 -> int8"
            ways = _ways(norms[plain][1], codes[plain], threads)
            rivals = _peers(codes[plain], threads)
            groups = [ours | ways, *({name: call} for name, call in rivals.items())]
            times = _measure(groups, sides, QUICK_SECONDS if quick else SECONDS, REST if threads > 1 else 0.0)
            shape = f"{rows} x {n}"

            def rate(name: str, elements: int = rows * n, times: dict[str, list[float]] = times) -> dict[str, float]:
                seconds = statistics.median(times[name])
                return {"gelem_per_s": elements / seconds * 1e-9, "us": seconds * 1e6}

            peers += [{"peer": name, "shape": shape} | rate(name) for name in rivals]
            calls += [
                {"way": name, "shape": shape, "gain": _ratio(times[plain], times[name])} | rate(name) for name in ways
            ]
            for name, (pairing, norm) in norms.items():
                case = {
                    "case": f"{name}, {shape}", "shape": [rows, n], "input": pairing.input,
                    "output": pairing.output, "exponents": pairing.exponents, "lane": norm.spec.lane,
                    "ratio": {rival: _ratio(times[rival], times[name]) for rival in rivals},
                }  # fmt: skip
                if threads > 1:
                    alone = times[f"{name}, 1 thread"]
                    case["scaling"] = _ratio(alone, times[name])
                    case["side_by_side"] = _ratio(alone, times[f"{name}, side by side"])
                cases.append(case | rate(name))
            advance()
    return {
        "cases": cases, "peers": peers, "calls": calls, "threads": threads, "compile_s": first_call,
        "environment": environment(),
    }  # fmt: skip


def environment() -> dict[str, Any]:
    """Return the CPU's name and the versions of what is measured."""
    versions = {"python": platform.python_version()}
    for name in ("fxp-layernorm", "numpy", "numba", "torch", "onnxruntime"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": _cpu_name(), "system": platform.platform(), "versions": versions}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _codes(pairing: Pairing, rows: int, n: int) -> npt.NDArray[Any]:
    """Return codes that are normally distributed with a standard deviation of an eighth of the type's range."""
    limits = np.iinfo(pairing.input)
    low, high = int(limits.min), int(limits.max)
    values = np.random.default_rng(1).standard_normal((rows, n), dtype=np.float32)
    values = values * ((high - low) / 8) + (low + high) / 2
    return np.clip(np.rint(values), low, high).astype(pairing.input)


def _bind(norm: FxpLayerNorm, codes: npt.NDArray[Any], threads: int) -> Call:
    return lambda: norm(codes, threads=threads)


def _side_by_side(norm: FxpLayerNorm, codes: npt.NDArray[Any], threads: int) -> Callable[[], float]:
    """Return what measures the seconds of a call by threads that know nothing of each other, each with its rows."""
    shares = np.array_split(codes, min(threads, len(codes)))
    outs = [np.empty(share.shape, dtype=norm.spec.output.dtype.numpy) for share in shares]

    def rate(share: npt.NDArray[Any], out: npt.NDArray[Any]) -> float:
        start = now = time.perf_counter()
        calls = 0
        while now < start + SIDE:
            norm(share, out, threads=1)
            calls += 1
            now = time.perf_counter()
        return calls * len(share) / (now - start)

    def seconds() -> float:
        with ThreadPoolExecutor(len(shares)) as pool:
            return len(codes) / sum(pool.map(rate, shares, outs))

    return seconds


def _compile(norm: FxpLayerNorm, codes: npt.NDArray[Any]) -> dict[str, Any]:
    """Return how long a call with one row takes the first time, and whether the cache spared its compilation."""
    from . import kernels

    before = sum(kernels.run.stats.cache_misses.values())
    start = time.perf_counter()
    norm(codes[:1])
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "cached": sum(kernels.run.stats.cache_misses.values()) == before}


def _ways(norm: FxpLayerNorm, codes: npt.NDArray[Any], threads: int) -> dict[str, Call]:
    """Return the ways to call a norm besides the plain one, whose output the allocator mostly has at hand."""
    out, place = np.empty(codes.shape, dtype=norm.spec.output.dtype.numpy), codes.copy()

    def new_pages() -> object:
        pages = mmap.mmap(-1, out.nbytes)
        return norm(codes, np.frombuffer(pages, dtype=out.dtype).reshape(out.shape), threads=threads)

    return {
        "out=": lambda: norm(codes, out, threads=threads),
        "in place": lambda: norm(place, place, threads=threads),
        "output in new pages": new_pages,
    }


def _measure(
    groups: Sequence[Mapping[str, Call]], sides: Mapping[str, Callable[[], float]], seconds: float, rest: float
) -> dict[str, list[float]]:
    """Return times of each call; they take turns, so that a busy machine disturbs all alike.

    Before each group there is a rest, in which the threads of other pools fall asleep. `sides` tell their times.
    """
    calls = {name: call for group in groups for name, call in group.items()}
    for call in calls.values():
        call()
    repeats = {name: max(1, int(1e-4 / _seconds(call, 1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in (*calls, *sides)}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < ROUNDS:
        for group in groups:
            if rest:
                time.sleep(rest)
                warm = time.perf_counter() + WARMING
                while time.perf_counter() < warm:
                    next(iter(group.values()))()
            for name, call in group.items():
                # bring the data back into the cache from which the call before drove them, and threads out of sleep
                _seconds(call, UNTIMED)
                times[name].append(statistics.median(_seconds(call, repeats[name]) for _ in range(TURN)))
        for name, side in sides.items():
            times[name].append(side())
    return times


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Return how many times as long a call takes as another: the median over rounds, as machines change their speed."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _peers(codes: npt.NDArray[np.int8], threads: int) -> dict[str, Call]:
    """Return the peers that are installed, on the same int8 codes or on their float32 values."""
    x = codes.astype(np.float32) * np.float32(1 / 16)
    peers: dict[str, Call] = {}
    for module, builder in (("torch", _torch_peers), ("onnxruntime", _onnxruntime_peers)):
        try:
            importlib.import_module(module)
        except ImportError:
            continue
        peers |= builder(codes, x, threads)
    return peers | {"copy int8": _copy(codes, threads)}


def _torch_peers(codes: npt.NDArray[np.int8], x: npt.NDArray[np.float32], threads: int) -> dict[str, Call]:
    import torch

    n = codes.shape[1]
    values = torch.from_numpy(x)
    weight, bias = torch.rand(n), torch.rand(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, but their kernel is there
        quantized = torch._make_per_tensor_quantized_tensor(torch.from_numpy(codes), 1 / 16, 0)
    int8, float32 = torch.ops.quantized.layer_norm, torch.nn.functional.layer_norm
    return {
        "torch int8": lambda: int8(quantized, [n], weight, bias, 1e-5, 12 / 255, 0),
        "torch float32": lambda: float32(values, [n], weight, bias, 1e-5),
    }


@contextmanager
def _threads_of_torch(threads: int) -> Iterator[None]:
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)


def _onnxruntime_peers(codes: npt.NDArray[np.int8], x: npt.NDArray[np.float32], threads: int) -> dict[str, Call]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    n = codes.shape[1]
    node = helper.make_node("LayerNormalization", ["x", "weight", "bias"], ["y"], axis=-1, epsilon=1e-5)
    rng = np.random.default_rng(0)
    constants = [numpy_helper.from_array(rng.random((n,), dtype=np.float32), name) for name in ("weight", "bias")]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", n]) for name in ("x", "y")]
    graph = helper.make_graph([node], "norm", tensors[:1], tensors[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return {"onnxruntime float32": lambda: session.run(None, {"x": x})}


def _copy(codes: npt.NDArray[np.int8], threads: int) -> Call:
    target = np.empty_like(codes)
    if threads == 1:
        return lambda: np.copyto(target, codes)
    from numba import njit

    from . import team

    @njit(nogil=True)
    def part(ticket, target, codes, step):  # type: ignore[no-untyped-def]
        parts = -(-len(codes) // step)
        taken = team.take(ticket, parts)
        while taken >= 0:
            start = taken * step
            for k in range(np.uint64(start), np.uint64(min(start + step, len(codes)))):
                target[k] = codes[k]
            taken = team.take(ticket, parts)

    @njit(nogil=True)
    def copy(offer, target, codes, step):  # type: ignore[no-untyped-def]
        return team.together(offer, part, target, codes, step)

    flat = target.reshape(-1), codes.reshape(-1)
    return lambda: TEAM.call(threads, copy, *flat, -(-codes.size // (4 * threads)))
