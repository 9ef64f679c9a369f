"""What `calibrate` does on the model's outputs: scales tuned for them, and formats that reach a target."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import common

if TYPE_CHECKING:
    from rich.console import Group

    from ..analysis.precision import MixedPrecision, Point, Target
    from ..calibration import CalibrationOptions, ModelCalibration, ModelObjective, Quality, Side, Tuned
    from ..params import ModelParams
    from ..runtime import Feeds


@dataclass(frozen=True)
class Outcome:
    """Parameters for the model's outputs, and what is told about them; by default there are none."""

    params: ModelParams | None = None
    document: dict[str, Any] = field(default_factory=dict)
    tables: list[Group] = field(default_factory=list)
    closing: str = ""
    met: bool = True


def parse(target: str | None, data: str | None) -> Target | None:
    """Return the target; raises InputError where it can't be one, or there is no data to measure it on."""
    from ..analysis.precision import Target

    if target is None:
        return None
    if data is None:
        raise InputError("--target is measured on the model's outputs: give --data")
    return Target.parse(target)


def run(
    model: Path, calibration: ModelCalibration, feeds: Feeds, params: ModelParams, options: CalibrationOptions,
    target: Target | None, output: common.Output,
) -> Outcome:  # fmt: skip
    """Tune the parameters for the model's outputs, or find formats that reach the target."""
    from ..analysis.precision import measurements, meet_target
    from ..calibration import ModelObjective, tune_model

    objective = ModelObjective(model, [entry.name for entry in params.norms], feeds)
    if target is None:
        with output.progress("Tuning for the model's outputs", 2 * len(params.norms)) as advance:
            params, tuned = tune_model(calibration, objective, params, options, advance)
        return _tuned(params, tuned, objective)
    with output.progress("Measuring each norm in each format", measurements(params)) as advance:
        found = meet_target(calibration, objective, params, options, target, advance)
    return _mixed(found, objective)


def _tuned(params: ModelParams, tuned: dict[Side, Tuned], objective: ModelObjective) -> Outcome:
    from ..calibration.tuning import choice

    quality = objective.measure(choice(params))
    shares = {(side.norm, side.output): result for side, result in tuned.items()}
    rows = []
    for entry in params.norms:
        sides = shares.get((entry.name, False)), shares.get((entry.name, True))
        if sides[0] and sides[1]:
            rows.append((entry.name, *(f"{side.noise:.2e}" for side in sides if side), *map(_gained, sides)))
    document = {
        "objective": {
            "feeds": objective.feeds, **_figures(quality),
            "norms": [
                {"name": name, "output": output, "noise": result.noise, "noise_before": result.noise_before}
                for (name, output), result in shares.items()
            ],
        }
    }  # fmt: skip
    columns = ("norm", "noise by its input", "by its output", "tuning changed that by", "and by")
    return Outcome(params, document, [common.table(_title(quality, objective), columns, rows)])


def _gained(tuned: Tuned | None) -> str:
    if tuned is None or not tuned.noise_before:
        return "-"
    return f"{100 * (tuned.noise / tuned.noise_before - 1):+.0f} %"


def _title(quality: Quality, objective: ModelObjective) -> str:
    return (
        f"The model's outputs on {common.count(objective.feeds, 'feed')}: cosine {quality.cosine:.6f}, "
        f"SQNR {quality.sqnr_db:.1f} dB"
    )


def _figures(quality: Quality) -> dict[str, float | None]:
    """Return the figures as JSON knows them; without any noise, the ratio to it is None."""
    return {name: value if math.isfinite(value) else None for name, value in vars(quality).items()}


def _mixed(found: MixedPrecision, objective: ModelObjective) -> Outcome:
    chosen, target = found.chosen, found.target
    rows = [
        (name, each.input, each.output, each.cost_pj, f"{each.noise:.2e}", f"{100 * each.noise / chosen.noise:.1f} %")
        for name, each in chosen.formats.items()
    ]
    columns = ("norm", "input", "output", "pJ an element", "noise", "of all noise")
    tables = [common.table(_title(chosen.quality, objective), columns, rows)]
    value = getattr(chosen.quality, target.metric.value)
    document = {
        "target": {"metric": target.metric.value, "value": target.value, "met": found.met, "reached": value},
        "chosen": _point(chosen), "curve": [_point(point) for point in found.curve],
    }  # fmt: skip
    reached = f"{target.metric} {value:.6g}" if found.met else f"{target} is out of reach, the best is {value:.6g}"
    return Outcome(found.params, document, tables, f", {reached} at {chosen.cost_pj:.2f} pJ an element", found.met)


def _point(point: Point) -> dict[str, Any]:
    return {
        "cost_pj": point.cost_pj, "noise_expected": point.noise, **_figures(point.quality),
        "formats": {
            name: {"input": each.input, "output": each.output, "noise": each.noise, "cost_pj": each.cost_pj}
            for name, each in point.formats.items()
        },
    }  # fmt: skip
