"""The parameter file: the specs of all norms of a model, and what they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import files
from .errors import InputError
from .spec import LayerNormSpec

SCHEMA_VERSION = 1


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
    sqnr_db : float or None
        Signal to quantization noise of the integer norm, against the float norm of the same real rows, on a sample of
        the observed rows: ``10*log10(sum(y**2) / sum((y_int - y)**2))``. None where the signal or the noise is 0.
    spec : LayerNormSpec
    """

    __pydantic_config__ = files.STRICT

    name: str
    input: str
    output: str
    rows: int
    sqnr_db: float | None
    spec: LayerNormSpec


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """What `calibrate` found for a model.

    Attributes
    ----------
    model_sha256, data_sha256 : str
        Of the model file's bytes, and of the feeds' names, types, shapes and bytes in their order.
    feeds : int
        How many feeds the model was run on.
    input_method, output_method : str
        The calibration methods.
    norms : tuple of NormParams
    """

    __pydantic_config__ = files.STRICT

    model_sha256: str
    data_sha256: str
    feeds: int
    input_method: str
    output_method: str
    norms: tuple[NormParams, ...]

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
