"""What quantized norms do to a model's outputs, measured on some of the data."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..export.checks import OutputCheck
from ..export.loading import Model
from ..runtime import Feed, Feeds
from .simulation import Sides, Simulation

#: Elements of the outputs that are compared at the most, in whole feeds: enough to tell scales apart, and few enough to
#: run the model a hundred times.
COMPARED_ELEMENTS = 1 << 18
#: Bytes of feeds and float outputs kept at the most.
HELD_BYTES = 256 << 20


@dataclass(frozen=True)
class Quality:
    """What the model's outputs are like, against the float model's.

    Attributes
    ----------
    noise : float
        Power of the error over that of the float output, the sum over the outputs. What several norms add to it is the
        sum of what each adds alone, as long as it is small: their rounding errors know nothing of each other.
    cosine : float
        Of the worst output, all its values taken as one vector.
    sqnr_db : float
        Signal to quantization noise of the worst output; infinite without any error.
    max_lsb : float
        The largest error of any output value, in 1/255 of that output's range.
    """

    noise: float
    cosine: float
    sqnr_db: float
    max_lsb: float


@dataclass(frozen=True)
class _Held:
    feed: Feed
    outputs: dict[str, npt.NDArray[Any]]


class ModelObjective:
    """Measures the model's outputs under choices of quantization parameters.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model
    norms : iterable of str
        The norms that may be quantized.
    feeds : Feeds
        Of these, the first are kept and compared, as many as fit into `COMPARED_ELEMENTS` and `HELD_BYTES`.

    residuals : bool
        Whether norms that follow the sum of two tensors may add these themselves.

    Attributes
    ----------
    feeds : int
        How many are compared.
    """

    def __init__(self, model: Model, norms: Iterable[str], feeds: Feeds, *, residuals: bool = False) -> None:
        self._simulation = Simulation(model, norms, residuals=residuals)
        self._held: list[_Held] = []
        self._ranges: dict[str, tuple[float, float]] = {}
        elements = size = 0
        for feed in feeds:
            outputs = self._simulation.run(feed, {})
            outputs = {name: values for name, values in outputs.items() if values.dtype.kind == "f"}
            elements += sum(values.size for values in outputs.values())
            size += sum(array.nbytes for array in [*feed.values(), *outputs.values()])
            if self._held and (elements > COMPARED_ELEMENTS or size > HELD_BYTES):
                break
            self._held.append(_Held(feed, outputs))
            for name, values in outputs.items():
                low, high = self._ranges.get(name, (math.inf, -math.inf))
                finite = values[np.isfinite(values)]
                self._ranges[name] = float(finite.min(initial=low)), float(finite.max(initial=high))
        self.feeds = len(self._held)
        self._pool = ThreadPoolExecutor(min(os.cpu_count() or 1, self.feeds))

    def measure(self, choice: Mapping[str, Sides]) -> Quality:
        """Return what the outputs are like with the norms of `choice` quantized so, and all others in floats.

        Where the float model's own are NaN or infinite, whatever comes out is as good.
        """
        checks = {name: OutputCheck(name) for name in self._ranges}
        results = self._pool.map(lambda held: self._simulation.run(held.feed, choice), self._held)
        for held, actual in zip(self._held, results, strict=True):
            for name, check in checks.items():
                expected = held.outputs[name]
                check.update(expected, np.where(np.isfinite(expected), actual[name], expected))
        spans = {name: (high - low) / 255 for name, (low, high) in self._ranges.items()}
        decibels = [math.inf if check.sqnr_db is None else check.sqnr_db for check in checks.values()]
        return Quality(
            noise=sum(10 ** (-value / 10) for value in decibels),
            cosine=min((check.cosine for check in checks.values()), default=1.0),
            sqnr_db=min(decibels, default=math.inf),
            max_lsb=max((_lsb(check.max_abs, spans[name]) for name, check in checks.items()), default=0.0),
        )


def _lsb(error: float | None, span: float) -> float:
    """Return an error in units of the span; a NaN that only one model has counts as infinite."""
    if error is None:
        return math.inf
    return error / span if span > 0 else math.inf if error else 0.0
