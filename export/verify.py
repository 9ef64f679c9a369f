"""Verification: an exported model against the kernel, bit by bit, and against the float model, by its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from ..inference import FxpLayerNorm
from ..params import ModelParams
from ..runtime import Feeds, Session
from .model import ExportedNorm, exported_norms
from .norms import Model, load_model


@dataclass
class NormCheck:
    """One norm's counts.

    Attributes
    ----------
    codes : int
        Output codes that were compared.
    mismatches : int
        Those that differ from the kernel's for the same input codes.
    border_mismatches : int
        Input codes that differ from the quantized float input.
    """

    name: str
    codes: int = 0
    mismatches: int = 0
    border_mismatches: int = 0


@dataclass
class OutputCheck:
    """One output of the model against the float model's, over all feeds.

    Attributes
    ----------
    cosine : float
        Of all values as one vector; 1 where both are 0.
    max_abs : float
        The largest difference.
    sqnr_db : float or None
        ``10*log10(sum(float**2) / sum((float - exported)**2))``; None where one of the sums is 0.
    """

    name: str
    max_abs: float = 0.0
    _float_power: float = field(default=0.0, repr=False)
    _power: float = field(default=0.0, repr=False)
    _product: float = field(default=0.0, repr=False)
    _noise: float = field(default=0.0, repr=False)

    def update(self, expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        """Take in the values of one feed."""
        if expected.shape != actual.shape:
            raise ModelError(
                f"the output {self.name!r} has the shape {actual.shape}; the float model's is {expected.shape}"
            )
        a, b = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
        difference = a - b
        self._float_power += float(a @ a)
        self._power += float(b @ b)
        self._product += float(a @ b)
        self._noise += float(difference @ difference)
        self.max_abs = max(self.max_abs, float(np.max(np.abs(difference), initial=0.0)))

    @property
    def cosine(self) -> float:
        """Cosine of the two outputs as vectors."""
        norm = math.sqrt(self._float_power * self._power)
        return self._product / norm if norm else float(self._float_power == self._power)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise."""
        return 10 * math.log10(self._float_power / self._noise) if self._noise and self._float_power else None


@dataclass
class Verification:
    """The result of `verify`."""

    norms: list[NormCheck]
    outputs: list[OutputCheck]

    @property
    def exact(self) -> bool:
        """Whether codes were compared, and none differs, at the border or behind it."""
        return self.codes > 0 and not any(norm.mismatches or norm.border_mismatches for norm in self.norms)

    @property
    def codes(self) -> int:
        """The number of output codes that were compared."""
        return sum(norm.codes for norm in self.norms)

    @property
    def mismatches(self) -> int:
        """The number of codes that differ."""
        return sum(norm.mismatches + norm.border_mismatches for norm in self.norms)


def verify(
    model: Model,
    exported: Model,
    params: ModelParams,
    feeds: Feeds,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Verification:
    """Run both models on data and compare them.

    Every replaced norm's codes are held against the kernel's for the same input codes, and the input codes against
    `QuantParams.quantize` of the float input; the model's outputs against those of the float model.

    Parameters
    ----------
    model, exported : path, onnx.ModelProto or onnx_ir.Model
        The float model, and what `quantize_model` made of it.
    params : ModelParams
    feeds : Feeds
    advance : callable
        Called after each feed.

    Raises
    ------
    ModelError
        If a model can't be read or run, or `exported` doesn't hold the norms of `params`.
    DataError
        If the feeds don't fit.
    """
    exported_model = load_model(exported)
    places = {place.name: place for place in exported_norms(exported_model)}
    specs = {norm.name: norm.spec for norm in params.norms}
    if set(places) != set(specs):
        odd = sorted(set(places) ^ set(specs))[0]
        raise ModelError(f"the norm {odd!r} is in only one of the exported model and the parameters")
    values = [value for place in places.values() for value in (place.input, place.codes_in, place.codes_out)]
    reference, candidate = Session(load_model(model)), Session(exported_model, list(dict.fromkeys(values)))
    if reference.outputs != candidate.outputs[: len(reference.outputs)]:
        raise ModelError("the two models have different outputs")
    kernels = {name: FxpLayerNorm(spec) for name, spec in specs.items()}
    norms = {name: NormCheck(name) for name in specs}
    outputs = [OutputCheck(name) for name in reference.outputs]
    for feed in feeds:
        expected, actual = reference.run(feed), candidate.run(feed)
        for output in outputs:
            output.update(expected[output.name], actual[output.name])
        for name, place in places.items():
            _compare(norms[name], kernels[name], place, actual)
        advance()
    return Verification(list(norms.values()), outputs)


def _compare(check: NormCheck, kernel: FxpLayerNorm, place: ExportedNorm, values: dict[str, npt.NDArray[Any]]) -> None:
    codes_in, codes_out = values[place.codes_in], values[place.codes_out]
    check.codes += codes_out.size
    check.mismatches += int(np.count_nonzero(kernel(codes_in) != codes_out))
    border = kernel.quantize(values[place.input].astype(np.float32))
    check.border_mismatches += int(np.count_nonzero(border != codes_in))
