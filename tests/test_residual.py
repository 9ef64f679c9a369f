"""Residual adds that become part of the integer norm: in float models, by calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import helper
from onnx_models import run_onnxruntime
from test_adding_norms import skip_feeds, skip_model
from test_bodies import CONDITION, data, model_of, norm, spelled
from test_bodies import NODE as NORM

from fxp_layernorm import ModelError, export
from fxp_layernorm.analysis import analyze_model
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.cli import main
from fxp_layernorm.params import ModelParams
from fxp_layernorm.runtime import Feeds

BLOCK = "h = Mul(x, weight) t = Tanh(h) s0 = Add(h, t) "


def fused(model: onnx.ModelProto, feeds: list[dict[str, Any]], *, form: str = "inline") -> tuple[Any, ModelParams]:
    params = calibrate_model(model, Feeds(feeds), fuse_residual=True)
    exported = export.quantize_model(model, params, form=form)
    onnx.checker.check_model(exported, full_check=True)
    result = export.verify(model, exported, params, Feeds(feeds))
    assert result.exact
    assert all(norm.codes for norm in result.norms)
    assert all(output.cosine > 0.995 for output in result.outputs)
    return exported, params


@pytest.mark.parametrize("form", ["inline", "function"])
@pytest.mark.parametrize("text", [NORM, spelled(17)], ids=["node", "spelled"])
def test_sum_that_nothing_else_reads(text: str, form: str) -> None:
    model = model_of(BLOCK + norm(text, "s0", "o") + "y = Tanh(o)")
    exported, params = fused(model, data(), form=form)
    spec = params.norms[0].spec
    assert spec.residual is not None
    assert spec.sum_output is None
    values = {name for node in exported.graph.node for name in node.output}
    assert "s0" not in values
    (place,) = export.exported_norms(export.load_model(exported))
    assert place.residual is not None
    assert (place.input, place.output) == ("h", "o")


def test_sum_that_is_needed_is_an_output_of_the_norm() -> None:
    """A residual stream: the sum goes on to the next block, in 16-bit codes."""
    model = model_of(BLOCK + norm(NORM, "s0", "o") + "n1 = Tanh(o) s1 = Add(s0, n1) " + norm(NORM, "s1", "y", 1))
    exported, params = fused(model, data())
    first, second = (entry.spec for entry in params.norms)
    assert first.sum_output is not None
    assert first.sum_output.dtype == "int16"
    assert second.sum_output is None
    assert not [node for node in exported.graph.node if node.output[0] in ("s0", "s1") and node.op_type == "Add"]


@pytest.mark.parametrize("value", ["residual_input", "sum_output"])
def test_the_floats_beside_the_sum_are_held_too(value: str) -> None:
    model = model_of(BLOCK + norm(NORM, "s0", "o") + "n1 = Tanh(o) y = Add(s0, n1)")
    exported, params = fused(model, data())
    probe = export.probe(exported)
    names = [output.name for output in probe.graph.output]
    results = [dict(zip(names, run_onnxruntime(probe, feed), strict=True)) for feed in data()]
    assert export.verify(model, exported, params, Feeds(data()), results=Feeds(results)).exact
    name = getattr(export.exported_norms(export.load_model(exported))[0], value)
    results[0][name] = results[0][name] * np.float32(1.1)
    checked = export.verify(model, exported, params, Feeds(data()), results=Feeds(results))
    assert not checked.passed
    assert (checked.norms[0].mismatches, checked.norms[0].border_beyond > 0) == (0, True)


@pytest.mark.parametrize("outputs", [["n"], ["n", "", "", "total"]])
@pytest.mark.parametrize("operator", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_nodes_that_add(operator: str, outputs: list[str]) -> None:
    inputs = ["h", "skip", "gamma", "beta"] if operator == "SkipLayerNormalization" else ["h", "skip", "gamma"]
    model = skip_model(operator, inputs, outputs)
    model.graph.node.insert(0, helper.make_node("Neg", ["x"], ["h"]))
    exported, params = fused(model, skip_feeds())
    assert params.norms[0].spec.residual is not None
    assert (params.norms[0].spec.sum_output is not None) == (len(outputs) > 1)
    assert not [node for node in exported.graph.node if node.domain]


def test_what_is_not_fused() -> None:
    """A constant, a tensor that is broadcast, and a sum with a bias are no residuals."""
    for text in ("s0 = Add(x, weight)", "p = ReduceMax<axes = [-1]>(x) s0 = Add(x, p)"):
        model = model_of(text + norm(NORM, "s0", "y"))
        assert calibrate_model(model, Feeds(data()), fuse_residual=True).norms[0].spec.residual is None
    model = skip_model("SkipLayerNormalization", ["x", "skip", "gamma", "beta", "bias"], ["n"])
    assert calibrate_model(model, Feeds(skip_feeds()), fuse_residual=True).norms[0].spec.residual is None


def test_in_a_branch() -> None:
    model = model_of(
        f"y = If (c) <then_branch = b () => (float[rt, 16] o) {{ {BLOCK} {norm(NORM, 's0', 'o')} }}, "
        "else_branch = e () => (float[re, 16] e) { e = Tanh(x) }>",
        inputs=", bool c",
    )
    _, params = fused(model, data(**CONDITION))
    assert params.norms[0].spec.residual is not None


def test_residual_needs_an_add_in_the_model() -> None:
    model = model_of(BLOCK + norm(NORM, "s0", "y"))
    params = calibrate_model(model, Feeds(data()), fuse_residual=True)
    other = model_of("h = Mul(x, weight) t = Tanh(h) s0 = Sub(h, t) " + norm(NORM, "s0", "y"))
    with pytest.raises(ModelError, match="add a residual; the model has none before it"):
        export.quantize_model(other, params)
    with pytest.raises(ModelError, match="add a residual; the model has none before it"):
        export.quantize_model(other, params, form="qdq")


def test_report_and_command(tmp_path: Path) -> None:
    model = model_of(BLOCK + norm(NORM, "s0", "o") + "n1 = Tanh(o) s1 = Add(s0, n1) " + norm(NORM, "s1", "y", 1))
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "data.npz", **data()[0])
    arguments = ["calibrate", str(tmp_path / "m.onnx"), "--data", str(tmp_path / "data.npz"), "--fuse-residual"]
    assert CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "p.json")]).exit_code == 0
    params = ModelParams.load(tmp_path / "p.json")
    assert all(entry.spec.residual is not None for entry in params.norms)
    analysis = analyze_model(model, params, Feeds(data()))
    assert len(analysis.norms) == 2
