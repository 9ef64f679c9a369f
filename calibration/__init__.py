"""Calibration: quantization parameters from real activations, against the float layer.

`calibrate` takes a layer and arrays; `ModelCalibration` and `calibrate_model` take an ONNX model and feeds.
"""

from __future__ import annotations

from .engine import Engine, LocalEngine
from .layers import NormCalibration, calibrate
from .models import ModelCalibration, calibrate_model
from .norms import NormObserver
from .options import CalibrationOptions, Method, SideOptions
from .quantized import QuantizedNorms, quantized_norms

__all__ = [
    "CalibrationOptions",
    "Engine",
    "LocalEngine",
    "Method",
    "ModelCalibration",
    "NormCalibration",
    "NormObserver",
    "QuantizedNorms",
    "SideOptions",
    "calibrate",
    "calibrate_model",
    "quantized_norms",
]
