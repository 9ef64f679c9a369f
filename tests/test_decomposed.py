"""Norms in elementary operators: found whatever their spelling, with their constants; and what only resembles one."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from fxp_layernorm import ModelError, export
from fxp_layernorm.calibration import calibrate_model
from fxp_layernorm.runtime import Feeds

N = 16
EPS = float(np.float32(1e-5))
RNG = np.random.default_rng(7)
CONSTANTS: dict[str, Any] = {
    "gamma": np.exp(0.3 * RNG.normal(size=N)).astype(np.float32),
    "beta": (0.2 * RNG.normal(size=N)).astype(np.float32),
    "weight": RNG.normal(size=N).astype(np.float32),
    "eps": np.float32(1e-5), "zero": np.float32(0), "one": np.float32(1), "two": np.float32(2), "half": np.float32(0.5),
    "minus_half": np.float32(-0.5), "inverse_n": np.float32(1 / N), "n": np.float32(N), "sqrt_n": np.float32(N**0.5),
    "n_less_1": np.float32(N - 1), "inverse_n_less_1": np.float32(1 / (N - 1)),
    "inverse_n_less_2": np.float32(1 / (N - 2)), "bessel": np.float32(N / (N - 1)),
    "last": np.array([-1]), "ones": np.array([1]), "last_two": np.array([-2, -1]), "middle": np.array([1]),
    "middle_axis": np.array([-2]), "first": np.array([0]),
    "matrix": RNG.normal(size=(5, N)).astype(np.float32), "rows_of_5": RNG.normal(size=(5, 1)).astype(np.float32),
    "channels": RNG.normal(size=(1, 5, 1)).astype(np.float32), "to_rows": np.array([-1, N]),
    "mean16": RNG.normal(size=N).astype(np.float32), "var16": np.exp(RNG.normal(size=N)).astype(np.float32),
    "gamma_less_1": RNG.normal(size=N).astype(np.float32), "tiny": np.float32(1e-12),
    "huge": np.float32(65504), "quarter": np.float32(0.25), "n_eps": np.float32(N * 1e-5),
    "ones_column": np.ones((N, 1), dtype=np.float32), "means": np.full((N, N), 1 / N, dtype=np.float32),
    "mean_kernel": np.full((1, N, 1), 1 / N, dtype=np.float32), "sixteenth": np.float32(1 / 16),
}  # fmt: skip

CENTRED = "m = MEAN(h) d = Sub(h, m) "
VARIANCE = CENTRED + "s = Pow(d, two) v = MEAN(s) a = Add(v, eps) "
AFFINE = "g = Mul(u, gamma) o = Add(g, beta)"

#: LayerNorms, from h to o: what computes them, and whether they have gamma and beta.
LAYERNORMS: dict[str, tuple[str, bool, bool]] = {
    "torch": (VARIANCE + "r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "operands swapped": (VARIANCE + "r = Sqrt(a) u = Div(d, r) g = Mul(gamma, u) o = Add(beta, g)", True, True),
    "square by Mul": (CENTRED + "s = Mul(d, d) v = MEAN(s) a = Add(eps, v) r = Sqrt(a) u = Div(d, r) " + AFFINE,
                      True, True),
    "two Subs": (VARIANCE + "r = Sqrt(a) e = Sub(h, m) u = Div(e, r) " + AFFINE, True, True),
    "Identity": (CENTRED + "i = Identity(d) s = Pow(i, two) v = MEAN(s) a = Add(v, eps) b = Identity(a) r = Sqrt(b) "
                 "u = Div(d, r) k = Identity(u) " + AFFINE.replace("u,", "k,"), True, True),
    "Reciprocal": (VARIANCE + "r = Sqrt(a) q = Reciprocal(r) u = Mul(d, q) " + AFFINE, True, True),
    "one over": (VARIANCE + "r = Sqrt(a) q = Div(one, r) u = Mul(d, q) " + AFFINE, True, True),
    "Pow": (VARIANCE + "q = Pow(a, minus_half) u = Mul(d, q) " + AFFINE, True, True),
    "Pow for the root": (VARIANCE + "r = Pow(a, half) u = Div(d, r) " + AFFINE, True, True),
    "no bias": (VARIANCE + "r = Sqrt(a) u = Div(d, r) o = Mul(u, gamma)", True, False),
    "no gain": (VARIANCE + "r = Sqrt(a) u = Div(d, r) o = Add(u, beta)", False, True),
    "no affine": (VARIANCE + "r = Sqrt(a) o = Div(d, r)", False, False),
    "E[x^2] - E[x]^2": ("m = MEAN(h) s = Mul(h, h) e = MEAN(s) t = Mul(m, m) w = Sub(e, t) v = Max(zero, w) "
                        "a = Add(v, eps) r = Sqrt(a) d = Sub(h, m) u = Div(d, r) " + AFFINE, True, True),
    "flax": ("m = MEAN(h) s = Mul(h, h) e = MEAN(s) t = Mul(m, m) w = Sub(e, t) v = Max(w, zero) d = Sub(h, m) "
             "a = Add(v, eps) r = Sqrt(a) q = Reciprocal(r) p = Mul(q, gamma) g = Mul(d, p) o = Add(g, beta)",
             True, True),
    "keras": (VARIANCE + "r = Sqrt(a) q = Reciprocal(r) p = Mul(q, gamma) l = Mul(h, p) c = Mul(m, p) "
              "b = Sub(beta, c) o = Add(l, b)", True, True),
    "squared difference": (CENTRED + "e = Sub(m, h) s = Mul(e, e) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) "
                           "u = Div(d, r) " + AFFINE, True, True),
    "sums": ("z = SUM(h) m = Mul(z, inverse_n) d = Sub(h, m) s = Mul(d, d) y2 = SUM(s) v = Mul(y2, inverse_n) "
             "a = Add(v, eps) r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "sums by n": ("z = SUM(h) m = Div(z, n) d = Sub(h, m) y2 = ReduceSumSquare<axes = [-1]>(d) v = Div(y2, n) "
                  "a = Add(v, eps) r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "expanded": ("f = Shape(h) m = MEAN(h) b = Expand(m, f) d = Sub(h, b) s = Pow(d, two) v = MEAN(s) a = Add(v, eps) "
                 "c = Expand(a, f) r = Sqrt(c) u = Div(d, r) " + AFFINE, True, True),
    "expanded to a shape from before": (
        "f = Shape(x) m = MEAN(h) d = Sub(h, m) s = Mul(d, d) v1 = FLATMEAN(s) z = Shape(v1) "
        "l = Concat<axis = 0>(z, ones) w = Reshape(v1, l) v = Expand(w, f) a = Add(v, eps) r = Sqrt(a) "
        "u = Div(d, r) " + AFFINE, True, True),
    "no kept dimensions": ("m1 = FLATMEAN(h) m = UNSQUEEZE(m1) d = Sub(h, m) s = Pow(d, two) v1 = FLATMEAN(s) "
                           "a1 = Add(v1, eps) r1 = Sqrt(a1) r = UNSQUEEZE(r1) u = Div(d, r) " + AFFINE, True, True),
    "constants computed": (VARIANCE + "r = Sqrt(a) u = Div(d, r) i = Identity(gamma) g = Mul(u, i) "
                           "b = Mul(beta, one) o = Add(g, b)", True, True),
    "Constant nodes": ("k = Constant<value_float = 2.0>() c = Constant<value_float = 1e-5>() " + CENTRED +
                       "s = Pow(d, k) v = MEAN(s) a = Add(v, c) r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "ones": ("z = MatMul(h, ones_column) m = Mul(z, inverse_n) d = Sub(h, m) s = Mul(d, d) y2 = MatMul(s, ones_column) "
             "v = Div(y2, n) a = Add(v, eps) r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "means by MatMul": ("m = MatMul(h, means) d = Sub(h, m) s = Mul(d, d) v = MatMul(s, means) a = Add(v, eps) "
                        "r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "Einsum": ('m1 = Einsum<equation = "abc->ab">(h) m2 = Div(m1, n) m = UNSQUEEZE(m2) d = Sub(h, m) '
               's1 = Einsum<equation = "abc,abc->ab">(d, d) v1 = Div(s1, n) v = UNSQUEEZE(v1) a = Add(v, eps) '
               "r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "Conv": ("t = Transpose<perm = [0, 2, 1]>(h) m = Conv(t, mean_kernel) e = Sub(t, m) s = Mul(e, e) "
             "v = Conv(s, mean_kernel) a = Add(v, eps) r = Sqrt(a) k = Div(e, r) u = Transpose<perm = [0, 2, 1]>(k) "
             + AFFINE, True, True),
    "pooling": ("m = GlobalAveragePool(h) d = Sub(h, m) s = Mul(d, d) v = AveragePool<kernel_shape = [16]>(s) "
                "a = Sum(v, eps) r = Sqrt(a) u = Div(d, r) " + AFFINE, True, True),
    "root of the reciprocal": (VARIANCE + "q = Reciprocal(a) r = Sqrt(q) u = Mul(d, r) " + AFFINE, True, True),
    "root of one over": (VARIANCE + "q = Div(one, a) r = Sqrt(q) u = Mul(d, r) " + AFFINE, True, True),
    "root of the sum": (CENTRED + "s = Mul(d, d) z = SUM(s) a = Add(z, n_eps) r = Sqrt(a) k = Div(d, r) "
                        "u = Mul(k, sqrt_n) " + AFFINE, True, True),
    "ReduceL2": (CENTRED + "z = ReduceL2<axes = [-1]>(d) s = Mul(z, z) v = Div(s, n) a = Add(v, eps) r = Sqrt(a) "
                 "u = Div(d, r) " + AFFINE, True, True),
    "smaller, for float16": (CENTRED + "w = Mul(d, quarter) s = Mul(w, w) v = MEAN(s) e = Mul(eps, sixteenth) "
                             "a = Add(v, e) r = Sqrt(a) u = Div(w, r) " + AFFINE, True, True),
    "negated behind": ("m = MEAN(h) e = Sub(m, h) s = Mul(e, e) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) f = Div(e, r) "
                       "u = Neg(f) g = Mul(u, gamma) o = Sum(g, beta)", True, True),
    "negated": ("m = MEAN(h) e = Sub(m, h) s = Mul(e, e) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) f = Neg(e) "
                "u = Div(f, r) " + AFFINE, True, True),
}  # fmt: skip

SQUARE = "s = Pow(h, two) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) "
RMSNORMS: dict[str, str] = {
    "Llama": SQUARE + "q = Reciprocal(r) u = Mul(h, q) o = Mul(gamma, u)",
    "Div": SQUARE + "u = Div(h, r) o = Mul(u, gamma)",
    "one over": SQUARE + "q = Div(one, r) u = Mul(h, q) o = Mul(u, gamma)",
    "gain first": SQUARE + "q = Reciprocal(r) p = Mul(q, gamma) o = Mul(h, p)",
    "square by Mul": "s = Mul(h, h) v = MEAN(s) a = Add(v, eps) q = Pow(a, minus_half) u = Mul(h, q) o = Mul(u, gamma)",
    "casts apart": "i = Cast<to = 1>(h) w = Cast<to = 1>(h) s = Mul(i, i) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) "
    "u = Div(w, r) o = Mul(u, gamma)",
}

#: What is no norm, or none that one gain and offset a channel express.
OTHERS: dict[str, str] = {
    "batch normalization": "d = Sub(h, mean16) a = Add(var16, eps) r = Sqrt(a) u = Div(d, r) " + AFFINE,
    "softmax": "m = ReduceMax<axes = [-1]>(h) d = Sub(h, m) e = Exp(d) s = SUM(e) o = Div(e, s)",
    "L2 normalization": "s = Mul(h, h) v = SUM(s) r = Sqrt(v) o = Div(h, r)",
    "L2 normalization with eps": "s = Mul(h, h) v = SUM(s) a = Add(v, eps) r = Sqrt(a) o = Div(h, r)",
    "L2 normalization by ReduceL2": "r = ReduceL2<axes = [-1]>(h) o = Div(h, r)",
    "L2 normalization by ReduceL2 with eps": "r = ReduceL2<axes = [-1]>(h) a = Add(r, eps) o = Div(h, a)",
    "L2 normalization, clamped": "s = Mul(h, h) v = SUM(s) r = Sqrt(v) c = Max(r, tiny) o = Div(h, c)",
    "n - 2": CENTRED
    + "s = Mul(d, d) z = SUM(s) v = Mul(z, inverse_n_less_2) a = Add(v, eps) r = Sqrt(a) o = Div(d, r)",
    "L2 normalization, eps behind the root": "s = Mul(h, h) v = SUM(s) r = Sqrt(v) a = Add(r, eps) o = Div(h, a)",
    "eps taken off": CENTRED + "s = Mul(d, d) v = MEAN(s) r = Sqrt(v) a = Sub(r, eps) o = Div(d, a)",
    "L2 normalization, with a temperature": "r = ReduceL2<axes = [-1]>(h) u = Div(h, r) o = Mul(u, two)",
    "L2 normalization, as an operator": "o = LpNormalization<axis = -1>(h)",
    "L1 normalization, with gains": "u = LpNormalization<axis = -1, p = 1>(h) o = Mul(u, gamma)",
    "not centred above": CENTRED + "s = Mul(d, d) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) o = Div(h, r)",
    "not centred below": CENTRED + "s = Mul(h, h) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) o = Div(d, r)",
    "standard deviation only": VARIANCE + "r = Sqrt(a) o = Mul(r, two)",
    "cubes": CENTRED + "s = Pow(d, two) t = Abs(d) c = Mul(s, t) v = MEAN(c) a = Add(v, eps) r = Sqrt(a) o = Div(d, r)",
    "scaled variance": CENTRED + "s = Mul(d, d) v = MEAN(s) w = Mul(v, two) a = Add(w, eps) r = Sqrt(a) o = Div(d, r)",
    "clipped deviations": CENTRED
    + "c = Clip(d, minus_half, half) s = Mul(c, c) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) "
    "o = Div(d, r)",
    "clipped variance": CENTRED
    + "s = Mul(d, d) c = MEAN(s) v = Min(c, huge) a = Add(v, eps) r = Sqrt(a) o = Div(d, r)",
    "two tensors": VARIANCE + "r = Sqrt(a) e = Sub(x, m) o = Div(e, r)",
    "attention's scale": "f = Shape(h) c = Gather(f, last) k = Cast<to = 1>(c) r = Sqrt(k) o = Div(h, r)",
}


def model_of(text: str, *, opset: int = 13, ir_version: int = 8, shape: str = "batch, 5, 16", **extra: Any) -> Any:
    """Return ``o = f(x * weight), y = tanh(o)``; MEAN, SUM and UNSQUEEZE stand for what the opset has."""
    by_input = opset >= 18
    for macro, operator, keep, since in (
        ("FLATMEAN", "ReduceMean", 0, 18), ("MIDDLEMEAN", "ReduceMean", 1, 18), ("MEAN", "ReduceMean", 1, 18),
        ("SUM", "ReduceSum", 1, 13),
    ):  # fmt: skip
        axis, constant = (-2, "middle_axis") if macro.startswith("MIDDLE") else (-1, "last")
        call = (
            f"{operator}<keepdims = {keep}>(#, {constant})"
            if opset >= since
            else f"{operator}<axes = [{axis}], keepdims = {keep}>(#)"
        )
        for name in "hsdecwi":
            text = text.replace(f" {macro}({name})", " " + call.replace("#", name))
    if opset >= 13:
        for name in ("m1", "r1", "m2", "v1"):
            text = text.replace(f"UNSQUEEZE({name})", f"Unsqueeze({name}, last)")
    text = text.replace("UNSQUEEZE", "Unsqueeze<axes = [-1]>")
    if by_input:
        text = text.replace("ReduceSumSquare<axes = [-1]>(d)", "ReduceSumSquare(d, last)")
        text = text.replace("ReduceMax<axes = [-1]>(h)", "ReduceMax(h, last)")
        for name in "hd":
            text = text.replace(f"ReduceL2<axes = [-1]>({name})", f"ReduceL2({name}, last)")
    model = onnx.parser.parse_model(
        f'<ir_version: {ir_version}, opset_import: ["": {opset}]> '
        f"g (float[{shape}] x) => (float[{shape}] y) {{ h = Mul(x, weight) {text} y = Tanh(o) }}"
    )
    used = {name for node in model.graph.node for name in node.input}
    for name, value in {**CONSTANTS, **extra}.items():
        if name in used:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return model


def find(model: onnx.ModelProto) -> list[export.Norm]:
    return export.find_norms(export.load_model(model))


def data_of(*shape: int, count: int = 2) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    return [{"x": (3 * rng.normal(size=shape) + 1).astype(np.float32)} for _ in range(count)]


def assert_replaced(model: onnx.ModelProto, feeds: list[dict[str, Any]], form: str = "inline") -> onnx.ModelProto:
    """Replace all norms; the codes must be the kernel's, the outputs near, and no root left in float."""
    params = calibrate_model(model, Feeds(feeds), "int16", "int16")
    exported = export.quantize_model(model, params, form=form)
    result = export.verify(model, exported, params, Feeds(feeds))
    assert result.exact
    assert all(check.cosine > 0.9999 for check in result.outputs)
    onnx.checker.check_model(exported, full_check=True)
    assert len(params.norms) == len(find(model))
    assert not [norm for norm in find(exported) if norm.form != "decomposed"]
    return exported


def assert_is(norm: export.Norm, kind: str, *, gamma: bool = True, beta: bool = True) -> None:
    assert (norm.kind, norm.form, norm.blocker) == (kind, "decomposed", None)
    assert (norm.axes, norm.normalized_shape, norm.epsilon) == ((-1,), (N,), EPS)
    assert (norm.input, norm.output, norm.name) == ("h", "o", "o")
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["gamma"] if gamma else np.ones(N))
    np.testing.assert_array_equal(norm.layer.beta, CONSTANTS["beta"] if beta else np.zeros(N))


@pytest.mark.parametrize("opset", [12, 21])
@pytest.mark.parametrize("spelling", LAYERNORMS)
def test_layernorm_is_found_and_replaced(spelling: str, opset: int) -> None:
    text, gamma, beta = LAYERNORMS[spelling]
    model = model_of(text, opset=opset)
    (norm,) = find(model)
    assert_is(norm, "layernorm", gamma=gamma, beta=beta)
    exported = assert_replaced(model, data_of(2, 5, N))
    assert not {node.op_type for node in exported.graph.node} & {"Sqrt", "Pow", "ReduceMean"}


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("spelling", RMSNORMS)
def test_rmsnorm_is_found_and_replaced(spelling: str, opset: int) -> None:
    model = model_of(RMSNORMS[spelling], opset=opset)
    (norm,) = find(model)
    assert_is(norm, "rmsnorm", beta=False)
    assert_replaced(model, data_of(2, 5, N))


OUTER = "s = Mul(d, d) VARIANCE r = Sqrt(v) a = Add(r, EPS) u = Div(d, a) " + AFFINE
#: Ways to the variance, and whether it is that of n - 1.
VARIANCES = {
    "biased": ("v = MEAN(s)", False),
    "sum": ("z = SUM(s) v = Mul(z, inverse_n_less_1)", True),
    "factor": ("e = MEAN(s) v = Mul(e, bessel)", True),
    "torch": ("e = MEAN(s) l = Mul(e, n) v = Div(l, n_less_1)", True),
}


@pytest.mark.parametrize("eps", ["eps", "tiny"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_eps_outside_the_root(variance: str, eps: str) -> None:
    """Gamma * (x - mean) / (deviation + eps) + beta, as the annotated transformer has it."""
    text, unbiased = VARIANCES[variance]
    model = model_of(CENTRED + OUTER.replace("VARIANCE", text).replace("EPS", eps))
    (norm,) = find(model)
    root = math.sqrt(N / (N - 1)) if unbiased else 1.0
    assert (norm.kind, norm.eps_outside, norm.output, norm.blocker) == ("layernorm", True, "o", None)
    assert norm.epsilon == float(CONSTANTS[eps]) / root
    assert norm.layer is not None
    assert norm.layer.eps_outside
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["gamma"].astype(np.float64) / root)
    np.testing.assert_array_equal(norm.layer.beta, CONSTANTS["beta"])
    assert_replaced(model, data_of(2, 5, N))


@pytest.mark.parametrize("variance", ["sum", "factor", "torch"])
def test_variance_of_n_less_1(variance: str) -> None:
    text = VARIANCES[variance][0]
    model = model_of(CENTRED + f"s = Mul(d, d) {text} a = Add(v, eps) r = Sqrt(a) u = Div(d, r) {AFFINE}")
    (norm,) = find(model)
    assert (norm.eps_outside, norm.epsilon, norm.blocker) == (False, EPS * (N - 1) / N, None)
    assert norm.layer is not None
    gamma = CONSTANTS["gamma"].astype(np.float64)
    np.testing.assert_allclose(norm.layer.gamma, gamma * math.sqrt((N - 1) / N), rtol=1e-15)
    assert_replaced(model, data_of(2, 5, N))


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_eps_on_both_sides_of_the_root_is_listed(kind: str) -> None:
    """The integers have one eps, so that such a norm stays float, but where the second is too small to matter."""
    root = "v = MEAN(s) w = Add(v, eps) r = Sqrt(w) a = Add(r, SECOND) u = Div(d, a) g = Mul(u, gamma) o = Identity(g)"
    text = (CENTRED + "s = Mul(d, d) " if kind == "layernorm" else "d = Identity(h) s = Mul(h, h) ") + root
    (norm,) = find(model_of(text.replace("SECOND", "eps")))
    assert (norm.kind, norm.output, norm.layer) == (kind, "g", None)
    assert norm.blocker == "1e-05 is added under its root, and 1e-05 to it"
    (norm,) = find(model_of(text.replace("SECOND", "tiny")))
    assert (norm.kind, norm.output, norm.epsilon, norm.blocker) == (kind, "g", EPS, None)


#: What TensorFlow's converter makes of Keras's LayerNormalization, and of others in three dimensions.
FILLED = "gain = ConstantOfShape<value = float[1] {1.0}>(p0) offset = ConstantOfShape<value = float[1] {0.0}>(p0) "
TENSORFLOW = {
    "BatchNormalization": "f = Shape(h) a0 = Gather(f, first) b0 = Gather(f, ones) c0 = Gather(f, twos) "
    "p0 = Mul(a0, b0) t0 = Concat<axis = 0>(ones, p0, c0, ones) w = Reshape(h, t0) m = AVERAGE(w) q = SQUEEZE(m) "
    "e = Sub(w, m) s = Mul(e, e) z = AVERAGE(s) v = SQUEEZE(z) "
    + FILLED + "k = BatchNormalization<epsilon = 1e-5>(w, gain, offset, q, v) u = Reshape(k, f) " + AFFINE,
    "InstanceNormalization": "f = Shape(h) p0 = Slice(f, ones, twos) "
    + FILLED + "u = InstanceNormalization<epsilon = 1e-5>(h, gain, offset) " + AFFINE,
}  # fmt: skip


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("node", TENSORFLOW)
def test_norms_of_other_axes_that_are_made_layernorms(node: str, opset: int) -> None:
    """By statistics that the graph computes, or by a gain and an offset that are none of instances."""
    text, by_attribute = TENSORFLOW[node], "<axes = [0, 2, 3]>"
    for name, operator in (("AVERAGE", "ReduceMean"), ("SQUEEZE", "Squeeze")):
        for value in "wsmz":
            call = f"{operator}({value}, others)" if opset >= 18 else f"{operator}{by_attribute}({value})"
            text = text.replace(f"{name}({value})", call)
    model = model_of(text, opset=opset, twos=np.array([2]), others=np.array([0, 2, 3]))
    (norm,) = find(model)
    assert_is(norm, "layernorm")
    exported = assert_replaced(model, data_of(2, 5, N))
    assert node not in {node.op_type for node in exported.graph.node}


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize(
    "root",
    [
        "s = Mul(h, h) v = MEAN(s) r = Sqrt(v)",
        "s = Mul(h, h) v = SUM(s) w = Sqrt(v) r = Div(w, sqrt_n)",
        "w = ReduceL2<axes = [-1]>(h) r = Div(w, sqrt_n)",
    ],
)
def test_rmsnorm_with_eps_outside(root: str, opset: int) -> None:
    model = model_of(root + " a = Add(r, eps) u = Div(h, a) o = Mul(u, gamma)", opset=opset)
    (norm,) = find(model)
    assert (norm.kind, norm.eps_outside, norm.epsilon, norm.output) == ("rmsnorm", True, EPS, "o")
    assert_replaced(model, data_of(2, 5, N))


#: RMSNorms as L2 normalizations with gains, whose length is held above some number, if at all.
LENGTHS = {
    "torch's normalize": "r = ReduceL2<axes = [-1]>(h) c = Clip(r, tiny) f = Shape(h) e = Expand(c, f) u = Div(h, e) "
    "k = Mul(u, sqrt_n) o = Mul(k, gamma)",
    "Max": "r = ReduceL2<axes = [-1]>(h) c = Max(r, tiny) u = Div(h, c) k = Mul(u, sqrt_n) o = Mul(k, gamma)",
    "under the root": "s = Mul(h, h) z = SUM(s) c = Max(z, tinier) r = Sqrt(c) u = Div(h, r) k = Mul(u, sqrt_n) "
    "o = Mul(k, gamma)",
    "gain first": "r = ReduceL2<axes = [-1]>(h) u = Div(h, r) k = Mul(u, gamma) o = Mul(k, sqrt_n)",
    "LpNormalization": "u = LpNormalization<axis = 2, p = 2>(h) k = Mul(u, sqrt_n) o = Mul(k, gamma)",
}


@pytest.mark.parametrize("opset", [12, 18])
@pytest.mark.parametrize("spelling", LENGTHS)
def test_rmsnorm_by_length(spelling: str, opset: int) -> None:
    model = model_of(LENGTHS[spelling], opset=opset, tinier=np.float32(1e-24))
    (norm,) = find(model)
    held = spelling not in ("gain first", "LpNormalization")
    assert (norm.kind, norm.axes, norm.output, norm.blocker) == ("rmsnorm", (-1,), "o", None)
    assert norm.epsilon == pytest.approx(1e-24 / N if held else 0, rel=1e-6)  # too little to count
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["gamma"])
    data = data_of(2, 5, N)
    if held:
        data[0]["x"][0, 1] = 0  # as padding is
    assert_replaced(model, data)


def test_least_deviation_is_listed_where_codes_may_reach_it() -> None:
    """It is no eps: it counts only where the deviation is smaller, and there the norm is another."""
    for text in ("a = Max(v, eps) r = Sqrt(a)", "w = Sqrt(v) r = Clip(w, eps)"):
        model = model_of(CENTRED + f"s = Mul(d, d) v = MEAN(s) {text} o = Div(d, r)")
        (norm,) = find(model)
        assert (norm.kind, norm.output, norm.layer) == ("layernorm", "o", None)
        assert norm.blocker is not None
        assert re.fullmatch("it divides by no less than .*, where the integers add eps", norm.blocker)


NORMALIZING = {
    "mean and variance": ("u = MeanVarianceNormalization<axes = [-1]>(h) " + AFFINE, (-1,), True, "gamma"),
    "mean and variance of two axes": ("u = MeanVarianceNormalization<axes = [1, 2]>(h) o = Mul(u, matrix)",
                                      (-2, -1), True, "matrix"),
    "group, through instances": ("w = Reshape(h, groups) i = InstanceNormalization(w, one16, zero16) f = Shape(h) "
                                 "u = Reshape(i, f) o = Mul(u, fives)", (-2, -1), False, "fives"),
}  # fmt: skip


@pytest.mark.parametrize("opset", [14, 21])
@pytest.mark.parametrize("name", [*NORMALIZING, "group"])
def test_operators_that_normalize(name: str, opset: int) -> None:
    """Those whose rows are LayerNorm's: a group of all channels, whose gains hold for all other dimensions."""
    group = "o = GroupNormalization<num_groups = 1>(h, channel, channel)", (-2, -1), False, "fives"
    text, axes, outside, gain = {**NORMALIZING, "group": group}[name]
    fives = np.exp(0.3 * np.arange(5, dtype=np.float32)).reshape(5, 1)
    if name == "group" and opset < 21:
        pytest.skip("ONNX has it for each channel from opset 21 on")
    model = model_of(
        text, opset=opset, ir_version=10, one16=np.ones(1, dtype=np.float32), zero16=np.zeros(1, dtype=np.float32),
        groups=np.array([0, 1, -1]), fives=fives, channel=fives.ravel(),
    )  # fmt: skip
    (norm,) = find(model)
    assert (norm.kind, norm.axes, norm.eps_outside, norm.output) == ("layernorm", axes, outside, "o")
    assert norm.epsilon == pytest.approx(1e-9 if outside else 1e-5)
    assert norm.layer is not None
    gains = np.broadcast_to({**CONSTANTS, "fives": fives}[gain], norm.normalized_shape)
    np.testing.assert_array_equal(norm.layer.weight, gains)
    assert_replaced(model, data_of(2, 5, N))


def test_group_of_unknown_size_is_listed() -> None:
    text = NORMALIZING["group, through instances"][0]
    parameters = {"one16": np.ones(1), "zero16": np.zeros(1), "fives": np.arange(5).reshape(5, 1), "weight": 2}
    constants: dict[str, Any] = {name: np.asarray(value, dtype=np.float32) for name, value in parameters.items()}
    (norm,) = find(model_of(text, shape="a, 5, width", groups=np.array([0, 1, -1]), **constants))
    assert (norm.axes, norm.blocker) == ((-2, -1), "the size of the normalized dimensions is not known")


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("other", OTHERS)
def test_what_only_resembles_a_norm_stays(other: str, opset: int) -> None:
    model = model_of(OTHERS[other], opset=opset)
    assert find(model) == []
    with pytest.raises(ModelError, match="no norm that can be replaced"):
        calibrate_model(model, Feeds(data_of(2, 5, N)))


NEWEST = onnx.defs.onnx_opset_version()


@pytest.mark.parametrize("opset", [11, NEWEST])
def test_spellings_are_found_in_every_opset(opset: int) -> None:
    texts = {**{name: text for name, (text, *_) in LAYERNORMS.items()}, **RMSNORMS}
    for name, text in texts.items():
        found = find(model_of(text, opset=opset, ir_version=13))
        assert [(norm.output, norm.blocker) for norm in found] == [("o", None)], name


@pytest.mark.parametrize("opset", [11, NEWEST])
def test_what_only_resembles_a_norm_stays_in_every_opset(opset: int) -> None:
    for name, text in OTHERS.items():
        assert find(model_of(text, opset=opset, ir_version=13)) == [], name


@pytest.mark.parametrize("opset", [11, 18, NEWEST])
def test_other_normalizations_are_no_norms(opset: int) -> None:
    nodes = {
        "batch": "o = BatchNormalization(h, channel, channel, channel, channel)",
        "instance": "o = InstanceNormalization(h, channel, channel)",
        "L2": "o = LpNormalization<axis = -1, p = 2>(h)",
        "local response": "o = LRN<size = 3>(h)",
        "softmax": "o = Softmax<axis = -1>(h)",
        "groups": "w = Reshape(h, groups) i = InstanceNormalization(w, one16, one16) f = Shape(h) k = Reshape(i, f) "
        "o = Mul(k, rows4)",
    }
    if opset >= 21:
        nodes["groups, by the operator"] = "o = GroupNormalization<num_groups = 2>(h, channel, channel)"
    for name, text in nodes.items():
        model = model_of(
            text, opset=opset, ir_version=13, shape="batch, 4, 16", channel=np.arange(4, dtype=np.float32),
            one16=np.ones(2, dtype=np.float32), groups=np.array([0, 2, -1]),
            rows4=np.arange(1, 5, dtype=np.float32).reshape(4, 1),
        )  # fmt: skip
        assert find(model) == [], name


def test_opset_11_is_found_but_lacks_the_integer_operators() -> None:
    model = model_of(LAYERNORMS["torch"][0], opset=11)
    assert_is(find(model)[0], "layernorm")
    params = calibrate_model(model, Feeds(data_of(2, 5, N)))
    with pytest.raises(ModelError, match="needs opset 12 to be replaced; the model has 11"):
        export.quantize_model(model, params)


@pytest.mark.parametrize("shape", ["a, 16", "16", "2, 16", "a, b, c, 16", "1, 1, 16", "a, b, width"])
def test_shapes(shape: str) -> None:
    """The rank and the sizes don't matter; where the last size isn't declared, it is the parameters'."""
    model = model_of(LAYERNORMS["torch"][0], opset=18, shape=shape)
    (norm,) = find(model)
    assert_is(norm, "layernorm")
    sizes = {"a": 2, "b": 3, "c": 2, "width": N}
    assert_replaced(model, data_of(*(sizes[d] if d in sizes else int(d) for d in shape.split(", "))), "function")


def test_shapes_that_are_not_known() -> None:
    text = LAYERNORMS["torch"][0]
    model = model_of("w = Reshape(h, to) " + text.replace("(h", "(w"), to=np.array([2, 5, N]))
    del model.graph.initializer[[tensor.name for tensor in model.graph.initializer].index("to")]
    model.graph.input.append(onnx.helper.make_tensor_value_info("to", onnx.TensorProto.INT64, ["rank"]))
    (norm,) = find(model)
    assert (norm.input, norm.normalized_shape, norm.blocker) == ("w", (N,), None)
    no_size = model_of(LAYERNORMS["no affine"][0], shape="a, b, width", weight=np.float32(2))
    assert find(no_size)[0].blocker == "the size of the normalized dimensions is not known"
    two = LAYERNORMS["no affine"][0].replace("MEAN", "ReduceMean<axes = [-2, -1]>")
    assert [(norm.axes, norm.blocker) for norm in find(model_of(two, shape="a, b, width", weight=np.float32(2)))] == [
        ((-2, -1), "the size of the normalized dimensions is not known")
    ]


def test_weights_that_are_not_there_are_no_means(tmp_path: Path) -> None:
    """External data may lie elsewhere while a model is inspected."""
    text = "w = MatMul(h, weights) " + LAYERNORMS["torch"][0].replace("(h", "(w")
    model = model_of(text, weights=RNG.normal(size=(N, N)).astype(np.float32))
    onnx.save(model, tmp_path / "model.onnx", save_as_external_data=True, location="gone", size_threshold=512)
    (tmp_path / "gone").unlink()
    (norm,) = export.find_norms(export.load_model(tmp_path / "model.onnx"))
    assert (norm.input, norm.output, norm.blocker) == ("w", "o", None)


def test_sizes_of_other_names() -> None:
    """Shape inference loses sight of what is equal, as behind a Slice: JAX exports expand statistics to such shapes."""
    text = (
        "w = Slice(h, first, many, first) f = Shape(x) m1 = ReduceMean<axes = [-1], keepdims = 0>(w) "
        "b = Slice(f, first, two1) l = Concat<axis = 0>(b, ones) m2 = Reshape(m1, l) m = Expand(m2, l) d = Sub(w, m) "
        "s = Mul(d, d) v = MEAN(s) a = Add(v, eps) r = Sqrt(a) u = Div(d, r) " + AFFINE
    )
    model = model_of(text, many=np.array([1 << 40]), two1=np.array([2]))
    (norm,) = find(model)
    assert (norm.input, norm.output, norm.normalized_shape, norm.blocker) == ("w", "o", (N,), None)
    assert_replaced(model, data_of(2, 5, N))


def test_two_axes() -> None:
    text = LAYERNORMS["torch"][0].replace("gamma", "matrix").replace("beta", "matrix")
    for opset in (14, 18):
        model = model_of(text.replace("MEAN", "ReduceMean"), opset=opset)
        for node in model.graph.node:
            if node.op_type == "ReduceMean" and opset < 18:
                node.attribute.append(onnx.helper.make_attribute("axes", [1, 2]))
            elif node.op_type == "ReduceMean":
                node.input.append("last_two")
        if opset >= 18:
            model.graph.initializer.append(numpy_helper.from_array(CONSTANTS["last_two"], "last_two"))
        (norm,) = find(model)
        assert (norm.axes, norm.normalized_shape, norm.epsilon) == ((-2, -1), (5, N), EPS)
        assert norm.layer is not None
        np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["matrix"].ravel())
        np.testing.assert_array_equal(norm.layer.beta, CONSTANTS["matrix"].ravel())
        assert_replaced(model, data_of(2, 5, N))


@pytest.mark.parametrize("opset", [13, 18])
def test_axes_that_are_not_the_last(opset: int) -> None:
    """Channels first: the middle dimension is normalized, each of its elements with a gain of its own."""
    text = LAYERNORMS["torch"][0].replace("gamma", "channels").replace("beta", "channels")
    model = model_of(text.replace("MEAN", "MIDDLEMEAN"), opset=opset)
    (norm,) = find(model)
    assert (norm.axes, norm.normalized_shape, norm.output, norm.blocker) == ((-2,), (5,), "o", None)
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["channels"].ravel())
    for form in ("inline", "function"):
        exported = assert_replaced(model, data_of(2, 5, N), form)
        assert [node.op_type for node in exported.graph.node].count("Transpose") == 2


@pytest.mark.parametrize("exponents", [0, 3])
def test_axes_that_are_apart(exponents: int) -> None:
    """The first and the last of three dimensions, 8-bit codes with exponents of their own for each element."""
    text = LAYERNORMS["no affine"][0].replace("MEAN", "ReduceMean<axes = [1, 3]>")
    model = model_of(text, shape="a, 5, 4, 16", opset=14)
    (norm,) = find(model)
    assert (norm.axes, norm.normalized_shape, norm.blocker) == ((-3, -1), (5, N), None)
    feeds = Feeds(data_of(2, 5, 4, N))
    params = calibrate_model(model, feeds, exponents=exponents)
    assert params.norms[0].rows == 2 * 2 * 4
    assert export.verify(model, export.quantize_model(model, params), params, feeds).exact


def test_a_gain_that_is_no_channels_stays_outside() -> None:
    """Behind a norm, a gain for each token is one more operator, and so is a second gain or offset."""
    model = model_of(VARIANCE + "r = Sqrt(a) u = Div(d, r) o = Mul(u, rows_of_5)")
    assert [(norm.output, norm.blocker) for norm in find(model)] == [("u", None)]
    assert_replaced(model, data_of(2, 5, N))
    model = model_of(VARIANCE + "r = Sqrt(a) u = Div(d, r) g = Mul(u, gamma) b = Add(g, beta) o = Mul(b, two)")
    assert [norm.output for norm in find(model)] == ["b"]
    model = model_of(SQUARE + "u = Div(h, r) g = Mul(u, gamma) o = Add(g, beta)")  # RMSNorm has no offset
    assert [norm.output for norm in find(model)] == ["g"]
    assert_replaced(model, data_of(2, 5, N))


def test_arithmetic_of_instance_normalization_is_a_layernorm_without_gain() -> None:
    text = LAYERNORMS["torch"][0].replace("gamma", "channels4").replace("beta", "channels4")
    model = model_of(
        text.replace("MEAN", "ReduceMean<axes = [2, 3]>"), opset=14, shape="a, 5, 4, 16",
        channels4=CONSTANTS["channels"].reshape(5, 1, 1),
    )  # fmt: skip
    (norm,) = find(model)
    assert (norm.axes, norm.normalized_shape, norm.output, norm.blocker) == ((-2, -1), (4, N), "u", None)
    assert_replaced(model, data_of(2, 5, 4, N))


def test_eps_of_zero() -> None:
    text = LAYERNORMS["torch"][0].replace("a = Add(v, eps)", "a = Identity(v)")
    (norm,) = find(model_of(text))
    assert norm.epsilon == 0
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["gamma"])
    np.testing.assert_array_equal(norm.layer.beta, CONSTANTS["beta"])


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3, 0.1])
def test_eps_is_the_graphs(eps: float) -> None:
    (norm,) = find(model_of(LAYERNORMS["E[x^2] - E[x]^2"][0], eps=np.float32(eps)))
    assert norm.epsilon == float(np.float32(eps))


def test_gain_that_the_graph_computes() -> None:
    """Gemma's gain is 1 + weight, rounded as the model rounds it."""
    model = model_of(SQUARE + "q = Reciprocal(r) u = Mul(h, q) k = Add(gamma_less_1, one) o = Mul(u, k)")
    (norm,) = find(model)
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["gamma_less_1"] + np.float32(1))
    assert_replaced(model, data_of(2, 5, N))


def test_mixed_precision() -> None:
    """float16 outside, float32 for the statistics, and float16 again for gamma and beta."""
    text = (
        "p = Cast<to = 10>(h) i = Cast<to = 1>(p) "
        "m = MEAN(i) d = Sub(i, m) s = Pow(d, two) v = MEAN(s) a = Add(v, eps) "
        "r = Sqrt(a) u = Div(d, r) w = Cast<to = 10>(u) g = Mul(w, gamma) b = Add(g, beta) o = Cast<to = 1>(b)"
    )
    half = {name: CONSTANTS[name].astype(np.float16) for name in ("gamma", "beta")}
    model = model_of(text, **half)
    (norm,) = find(model)
    assert (norm.input, norm.output, norm.epsilon, norm.blocker) == ("i", "b", EPS, None)
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, half["gamma"])
    assert_replaced(model, data_of(2, 5, N))


def test_inner_values_that_are_needed() -> None:
    model = model_of(LAYERNORMS["torch"][0])
    model.graph.output.append(onnx.helper.make_tensor_value_info("m", onnx.TensorProto.FLOAT, None))
    assert [norm.blocker for norm in find(model)] == ["its inner value 'm' is used elsewhere"]
    model = model_of(LAYERNORMS["torch"][0].replace("o = Add", "o2 = Add") + " f = Sin(d) o = Add(o2, f)")
    assert [norm.blocker for norm in find(model)] == ["its inner value 'd' is used elsewhere"]


def test_constants_that_others_use_stay() -> None:
    """Two norms share all constants, as nodes and as initializers; one of them is replaced."""
    first = LAYERNORMS["Constant nodes"][0].replace("o =", "o1 =")
    model = model_of(first + " o = Identity(o1)")
    nodes = {node.output[0]: node for node in model.graph.node}
    del model.graph.node[list(nodes).index("o") :]
    for name in ("m", "d", "s", "v", "a", "r", "u", "g", "o1"):
        node = model.graph.node.add()
        node.CopyFrom(nodes[name])
        for names in (node.input, node.output):
            names[:] = [{"h": "o1", "o1": "o"}.get(v, f"{v}2" if v in nodes and v not in "kc" else v) for v in names]
    model.graph.node.append(nodes["y"])
    assert [(norm.input, norm.output) for norm in find(model)] == [("h", "o1"), ("o1", "o")]
    assert_replaced(model, data_of(2, 5, N))
    params = calibrate_model(model, Feeds(data_of(2, 5, N)))
    some = export.quantize_model(model, dataclasses.replace(params, norms=params.norms[:1]))
    onnx.checker.check_model(some, full_check=True)
    (left,) = find(some)
    assert (left.input, left.output, left.epsilon) == ("o1", "o", EPS)
    np.testing.assert_array_equal(left.layer.gamma if left.layer else [], CONSTANTS["gamma"])


def test_node_whose_parameters_are_computed_of_constants() -> None:
    """As exporters leave them that fold no constants; rounded as the model rounds them."""
    model = model_of("c = Cast<to = 10>(gamma) k = Cast<to = 1>(c) b = Slice(thirds, first, ones) e = Expand(b, width) "
                     "o = LayerNormalization<axis = -1>(h, k, e)", opset=17, thirds=np.full(3, 1 / 3, dtype=np.float32),
                     width=np.array([N]))  # fmt: skip
    (norm,) = find(model)
    assert norm.layer is not None
    np.testing.assert_array_equal(norm.layer.gamma, CONSTANTS["gamma"].astype(np.float16))
    np.testing.assert_array_equal(norm.layer.beta, np.full(N, 1 / 3, dtype=np.float32))
    assert_replaced(model, data_of(2, 5, N))


def test_simplified_layer_normalization() -> None:
    """ONNX Runtime's RMSNorm, which it registers in ONNX's own domain."""
    model = model_of("o = SimplifiedLayerNormalization<axis = -1, epsilon = 1e-5>(h, gamma)", opset=17)
    (norm,) = find(model)
    assert (norm.kind, norm.form, norm.normalized_shape, norm.epsilon) == (
        "rmsnorm", "SimplifiedLayerNormalization", (N,), EPS,
    )  # fmt: skip
    params = calibrate_model(model, Feeds(data_of(2, 5, N)))
    assert export.verify(model, export.quantize_model(model, params), params, Feeds(data_of(2, 5, N))).exact


def test_text_recognition() -> None:
    """PP-OCRv4: five norms as PaddlePaddle exports them, at opset 12, in 860 nodes."""
    spec = importlib.util.find_spec("rapidocr_onnxruntime")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("rapidocr-onnxruntime is not installed")
    path = next((Path(spec.submodule_search_locations[0]) / "models").glob("*rec*.onnx"))
    model = export.load_model(path)
    start = time.perf_counter()
    norms = export.find_norms(model)
    assert time.perf_counter() - start < 2
    assert [(norm.kind, norm.normalized_shape, norm.blocker) for norm in norms] == [("layernorm", (120,), None)] * 5
    assert [norm.epsilon for norm in norms] == [EPS] * 4 + [float(np.float32(1e-6))]
    for norm in norms:
        assert norm.layer is not None
        for parameter, node in ((norm.layer.gamma, "Mul"), (norm.layer.beta, "Add")):
            inputs = [used.inputs[1] for used in norm.nodes if used.op_type == node]
            tensor = ir.convenience.get_const_tensor(inputs[-1]) if inputs[-1] is not None else None
            np.testing.assert_array_equal(parameter, tensor.numpy() if tensor is not None else None)
    feeds = [{"x": np.random.default_rng(4).uniform(-1, 1, size=(1, 3, 48, 160)).astype(np.float32)}]
    params = calibrate_model(path, Feeds(feeds))
    for form in ("inline", "function"):
        assert export.verify(path, export.quantize_model(path, params, form=form), params, Feeds(feeds)).exact
