"""Operators that ONNX's reference lacks in float64: it has them as functions of float32."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx.reference.op_run import OpRun

Array = npt.NDArray[Any]


class MeanVarianceNormalization(OpRun):
    """``(x - mean) / (deviation + 1e-9)`` over any axes."""

    def _run(self, x: Array, axes: Iterable[int]) -> tuple[Array]:
        axes = tuple(axes)
        return ((x - x.mean(axes, keepdims=True)) / (x.std(axes, keepdims=True) + 1e-9),)


class GroupNormalization(OpRun):
    """That of one group: of all but the first dimension, with a gain and an offset for each element of the second."""

    def _run(self, x: Array, scale: Array, bias: Array, *, epsilon: float, **_: Any) -> tuple[Array]:
        axes = tuple(range(1, x.ndim))
        normalized = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + epsilon)
        gain, offset = (one.reshape(-1, *[1] * (x.ndim - 2)) for one in (scale, bias))
        return (normalized * gain + offset,)
