"""Norms that add a residual which is the output of another norm: they take its codes as they are."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from test_bodies import NODE, N, data, model_of, norm

import fxp_layernorm as fxp
from fxp_layernorm import export
from fxp_layernorm.analysis.precision import Target, energy, meet_target
from fxp_layernorm.calibration import (
    CalibrationOptions,
    ModelCalibration,
    ModelObjective,
    NormCalibration,
    NormObserver,
    calibrate_model,
)
from fxp_layernorm.calibration.simulation import Sides
from fxp_layernorm.params import ModelParams
from fxp_layernorm.quantization import QuantParams
from fxp_layernorm.runtime import Feeds

DATA = Feeds(data())


def blocks(add: str = "Add(o, t)") -> onnx.ModelProto:
    """Return a model whose second norm adds what is left of the first one's output to that output."""
    return model_of(norm(NODE, "x", "o") + f"h = Mul(o, weight) t = Tanh(h) s = {add} " + norm(NODE, "s", "y", 1))


@pytest.mark.parametrize("first", [True, False])
def test_the_codes_of_another_norm_are_not_quantized_again(first: bool) -> None:
    model, options = blocks("Add(o, t)" if first else "Add(t, o)"), CalibrationOptions()
    calibration = ModelCalibration(model, fuse_residual=True)
    calibration.observe(DATA)
    params = calibration.params(options)
    before, behind = params.norms
    assert before.spec.output.channel_scales is not None
    taken, own = behind.spec.operands if first else behind.spec.operands[::-1]
    assert taken == before.spec.output
    assert own.exponents is not None
    # the record tells how the codes were chosen: with a scale a channel, as those of the first norm's output
    assert (behind.input_record == before.output_record) is first

    def sqnr(chosen: ModelParams) -> float:
        verified = export.verify(model, export.quantize_model(model, chosen), chosen, DATA)
        assert verified.exact
        return verified.outputs[0].sqnr_db or 0

    alone = calibration.spec(behind.name, options, fuse=True)
    apart = calibration.assembled({before.name: (before.spec, options), behind.name: (alone, options)})
    assert sqnr(params) > sqnr(apart)


def test_targets_are_measured_with_the_codes_handed_on() -> None:
    model = blocks()
    calibration = ModelCalibration(model, observe_addends=True)
    calibration.observe(DATA)
    objective = ModelObjective(model, calibration.names, DATA, residuals=True)
    found = meet_target(calibration, objective, CalibrationOptions(), Target.parse("sqnr_db=30"))
    assert found.met
    before, behind = found.params.norms
    assert behind.spec.input == before.spec.output
    chosen = found.chosen.formats[behind.name]
    assert (chosen.spec, chosen.cost_pj) == (behind.spec, energy(behind.spec, adds_before=True))
    choice = {entry.name: Sides.of(entry.spec) for entry in found.params.norms}
    assert objective.measure(choice) == found.chosen.quality


@pytest.mark.parametrize("output", ["uint8", "int16"])
def test_codes_of_another_type_than_the_inputs_are_not_taken(output: str) -> None:
    before, behind = calibrate_model(blocks(), DATA, "int8", output, fuse_residual=True).norms
    assert before.spec.output.dtype == output
    assert [params.dtype for params in behind.spec.operands] == ["int8", "int8"]
    assert behind.input_record.scales == "exponents"


def test_codes_whose_scales_are_too_far_apart_for_a_sum_are_not_taken() -> None:
    """They can be added, but at the price of the other channels; or not at all."""
    model = blocks()
    gamma = next(tensor for tensor in model.graph.initializer if tensor.name == "gamma0")
    values = numpy_helper.to_array(gamma).copy()
    values[3] *= 4096
    gamma.CopyFrom(numpy_helper.from_array(values, "gamma0"))
    before, behind = (entry.spec for entry in calibrate_model(model, DATA, fuse_residual=True).norms)
    assert behind.input.dtype == before.output.dtype
    assert behind.input != before.output

    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(200, N)).astype(np.float32) for _ in range(2))
    layer = fxp.LayerNorm(N)
    calibration, addends = NormCalibration(layer), NormObserver(layer)
    calibration.observer.update(first + second)
    addends.update(first, second)
    options, scales = CalibrationOptions(), np.where(np.arange(N) == 3, 1e-30, 1.0)
    codes = QuantParams("int8", 1.0, channel_scales=scales)
    spec = calibration.spec_with_residual(options, addends, with_sum=False)
    assert calibration.spec_with_codes(spec, options, addends, (codes, None)) is spec
