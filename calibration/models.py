"""Calibrating all norms of an ONNX model, in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Unpack

from ..errors import DataError, FxpError, ModelError
from ..export.loading import Model, load_model
from ..export.norms import Norm, find_norms
from ..export.qdq import find_border
from ..export.residual import find_residual
from ..params import CalibrationWarning, ModelParams, NormParams, SideRecord
from ..quantization import DType, QuantParams
from ..runtime import FeedHash, Feeds
from ..spec import LayerNormSpec
from .engine import Engine, LocalEngine
from .layers import NormCalibration
from .observation import Job, ModelObserver, ObservedNorm, StateFile
from .options import CalibrationOptions, OptionKeywords
from .record import hardware_record, model_sha256, side_record, versions
from .warnings import find_warnings


class ModelCalibration:
    """Observes every norm of a model while it runs; specs of several formats can then be planned.

    Memory is bounded by the activations of the feeds that run at a time, and the observers. Each feed is run once.

    Parameters
    ----------
    model : path or onnx.ModelProto
    fuse_residual : bool
        Whether a norm takes the codes of both addends where it follows the sum of two tensors: the sum then has 16 bits
        and is no tensor of the model. Where more than the norm reads it, it is an output of the norm besides.
    observe_addends : bool
        Whether both addends are observed in any case, so that either can be planned; see `spec`.

    Attributes
    ----------
    norms : list of Norm
        Those that can be replaced.
    model_sha256 : str

    Raises
    ------
    ModelError
        If the model can't be read, or has no norm that can be replaced.
    """

    def __init__(self, model: Model, *, fuse_residual: bool = False, observe_addends: bool = False) -> None:
        loaded = load_model(model)
        self.model_sha256, self._fuse_residual = model_sha256(model, loaded), fuse_residual
        found = find_norms(loaded)
        self.norms = [norm for norm in found if norm.layer is not None]
        self._blocked = [norm for norm in found if norm.layer is None]
        if not self.norms:
            blocked = "".join(f"; {norm.name}: {norm.blocker}" for norm in self._blocked)
            raise ModelError(f"the model has no norm that can be replaced{blocked}")
        borders = {norm.name: find_border(norm, fuse_residual=fuse_residual) for norm in self.norms}
        self._borders = {name: border for name, border in borders.items() if border is not None}
        self._observed = tuple(
            ObservedNorm(norm.name, norm.layer, norm.input, norm.output)
            for norm in self.norms
            if norm.layer is not None
        )
        self._adds = {
            norm.name: add
            for norm in self.norms
            if (fuse_residual or observe_addends) and norm.name not in self._borders
            if (add := find_residual(norm)) is not None
        }
        addends = tuple(
            ObservedNorm(
                _addends(norm.name), norm.layer, *(value.name or "" for value in self._adds[norm.name].addends)
            )
            for norm in self._observed
            if norm.name in self._adds
        )
        self._job = Job(loaded, self._observed + addends)
        self._seen = ModelObserver(self._observed + addends)

    @property
    def feeds(self) -> int:
        """The number of feeds observed."""
        return self._seen.feeds

    @property
    def skipped(self) -> list[Norm]:
        """Norms that get no parameters, with the reason: those that can't be replaced, and those that no feed ran."""
        idle = [norm for norm in self.norms if not self._ran(norm.name)]
        return self._blocked + [replace(norm, blocker="the data never runs it") for norm in idle]

    def _ran(self, name: str) -> bool:
        observer = self._seen.norms[name]
        return bool(observer.rows or observer.left_out)

    def observe(
        self,
        feeds: Feeds,
        advance: Callable[[int], None] = lambda count: None,
        *,
        engine: Engine | None = None,
        state: str | Path | None = None,
    ) -> None:
        """Run the model on each feed and observe its norms.

        Parameters
        ----------
        feeds : Feeds
        advance : callable
            Called with the number of feeds that are new since its last call.
        engine : Engine, optional
            Where the feeds are run; by default on the threads of this process.
        state : path, optional
            A file to keep the observers in: where it exists, the feeds that it has seen are not run again, and it is
            written every few seconds and at the end. What is read and written is the same with every engine.

        Raises
        ------
        DataError
            If there is no feed, one doesn't fit the model, or the first feeds are not those of the state file.
        """
        file = None if state is None else StateFile(state, self.model_sha256)
        numbered = enumerate(feeds, self._seen.feeds)
        if file is not None and not self._seen.feeds and file.load(self._seen):
            seen = FeedHash()
            for number, feed in islice(numbered, self._seen.feeds):
                seen.update(feed, number)
                advance(1)
            if seen.total != self._seen.data.total:
                raise DataError(
                    f"{state} was made with other data than the first {self._seen.feeds} feeds; remove it to start anew"
                )
        (engine or LocalEngine()).run(self._job, numbered, self._seen, advance, file)
        for observer in self._seen.norms.values():
            observer.settle()
        if file is not None:
            file.save(self._seen)

    def calibration(self, name: str) -> NormCalibration:
        """Return the calibration of the norm of this name, for what was observed."""
        (norm,) = (norm for norm in self._observed if norm.name == name)
        return NormCalibration(norm.layer, self._seen.norms[name])

    @property
    def names(self) -> list[str]:
        """The norms that get parameters; before any data, all that can."""
        names = [norm.name for norm in self._observed]
        return [name for name in names if self._ran(name)] or names

    def is_free(self, name: str) -> bool:
        """Tell whether a norm's parameters are to be chosen, and don't stand in the model."""
        return name not in self._borders

    def can_fuse(self, name: str) -> bool:
        """Tell whether a norm can add a residual itself, and its addends are observed."""
        return name in self._adds

    def spec(self, name: str, options: CalibrationOptions, *, fuse: bool) -> LayerNormSpec:
        """Return a norm's spec for what was observed.

        Parameters
        ----------
        name : str
        options : CalibrationOptions
            Norms between quantizers keep the types and scales that the model has for them.
        fuse : bool
            Whether the norm adds a residual itself where it can.
        """
        calibration, border = self.calibration(name), self._borders.get(name)
        try:
            if border is not None:
                return border.plan(calibration.layer, options.lane, options.hardware)
            if not (fuse and self.can_fuse(name)):
                return calibration.spec(options)
            addends = self._seen.norms[_addends(name)]
            return calibration.spec_with_residual(options, addends, with_sum=self._adds[name].shared)
        except FxpError as error:
            raise type(error)(f"norm {name!r}: {error}") from error

    def codes_before(
        self, name: str, options: CalibrationOptions, made: Mapping[str, LayerNormSpec]
    ) -> tuple[QuantParams | None, QuantParams | None]:
        """Return the parameters of the codes that a norm's addends come from, by the specs of other norms.

        None where an addend is no other norm's output of the same channels, or has codes of another type than the
        options ask for.
        """
        layer = self.calibration(name).layer

        def find(value: str | None) -> QuantParams | None:
            for norm in self._observed:
                if norm.output == value and norm.name in made and self.is_free(norm.name):
                    params = made[norm.name].output
                    alike = (norm.layer.normalized_shape, norm.layer.axes) == (layer.normalized_shape, layer.axes)
                    if alike and (params.dtype, params.lo) == (options.input.dtype, options.input.lo):
                        return params
            return None

        if name not in self._adds:
            return None, None
        first, second = self._adds[name].addends
        return find(first.name), find(second.name)

    def linked(
        self,
        name: str,
        spec: LayerNormSpec,
        options: CalibrationOptions,
        codes: tuple[QuantParams | None, QuantParams | None],
    ) -> LayerNormSpec:
        """Return a norm's spec whose addends keep the codes that `codes_before` found; see `spec_with_codes`."""
        if spec.residual is None or codes == (None, None):
            return spec
        return self.calibration(name).spec_with_codes(spec, options, self._seen.norms[_addends(name)], codes)

    def _taken_from(self, name: str, spec: LayerNormSpec, entries: Iterable[NormParams]) -> SideRecord | None:
        """Return how the codes of a norm's first addend were chosen, where they are those of another norm's output."""
        value = self._adds[name].addends[0].name if name in self._adds and spec.residual is not None else None
        return next((e.output_record for e in entries if e.output == value and e.spec.output == spec.input), None)

    def params(self, options: CalibrationOptions | None = None) -> ModelParams:
        """Return the specs of all norms for what was observed, by default for codes of int8.

        Norms between quantizers keep the types and scales that the model has for them.
        """
        options = CalibrationOptions() if options is None else options
        specs: dict[str, LayerNormSpec] = {}
        for name in self.names:
            own = self.spec(name, options, fuse=self._fuse_residual)
            specs[name] = self.linked(name, own, options, self.codes_before(name, options, specs))
        return self.assembled({name: (spec, options) for name, spec in specs.items()})

    def assembled(self, specs: Mapping[str, tuple[LayerNormSpec, CalibrationOptions]]) -> ModelParams:
        """Return these specs, of all norms in `names` and with the options that each came of, with their record."""
        entries: list[NormParams] = []
        warnings: list[CalibrationWarning] = []
        for norm in self._observed:
            if norm.name not in specs:
                continue
            spec, options = specs[norm.name]
            calibration, free = self.calibration(norm.name), self.is_free(norm.name)
            seen = calibration.observer
            entries.append(
                NormParams(
                    name=norm.name, input=norm.input, output=norm.output, rows=seen.rows, left_out=seen.left_out,
                    input_record=self._taken_from(norm.name, spec, entries)
                    or side_record(options.input if free else None, seen.input),
                    output_record=side_record(options.output if free else None, seen.output),
                    sqnr_db=calibration.sqnr_db(spec, self._seen.norms.get(_addends(norm.name))), spec=spec,
                )
            )  # fmt: skip
            warnings += find_warnings(norm, seen)
        return ModelParams(
            model_sha256=self.model_sha256,
            data_sha256=self._seen.data.hexdigest(),
            feeds=self._seen.feeds,
            versions=versions(runtime=True),
            warnings=tuple(warnings),
            norms=tuple(entries),
            lane=options.lane,
            hardware=hardware_record(options.hardware),
            fuse_residual=self._fuse_residual,
        )


def _addends(norm: str) -> str:
    """Return the name under which the addends before a norm are observed."""
    return f"{norm}/addends"


def calibrate_model(
    model: Model,
    feeds: Feeds,
    input: DType | str = "int8",
    output: DType | str = "int8",
    *,
    fuse_residual: bool = False,
    **options: Unpack[OptionKeywords],
) -> ModelParams:
    """Return the integer form of every norm of a model, for scales found on real data; see `calibrate`.

    Unlike there, rows that hold NaN or infinite values are left out; the result's ``warnings`` tell of them.
    """
    chosen = CalibrationOptions.of(input, output, **options)
    calibration = ModelCalibration(model, fuse_residual=fuse_residual)
    calibration.observe(feeds)
    return calibration.params(chosen)
