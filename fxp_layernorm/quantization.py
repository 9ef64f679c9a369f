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
    """Integer type of the codes: its sign and its bits.

    Codes of 2 to 16 bits are held in the smallest NumPy type that has room, those of 17 to 32 bits, which only inputs
    may have, in int32.
    """

    INT2 = "int2"
    INT3 = "int3"
    INT4 = "int4"
    INT5 = "int5"
    INT6 = "int6"
    INT7 = "int7"
    INT8 = "int8"
    INT9 = "int9"
    INT10 = "int10"
    INT11 = "int11"
    INT12 = "int12"
    INT13 = "int13"
    INT14 = "int14"
    INT15 = "int15"
    INT16 = "int16"
    UINT2 = "uint2"
    UINT3 = "uint3"
    UINT4 = "uint4"
    UINT5 = "uint5"
    UINT6 = "uint6"
    UINT7 = "uint7"
    UINT8 = "uint8"
    UINT9 = "uint9"
    UINT10 = "uint10"
    UINT11 = "uint11"
    UINT12 = "uint12"
    UINT13 = "uint13"
    UINT14 = "uint14"
    UINT15 = "uint15"
    UINT16 = "uint16"
    INT17 = "int17"
    INT18 = "int18"
    INT19 = "int19"
    INT20 = "int20"
    INT21 = "int21"
    INT22 = "int22"
    INT23 = "int23"
    INT24 = "int24"
    INT25 = "int25"
    INT26 = "int26"
    INT27 = "int27"
    INT28 = "int28"
    INT29 = "int29"
    INT30 = "int30"
    INT31 = "int31"
    INT32 = "int32"

    @classmethod
    def parse(cls, value: object) -> DType:
        """Return the member for a name or a NumPy dtype; raises InputError for any other."""
        name = value if isinstance(value, str) else getattr(value, "name", getattr(value, "__name__", repr(value)))
        try:
            return cls(name)
        except ValueError:
            raise InputError(
                f"codes can't have the type {name!r}; use int8, uint8, int16, uint16, another width from int2 or uint2 "
                "on, or int17 to int32 for accumulators"
            ) from None

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return not self.value.startswith("u")

    @property
    def bits(self) -> int:
        """Bits of a code, its sign included."""
        return int(self.value.lstrip("uint"))

    @property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype that holds the codes."""
        return np.dtype(f"{'int' if self.signed else 'uint'}{8 if self.bits <= 8 else 16 if self.bits <= 16 else 32}")

    @property
    def lo(self) -> int:
        """The lowest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        """The highest code."""
        return (1 << (self.bits - self.signed)) - 1


@dataclass(frozen=True, init=False)
class QuantParams:
    """Affine quantization of one tensor: ``value = scale * 2**exponent[c] * (code - zero_point[c])``.

    Parameters
    ----------
    dtype : DType or str
        Type of the codes.
    scale : float
        Step of the tensor, in real units per LSB; a normal float32 number.
    zero_point : int or sequence of int
        The code of the real value 0: one for the tensor, or one a channel. One for the tensor is kept where all
        channels have the same.
    exponents : sequence of int, optional
        One exponent in [0, 15] a channel, where the channels are the elements of a normalized row, in C order.
        None means that all are 0, which is one scale for the tensor.
    channel_scales : sequence of float, optional
        Instead of the exponents, the step of each channel. `scale` is then the largest of them.
    narrow_range : bool
        Whether the type's lowest code is left out, as symmetric quantization has it: -127 to 127.

    Raises
    ------
    InputError
        For a scale, zero point or exponent outside its range, or scales that don't go together.
    """

    __pydantic_config__ = STRICT

    dtype: DType
    scale: float
    zero_point: int | tuple[int, ...]
    exponents: tuple[int, ...] | None
    channel_scales: tuple[float, ...] | None
    narrow_range: bool

    def __init__(
        self,
        dtype: DType | str,
        scale: float,
        zero_point: int | Sequence[int] | npt.NDArray[np.integer[Any]] = 0,
        exponents: Sequence[int] | npt.NDArray[np.integer[Any]] | None = None,
        channel_scales: Sequence[float] | npt.NDArray[np.floating[Any]] | None = None,
        narrow_range: bool = False,
    ) -> None:
        set_field = object.__setattr__
        set_field(self, "dtype", dtype)
        set_field(self, "scale", scale)
        # an array of no dimensions is a number
        several = (
            isinstance(zero_point, Iterable) and not isinstance(zero_point, str) and getattr(zero_point, "ndim", 1) > 0
        )
        set_field(self, "zero_point", tuple(zero_point) if several else zero_point)  # type: ignore[arg-type]
        for name, values in (("exponents", exponents), ("channel_scales", channel_scales)):
            if values is not None and not isinstance(values, Iterable):
                raise InputError(f"the {name} are {values!r}; they must be numbers, one a channel")
            set_field(self, name, None if values is None else tuple(values))
        set_field(self, "narrow_range", narrow_range)
        self.__post_init__()

    def __post_init__(self) -> None:
        dtype = DType.parse(self.dtype)
        set_field = object.__setattr__
        set_field(self, "dtype", dtype)
        if not isinstance(self.narrow_range, bool):
            raise InputError(f"narrow_range is {self.narrow_range!r}; it must be true or false")
        scale = _scale(self.scale)
        zero_points, lo, hi = [], self.lo, self.hi
        for value in self.zero_point if isinstance(self.zero_point, tuple) else (self.zero_point,):
            zero_point = _integer(value)
            if zero_point is None or not lo <= zero_point <= hi:
                what = "a channel's" if isinstance(self.zero_point, tuple) else "the"
                raise InputError(f"{what} zero point is {value!r}; {dtype} codes go from {lo} to {hi}")
            zero_points.append(zero_point)
        if not zero_points:
            raise InputError("the zero points are none; there must be one, or one a channel")
        exponents = []
        for value in self.exponents or ():
            exponent = _integer(value)
            if exponent is None or not 0 <= exponent <= LARGEST_EXPONENT:
                raise InputError(f"a channel exponent is {value}; it must be an integer from 0 to {LARGEST_EXPONENT}")
            exponents.append(exponent)
        channel_scales = None if self.channel_scales is None else tuple(map(_scale, self.channel_scales))
        if channel_scales is not None and (any(exponents) or scale != max(channel_scales, default=0.0)):
            raise InputError("channel scales go without exponents, and the scale must be the largest of them")
        set_field(self, "channel_scales", channel_scales)
        set_field(self, "scale", scale)
        set_field(self, "zero_point", tuple(zero_points) if len(set(zero_points)) > 1 else zero_points[0])
        set_field(self, "exponents", tuple(exponents) if any(exponents) else None)
        if len({len(values) for values in self._by_channel}) > 1:
            lengths = ", ".join(str(len(values)) for values in self._by_channel)
            raise InputError(f"the exponents, scales and zero points of channels are of different numbers: {lengths}")

    @property
    def lo(self) -> int:
        """The lowest code."""
        return self.dtype.lo + self.narrow_range

    @property
    def hi(self) -> int:
        """The highest code."""
        return self.dtype.hi

    @property
    def channels(self) -> int | None:
        """The number of channels, None where all have the same parameters."""
        return next(map(len, self._by_channel), None)

    @property
    def _by_channel(self) -> list[tuple[int, ...] | tuple[float, ...]]:
        """What differs by channel."""
        return [
            values for values in (self.channel_scales, self.exponents, self.zero_point) if isinstance(values, tuple)
        ]

    def channel_zeros(self, n: int) -> npt.NDArray[np.int64]:
        """Return the zero point of each of `n` channels."""
        return np.broadcast_to(self._zeros, n)

    @property
    def _zeros(self) -> npt.NDArray[np.int64]:
        return np.asarray(self.zero_point, dtype=np.int64)

    def channel_exponents(self, n: int) -> tuple[int, ...]:
        """Return the exponents of `n` channels, zeros where there are none."""
        return self.exponents or (0,) * n

    def channel_steps(self, n: int) -> npt.NDArray[np.float64]:
        """Return the real value of one LSB in each of `n` channels."""
        return np.broadcast_to(self._scales(np.float64) * self._powers(np.float64), n)

    def _scales(self, float_type: type[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        return np.asarray(self.channel_scales or self.scale, dtype=float_type)

    def _powers(self, float_type: type[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
        return np.exp2(np.asarray(self.exponents or 0, dtype=float_type))

    def outside(self, codes: npt.NDArray[Any]) -> int:
        """Return how many codes are none of these parameters', which a type that has room for more can hold."""
        stored = np.iinfo(self.dtype.numpy)
        if not codes.size or (stored.min == self.lo and stored.max == self.hi):
            return 0
        if codes.min() >= self.lo and codes.max() <= self.hi:
            return 0
        return int(((codes < self.lo) | (codes > self.hi)).sum())

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
            scaled = values / self._powers(float_type) / self._scales(float_type)
        if self.dtype.bits > 16:  # float32 has no room for the ends of the range
            scaled, float_type = scaled.astype(np.float64), np.float64
        codes = np.rint(scaled) + self._zeros.astype(float_type)
        clipped: npt.NDArray[Any] = np.clip(codes, self.lo, self.hi).astype(self.dtype.numpy)
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
        wide = np.int64 if self.dtype.bits > 16 else np.int32
        centred = (array.astype(wide) - self._zeros.astype(wide)).astype(np.float32)
        with np.errstate(over="ignore"):  # beyond float32's range the value is infinite, as in ONNX
            values: npt.NDArray[np.float32] = centred * self._scales(np.float32)
            values *= self._powers(np.float32)
        return values

    def _check_channels(self, shape: tuple[int, ...]) -> None:
        if self.channels is not None and (not shape or shape[-1] != self.channels):
            kind = "scales" if self.channel_scales else "channel exponents" if self.exponents else "zero points"
            raise InputError(f"an array of shape {shape} can't have {self.channels} {kind}")


def _scale(value: Any) -> float:
    """Return a scale as a checked float."""
    try:
        scale = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"the scale is {value!r}; it must be a number") from None
    if not (math.isfinite(scale) and SMALLEST_SCALE <= scale <= LARGEST_SCALE):
        raise InputError(f"the scale is {value!r}; it must be a normal, positive float32 number")
    return scale


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
