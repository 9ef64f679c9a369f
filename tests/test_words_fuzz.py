"""Whatever can be planned, in every word that holds it: the reference's bits, or a refusal that says why."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx_models import run_onnxruntime
from specs import rows_of, specs

import fxp_layernorm as fxp
from fxp_layernorm import LayerNormSpec, ModelError, reference
from fxp_layernorm.export import Form, Word, to_onnx

FORMS = st.sampled_from([Form.INLINE, Form.FUNCTION])


def compare(spec: LayerNormSpec, word: Word, form: Form) -> None:
    operands = rows_of(spec, budget=300)
    model = to_onnx(spec, word, form)
    results = run_onnxruntime(model, dict(zip(("q", "residual"), operands, strict=False)))
    wanted = [reference.run(spec, *operands)]
    if spec.sum_output is not None:
        wanted.append(reference.run_with_sum(spec, *operands)[1])
    for found, expected in zip(results, wanted, strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs(st.integers(1, 24)), form=FORMS)
def test_int64_holds_everything(spec: LayerNormSpec, form: Form) -> None:
    if spec.m < 16:
        with pytest.raises(ModelError, match="at least 16 bits"):
            to_onnx(spec)
        return
    compare(spec, Word.INT64, form)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(spec=specs(st.integers(1, 24)), form=FORMS, word=st.sampled_from([Word.INT24, Word.FLOAT24]), data=st.data())
def test_narrow_words_are_exact_or_refuse(spec: LayerNormSpec, form: Form, word: Word, data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from([spec, _narrowed(spec)]))
    try:
        to_onnx(spec, word, form)
    except ModelError as error:
        assert "int64" in str(error)  # noqa: PT017 - what is refused is told what to do
        return
    compare(spec, word, form)


def _narrowed(spec: LayerNormSpec) -> LayerNormSpec:
    """Return the spec that the planner makes of the same layer and codes for the narrow words, where there is one."""
    kind = fxp.RMSNorm if spec.kind is fxp.NormKind.RMSNORM else fxp.LayerNorm
    layer = kind(spec.normalized_shape, spec.eps, axes=spec.axes, eps_outside=spec.eps_outside)
    layer.weight = np.reshape(spec.gamma, spec.normalized_shape)
    if isinstance(layer, fxp.LayerNorm):
        layer.bias = np.reshape(spec.beta, spec.normalized_shape)
    try:
        return fxp.plan(layer, spec.input, spec.output, residual=spec.residual, hardware="carried24")
    except fxp.PlanError:
        return spec
