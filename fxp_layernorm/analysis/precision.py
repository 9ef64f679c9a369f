"""Mixed precision: for each norm the cheapest formats with which the model meets a target.

Each side of each norm is quantized alone in each of its formats, and the noise that it brings into the model's outputs
is measured. Rounding errors of different places know nothing of each other, so these figures add up, and the question
is a knapsack: the least cost whose noise is small enough. The lower convex hull of each norm's formats gives its steps
from cheap to accurate; taken in the order of noise saved per cost, they are a curve, every point of which is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from ..calibration.models import ModelCalibration
from ..calibration.objective import ModelObjective, Quality
from ..calibration.options import LARGEST_BY_DEFAULT, CalibrationOptions, Scales, SideOptions
from ..calibration.simulation import Sides
from ..calibration.tuning import Side, Tuned, tune
from ..errors import FxpError, InputError
from ..params import ModelParams, NormFormat, TargetRecord, TradeOff
from ..spec import LayerNormSpec
from .cost import cost

#: Energy in pJ of moving one bit, and of a one-bit product of a multiplication: in 45 nm, 64 bits from a cache of 8 KB
#: take 10 pJ and a product of 32 bits 3.1 pJ (M. Horowitz, "Computing's energy problem", ISSCC 2014).
BIT_MOVED_PJ, BIT_PRODUCT_PJ = 10 / 64, 3.1 / 32**2


class Metric(StrEnum):
    """What a target is about: the worst of the model's outputs."""

    COSINE = "cosine"
    SQNR_DB = "sqnr_db"
    MAX_LSB = "max_lsb"


@dataclass(frozen=True)
class Target:
    """What the model's outputs are to reach; see `Quality`.

    Raises
    ------
    InputError
        For a value that no output can have, or that all have.
    """

    metric: Metric
    value: float

    def __post_init__(self) -> None:
        bounds = {Metric.COSINE: (-1.0, 1.0), Metric.SQNR_DB: (-math.inf, 300.0), Metric.MAX_LSB: (0.0, math.inf)}
        low, high = bounds[self.metric]
        if not low < self.value < high:
            raise InputError(f"the target {self.metric} is {self.value}; it must be above {low:g} and below {high:g}")

    @classmethod
    def parse(cls, text: str) -> Target:
        """Return the target that a text like ``cosine=0.999`` names."""
        name, _, value = text.partition("=")
        try:
            return cls(Metric(name.strip()), float(value))
        except InputError:
            raise
        except ValueError:
            raise InputError(
                f"the target is {text!r}; give one of {', '.join(Metric)} and a number, as in cosine=0.999"
            ) from None

    def of(self, quality: Quality) -> float:
        """Return what it is about."""
        value: float = getattr(quality, self.metric.value)
        return value

    def met(self, quality: Quality) -> bool:
        """Whether outputs reach it."""
        value = self.of(quality)
        return value <= self.value if self.metric is Metric.MAX_LSB else value >= self.value

    def __str__(self) -> str:
        return f"{self.metric} {'at most' if self.metric is Metric.MAX_LSB else 'at least'} {self.value:g}"


@dataclass(frozen=True)
class Format:
    """The formats of a norm's input and output, and what they bring and cost.

    Attributes
    ----------
    input, output : str
        Like ``int8``, ``int8+7`` with channel exponents up to 7, or ``int8/channel`` with a scale a channel.
    residual : bool
        Whether the norm adds two tensors of the input's format itself; their sum then keeps 16 bits.
    noise : float
        The sum of what input and output, quantized alone, add to the noise of the model's outputs.
    cost_pj : float
        An element's energy, see `energy`.
    spec : LayerNormSpec
    options : CalibrationOptions
    """

    input: str
    output: str
    residual: bool
    noise: float
    cost_pj: float
    spec: LayerNormSpec
    options: CalibrationOptions


@dataclass(frozen=True)
class Point:
    """A point of the trade-off curve.

    Attributes
    ----------
    formats : dict of str to Format
        Of each norm, by its name.
    cost_pj : float
        An element's energy, the mean over the elements of all norms.
    noise : float
        The sum of the norms' own.
    quality : Quality
        Of the model's outputs with all norms in these formats, measured.
    picked : dict of str to Format
        The formats as each norm has them by itself: where it adds the output of another, it takes that one's codes.
    """

    formats: dict[str, Format]
    cost_pj: float
    noise: float
    quality: Quality
    picked: dict[str, Format]

    def record(self) -> TradeOff:
        """Return what the parameter file holds of it."""
        formats = {
            name: NormFormat(
                input=each.input, output=each.output, residual=each.residual, noise=each.noise, cost_pj=each.cost_pj
            )
            for name, each in self.formats.items()
        }
        sqnr_db, max_lsb = (_finite(value) for value in (self.quality.sqnr_db, self.quality.max_lsb))
        return TradeOff(
            cost_pj=self.cost_pj, noise_expected=self.noise, cosine=self.quality.cosine, sqnr_db=sqnr_db,
            max_lsb=max_lsb, formats=formats,
        )  # fmt: skip


@dataclass(frozen=True)
class MixedPrecision:
    """What was found for a target.

    Attributes
    ----------
    target : Target
    met : bool
    chosen : Point
        The cheapest measured point that meets the target; where none does, the one that comes closest.
    curve : tuple of Point
        From the cheapest formats to the most accurate.
    params : ModelParams
        For the chosen formats, with all of this on record.
    """

    target: Target
    met: bool
    chosen: Point
    curve: tuple[Point, ...]
    params: ModelParams


def energy(spec: LayerNormSpec, *, adds_before: bool) -> float:
    """Return what an element of a norm costs in pJ.

    `BIT_MOVED_PJ` for each bit of its codes, `BIT_PRODUCT_PJ` for each one-bit product of the input stage and of the
    element stage's two multiplications.

    Parameters
    ----------
    spec : LayerNormSpec
    adds_before : bool
        Whether the model adds two tensors before the norm. Where the norm doesn't do that itself, an Add counts too: it
        reads two values and writes one, each as wide as the norm's input.
    """
    price = cost([(spec, 1)])
    moved = price.bits_moved + (3 * spec.input.dtype.bits if adds_before and spec.residual is None else 0)
    return BIT_MOVED_PJ * moved + BIT_PRODUCT_PJ * (price.adder + price.multiplier)


def side_formats(side: SideOptions) -> dict[str, SideOptions]:
    """Return the formats that a side may take: 8 and 16 bits, each with one scale and with what channels have here."""
    kind = "int" if side.dtype.signed else "uint"
    chosen = {}
    for bits in (8, 16):
        name = f"{kind}{bits}"
        chosen[name] = SideOptions(name, scales=Scales.TENSOR, narrow_range=side.narrow_range)
        if side.scales is Scales.CHANNEL and bits == 8:  # wider codes hold what was observed: exponents have more room
            mark, shared, largest = "/channel", Scales.CHANNEL, None
        else:
            largest = side.exponents or LARGEST_BY_DEFAULT
            mark, shared = f"+{largest}", Scales.EXPONENTS
        chosen[name + mark] = SideOptions(name, scales=shared, exponents=largest, narrow_range=side.narrow_range)
    return chosen


def measurements(calibration: ModelCalibration) -> int:
    """Return how often `meet_target` calls `advance`."""
    free = [name for name in calibration.names if calibration.is_free(name)]
    return sum(4 * (3 if calibration.can_fuse(name) else 2) for name in free)


def meet_target(
    calibration: ModelCalibration,
    objective: ModelObjective,
    options: CalibrationOptions,
    target: Target,
    advance: Callable[[], None] = lambda: None,
) -> MixedPrecision:
    """Return the cheapest formats, norm by norm, with which the model meets a target.

    Parameters
    ----------
    calibration : ModelCalibration
        That has observed the data; where it observed addends, norms that add them are among the formats. Norms whose
        parameters stand in the model keep them.
    objective : ModelObjective
    options : CalibrationOptions
        The kind of the codes, signed or not, what channels have of their own, the lane and the hardware.
    target : Target
    advance : callable
        Called after each side that was measured in a format.
    """
    free = [name for name in calibration.names if calibration.is_free(name)]
    if not free:
        raise InputError("no norm has formats to choose: their parameters stand in the model")
    others = [name for name in calibration.names if name not in free]
    specs = {name: (calibration.spec(name, options, fuse=False), options) for name in others}
    fixed = {name: Sides.of(spec) for name, (spec, _) in specs.items()}
    norms = {name: calibration.calibration(name) for name in free}
    rows = {name: norm.observer.rows * norm.layer.n for name, norm in norms.items()}
    hulls = {name: _hull(_formats(calibration, objective, name, options, advance)) for name in free}
    elements = sum(rows.values())
    linked = _Linked(calibration)

    def point(picked: Mapping[str, Format]) -> Point:
        formats = linked(picked)
        return Point(
            formats=formats,
            picked=dict(picked),
            cost_pj=sum(each.cost_pj * rows[name] for name, each in formats.items()) / elements,
            noise=sum(each.noise for each in formats.values()),
            quality=objective.measure(fixed | {name: Sides.of(each.spec) for name, each in formats.items()}),
        )

    formats = {name: hull[0] for name, hull in hulls.items()}
    curve = [point(formats)]
    for name, step in _steps(hulls, rows):
        formats[name] = step
        curve.append(point(formats))
    met = [each for each in curve if target.met(each.quality)]
    chosen = min(met, key=lambda each: each.cost_pj) if met else _closest(curve, target)
    if met:
        chosen = _without_waste(chosen, hulls, rows, target, point)
    specs |= {name: (each.spec, each.options) for name, each in chosen.formats.items()}
    record = TargetRecord(
        metric=target.metric.value, value=target.value, met=bool(met), reached=_finite(target.of(chosen.quality)),
        chosen=chosen.record(), curve=tuple(each.record() for each in curve),
    )  # fmt: skip
    params = replace(calibration.assembled(specs), compared_feeds=objective.feeds, target=record)
    return MixedPrecision(target, bool(met), chosen, tuple(curve), params)


@dataclass(frozen=True)
class _Input:
    """A norm's input in one of its formats: what is quantized, and the noise of that alone."""

    name: str
    options: SideOptions
    sides: Sides
    noise: float


def _formats(
    calibration: ModelCalibration, objective: ModelObjective, name: str, options: CalibrationOptions,
    advance: Callable[[], None],
) -> list[Format]:  # fmt: skip
    """Return all pairs of a norm's formats that can be planned, with their measured noise."""
    norm, adds = calibration.calibration(name), calibration.can_fuse(name)
    inputs: list[_Input] = []
    outputs: dict[str, tuple[SideOptions, Tuned]] = {}
    wide = replace(options, lane=None, hardware=None)  # what fits is asked for each pair
    kinds = zip(side_formats(options.input).items(), side_formats(options.output).items(), strict=True)
    for (in_name, input), (out_name, output) in kinds:
        chosen = replace(wide, input=input, output=output)
        spec = calibration.spec(name, chosen, fuse=False)
        before, behind = Side(name, False), Side(name, True)
        tuned = tune(objective, {before: (spec.input, input), behind: (spec.output, output)}, advance)
        inputs.append(_Input(in_name, input, Sides(tuned[before].params), tuned[before].noise))
        outputs[out_name] = output, tuned[behind]
        if adds:
            sides = Sides.of(calibration.spec(name, chosen, fuse=True))._replace(output=None)
            inputs.append(_Input(in_name, input, sides, objective.measure({name: sides}).noise))
            advance()
    formats = []
    failure: FxpError | None = None
    for each, (out_name, (output, made)) in itertools.product(inputs, outputs.items()):
        chosen, sides = replace(options, input=each.options, output=output), each.sides
        assert sides.input is not None
        residual, total = sides.residual, sides.sum_output
        try:
            spec = norm.plan(sides.input, made.params, chosen, residual=residual, sum_output=total)
        except FxpError as error:  # a pair that doesn't fit the lane or the hardware; the others may
            failure = error
            continue
        price, noise = energy(spec, adds_before=adds), each.noise + made.noise
        formats.append(Format(each.name, out_name, residual is not None, noise, price, spec, chosen))
    if failure is not None and not formats:
        raise type(failure)(f"norm {name!r} in none of its formats: {failure}") from failure
    return formats


class _Linked:
    """Lets norms that add take the codes of the norms before them, as `ModelCalibration.linked` does."""

    def __init__(self, calibration: ModelCalibration) -> None:
        self._calibration = calibration
        self._known: dict[tuple[object, ...], Format] = {}

    def __call__(self, picked: Mapping[str, Format]) -> dict[str, Format]:
        made = {name: each.spec for name, each in picked.items()}
        return {name: self._format(name, each, made) for name, each in picked.items()}

    def _format(self, name: str, each: Format, made: Mapping[str, LayerNormSpec]) -> Format:
        codes = self._calibration.codes_before(name, each.options, made)
        key = (name, id(each), *map(id, codes))
        if key not in self._known:
            spec = self._calibration.linked(name, each.spec, each.options, codes)
            price = each.cost_pj if spec is each.spec else energy(spec, adds_before=True)
            self._known[key] = replace(each, spec=spec, cost_pj=price)
        return self._known[key]


def _hull(formats: Iterable[Format]) -> list[Format]:
    """Return the lower convex hull of noise over cost, from the cheapest to the most accurate."""
    hull: list[Format] = []
    for each in sorted(formats, key=lambda each: (each.cost_pj, each.noise)):
        if hull and each.noise >= hull[-1].noise:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], each):
            hull.pop()
        hull.append(each)
    return hull


def _gain(cheap: Format, accurate: Format) -> float:
    """Return the noise saved per cost."""
    return (cheap.noise - accurate.noise) / max(accurate.cost_pj - cheap.cost_pj, 1e-12)


def _steps(hulls: Mapping[str, list[Format]], rows: Mapping[str, int]) -> list[tuple[str, Format]]:
    """Return all steps along the hulls, those first that save the most noise per cost."""
    steps = [
        (_gain(cheap, accurate) / rows[name], name, accurate)
        for name, hull in hulls.items()
        for cheap, accurate in itertools.pairwise(hull)
    ]
    return [(name, accurate) for _, name, accurate in sorted(steps, key=lambda step: -step[0])]


def _closest(curve: Iterable[Point], target: Target) -> Point:
    sign = -1 if target.metric is Metric.MAX_LSB else 1
    return max(curve, key=lambda each: sign * target.of(each.quality))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _without_waste(
    chosen: Point, hulls: Mapping[str, list[Format]], rows: Mapping[str, int], target: Target,
    point: Callable[[Mapping[str, Format]], Point],
) -> Point:  # fmt: skip
    """Take back single steps, the dearest first, as long as the target is met: the last one often does too much."""
    taken = [name for name, hull in hulls.items() if chosen.picked[name] is not hull[0]]
    for name in sorted(taken, key=lambda name: -rows[name] * chosen.picked[name].cost_pj):
        hull = hulls[name]
        cheaper = hull[hull.index(chosen.picked[name]) - 1]
        tried = point(chosen.picked | {name: cheaper})
        if target.met(tried.quality):
            chosen = tried
    return chosen
