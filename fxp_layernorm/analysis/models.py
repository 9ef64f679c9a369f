"""Analyzing a model: each norm on its real activations, and what each does to the model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

from ..axes import row_shape
from ..errors import DataError, FxpError
from ..export import Border, Norm, OutputCheck, find_norms, fitting_border, load_model, replace_norms
from ..export.loading import Model
from ..export.residual import find_residual
from ..params import ModelParams, NormParams
from ..runtime import Feed, Feeds, Session
from . import advice
from .advice import Command
from .norms import NormAnalyzer
from .report import Harm, ModelAnalysis, NormAnalysis, OutputError, Suggestion

#: Bytes of inputs and float outputs kept, so that the float model need not run again for each norm.
HELD_BYTES = 256 << 20


@dataclass(frozen=True)
class _Held:
    feed: Feed
    outputs: dict[str, npt.NDArray[Any]]


def analyze_model(
    model: Model,
    params: ModelParams,
    feeds: Feeds,
    *,
    model_name: str | None = None,
    data_name: str = "DATA",
    params_name: str = "PARAMS.json",
    calibration_name: str | None = None,
    advance: Callable[[], None] = lambda: None,
) -> ModelAnalysis:
    """Return where each norm of a model loses what, and which of them hurt the model.

    The float model runs once over the feeds; then, for each norm, the model with only that norm replaced runs over
    as many of them as fit, with their outputs, into `HELD_BYTES`.

    Parameters
    ----------
    model : path, onnx.ModelProto or onnx_ir.Model
    params : ModelParams
        What `calibrate` found; the norms in it are analyzed.
    feeds : Feeds
    model_name, data_name, params_name : str, optional
        How the report and its suggestions name the files.
    calibration_name : str, optional
        What suggestions calibrate on; by default `data_name`.
    advance : callable
        Called after each feed, and after each norm that was replaced: ``len(feeds) + len(params.norms) + 1`` times.

    Raises
    ------
    ModelError
        If the model can't be read or run, or lacks a norm of `params`.
    DataError
        If there is no feed, one doesn't fit the model, or a norm's values are not finite.
    """
    loaded = load_model(model)
    if model_name is None:
        model_name = str(model) if isinstance(model, str | PathLike) else "MODEL.onnx"
    everything = replace_norms(loaded, params).model  # refuses parameters of another model before anything runs
    command = Command(model_name, calibration_name or data_name, params_name)
    analyzers = [NormAnalyzer(norm.spec, norm.name, command) for norm in params.norms]
    found = {norm.name: norm for norm in find_norms(loaded)}
    borders = [fitting_border(found[norm.name], norm.spec) for norm in params.norms]
    operands = [_operands(norm, found[norm.name], border) for norm, border in zip(params.norms, borders, strict=True)]
    shapes = {
        name: row_shape(norm.spec.normalized_shape, norm.spec.axes)
        for norm, names in zip(params.norms, operands, strict=True)
        for name in names
    }
    session = Session(loaded, shapes)
    held: list[_Held] = []
    count = size = 0
    for feed in feeds:
        try:
            values = session.run(feed)
        except DataError as error:
            raise DataError(f"{feeds.name(count)}: {error}") from error
        for norm, analyzer, names in zip(params.norms, analyzers, operands, strict=True):
            try:
                analyzer.update(*(values[name] for name in names))
            except FxpError as error:
                raise DataError(f"{feeds.name(count)}, norm {norm.name!r}: {error}") from error
        outputs = {name: values[name] for name in session.outputs}
        size += sum(array.nbytes for array in [*feed.values(), *outputs.values()])
        if not held or (size <= HELD_BYTES and len(held) == count):
            held.append(_Held(feed, outputs))
        count += 1
        advance()

    harm = []
    for norm in params.norms:
        only = replace_norms(loaded, replace(params, norms=(norm,))).model
        harm.append(_harm(norm.name, only, held))
        advance()
    together = _harm(None, everything, held)
    advance()
    harm.sort(key=lambda entry: entry.worst.severity)
    norms = tuple(analyzer.result() for analyzer in analyzers)
    norms = tuple(  # calibration leaves norms between quantizers as the model has them
        norm if border is None else replace(norm, suggestions=()) for norm, border in zip(norms, borders, strict=True)
    )
    return ModelAnalysis(
        model=model_name, data=data_name, feeds=count, harm_feeds=len(held), harm=tuple(harm), together=together,
        suggestions=_suggestions(harm, norms), norms=norms, compared_feeds=params.compared_feeds, target=params.target,
    )  # fmt: skip


def _operands(entry: NormParams, norm: Norm, border: Border | None) -> list[str]:
    """Return the names of what a norm reads, or of what is added before it where the add is part of it."""
    if border is not None:
        return [value.name or "" for value in border.dequantized]
    add = None if entry.spec.residual is None else find_residual(norm)
    return [entry.input] if add is None else [value.name or "" for value in add.addends]


def _harm(norm: str | None, model: ir.Model, held: list[_Held]) -> Harm:
    session = Session(model)
    checks = {name: OutputCheck(name) for name in session.outputs}
    for entry in held:
        values = session.run(entry.feed)
        for name, check in checks.items():
            check.update(entry.outputs[name], values[name])
    return Harm(
        norm=norm,
        outputs=tuple(
            OutputError(name=check.name, cosine=check.cosine, sqnr_db=check.sqnr_db, max_abs=check.max_abs)
            for check in checks.values()
        ),
    )


def _suggestions(harm: list[Harm], norms: tuple[NormAnalysis, ...]) -> tuple[Suggestion, ...]:
    by_name = {norm.name: norm for norm in norms}
    return advice.merge([made for entry in harm if entry.norm for made in by_name[entry.norm].suggestions])
