"""Code types and quantization parameters: how a real value and its integer code belong together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import CodeTypeError, InputError
from .files import STRICT

#: Scales are confined to float32's normal numbers, because the float side of a border is mostly float32.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = (2.0 - 2.0**-23) * 2.0**127
#: The largest channel exponent: codes of 16 bits then stay within 32 bits.
LARGEST_EXPONENT = 15


class DType(StrEnum):
    """Integer type of the codes."""

    INT8 = "int8"
    UINT8 = "uint8"
    INT16 = "int16"
    UINT16 = "uint16"

    @classmethod
    def parse(cls, value: object) -> DType:
        """Return the member for a name or a NumPy dtype; raises InputError for any other."""
        name = value if isinstance(value, str) else getattr(value, "name", getattr(value, "__name__", repr(value)))
        try:
            return cls(name)
        except ValueError:
            raise InputError(f"codes can't have the type {name!r}; use one of {', '.join(cls)}") from None

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype of this type."""
        return np.dtype(self.value)

    @property
    def lo(self) -> int:
        """The lowest code."""
        return int(np.iinfo(self.value).min)

    @property
    def hi(self) -> int:
        """The highest code."""
        return int(np.iinfo(self.value).max)


@dataclass(frozen=True, init=False)
class QuantParams:
    """Affine quantization of one tensor: ``value = scale * 2**exponent[c] * (code - zero_point)``.

    Parameters
    ----------
    dtype : DType or str
        Type of the codes.
    scale : float
        Step of the tensor, in real units per LSB; a normal float32 number.
    zero_point : int
        The code of the real value 0.
    exponents : sequence of int, optional
        One exponent in [0, 15] a channel, where the channels are the elements of a normalized row, in C order.
        None means that all are 0, which is one scale for the tensor.

    Raises
    ------
    InputError
        For a scale, zero point or exponent outside its range.
    """

    __pydantic_config__ = STRICT

    dtype: DType
    scale: float
    zero_point: int
    exponents: tuple[int, ...] | None

    def __init__(
        self,
        dtype: DType | str,
        scale: float,
        zero_point: int = 0,
        exponents: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "dtype", dtype)
        set_field(self, "scale", scale)
        set_field(self, "zero_point", zero_point)
        if exponents is not None and not isinstance(exponents, Iterable):
            raise InputError(f"the exponents are {exponents!r}; they must be integers, one a channel")
        set_field(self, "exponents", None if exponents is None else tuple(exponents))
        self.__post_init__()

    def __post_init__(self) -> None:
        dtype = DType.parse(self.dtype)
        try:
            scale = math.nan if isinstance(self.scale, str | bytes) else float(self.scale)
        except (TypeError, ValueError, OverflowError):
            raise InputError(f"the scale is {self.scale!r}; it must be a number") from None
        if not (math.isfinite(scale) and SMALLEST_SCALE <= scale <= LARGEST_SCALE):
            raise InputError(f"the scale is {self.scale!r}; it must be a normal, positive float32 number")
        zero_point = _integer(self.zero_point)
        if zero_point is None or not dtype.lo <= zero_point <= dtype.hi:
            raise InputError(f"the zero point is {self.zero_point!r}; {dtype} codes go from {dtype.lo} to {dtype.hi}")
        exponents = []
        for value in self.exponents or ():
            exponent = _integer(value)
            if exponent is None or not 0 <= exponent <= LARGEST_EXPONENT:
                raise InputError(f"a channel exponent is {value}; it must be an integer from 0 to {LARGEST_EXPONENT}")
            exponents.append(exponent)
        set_field = object.__setattr__
        set_field(self, "dtype", dtype)
        set_field(self, "scale", scale)
        set_field(self, "zero_point", zero_point)
        set_field(self, "exponents", tuple(exponents) if any(exponents) else None)

    def channel_exponents(self, n: int) -> tuple[int, ...]:
        """Return the exponents of `n` channels, zeros where there are none."""
        return self.exponents or (0,) * n

    def _steps(self) -> npt.NDArray[np.float64] | float:
        return 1.0 if self.exponents is None else np.exp2(np.asarray(self.exponents, dtype=np.float64))

    def quantize(self, x: npt.ArrayLike) -> npt.NDArray[Any]:
        """Return the codes of real values: ``clamp(round_half_even(x / 2**e / scale) + zero_point)``.

        This is ONNX QuantizeLinear, in the precision of `x` (float32 or float64; other types count as float64).

        Parameters
        ----------
        x : array_like of shape (..., n)
            Real values; `n` is free where there are no exponents.

        Raises
        ------
        InputError
            If a value is NaN or infinite, or the last dimension doesn't fit the exponents.
        """
        values = _as_float(x)
        self._check_channels(values.shape)
        finite = np.isfinite(values)
        if not finite.all():
            raise InputError(f"{finite.size - int(finite.sum())} of {finite.size} values are NaN or infinite")
        float_type = values.dtype.type
        with np.errstate(over="ignore"):  # an overflow to infinity saturates, as it should
            scaled = values / np.asarray(self._steps(), dtype=float_type) / float_type(self.scale)
        codes = np.rint(scaled) + float_type(self.zero_point)
        clipped: npt.NDArray[Any] = np.clip(codes, self.dtype.lo, self.dtype.hi).astype(self.dtype.numpy)
        return clipped

    def dequantize(self, codes: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return the real values of codes as float32, as ONNX DequantizeLinear does.

        Raises
        ------
        CodeTypeError
            If `codes` has another dtype than these parameters.
        """
        array = np.asarray(codes)
        if array.dtype != self.dtype.numpy:
            raise CodeTypeError(f"codes of type {array.dtype} were given where {self.dtype} is expected")
        self._check_channels(array.shape)
        centred = (array.astype(np.int32) - self.zero_point).astype(np.float32)
        with np.errstate(over="ignore"):  # beyond float32's range the value is infinite, as in ONNX
            values: npt.NDArray[np.float32] = centred * np.float32(self.scale)
            values *= np.asarray(self._steps(), dtype=np.float32)
        return values

    def _check_channels(self, shape: tuple[int, ...]) -> None:
        if self.exponents is not None and (not shape or shape[-1] != len(self.exponents)):
            raise InputError(f"an array of shape {shape} can't have {len(self.exponents)} channel exponents")


def _integer(value: Any) -> int | None:
    """Return a value as an int, None where it is no integer."""
    try:
        return int(value) if int(value) == value else None
    except (TypeError, ValueError, OverflowError):
        return None


def _as_float(x: npt.ArrayLike) -> npt.NDArray[np.floating[Any]]:
    values = np.asarray(x)
    if values.dtype.kind not in "fiub":
        raise InputError(f"real values are expected, not an array of type {values.dtype}")
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)
