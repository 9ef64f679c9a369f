"""FxpLayerNorm: the compiled norm behind an array-like face."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from . import proof
from .errors import CodeTypeError, InputError
from .proof import NormKind
from .reference import check_codes
from .spec import LayerNormSpec

#: A thread takes at least this many elements by default: some 20 us of work, several times what handing it over costs.
THREAD_ELEMENTS = 1 << 17
#: Rows are copied in blocks of about this many elements when the output takes the place of the input.
COPY_ELEMENTS = 1 << 16

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
        self._arguments = _kernel_arguments(spec)

    def __repr__(self) -> str:
        spec = self.spec
        return f"FxpLayerNorm({spec.normalized_shape}, {spec.input.dtype} -> {spec.output.dtype}, lane {spec.lane})"

    def __call__(self, q: npt.ArrayLike, out: _Array | None = None, *, threads: int | None = None) -> _Array:
        """Return the output codes of input codes.

        Parameters
        ----------
        q : array_like of shape (..., *normalized_shape)
            Codes of the dtype ``spec.input.dtype``. Arrays that are not C-contiguous are copied first.
        out : ndarray, optional
            Takes the result: of the shape of `q` and the dtype ``spec.output.dtype``. It may be `q` itself.
        threads : int, optional
            Takes the place of the constructor's for this call.

        Raises
        ------
        CodeTypeError, InputError
            If the dtype or shape of `q` or `out` doesn't fit the spec, `out` is read-only, or `threads` is below 1.
        """
        # the whole check takes as long as the row of 768 elements that it guards
        checked = type(q) is np.ndarray and q.dtype is self._in_dtype and q.ndim == 2 and q.shape[1:] == self._shape
        codes: _Array = q if checked else check_codes(self.spec, q)  # type: ignore[assignment]
        flags = codes.flags
        if not (flags.c_contiguous and flags.aligned):
            codes = codes.copy(order="C")
        rows = codes.reshape(-1, self._n)
        rows.setflags(write=False)  # one type of array for the kernel, whether the caller's is read-only or not
        if out is None:
            result = out = np.empty(codes.shape, dtype=self._out_dtype)
            in_place = False
        else:
            self._check_out(out, codes.shape)
            overlap = np.may_share_memory(out, rows)
            in_place = overlap and out.ctypes.data == codes.ctypes.data and out.itemsize == codes.itemsize
            fits = out.flags.c_contiguous and out.flags.aligned and (in_place or not overlap)
            result = out if fits else np.empty(codes.shape, dtype=self._out_dtype)
        self._run(rows, result.reshape(-1, self._n), in_place and result is out, threads)
        if result is not out:
            out[...] = result
        return out

    def _run(self, rows: _Array, out: _Array, in_place: bool, threads: int | None) -> None:
        threads = self.threads if threads is None else _check_threads(threads)
        if threads is None:
            threads = 1 if rows.size < 2 * THREAD_ELEMENTS else min(_cores(), rows.size // THREAD_ELEMENTS)
        threads = min(threads, len(rows))
        kernel = _kernel_in_place if in_place else _kernel()
        if threads <= 1:
            kernel(rows, out, *self._arguments)
            return
        # a few parts for each thread, so that one which has to share its core doesn't hold up the others
        step = -(-len(rows) // (4 * threads))
        parts = iter([slice(start, start + step) for start in range(0, len(rows), step)])
        helpers = [_pool(threads - 1).submit(self._work, kernel, rows, out, parts) for _ in range(threads - 1)]
        self._work(kernel, rows, out, parts)
        for helper in helpers:
            helper.result()

    def _work(self, kernel: Callable[..., None], rows: _Array, out: _Array, parts: Iterator[slice]) -> None:
        for part in parts:
            kernel(rows[part], out[part], *self._arguments)

    def quantize(self, x: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the input codes of real values of shape (..., *normalized_shape)."""
        values = np.asarray(x)
        return self.spec.input.quantize(self._channels_last(values)).reshape(values.shape)

    def dequantize(self, q: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the real values of output codes of shape (..., *normalized_shape)."""
        codes = np.asarray(q)
        return self.spec.output.dequantize(self._channels_last(codes)).reshape(codes.shape)

    def forward(self, x: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the norm of real values through the integers: quantize, the kernel, dequantize."""
        return self.dequantize(self(self.quantize(x)))

    def _channels_last(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        shape = self.spec.normalized_shape
        if array.ndim < len(shape) or array.shape[array.ndim - len(shape) :] != shape:
            raise InputError(f"an array of shape {array.shape} was given; the last dimensions must be {shape}")
        return array.reshape(-1, self.spec.n)

    def _check_out(self, out: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
        if not isinstance(out, np.ndarray) or out.dtype != self.spec.output.dtype.numpy:
            kind = out.dtype if isinstance(out, np.ndarray) else type(out).__name__
            raise CodeTypeError(f"out is of type {kind}; it must be an array of {self.spec.output.dtype}")
        if out.shape != shape:
            raise InputError(f"out has the shape {out.shape}; the codes have {shape}")
        if not out.flags.writeable:
            raise InputError("out is read-only")


def _kernel_in_place(rows: _Array, out: _Array, *arguments: Any) -> None:
    """Run the kernel where `out` is `rows`: on copies of a few rows, as LLVM makes no vectors of aliased arrays."""
    step = max(1, COPY_ELEMENTS // rows.shape[1])
    for start in range(0, len(rows), step):
        copied = rows[start : start + step].copy()
        copied.setflags(write=False)
        _kernel()(copied, out[start : start + step], *arguments)


@functools.cache
def _kernel() -> Callable[..., None]:
    """Load the kernel, and Numba with it, when it is first needed."""
    from numba.core import event

    from . import kernels

    class Announce(event.Listener):
        def on_start(self, event: Any) -> None:
            if event.data.get("dispatcher") is kernels.run and sys.stderr.isatty():
                q, out = event.data["args"][:2]
                print(f"fxp-layernorm: compiling the kernel for {q.dtype} -> {out.dtype}, once", file=sys.stderr)

        def on_end(self, event: Any) -> None:
            pass

    event.register("numba:compile", Announce())  # type: ignore[no-untyped-call]
    return kernels.run  # type: ignore[no-any-return]


def _kernel_arguments(spec: LayerNormSpec) -> tuple[Any, ...]:
    """Return what `kernels.run` takes after the codes and the output, in the narrowest types that the proof allows."""
    lane = np.int64 if spec.lane == 64 else np.int32
    # vpmuldq, the product of 32-bit factors, is one step where vpmullq is three; 16-bit factors gain nothing
    narrow = max(spec.row_stage.t_max(spec.s1), *map(abs, spec.G)) < 1 << 31
    exponents = None if spec.input.exponents is None else np.array(spec.input.exponents, dtype=np.int32)
    # without exponents the kernel sums bytes without a sign, and wider codes around their middle
    bits = 8 * spec.input.dtype.numpy.itemsize
    largest = spec.row_stage.codes.largest if exponents is not None else 255 if bits == 8 else 1 << (bits - 1)
    square = largest * largest
    # 64 squares should fit between two carries; else they are summed in two parts, and as a last resort in 64 bits
    wide = square >= 1 << 31
    split = not wide and 64 * square >= 1 << 31
    chunk = spec.n if wide else 1 << 15 if split else ((1 << 31) - 1) // square
    constants = (
        spec.input.zero_point, spec.m, spec.K + spec.h, spec.h, spec.E,
        proof.reciprocal_bits(spec.n) if spec.lane == 64 else 63,
        spec.s1, spec.s2, min(chunk, spec.n), spec.kind is NormKind.LAYERNORM, split,
    )  # fmt: skip
    return (
        exponents,
        np.array(spec.G, dtype=np.int32 if narrow else lane),
        np.array([offset + (1 << (spec.s2 - 1)) for offset in spec.B], dtype=lane),
        np.array(constants, dtype=np.int64),
        np.zeros(0, dtype=np.int64 if wide else np.int32),
    )


@functools.cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="fxp-layernorm")


if hasattr(os, "register_at_fork"):  # threads don't survive a fork
    os.register_at_fork(after_in_child=_pool.cache_clear)


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_threads(threads: int | None) -> int | None:
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError(f"threads is {threads!r}; it must be an integer of at least 1")
    return threads
