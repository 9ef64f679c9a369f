"""Parameters that need no data: those of norms between quantizers, which stand in the model."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import FxpError, ModelError
from ..export.loading import Model, load_model
from ..export.norms import find_norms
from ..export.qdq import find_border, lack
from ..hardware import Hardware
from ..params import ModelParams, NormParams
from ..runtime import FeedHash
from .record import hardware_record, model_sha256, side_record, versions


@dataclass(frozen=True)
class QuantizedNorms:
    """What `quantized_norms` found.

    Attributes
    ----------
    params : ModelParams
        Of the norms between quantizers.
    skipped : dict of str to str
        Why each other norm is left out.
    """

    params: ModelParams
    skipped: dict[str, str]


def quantized_norms(
    model: Model, *, lane: int | None = None, hardware: Hardware | str | None = None, fuse_residual: bool = False
) -> QuantizedNorms:
    """Return the integer form of every norm of a model that stands between quantizers.

    Parameters
    ----------
    model : path or onnx.ModelProto
        A model with QuantizeLinear and DequantizeLinear, such as ONNX Runtime's quantize_static writes.
    lane, hardware : optional
        As in `calibrate`.
    fuse_residual : bool
        Whether a norm takes both addends of the sum before it where the model quantizes that sum for it.

    Raises
    ------
    ModelError
        If the model can't be read, or no norm of it stands between quantizers.
    PlanError
        If a norm doesn't fit the arithmetic.
    """
    entries, skipped = list[NormParams](), dict[str, str]()
    loaded = load_model(model)
    for norm in find_norms(loaded):
        border = find_border(norm, fuse_residual=fuse_residual)
        if norm.layer is None or border is None:
            skipped[norm.name] = norm.blocker or lack(norm)
            continue
        try:
            spec = border.plan(norm.layer, lane, hardware)
        except FxpError as error:
            raise type(error)(f"norm {norm.name!r}: {error}") from error
        entries.append(
            NormParams(
                name=norm.name, input=norm.input, output=norm.output, rows=0, left_out=0,
                input_record=side_record(None, None), output_record=side_record(None, None), sqnr_db=None, spec=spec,
            )
        )  # fmt: skip
    if not entries:
        raise ModelError(
            f"of the model's norms ({len(skipped)}), none stands between DequantizeLinear and QuantizeLinear with "
            "constant parameters: calibrate them with data, by calibrate --data"
        )
    params = ModelParams(
        model_sha256=model_sha256(model, loaded), data_sha256=FeedHash().hexdigest(), feeds=0,
        versions=versions(runtime=False), warnings=(), norms=tuple(entries), lane=lane,
        hardware=hardware_record(hardware), fuse_residual=fuse_residual,
    )  # fmt: skip
    return QuantizedNorms(params, skipped)
