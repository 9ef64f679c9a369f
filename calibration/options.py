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


class Scales(StrEnum):
    """How the channels of a tensor share a scale.

    ``tensor``
        One scale and one zero point for all.
    ``exponents``
        One scale, times a power of two for each channel. The norm shifts its input by it.
    ``channel``
        A scale for each channel. On a norm's output it costs the norm nothing, on its input a multiplication an
        element, in the word int64 only.
    """

    TENSOR = "tensor"
    EXPONENTS = "exponents"
    CHANNEL = "channel"


#: The largest exponent by default: what codes of 8 bits gain by larger ones is rarely anything.
LARGEST_BY_DEFAULT = 7


@dataclass(frozen=True, init=False)
class SideOptions:
    """How the codes on one side of a norm, its input or its output, are to be.

    Parameters
    ----------
    dtype : DType or str
    method : Method or str, optional
        By default ``mse`` for codes of 8 bits, and ``minmax`` for wider ones, which need no clipping.
    scales : Scales or str, optional
        By default ``exponents`` for codes of 8 bits and ``tensor`` for wider ones, or as `exponents` says.
    exponents : int, optional
        The largest channel exponent, 7 by default; 0, as wherever there are none, is one scale a tensor.
    symmetric : bool, optional
        Whether the zero point is the middle of the codes; by default not. Where channels have scales or exponents of
        their own, each also has a zero point of its own then.
    percentile : float
        The share of the values in percent, above 50, that ``percentile`` keeps.
    narrow_range : bool
        Whether the lowest code stays unused.

    Raises
    ------
    InputError
        For a name or a number that is none of these.
    """

    dtype: DType
    method: Method
    scales: Scales
    exponents: int
    symmetric: bool
    percentile: float
    narrow_range: bool

    def __init__(
        self,
        dtype: DType | str = DType.INT8,
        *,
        method: Method | str | None = None,
        scales: Scales | str | None = None,
        exponents: int | None = None,
        symmetric: bool | None = None,
        percentile: float = PERCENTILE,
        narrow_range: bool = False,
    ) -> None:
        parsed = DType.parse(dtype)
        narrow = parsed.numpy.itemsize == 1
        if method is None:
            method = Method.MSE if narrow else Method.MINMAX
        elif method not in list(Method):
            raise InputError(f"the method is {method!r}; it must be one of {', '.join(Method)}")
        if exponents is not None and (
            not isinstance(exponents, int | np.integer) or not 0 <= exponents <= LARGEST_EXPONENT
        ):
            raise InputError(
                f"the largest exponent is {exponents!r}; it must be an integer from 0 to {LARGEST_EXPONENT}"
            )
        if scales is None:
            scales = Scales.EXPONENTS if (narrow if exponents is None else exponents) else Scales.TENSOR
        elif scales not in list(Scales):
            raise InputError(f"the scales are {scales!r}; they must be one of {', '.join(Scales)}")
        if scales != Scales.EXPONENTS and exponents:
            raise InputError(f"the scales are those of a {scales}: there are no exponents up to {exponents}")
        if scales == Scales.EXPONENTS and exponents == 0:
            raise InputError("with exponents, the largest must be above 0; without, ask for one scale a tensor")
        if exponents is None:
            exponents = LARGEST_BY_DEFAULT if scales == Scales.EXPONENTS else 0
        if not isinstance(percentile, int | float | np.number) or not 50 < percentile <= 100:
            raise InputError(f"the percentile is {percentile!r}; it must be a number above 50, at most 100")
        set_field = object.__setattr__
        set_field(self, "dtype", parsed)
        set_field(self, "method", Method(method))
        set_field(self, "scales", Scales(scales))
        set_field(self, "exponents", int(exponents))
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
    def finds_headroom(self) -> bool:
        """Whether scales for each channel are the best choice where they cost nothing.

        They hold what was observed; ``mse`` finds out how much more they must. Codes of more bits need neither.
        """
        return self.method is Method.MSE and self.dtype.numpy.itemsize == 1

    @property
    def by_channel(self) -> bool:
        """Whether channels have scales or exponents of their own."""
        return self.scales is not Scales.TENSOR


class OptionKeywords(TypedDict, total=False):
    """Keywords of `calibrate` and `calibrate_model`, for `CalibrationOptions.of`."""

    method: Method | str | None
    input_method: Method | str | None
    output_method: Method | str | None
    scales: Scales | str | None
    input_scales: Scales | str | None
    output_scales: Scales | str | None
    exponents: int | None
    symmetric: bool | None
    percentile: float
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
    output: SideOptions = field(default_factory=lambda: SideOptions(scales=Scales.CHANNEL))
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
        scales: Scales | str | None = None,
        input_scales: Scales | str | None = None,
        output_scales: Scales | str | None = None,
        exponents: int | None = None,
        symmetric: bool | None = None,
        percentile: float = PERCENTILE,
        narrow_range: bool = False,
        lane: int | None = None,
        hardware: Hardware | str | None = None,
    ) -> CalibrationOptions:
        """Return the options for keywords that hold for both sides, unless they name one; see `SideOptions`.

        Outputs of 8 bits have a scale a channel by default, where the method is ``mse``, which finds out how much wider
        than what was observed that must be; all other outputs are like inputs. With ``exponents=0`` both sides have one
        scale a tensor, unless they name another.
        """

        def side(dtype: DType | str, own: Method | str | None, shared: Scales | str | None) -> SideOptions:
            shared = scales if shared is None else shared
            return SideOptions(
                dtype, method=method if own is None else own, scales=shared,
                exponents=exponents if shared in (None, Scales.EXPONENTS) else None, symmetric=symmetric,
                percentile=percentile, narrow_range=narrow_range,
            )  # fmt: skip

        before, behind = side(input, input_method, input_scales), side(output, output_method, output_scales)
        if scales is output_scales is None and behind.finds_headroom and behind.scales is Scales.EXPONENTS:
            behind = side(output, output_method, Scales.CHANNEL)
        if exponents and Scales.EXPONENTS not in (before.scales, behind.scales):
            raise InputError(f"neither side has exponents, up to {exponents!r}: both have scales of another kind")
        Hardware.parse(hardware).check_codes(before.dtype.bits)  # before any data are observed
        return cls(before, behind, lane, hardware)
