"""Calibrating a norm: observe its input and output, then plan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import StrEnum
from typing import cast

import numpy as np
import numpy.typing as npt

from ..errors import DataError, FxpError, InputError
from ..inference import FxpLayerNorm
from ..layer import LayerNorm, RMSNorm
from ..planner import plan
from ..quantization import DType
from ..spec import LayerNormSpec
from . import search
from .observers import MinMaxObserver, RowSample

#: Rows kept to measure what the integers lose.
SAMPLED_ROWS = 256


class Method(StrEnum):
    """How ranges become scales."""

    MINMAX = "minmax"


class NormCalibration:
    """Observes the input and the output of one norm and plans its spec.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm
    """

    def __init__(self, layer: LayerNorm | RMSNorm) -> None:
        self.layer = layer
        self._input = MinMaxObserver(layer.n)
        self._output = MinMaxObserver(layer.n)
        self._sample = RowSample(SAMPLED_ROWS)

    @property
    def rows(self) -> int:
        """The number of rows observed."""
        return self._input.rows

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike | None = None) -> None:
        """Take in inputs of shape (..., *normalized_shape), and the float outputs where they are at hand."""
        rows = self.layer.rows(x)
        self._input.update(rows)
        self._output.update(self.layer.rows(self.layer(x) if y is None else y))
        self._sample.update(rows)

    def spec(
        self,
        input: DType | str = DType.INT8,
        output: DType | str = DType.INT8,
        exponents: int | None = None,
        lane: int | None = None,
    ) -> LayerNormSpec:
        """Return the spec for what was observed; see `calibrate`."""
        if not self.rows:
            raise DataError("there is no row to calibrate with")
        layer, gain = self.layer, np.abs(self.layer.gamma)
        smallest = search.smallest_input_scale(layer.n, layer.eps)
        return plan(
            layer,
            search.find(
                DType.parse(input), self._input.low, self._input.high, gain, exponents, smallest_scale=smallest
            ),
            search.find(DType.parse(output), self._output.low, self._output.high, np.ones(layer.n), exponents),
            lane=lane,
        )

    def sqnr_db(self, spec: LayerNormSpec) -> float | None:
        """Return the signal to quantization noise of a spec on a sample of the rows; None where one of them is 0."""
        rows = self._sample.rows().reshape(-1, *self.layer.normalized_shape)
        expected = self.layer(rows.astype(np.float64))
        noise = float(np.sum(np.square(FxpLayerNorm(spec).forward(rows) - expected)))
        signal = float(np.sum(np.square(expected)))
        return 10 * math.log10(signal / noise) if signal and noise else None


def calibrate(
    layer: LayerNorm | RMSNorm,
    samples: npt.ArrayLike | Iterable[npt.ArrayLike],
    input: DType | str = "int8",
    output: DType | str = "int8",
    *,
    method: Method | str = Method.MINMAX,
    exponents: int | None = None,
    lane: int | None = None,
) -> LayerNormSpec:
    """Return the integer form of a float layer, for scales found on real inputs.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm
    samples : array_like of shape (..., *normalized_shape), or iterable of such arrays
        An iterable is gone through once, an array at a time.
    input, output : {"int8", "uint8", "int16", "uint16"}
        Types of the codes.
    method : {"minmax"}
        How ranges become scales.
    exponents : int, optional
        The largest channel exponent, 0 for one scale a tensor; by default 7 for codes of 8 bits and 0 for 16 bits.
    lane : {24, 32, 64}, optional
        Bits of the element stage; by default the narrowest with a small bound.

    Raises
    ------
    DataError
        If there is no sample, or one holds NaN or infinite values.
    InputError
        If a sample has another trailing shape than the layer.
    PlanError
        If the layer doesn't fit the arithmetic.

    Examples
    --------
    >>> import numpy as np, fxp_layernorm as fxp
    >>> x = np.random.default_rng(0).normal(size=(100, 64))
    >>> fxp.calibrate(fxp.LayerNorm(64), x).lane
    32
    """
    check_method(method)
    calibration = NormCalibration(layer)
    arrays = cast("Iterable[npt.ArrayLike]", [samples] if _is_array(samples) else samples)
    for index, array in enumerate(arrays):
        try:
            calibration.update(array)
        except FxpError as error:
            raise type(error)(f"sample {index}: {error}") from error
    return calibration.spec(input, output, exponents, lane)


def check_method(method: Method | str) -> Method:
    """Return the method of that name; raises InputError if there is none."""
    if method not in list(Method):
        raise InputError(f"the method is {method!r}; it must be one of {', '.join(Method)}")
    return Method(method)


def _is_array(samples: object) -> bool:
    """Whether samples are one array rather than an iterable of arrays: NumPy's, or nested lists of numbers."""
    if hasattr(samples, "__array__"):
        return True
    return isinstance(samples, list | tuple) and not any(hasattr(item, "__array__") for item in samples)
