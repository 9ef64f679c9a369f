"""Calibration: quantization parameters from real activations, against the float layer.

`calibrate` takes a layer and arrays; `ModelCalibration` and `calibrate_model` take an ONNX model and feeds.
"""

from __future__ import annotations

from .engine import Engine, LocalEngine
from .layers import NormCalibration, calibrate
from .models import ModelCalibration, calibrate_model
from .norms import NormObserver
from .objective import ModelObjective, Quality
from .options import CalibrationOptions, Method, Scales, SideOptions
from .quantized import QuantizedNorms, quantized_norms
from .tuning import Side, Tuned, tune_model

__all__ = [
    "CalibrationOptions",
    "Engine",
    "LocalEngine",
    "Method",
    "ModelCalibration",
    "ModelObjective",
    "NormCalibration",
    "NormObserver",
    "Quality",
    "QuantizedNorms",
    "Scales",
    "Side",
    "SideOptions",
    "Tuned",
    "calibrate",
    "calibrate_model",
    "quantized_norms",
    "tune_model",
]
