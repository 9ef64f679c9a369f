"""Analyzing a norm: real rows go by, an array at a time, and its integers are held against them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..axes import stacked
from ..calibration.layers import each_sample, is_array
from ..calibration.observers import MinMaxObserver, RowSample, row_ids
from ..errors import DataError, InputError
from ..layer import LayerNorm, RMSNorm
from ..proof import NormKind
from ..quantization import LARGEST_SCALE, QuantParams
from ..reference import ideal
from ..spec import LayerNormSpec
from . import advice, stages, tables
from .advice import Command
from .attribution import attribute
from .report import (
    Arrays,
    Channels,
    ErrorSummary,
    Histogram,
    NormAnalysis,
    Outlier,
    Saturation,
    WorstRow,
)

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.floating[Any]]

#: Elements kept, as whole rows, for attribution, histograms and percentiles; rows kept at the least.
SAMPLED_ELEMENTS, SAMPLED_ROWS = 1 << 19, 64
BINS = 64
WORST_ROWS = 8
OUTLIERS = 10
#: A channel stands out if its largest input, or its noise, is this many times the median channel's.
OUTLIER_MAGNITUDE, OUTLIER_NOISE = 6.0, 16.0
PERCENTILES = (50, 90, 99, 99.9)


class NormAnalyzer:
    """Takes real rows of one norm, in memory bounded by one array, and says where its integers lose what.

    Parameters
    ----------
    spec : LayerNormSpec
    name : str
    command : Command, optional
        What suggestions name.
    """

    def __init__(self, spec: LayerNormSpec, name: str = "norm", command: Command | None = None) -> None:
        self.spec, self.name = spec, name
        self.layer = _layer(spec, spec.axes)
        #: The same with the normalized dimensions last, where rows have them.
        self._of_rows = replace(spec, axes=tuple(range(-len(spec.axes), 0)))
        self._command = command or Command()
        self._steps = stages.output_steps(spec)
        self._sample = RowSample(max(SAMPLED_ELEMENTS // spec.n, SAMPLED_ROWS), spec.n * len(spec.operands))
        self._input, self._output = MinMaxObserver(spec.n * len(spec.operands)), MinMaxObserver(spec.n)
        self._arithmetic, self._total = _ErrorSums(spec.n), _ErrorSums(spec.n)
        self._clipped_in = [_Clips(params, spec.n) for params in spec.operands]
        self._clipped_out = _Clips(spec.output, spec.n)
        self._clipped_sum = None if spec.sum_output is None else _Clips(spec.sum_output, spec.n)
        self._differing = 0
        self._signal = self._integer_power = self._product = 0.0
        self._seen: dict[str, float] = {}
        self._worst: list[tuple[float, int, WorstRow, Rows]] = []
        self._arrays = 0

    @property
    def rows(self) -> int:
        """The number of rows taken in."""
        return self._input.rows

    def update(self, x: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> None:
        """Take in real inputs, and the residual's where the spec adds one, with the layer's dimensions.

        Raises
        ------
        DataError
            If a value is NaN, infinite or beyond float32's range.
        InputError
            If the normalized shape is another, or a residual is missing, superfluous or of another shape.
        """
        if (residual is None) is not (self.spec.residual is None):
            raise InputError(
                "the spec adds a residual: give its values too" if residual is None else "the spec adds no residual"
            )
        if residual is not None and np.shape(x) != np.shape(residual):
            raise InputError(f"the residual has the shape {np.shape(residual)}; the input has {np.shape(x)}")
        rows = self.layer.rows(x)
        if residual is not None:
            rows = np.concatenate([rows, self.layer.rows(residual)], axis=1)
        first = self.rows
        self._input.update(rows)
        if rows.size and float(np.abs(rows).max()) > LARGEST_SCALE:
            raise DataError(f"a value is {float(np.abs(rows).max()):.3g}, beyond float32's range")
        self._sample.update(rows, row_ids(0, first, len(rows)))
        step = max(1, stages.BLOCK_ELEMENTS // self.spec.n)
        for start in range(0, len(rows), step):
            self._block(rows[start : start + step], first + start, start)
        self._arrays += 1

    def result(self) -> NormAnalysis:
        """Return the analysis of all rows so far; raises DataError if there is none."""
        if not self.rows:
            raise DataError("there is no row to analyze")
        spec, sample = self.spec, self._sample.rows()
        expected = stages.float_layer(spec, sample)
        y = stages.compute(spec, sample).y.astype(np.float64)
        attribution = attribute(spec, sample)
        noise = self._total.squares * np.square(self._steps)
        channels = self._channels(noise)
        clipped_in = [clips.result(self.rows) for clips in self._clipped_in]
        clipped_out = self._clipped_out.result(self.rows)
        inputs = [
            _positions(stages.positions(params, values), params)
            for params, values in zip(spec.operands, stages.operands(spec, sample), strict=True)
        ]
        worst = sorted(self._worst, key=lambda entry: entry[2].rms_lsb, reverse=True)
        product = math.sqrt(self._signal * self._integer_power)
        return NormAnalysis(
            name=self.name,
            rows=self.rows,
            sampled_rows=len(sample),
            spec=tables.properties(spec),
            widths=tables.widths(spec, self._seen),
            proved_bound_lsb=0.5 + float(spec.excess),
            proved_terms_lsb=dict(spec.excess.terms),
            arithmetic=self._arithmetic.result(self.rows, y - self._clamped_ideal(sample)),
            total=self._total.result(self.rows, y - expected),
            differing=self._differing / (self.rows * spec.n),
            sqnr_db=10 * math.log10(self._signal / noise.sum()) if self._signal and noise.any() else None,
            cosine=self._product / product if product else None,
            attribution=attribution,
            channels=channels,
            input_saturation=clipped_in[0],
            residual_saturation=clipped_in[1] if len(clipped_in) > 1 else None,
            sum_saturation=None if self._clipped_sum is None else self._clipped_sum.result(self.rows),
            output_saturation=clipped_out,
            input_histogram=inputs[0],
            residual_histogram=inputs[1] if len(inputs) > 1 else None,
            output_histogram=_positions(expected, spec.output),
            worst=tuple(entry[2] for entry in worst),
            suggestions=advice.for_norm(
                self.name, _layer(spec, self._of_rows.axes), spec, attribution, (clipped_in[0], clipped_out), sample,
                (self._input, self._output), self._command,
            ) if spec.adder is None else (),
            worst_rows=self._worst_rows(np.stack([entry[3] for entry in worst]), worst),
        )  # fmt: skip

    def _block(self, rows: Rows, first: int, sample_row: int) -> None:
        spec = self.spec
        expected = stages.float_layer(spec, rows)
        computed = stages.compute(spec, rows)
        y = computed.y.astype(np.float64)
        clamped = self._clamped_ideal(rows)
        total = y - expected
        self._arithmetic.update(y - clamped)
        self._total.update(total)
        self._differing += int(np.count_nonzero(y != np.floor(clamped + 0.5)))
        zeros = spec.output.channel_zeros(spec.n)
        real = (expected - zeros) * self._steps
        integer = (y - zeros) * self._steps
        self._output.update(real)
        self._signal += float(np.square(real).sum())
        self._integer_power += float(np.square(integer).sum())
        self._product += float((real * integer).sum())
        operands = stages.operands(spec, rows)
        for clips, params, values in zip(self._clipped_in, spec.operands, operands, strict=True):
            clips.update(stages.positions(params, values))
        if self._clipped_sum is not None and spec.sum_output is not None:
            self._clipped_sum.update(stages.positions(spec.sum_output, np.sum(operands, axis=0)))
        self._clipped_out.update(expected)
        for name, magnitude in tables.magnitudes(computed).items():
            self._seen[name] = max(self._seen.get(name, 0.0), magnitude)
        self._remember_worst(rows, total, first, sample_row)

    def _clamped_ideal(self, rows: Rows) -> Floats:
        spec = self.spec
        codes = [codes.reshape(-1, *spec.normalized_shape) for codes in self._codes(rows)]
        values = ideal(self._of_rows, *codes).reshape(-1, spec.n)
        clamped: Floats = np.clip(values, spec.output.lo, spec.output.hi).astype(np.float64)
        return clamped

    def _codes(self, rows: Rows) -> list[npt.NDArray[Any]]:
        operands = stages.operands(self.spec, rows)
        return [params.quantize(values) for params, values in zip(self.spec.operands, operands, strict=True)]

    def _remember_worst(self, rows: Rows, total: Floats, first: int, sample_row: int) -> None:
        power = np.square(total).mean(axis=1)
        for index in np.argsort(power)[-WORST_ROWS:].tolist():
            entry = WorstRow(
                row=first + index, sample=self._arrays, sample_row=sample_row + index,
                rms_lsb=math.sqrt(power[index]), max_lsb=float(np.abs(total[index]).max()),
                channel=int(np.abs(total[index]).argmax()),
            )  # fmt: skip
            # the row's index settles ties, the earlier row first
            item = (entry.rms_lsb, -entry.row, entry, rows[index].copy())
            if len(self._worst) < WORST_ROWS:
                heapq.heappush(self._worst, item)
            else:
                heapq.heappushpop(self._worst, item)

    def _worst_rows(self, rows: Rows, worst: list[tuple[float, int, WorstRow, Rows]]) -> Arrays:
        spec = self.spec
        arrays = dict(zip(("codes", "residual_codes"), self._codes(rows), strict=False))
        arrays |= dict(zip(("float", "residual_float"), stages.operands(spec, rows), strict=False))
        indices = np.array([entry.row for *_, entry, _ in worst], dtype=np.int64)
        placed = {name: stacked(values, spec.normalized_shape, spec.axes) for name, values in arrays.items()}
        return placed | {"rows": indices}

    def _channels(self, noise: Floats) -> Channels:
        spec, rms = self.spec, np.sqrt(self._total.squares / self.rows)
        share = noise / noise.sum() if noise.any() else np.zeros(spec.n)
        magnitude = np.maximum(np.abs(self._input.low), np.abs(self._input.high)).reshape(-1, spec.n).max(axis=0)
        relative = magnitude / (float(np.median(magnitude)) or float(magnitude.max()) or 1.0)
        odd = (relative > OUTLIER_MAGNITUDE) | (share > OUTLIER_NOISE * np.median(share))
        ranked = [channel for channel in np.argsort(-share, kind="stable").tolist() if odd[channel]]
        inputs, outputs = spec.input.channel_exponents(spec.n), spec.output.channel_exponents(spec.n)
        return Channels(
            rms_lsb=tuple(rms.tolist()),
            noise_share=tuple(share.tolist()),
            outliers=tuple(
                Outlier(
                    channel=c, noise_share=float(share[c]), rms_lsb=float(rms[c]), magnitude=float(relative[c]),
                    input_exponent=inputs[c], output_exponent=outputs[c],
                    input_clipped=float(self._clipped_in[0].by_channel[c] / self.rows),
                    output_clipped=float(self._clipped_out.by_channel[c] / self.rows),
                )
                for c in ranked[:OUTLIERS]
            ),
        )  # fmt: skip


def analyze(
    spec: LayerNormSpec,
    samples: npt.ArrayLike | Iterable[npt.ArrayLike],
    residuals: npt.ArrayLike | Iterable[npt.ArrayLike] | None = None,
    *,
    name: str = "norm",
) -> NormAnalysis:
    """Return where the integers of a spec lose what, on real inputs.

    Parameters
    ----------
    spec : LayerNormSpec
    samples : array_like with the spec's normalized dimensions, or iterable of such arrays
        Real inputs of the norm. An iterable is gone through once, an array at a time.
    residuals : array_like or iterable of arrays, optional
        The second operand of a spec that adds one, array by array as the samples.
    name : str
        How the report names the norm.

    Raises
    ------
    DataError
        If there is no sample, or one holds values that are NaN, infinite or beyond float32's range.
    InputError
        If a sample has another normalized shape than the spec, or residuals are missing or superfluous.

    Examples
    --------
    >>> import numpy as np, fxp_layernorm as fxp
    >>> x = np.random.default_rng(0).normal(size=(100, 64))
    >>> report = fxp.analyze(fxp.calibrate(fxp.LayerNorm(64), x), x)
    >>> report.arithmetic.max_lsb < report.proved_bound_lsb
    True
    """
    analyzer = NormAnalyzer(spec, name)
    arrays = cast(
        "Iterable[npt.ArrayLike]", () if residuals is None else [residuals] if is_array(residuals) else residuals
    )
    added = None if residuals is None else iter(arrays)

    def update(array: npt.ArrayLike) -> None:
        analyzer.update(array, None if added is None else next(added, None))

    each_sample(samples, update)
    if added is not None and next(added, None) is not None:
        raise InputError("there are more residuals than samples")
    return analyzer.result()


class _ErrorSums:
    """Sums of an error over all rows."""

    def __init__(self, n: int) -> None:
        self.squares = np.zeros(n)
        self._sum = self._largest = 0.0

    def update(self, error: Floats) -> None:
        self.squares += np.square(error).sum(axis=0)
        self._sum += float(error.sum())
        self._largest = max(self._largest, float(np.abs(error).max()))

    def result(self, rows: int, sampled: Floats) -> ErrorSummary:
        count = rows * len(self.squares)
        magnitude = np.abs(sampled)
        end = max(0.5, float(np.percentile(magnitude, PERCENTILES[-1])))
        values = np.percentile(magnitude, PERCENTILES)
        counts, _ = np.histogram(np.clip(sampled, -end, end), BINS, (-end, end))
        return ErrorSummary(
            max_lsb=self._largest,
            rms_lsb=math.sqrt(self.squares.sum() / count),
            mean_lsb=self._sum / count,
            percentiles_lsb={f"{key:g}": float(value) for key, value in zip(PERCENTILES, values, strict=True)},
            histogram=Histogram(low=-end, high=end, counts=tuple(counts.tolist())),
        )


class _Clips:
    """Counts of values beyond the codes of some parameters, by channel."""

    def __init__(self, params: QuantParams, n: int) -> None:
        self._ends = params.lo - 0.5, params.hi + 0.5
        self._low, self._high = np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64)

    @property
    def by_channel(self) -> npt.NDArray[np.int64]:
        return self._low + self._high

    def update(self, positions: Floats) -> None:
        self._low += np.count_nonzero(positions < self._ends[0], axis=0)
        self._high += np.count_nonzero(positions > self._ends[1], axis=0)

    def result(self, rows: int) -> Saturation:
        clipped = self.by_channel
        worst = int(clipped.argmax())
        return Saturation(
            values=rows * len(clipped), clipped=int(clipped.sum()), low=int(self._low.sum()),
            high=int(self._high.sum()), worst_channel=worst, worst_share=float(clipped[worst] / rows),
        )  # fmt: skip


def _positions(positions: Floats, params: QuantParams) -> Histogram:
    """Return the histogram of real values on the scale of their codes, with what is clipped in view."""
    clips = params.lo - 0.5, params.hi + 0.5
    margin = (clips[1] - clips[0]) / 8
    low = max(float(positions.min()), clips[0] - 4 * margin)
    high = min(float(positions.max()), clips[1] + 4 * margin)
    low, high = min(low, clips[0] - margin), max(high, clips[1] + margin)
    counts, _ = np.histogram(np.clip(positions, low, high), BINS, (low, high))
    return Histogram(low=low, high=high, counts=tuple(counts.tolist()), clips=clips)


def _layer(spec: LayerNormSpec, axes: tuple[int, ...]) -> LayerNorm | RMSNorm:
    shape = spec.normalized_shape
    if spec.kind is NormKind.RMSNORM:
        rms = RMSNorm(shape, spec.eps, eps_outside=spec.eps_outside, axes=axes)
        rms.weight = np.array(spec.gamma).reshape(shape)
        return rms
    layer = LayerNorm(shape, spec.eps, eps_outside=spec.eps_outside, axes=axes)
    layer.weight, layer.bias = np.array(spec.gamma).reshape(shape), np.array(spec.beta).reshape(shape)
    return layer
