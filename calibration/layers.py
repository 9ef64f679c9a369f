"""Calibrating a norm: observe its input and output, then plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Unpack, cast

import numpy as np
import numpy.typing as npt

from ..axes import to_rows
from ..errors import DataError, FxpError, PlanError
from ..inference import FxpLayerNorm
from ..layer import LayerNorm, RMSNorm
from ..planner import plan
from ..quantization import DType, QuantParams
from ..spec import LayerNormSpec
from . import search
from .norms import NormObserver, TensorObserver, folds_of, shaped
from .observers import Counts, Floats, Rows
from .options import CalibrationOptions, OptionKeywords, SideOptions


class NormCalibration:
    """Plans specs for one norm from what was observed of it.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm
    observer : NormObserver, optional
        What was observed; by default nothing yet.

    Attributes
    ----------
    observer : NormObserver
    """

    def __init__(self, layer: LayerNorm | RMSNorm, observer: NormObserver | None = None) -> None:
        self.layer = layer
        self.observer = NormObserver(layer) if observer is None else observer

    def spec(self, options: CalibrationOptions) -> LayerNormSpec:
        """Return the spec for what was observed."""
        seen, layer = self.observer, self.layer
        if not seen.rows:
            raise DataError(
                f"all {seen.left_out} rows hold NaN or infinite values" if seen.left_out
                else "there is no row to calibrate with"
            )  # fmt: skip
        rows, folds = seen.sample.rows().astype(np.float64), folds_of(seen.sample.ids)
        expected = self._normalized(rows)

        def input_cost(params: QuantParams) -> float:
            return _power(self._normalized(params.dequantize(params.quantize(rows))) - expected)

        smallest = search.smallest_input_scale(layer.n, layer.eps)
        sample = search.Sample(rows, self._input_weights(rows), folds, input_cost)
        input = search.choose(seen.input, options.input, sample, smallest)
        return self.plan(input, self._output(options, expected, folds), options)

    def _output(self, options: CalibrationOptions, expected: Floats, folds: Counts) -> QuantParams:
        """Return the output's parameters; `expected` is a sample of the outputs, `folds` the rows' parts."""
        layer = self.layer
        smallest = search.smallest_output_scale(layer.n, layer.gamma, layer.beta)
        sample = search.Sample(expected, np.ones((1, 1)), folds)
        return search.choose(self.observer.output, options.output, sample, smallest)

    def spec_with_residual(
        self, options: CalibrationOptions, addends: NormObserver, *, with_sum: bool
    ) -> LayerNormSpec:
        """Return the spec that adds a residual before it normalizes.

        Both addends get codes by the options of the input. `addends` has seen them as its input and output, in the same
        feeds as this norm's own observer their sum.

        Parameters
        ----------
        options : CalibrationOptions
        addends : NormObserver
        with_sum : bool
            Whether the sum is an output too, as 16-bit codes of one scale.
        """
        seen, layer = self.observer, self.layer
        if not (seen.rows and addends.rows):
            raise DataError("there is no row to calibrate with")
        total, first, ids = self._sums(addends)
        expected, weights, folds = self._normalized(total), self._input_weights(total), folds_of(ids)
        smallest = search.smallest_input_scale(layer.n, layer.eps)

        def choose(values: Floats, observer: TensorObserver) -> QuantParams:
            def cost(params: QuantParams) -> float:
                off = params.dequantize(params.quantize(values)) - values
                return _power(self._normalized(total + off) - expected)

            return search.choose(observer, options.input, search.Sample(values, weights, folds, cost), smallest)

        sum_output = None
        if with_sum:
            side = SideOptions(DType.INT16, symmetric=True)
            sum_output = search.choose(seen.input, side, search.Sample(total, weights, folds))
        output = self._output(options, expected, folds)
        input, residual = choose(first, addends.input), choose(total - first, addends.output)
        return self.plan(input, output, options, residual=residual, sum_output=sum_output)

    def spec_with_codes(
        self,
        spec: LayerNormSpec,
        options: CalibrationOptions,
        addends: NormObserver,
        codes: tuple[QuantParams | None, QuantParams | None],
    ) -> LayerNormSpec:
        """Return a spec with a residual whose addends keep the codes that they come from, so as to be rounded once.

        Parameters
        ----------
        spec : LayerNormSpec
            With parameters of the addends' own, which remain where no sum holds the others as well.
        options : CalibrationOptions
        addends : NormObserver
        codes : pair of QuantParams or None
            The parameters of the codes that each addend comes from, if any.
        """
        input, residual = (given or own for given, own in zip(codes, spec.operands, strict=True))
        try:
            other = self.plan(input, spec.output, options, residual=residual, sum_output=spec.sum_output)
        except PlanError:
            return spec
        total, first, _ = self._sums(addends)
        real = [
            values if given is None else given.dequantize(given.quantize(values)).astype(np.float64)
            for values, given in zip((first, total - first), codes, strict=True)
        ]
        return min(other, spec, key=lambda tried: self._signal_and_noise(tried, real)[1])

    def plan(
        self,
        input: QuantParams,
        output: QuantParams,
        options: CalibrationOptions,
        *,
        residual: QuantParams | None = None,
        sum_output: QuantParams | None = None,
    ) -> LayerNormSpec:
        """Return the spec for these quantization parameters, with the options' lane and hardware."""
        return plan(
            self.layer, input, output, residual=residual, sum_output=sum_output, lane=options.lane,
            hardware=options.hardware,
        )  # fmt: skip

    def _input_weights(self, rows: Floats) -> Floats:
        """Return what a small squared error of each input value adds to that of the norm's outputs.

        It is the squared length of a column of the norm's Jacobian: an error moves its own output by gamma over the
        deviation, and all outputs by what it does to the mean and the deviation.
        """
        layer = self.layer
        centred = isinstance(layer, LayerNorm)
        deviations = rows - rows.mean(axis=1, keepdims=True) if centred else rows
        power = np.square(deviations).mean(axis=1, keepdims=True)
        root = np.sqrt(power) + layer.eps if layer.eps_outside else np.sqrt(power + layer.eps)
        normalized = deviations / root
        squares = np.square(layer.gamma)
        sums = [(squares * np.power(normalized, k)).sum(axis=1, keepdims=True) / layer.n for k in range(3)]
        spread = np.square(normalized) * sums[2]
        own = np.square(normalized)
        if centred:
            spread += sums[0] + 2 * normalized * sums[1]
            own += 1
        return np.asarray(np.maximum(squares * (1 - 2 * own / layer.n) + spread / layer.n, 0) / np.square(root))

    def _sums(self, addends: NormObserver) -> tuple[Floats, Floats, npt.NDArray[np.uint64]]:
        """Return a sample of the rows, their first addends, and their numbers."""
        seen, both = self.observer.sample, addends.sample
        ids, own, other = np.intersect1d(seen.ids, both.ids, return_indices=True)
        return seen.rows()[own].astype(np.float64), both.rows()[other].astype(np.float64), ids

    def sqnr_db(self, spec: LayerNormSpec, addends: NormObserver | None = None) -> float | None:
        """Return the signal to quantization noise of a spec on a sample of the rows; None where one of them is 0.

        `addends` has seen what a spec with a residual adds; without, there is no figure for such a spec.
        """
        if spec.residual is None:
            operands: list[Rows] = [self.observer.sample.rows()]
        elif addends is None:
            return None
        else:
            total, first, _ = self._sums(addends)
            operands = [first, total - first]
        signal, noise = self._signal_and_noise(spec, operands)
        return 10 * math.log10(signal / noise) if signal and noise else None

    def _signal_and_noise(self, spec: LayerNormSpec, operands: Sequence[Rows]) -> tuple[float, float]:
        """Return the power of the norm's outputs for real operands of shape (rows, n), and that of their error."""
        quantized = [params.quantize(values) for params, values in zip(spec.operands, operands, strict=True)]
        first, *second = (shaped(self.layer, each) for each in quantized)
        codes = FxpLayerNorm(spec)(first, residual=second[0] if second else None)
        codes = to_rows(codes, spec.normalized_shape, spec.axes)
        expected = self._normalized(np.sum(operands, axis=0, dtype=np.float64))
        return _power(expected), _power(spec.output.dequantize(codes) - expected)

    def _normalized(self, rows: Rows) -> Floats:
        return self.layer.rows(self.layer(shaped(self.layer, rows))).astype(np.float64)


def calibrate(
    layer: LayerNorm | RMSNorm,
    samples: npt.ArrayLike | Iterable[npt.ArrayLike],
    input: DType | str = "int8",
    output: DType | str = "int8",
    **options: Unpack[OptionKeywords],
) -> LayerNormSpec:
    """Return the integer form of a float layer, for scales found on real inputs.

    Parameters
    ----------
    layer : LayerNorm or RMSNorm
    samples : array_like of shape (..., *normalized_shape), or iterable of such arrays
        An iterable is gone through once, an array at a time.
    input, output : {"int8", "uint8", "int16", "uint16"}
        Types of the codes.
    method : {"minmax", "moving_average", "percentile", "mse", "entropy"}, optional
        How the ranges are chosen, see `Method`; by default ``mse`` for codes of 8 bits and ``minmax`` for wider ones.
        ``mse`` takes the input's error as that of the norm's output on the samples, and the output's as that of its
        values.
    input_method, output_method : optional
        The same for one side only.
    scales : {"tensor", "exponents", "channel"}, optional
        How the channels share a scale, see `Scales`: by default ``exponents`` for codes of 8 bits, but ``channel`` for
        outputs by the method ``mse``; ``tensor`` for wider codes.
    input_scales, output_scales : optional
        The same for one side only.
    exponents : int, optional
        The largest channel exponent where there are some, 7 by default; 0 is one scale a tensor.
    symmetric : bool, optional
        Whether the zero point is the middle of the codes; by default not.
    percentile : float, optional
        The share of the values, in percent, that ``percentile`` keeps; by default 99.99.
    lane : {24, 32, 64}, optional
        Bits of the element stage; by default the narrowest with a small bound.
    hardware : Hardware or str, optional
        Limits on the multiplier, the accumulator and the root, or the name of a preset; see `plan`.

    Raises
    ------
    DataError
        If there is no sample, or one holds NaN or infinite values.
    InputError
        If a sample has another trailing shape than the layer, or an option is unknown.
    PlanError
        If the layer doesn't fit the arithmetic.

    Examples
    --------
    >>> import numpy as np, fxp_layernorm as fxp
    >>> x = np.random.default_rng(0).normal(size=(100, 64))
    >>> fxp.calibrate(fxp.LayerNorm(64), x).lane
    32
    """
    chosen = CalibrationOptions.of(input, output, **options)
    observer = NormObserver(layer)

    def update(array: npt.ArrayLike) -> None:
        observer.update(array, first=observer.rows)
        for values, what in ((observer.bad_inputs, ""), (observer.bad_outputs, "in the norm's output, ")):
            if values.any():
                raise DataError(
                    f"{what}{values.sum()} values are NaN or infinite, in {np.count_nonzero(values)} channels of which "
                    f"the first is {np.argmax(values != 0)}"
                )

    each_sample(samples, update)
    return NormCalibration(layer, observer).spec(chosen)


def _power(values: Rows) -> float:
    return float(np.sum(np.square(values)))


def each_sample(samples: npt.ArrayLike | Iterable[npt.ArrayLike], update: Callable[[npt.ArrayLike], None]) -> None:
    """Pass on one array, or an iterable's arrays one after the other; an error tells which of them it is about."""
    if not isinstance(samples, Iterable) and not is_array(samples):
        raise DataError(f"the samples are {samples!r}; an array or an iterable of arrays is expected")
    arrays = cast("Iterable[npt.ArrayLike]", [samples] if is_array(samples) else samples)
    for index, array in enumerate(arrays):
        try:
            update(array)
        except FxpError as error:
            raise type(error)(f"sample {index}: {error}") from error


def is_array(samples: object) -> bool:
    """Whether samples are one array rather than an iterable of arrays: NumPy's, or nested lists of numbers."""
    if hasattr(samples, "__array__"):
        return True
    return (
        isinstance(samples, list | tuple) and bool(samples) and not any(hasattr(item, "__array__") for item in samples)
    )
