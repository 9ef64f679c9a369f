"""Integer LayerNorm for hardware without floating point: exact to the last bit, with a proved error.

The way through the package: a float layer (`LayerNorm`, `RMSNorm`) and its quantization parameters (`QuantParams`,
found by `calibrate`) are planned into a `LayerNormSpec`, which runs as Python integers (`reference`), as a compiled
kernel (`FxpLayerNorm`) and as an ONNX graph (`export`), with the same bits.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import reference
from ._version import __version__
from .errors import (
    CodeTypeError,
    DataError,
    EngineError,
    FxpError,
    InputError,
    MissingDependencyError,
    ModelError,
    PlanError,
    SpecFileError,
    WidthError,
)
from .hardware import Hardware
from .inference import FxpLayerNorm
from .layer import LayerNorm, RMSNorm
from .planner import hardware_costs, plan
from .proof import Excess, NormKind
from .quantization import DType, QuantParams
from .spec import LayerNormSpec

if TYPE_CHECKING:
    from . import analysis, calibration, export
    from .analysis import analyze, sweep
    from .calibration import calibrate

__all__ = [
    "CodeTypeError",
    "DType",
    "DataError",
    "EngineError",
    "Excess",
    "FxpError",
    "FxpLayerNorm",
    "Hardware",
    "InputError",
    "LayerNorm",
    "LayerNormSpec",
    "MissingDependencyError",
    "ModelError",
    "NormKind",
    "PlanError",
    "QuantParams",
    "RMSNorm",
    "SpecFileError",
    "WidthError",
    "__version__",
    "analysis",
    "analyze",
    "calibrate",
    "calibration",
    "export",
    "hardware_costs",
    "plan",
    "reference",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import what needs ONNX only when it is used, so that the import of the package stays fast."""
    if name in ("analysis", "calibration", "export"):
        return importlib.import_module(f".{name}", __name__)
    if name == "calibrate":
        return importlib.import_module(".calibration", __name__).calibrate
    if name in ("analyze", "sweep"):
        return getattr(importlib.import_module(".analysis", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
