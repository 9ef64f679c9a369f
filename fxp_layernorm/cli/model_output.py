"""What `calibrate` does on the model's outputs: scales tuned for them, and formats that reach a target."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import common

if TYPE_CHECKING:
    from rich.console import Group

    from ..analysis.precision import MixedPrecision, Target
    from ..calibration import CalibrationOptions, ModelCalibration, ModelObjective, Quality, Side, Tuned
    from ..params import ModelParams
    from ..runtime import Feeds


@dataclass(frozen=True)
class Outcome:
    """Parameters, and what is told of the model's outputs with them."""

    params: ModelParams
    document: dict[str, Any] = field(default_factory=dict)
    tables: list[Group] = field(default_factory=list)
    closing: str = ""
    met: bool = True


def parse(target: str | None, data: str | None, objective: str, given: Iterable[str]) -> Target | None:
    """Return the target; raises InputError where it can't be one, or goes without what else was asked for.

    Parameters
    ----------
    target, data : str or None
    objective : str
    given : iterable of str
        Options on the command line that --target decides itself.
    """
    from ..analysis.precision import Target

    if data is None and (target is not None or objective == "model"):
        raise InputError(f"{'--objective model' if target is None else '--target'} runs the model: give --data")
    if target is None:
        return None
    if objective == "model":
        raise InputError("--target measures the model's outputs already; leave out --objective model")
    for option in given:
        raise InputError(f"--target chooses by itself what {option} is about; leave that out")
    return Target.parse(target)


def tune(
    model: Path, calibration: ModelCalibration, feeds: Feeds, options: CalibrationOptions, output: common.Output
) -> Outcome:
    """Tune the parameters for the model's outputs."""
    from ..calibration import ModelObjective, tune_model

    params = calibration.params(options)
    names = calibration.names
    objective = ModelObjective(model, names, feeds, residuals=any(map(calibration.can_fuse, names)))
    with output.progress("Tuning for the model's outputs", 2 * len(names)) as advance:
        params, tuned = tune_model(calibration, objective, params, options, advance)
    return _tuned(params, tuned, objective)


def meet(
    model: Path, calibration: ModelCalibration, feeds: Feeds, options: CalibrationOptions, target: Target,
    output: common.Output,
) -> Outcome:  # fmt: skip
    """Find formats that reach the target."""
    from ..analysis.precision import measurements, meet_target
    from ..calibration import ModelObjective

    names = calibration.names
    objective = ModelObjective(model, names, feeds, residuals=any(map(calibration.can_fuse, names)))
    with output.progress("Measuring each norm in each format", measurements(calibration)) as advance:
        found = meet_target(calibration, objective, options, target, advance)
    return _mixed(found, objective)


def _tuned(params: ModelParams, tuned: dict[Side, Tuned], objective: ModelObjective) -> Outcome:
    from ..calibration.simulation import Sides

    quality = objective.measure({entry.name: Sides.of(entry.spec) for entry in params.norms})
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
    chosen, target, record = found.chosen, found.target, found.params.target
    assert record is not None
    rows = [
        (
            name, each.input, "yes" if each.residual else "no", each.output, each.cost_pj, f"{each.noise:.2e}",
            f"{100 * each.noise / chosen.noise:.1f} %",
        )
        for name, each in chosen.formats.items()
    ]  # fmt: skip
    columns = ("norm", "input", "residual fused", "output", "pJ an element", "noise", "of all noise")
    curve = [(point.cost_pj, f"{point.cosine:.6f}", point.sqnr_db, point.max_lsb) for point in record.curve]
    figures = ("pJ an element", "cosine", "SQNR, dB", "largest error, 255ths")
    tables = [
        common.table("The trade-off, from the cheapest formats on", figures, curve),
        common.table(_title(chosen.quality, objective), columns, rows),
    ]
    plain = asdict(record)
    document = {"target": {name: plain.pop(name) for name in ("metric", "value", "met", "reached")}, **plain}
    value = target.of(chosen.quality)
    reached = f"{target.metric} {value:.6g}" if found.met else f"{target} is out of reach, the best is {value:.6g}"
    return Outcome(found.params, document, tables, f", {reached} at {chosen.cost_pj:.2f} pJ an element", found.met)
