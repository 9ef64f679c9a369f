"""The report's figures: small inline SVGs that take the page's text colour, in the colours of Okabe and Ito.

A colour means one thing everywhere: `COLOURS`.
"""

from __future__ import annotations

import io
import math
import re
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from .stages import Stage

if TYPE_CHECKING:
    from ..params import TargetRecord
    from .report import Harm, Histogram, NormAnalysis
    from .sweeps import Point

#: What each colour of the palette stands for.
COLOURS = {
    "input": "#0072B2",
    "rows": "#009E73",
    "elements": "#E69F00",
    "output": "#D55E00",
    "clipping": "#CC79A7",
    "bound": "#56B4E9",
}
_KINDS = {
    Stage.INPUT: "input", Stage.INPUT_SATURATION: "clipping", Stage.SUM: "input", Stage.EPS: "rows", Stage.ROOT: "rows",
    Stage.MEAN: "rows", Stage.T: "elements", Stage.GAMMA: "elements", Stage.BETA: "elements",
    Stage.OUTPUT: "output", Stage.OUTPUT_SATURATION: "clipping",
}  # fmt: skip
#: Stands for the page's text colour until the SVG is written.
_TEXT = "#010203"
_GREY = "#808080"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none", "font.size": 9, "figure.facecolor": "none", "axes.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.use_mathtext": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT),
}  # fmt: skip
#: Where two plots stand side by side.
_PAIR: dict[str, Any] = {"left": 0.13, "right": 0.98, "bottom": 0.25, "top": 0.97, "wspace": 0.22}
#: Channels drawn by themselves; of more, each bar is the largest of several.
_BARS = 192


class NormPlots:
    """Draws the figures of a page's norms, each on the axes of the last one of its kind, which take the most time."""

    def __init__(self) -> None:
        self._drawn: dict[tuple[str, int], tuple[Figure, list[Any]]] = {}

    def attribution(self, norm: NormAnalysis) -> str:
        """Return bars of the noise by stage."""
        terms = norm.attribution.terms
        names = [term.stage for term in terms] + ["interaction"]
        shares = [100 * term.share for term in terms] + [100 * norm.attribution.interaction_share]
        colours = [COLOURS[_KINDS[Stage(term.stage)]] for term in terms] + [_GREY]
        with _style(f"attribution {norm.name}"):
            figure, (axes,) = self._axes("attribution", {"left": 0.27, "right": 0.97, "bottom": 0.17, "top": 0.98})
            axes.barh(range(len(names)), shares, color=colours)
            axes.axvline(0, color=_TEXT, linewidth=0.8)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.set_xlabel("share of the noise, %")
            return _svg(figure, f"Noise of {norm.name} by stage")

    def errors(self, norm: NormAnalysis) -> str:
        """Return histograms of both errors, the first with the proved bound."""
        bound = norm.proved_bound_lsb
        with _style(f"errors {norm.name}"):
            figure, (left, right) = self._axes("errors", _PAIR, 2, sharey=True)
            _bars(left, norm.arithmetic.histogram, COLOURS["elements"])
            for end in (-bound, bound):
                left.axvline(end, color=COLOURS["bound"], linestyle="--", linewidth=1.2)
            left.set_xlabel("against the ideal, LSB\n(dashed: proved bound)")
            _bars(right, norm.total.histogram, _GREY)
            right.set_xlabel("against the float layer,\nLSB")
            left.set_ylabel("outputs")
            return _svg(figure, f"Errors of {norm.name}")

    def codes(self, norm: NormAnalysis) -> str:
        """Return histograms of the input and the output on the scale of their codes, with clip lines."""
        histograms = {"input": norm.input_histogram, "output": norm.output_histogram}
        if norm.residual_histogram is not None:
            histograms = {"input": norm.input_histogram, "residual": norm.residual_histogram, **histograms}
        with _style(f"codes {norm.name}"):
            figure, drawn = self._axes("codes", _PAIR, len(histograms))
            for axes, (name, histogram) in zip(drawn, histograms.items(), strict=True):
                _bars(axes, histogram, COLOURS["input" if name == "residual" else name])
                for clip in histogram.clips:
                    axes.axvline(clip, color=COLOURS["clipping"], linewidth=1.2)
                axes.set_xlabel(f"{name} code, LSB\n(lines: clipped beyond)")
            drawn[0].set_ylabel("values")
            return _svg(figure, f"Inputs and outputs of {norm.name}")

    def channels(self, norm: NormAnalysis) -> str:
        """Return the total error by channel."""
        rms = np.array(norm.channels.rms_lsb)
        group = -(-len(rms) // _BARS)
        edges = np.append(np.arange(0, len(rms), group), len(rms))
        tops = np.maximum.reduceat(rms, edges[:-1])
        with _style(f"channels {norm.name}"):
            figure, (axes,) = self._axes("channels", {"left": 0.12, "right": 0.97, "bottom": 0.17, "top": 0.97})
            axes.stairs(tops, edges, fill=True, color=_GREY)
            axes.set_xlabel("channel" if group == 1 else f"channel (the largest of {group})")
            axes.set_ylabel("RMS error, LSB")
            return _svg(figure, f"Error of {norm.name} by channel")

    def _axes(
        self, kind: str, place: dict[str, Any], count: int = 1, *, sharey: bool = False
    ) -> tuple[Figure, list[Any]]:
        """Return a figure and its axes side by side, without what was drawn on them."""
        if (kind, count) not in self._drawn:
            figure = Figure(figsize=(4.6, 2.6))
            side_by_side = figure.subplots(1, count, squeeze=False, sharey=sharey, gridspec_kw=place)[0]
            self._drawn[kind, count] = figure, list(side_by_side)
        figure, drawn = self._drawn[kind, count]
        for axes in drawn:
            for artist in (*axes.patches, *axes.lines):
                artist.remove()
            axes.ignore_existing_data_limits = True
        return figure, drawn


def harm(entries: tuple[Harm, ...]) -> str:
    """Return the model's noise with each norm as an integer one, the worst first."""
    noise = [0.0 if entry.worst.sqnr_db is None else 10 ** (-entry.worst.sqnr_db / 10) for entry in entries]
    with _style("harm"):
        figure = Figure(figsize=(7.0, 2.4))
        axes = figure.add_axes((0.1, 0.19, 0.88, 0.78))
        axes.stairs([100 * value for value in noise], np.arange(len(noise) + 1) + 0.5, fill=True, color=_GREY)
        axes.set_xlabel("norm, by rank")
        axes.set_ylabel("noise power, %\nof the output's")
        return _svg(figure, "The model's noise by norm")


def trade_off(target: TargetRecord) -> str:
    """Return what the model's outputs reach over what the formats cost, with the target and the chosen formats."""
    values = [_distance(target, getattr(point, target.metric)) for point in (*target.curve, target.chosen)]
    costs = [point.cost_pj for point in (*target.curve, target.chosen)]
    with _style("trade-off"):
        figure = Figure(figsize=(7.0, 2.6))
        axes = figure.add_axes((0.1, 0.17, 0.88, 0.8))
        axes.plot(costs[:-1], values[:-1], color=_GREY, marker="o", markersize=4, linewidth=0.8)
        axes.plot(costs[-1:], values[-1:], color=COLOURS["output"], marker="D", markersize=7)
        axes.axhline(_distance(target, target.value), color=COLOURS["bound"], linestyle="--", linewidth=1.2)
        if target.metric != "sqnr_db":
            axes.set_yscale("log")
        axes.set_xlabel("pJ an element (diamond: chosen, dashed: target)")
        axes.set_ylabel(_METRICS[target.metric])
        return _svg(figure, "What the model's outputs reach over cost")


#: How the figure of a target is labelled.
_METRICS = {"cosine": "1 - cosine", "sqnr_db": "SQNR, dB", "max_lsb": "largest error, 255ths"}


def _distance(target: TargetRecord, value: float | None) -> float:
    """Return a figure as it is drawn: a cosine by its distance from 1; NaN, which is not drawn, where there is none."""
    if value is None:
        return math.nan
    return 1 - value if target.metric == "cosine" else value


def sweep(points: tuple[Point, ...]) -> str:
    """Return the accuracy over each cost; what no other point beats in all of them is filled."""
    shown = [point for point in points if point.sqnr_db is not None]
    sqnr = np.array([point.accuracy for point in shown])
    front = np.array([point.on_front for point in shown])
    with _style("sweep"):
        figure = Figure(figsize=(9.0, 3.0))
        for place, (name, label, kind) in enumerate(_COSTS):
            axes = figure.add_axes((0.06 + 0.32 * place, 0.17, 0.29, 0.8))
            costs = np.array([getattr(point.cost, name) for point in shown])
            axes.scatter(costs[~front], sqnr[~front], s=14, facecolors="none", edgecolors=_GREY, linewidths=0.8)
            axes.scatter(costs[front], sqnr[front], s=22, color=COLOURS[kind])
            axes.set_xlabel(label)
            if not place:
                axes.set_ylabel("SQNR, dB")
        return _svg(figure, "Accuracy over cost")


#: The costs of a format: attribute, label with its unit, and what the colour stands for.
_COSTS = (
    ("bits_moved", "bits moved an element", "input"),
    ("multiplier", "multipliers, one-bit products", "elements"),
    ("row_bits", "row stage, bits", "rows"),
)


def _style(salt: str) -> AbstractContextManager[None]:
    """Draw in the page's style; the salt makes the SVG's ids differ from those of the page's other figures."""
    options: Any = {**_STYLE, "svg.hashsalt": salt}
    return mpl.rc_context(options)


def _bars(axes: Any, histogram: Histogram, colour: str) -> None:
    edges = np.linspace(histogram.low, histogram.high, len(histogram.counts) + 1)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.stairs(np.maximum(histogram.counts, 0.5), edges, baseline=0.5, fill=True, color=colour)


def _svg(figure: Figure, title: str) -> str:
    buffer = io.StringIO()
    canvas: Any = FigureCanvasSVG(figure)
    canvas.print_svg(buffer)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in _SHORTER:
        text = pattern.sub(replacement, text)
    text = re.sub(r'<svg [^>]*viewBox="([^"]*)"[^>]*>', _opening(title), text, count=1)
    return text.replace(_TEXT, "currentColor")


#: What a page of many figures can do without: metadata, names of groups, fonts, and digits beyond a tenth of a point.
_SHORTER = [
    (re.compile(pattern, re.DOTALL), replacement)
    for pattern, replacement in (
        (r"<metadata>.*?</metadata>|<!--.*?-->", ""),
        (r' id="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib\.axis|FillBetween\w*)_\d+"', ""),
        (r" font-family: [^;]*;", ""),
        (r' transform="rotate\(-?0 [^"]*"', ""),
        (r"(\d)\.(\d)\d+(?=[^<>]*>)", r"\1.\2"),  # coordinates, inside of tags; the labels keep their digits
        (r"\s*\n\s*(?=[LzM<])", ""),
    )
]


def _opening(title: str) -> str:
    from markupsafe import escape

    label = str(escape(title)).replace("\\", "\\\\")
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\\1" role="img" aria-label="{label}">'
