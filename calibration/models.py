"""Calibrating all norms of an ONNX model, in one pass over the data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Unpack

import onnx

from ..errors import DataError, FxpError, InputError, ModelError
from ..export.loading import Model, load_model
from ..export.norms import Norm, find_norms
from ..export.qdq import find_border
from ..params import ModelParams, NormParams
from ..planner import plan
from ..quantization import DType
from ..runtime import FeedHash, Feeds, Session
from .layers import NormCalibration
from .options import CalibrationOptions, OptionKeywords


class ModelCalibration:
    """Observes every norm of a model while it runs; specs of several formats can then be planned.

    Memory is bounded by one feed's activations and the observers. Each feed is run once.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model

    Attributes
    ----------
    norms : list of Norm
        Those that can be replaced.

    Raises
    ------
    ModelError
        If the model can't be read, or has no norm that can be replaced.
    """

    def __init__(self, model: Model) -> None:
        self._model_hash = model_sha256(model)
        loaded = load_model(model)
        found = find_norms(loaded)
        self.norms = [norm for norm in found if norm.layer is not None]
        self._blocked = [norm for norm in found if norm.layer is None]
        if not self.norms:
            blocked = "".join(f"; {norm.name}: {norm.blocker}" for norm in self._blocked)
            raise ModelError(f"the model has no norm that can be replaced{blocked}")
        self._borders = {norm.name: border for norm in self.norms if (border := find_border(norm)) is not None}
        self._session = Session(
            loaded, {value: norm.normalized_shape for norm in self.norms for value in (norm.input, norm.output)}
        )
        self._calibrations = {norm.name: NormCalibration(norm.layer) for norm in self.norms if norm.layer is not None}
        self._data_hash = FeedHash()
        self._feeds = 0

    @property
    def skipped(self) -> list[Norm]:
        """Norms that get no parameters, with the reason: those that can't be replaced, and those that no feed ran."""
        idle = [norm for norm in self.norms if not self._ran(norm)]
        return self._blocked + [replace(norm, blocker="the data never runs it") for norm in idle]

    def _ran(self, norm: Norm) -> bool:
        observer = self._calibrations[norm.name].observer
        return bool(observer.rows or observer.left_out)

    def observe(self, feeds: Feeds, advance: Callable[[], None] = lambda: None) -> None:
        """Run the model on each feed and observe its norms.

        Raises
        ------
        DataError
            If there is no feed, one doesn't fit the model, or a norm's values are not finite.
        """
        for feed in feeds:
            values = self._session.run(feed)
            for norm in self.norms:
                try:
                    observer = self._calibrations[norm.name].observer
                    observer.update(values[norm.input], values[norm.output], feed=self._feeds)
                except FxpError as error:
                    raise DataError(f"feed {self._feeds}, norm {norm.name!r}: {error}") from error
            self._data_hash.update(feed)
            self._feeds += 1
            advance()

    def params(self, options: CalibrationOptions | None = None) -> ModelParams:
        """Return the specs of all norms for what was observed, by default for codes of int8.

        Norms between quantizers keep the types and scales that the model has for them.
        """
        options = CalibrationOptions() if options is None else options
        entries = []
        for norm in list(filter(self._ran, self.norms)) or self.norms:
            calibration = self._calibrations[norm.name]
            try:
                border = self._borders.get(norm.name)
                if border is None or norm.layer is None:
                    spec = calibration.spec(options)
                else:
                    spec = plan(norm.layer, border.input, border.output, lane=options.lane)
            except FxpError as error:
                raise type(error)(f"norm {norm.name!r}: {error}") from error
            entries.append(
                NormParams(
                    name=norm.name, input=norm.input, output=norm.output, rows=calibration.observer.rows,
                    sqnr_db=calibration.sqnr_db(spec), spec=spec,
                )
            )  # fmt: skip
        return ModelParams(
            model_sha256=self._model_hash,
            data_sha256=self._data_hash.hexdigest(),
            feeds=self._feeds,
            input_method=options.input.method,
            output_method=options.output.method,
            norms=tuple(entries),
        )


def calibrate_model(
    model: Model,
    feeds: Feeds,
    input: DType | str = "int8",
    output: DType | str = "int8",
    **options: Unpack[OptionKeywords],
) -> ModelParams:
    """Return the integer form of every norm of a model, for scales found on real data; see `calibrate`."""
    chosen = CalibrationOptions.of(input, output, **options)
    calibration = ModelCalibration(model)
    calibration.observe(feeds)
    return calibration.params(chosen)


def model_sha256(model: Model) -> str:
    """Return the hash of a model's bytes; raises ModelError if they can't be read."""
    if isinstance(model, str | PathLike):
        try:
            with Path(model).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelError(f"{model} can't be read: {error.strerror}") from error
    if isinstance(model, onnx.ModelProto):
        return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    raise InputError("a path or an onnx.ModelProto is expected")
