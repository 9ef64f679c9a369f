"""The parameter file and the model that it was made with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx_models import N, feeds, model_with_norms
from test_cli import document, run


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    onnx.save(model_with_norms(), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **feeds(1, shape=(2, 80, N))[0])
    run("calibrate", tmp_path / "model.onnx", "--data", tmp_path / "data.npz", "-o", tmp_path / "params.json")
    return tmp_path


def changed(folder: Path, tensor: str) -> Path:
    """Return the model with other values in one of its tensors."""
    model = onnx.load(folder / "model.onnx")
    found = next(initializer for initializer in model.graph.initializer if initializer.name == tensor)
    found.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(found) * np.float32(1.5), tensor))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_parameters_of_a_model_that_was_changed_elsewhere_are_taken_with_a_warning(calibrated: Path) -> None:
    """What comes before a norm may be quantized or fused since; and then again it may be another model's."""
    other, params, out = changed(calibrated, "w0"), calibrated / "params.json", calibrated / "out.onnx"
    exported = run("export", other, params, "-o", out)
    warning = f"Warning: {params} was made with another model than {other}"
    assert exported.stderr.startswith(warning)
    assert exported.stderr.splitlines()[-1].startswith("PASSED | 2 norms replaced")
    assert len(document("export", other, params, "-o", out)["warnings"]) == 1
    assert run("verify", other, out, params, "--data", calibrated / "data.npz").stderr.startswith(warning)


def test_parameters_of_the_same_model_are_taken_without_a_word(calibrated: Path) -> None:
    model, params, out = (calibrated / name for name in ("model.onnx", "params.json", "out.onnx"))
    assert document("export", model, params, "-o", out)["warnings"] == []
    assert run("verify", model, out, params, "--data", calibrated / "data.npz").stderr.startswith("PASSED")
    renamed = model.rename(calibrated / "renamed.onnx")
    assert run("export", renamed, params, "-o", out).stderr.startswith("PASSED")


@pytest.mark.parametrize("tensor", ["gamma1", "beta1"])
def test_parameters_of_a_norm_with_other_weights_are_refused(calibrated: Path, tensor: str) -> None:
    result = run("export", changed(calibrated, tensor), calibrated / "params.json", "-o", calibrated / "o.onnx", code=2)
    assert "the norm 'norm1' has another shape, eps, scale or bias than its parameters" in result.stderr
