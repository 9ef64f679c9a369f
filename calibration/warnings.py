"""What in the data makes a calibration doubtful: told by norm and channel, with what was done."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..params import CalibrationWarning, WarningKind
from .norms import FEWEST_ROWS, NormObserver
from .observation import ObservedNorm

#: Channels that a sentence names.
_NAMED = 8


def find_warnings(norm: ObservedNorm, seen: NormObserver) -> Iterator[CalibrationWarning]:
    """Yield what is doubtful about one norm, the gravest first."""

    def warning(kind: WarningKind, channels: npt.NDArray[np.bool_], text: str) -> CalibrationWarning:
        return CalibrationWarning(
            norm=norm.name, kind=kind, channels=tuple(np.flatnonzero(channels).tolist()), text=text
        )  # fmt: skip

    if seen.left_out:
        bad_in, bad_out = seen.bad_inputs > 0, seen.bad_outputs > 0
        where = " and ".join(
            f"{side} {_channels(bad)}" for side, bad in (("input", bad_in), ("output", bad_out)) if bad.any()
        )
        rows = f"{seen.left_out} of {seen.left_out + seen.rows} rows"
        text = f"{rows} hold NaN or infinite values, in {where}; these rows were left out"
        yield warning(WarningKind.NOT_FINITE, bad_in | bad_out, text)
    none = np.zeros(norm.layer.n, dtype=np.bool_)
    if seen.rows < FEWEST_ROWS:
        rows = "1 row" if seen.rows == 1 else f"{seen.rows} rows"
        text = (
            f"only {rows}: about {2 / (seen.rows + 1):.1%} of new ones go beyond a "
            "channel's observed range. Only scales of the channels' own by the method mse have a margin for them, of a "
            f"quarter; calibrate with at least {FEWEST_ROWS} rows"
        )
        yield warning(WarningKind.FEW_ROWS, none, text)
    constant = seen.input.ranges.low == seen.input.ranges.high
    if constant.any() and seen.rows > 1:
        text = (
            f"the input has one value in all {seen.rows} rows in {_channels(constant)}; its codes hold that value, and "
            "clip others that are beyond the range of the codes"
        )
        yield warning(WarningKind.CONSTANT, constant, text)
    dead = norm.layer.gamma == 0
    if dead.any():
        text = (
            f"gamma is 0 in {_channels(dead)}: the output is beta's there. The input still counts in the mean and the "
            "deviation, and has codes like any other"
        )
        yield warning(WarningKind.DEAD, dead, text)


def _channels(chosen: npt.NDArray[np.bool_]) -> str:
    numbers = np.flatnonzero(chosen).tolist()
    named = ", ".join(map(str, numbers[:_NAMED]))
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return f"channel{'' if len(numbers) == 1 else 's'} {named}{more}"
