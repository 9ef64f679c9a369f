"""The parameter file: the specs of all norms of a model, and what they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from . import files
from .errors import InputError
from .spec import LayerNormSpec

SCHEMA_VERSION = 3


class WarningKind(StrEnum):
    """What is doubtful about the data of a norm."""

    NOT_FINITE = "not_finite"
    FEW_ROWS = "few_rows"
    CONSTANT = "constant_channels"
    DEAD = "dead_channels"


@dataclass(frozen=True, kw_only=True)
class CalibrationWarning:
    """Something in a norm's data that makes its calibration doubtful.

    Attributes
    ----------
    norm : str
    kind : WarningKind
    channels : tuple of int
        All channels concerned; none where it is not about single channels.
    text : str
        What it is, and what was done.
    """

    __pydantic_config__ = files.STRICT

    norm: str
    kind: WarningKind
    channels: tuple[int, ...]
    text: str


@dataclass(frozen=True, kw_only=True)
class SideRecord:
    """How the parameters of one side of a norm, its input or its output, were chosen.

    Attributes
    ----------
    method : str
        A calibration method, or ``model`` for parameters that the model itself has.
    scales : str or None
        How the channels share a scale: ``tensor``, ``exponents`` or ``channel``. None with ``model``, like the
        next three.
    exponents : int or None
        The largest channel exponent that was allowed, 0 where there are none.
    symmetric : bool or None
        Whether the zero point was to be the middle of the codes.
    narrow_range : bool or None
        Whether the lowest code was to stay unused.
    percentile : float or None
        The share of the values, in percent, that the method ``percentile`` kept.
    low, high : float or None
        The lowest and highest value observed, where any were.
    """

    __pydantic_config__ = files.STRICT

    method: str
    scales: str | None
    exponents: int | None
    symmetric: bool | None
    narrow_range: bool | None
    percentile: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class NormParams:
    """One norm of a model and its integer form.

    Attributes
    ----------
    name : str
        The norm's name, as `inspect` lists it.
    input, output : str
        The names of the float tensors that it reads and writes in the model.
    rows : int
        How many rows were observed.
    left_out : int
        How many rows were not, as they hold NaN or infinite values.
    input_record, output_record : SideRecord
        How the parameters of the input and the output were chosen.
    sqnr_db : float or None
        Signal to quantization noise of the integer norm, against the float norm of the same real rows, on a sample of
        the observed rows: ``10*log10(sum(y**2) / sum((y_int - y)**2))``. None where the signal or the noise is 0, or
        where no rows were observed, or not the addends of a residual.
    spec : LayerNormSpec
    """

    __pydantic_config__ = files.STRICT

    name: str
    input: str
    output: str
    rows: int
    left_out: int
    input_record: SideRecord
    output_record: SideRecord
    sqnr_db: float | None
    spec: LayerNormSpec


@dataclass(frozen=True, kw_only=True)
class NormFormat:
    """The formats of one norm in a `TradeOff`.

    Attributes
    ----------
    input, output : str
        Like ``int8``, ``int8+7`` with channel exponents up to 7, or ``int8/channel`` with a scale a channel.
    residual : bool
        Whether the norm adds two tensors of the input's format itself.
    noise : float
        What input and output, quantized alone, add to the noise of the model's outputs.
    cost_pj : float
        An element's energy, by the cost model of `analysis.precision`.
    """

    __pydantic_config__ = files.STRICT

    input: str
    output: str
    residual: bool
    noise: float
    cost_pj: float


@dataclass(frozen=True, kw_only=True)
class TradeOff:
    """A choice of formats for all norms, what it costs, and what the model's outputs are like.

    Attributes
    ----------
    cost_pj : float
        An element's energy, the mean over the elements of all norms.
    noise_expected : float
        The sum of the norms' own.
    cosine : float
    sqnr_db, max_lsb : float or None
        Measured with all norms in these formats, of the worst of the model's outputs, as `calibration.Quality` defines
        them; None where they are not finite.
    formats : dict of str to NormFormat
        By the norms' names.
    """

    __pydantic_config__ = files.STRICT

    cost_pj: float
    noise_expected: float
    cosine: float
    sqnr_db: float | None
    max_lsb: float | None
    formats: dict[str, NormFormat]


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """What was asked of the model's outputs, and how the formats for it were chosen.

    Attributes
    ----------
    metric : str
        ``cosine``, ``sqnr_db`` or ``max_lsb``.
    value : float
        What it was to be.
    met : bool
    reached : float or None
        What it is with the chosen formats; None where it is not finite.
    chosen : TradeOff
    curve : tuple of TradeOff
        From the cheapest formats to the most accurate.
    """

    __pydantic_config__ = files.STRICT

    metric: str
    value: float
    met: bool
    reached: float | None
    chosen: TradeOff
    curve: tuple[TradeOff, ...]


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """What `calibrate` found for a model.

    Attributes
    ----------
    model_sha256 : str
        Of the model file's bytes; where it keeps tensors in other files, of its own hash and theirs.
    data_sha256 : str
        Of the feeds: their numbers, and the names, types, shapes and bytes of their arrays.
    feeds : int
        How many feeds the model was run on.
    versions : dict of str to str
        Of the libraries that computed the activations and these parameters.
    warnings : tuple of CalibrationWarning
    norms : tuple of NormParams
    lane : int or None
        The bits of the element stage that were asked for, if any.
    hardware : str or None
        The limits that were asked for: a preset's name, or the `Hardware` in Python.
    fuse_residual : bool
        Whether norms were to add residuals themselves wherever they can.
    objective : str
        ``norm``, or ``model`` where scales were tuned for the model's outputs.
    compared_feeds : int
        On how many feeds, the first ones, the model's outputs were compared to tune for them or to reach the target.
    target : TargetRecord or None
        The target that the formats were chosen for.
    """

    __pydantic_config__ = files.STRICT

    model_sha256: str
    data_sha256: str
    feeds: int
    versions: dict[str, str]
    warnings: tuple[CalibrationWarning, ...]
    norms: tuple[NormParams, ...]
    lane: int | None = None
    hardware: str | None = None
    fuse_residual: bool = False
    objective: str = "norm"
    compared_feeds: int = 0
    target: TargetRecord | None = None

    def __post_init__(self) -> None:
        names = [norm.name for norm in self.norms]
        if len(set(names)) != len(names):
            raise InputError("two norms have the same name")

    def save(self, path: str | Path) -> None:
        """Write the parameters as JSON; the file appears whole or not at all."""
        files.save_json(self, path, schema_version=SCHEMA_VERSION)

    @classmethod
    def load(cls, path: str | Path) -> ModelParams:
        """Read parameters that `save` wrote; raises SpecFileError for anything else."""
        return files.load_json(cls, path, schema_version=SCHEMA_VERSION)
