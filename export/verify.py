"""Verification: an exported model against the kernel, bit by bit, and against the float model, by its outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..axes import row_shape, to_rows
from ..errors import DataError, InputError, ModelError
from ..inference import FxpLayerNorm
from ..params import ModelParams
from ..quantization import DType
from ..runtime import Feed, Feeds, Session
from ..spec import LayerNormSpec
from .checks import NormCheck, OutputCheck, Verification
from .diagnosis import (
    MOST_CODES,
    MOST_ROWS,
    OTHERWISE_RIGHT,
    StageDifference,
    differing_codes,
    differing_values,
    first_difference,
)
from .float_bound import beyond_dequantizer, beyond_float32, beyond_quantizer, beyond_sum
from .loading import Model, load_model
from .model import exported_norms
from .probing import compared_values, with_stages
from .replacing import ExportedNorm, Side
from .subgraph import Form


class Verifier:
    """Runs an exported model, or takes what another consumer made of it, and compares it, a feed at a time.

    Parameters
    ----------
    exported : path, onnx.ModelProto or onnx_ir.Model
        What `quantize_model` made.
    params : ModelParams
        What it was made with.
    results : Feeds, optional
        The values of `probe`'s outputs, computed elsewhere, in the order of the feeds. Without them ONNX Runtime runs
        the model.

    Raises
    ------
    ModelError
        If the model can't be read or loaded, or doesn't hold the norms of `params`.
    """

    def __init__(self, exported: Model, params: ModelParams, results: Feeds | None = None) -> None:
        model = load_model(exported)
        self._places = exported_norms(model)
        specs = {norm.name: norm.spec for norm in params.norms}
        names = {place.name for place in self._places}
        if names != set(specs):
            odd = sorted(names ^ set(specs))[0]
            raise ModelError(f"the norm {odd!r} is in only one of the exported model and the parameters")
        self._specs = specs
        self._kernels = {name: FxpLayerNorm(spec) for name, spec in specs.items()}
        floats = {place.name for place in self._places if place.form == Form.QDQ}
        self._norms = {name: NormCheck(name, beyond=0 if name in floats else None) for name in specs}
        self._outputs = {output.name or "": OutputCheck(output.name or "") for output in model.graph.outputs}
        self._feeds = 0
        self._model, self._stages = with_stages(model, self._places)
        self._session: Session | None = None
        self._results: Iterator[Feed] | None = None
        if results is None:
            self._session = Session(
                model,
                {
                    name: row_shape(specs[norm].normalized_shape, specs[norm].axes)
                    for name, norm in compared_values(self._places)
                },
            )
        else:
            self._results = iter(results)

    def update(self, feed: Feed, expected: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Run one feed, or take the next results, and compare.

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
            If the feed or the results don't fit.
        """
        values = self._session.run(feed) if self._session is not None else self._next()
        for place, stages in zip(self._places, self._stages, strict=True):
            self._compare(place, stages, values, feed)
        for name, check in self._outputs.items():
            if name not in expected:
                raise ModelError(f"the float model has no output {name!r}")
            if name not in values:  # another consumer's results may be of the norms alone
                continue
            if not isinstance(values[name], np.ndarray):
                raise ModelError(
                    f"the output {name!r} is a {type(values[name]).__name__}; only tensors can be compared"
                )
            check.update(expected[name], values[name])
        self._feeds += 1
        return {name: values[name] for name in self._outputs if name in values}

    def result(self) -> Verification:
        """Return the counts so far.

        Raises
        ------
        DataError
            If more results were given than feeds.
        """
        if self._results is not None and next(self._results, None) is not None:
            raise DataError(f"there are more results than feeds, of which there are {self._feeds}")
        return Verification(list(self._norms.values()), list(self._outputs.values()))

    def _next(self) -> Feed:
        assert self._results is not None
        values = next(self._results, None)
        if values is None:
            raise DataError(f"there are results of {self._feeds} feeds only")
        return values

    def _narrowed(self, place: ExportedNorm, values: Feed, feed: Feed) -> Feed:
        """Return values with a norm's codes in their own types: they may be carried in wider ones."""
        held, spec = {**feed, **values}, self._specs[place.name]
        sides = {side.codes: side.params(spec) for side in place.sides}
        codes = {name: _narrowed(held, name, params.dtype) for name, params in sides.items() if params is not None}
        return {**values, **codes}

    def _compare(
        self, place: ExportedNorm, stages: Mapping[str, str], values: Mapping[str, npt.NDArray[Any]], feed: Feed
    ) -> None:
        check, kernel, spec = self._norms[place.name], self._kernels[place.name], self._specs[place.name]
        values = self._narrowed(place, values, feed)
        codes_out = values[place.codes_out]
        check.codes += codes_out.size
        try:
            expected, total = _expected(kernel, place, values)
        except InputError as error:
            raise ModelError(f"the norm {place.name!r} was exported with other parameters: {error}") from error
        if expected.shape != codes_out.shape:
            raise DataError(f"{place.codes_out!r} has the shape {codes_out.shape}; it must have {expected.shape}")
        operands = [_rows(values[side.codes], spec) for side in place.sides if side.enters]
        if total is not None and place.codes_sum is not None:
            check.codes += total.size
            wanted, got = (_rows(array, spec) for array in (total, values[place.codes_sum]))
            self._count(check, "sum_output", wanted, got, lambda: beyond_sum(spec, operands, got))
        if not np.array_equal(expected, codes_out):
            wanted, out = (_rows(array, spec) for array in (expected, codes_out))
            self._count(check, "output", wanted, out, lambda: beyond_float32(spec, operands, out))
            if not check.largest and check.beyond is None:
                check.stage = self._first_stage(place, stages, values, feed)
            check.largest = max(check.largest, int(np.max(np.abs(wanted.astype(np.int64) - out))))
        for side in place.sides:
            self._compare_border(check, kernel, side, values)

    def _count(
        self, check: NormCheck, side: str, expected: npt.NDArray[Any], got: npt.NDArray[Any],
        beyond: Callable[[], npt.NDArray[np.bool_]],
    ) -> None:  # fmt: skip
        """Count the codes that differ; of a float norm, list those that no float32 norm gives."""
        bad = expected != got
        check.mismatches += int(np.count_nonzero(bad))
        if check.beyond is not None and bad.any():
            bad &= beyond()
            check.beyond += int(np.count_nonzero(bad))
        check.differences += differing_codes(side, self._feeds, bad, expected, got, MOST_CODES - len(check.differences))

    def _compare_border(
        self, check: NormCheck, kernel: FxpLayerNorm, side: Side, values: Mapping[str, npt.NDArray[Any]]
    ) -> None:
        """Hold codes against the float value that they are of, where it is float32."""
        x, codes, params = values.get(side.real or ""), values[side.codes], side.params(kernel.spec)
        if x is None or x.dtype != np.float32 or params is None:
            return
        try:
            expected = kernel.quantize(x, params) if side.enters else kernel.dequantize(codes, params)
        except InputError as error:
            raise DataError(
                f"the norm {check.name!r} reads {side.real!r}, of which {error}; verify with data that keep it finite"
            ) from error
        pairs = (x, codes) if side.enters else (codes, x)
        of, got, expected = (_rows(array, kernel.spec) for array in (*pairs, expected))
        bad = got != expected
        check.border_mismatches += int(np.count_nonzero(bad))
        beyond = bad & (beyond_quantizer if side.enters else beyond_dequantizer)(params, of, got)
        check.border_beyond += int(np.count_nonzero(beyond))
        if not check.border_differences:
            check.border_differences = differing_values(side.role, self._feeds, beyond, of, expected, got)

    def _first_stage(
        self, place: ExportedNorm, stages: Mapping[str, str], values: Mapping[str, npt.NDArray[Any]], feed: Feed
    ) -> StageDifference | None:
        """Return the first stage that differs: of the results where they hold stages, else of another run."""
        spec, kernel = self._specs[place.name], self._kernels[place.name]
        if self._session is not None:
            row = row_shape(spec.normalized_shape, spec.axes)
            shapes = {side.codes: row for side in place.sides}
            shapes |= {name: (spec.n if letter[0] in "ut" else 1,) for letter, name in stages.items()}
            values = self._narrowed(place, Session(self._model, shapes).run(feed), feed)
        got = _rows(values[place.codes_out], spec)
        wrong = np.flatnonzero(np.any(_rows(_expected(kernel, place, values)[0], spec) != got, axis=1))[:MOST_ROWS]
        if not wrong.size:
            return OTHERWISE_RIGHT
        held = {}
        for letter, name in stages.items():
            stage = np.asarray(values.get(name, ()))
            if stage.size and stage.size % len(got) == 0:  # else it is a constant of the function
                held[letter] = stage.reshape(len(got), -1)[wrong]
        operands = [_rows(values[side.codes], spec)[wrong] for side in place.sides if side.enters]
        if not held:
            return None
        found = first_difference(spec, place.word, operands, got[wrong], held)
        name = place.codes_out if found.stage == "y" else stages.get(found.value, "")
        return replace(found, value=name, row=None if found.row is None else int(wrong[found.row]))


def _expected(
    kernel: FxpLayerNorm, place: ExportedNorm, values: Mapping[str, npt.NDArray[Any]]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Return the kernel's output codes, and its codes of the sum where the norm has such."""
    residual = None if place.residual is None else values[place.residual]
    if place.codes_sum is None:
        return kernel(values[place.codes_in], residual=residual), None
    return kernel.with_sum(values[place.codes_in], residual)


def _narrowed(values: Mapping[str, npt.NDArray[Any]], name: str, dtype: DType) -> npt.NDArray[Any]:
    """Return codes that may be carried in a wider type; those of any other are left to the kernel to refuse."""
    if name not in values:
        raise DataError(f"the results lack {name!r}; write the model that gives it, to be run elsewhere, with --probe")
    codes = np.asarray(values[name])
    if codes.dtype.kind in "iu" and codes.itemsize <= dtype.numpy.itemsize:
        return codes
    narrow = codes.astype(dtype.numpy)
    if not np.array_equal(narrow, codes):
        raise DataError(f"the results hold {name!r} in {codes.dtype}, with values that are no {dtype}")
    return narrow


def _rows(codes: npt.NDArray[Any], spec: LayerNormSpec) -> npt.NDArray[Any]:
    return to_rows(codes, spec.normalized_shape, spec.axes)


def verify(
    model: Model,
    exported: Model,
    params: ModelParams,
    feeds: Feeds,
    *,
    results: Feeds | None = None,
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
    results : Feeds, optional
        What another consumer made of `exported`, as of `probe`; without them ONNX Runtime runs it.
    advance : callable
        Called after each feed.

    Raises
    ------
    ModelError
        If a model can't be read or run, or `exported` doesn't hold the norms of `params`.
    DataError
        If the feeds don't fit.
    """
    verifier, reference = Verifier(exported, params, results), Session(load_model(model))
    for number, feed in enumerate(feeds):
        try:
            verifier.update(feed, reference.run(feed))
        except DataError as error:
            raise DataError(f"{feeds.name(number)}: {error}") from error
        advance()
    result = verifier.result()
    if not result.codes:
        raise DataError("no code was compared: the feeds hold no row")
    return result
