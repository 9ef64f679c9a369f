"""What a verification counts: codes by norm, values by output."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .diagnosis import BorderDifference, CodeDifference, StageDifference


@dataclass
class NormCheck:
    """One norm's counts.

    Attributes
    ----------
    codes : int
        Output codes that were compared.
    mismatches : int
        Those that differ from the kernel's for the same input codes.
    border_mismatches : int
        Codes that differ from the quantized float value, and float values that differ from the dequantized codes: of
        the input, the output, and where there are such, of the residual and the sum. Not counted where the floats are
        no float32: consumers may keep more of a float16 than they show.
    border_beyond : int
        Those of them that no float32 quantizer gives, which may multiply by the reciprocal of the scale, say.
    largest : int
        The largest difference of an output code, in LSB.
    beyond : int or None
        Of a float norm between quantizers, the output codes that no float32 norm gives; None for an integer norm.
    differences : list of CodeDifference
        The first output codes that differ.
    border_differences : list of BorderDifference
        The first values at the border that no float32 quantizer gives.
    stage : StageDifference or None
        The first stage of the norm that differs, where one was found.
    """

    name: str
    codes: int = 0
    mismatches: int = 0
    border_mismatches: int = 0
    border_beyond: int = 0
    largest: int = 0
    beyond: int | None = None
    differences: list[CodeDifference] = field(default_factory=list)
    border_differences: list[BorderDifference] = field(default_factory=list)
    stage: StageDifference | None = None

    @property
    def passed(self) -> bool:
        """Whether the norm's codes are the kernel's, and those of floats may be float32's."""
        return not self.border_beyond and not (self.mismatches if self.beyond is None else self.beyond)


@dataclass
class OutputCheck:
    """One output of the model against the float model's, over all feeds.

    Attributes
    ----------
    cosine : float
        Of all finite values as one vector; 1 where both are 0.
    max_abs : float or None
        The largest difference; None where one model has a NaN or an infinity that the other has not.
    sqnr_db : float or None
        ``10*log10(sum(float**2) / sum((float - exported)**2))``; None where one of the sums is 0.
    """

    name: str
    max_abs: float | None = 0.0
    _float_power: float = field(default=0.0, repr=False)
    _power: float = field(default=0.0, repr=False)
    _product: float = field(default=0.0, repr=False)
    _noise: float = field(default=0.0, repr=False)

    def update(self, expected: npt.NDArray[Any], actual: npt.NDArray[Any]) -> None:
        """Take in the values of one feed."""
        if expected.shape != actual.shape:
            raise ModelError(
                f"the output {self.name!r} has the shape {actual.shape}; the float model's is {expected.shape}"
            )
        a, b = expected.astype(np.float64).ravel(), actual.astype(np.float64).ravel()
        finite = np.isfinite(a) & np.isfinite(b)
        same = np.array_equal(a[~finite], b[~finite], equal_nan=True)
        a, b = a[finite], b[finite]
        difference = a - b
        self._float_power += float(a @ a)
        self._power += float(b @ b)
        self._product += float(a @ b)
        self._noise += float(difference @ difference)
        if not same:
            self.max_abs = None
        elif self.max_abs is not None:
            self.max_abs = max(self.max_abs, float(np.max(np.abs(difference), initial=0.0)))

    @property
    def cosine(self) -> float:
        """Cosine of the two outputs as vectors."""
        norm = math.sqrt(self._float_power * self._power)
        return self._product / norm if norm else float(self._float_power == self._power)

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise."""
        return 10 * math.log10(self._float_power / self._noise) if self._noise and self._float_power else None


@dataclass
class Verification:
    """The result of `verify`."""

    norms: list[NormCheck]
    outputs: list[OutputCheck]

    @property
    def exact(self) -> bool:
        """Whether codes were compared, and none differs, at the border or behind it."""
        return self.codes > 0 and not any(norm.mismatches or norm.border_mismatches for norm in self.norms)

    @property
    def passed(self) -> bool:
        """Whether codes were compared, and every norm passed: an integer norm if its codes are the kernel's."""
        return self.codes > 0 and all(norm.passed for norm in self.norms)

    @property
    def codes(self) -> int:
        """The number of output codes that were compared."""
        return sum(norm.codes for norm in self.norms)

    @property
    def mismatches(self) -> int:
        """The number of codes that differ."""
        return sum(norm.mismatches + norm.border_mismatches for norm in self.norms)
