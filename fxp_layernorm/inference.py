"""FxpLayerNorm: the compiled norm behind an array-like face."""

from __future__ import annotations

import functools
import math
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import adder_arguments, column_arguments, kernel_arguments, type_ends
from .axes import from_rows, long_rows, same_place, to_rows
from .errors import CodeTypeError, InputError
from .quantization import QuantParams
from .reference import check_operands
from .spec import LayerNormSpec
from .threads import TEAM, available_cores, share

#: A thread takes at least this many elements by default, some 25 us: two threads then gain where calls follow each
#: other, and lose little where one has to be woken, which takes as long.
THREAD_ELEMENTS = 1 << 18
#: A part of this many rows is as large as the kernel likes it.
ALL = 1 << 62
#: Rows that have to be copied or added are so in blocks of about this many elements.
COPY_ELEMENTS = 1 << 16
#: Of this many, where threads share the work on a block.
SHARED_ELEMENTS = 1 << 20

_Array = npt.NDArray[Any]


class FxpLayerNorm:
    """A norm that takes integer codes and returns integer codes, by the Numba kernel of its spec.

    Parameters
    ----------
    spec : LayerNormSpec
    threads : int, optional
        How many threads a call uses at most. By default as many as the process may use cores, but one for small inputs.
        The result doesn't depend on it.

    Examples
    --------
    >>> norm = FxpLayerNorm(spec)  # doctest: +SKIP
    >>> q_out = norm(norm.quantize(x))  # doctest: +SKIP
    """

    def __init__(self, spec: LayerNormSpec, threads: int | None = None) -> None:
        self.spec = spec
        self.threads = _check_threads(threads)
        self._n = spec.n
        self._shape = spec.normalized_shape
        self._in_dtype = spec.input.dtype.numpy
        self._out_dtype = spec.output.dtype.numpy
        last = spec.axes == tuple(range(-len(spec.axes), 0))
        self._simple = last and spec.adder is None and (spec.input.lo, spec.input.hi) == type_ends(self._in_dtype)
        self._last = last
        self._arguments = kernel_arguments(spec)
        together = len(spec.axes) == spec.axes[-1] - spec.axes[0] + 1
        across = together and not last and spec.adder is None
        self._columns = column_arguments(spec, self._arguments) if across else ()
        self._adder = None if spec.adder is None else adder_arguments(spec)

    def __repr__(self) -> str:
        spec = self.spec
        codes = " + ".join(params.dtype for params in spec.operands)
        return f"FxpLayerNorm({spec.normalized_shape}, {codes} -> {spec.output.dtype}, lane {spec.lane})"

    def __call__(
        self,
        q: npt.ArrayLike,
        out: _Array | None = None,
        *,
        residual: npt.ArrayLike | None = None,
        threads: int | None = None,
    ) -> _Array:
        """Return the output codes of input codes.

        Nothing is copied where each row lies in one piece and the rows a fixed step apart (contiguous arrays, slices of
        wider ones), nor where the rows of a contiguous array lie across (the channels of images, unless a residual is
        added). Whatever else (transposed arrays, axes that are apart, an output in the place of an input) is copied, a
        block of rows that stays in the cache at a time.

        Parameters
        ----------
        q : array_like
            Codes of the dtype ``spec.input.dtype``, with the dimensions ``spec.normalized_shape`` at ``spec.axes``.
        out : ndarray, optional
            Takes the result: of the shape of `q` and the dtype ``spec.output.dtype``. It may be `q` itself.
        residual : array_like, optional
            Codes of ``spec.residual``, of the shape of `q`, where the spec has one.
        threads : int, optional
            Takes the place of the constructor's for this call.

        Raises
        ------
        CodeTypeError, InputError
            If the dtype, shape or range of the codes or of `out` doesn't fit the spec, `out` is read-only, or `threads`
            is below 1.
        """
        # the whole check takes as long as the row of 768 elements that it guards
        simple = self._simple and residual is None and type(q) is np.ndarray and q.dtype is self._in_dtype
        if simple and q.ndim == 2 and q.shape[1:] == self._shape:  # type: ignore[union-attr]
            codes: _Array = q  # type: ignore[assignment]
            flags = codes.flags
            if flags.c_contiguous and flags.aligned and (out is None or self._takes(out, codes)):
                wanted = self.threads if threads is None else threads
                if wanted is None and codes.size < 2 * THREAD_ELEMENTS:
                    wanted = 1
                count = 1 if wanted == 1 else self._threads(codes.size, len(codes), threads)
                result = np.empty(codes.shape, dtype=self._out_dtype) if out is None else out
                rows = codes.view()
                rows.flags.writeable = False
                if count == 1:
                    _kernels().run(0, ALL, rows, result, *self._arguments)
                else:
                    TEAM.call(count, _kernels().run, _block(len(rows), count), rows, result, *self._arguments)
                return result
            operands: list[_Array] = [codes]
        else:
            operands = check_operands(self.spec, q, residual)
        return self._call(operands, out, None, threads)

    def with_sum(
        self, q: npt.ArrayLike, residual: npt.ArrayLike | None = None, *, threads: int | None = None
    ) -> tuple[_Array, _Array]:
        """Return the output codes and the codes of the sum, of a spec that has a `sum_output`."""
        if self.spec.sum_output is None:
            raise InputError("the spec has no sum_output")
        operands = check_operands(self.spec, q, residual)
        sums = np.empty(operands[0].shape, dtype=self.spec.sum_output.dtype.numpy)
        return self._call(operands, None, sums, threads), sums

    def _takes(self, out: _Array, codes: _Array) -> bool:
        """Whether the output is as simple as the codes; what it must be otherwise, `_check_out` says."""
        simple = type(out) is np.ndarray and out.dtype is self._out_dtype and out.shape == codes.shape
        return simple and out.flags.carray and not np.may_share_memory(out, codes)

    def _call(self, operands: list[_Array], out: _Array | None, sums: _Array | None, threads: int | None) -> _Array:
        shape = operands[0].shape
        shared: list[_Array] = []
        result, in_place = out, False
        if out is not None:
            self._check_out(out, shape)
            shared = [codes for codes in operands if np.may_share_memory(out, codes)]
            in_place = bool(shared) and all(same_place(out, codes) for codes in shared)
        if result is None or (shared and not in_place):
            result = np.empty(shape, dtype=self._out_dtype)
        results = [result] if sums is None else [result, sums]
        arrays = [*operands, *results]
        rows = [long_rows(array, len(self._shape)) for array in arrays] if self._last else [None]
        if all(array is not None for array in rows):
            self._run_rows(rows[: len(operands)], rows[len(operands) :], threads, in_place)  # type: ignore[arg-type]
        elif (
            self._columns and not in_place and all(array.flags.c_contiguous and array.flags.aligned for array in arrays)
        ):
            self._run_columns(operands[0], result, threads)
        else:
            self._run_blocks(operands, results, threads)
        if out is not None and result is not out:
            out[...] = result
            return out
        return result

    def _run_rows(self, inputs: list[_Array], outputs: list[_Array], threads: int | None, in_place: bool) -> None:
        """Compute rows where they are; copies of a few, where the output takes the codes' place."""
        for rows in inputs:
            rows.setflags(write=False)  # one type of array for the kernel, whether the caller's is read-only or not
        count = len(inputs[0])
        threads = self._threads(count * self._n, count, threads)
        if self._adder is not None or not in_place:  # sums are made before the output is
            self._compute(inputs, outputs, threads)
            return
        step = max(1, (COPY_ELEMENTS if threads == 1 else SHARED_ELEMENTS) // self._n)
        for start in range(0, count, step):
            copy = inputs[0][start : start + step, : self._n].copy()
            copy.setflags(write=False)
            self._compute([copy], [outputs[0][start : start + step]], threads)

    def _run_columns(self, codes: _Array, result: _Array, threads: int | None) -> None:
        """Compute rows that lie across, such as the channels of images, where they are."""
        end = codes.ndim + self.spec.axes[-1] + 1
        positions = math.prod(codes.shape[end:])
        count = codes.size // (self._n * positions) if codes.size else 0
        inputs, outputs = (array.reshape(count, self._n, positions) for array in (codes, result))
        inputs.setflags(write=False)
        threads = self._threads(codes.size, codes.size // self._n, threads)
        block = max(1, min(positions, _block(codes.size // self._n, threads)))
        _call(threads, _kernels().run_columns, block, inputs, outputs, *self._columns)

    def _run_blocks(self, operands: list[_Array], results: list[_Array], threads: int | None) -> None:
        """Compute arrays of any layout, by copies of a few rows."""
        axes, n = self.spec.axes, self._n
        last = range(-len(axes), 0)
        inputs, outputs = ([np.moveaxis(array, axes, last) for array in arrays] for arrays in (operands, results))
        leading = inputs[0].shape[: -len(axes)]
        if not inputs[0].size:
            return
        axis = int(np.argmax(leading)) if leading else 0
        length = leading[axis] if leading else 1
        step = max(1, COPY_ELEMENTS * length // inputs[0].size)
        parts = [
            (slice(None),) * axis + (slice(start, start + step),) if leading else () for start in range(0, length, step)
        ]

        def work(part: tuple[slice, ...]) -> None:
            copies = [np.array(array[part], order="C").reshape(-1, n) for array in inputs]
            for rows in copies:
                rows.setflags(write=False)
            blocks = [np.empty((len(copies[0]), n), dtype=array.dtype) for array in outputs]
            self._compute(copies, blocks, 1)
            for array, block in zip(outputs, blocks, strict=True):
                array[part] = block.reshape(array[part].shape)

        share(self._threads(inputs[0].size, len(parts), threads), parts, work)

    def _threads(self, elements: int, parts: int, threads: int | None) -> int:
        threads = self.threads if threads is None else _check_threads(threads)
        if threads is None:
            threads = 1 if elements < 2 * THREAD_ELEMENTS else min(available_cores(), elements // THREAD_ELEMENTS)
        return max(1, min(threads, parts))

    def _compute(self, inputs: list[_Array], outputs: list[_Array], threads: int) -> None:
        """Run the kernels on rows: with an input stage, in blocks whose sums stay in the cache."""
        block = _block(len(inputs[0]), threads)
        if self._adder is None:
            _call(threads, _kernels().run, block, inputs[0], outputs[0], *self._arguments)
            return
        q, residual = inputs if len(inputs) > 1 else (inputs[0], None)
        out, sums = outputs if len(outputs) > 1 else (outputs[0], None)
        block = max(1, min(block, COPY_ELEMENTS // self._n))
        _call(threads, _kernels().run_sums, block, q, out, residual, sums, *self._adder, self._arguments)

    def quantize(self, x: npt.ArrayLike, params: QuantParams | None = None) -> npt.NDArray[Any]:
        """Return the codes of real values: those of the input, or of other parameters, as the residual's."""
        return self._by_channel(np.asarray(x), (params or self.spec.input).quantize)

    def dequantize(self, q: npt.ArrayLike, params: QuantParams | None = None) -> npt.NDArray[np.float32]:
        """Return the real values of codes: those of the output, or of other parameters, as the sum's."""
        return self._by_channel(np.asarray(q), (params or self.spec.output).dequantize)

    def forward(self, x: npt.ArrayLike, residual: npt.ArrayLike | None = None) -> npt.NDArray[np.float32]:
        """Return the norm of real values through the integers: quantize, the kernel, dequantize."""
        other = None if residual is None else self.quantize(residual, self.spec.residual)
        return self.dequantize(self(self.quantize(x), residual=other))

    def _by_channel(self, array: _Array, convert: Callable[[_Array], _Array]) -> _Array:
        rows = to_rows(array, self._shape, self.spec.axes)
        return np.ascontiguousarray(from_rows(convert(rows), array.shape, self.spec.axes))

    def _check_out(self, out: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        if not isinstance(out, np.ndarray) or out.dtype != self._out_dtype:
            kind = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
            raise CodeTypeError(f"out is of type {kind}; it must be an array of {self._out_dtype}")
        if out.shape != shape:
            raise InputError(f"out has the shape {out.shape}; the codes have {shape}")
        if not out.flags.writeable:
            raise InputError("out is read-only")


def _block(rows: int, threads: int) -> int:
    """Return the most rows of a part: a few parts a thread, so that one with half a core doesn't hold up the others."""
    return ALL if threads <= 1 else -(-rows // (4 * threads))


def _call(threads: int, kernel: Callable[..., None], *arguments: Any) -> None:
    if threads <= 1:
        kernel(0, *arguments)
    else:
        TEAM.call(threads, kernel, *arguments)


_LOADING = threading.Lock()


def _kernels() -> Any:
    """Return the kernels, which are loaded, and Numba with them, when they are first needed."""
    with _LOADING:  # two threads that import Numba at once wait for each other forever
        return _loaded()


@functools.cache
def _loaded() -> Any:
    from numba.core import event

    from . import kernels

    announced = kernels.run, kernels.run_columns, kernels.run_sums

    class Announce(event.Listener):
        def on_start(self, event: Any) -> None:
            if event.data.get("dispatcher") in announced and sys.stderr.isatty():
                q, out = event.data["args"][2:4]
                print(f"fxp-layernorm: compiling the kernel for {q.dtype} -> {out.dtype}, once", file=sys.stderr)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Announce())  # type: ignore[no-untyped-call]
    return kernels


def _check_threads(threads: int | None) -> int | None:
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads!r}; it must be an integer of at least 1")
    return threads
