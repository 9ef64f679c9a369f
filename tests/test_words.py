"""The words int24 and float24: the definition's bits, and no value that reaches 2**24."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import specs
from onnx_ir.tape import Tape
from onnx_models import run_onnxruntime, run_reference
from rows import adversarial, exponents_of, layer_of, noise, params_of, typical

import fxp_layernorm as fxp
from fxp_layernorm import ModelError, NormKind, reference
from fxp_layernorm.export import subgraph, to_onnx
from fxp_layernorm.export.bounded import FLOAT, INT32, Bounded, Number
from fxp_layernorm.export.graph import Writer
from fxp_layernorm.export.narrow_root import Root, Squares

CONSUMERS = pytest.mark.parametrize("run", [run_onnxruntime, run_reference])
WORDS = pytest.mark.parametrize("word", ["int24", "float24"])
Run = Callable[..., list[npt.NDArray[Any]]]
LIMIT = 1 << 24

#: kind, n, input, output, exponents (where they are 3 or 5, channels have zero points too, and scales at the output);
#: n = 5 has a large h, n = 1500 a sum of squares beyond 24 bits
CASES = [
    (NormKind.LAYERNORM, 2, "int8", "int8", 0),
    (NormKind.LAYERNORM, 5, "uint8", "int8", 0),
    (NormKind.LAYERNORM, 64, "int8", "int8", 7),
    (NormKind.LAYERNORM, 120, "int8", "int16", 0),
    (NormKind.LAYERNORM, 384, "uint8", "uint8", 3),
    (NormKind.LAYERNORM, 768, "int8", "int8", 0),
    (NormKind.LAYERNORM, 768, "int8", "int8", 7),
    (NormKind.LAYERNORM, 1500, "int8", "int8", 0),
    (NormKind.RMSNORM, 64, "int8", "uint8", 0),
    (NormKind.RMSNORM, 768, "int8", "int8", 5),
]
#: What is wide, and so in parts: kind, n, input, residual, output and sum; of inputs with an E channels have exponents
#: and zero points, with an S a scale each
WIDE = [
    (NormKind.LAYERNORM, 768, "int8", "int8", "int8", "int8"),
    (NormKind.LAYERNORM, 64, "uint8 E", "int8 E", "int8", "int8 E"),
    (NormKind.RMSNORM, 64, "int8", "uint8", "uint8", "int16"),
    (NormKind.LAYERNORM, 5, "int16", "int16", "uint16", "int16"),
    (NormKind.LAYERNORM, 120, "int16", None, "int8", None),
    (NormKind.LAYERNORM, 600, "uint16", None, "int16", None),
    (NormKind.RMSNORM, 384, "uint16", None, "uint16", None),
    (NormKind.RMSNORM, 24, "int12 E", "int8", "int16", "uint8"),
    (NormKind.LAYERNORM, 48, "int20", None, "int8", None),
    (NormKind.LAYERNORM, 96, "int8 S", None, "int8", None),
]
EVERY_WIDE = pytest.mark.parametrize(("kind", "n", "input", "residual", "output", "total"), WIDE)
EVERY = pytest.mark.parametrize(("kind", "n", "input", "output", "exponents"), CASES)


@functools.cache
def spec_of(kind: NormKind, n: int, input: str = "int8", output: str = "int8", exponents: int = 0) -> fxp.LayerNormSpec:
    params, other = params_of(input, exponents=exponents_of(n, exponents) if exponents else None), params_of(output)
    if exponents in (3, 5):
        rng = np.random.default_rng(n)
        zeros = rng.integers(params.lo, params.hi, n, endpoint=True)
        params = dataclasses.replace(params, zero_point=tuple(zeros.tolist()))
        zeros, steps = rng.integers(other.lo, other.hi, n, endpoint=True), other.scale * np.exp(rng.standard_normal(n))
        other = fxp.QuantParams(output, steps.max(), tuple(zeros.tolist()), channel_scales=tuple(steps.tolist()))
    return fxp.plan(layer_of(kind, n), params, other, hardware="carried24")


@functools.cache
def wide_spec_of(
    kind: NormKind, n: int, input: str, residual: str | None, output: str, total: str | None
) -> fxp.LayerNormSpec:
    rng = np.random.default_rng(n)

    def side(name: str, reach: float) -> fxp.QuantParams:
        dtype, _, channels = name.partition(" ")
        params = params_of(dtype, reach)
        if channels == "E":
            zeros = rng.integers(params.lo, params.hi, n, endpoint=True)
            return fxp.QuantParams(dtype, params.scale / 8, zeros, exponents=exponents_of(n, 6))
        if channels == "S":
            steps = params.scale * np.exp(-rng.random(n))
            return fxp.QuantParams(dtype, steps.max(), params.zero_point, channel_scales=steps)
        return params

    added = None if residual is None else side(residual, 5.0)
    sums = None if total is None else side(total, 9.0)
    return fxp.plan(
        layer_of(kind, n), side(input, 8.0), side(output, 8.0), residual=added, sum_output=sums, hardware="carried24"
    )


def rows_of(spec: fxp.LayerNormSpec) -> npt.NDArray[Any]:
    n = spec.n
    return np.concatenate([adversarial(spec.input, n), noise(spec.input, n, 4), typical(spec.input, n, 4)])


@functools.cache
def example(spec: fxp.LayerNormSpec) -> tuple[dict[str, npt.NDArray[Any]], list[npt.NDArray[Any]]]:
    """Return rows of each operand, those of a second one at the same ends and at opposite ones, and their codes."""
    operands = [rows_of(spec)] if spec.residual is None else specs.rows_of(spec, budget=8 * spec.n)
    feed = dict(zip(("q", "residual"), operands, strict=False))
    return feed, codes_of(spec, feed)


def codes_of(spec: fxp.LayerNormSpec, feed: dict[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    if spec.sum_output is None:
        return [reference.run(spec, *feed.values())]
    return [codes for codes in reference.run_with_sum(spec, *feed.values()) if codes is not None]


def magnitudes_and_codes(spec: fxp.LayerNormSpec, word: str) -> None:
    """Assert what no value reaches, with every value between the codes as an output and nothing optimized away."""
    model, (feed, outputs) = to_onnx(spec, word=word), example(spec)
    exposed_values = every_value(model, feed)
    values = list(exposed_values.values())
    if word == "float24":
        nothing_is_rounded(model, feed, exposed_values)
    for value, codes in zip(values, outputs, strict=False):
        assert value.dtype == codes.dtype
        np.testing.assert_array_equal(value, codes)
    assert len(values) == len(model.graph.node)
    # tables are looked up by integers; the axes of ReduceSum are int64
    carried = ["int32", "bool"] if word == "int24" else ["float32", "int32", "bool", "int64"]
    for name, value in exposed_values.items():
        assert value.dtype.name in (*carried, *(codes.dtype.name for codes in outputs)), name
        assert np.abs(value.astype(np.float64)).max() < LIMIT, name


def every_value(model: onnx.ModelProto, feed: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Return every value of a graph, the outputs first, with nothing optimized away."""
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(value for value in model.graph.value_info if value.name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in model.graph.output], session.run(None, feed), strict=True))


def nothing_is_rounded(
    model: onnx.ModelProto, feed: dict[str, npt.NDArray[Any]], values: dict[str, npt.NDArray[Any]]
) -> None:
    """Assert that a graph in float32 gives the values that it gives in float64.

    But for quotients, and products with constants that are no powers of two: those with 1/n are made whole, and those
    with G, and their sums with B, are clamped where they are rounded.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.value_info[:]
    rounded = set[str]()
    constants = dict[str, npt.NDArray[Any]]()
    for node in wide.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant":
                constants[node.output[0]] = array = onnx.numpy_helper.to_array(attribute.t)
                if array.dtype == np.float32:
                    attribute.t.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float64)))
            elif node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
        factors = [np.frexp(constants[name])[0] for name in node.input if name in constants]
        scales = node.op_type == "Mul" and any((np.abs(part) != 0.5).any() for part in factors)
        shifts = node.op_type in ("Add", "Round") and rounded.intersection(node.input)
        if node.op_type == "Div" or scales or shifts:
            rounded.update(node.output)
    exact = every_value(wide, feed)
    for name in values.keys() - rounded:
        np.testing.assert_array_equal(values[name], exact[name].astype(np.float64), err_msg=name)


@EVERY
@WORDS
@CONSUMERS
def test_words_give_the_reference_codes(
    run: Run, word: str, kind: NormKind, n: int, input: str, output: str, exponents: int
) -> None:
    spec = spec_of(kind, n, input, output, exponents)
    feed, (wanted,) = example(spec)
    for form in ("inline", "function"):
        (y,) = run(to_onnx(spec, word=word, form=form), feed)
        assert y.dtype == wanted.dtype
        np.testing.assert_array_equal(y, wanted)


@EVERY
@WORDS
def test_no_value_reaches_2_to_24(word: str, kind: NormKind, n: int, input: str, output: str, exponents: int) -> None:
    spec = spec_of(kind, n, input, output, exponents)
    magnitudes_and_codes(spec, word)


@EVERY_WIDE
@WORDS
def test_wide_codes_and_sums_stay_below_2_to_24_in_parts(
    word: str, kind: NormKind, n: int, input: str, residual: str | None, output: str, total: str | None
) -> None:
    magnitudes_and_codes(wide_spec_of(kind, n, input, residual, output, total), word)


@pytest.mark.parametrize(("word", "form"), [("int24", "inline"), ("float24", "function")])
@CONSUMERS
def test_wide_codes_and_sums_in_either_form(run: Run, word: str, form: str) -> None:
    for case in ((NormKind.RMSNORM, 64, "int16", "uint8", "uint16", "int8"), WIDE[4]):
        spec = wide_spec_of(*case)
        feed, codes = example(spec)
        results = run(to_onnx(spec, word=word, form=form), feed)
        for found, wanted in zip(results, codes, strict=True):
            np.testing.assert_array_equal(found, wanted)


@WORDS
def test_an_input_stage_takes_tensors_of_any_rank(word: str) -> None:
    layer, side = fxp.LayerNorm((4, 6)), params_of("int8")
    spec = fxp.plan(layer, side, side, residual=side, sum_output=params_of("int8", 9.0), hardware="carried24")
    for leading in ([], [2, 3]):
        rng = np.random.default_rng(0)
        feed = {name: rng.integers(-128, 128, (*leading, 4, 6)).astype(np.int8) for name in ("q", "residual")}
        model = to_onnx(spec, word=word, leading=leading, io="int32")
        results = run_onnxruntime(model, {name: codes.astype(np.int32) for name, codes in feed.items()})
        for found, wanted in zip(results, codes_of(spec, feed), strict=True):
            np.testing.assert_array_equal(found, wanted)


@WORDS
@pytest.mark.parametrize(("kind", "residual"), [(NormKind.LAYERNORM, None), (NormKind.RMSNORM, "int8")])
@pytest.mark.parametrize("eps", [1e-9, 0.03, 2.0, 1e6])
def test_eps_outside_the_root(eps: float, kind: NormKind, residual: str | None, word: str) -> None:
    """Far below the deviations that rows have, within and far above them: l is 37, 13, 7 and -12, or 6 less."""
    layer = layer_of(kind, 64, eps=eps)
    layer.eps_outside = True
    side = params_of("int8")
    added = None if residual is None else params_of(residual, 5.0)
    spec = fxp.plan(layer, side, side, residual=added, hardware="carried24")
    assert spec.A > 0
    magnitudes_and_codes(spec, word)


@WORDS
@pytest.mark.parametrize("kind", NormKind)
def test_rows_of_equal_integers_with_large_exponents(kind: NormKind, word: str) -> None:
    """V0 is 0 in a row whose squares are one sum of weight 4**9: nothing else keeps V positive."""
    layer = fxp.LayerNorm(8, eps=0.0) if kind is NormKind.LAYERNORM else fxp.RMSNorm(8, eps=0.0)
    spec = fxp.plan(layer, params_of("int8", exponents=[9] * 8), params_of("int8"), hardware="carried24")
    assert spec.E == 0
    magnitudes_and_codes(spec, word)


@WORDS
@pytest.mark.parametrize("n", [384, 512])
def test_groups_of_squares_that_just_fit(word: str, n: int) -> None:
    exponents = np.minimum(np.random.default_rng(3).geometric(0.6, n) - 1, 4)
    zeros = (-128, *[0] * (n - 1))
    spec = fxp.plan(
        layer_of(NormKind.LAYERNORM, n), fxp.QuantParams("int8", 0.05, zeros, exponents), params_of("int8"),
        hardware="carried24",
    )  # fmt: skip
    magnitudes_and_codes(spec, word)


@WORDS
@CONSUMERS
def test_one_product_with_channels_that_saturate(run: Run, word: str) -> None:
    """Gains of 0, of the largest size, and offsets beyond the output's codes to either side."""
    layer = fxp.LayerNorm(8)
    layer.weight = np.array([0.0, 0.0, 0.0, 1.0, -1.0, 0.25, -0.25, 1e-3])
    layer.bias = np.array([50.0, -50.0, 0.1, 7.9, -7.9, 9.0, 9.0, -9.0])
    spec = fxp.plan(layer, params_of("int8"), params_of("int8"), hardware="carried24")
    q = rows_of(spec)
    model = to_onnx(spec, word=word)
    np.testing.assert_array_equal(run(model, {"q": q})[0], reference.run(spec, q))


@WORDS
def test_one_product_is_taken_where_the_bound_allows_it(word: str) -> None:
    """The specs with a coarser G have fewer full-size nodes; a tighter bound costs them."""
    layer = layer_of(NormKind.LAYERNORM, 64)
    sides = params_of("int8"), params_of("int8")
    coarse = fxp.plan(layer, *sides, hardware="carried24")
    fine = fxp.plan(layer, *sides, hardware="carried24", max_excess=0.03)
    assert fine.excess <= 0.03 < coarse.excess <= 1 / 8
    nodes = [len(to_onnx(spec, word=word).graph.node) for spec in (coarse, fine)]
    assert nodes[0] < nodes[1]


@WORDS
def test_a_part_times_n_that_just_fits(word: str) -> None:
    """As in a sentence transformer, with the one outlier channel and most others' exponents: V has 60 bits."""
    n, rng = 384, np.random.default_rng(0)
    exponents = np.repeat(np.arange(8), [0, 0, 2, 363, 17, 1, 0, 1])
    zeros = rng.integers(-124, 67, n)
    zeros[:2] = -124, 66
    params = fxp.QuantParams("int8", 0.002, zeros, exponents=rng.permutation(exponents))
    spec = fxp.plan(layer_of(NormKind.LAYERNORM, n), params, params_of("int8"), hardware="carried24")
    q = rows_of(spec)
    np.testing.assert_array_equal(run_onnxruntime(to_onnx(spec, word=word), {"q": q})[0], reference.run(spec, q))


@pytest.mark.parametrize("n", [64, 768, 1900])
@WORDS
def test_root_and_reciprocal_from_every_sum_of_squares(word: str, n: int) -> None:
    spec = spec_of(NormKind.RMSNORM, n)
    tape = Tape()
    dtype = FLOAT if word == "float24" else INT32
    writer = Writer(tape, subgraph.attributes(spec), inline=True)
    root = Root(Bounded(spec, dtype, writer))
    most = spec.row_stage.codes.v0_max // n
    parts = [ir.Value(name=name, shape=ir.Shape(["rows", 1]), type=ir.TensorType(dtype)) for name in ("upper", "lower")]
    terms = [(Number(parts[1], 0, (1 << 12) - 1), 0), (Number(parts[0], 0, most >> 12), 12)]
    R = root.reciprocal(Squares(terms, most), None)
    outputs = [writer.value(value) for value in (root.stages["r"], R.top.value)]
    for value, name in zip(outputs, ("r", "R"), strict=True):
        value.name, value.type = name, ir.TensorType(dtype)
    graph = ir.Graph(parts, outputs, nodes=tape.nodes, opset_imports={"": 17}, name="root")
    rng = np.random.default_rng(n)
    powers = [(1 << k) + d for k in range(25) for d in (-1, 0, 1)]
    # the roots' own steps
    roots = [((k << 4) ** 2 - spec.E) // (n * 4**spec.h) + d for k in range(1, 1 << 14, 7) for d in (0, 1)]
    Q = np.array([*powers, *roots, *rng.integers(1, most, 4000), *range(1, 2000)])
    Q = np.unique(Q[(Q > 0) & (most >= Q)])[:, None]
    feed = {"upper": (Q >> 12).astype(dtype.numpy()), "lower": (Q & 0xFFF).astype(dtype.numpy())}
    found = run_onnxruntime(ir.to_proto(ir.Model(graph, ir_version=8)), feed)
    V = ((n * Q << 2 * spec.h) + spec.E).ravel().tolist()
    wanted = [reference.reciprocal_root(v, n=n, m=spec.m, x=spec.K + spec.h, cut=None) for v in V]
    np.testing.assert_array_equal(np.hstack(found), wanted)


@WORDS
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lane": 64}, "lane has 64 bits, not 24 or 32; its root has 31 bits, not 18"),
        ({"lane": 32}, "root has 24 bits, not 18"),
        ({"input": params_of("int32"), "lane": 32}, "root has 24 bits, not 18; its input has 32 bits, not up to 24"),
    ],
)
def test_spec_of_another_kind_is_refused(word: str, options: dict[str, Any], words: str) -> None:
    side = params_of("int8")
    layer = layer_of(NormKind.LAYERNORM, 64)
    spec = fxp.plan(**{"layer": layer, "input": side, "output": side, **options})
    with pytest.raises(ModelError, match=rf"{words}.*The word int64 does; .* carried24"):
        to_onnx(spec, word=word)


@WORDS
def test_spec_that_is_too_wide_is_refused_with_the_figure(word: str) -> None:
    params = params_of("int16", exponents=exponents_of(64, 9))
    spec = fxp.plan(layer_of(NormKind.LAYERNORM, 64), params, params_of("int8"), hardware="carried24")
    with pytest.raises(ModelError, match=r"of the spec .* exponents up to 9 .* would reach 2\^24; the word int64 does"):
        to_onnx(spec, word=word)


def test_specs_of_the_same_nodes_share_one_function() -> None:
    alike = [spec_of(NormKind.LAYERNORM, n) for n in (700, 800)]
    names = [to_onnx(spec, word="int24", form="function").functions[0].name for spec in alike]
    assert names[0] == names[1]
