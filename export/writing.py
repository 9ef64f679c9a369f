"""Writing a model with integer norms to a file, with its external data beside it."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from ..files import atomic_path
from ..params import ModelParams
from ..quantization import DType
from .loading import Model
from .model import Replacement, replace_norms
from .subgraph import Form, Word

#: Tensors of more bytes go to the file of external data.
_INLINE_BYTES = 1024


def export_model(
    model: Model,
    params: ModelParams,
    out: str | Path,
    form: Form | str | None = None,
    word: Word | str = Word.INT64,
    *,
    io: DType | str | None = None,
    opset: int | None = None,
) -> Replacement:
    """Write a copy of a model with its norms replaced by integer ones; see `quantize_model`.

    The file appears whole or not at all. Where the model has external data, they are copied to ``OUT.data``, without
    being held in memory.

    Raises
    ------
    ModelError
        As `quantize_model`.
    InputError
        If the file can't be written.
    """
    replacement = replace_norms(model, params, form, word, io=io, opset=opset)
    save_model(replacement.model, out)
    return replacement


def save_model(model: ir.Model, out: str | Path) -> None:
    """Write a model; where it has external data, they are copied to ``OUT.data``, without being held in memory."""
    path = Path(out).resolve()
    if not _external(model):
        with atomic_path(path) as temporary:
            onnx.save(ir.to_proto(model), temporary)
        return
    final = path.with_name(f"{path.name}.data")
    with atomic_path(path) as temporary, atomic_path(final) as data:
        outside = ir.external_data.unload_from_model(
            model.clone(), data.parent, data.name, size_threshold_bytes=_INLINE_BYTES
        )
        for value, tensor in _external(outside):
            value.const_value = ir.ExternalTensor(
                final.name, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name,
                base_dir=path.parent,
            )  # fmt: skip
        onnx.save(ir.to_proto(outside), temporary)
        path.unlink(missing_ok=True)  # at no moment is the old model there with the new data


def _external(model: ir.Model) -> list[tuple[ir.Value, ir.ExternalTensor]]:
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    return [(value, value.const_value) for value in values if isinstance(value.const_value, ir.ExternalTensor)]
