"""The error's power by stage: the norm computed again with one stage exact at a time.

`Attribution` uses this definition. With e the error of the integers against the float layer and e_k the error where
stage k is exact, the term of stage k is mean(e**2) - mean(e_k**2): what the error's power falls by when that stage
alone is made exact. What the terms leave of the total, mean(e**2) - sum of the terms, is the interaction: errors that
compensate or amplify each other. Terms and interaction sum up to the total by definition; a term below 0 means that
the stage's rounding happens to compensate for another's. Powers are in squared LSB of each channel's own output step,
and once more in squared real units, whose total is the noise of the SQNR.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..spec import LayerNormSpec
from . import stages
from .stages import Stage


@dataclass(frozen=True, kw_only=True)
class StageTerm:
    """What one stage contributes.

    Attributes
    ----------
    stage, meaning : str
    power_lsb2 : float
        What the error's mean square falls by with this stage exact, in LSB**2.
    share : float
        The same of the total, in real units: the share of the noise of the SQNR.
    rms_change_lsb, max_change_lsb : float
        By how much the output moves with this stage exact: root mean square and largest, in LSB.
    """

    stage: str
    meaning: str
    power_lsb2: float
    share: float
    rms_change_lsb: float
    max_change_lsb: float


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The error's power by stage; see the module's docstring for the definition.

    Attributes
    ----------
    rows : int
        How many rows it was measured on.
    terms : tuple of StageTerm
        In the order of the computation.
    total_lsb2 : float
        The error's mean square against the float layer, in LSB**2.
    interaction_lsb2, interaction_share : float
        What the terms leave of the total, and of the noise.
    """

    rows: int
    terms: tuple[StageTerm, ...]
    total_lsb2: float
    interaction_lsb2: float
    interaction_share: float

    def term(self, stage: Stage) -> StageTerm:
        """Return the term of a stage."""
        return next(term for term in self.terms if term.stage == stage)


def attribute(spec: LayerNormSpec, rows: npt.NDArray[np.floating[Any]]) -> Attribution:
    """Measure the error's power by stage on real rows, as `compute` takes them."""
    weight = np.square(stages.output_steps(spec))
    parts = Stage.of(spec)
    # for each stage, last the total: power in LSB**2, power in real units; and the change of the output
    power, noise = np.zeros(len(parts) + 1), np.zeros(len(parts) + 1)
    change, largest = np.zeros(len(parts)), np.zeros(len(parts))
    step = max(1, stages.BLOCK_ELEMENTS // spec.n)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        expected = stages.float_layer(spec, block)
        y = stages.compute(spec, block).y.astype(np.float64)
        for index, stage in enumerate([*parts, None]):
            with_exact = y if stage is None else stages.compute(spec, block, {stage}).y.astype(np.float64)
            squares = np.square(with_exact - expected)
            power[index] += squares.sum()
            noise[index] += (squares * weight).sum()
            if stage is not None:
                moved = np.abs(with_exact - y)
                change[index] += np.square(moved).sum()
                largest[index] = max(largest[index], moved.max())
    count = len(rows) * spec.n
    falls = (power[-1] - power[:-1]) / count
    shares = (noise[-1] - noise[:-1]) / noise[-1] if noise[-1] else np.zeros(len(parts))
    return Attribution(
        rows=len(rows),
        terms=tuple(
            StageTerm(
                stage=stage.value, meaning=stage.meaning, power_lsb2=float(falls[index]), share=float(shares[index]),
                rms_change_lsb=float(np.sqrt(change[index] / count)), max_change_lsb=float(largest[index]),
            )
            for index, stage in enumerate(parts)
        ),
        total_lsb2=float(power[-1] / count),
        interaction_lsb2=float(power[-1] / count - falls.sum()),
        interaction_share=float(1 - shares.sum()) if noise[-1] else 0.0,
    )  # fmt: skip
