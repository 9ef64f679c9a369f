"""What went into a calibration, for the parameter file: choices, ranges, versions, hashes."""

from __future__ import annotations

import hashlib
import importlib.metadata
from os import PathLike
from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import InputError, ModelError
from ..export.loading import Model
from ..hardware import PRESETS, Hardware
from ..params import SideRecord
from .norms import TensorObserver
from .options import Method, SideOptions

#: The method of parameters that come from the model.
FROM_MODEL = "model"
#: Libraries whose version may change the last bit of an activation or of a choice.
_LIBRARIES = ("numpy", "onnx", "onnx-ir")


def side_record(side: SideOptions | None, seen: TensorObserver | None) -> SideRecord:
    """Return how one side's parameters were chosen: by options, or else by the model, and what range was seen."""
    low, high = (float(seen.ranges.low.min()), float(seen.ranges.high.max())) if seen else (None, None)
    if side is None:
        return SideRecord(
            method=FROM_MODEL, scales=None, exponents=None, symmetric=None, narrow_range=None, percentile=None, low=low,
            high=high,
        )  # fmt: skip
    percentile = side.percentile if side.method is Method.PERCENTILE else None
    return SideRecord(
        method=side.method.value, scales=side.scales.value, exponents=side.exponents, symmetric=side.symmetric,
        narrow_range=side.narrow_range, percentile=percentile, low=low, high=high,
    )  # fmt: skip


def hardware_record(hardware: Hardware | str | None) -> str | None:
    """Return the name of a preset, or else the limits in Python."""
    if not isinstance(hardware, Hardware):
        return hardware
    return next((name for name, preset in PRESETS.items() if preset == hardware), repr(hardware))


def versions(*, runtime: bool) -> dict[str, str]:
    """Return the versions of the libraries that computed the parameters, and with `runtime` the activations."""
    found = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    if runtime:
        import onnxruntime

        found["onnxruntime"] = onnxruntime.__version__  # its rival builds share the import name alone
    return found


def model_sha256(model: Model, loaded: ir.Model) -> str:
    """Return the hash of a model's bytes: the file's own, or one over that and those of its external data.

    Raises
    ------
    ModelError
        If a file can't be read.
    InputError
        For a model that has no bytes of its own.
    """
    if isinstance(model, str | PathLike):
        path = Path(model)
        own = _file_sha256(path)
        others = _external_files(loaded)
        if not others:
            return own
        combined = hashlib.sha256(own.encode())
        for name in others:
            combined.update(f"\n{name} {_file_sha256(path.parent / name, 'external data, ')}".encode())
        return combined.hexdigest()
    if isinstance(model, onnx.ModelProto):
        return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    raise InputError("a path or an onnx.ModelProto is expected")


def _file_sha256(path: Path, what: str = "") -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{what}{path} can't be read: {error.strerror}") from error


def _external_files(model: ir.Model) -> list[str]:
    """Return the names of the files that a model keeps tensors in, relative to its folder."""
    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    return sorted({str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)})
