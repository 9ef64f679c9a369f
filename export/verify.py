"""Verification: an exported model against the kernel, bit by bit, and against the float model, by its outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, InputError, ModelError
from ..inference import FxpLayerNorm
from ..params import ModelParams
from ..runtime import Feed, Feeds, Session
from .loading import Model, load_model
from .model import ExportedNorm, exported_norms


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
        Input codes that differ from the quantized float input, and float outputs that differ from the dequantized
        output codes. Not counted where the floats are no float32: consumers may keep more of a float16 than they show.
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
        Of all finite values as one vector; 1 where both are 0.
    max_abs : float or None
        The largest difference; None where one model has a NaN or an infinity that the other has not.
    sqnr_db : float or None
        ``10*log10(sum(float**2) / sum((float - exported)**2))``; None where one of the sums is 0.
    """

    name: str
    max_abs: float | None = 0.0
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
        finite = np.isfinite(a) & np.isfinite(b)
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        a, b = a[finite], b[finite]
        difference = a - b
        self._float_power += float(a @ a)
        self._power += float(b @ b)
        self._product += float(a @ b)
        self._noise += float(difference @ difference)
        if not same:
            self.max_abs = None
        elif self.max_abs is not None:
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


class Verifier:
    """Runs an exported model and compares it, a feed at a time.

    Parameters
    ----------
    exported : path, onnx.ModelProto or onnx_ir.Model
        What `quantize_model` made.
    params : ModelParams
        What it was made with.

    Raises
    ------
    ModelError
        If the model can't be read or loaded, or doesn't hold the norms of `params`.
    """

    def __init__(self, exported: Model, params: ModelParams) -> None:
        model = load_model(exported)
        self._places = exported_norms(model)
        specs = {norm.name: norm.spec for norm in params.norms}
        names = {place.name for place in self._places}
        if names != set(specs):
            odd = sorted(names ^ set(specs))[0]
            raise ModelError(f"the norm {odd!r} is in only one of the exported model and the parameters")
        self._kernels = {name: FxpLayerNorm(spec) for name, spec in specs.items()}
        self._norms = {name: NormCheck(name) for name in specs}
        values = {
            value: specs[place.name].normalized_shape
            for place in self._places
            for value in (place.input, place.codes_in, place.codes_out, place.output)
            if value is not None
        }
        self._session = Session(model, values)
        self._outputs = {name: OutputCheck(name) for name in self._session.outputs}

    def update(self, feed: Feed, expected: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one feed and compare.

        Parameters
        ----------
        feed : mapping of str to ndarray
        expected : mapping of str to ndarray
            The float model's outputs for it.

        Returns
        -------
        dict of str to ndarray
            The exported model's outputs.

        Raises
        ------
        ModelError
            If the two models have different outputs.
        DataError
            If the feed doesn't fit.
        """
        values = self._session.run(feed)
        for place in self._places:
            self._compare(place, values)
        for name, check in self._outputs.items():
            if name not in expected:
                raise ModelError(f"the float model has no output {name!r}")
            if not isinstance(values[name], np.ndarray):
                raise ModelError(
                    f"the output {name!r} is a {type(values[name]).__name__}; only tensors can be compared"
                )
            check.update(expected[name], values[name])
        return {name: values[name] for name in self._outputs}

    def result(self) -> Verification:
        """Return the counts so far."""
        return Verification(list(self._norms.values()), list(self._outputs.values()))

    def _compare(self, place: ExportedNorm, values: Mapping[str, npt.NDArray[Any]]) -> None:
        codes_in, codes_out = values[place.codes_in], values[place.codes_out]
        check, kernel = self._norms[place.name], self._kernels[place.name]
        check.codes += codes_out.size
        try:
            check.mismatches += int(np.count_nonzero(kernel(codes_in) != codes_out))
        except InputError as error:
            raise ModelError(f"the norm {place.name!r} was exported with other parameters: {error}") from error
        x, y = (None if name is None else values[name] for name in (place.input, place.output))
        if x is not None and x.dtype == np.float32:
            check.border_mismatches += int(np.count_nonzero(kernel.quantize(x) != codes_in))
        if y is not None and y.dtype == np.float32:
            check.border_mismatches += int(np.count_nonzero(kernel.dequantize(codes_out) != y))


def verify(
    model: Model, exported: Model, params: ModelParams, feeds: Feeds, *, advance: Callable[[], None] = lambda: None
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
    verifier, reference = Verifier(exported, params), Session(load_model(model))
    for feed in feeds:
        verifier.update(feed, reference.run(feed))
        advance()
    result = verifier.result()
    if not result.codes:
        raise DataError("no code was compared: the feeds hold no row")
    return result
