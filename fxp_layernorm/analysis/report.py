"""What an analysis finds, as frozen dataclasses: JSON with a schema version, and one HTML file."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from .. import files
from ..params import TargetRecord
from .attribution import Attribution

SCHEMA_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class Property:
    """One line of the spec's table."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Width:
    """One accumulator: the largest magnitude it may hold, and how many bits are left below that.

    Attributes
    ----------
    name, meaning : str
    bits : float
        log2 of the limit: magnitudes stay below 2**bits.
    seen, proved : float
        Largest magnitude over all rows analyzed, and the planner's bound for all rows there are.
    headroom_seen, headroom_proved : float
        log2(limit / magnitude), in bits.
    """

    name: str
    meaning: str
    bits: float
    seen: float
    proved: float
    headroom_seen: float
    headroom_proved: float


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts of equally wide bins.

    Attributes
    ----------
    low, high : float
        Ends of the first and of the last bin, in LSB; both are 0 where there was nothing to count.
    counts : tuple of int
    clips : tuple of float
        Where the clip lines stand, in LSB: what lies beyond them saturates. Empty for errors.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    clips: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ErrorSummary:
    """An error in output LSB.

    Attributes
    ----------
    max_lsb, rms_lsb, mean_lsb : float
        Largest magnitude, root mean square, and mean (bias), over all rows.
    percentiles_lsb : dict of str to float
        Of the magnitude, on the sample: keys "50", "90", "99", "99.9".
    histogram : Histogram
        On the sample.
    """

    max_lsb: float
    rms_lsb: float
    mean_lsb: float
    percentiles_lsb: dict[str, float]
    histogram: Histogram


@dataclass(frozen=True, kw_only=True)
class Outlier:
    """A channel that stands out.

    Attributes
    ----------
    channel : int
        Index into the normalized elements, in C order.
    noise_share : float
        Its share of the norm's noise, in real units.
    rms_lsb : float
        Root mean square of its total error, in its own LSB.
    magnitude : float
        Its largest input, as a multiple of the median channel's.
    input_exponent, output_exponent : int
    input_clipped, output_clipped : float
        Shares of its values that were clipped.
    """

    channel: int
    noise_share: float
    rms_lsb: float
    magnitude: float
    input_exponent: int
    output_exponent: int
    input_clipped: float
    output_clipped: float


@dataclass(frozen=True, kw_only=True)
class Channels:
    """The error by channel, over all rows; tuples hold one value a channel."""

    rms_lsb: tuple[float, ...]
    noise_share: tuple[float, ...]
    outliers: tuple[Outlier, ...]


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """How many values were clipped, of `values`, and the channel where most were."""

    values: int
    clipped: int
    low: int
    high: int
    worst_channel: int
    worst_share: float


@dataclass(frozen=True, kw_only=True)
class WorstRow:
    """A row with a large error against the float layer.

    Attributes
    ----------
    row : int
        Its index in the order in which rows came, from 0.
    sample, sample_row : int
        Which array (feed) it was in, and its index there.
    rms_lsb, max_lsb : float
    channel : int
        Where the largest error is.
    """

    row: int
    sample: int
    sample_row: int
    rms_lsb: float
    max_lsb: float
    channel: int


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What to do, why, and the command for it."""

    text: str
    command: str
    norms: tuple[str, ...] = ()


Arrays = dict[str, npt.NDArray[Any]]


class _Report:
    """How both analyses are written and shown."""

    def to_json(self, path: str | Path) -> None:
        """Write the analysis as JSON with its schema version; the file appears whole or not at all."""
        files.save_json(self, path, schema_version=SCHEMA_VERSION)

    def to_html(self, path: str | Path) -> None:
        """Write one HTML file that needs no network, and the worst rows beside it, with the suffix .npz.

        The .npz holds for each norm, by its place in the report from 0, ``norm0_codes`` (input codes),
        ``norm0_float`` (the real rows) and ``norm0_rows`` (their indices), and the first two of a residual too, as
        ``norm0_residual_codes`` and ``norm0_residual_float``.

        Raises
        ------
        MissingDependencyError
            Without matplotlib and Jinja2.
        """
        from .html import page

        target = Path(path)
        beside = target.with_suffix(".npz")
        text = page(self, worst_rows=beside.name)
        with files.atomic_path(beside) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **dict(self._worst_arrays()))  # type: ignore[arg-type]
        with files.atomic_path(target) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str | None:
        """Show the report in a notebook; None, for plain text, without matplotlib and Jinja2."""
        from .html import framed, page

        return framed(lambda: page(self, worst_rows=None))

    def _worst_arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NormAnalysis(_Report):
    """One norm on real rows, against the ideal of the same codes and against the float layer.

    Attributes
    ----------
    name : str
    rows, sampled_rows : int
        Rows analyzed, and those of them, evenly spaced, that attribution, histograms and percentiles are from.
    spec : tuple of Property
    widths : tuple of Width
    proved_bound_lsb : float
        1/2 + excess: no output is further from the clamped ideal of its own input codes.
    proved_terms_lsb : dict of str to float
        The excess by stage, in the channel where it is largest.
    arithmetic : ErrorSummary
        Output minus the clamped ideal of the same codes: what the integers lose after the input is quantized.
    total : ErrorSummary
        Output minus the float layer of the real row: everything that is lost.
    differing : float
        Share of the output codes that differ from the rounded, clamped ideal.
    sqnr_db : float or None
        ``10*log10(sum(y**2) / sum((y_int - y)**2))`` in real units, y the float layer's output, over all rows and
        channels; None where one of the sums is 0.
    cosine : float or None
        ``sum(y*y_int) / sqrt(sum(y**2) * sum(y_int**2))`` over the same values as one vector; None where one is 0.
    attribution : Attribution
    channels : Channels
    input_saturation, residual_saturation, sum_saturation, output_saturation : Saturation
        None where the spec has no residual, or no sum as an output.
    input_histogram, residual_histogram, output_histogram : Histogram
        Of the real values on the scale of their codes, before rounding and clipping.
    worst : tuple of WorstRow
        By the row's root mean square error, the worst first.
    suggestions : tuple of Suggestion
    worst_rows : dict of str to ndarray
        What goes into the .npz; not in the JSON.
    """

    __pydantic_config__ = {**files.STRICT, "arbitrary_types_allowed": True}  # noqa: RUF012

    name: str
    rows: int
    sampled_rows: int
    spec: tuple[Property, ...]
    widths: tuple[Width, ...]
    proved_bound_lsb: float
    proved_terms_lsb: dict[str, float]
    arithmetic: ErrorSummary
    total: ErrorSummary
    differing: float
    sqnr_db: float | None
    cosine: float | None
    attribution: Attribution
    channels: Channels
    input_saturation: Saturation
    residual_saturation: Saturation | None
    sum_saturation: Saturation | None
    output_saturation: Saturation
    input_histogram: Histogram
    residual_histogram: Histogram | None
    output_histogram: Histogram
    worst: tuple[WorstRow, ...]
    suggestions: tuple[Suggestion, ...]
    worst_rows: Annotated[Arrays, Field(exclude=True)] = field(default_factory=dict, repr=False, compare=False)

    def _worst_arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        yield from ((f"norm0_{key}", array) for key, array in self.worst_rows.items())


@dataclass(frozen=True, kw_only=True)
class OutputError:
    """One output of a model against the float model's, as `verify` has it."""

    name: str
    cosine: float
    sqnr_db: float | None
    max_abs: float | None

    @property
    def severity(self) -> tuple[float, float]:
        """A key that sorts outputs, the worst first: those with other NaN or infinities, then by SQNR."""
        if self.max_abs is None:
            return (-math.inf, 0.0)
        return (math.inf if self.sqnr_db is None else self.sqnr_db, -self.max_abs)


@dataclass(frozen=True, kw_only=True)
class Harm:
    """The model's outputs when only this norm is an integer one; `norm` is None for all of them together."""

    norm: str | None
    outputs: tuple[OutputError, ...]

    @property
    def worst(self) -> OutputError:
        """The output that is hurt most."""
        return min(self.outputs, key=lambda output: output.severity)


@dataclass(frozen=True, kw_only=True)
class ModelAnalysis(_Report):
    """All norms of a model, and what each does to the model's outputs.

    Attributes
    ----------
    model, data : str
        As they were named.
    feeds, harm_feeds : int
        Feeds analyzed, and the first of them that `harm` was measured on.
    harm : tuple of Harm
        One for each norm, the lowest SQNR of an output first.
    together : Harm
        All norms at once.
    suggestions : tuple of Suggestion
        Those of all norms, equal commands once, for the most harmful norm first.
    norms : tuple of NormAnalysis
        In the model's order.
    compared_feeds : int
        The feeds that `calibrate` compared the model's outputs on.
    target : TargetRecord or None
        The target that `calibrate` chose the formats for, with its trade-off curve.
    """

    model: str
    data: str
    feeds: int
    harm_feeds: int
    harm: tuple[Harm, ...]
    together: Harm
    suggestions: tuple[Suggestion, ...]
    norms: tuple[NormAnalysis, ...]
    compared_feeds: int
    target: TargetRecord | None

    def _worst_arrays(self) -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for index, norm in enumerate(self.norms):
            yield from ((f"norm{index}_{key}", array) for key, array in norm.worst_rows.items())
