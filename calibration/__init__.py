"""Calibration: quantization parameters from real activations, against the float layer.

`calibrate` takes a layer and arrays; `ModelCalibration` and `calibrate_model` take an ONNX model and feeds.
"""

from __future__ import annotations

from .layers import NormCalibration, calibrate
from .models import ModelCalibration, calibrate_model
from .observers import MinMaxObserver, RowSample
from .search import Method

__all__ = [
    "Method",
    "MinMaxObserver",
    "ModelCalibration",
    "NormCalibration",
    "RowSample",
    "calibrate",
    "calibrate_model",
]
