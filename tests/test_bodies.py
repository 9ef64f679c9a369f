"""Norms in bodies of If, Loop and Scan nodes and in model-local functions: found, observed, replaced and exact."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from fxp_layernorm import ModelError, export
from fxp_layernorm.calibration import ModelCalibration, calibrate_model
from fxp_layernorm.exposure import expose
from fxp_layernorm.runtime import Feeds, Session

N = 16
RNG = np.random.default_rng(11)
PARAMETERS = {
    **{f"gamma{i}": np.exp(0.3 * RNG.normal(size=N)).astype(np.float32) for i in range(3)},
    **{f"beta{i}": (0.2 * RNG.normal(size=N)).astype(np.float32) for i in range(3)},
    "weight": RNG.normal(size=N).astype(np.float32),
    "two": np.float32(2), "eps": np.float32(1e-5), "one": np.int64(1), "last": np.array([-1]),
    "first": np.array([0]), "wide": np.array([-1, N]), "blocks": np.array([2, 3, N]), "rows": np.array([6, N]),
    "start": np.zeros(N, dtype=np.float32),
}  # fmt: skip

#: A norm of IN into OUT with the parameters I, spelled out and as a node.
SPELLED = (
    "m = ReduceMean<axes = [-1]>(IN) d = Sub(IN, m) s = Pow(d, two) v = ReduceMean<axes = [-1]>(s) a = Add(v, eps) "
    "r = Sqrt(a) u = Div(d, r) g = Mul(u, gammaI) OUT = Add(g, betaI) "
)
NODE = "OUT = LayerNormalization(IN, gammaI, betaI) "


def norm(text: str, source: str, target: str, index: int = 0) -> str:
    return text.replace("IN", source).replace("OUT", target).replace("I", str(index)) + " "


def model_of(
    nodes: str, *, opset: int = 17, inputs: str = "", functions: str = "", imports: str = ""
) -> onnx.ModelProto:
    """Return a model of x (rows, 16), whatever other inputs, and an output y."""
    model: onnx.ModelProto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}{imports}]> '
        f"g (float[rows, 16] x{inputs}) => (float[count, 16] y) {{ {nodes} }} {functions}"
    )
    used = PARAMETERS.keys() & set(re.findall(r"\w+", nodes))
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(PARAMETERS[name]), name) for name in sorted(used))
    onnx.checker.check_model(model, full_check=True)
    return model


def spelled(opset: int) -> str:
    return SPELLED.replace("<axes = [-1]>(IN)", "(IN, last)").replace("<axes = [-1]>(s)", "(s, last)") \
        if opset >= 18 else SPELLED  # fmt: skip


def branches(text: str, opset: int = 17) -> onnx.ModelProto:
    """Return a model with a norm in each branch of an If; their inner values have the same names."""
    one = norm(text, "h", "o")
    return model_of(
        f"h0 = Mul(x, weight) y0 = If (c) <"
        f"then_branch = t () => (float[rt, 16] t) {{ h = Sub(h0, x) {one} t = Tanh(o) }}, "
        f"else_branch = e () => (float[re, 16] e) {{ h = Add(h0, h0) {one.replace('gamma0', 'gamma1')} e = Neg(o) }}> "
        "y = Identity(y0)",
        opset=opset, inputs=", bool c",
    )  # fmt: skip


def data(**more: Any) -> list[dict[str, Any]]:
    """Return four feeds."""
    rng = np.random.default_rng(12)
    feeds = []
    for index in range(4):
        x = (2 * rng.normal(size=(3 + index, N)) + 0.5).astype(np.float32)
        feeds.append({"x": x, **{name: np.asarray(values[index]) for name, values in more.items()}})
    return feeds


CONDITION = {"c": [True, False, True, False]}
COUNTS = {"n": [np.int64(2), np.int64(1), np.int64(3), np.int64(0)]}


def check(model: onnx.ModelProto, feeds: list[dict[str, Any]], norms: int) -> onnx.ModelProto:
    """Replace all norms in both forms; nothing float may be left of them, and the codes must be the kernel's."""
    found = export.find_norms(export.load_model(model))
    assert [one.blocker for one in found] == [None] * norms
    assert len({one.name for one in found}) == norms
    params = calibrate_model(model, Feeds(feeds), "int16", "int16")
    assert all(entry.rows for entry in params.norms)
    for form in ("function", "inline"):
        exported = export.quantize_model(model, params, form=form)
        onnx.checker.check_model(exported, full_check=True)
        assert not export.find_norms(export.load_model(exported))
        result = export.verify(model, exported, params, Feeds(feeds))
        assert result.exact
        assert all(one.codes for one in result.norms)
        assert all(output.cosine > 0.9999 for output in result.outputs)
    return exported


@pytest.mark.parametrize("opset", [12, 13, 17, 21])
def test_branches(opset: int) -> None:
    text = NODE if opset >= 17 else SPELLED
    model = branches(text, opset)
    assert [one.output for one in export.find_norms(export.load_model(model))] == ["o", "o_1"]
    check(model, data(**CONDITION), 2)


@pytest.mark.parametrize("opset", [12, 17, 18])
def test_spelled_in_branches(opset: int) -> None:
    check(branches(spelled(opset), opset), data(**CONDITION), 2)


LOOP = (
    "y = Loop (n, , x) <body = b (int64 i, bool ci, float[rs, 16] state) => (bool co, float[ro, 16] so) {{ "
    "co = Identity(ci) h = Mul(state, weight) {} so = Concat<axis = 0>(o, x) }}>"
)


@pytest.mark.parametrize("opset", [12, 17, 21])
def test_loop_whose_rows_grow(opset: int) -> None:
    model = model_of(LOOP.format(norm(NODE if opset >= 17 else SPELLED, "h", "o")), opset=opset, inputs=", int64 n")
    check(model, data(**COUNTS), 1)


def test_loop_with_scan_outputs() -> None:
    text = (
        "z, k = Loop (n, , x) <body = b (int64 i, bool ci, float[rows, 16] s) => (bool co, float[rows, 16] so, "
        f"float[rows, 16] k0) {{ co = Identity(ci) h = Mul(s, weight) {norm(NODE, 'h', 'o')} so = Tanh(o) "
        "k0 = Neg(s) }> l = ReduceSum<keepdims = 0>(k, first) y = Add(z, l)"
    )
    model = model_of(text, inputs=", int64 n")
    check(model, data(n=[np.int64(2), np.int64(1), np.int64(3), np.int64(1)]), 1)


@pytest.mark.parametrize("attributes", ["", ", scan_output_axes = [0], scan_output_directions = [1]"])
def test_scan(attributes: str) -> None:
    """A running state over the rows, normalized at each step."""
    text = (
        f"last_state, y = Scan (start, x) <num_scan_inputs = 1{attributes}, body = b (float[16] s, float[16] xi) => "
        f"(float[16] so, float[16] yi) {{ h = Add(s, xi) {norm(NODE, 'h', 'o')} so = Tanh(o) yi = Mul(o, weight) }}>"
    )
    model = model_of(text)
    check(model, data(), 1)


def test_branch_in_a_loop_and_loop_in_a_branch() -> None:
    inner = (
        "p = Greater(i, one) so = If (p) <"
        f"then_branch = t () => (float[rt, 16] t) {{ h = Mul(s, weight) {norm(NODE, 'h', 't', 1)} }}, "
        "else_branch = e () => (float[re, 16] e) { e = Tanh(s) }>"
    )
    loop = (
        "w = Loop (n, , x) <body = b (int64 i, bool ci, float[rs, 16] s) => (bool co, float[ro, 16] so) "
        f"{{ co = Identity(ci) {inner} }}>"
    )
    model = model_of(
        f"y = If (c) <then_branch = t2 () => (float[r2, 16] w) {{ {loop} }}, "
        f"else_branch = e2 () => (float[r3, 16] o) {{ {norm(NODE, 'x', 'o')} }}>",
        inputs=", bool c, int64 n",
    )
    check(model, data(c=[True, False, True, True], n=[np.int64(v) for v in (5, 2, 1, 3)]), 2)


def test_value_from_outside_is_observed_where_the_norm_is() -> None:
    """The norm's input is computed outside; its codes exist only when the branch runs."""
    model = model_of(
        f"h = Mul(x, weight) y = If (c) <then_branch = t () => (float[rt, 16] o) {{ {norm(spelled(17), 'h', 'o')} }}, "
        "else_branch = e () => (float[re, 16] e) { e = Tanh(h) }>",
        inputs=", bool c",
    )
    exported = check(model, data(**CONDITION), 1)
    (place,) = export.exported_norms(export.load_model(exported))
    assert place.input == "o/input"


def test_branch_that_never_runs_stays_float() -> None:
    model = branches(NODE)
    calibration = ModelCalibration(model)
    calibration.observe(Feeds(data(c=[True] * 4)))
    params = calibration.params()
    assert [entry.name for entry in params.norms] == ["o"]
    assert [(one.name, one.blocker) for one in calibration.skipped] == [("o_1", "the data never runs it")]
    exported = export.quantize_model(model, params)
    assert [one.output for one in export.find_norms(export.load_model(exported))] == ["o_1"]
    assert export.verify(model, exported, params, Feeds(data(**CONDITION))).exact


#: A node with bodies whose body normalizes IN into OUT, or holds such a node itself; its rows vary with the pass.
AROUND = {
    "If": "bI = Constant<value_float = 0.0>() eI = ReduceMax<keepdims = 0>(IN) cI = Greater(eI, bI) "
    "OUT = If (cI) <then_branch = tI () => (float[rtI, 16] otI) { iI = Mul(IN, weight) INNER otI = Identity(kI) }, "
    "else_branch = fI () => (float[reI, 16] ofI) { ofI = Tanh(IN) }>",
    "Loop": "rI = ReduceMean<keepdims = 0>(IN) pI = Abs(rI) qI = Ceil(pI) nI = Cast<to = 7>(qI) OUT = Loop (nI, , IN) "
    "<body = lI (int64 mI, bool cI, float[rsI, 16] iI) => (bool coI, float[roI, 16] soI) "
    "{ coI = Identity(cI) INNER soI = Tanh(kI) }>",
    "Scan": "zI = Unsqueeze(IN, first) wI, vI = Scan (IN, zI) <num_scan_inputs = 1, body = sI "
    "(float[rsI, 16] stI, float[rsI, 16] xI) => (float[roI, 16] soI, float[rpI, 16] yI) "
    "{ iI = Add(stI, xI) INNER soI = Tanh(kI) yI = Neg(kI) }> OUT = Squeeze(vI, first)",
}


@pytest.mark.parametrize("inmost", ["If", "Loop", "Scan"])
@pytest.mark.parametrize("outer", [("If",), ("Loop",), ("Scan",), ("Scan", "Loop")])
def test_bodies_in_bodies(outer: tuple[str, ...], inmost: str) -> None:
    """Whatever is nested in what: rows of as many passes as there were."""
    operators = (*outer, inmost)
    text = norm(NODE, f"i{len(operators) - 1}", f"k{len(operators) - 1}")
    for level in reversed(range(len(operators))):
        source, target = (f"i{level - 1}", f"k{level - 1}") if level else ("x", "y")
        around = AROUND[operators[level]]
        for name, value in (("INNER", text), ("IN", source), ("OUT", target)):
            around = re.sub(rf"\b{name}\b", value, around)
        text = re.sub(r"\b([a-z]+)I\b", rf"\g<1>{level}", around)
    check(model_of(text), [{"x": feed["x"] + shift} for feed in data() for shift in (-1, 4)], 1)


def test_scan_that_becomes_a_loop() -> None:
    """Inputs and outputs along other axes and backwards, and a state, are what they are as a Scan."""
    inner = norm(NODE, "h", "t")
    model = model_of(
        "h1 = Unsqueeze(x, first) h2 = Transpose<perm = [1, 2, 0]>(h1) t2 = Tanh(h2) n2 = Neg(h2) "
        "h3 = Concat<axis = -1>(h2, t2, n2) h4 = Transpose<perm = [2, 0, 1]>(h3) s, u, v, w = Scan (x, h3, h4) "
        "<num_scan_inputs = 2, scan_input_axes = [-1, 0], scan_input_directions = [1, 0], "
        "scan_output_axes = [-2, 0, 0], scan_output_directions = [1, 1, 0], "
        "body = b (float[rows, 16] st, float[rows, 16] a, float[rows, 16] b) => "
        "(float[rows, 16] so, float[rows, 16] yu, float[rows, 16] yv, float[rows, 16] yw) { h = Add(st, a) "
        "p = ReduceMean<keepdims = 0>(h) q = Greater(p, eps) c = If (q) <"
        f"then_branch = t1 () => (float[r1, 16] t) {{ {inner} }}, "
        "else_branch = e1 () => (float[r2, 16] e) { e = Tanh(h) }> so = Add(c, b) yu = Mul(so, weight) yv = Neg(so) "
        "yw = Tanh(so) }> k = Reshape(u, wide) j = Reshape(v, wide) f = Reshape(w, wide) "
        "y = Concat<axis = 0>(k, j, f, s)",
    )
    session, shown = Session(export.load_model(model)), Session(export.load_model(model), {"t": (N,)})
    for feed in data():
        np.testing.assert_array_equal(shown.run(feed)["y"], session.run(feed)["y"])
    check(model, data(), 1)


def test_expose_refuses_what_is_not_there() -> None:
    with pytest.raises(ModelError, match="no value 'none' that can be observed"):
        expose(branches(NODE), {"none": (N,)})


FUNCTION = '<domain: "local", opset_import: ["": 17, "local": 1]> '


def test_function_that_is_called_twice() -> None:
    """Each call has parameters of its own, and so each becomes a norm of its own."""
    model = model_of(
        "h = Mul(x, weight) p = local.block(h, gamma0, beta0) y = local.block(p, gamma1, beta1) ",
        functions=FUNCTION + "block (h, gammaI, betaI) => (o) { two = Constant<value_float = 2.0>() "
        f"eps = Constant<value_float = 1e-5>() t = Tanh(h) {SPELLED.replace('IN', 't')} o = Sub(t, OUT) }}",
        imports=', "local": 1',
    )
    found = export.find_norms(export.load_model(model))
    assert [one.layer.gamma.tolist() for one in found if one.layer] == [
        PARAMETERS["gamma0"].tolist(), PARAMETERS["gamma1"].tolist(),
    ]  # fmt: skip
    exported = check(model, data(), 2)
    assert {entry.domain for entry in exported.opset_import} == {""}


def test_functions_without_norms_stay() -> None:
    functions = (
        FUNCTION + "outer (h, gammaI, betaI) => (o) { s = local.root(h) o = local.inner(s, gammaI, betaI) } "
        + FUNCTION + f"inner (h, gammaI, betaI) => (o) {{ {NODE.replace('IN', 'h').replace('OUT', 'o')} }} "
        + FUNCTION + "root (h) => (o) { a = Mul(h, h) b = Sqrt(a) o = Add(b, h) }"
    )  # fmt: skip
    model = model_of(
        "h = Mul(x, weight) y = local.outer(h, gamma0, beta0)", functions=functions, imports=', "local": 1'
    )
    exported = check(model, data(), 1)
    assert [function.name for function in exported.functions] == ["root"]
    assert {entry.domain for entry in exported.opset_import} == {"", "local"}


def test_function_of_another_opset_says_so() -> None:
    model = model_of(
        "h = Mul(x, weight) y = local.block(h, gamma0, beta0)", opset=18,
        functions=FUNCTION + f"block (h, gammaI, betaI) => (o) {{ {NODE.replace('IN', 'h').replace('OUT', 'o')} }}",
        imports=', "local": 1',
    )  # fmt: skip
    (found,) = export.find_norms(export.load_model(model))
    assert found.name == "block/o"
    assert "another opset" in str(found.blocker)


@pytest.mark.parametrize("axes", [(-2,), (-3, -1)])
@pytest.mark.parametrize("kind", ["If", "Loop", "Scan"])
def test_axes_that_are_not_the_last(kind: str, axes: tuple[int, ...]) -> None:
    """Of each pass's values, the rows are observed, wherever they lie."""
    spelled_out = (
        f"m = ReduceMean<axes = {list(axes)}>(h) d = Sub(h, m) s = Mul(d, d) v = ReduceMean<axes = {list(axes)}>(s) "
        "a = Add(v, eps) r = Sqrt(a) o = Div(d, r) "
    )
    body = {
        "If": f"then_branch = t () => (float[2, 3, 16] o) {{ h = Mul(z, weight) {spelled_out} }}, "
        "else_branch = e () => (float[2, 3, 16] e) { e = Tanh(z) }",
        "Loop": "body = b (int64 i, bool ci, float[2, 3, 16] st) => (bool co, float[2, 3, 16] so) { co = Identity(ci) "
        f"h = Mul(st, weight) {spelled_out} so = Add(o, z) }}",
        "Scan": "num_scan_inputs = 1, body = b (float[2, 3, 16] st, float[16] xi) => (float[2, 3, 16] so) "
        f"{{ h = Mul(z, xi) {spelled_out} so = Add(st, o) }}",
    }[kind]
    start = {"If": "If (c)", "Loop": "Loop (n, , z)", "Scan": "Scan (z, x)"}[kind]
    model = model_of(
        f"w = Reshape(x, blocks) z = Mul(w, w) k = {start} <{body}> y = Reshape(k, rows)",
        inputs=", bool c" if kind == "If" else ", int64 n" if kind == "Loop" else "",
    )
    (found,) = export.find_norms(export.load_model(model))
    assert found.axes == axes
    more: dict[str, dict[str, Any]] = {"If": CONDITION, "Loop": {"n": [np.int64(2), np.int64(1)] * 2}, "Scan": {}}
    feeds = [{**feed, "x": np.resize(feed["x"], (6, N))} for feed in data(**more[kind])]
    check(model, feeds, 1)
