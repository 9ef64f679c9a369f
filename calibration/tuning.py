"""Choosing quantization parameters by what they do to the model's outputs.

Calibration chooses them by the error of the norm's own input and output, where all values count alike. To the model
they don't: what a clipped outlier costs against coarse steps in all other rows, only its outputs tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..params import ModelParams
from ..quantization import QuantParams
from .models import ModelCalibration
from .objective import ModelObjective
from .options import CalibrationOptions, Method, SideOptions
from .simulation import Sides


@dataclass(frozen=True)
class Side:
    """The input or the output of a norm."""

    norm: str
    output: bool

    def choice(self, params: QuantParams) -> dict[str, Sides]:
        """Return the choice that quantizes this side alone."""
        return {self.norm: Sides(output=params) if self.output else Sides(input=params)}


@dataclass(frozen=True)
class Tuned:
    """A side's parameters, and the noise in the model's outputs when it alone is quantized, before and after."""

    params: QuantParams
    noise: float
    noise_before: float


def tune(
    objective: ModelObjective,
    sides: Mapping[Side, tuple[QuantParams, SideOptions]],
    advance: Callable[[], None] = lambda: None,
) -> dict[Side, Tuned]:
    """Return better parameters for the sides whose method is ``mse``; others are measured alone.

    From each side's parameters it goes downhill: to half the step in the channels with the largest exponent, as long as
    the model's outputs get better. Finer steps for all channels would get them better too, but on these feeds alone:
    what lies beyond the range of a few rows is what other data bring.

    Parameters
    ----------
    objective : ModelObjective
    sides : mapping of Side to (QuantParams, SideOptions)
    advance : callable
        Called after each side.
    """
    tuned = {}
    for side, (params, options) in sides.items():
        before = noise = objective.measure(side.choice(params)).noise
        if options.method is Method.MSE:
            params, noise = _downhill(objective, side, params, noise)
        tuned[side] = Tuned(params, noise, before)
        advance()
    return tuned


def tune_model(
    calibration: ModelCalibration,
    objective: ModelObjective,
    params: ModelParams,
    options: CalibrationOptions,
    advance: Callable[[], None] = lambda: None,
) -> tuple[ModelParams, dict[Side, Tuned]]:
    """Return parameters that serve the model's outputs better, and what each side does to them.

    Norms whose parameters stand in the model, and those with a fused residual, keep theirs and are left out.

    Parameters
    ----------
    calibration : ModelCalibration
        That has observed the data.
    objective : ModelObjective
    params : ModelParams
        What `calibration` gave for `options`.
    options : CalibrationOptions
    advance : callable
        Called after each side.
    """
    specs = {entry.name: entry.spec for entry in params.norms}
    free = [name for name, spec in specs.items() if calibration.is_free(name) and spec.residual is None]
    sides = {Side(name, False): (specs[name].input, options.input) for name in free}
    sides |= {Side(name, True): (specs[name].output, options.output) for name in free}
    tuned = tune(objective, sides, advance)
    for name in free:
        before, behind = tuned[Side(name, False)], tuned[Side(name, True)]
        specs[name] = calibration.calibration(name).plan(before.params, behind.params, options)
    made = calibration.assembled({name: (spec, options) for name, spec in specs.items()})
    return replace(made, objective="model", compared_feeds=objective.feeds), tuned


def _downhill(objective: ModelObjective, side: Side, params: QuantParams, noise: float) -> tuple[QuantParams, float]:
    while (candidate := _capped(params)) is not None:
        found = objective.measure(side.choice(candidate)).noise
        if not found < noise:
            break
        params, noise = candidate, found
    return params, noise


def _capped(params: QuantParams) -> QuantParams | None:
    """Return half the step in the channels with the largest exponent, None where that is not one of several.

    What is clipped there is the longer side of zero: the shorter one keeps its reach, as far as half of the codes do.
    """
    if params.exponents is None or len(set(params.exponents)) == 1:
        return None
    exponents = np.array(params.exponents)
    capped = np.minimum(exponents, exponents.max() - 1)
    zeros, middle = params.channel_zeros(len(capped)), (params.dtype.lo + params.dtype.hi + 1) // 2
    below, above = np.minimum(2 * zeros - params.lo, middle), np.maximum(2 * zeros - params.hi, middle)
    moved = np.where(zeros < middle, below, np.where(zeros > middle, above, middle))
    zeros = np.where(capped < exponents, moved, zeros)
    return replace(params, exponents=tuple(capped.tolist()), zero_point=tuple(zeros.tolist()))
