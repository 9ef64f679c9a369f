"""What to do next, in words that follow from the numbers, each with a command.

A suggestion is made where it cuts the norm's noise at least `WORTH` times: the part of the noise that the attribution
gives a side of the norm, input or output, times what other quantization parameters for that side would cut it by on
the sampled rows.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibration import search
from ..calibration.observers import MinMaxObserver
from ..calibration.options import Scales, SideOptions
from ..errors import FxpError
from ..layer import LayerNorm, RMSNorm
from ..planner import plan
from ..quantization import QuantParams
from ..spec import LayerNormSpec
from .attribution import Attribution
from .report import Saturation, Suggestion
from .stages import Stage

Rows = npt.NDArray[np.floating[Any]]

#: How many times a suggestion must cut the norm's noise, and a dearer one that of the one before it.
WORTH = 1.3
#: Elements that parameters are compared on.
TRIED_ELEMENTS = 1 << 15


@dataclass(frozen=True)
class Command:
    """What the commands name. Without a model they are Python."""

    model: str | None = None
    data: str = "DATA"
    params: str = "PARAMS.json"

    def calibrate(self, spec: LayerNormSpec, **options: object) -> str:
        """Return the command that calibrates again, with the types of a spec and these options."""
        chosen = {"input": spec.input.dtype.value, "output": spec.output.dtype.value, **options}
        return self.calibrate_to(**chosen)

    def calibrate_to(self, **chosen: object) -> str:
        """Return the command that calibrates with these options."""
        if self.model is None:
            return f"spec = fxp.calibrate(layer, samples, {', '.join(f'{k}={v!r}' for k, v in chosen.items())})"
        words = ["fxp-layernorm", "calibrate", self.model, "--data", self.data, "-o", self.params]
        return shlex.join(
            [*words, *(word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value)))]
        )


@dataclass(frozen=True)
class _Side:
    """One side of a norm: what its parameters are, and what they cost."""

    name: str
    params: QuantParams
    share: float
    saturation: Saturation
    seen: MinMaxObserver
    smallest_scale: float
    error: Callable[[QuantParams], float]


@dataclass(frozen=True)
class _Option:
    words: str
    side: SideOptions
    arguments: dict[str, object]


def for_norm(
    name: str,
    layer: LayerNorm | RMSNorm,
    spec: LayerNormSpec,
    attribution: Attribution,
    saturations: tuple[Saturation, Saturation],
    sample: Rows,
    seen: tuple[MinMaxObserver, MinMaxObserver],
    command: Command,
) -> tuple[Suggestion, ...]:
    """Return what would make one norm better, for real rows that stand for its input."""
    rows = sample[:: -(-sample.size // TRIED_ELEMENTS)].astype(np.float64)

    def normalized(values: Rows) -> Rows:
        return layer(values.reshape(-1, *layer.normalized_shape)).reshape(values.shape)

    expected = normalized(rows)

    def input_error(params: QuantParams) -> float:
        return float(np.square(normalized(params.dequantize(params.quantize(rows))) - expected).sum())

    def output_error(params: QuantParams) -> float:
        return float(np.square(params.dequantize(params.quantize(expected)) - expected).sum())

    def share(*stages: Stage) -> float:
        return min(max(sum(attribution.term(stage).share for stage in stages), 0.0), 1.0)

    sides = [
        _Side(
            "input", spec.input, share(Stage.INPUT, Stage.INPUT_SATURATION), saturations[0], seen[0],
            search.smallest_input_scale(layer.n, layer.eps), input_error,
        ),
        _Side(
            "output", spec.output, share(Stage.OUTPUT, Stage.OUTPUT_SATURATION), saturations[1], seen[1],
            search.smallest_output_scale(layer.n, layer.gamma, layer.beta), output_error,
        ),
    ]  # fmt: skip
    found = [made for side in sides for made in _for_side(name, side, spec, command)]
    found += _for_lane(name, layer, spec, share(*_INTEGER_STAGES), command)
    return tuple(found)


_INTEGER_STAGES = (Stage.EPS, Stage.ROOT, Stage.MEAN, Stage.T, Stage.GAMMA, Stage.BETA)


def merge(suggestions: list[Suggestion]) -> tuple[Suggestion, ...]:
    """Return suggestions with equal commands once, in the order given, each with the norms that it is for."""
    merged: dict[str, Suggestion] = {}
    for suggestion in suggestions:
        known = merged.setdefault(suggestion.command, suggestion)
        merged[suggestion.command] = replace(known, norms=tuple(dict.fromkeys(known.norms + suggestion.norms)))
    return tuple(merged.values())


def times(factor: float) -> str:
    """Return a factor in words."""
    return f"{factor:.1f} times" if factor < 10 else f"{factor:,.0f} times" if factor < 1e5 else "over 100,000 times"


def _for_side(name: str, side: _Side, spec: LayerNormSpec, command: Command) -> Iterator[Suggestion]:
    if 1 / max(1 - side.share, 1e-9) < WORTH:
        return
    present = side.error(side.params)
    clipped = side.saturation
    why = f"The {side.name}'s rounding and clipping are {_percent(side.share)} of the noise."
    if clipped.clipped:
        why += (
            f" It clips {_percent(clipped.clipped / clipped.values)} of all values"
            f" and {_percent(clipped.worst_share)} of channel {clipped.worst_channel}."
        )
    reached = 1.0
    for option in _options(side):
        tried = search.candidates(option.side, side.seen.low, side.seen.high, smallest_scale=side.smallest_scale)
        try:
            least = min(side.error(params) for params in tried)
        except FxpError:  # no scale that codes may have
            continue
        gain = present / least if least else np.inf
        overall = 1 / (1 - side.share + side.share / gain) if gain > 1 else 1.0
        if overall >= WORTH * reached:
            reached = overall
            text = (
                f"{why} {option.words} would cut that part {times(gain)}, and the norm's noise {times(overall)} "
                f"({10 * np.log10(overall):.1f} dB)."
            )
            yield Suggestion(text=text, command=command.calibrate(spec, **option.arguments), norms=(name,))


def _options(side: _Side) -> Iterator[_Option]:
    """Yield what may be tried, cheap ones first."""
    dtype = side.params.dtype
    present = max(side.params.exponents or (0,))
    own = side.params.channel_scales is not None
    if side.saturation.clipped:
        arguments: dict[str, object] = {"method": "minmax"}
        arguments |= {f"{side.name}_scales": "channel"} if own else {"exponents": present}
        scales = Scales.CHANNEL if own else None
        holding = SideOptions(dtype, method="minmax", scales=scales, exponents=None if own else present)
        yield _Option("Scales that hold every value", holding, arguments)
    for exponents in (3, 7):
        if exponents > present and not own:
            words = f"{side.name.capitalize()} exponents up to {exponents}"
            yield _Option(words, SideOptions(dtype, exponents=exponents), {"exponents": exponents})
    if dtype.numpy.itemsize == 1:
        yield _Option(f"An {side.name} of int16", SideOptions("int16"), {side.name: "int16"})


def _for_lane(
    name: str, layer: LayerNorm | RMSNorm, spec: LayerNormSpec, share: float, command: Command
) -> Iterator[Suggestion]:
    wider = {24: 32, 32: 64}.get(spec.lane)
    if wider is None or 1 / max(1 - share, 1e-9) < WORTH:
        return
    try:
        better = plan(layer, spec.input, spec.output, lane=wider)
    except FxpError:
        return
    if better.excess < spec.excess / 2:
        text = (
            f"The integers between input and output are {_percent(share)} of the noise. A lane of {wider} bits has a "
            f"proved excess of {better.excess:.3g} LSB instead of {spec.excess:.3g}."
        )
        yield Suggestion(text=text, command=command.calibrate(spec, lane=wider), norms=(name,))


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
