"""The float layers: what LayerNorm and RMSNorm are, with the signatures of torch.nn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .axes import from_rows, parse_axes, to_rows
from .errors import InputError


class _Norm:
    """What both norms share: the normalized shape and axes, eps, and a gain for each element."""

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float,
        elementwise_affine: bool,
        eps_outside: bool,
        axes: int | Sequence[int] | None,
    ) -> None:
        dims = tuple(normalized_shape) if isinstance(normalized_shape, Iterable) else (normalized_shape,)
        if not dims or any(isinstance(d, bool) or not isinstance(d, int | np.integer) or d < 1 for d in dims):
            raise InputError(f"normalized_shape is {normalized_shape!r}; it must hold positive integers")
        if not isinstance(eps, float | int | np.floating) or not (math.isfinite(eps) and eps >= 0):
            raise InputError(f"eps is {eps!r}; it must be a number, finite and not negative")
        self.normalized_shape: tuple[int, ...] = tuple(int(d) for d in dims)
        self.eps = float(eps)
        self.eps_outside = bool(eps_outside)
        self.axes = parse_axes(axes, self.normalized_shape)
        self.weight = np.ones(self.normalized_shape) if elementwise_affine else None

    def __repr__(self) -> str:
        shape = self.normalized_shape[0] if len(self.normalized_shape) == 1 else self.normalized_shape
        return f"{type(self).__name__}({shape}, eps={self.eps:g})"

    @property
    def n(self) -> int:
        """The number of elements that are normalized together."""
        return math.prod(self.normalized_shape)

    @property
    def gamma(self) -> npt.NDArray[np.float64]:
        """The gain as a checked float64 array of shape (n,), ones where the layer has no weight."""
        return self._parameter("weight", self.weight, 1.0)

    @property
    def beta(self) -> npt.NDArray[np.float64]:
        """The offset as a checked float64 array of shape (n,), zeros where the layer has no bias."""
        return self._parameter("bias", getattr(self, "bias", None), 0.0)

    def _parameter(self, name: str, value: npt.ArrayLike | None, default: float) -> npt.NDArray[np.float64]:
        if value is None:
            return np.full(self.n, default)
        array = np.asarray(value, dtype=np.float64)
        if array.shape != self.normalized_shape:
            raise InputError(f"{name} has the shape {array.shape}; the layer normalizes {self.normalized_shape}")
        if not np.isfinite(array).all():
            raise InputError(f"{name} holds {int((~np.isfinite(array)).sum())} values that are NaN or infinite")
        return array.reshape(-1)

    def rows(self, x: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
        """Return `x` as a float array of shape (rows, n); raises InputError where the normalized shape differs."""
        values = np.asarray(x)
        if values.dtype.kind not in "fiub":
            raise InputError(f"real values are expected, not an array of type {values.dtype}")
        rows = to_rows(values, self.normalized_shape, self.axes)
        return rows if values.dtype.kind == "f" else rows.astype(np.float64)

    def _normalize(self, x: npt.ArrayLike, *, centred: bool) -> npt.NDArray[np.floating[Any]]:
        rows = self.rows(x)
        wide = rows.astype(np.float64)
        if centred:
            wide = wide - wide.mean(axis=1, keepdims=True)
        power = np.square(wide).mean(axis=1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):  # rows of no variance, without eps, are NaN as in torch
            wide = wide / (np.sqrt(power) + self.eps if self.eps_outside else np.sqrt(power + self.eps))
        result = (wide * self.gamma + self.beta).astype(rows.dtype)
        return from_rows(result, np.shape(x), self.axes)


class LayerNorm(_Norm):
    """Layer normalization, ``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimensions.

    The signature and the meaning are those of ``torch.nn.LayerNorm``; what that lacks is given by name.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The trailing dimensions that are normalized together.
    eps : float
        Added to the (biased) variance, in squared real units.
    elementwise_affine : bool
        Whether the layer has a weight, ones at first, of shape `normalized_shape`.
    bias : bool
        Whether the layer has a bias too, zeros at first; without `elementwise_affine` it has none.
    eps_outside : bool
        Whether eps is added to the deviation instead, in real units: ``(x - mean) / (sqrt(var) + eps)``. (A layer
        that takes the unbiased deviation, as torch.std does, is this one with weight and eps times sqrt((n - 1) / n).)
    axes : int or sequence of int, optional
        The normalized dimensions, counted from the end and ascending, where they are not the last: -3 for the channels
        of (batch, channels, height, width).

    Raises
    ------
    InputError
        For a shape without elements, an eps that is negative, NaN or infinite, or axes that don't go with the shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        eps_outside: bool = False,
        axes: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, eps_outside, axes)
        self.bias = np.zeros(self.normalized_shape) if elementwise_affine and bias else None

    @classmethod
    def from_torch(cls, module: Any) -> LayerNorm:
        """Return the same layer as a ``torch.nn.LayerNorm``; torch itself is not imported."""
        _check_module(cls, module, "normalized_shape", "eps", "weight", "bias")
        weight, bias = _torch_array(module.weight), _torch_array(module.bias)
        layer = cls(tuple(module.normalized_shape), module.eps, weight is not None, bias is not None)
        layer.weight, layer.bias = weight, bias
        return layer

    def __call__(self, x: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
        """Return the normalized input, of its shape and float type, computed in float64.

        Raises
        ------
        InputError
            If `x` has another size in the normalized dimensions.
        """
        return self._normalize(x, centred=True)


class RMSNorm(_Norm):
    """Root-mean-square normalization, ``x / sqrt(mean(x**2) + eps) * weight``; see ``torch.nn.RMSNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The trailing dimensions that are normalized together.
    eps : float, optional
        Added to the mean square; None means the machine epsilon of float32, as torch has it for float32 inputs.
    elementwise_affine : bool
        Whether the layer has a weight, ones at first.
    eps_outside, axes
        As in `LayerNorm`.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        eps_outside: bool = False,
        axes: int | Sequence[int] | None = None,
    ) -> None:
        eps = float(np.finfo(np.float32).eps) if eps is None else eps
        super().__init__(normalized_shape, eps, elementwise_affine, eps_outside, axes)

    @classmethod
    def from_torch(cls, module: Any) -> RMSNorm:
        """Return the same layer as a ``torch.nn.RMSNorm``; torch itself is not imported."""
        _check_module(cls, module, "normalized_shape", "eps", "weight")
        if hasattr(module, "bias"):
            raise InputError(f"a {type(module).__name__} has a bias and is no RMSNorm; use LayerNorm.from_torch")
        weight = _torch_array(module.weight)
        layer = cls(tuple(module.normalized_shape), module.eps, weight is not None)
        layer.weight = weight
        return layer

    def __call__(self, x: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
        """Return the normalized input, of its shape and float type, computed in float64."""
        return self._normalize(x, centred=False)


def _check_module(cls: type, module: Any, *attributes: str) -> None:
    missing = [name for name in attributes if not hasattr(module, name)]
    if missing:
        kind = type(module).__name__
        raise InputError(f"a {kind} has no {missing[0]}; {cls.__name__}.from_torch takes a torch.nn.{cls.__name__}")


def _torch_array(parameter: Any) -> npt.NDArray[np.float64] | None:
    return None if parameter is None else np.array(parameter.detach().double().cpu().numpy())
