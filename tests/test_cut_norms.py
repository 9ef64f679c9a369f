"""Norms whose inner values are quantized, as ONNX Runtime's quantizer does with those in elementary operators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from test_decomposed import LAYERNORMS, OTHERS, RMSNORMS, data_of, model_of

from fxp_layernorm import ModelError, export
from fxp_layernorm.calibration import calibrate_model, quantized_norms
from fxp_layernorm.cli import main
from fxp_layernorm.runtime import Feeds


def model_with_names(text: str) -> onnx.ModelProto:
    model: onnx.ModelProto = model_of(text)
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}{index}"
    return model


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """What quantize_static takes its data from."""

    def __init__(self) -> None:
        self._feeds = iter(data_of(2, 5, 16))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._feeds, None)


def quantized(model: onnx.ModelProto, folder: Path, **options: Any) -> Path:
    onnx.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "quantized.onnx", Reader(), quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, **options,
    )  # fmt: skip
    return folder / "quantized.onnx"


#: What quantize_static quantizes by default, and everything.
SCHEMES: dict[str, list[str] | None] = {
    "the default": None, "all": ["Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Pow", "ReduceMean", "ReduceSum"],
}  # fmt: skip


@pytest.mark.parametrize("operators", SCHEMES)
@pytest.mark.parametrize(
    "text",
    [
        *(LAYERNORMS[name][0] for name in ("torch", "Reciprocal", "flax", "no affine")),
        RMSNORMS["Llama"],
        RMSNORMS["gain first"],
    ],
)
def test_they_are_listed_with_what_to_do(text: str, operators: str, tmp_path: Path) -> None:
    model = model_with_names(text)
    (expected,) = export.find_norms(export.load_model(model))
    path = quantized(model, tmp_path, op_types_to_quantize=SCHEMES[operators])
    (norm,) = export.find_norms(export.load_model(path))
    assert (norm.kind, norm.axes, norm.normalized_shape) == (expected.kind, expected.axes, expected.normalized_shape)
    assert norm.layer is None
    assert norm.blocker is not None
    assert "its inner values are quantized" in norm.blocker
    assert "nodes_to_exclude" in norm.blocker
    for ask in (lambda: calibrate_model(path, Feeds(data_of(2, 5, 16))), lambda: quantized_norms(path)):
        with pytest.raises(ModelError):
            ask()


@pytest.mark.parametrize("operators", SCHEMES)
def test_without_its_nodes_the_norm_is_replaced(operators: str, tmp_path: Path) -> None:
    model = model_with_names(LAYERNORMS["torch"][0] + " z = Mul(o, gamma)")
    cut = quantized(model, tmp_path, op_types_to_quantize=SCHEMES[operators])
    result = CliRunner().invoke(main, ["inspect", str(cut), "--json"])
    (norm,) = json.loads(result.stdout)["norms"]
    assert norm["codes"] is None
    assert {node.name for node in model.graph.node[1:-2]} == set(norm["nodes"])
    path = quantized(model, tmp_path, op_types_to_quantize=SCHEMES[operators], nodes_to_exclude=norm["nodes"])
    (found,) = export.find_norms(export.load_model(path))
    assert found.blocker is None
    params = calibrate_model(path, Feeds(data_of(2, 5, 16)))
    assert export.verify(path, export.quantize_model(path, params), params, Feeds(data_of(2, 5, 16))).exact


@pytest.mark.parametrize("name", ["softmax", "L2 normalization with eps", "L2 normalization by ReduceL2"])
def test_what_is_no_norm_is_not_listed(name: str, tmp_path: Path) -> None:
    path = quantized(model_with_names(OTHERS[name]), tmp_path, op_types_to_quantize=["Add", "Sub", "Mul", "Div"])
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    assert not export.find_norms(export.load_model(path))
