"""Raising a model's opset, and its IR version with it."""

from __future__ import annotations

import onnx
import onnx.version_converter
import onnx_ir as ir

from ..errors import ModelError


def raised(model: ir.Model, opset: int) -> ir.Model:
    """Return a model raised to an opset, and to its IR version; it is the model itself where it has that opset.

    Raises
    ------
    ModelError
        If the model has a later opset, or ONNX's converter can't raise it.
    """
    current = model.opset_imports.get("", 0)
    if current == opset:
        _raise_ir_version(model)
        return model
    if not current < opset <= onnx.defs.onnx_opset_version():
        raise ModelError(
            f"the opset can be raised from the model's {current} to {onnx.defs.onnx_opset_version()}, not to {opset}"
        )
    folders = {str(tensor.base_dir) for tensor in _external(model)}
    if len(folders) > 1:
        raise ModelError("the opset can't be raised: the model's external data are in several folders")
    try:
        proto = onnx.version_converter.convert_version(ir.to_proto(model), opset)
        if not folders:
            onnx.checker.check_model(proto)
    except Exception as error:  # the converter raises RuntimeError and its own, the checker ValidationError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"the opset can't be raised from {current} to {opset}: {reason}") from error
    converted = ir.from_proto(proto)
    _raise_ir_version(converted)
    for tensor in _external(converted):
        tensor.base_dir = next(iter(folders))
    return converted


def _raise_ir_version(model: ir.Model) -> None:
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True))


def _external(model: ir.Model) -> list[ir.ExternalTensor]:
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
