"""The integer subgraph by itself: exact in every consumer that the suite has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_ir.tape import Tape
from onnx_models import run_onnxruntime, run_reference
from rows import DTYPES, adversarial, exponents_of, layer_of, noise, params_of, typical

import fxp_layernorm as fxp
from fxp_layernorm import DType, ModelError, NormKind, reference
from fxp_layernorm.export import int64, subgraph, to_onnx
from fxp_layernorm.export.graph import Writer

CONSUMERS = pytest.mark.parametrize("run", [run_onnxruntime, run_reference])
FORMS = pytest.mark.parametrize("form", ["inline", "function"])
Run = Callable[..., list[npt.NDArray[Any]]]

#: kind, n, input, output, largest exponent, lane
CASES = [
    (NormKind.LAYERNORM, 1, "int8", "int8", 0, None),
    (NormKind.LAYERNORM, 2, "uint8", "int8", 0, None),
    (NormKind.LAYERNORM, 64, "int8", "int8", 0, 24),
    (NormKind.LAYERNORM, 120, "uint8", "int16", 3, 64),
    (NormKind.LAYERNORM, 384, "int8", "uint8", 7, 32),
    (NormKind.LAYERNORM, 384, "int16", "uint16", 7, 64),
    (NormKind.LAYERNORM, 768, "uint16", "int8", 0, 32),
    (NormKind.LAYERNORM, 1000, "int16", "int16", 0, 64),
    (NormKind.RMSNORM, 96, "uint8", "int8", 0, 24),
    (NormKind.RMSNORM, 384, "int8", "int8", 7, 32),
    (NormKind.RMSNORM, 384, "int16", "int16", 0, 64),
]


def spec_of(
    kind: NormKind, n: int, input: str, output: str, exponents: int, lane: int | None, *, shape: tuple[int, ...] = ()
) -> fxp.LayerNormSpec:
    layer = layer_of(kind, n)
    layer.normalized_shape = shape or layer.normalized_shape
    layer.axes = tuple(range(-len(layer.normalized_shape), 0))
    layer.weight = np.reshape(layer.gamma.reshape(-1), layer.normalized_shape) if not shape else None
    if shape and isinstance(layer, fxp.LayerNorm):
        layer.bias = None
    chosen = exponents_of(n, exponents) if exponents else None
    return fxp.plan(layer, params_of(input, exponents=chosen), params_of(output), lane=lane)


@pytest.mark.parametrize(("kind", "n", "input", "output", "exponents", "lane"), CASES)
@CONSUMERS
@FORMS
def test_graph_gives_the_reference_codes(
    run: Run, form: str, kind: NormKind, n: int, input: str, output: str, exponents: int, lane: int | None
) -> None:
    spec = spec_of(kind, n, input, output, exponents, lane)
    q = np.concatenate([adversarial(spec.input, n), noise(spec.input, n, 4)])
    (y,) = run(to_onnx(spec, form=form), {"q": q})
    assert y.dtype == spec.output.dtype.numpy
    np.testing.assert_array_equal(y, reference.run(spec, q))


#: kind, n, input, output, hardware: specs whose codes a QuantizeLinear gives
REQUANTIZED = pytest.mark.parametrize(
    ("kind", "n", "input", "output", "hardware"),
    [
        (NormKind.LAYERNORM, 5, "uint8", "int8", "carried24"),
        (NormKind.LAYERNORM, 64, "int8", "uint8", "carried24"),
        (NormKind.LAYERNORM, 768, "int8", "int8", "carried24"),
        (NormKind.LAYERNORM, 1500, "int8", "int8", fxp.Hardware(lanes=(24,), unclamped=23)),
        (NormKind.RMSNORM, 96, "int8", "uint8", "carried24"),
    ],
)


@REQUANTIZED
@CONSUMERS
@FORMS
def test_requantized_codes_are_the_reference_codes(
    run: Run, form: str, kind: NormKind, n: int, input: str, output: str, hardware: fxp.Hardware | str
) -> None:
    spec = fxp.plan(layer_of(kind, n), params_of(input), params_of(output), hardware=hardware)
    q = np.concatenate([adversarial(spec.input, n), noise(spec.input, n, 4), typical(spec.input, n, 50)])
    model = to_onnx(spec, form=form)
    nodes = model.functions[0].node if form == "function" else model.graph.node
    assert nodes[-1].op_type == "QuantizeLinear"
    (y,) = run(model, {"q": q})
    assert y.dtype == spec.output.dtype.numpy
    np.testing.assert_array_equal(y, reference.run(spec, q))
    # narrower ends of the codes, or codes carried in another type, have no QuantizeLinear
    narrow = dataclasses.replace(spec.output, narrow_range=True) if spec.output.dtype.signed else None
    assert narrow is None or "QuantizeLinear" not in operators(dataclasses.replace(spec, output=narrow))
    assert "QuantizeLinear" not in operators(spec, io="int32")


def operators(spec: fxp.LayerNormSpec, **options: Any) -> set[str]:
    return {node.op_type for node in to_onnx(spec, form="inline", **options).graph.node}


@REQUANTIZED
def test_no_int32_wraps_where_compilers_have_no_rule_for_it(
    kind: NormKind, n: int, input: str, output: str, hardware: fxp.Hardware | str
) -> None:
    spec = fxp.plan(layer_of(kind, n), params_of(input), params_of(output), hardware=hardware)
    model = to_onnx(spec)
    q = np.concatenate([adversarial(spec.input, n), noise(spec.input, n, 4)])
    names = [node.output[0] for node in model.graph.node]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    values = dict(zip(names, run_reference(model, {"q": q}), strict=True))
    exact = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "MatMul": np.matmul}
    checked = 0
    for node in model.graph.node:
        value = values[node.output[0]]
        if value.dtype == np.int32 and node.op_type in exact:
            operands = [values[name].astype(np.int64) for name in node.input]
            np.testing.assert_array_equal(value, exact[node.op_type](*operands))
            checked += 1
    assert checked >= 6


@FORMS
def test_opset_12(form: str) -> None:
    """Unsqueeze has its axes as an attribute there, and is not used."""
    spec = spec_of(NormKind.LAYERNORM, 64, "int8", "int8", 3, None)
    q = noise(spec.input, 64, 10)
    (y,) = run_onnxruntime(to_onnx(spec, form=form, opset=12), {"q": q})
    np.testing.assert_array_equal(y, reference.run(spec, q))


@CONSUMERS
@FORMS
def test_several_axes_and_leading_dimensions(run: Run, form: str) -> None:
    spec = spec_of(NormKind.LAYERNORM, 24, "int8", "int8", 0, None, shape=(4, 6))
    q = noise(spec.input, 24, 10).reshape(2, 5, 4, 6)
    (y,) = run(to_onnx(spec, form=form, leading=("batch", 5)), {"q": q})
    np.testing.assert_array_equal(y, reference.run(spec, q))


#: n, types, lane and limits of specs that are not the plain ones, and eps, which is large against some rows' deviation
ODD = [
    {"eps": 0.05, "eps_outside": True},
    {"eps": 1e-9, "eps_outside": True},
    {"eps": 30.0, "eps_outside": True, "input": "int16", "output": "int16"},
    {"eps": 1e-3, "eps_outside": True, "kind": NormKind.RMSNORM},
    {"hardware": "mac16x16-40"},
    {"hardware": fxp.Hardware(accumulator=60, lanes=(24,)), "output": "int16"},
    {"output": "uint4"},
    {"input": "int12", "output": "uint12"},
]


@pytest.mark.parametrize("odd", ODD)
@CONSUMERS
@FORMS
def test_specs_that_are_not_plain(run: Run, form: str, odd: dict[str, Any]) -> None:
    kind, n = odd.get("kind", NormKind.LAYERNORM), 96
    layer = layer_of(kind, n, eps=odd.get("eps", 1e-5))
    layer.eps_outside = "eps_outside" in odd
    spec = fxp.plan(
        layer, params_of(odd.get("input", "int8")), params_of(odd.get("output", "int8")), hardware=odd.get("hardware")
    )
    q = np.concatenate([adversarial(spec.input, n), noise(spec.input, n, 4)])
    (y,) = run(to_onnx(spec, form=form), {"q": q})
    np.testing.assert_array_equal(y, reference.run(spec, q))


@FORMS
@pytest.mark.parametrize("word", ["int64", "int24", "float24"])
def test_axes_that_are_not_the_last(word: str, form: str) -> None:
    layer = fxp.LayerNorm((3, 8), axes=(-4, -2))
    spec = fxp.plan(layer, params_of("int8"), params_of("int8"), hardware="carried24")
    q = noise(spec.input, 24, 10).reshape(2, 3, 5, 8, 1)
    (y,) = run_onnxruntime(to_onnx(spec, word, form, leading=("batch", "x", 1)), {"q": q})
    np.testing.assert_array_equal(y, reference.run(spec, q))


@FORMS
@pytest.mark.parametrize("word", ["int64", "int24", "float24"])
@pytest.mark.parametrize("output", ["int8", "uint8", "int16"])
def test_codes_in_int32(word: str, form: str, output: str) -> None:
    spec = fxp.plan(layer_of(NormKind.LAYERNORM, 64), params_of("int8"), params_of(output), hardware="carried24")
    q = noise(spec.input, 64, 10)
    (y,) = run_onnxruntime(to_onnx(spec, word, form, io="int32", opset=13), {"q": q.astype(np.int32)})
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y, reference.run(spec, q))


@FORMS
@pytest.mark.parametrize("leading", [(0,), (2, 0), ()])
@pytest.mark.parametrize("shape", [(24,), (4, 6)])
def test_no_rows_and_no_leading_dimension(form: str, shape: tuple[int, ...], leading: tuple[int, ...]) -> None:
    """In ONNX Runtime; ONNX's reference of onnx 1.21 loses the shape of a Gather without rows."""
    spec = spec_of(NormKind.LAYERNORM, 24, "int8", "int8", 0, None, shape=shape)
    q = noise(spec.input, 24, int(np.prod(leading))).reshape(*leading, *shape)
    names = [f"d{index}" for index in range(len(leading))]
    (y,) = run_onnxruntime(to_onnx(spec, form=form, leading=names), {"q": q})
    np.testing.assert_array_equal(y, reference.run(spec, q))


def test_all_specs_of_a_layout_share_one_function() -> None:
    specs = [spec_of(NormKind.LAYERNORM, n, input, output, 0, lane) for n, input, output, lane in (
        (64, "int8", "int8", 32), (384, "uint8", "int8", 32), (768, "int8", "int8", 32),
    )]  # fmt: skip
    functions = [to_onnx(spec, form="function").functions[0] for spec in specs]
    assert all(f.SerializeToString() == functions[0].SerializeToString() for f in functions)
    assert functions[0].domain == "fxp_layernorm"


def test_function_node_holds_the_whole_spec() -> None:
    spec = spec_of(NormKind.LAYERNORM, 384, "int8", "uint8", 7, 32)
    model = to_onnx(spec, form="function")
    (node,) = model.graph.node
    held = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert held["n"] == 384
    integers = ("h", "E", "m", "K", "s1", "s2")
    assert {name: held[name] for name in integers} == {name: getattr(spec, name) for name in integers}
    channels = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert channels["G"].tolist() == list(spec.G)
    assert channels["B"].tolist() == list(spec.B)
    assert channels["P"].tolist() == [1 << e for e in spec.input.channel_exponents(384)]


def boundaries() -> list[int]:
    powers = {(1 << k) + d for k in range(63) for d in range(-2, 3)}
    roots = {r * r + d for k in range(1, 32) for r in ((1 << k) - 1, (1 << k), (1 << k) + 1) for d in range(-2, 3)}
    seeds = {(i << s) + d for i in range(256, 1024, 7) for s in (8, 26, 52) for d in (-1, 0)}
    return sorted(v for v in powers | roots | seeds if 0 < v < 1 << 62)


@pytest.mark.parametrize("lane", [24, 32, 64])
@CONSUMERS
def test_root_and_reciprocal_at_every_boundary(run: Run, lane: int) -> None:
    dtypes = ("int16", "int16") if lane == 64 else ("int8", "int8")
    spec = dataclasses.replace(spec_of(NormKind.LAYERNORM, 768, *dtypes, 0, lane), h=0, E=0)  # no variance is too small
    tape = Tape()
    body = int64.Body(spec, Writer(tape, subgraph.attributes(spec), inline=True), ir.DataType.INT8, 17)
    body.fours = 0, 31  # these V are not those of the spec's codes
    V = ir.Value(name="V", shape=ir.Shape(["rows", 1]), type=ir.TensorType(ir.DataType.INT64))
    r, R = map(body.writer.value, body.reciprocal_root(V, {}))
    r.name, R.name = "r", "R"
    for value in (r, R):
        value.type = ir.TensorType(ir.DataType.INT64)
    graph = ir.Graph([V], [r, R], nodes=tape.nodes, opset_imports={"": 17}, name="root")
    # R has its proved width where V is at least that of the smallest variance
    values = [value for value in boundaries() if value >= spec.row_stage.codes.v0_min << 2 * spec.h]
    found = run(ir.to_proto(ir.Model(graph, ir_version=8)), {"V": np.array(values)[:, None]})
    cut = fxp.proof.reciprocal_bits(spec.n) if lane == 64 else None
    wanted = [reference.reciprocal_root(v, n=spec.n, m=spec.m, x=spec.K + spec.h, cut=cut) for v in values]
    assert len(values) > 300
    np.testing.assert_array_equal(np.hstack(found), wanted)


def test_word_that_cannot_hold_the_spec_is_refused() -> None:
    spec = spec_of(NormKind.LAYERNORM, 8, "int8", "int8", 0, 24)
    with pytest.raises(ModelError, match="at least 16 bits"):
        to_onnx(dataclasses.replace(spec, m=12))


@pytest.mark.parametrize(
    ("option", "match"),
    [({"word": "int25"}, "int64"), ({"form": "nodes"}, "function, inline"), ({"io": "int8"}, "it can be int32")],
)
def test_unknown_word_or_form(option: dict[str, str], match: str) -> None:
    spec = spec_of(NormKind.LAYERNORM, 8, "int8", "int8", 0, 24)
    with pytest.raises(ModelError, match=match):
        to_onnx(spec, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
def test_exported_model_is_valid_and_typed(dtype: DType) -> None:
    model = to_onnx(spec_of(NormKind.LAYERNORM, 32, dtype, dtype, 0, None))
    onnx.checker.check_model(model, full_check=True)
    (output,) = model.graph.output
    assert output.type.tensor_type.elem_type == onnx.helper.np_dtype_to_tensor_dtype(dtype.numpy)
