"""Calibrating a norm: observe its input and output, then plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
import numpy.typing as npt

from ..errors import DataError, FxpError
from ..inference import FxpLayerNorm
from ..layer import LayerNorm, RMSNorm
from ..planner import plan
from ..quantization import DType, QuantParams
from ..spec import LayerNormSpec
from . import search
from .observers import MinMaxObserver, Rows, RowSample
from .search import Method

Error = Callable[[QuantParams], float]

#: Elements kept of a norm's input, as whole rows, to choose scales and to measure what the integers lose.
SAMPLED_ELEMENTS = 1 << 18
#: Rows kept at the least.
SAMPLED_ROWS = 64


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
        self._sample = RowSample(max(SAMPLED_ELEMENTS // layer.n, SAMPLED_ROWS))

    @property
    def rows(self) -> int:
        """The number of rows observed."""
        return self._input.rows

    def update(self, x: npt.ArrayLike, y: npt.ArrayLike | None = None) -> None:
        """Take in inputs of shape (..., *normalized_shape), and the float outputs where they are at hand."""
        rows = self.layer.rows(x)
        self._input.update(rows)
        try:
            self._output.update(self.layer.rows(self.layer(x) if y is None else y))
        except DataError as error:
            raise DataError(f"in the norm's output, {error}") from error
        self._sample.update(rows)

    def spec(
        self,
        input: DType | str = DType.INT8,
        output: DType | str = DType.INT8,
        method: Method | str | None = None,
        exponents: int | None = None,
        lane: int | None = None,
    ) -> LayerNormSpec:
        """Return the spec for what was observed; see `calibrate`."""
        if not self.rows:
            raise DataError("there is no row to calibrate with")
        layer = self.layer
        rows = self._sample.rows().astype(np.float64)
        expected = self._normalized(rows)

        def input_error(params: QuantParams) -> float:
            return _power(self._normalized(params.dequantize(params.quantize(rows))) - expected)

        def output_error(params: QuantParams) -> float:
            return _power(params.dequantize(params.quantize(expected)) - expected)

        def choose(dtype: DType, seen: MinMaxObserver, error: Error, smallest_scale: float) -> QuantParams:
            tried = search.candidates(
                dtype, seen.low, seen.high, method=search.parse_method(dtype, method),
                exponents=search.parse_exponents(dtype, exponents), smallest_scale=smallest_scale,
            )  # fmt: skip
            return search.least(tried, error)

        return plan(
            layer,
            choose(DType.parse(input), self._input, input_error, search.smallest_input_scale(layer.n, layer.eps)),
            choose(
                DType.parse(output),
                self._output,
                output_error,
                search.smallest_output_scale(layer.n, layer.gamma, layer.beta),
            ),
            lane=lane,
        )

    def sqnr_db(self, spec: LayerNormSpec) -> float | None:
        """Return the signal to quantization noise of a spec on a sample of the rows; None where one of them is 0."""
        rows = self._sample.rows()
        expected = self._normalized(rows.astype(np.float64))
        norm = FxpLayerNorm(spec)
        codes = norm(spec.input.quantize(rows).reshape(-1, *spec.normalized_shape)).reshape(rows.shape)
        signal, noise = _power(expected), _power(spec.output.dequantize(codes) - expected)
        return 10 * math.log10(signal / noise) if signal and noise else None

    def _normalized(self, rows: Rows) -> Rows:
        return self.layer(rows.reshape(-1, *self.layer.normalized_shape)).reshape(rows.shape)


def calibrate(
    layer: LayerNorm | RMSNorm,
    samples: npt.ArrayLike | Iterable[npt.ArrayLike],
    input: DType | str = "int8",
    output: DType | str = "int8",
    *,
    method: Method | str | None = None,
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
    method : {"minmax", "mse"}, optional
        Which scales are tried; by default ``mse`` for codes of 8 bits and ``minmax`` for 16 bits. Of those tried, the
        input's are chosen for the least error of the norm's output on the samples, and the output's for the least
        error of its values.
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
    calibration = NormCalibration(layer)
    each_sample(samples, calibration.update)
    return calibration.spec(input, output, method, exponents, lane)


def _power(values: Rows) -> float:
    return float(np.sum(np.square(values)))


def each_sample(samples: npt.ArrayLike | Iterable[npt.ArrayLike], update: Callable[[npt.ArrayLike], None]) -> None:
    """Pass on one array, or an iterable's arrays one after the other; an error tells which of them it is about."""
    if not isinstance(samples, Iterable) and not _is_array(samples):
        raise DataError(f"the samples are {samples!r}; an array or an iterable of arrays is expected")
    arrays = cast("Iterable[npt.ArrayLike]", [samples] if _is_array(samples) else samples)
    for index, array in enumerate(arrays):
        try:
            update(array)
        except FxpError as error:
            raise type(error)(f"sample {index}: {error}") from error


def _is_array(samples: object) -> bool:
    """Whether samples are one array rather than an iterable of arrays: NumPy's, or nested lists of numbers."""
    if hasattr(samples, "__array__"):
        return True
    return (
        isinstance(samples, list | tuple) and bool(samples) and not any(hasattr(item, "__array__") for item in samples)
    )
