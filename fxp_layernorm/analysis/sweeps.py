"""Formats tried one by one, in parallel: what each costs, how accurate it is, and which no other one beats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import files
from ..axes import row_shape, stacked
from ..calibration import CalibrationOptions, Method, ModelCalibration, NormCalibration, NormObserver
from ..calibration.layers import each_sample
from ..errors import DataError, FxpError, InputError, ModelError
from ..export import OutputCheck, find_norms, load_model, quantize_model
from ..export.loading import Model
from ..inference import FxpLayerNorm
from ..layer import LayerNorm, RMSNorm
from ..quantization import DType
from ..runtime import Feed, Feeds, Session
from ..spec import LayerNormSpec
from ..threads import available_cores
from .advice import Command
from .cost import Cost, cost
from .models import HELD_BYTES

SWEEP_SCHEMA_VERSION = 1
TYPES = ("int4", "int6", "int8", "int12", "int16")
EXPONENTS = (0, 3, 7)


@dataclass(frozen=True, kw_only=True)
class Format:
    """One combination: the types of the codes, and how their scales are found."""

    input: DType
    output: DType
    method: Method
    exponents: int

    def options(self, lane: int | None) -> CalibrationOptions:
        """Return what calibration takes."""
        return CalibrationOptions.of(self.input, self.output, method=self.method, exponents=self.exponents, lane=lane)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A format that was tried.

    Attributes
    ----------
    format : Format
    lanes : tuple of int
        Bits of the element stage, of all norms.
    sqnr_db : float or None
        Of the output, see `Sweep`; None where there is no error.
    cosine : float
    excess_lsb : float
        The largest proved excess of a norm.
    cost : Cost
    on_front : bool
        Whether no other format is at least as accurate and in no figure dearer; of equal ones the first.
    command : str
        What calibrates for it.
    """

    format: Format
    lanes: tuple[int, ...]
    sqnr_db: float | None
    cosine: float
    excess_lsb: float
    cost: Cost
    on_front: bool
    command: str

    @property
    def accuracy(self) -> float:
        """The SQNR, infinite where there is no error."""
        return math.inf if self.sqnr_db is None else self.sqnr_db


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A format that can't be had, and why."""

    format: Format
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What `sweep` returns.

    Attributes
    ----------
    name : str
        Of the norm or the model.
    accuracy_of : str
        What SQNR and cosine are measured of: one norm's output, or the model's output with the lowest SQNR.
    data : str
        What they were measured on, in words.
    points : tuple of Point
        The most accurate first.
    refused : tuple of Refusal
    """

    __pydantic_config__ = files.STRICT

    name: str
    accuracy_of: str
    data: str
    points: tuple[Point, ...]
    refused: tuple[Refusal, ...]

    @property
    def front(self) -> tuple[Point, ...]:
        """The formats that no other one beats, the most accurate first."""
        return tuple(point for point in self.points if point.on_front)

    def document(self) -> dict[str, Any]:
        """Return what `to_json` writes."""
        return files.document(self, schema_version=SWEEP_SCHEMA_VERSION)

    def to_json(self, path: str | Path) -> None:
        """Write the figures as JSON with a schema version; the file appears whole or not at all."""
        files.save_json(self, path, schema_version=SWEEP_SCHEMA_VERSION)

    def to_html(self, path: str | Path) -> None:
        """Write one HTML file that needs no network.

        Raises
        ------
        MissingDependencyError
            Without matplotlib and Jinja2.
        """
        from .html import sweep_page

        text = sweep_page(self)
        with files.atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _repr_html_(self) -> str | None:
        from .html import framed, sweep_page

        return framed(lambda: sweep_page(self))


#: What one format needs, given its options: the norms with their rows, and its output's error.
_Evaluate = Callable[[CalibrationOptions], tuple[list[tuple[LayerNormSpec, int]], OutputCheck]]


def formats(
    inputs: Sequence[DType | str] = TYPES,
    outputs: Sequence[DType | str] | None = None,
    methods: Sequence[Method | str] = tuple(Method),
    exponents: Sequence[int] = EXPONENTS,
) -> tuple[Format, ...]:
    """Return all combinations of code types, methods and channel exponents, each once.

    Parameters
    ----------
    inputs : sequence of str
        Types of the input codes.
    outputs : sequence of str, optional
        Types of the output codes, each with each of the inputs'; by default the input's own.
    methods : sequence of str
        See `calibration.Method`.
    exponents : sequence of int
        The largest channel exponents, 0 for one scale a tensor.

    Raises
    ------
    InputError
        If a name or a number is unknown, or there is nothing to try.
    """
    pairs = [(dtype, dtype) for dtype in inputs] if outputs is None else list(itertools.product(inputs, outputs))
    found = []
    for (source, sink), method, largest in itertools.product(pairs, methods, exponents):
        options = CalibrationOptions.of(source, sink, method=method, exponents=largest)
        input, output = options.input, options.output
        found.append(
            Format(input=input.dtype, output=output.dtype, method=input.method, exponents=input.exponents)
        )  # fmt: skip
    if not found:
        raise InputError("there is nothing to try: give at least one type, one method and one largest exponent")
    return tuple(dict.fromkeys(found))


def sweep(
    target: LayerNorm | RMSNorm | Model,
    data: Any,
    tried: Sequence[Format] | None = None,
    *,
    norm: str | None = None,
    lane: int | None = None,
    workers: int | None = None,
    model_name: str | None = None,
    data_name: str = "DATA",
    advance: Callable[[], None] = lambda: None,
) -> Sweep:
    """Return the accuracy and the cost of several formats, for a layer or a model.

    Parameters
    ----------
    target : LayerNorm, RMSNorm, or a model (path, onnx.ModelProto or onnx_ir.Model)
        All norms of a model get the same format, but for those between quantizers, which keep theirs.
    data : samples as `calibrate` takes them for a layer, or Feeds (or what `Feeds` takes) for a model
        Scales are found and errors measured on the same data: formats are compared, not promised.
    tried : sequence of Format, optional
        See `formats`, whose defaults these are too.
    norm : str, optional
        Only this norm of the model, by its own output.
    lane : {24, 32, 64}, optional
        By default the narrowest with a small bound, for each format.
    workers : int, optional
        Threads; by default as many as the process may use cores.
    model_name, data_name : str, optional
        How the commands name the files.
    advance : callable
        Called after each format.

    Raises
    ------
    InputError
        If no format can be had, or an option is unknown.
    DataError, ModelError
        If the data or the model can't be used.

    Examples
    --------
    >>> import numpy as np, fxp_layernorm as fxp
    >>> x = np.random.default_rng(0).normal(size=(100, 64))
    >>> few = fxp.analysis.formats(["int8", "int16"], methods=["mse"], exponents=[0])
    >>> [str(point.format.input) for point in fxp.sweep(fxp.LayerNorm(64), x, few).front]
    ['int16', 'int8']
    """
    chosen = tuple(dict.fromkeys(formats() if tried is None else tried))
    if not chosen:
        raise InputError("there is no format to try")
    if workers is not None and (not isinstance(workers, int) or workers < 1):
        raise InputError(f"workers is {workers!r}; it must be an integer of at least 1")
    if isinstance(target, LayerNorm | RMSNorm):
        if norm is not None:
            raise InputError("a layer has no norms to choose from; leave `norm` out")
        command, name = Command(), type(target).__name__
        evaluate, accuracy_of, described = _of_layer(target, data)
    else:
        model_name = model_name or (str(target) if isinstance(target, str | PathLike) else "MODEL.onnx")
        command, name = Command(model_name, data_name), model_name
        feeds = data if isinstance(data, Feeds) else Feeds(data)
        evaluate, accuracy_of, described = _of_model(target, feeds) if norm is None else _of_norm(target, feeds, norm)
    points: list[Point] = []
    refused: list[Refusal] = []
    with ThreadPoolExecutor(workers or available_cores(), thread_name_prefix="fxp-layernorm-sweep") as pool:
        running = {pool.submit(evaluate, each.options(lane)): each for each in chosen}
        try:
            for future in as_completed(running):
                try:
                    points.append(_point(running[future], *future.result(), command, lane))
                except FxpError as error:
                    refused.append(Refusal(format=running[future], reason=str(error)))
                advance()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if not points:
        raise InputError(f"no format can be had; the first is refused because {refused[0].reason}")
    order = {each: index for index, each in enumerate(chosen)}
    refused.sort(key=lambda entry: order[entry.format])
    return Sweep(
        name=name, accuracy_of=accuracy_of, data=described, points=_ranked(points, order), refused=tuple(refused)
    )


def _point(
    tried: Format, norms: list[tuple[LayerNormSpec, int]], check: OutputCheck, command: Command, lane: int | None
) -> Point:
    if check.max_abs is None:
        raise DataError(f"the output {check.name} has NaN or infinite values in one of the two models only")
    options: dict[str, object] = {
        "input": tried.input.value, "output": tried.output.value, "method": tried.method.value,
        "exponents": tried.exponents, **({"lane": lane} if lane else {}),
    }  # fmt: skip
    return Point(
        format=tried,
        lanes=tuple(sorted({spec.lane for spec, _ in norms})),
        sqnr_db=check.sqnr_db,
        cosine=check.cosine,
        excess_lsb=max(float(spec.excess) for spec, _ in norms),
        cost=cost(norms),
        on_front=False,
        command=command.calibrate_to(**options),
    )


def _ranked(points: list[Point], order: dict[Format, int]) -> tuple[Point, ...]:
    """Return the points by accuracy, with those on the front marked."""
    points = sorted(points, key=lambda point: order[point.format])
    figures = np.array([(-p.accuracy, p.cost.bits_moved, p.cost.multiplier, p.cost.row_bits) for p in points])
    marked = []
    for index, (point, mine) in enumerate(zip(points, figures, strict=True)):
        as_good = (figures <= mine).all(axis=1)
        equal = (figures == mine).all(axis=1)
        beaten = bool((as_good & ~equal).any() or equal[:index].any())
        marked.append(replace(point, on_front=not beaten))
    return tuple(sorted(marked, key=lambda point: -point.accuracy))


def _of_layer(layer: LayerNorm | RMSNorm, samples: Any) -> tuple[_Evaluate, str, str]:
    observer = NormObserver(layer)
    each_sample(samples, lambda array: observer.update(array, first=observer.rows))
    evaluate, described = _of_observed(layer, observer)
    return evaluate, "the norm's output", described


def _of_norm(model: Model, feeds: Feeds, name: str) -> tuple[_Evaluate, str, str]:
    loaded = load_model(model)
    found = {norm.name: norm for norm in find_norms(loaded)}
    if name not in found:
        raise ModelError(f"the model has no norm {name!r}; it has {', '.join(found) or 'none'}")
    norm = found[name]
    if norm.layer is None:
        raise ModelError(f"the norm {name!r} can't be replaced: {norm.blocker}")
    session = Session(loaded, dict.fromkeys((norm.input, norm.output), row_shape(norm.normalized_shape, norm.axes)))
    observer = NormObserver(norm.layer)
    for index, feed in enumerate(feeds):
        values = session.run(feed)
        observer.update(values[norm.input], values[norm.output], feed=index)
    evaluate, described = _of_observed(norm.layer, observer)
    return evaluate, f"the output of the norm {name}", described


def _of_observed(layer: LayerNorm | RMSNorm, observer: NormObserver) -> tuple[_Evaluate, str]:
    if not observer.rows:
        raise DataError("there is no row to sweep with")
    observer.settle()
    calibration = NormCalibration(layer, observer)
    rows = stacked(observer.sample.rows(), layer.normalized_shape, layer.axes)
    expected = layer(rows.astype(np.float64))

    def evaluate(options: CalibrationOptions) -> tuple[list[tuple[LayerNormSpec, int]], OutputCheck]:
        spec = calibration.spec(options)
        check = OutputCheck("y")
        check.update(expected, FxpLayerNorm(spec, threads=1).forward(rows))
        return [(spec, observer.rows)], check

    return evaluate, f"{len(rows)} of {observer.rows} rows"


def _of_model(model: Model, feeds: Feeds) -> tuple[_Evaluate, str, str]:
    loaded = load_model(model)
    calibration = ModelCalibration(model)
    calibration.observe(feeds)
    session = Session(loaded)
    held: list[tuple[Feed, dict[str, npt.NDArray[Any]]]] = []
    size = count = 0
    for feed in feeds:
        count += 1
        if held and size > HELD_BYTES:
            continue
        outputs = session.run(feed)
        size += sum(array.nbytes for array in [*feed.values(), *outputs.values()])
        held.append((feed, outputs))

    def evaluate(options: CalibrationOptions) -> tuple[list[tuple[LayerNormSpec, int]], OutputCheck]:
        params = calibration.params(options)
        integer = Session(load_model(quantize_model(loaded, params)))
        checks = {name: OutputCheck(name) for name in integer.outputs}
        for feed, outputs in held:
            for name, actual in integer.run(feed).items():
                checks[name].update(outputs[name], actual)
        return [(norm.spec, norm.rows) for norm in params.norms], _worst(checks.values())

    return evaluate, "the model's output with the lowest SQNR", f"{len(held)} of {count} feeds"


def _worst(checks: Iterable[OutputCheck]) -> OutputCheck:
    return min(
        checks,
        key=lambda check: -math.inf if check.max_abs is None else math.inf if check.sqnr_db is None else check.sqnr_db,
    )
