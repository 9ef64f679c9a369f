"""FxpLayerNorm: the compiled norm behind an array-like face."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import proof
from .errors import CodeTypeError, InputError
from .proof import NormKind
from .reference import check_codes
from .spec import LayerNormSpec


class FxpLayerNorm:
    """A norm that takes integer codes and returns integer codes, by the Numba kernel of its spec.

    Parameters
    ----------
    spec : LayerNormSpec

    Examples
    --------
    >>> norm = FxpLayerNorm(spec)  # doctest: +SKIP
    >>> q_out = norm(norm.quantize(x))  # doctest: +SKIP
    """

    def __init__(self, spec: LayerNormSpec) -> None:
        self.spec = spec
        lane = np.dtype(np.int64 if spec.lane == 64 else np.int32)
        square = spec.row_stage.codes.largest**2
        chunk = (2**31 - 1) // max(square, 1)
        narrow = chunk >= 32  # sums in 32 bits pay once a few vectors fit between two carries
        self._arguments = (
            spec.input.zero_point,
            np.array(spec.input.exponents or (), dtype=lane),
            np.array(spec.G, dtype=lane),
            np.array(spec.B, dtype=lane),
            (
                spec.m, spec.K + spec.h, spec.h, spec.E,
                proof.reciprocal_bits(spec.n) if spec.lane == 64 else 63,
                spec.s1, spec.s2, spec.output.dtype.lo, spec.output.dtype.hi,
            ),
            spec.kind is NormKind.LAYERNORM,
            np.zeros(1, dtype=np.int32 if narrow else np.int64),
            min(chunk, spec.n) if narrow else spec.n,
        )  # fmt: skip

    def __call__(self, q: npt.ArrayLike, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Return the output codes of input codes.

        Parameters
        ----------
        q : array_like of shape (..., *normalized_shape)
            Codes of the dtype ``spec.input.dtype``. Arrays that are not C-contiguous are copied first.
        out : ndarray, optional
            Takes the result: of the shape of `q` and the dtype ``spec.output.dtype``. It may be `q` itself.

        Raises
        ------
        CodeTypeError, InputError
            If the dtype or shape of `q` or `out` doesn't fit the spec, or `out` is read-only.
        """
        from . import kernels

        codes = check_codes(self.spec, q)
        if out is None:
            out = np.empty(codes.shape, dtype=self.spec.output.dtype.numpy)
        else:
            self._check_out(out, codes.shape)
        rows = np.ascontiguousarray(codes).reshape(-1, self.spec.n)
        in_place = out.flags.c_contiguous and (out is q or not np.may_share_memory(out, rows))
        result = out if in_place else np.empty(codes.shape, dtype=out.dtype)
        kernels.run(rows, result.reshape(-1, self.spec.n), *self._arguments)
        if result is not out:
            out[...] = result
        return out

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
