"""What calibration is asked for: code types, methods and granularity, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypedDict

import numpy as np

from ..errors import InputError
from ..hardware import Hardware
from ..quantization import LARGEST_EXPONENT, DType

#: Share of the values, in percent, that `Method.PERCENTILE` keeps.
PERCENTILE = 99.99


class Method(StrEnum):
    """How a tensor's range, and so its scale, is chosen.

    ``minmax``
        Holds every observed value.
    ``moving_average``
        The mean of the feeds' ranges, which a single odd feed moves less. As in ONNX Runtime, all feeds count alike,
        so that their order doesn't matter.
    ``percentile``
        Leaves out the same small share of the values at both ends.
    ``mse``
        Of ranges down to a quarter of the observed one, the one with the least squared error.
    ``entropy``
        Of the same ranges, the one whose codes are distributed most like the values (Kullback-Leibler divergence).
    """

    MINMAX = "minmax"
    MOVING_AVERAGE = "moving_average"
    PERCENTILE = "percentile"
    MSE = "mse"
    ENTROPY = "entropy"


@dataclass(frozen=True, init=False)
class SideOptions:
    """How the codes on one side of a norm, its input or its output, are to be.

    Parameters
    ----------
    dtype : DType or str
    method : Method or str, optional
        By default ``mse`` for codes of 8 bits, and ``minmax`` for wider ones, which need no clipping.
    exponents : int, optional
        The largest channel exponent, 0 for one scale a tensor; by default 7 for codes of 8 bits and 0 for wider ones.
    symmetric : bool, optional
        Whether the zero point is the middle of the codes; by default not. Where channels have scales or exponents of
        their own, each also has a zero point of its own then.
    percentile : float
        The share of the values in percent, above 50, that ``percentile`` keeps.
    per_channel : bool
        Whether each channel has a scale of its own, for a border that can dequantize so, instead of an exponent.
    narrow_range : bool
        Whether the lowest code stays unused.

    Raises
    ------
    InputError
        For a name or a number that is none of these.
    """

    dtype: DType
    method: Method
    exponents: int
    symmetric: bool
    percentile: float
    per_channel: bool
    narrow_range: bool

    def __init__(
        self,
        dtype: DType | str = DType.INT8,
        *,
        method: Method | str | None = None,
        exponents: int | None = None,
        symmetric: bool | None = None,
        percentile: float = PERCENTILE,
        per_channel: bool = False,
        narrow_range: bool = False,
    ) -> None:
        parsed = DType.parse(dtype)
        narrow = parsed.numpy.itemsize == 1
        if method is None:
            method = Method.MSE if narrow else Method.MINMAX
        elif method not in list(Method):
            raise InputError(f"the method is {method!r}; it must be one of {', '.join(Method)}")
        if exponents is None:
            exponents = 7 if narrow and not per_channel else 0
        elif not isinstance(exponents, int | np.integer) or not 0 <= exponents <= LARGEST_EXPONENT:
            raise InputError(
                f"the largest exponent is {exponents!r}; it must be an integer from 0 to {LARGEST_EXPONENT}"
            )
        if per_channel and exponents:
            raise InputError("channels have scales of their own or exponents, not both")
        if not isinstance(percentile, int | float | np.number) or not 50 < percentile <= 100:
            raise InputError(f"the percentile is {percentile!r}; it must be a number above 50, at most 100")
        set_field = object.__setattr__
        set_field(self, "dtype", parsed)
        set_field(self, "method", Method(method))
        set_field(self, "exponents", int(exponents))
        set_field(self, "per_channel", bool(per_channel))
        set_field(self, "symmetric", bool(symmetric))
        set_field(self, "percentile", float(percentile))
        set_field(self, "narrow_range", bool(narrow_range))

    @property
    def lo(self) -> int:
        """The lowest code."""
        return self.dtype.lo + self.narrow_range

    @property
    def hi(self) -> int:
        """The highest code."""
        return self.dtype.hi

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return (self.dtype.lo + self.dtype.hi + 1) // 2

    @property
    def by_channel(self) -> bool:
        """Whether channels have scales or exponents of their own."""
        return self.per_channel or self.exponents > 0


class OptionKeywords(TypedDict, total=False):
    """Keywords of `calibrate` and `calibrate_model`, for `CalibrationOptions.of`."""

    method: Method | str | None
    input_method: Method | str | None
    output_method: Method | str | None
    exponents: int | None
    symmetric: bool | None
    percentile: float
    output_per_channel: bool
    narrow_range: bool
    lane: int | None
    hardware: Hardware | str | None


@dataclass(frozen=True)
class CalibrationOptions:
    """How a norm is calibrated: each side's codes, the lane, and the hardware's limits.

    Parameters
    ----------
    input, output : SideOptions
    lane : {24, 32, 64}, optional
        Bits of the element stage; by default the narrowest with a small bound.
    hardware : Hardware or str, optional
        Limits on the multiplier, the accumulator and the root, or the name of a preset; see `plan`.
    """

    input: SideOptions = field(default_factory=SideOptions)
    output: SideOptions = field(default_factory=SideOptions)
    lane: int | None = None
    hardware: Hardware | str | None = None

    @classmethod
    def of(
        cls,
        input: DType | str = "int8",
        output: DType | str = "int8",
        *,
        method: Method | str | None = None,
        input_method: Method | str | None = None,
        output_method: Method | str | None = None,
        exponents: int | None = None,
        symmetric: bool | None = None,
        percentile: float = PERCENTILE,
        output_per_channel: bool = False,
        narrow_range: bool = False,
        lane: int | None = None,
        hardware: Hardware | str | None = None,
    ) -> CalibrationOptions:
        """Return the options for keywords that hold for both sides, unless they name one; see `SideOptions`.

        `output_per_channel` takes the place of the outputs' exponents.
        """

        def side(dtype: DType | str, own: Method | str | None, per_channel: bool) -> SideOptions:
            return SideOptions(
                dtype, method=method if own is None else own, exponents=None if per_channel else exponents,
                symmetric=symmetric, percentile=percentile, per_channel=per_channel, narrow_range=narrow_range,
            )  # fmt: skip

        sides = side(input, input_method, False), side(output, output_method, output_per_channel)
        Hardware.parse(hardware).check_codes(sides[0].dtype.bits)  # before any data are observed
        return cls(*sides, lane, hardware)
