"""The input stage's operators: the reference's integers, in every consumer that the suite has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.tape import Tape
from onnx_models import run_onnxruntime, run_reference
from rows import layer_of, params_of

import fxp_layernorm as fxp
from fxp_layernorm import LayerNormSpec, NormKind, QuantParams, reference
from fxp_layernorm.export import input_stage

Array = npt.NDArray[Any]
Run = Callable[[onnx.ModelProto, dict[str, Any]], list[Array]]
N = 24


def channels(dtype: str, spread: float = 3.0, zero_point: int = 2) -> QuantParams:
    scales = np.exp(np.random.default_rng(5).uniform(-spread, 0, N)) * 0.1
    return QuantParams(dtype, float(scales.max()), zero_point, channel_scales=scales.tolist())


def exponents(dtype: str, scale: float = 0.05) -> QuantParams:
    return QuantParams(dtype, scale, -3, exponents=np.arange(N) % 9)


#: The operands, the sum, and the lane.
CASES: dict[str, tuple[list[QuantParams], QuantParams | None, int | None]] = {
    "two": ([params_of("int8"), params_of("uint8", 3.0)], None, None),
    "with the sum": ([params_of("int8"), params_of("int8", 5.0)], params_of("int8", 9.0), None),
    "with the sum of 16 bits": ([params_of("int8"), params_of("int16", 5.0)], params_of("int16", 9.0), 64),
    "with a sum finer than u": (
        [params_of("int8"), params_of("int8")], QuantParams("uint16", 1e-9, 7), None
    ),
    "with a coarse sum": ([params_of("int8"), params_of("int8")], QuantParams("int8", 8.0, 1), None),
    "with exponents everywhere": ([exponents("int8"), exponents("int8", 0.02)], exponents("int8", 0.07), None),
    "scales a channel": ([channels("int8")], None, None),
    "scales a channel, and a residual": ([channels("int16"), params_of("uint8")], None, 64),
    "an accumulator": ([QuantParams("int24", 1e-5, 0)], None, None),
    "an accumulator of 32 bits": ([QuantParams("int32", 1e-8, 0)], None, 64),
}  # fmt: skip


def spec_of(case: str, kind: NormKind = NormKind.LAYERNORM) -> LayerNormSpec:
    (first, *others), total, lane = CASES[case]
    return fxp.plan(
        layer_of(kind, N), first, params_of("int8"), residual=others[0] if others else None, sum_output=total, lane=lane
    )


def rows_of(params: QuantParams, seed: int) -> Array:
    ends = np.array([[params.lo], [params.hi], [params.zero_point]]).repeat(N, axis=1)
    rng = np.random.default_rng(seed)
    random = rng.integers(params.lo, params.hi, (40, N), endpoint=True)
    return np.concatenate([rng.permutation(np.concatenate([ends, random]))]).astype(params.dtype.numpy)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("run", [run_onnxruntime, run_reference])
def test_integers_and_codes_of_the_sum_are_the_references(case: str, run: Run) -> None:
    spec = spec_of(case)
    assert spec.adder is not None
    feed = {f"q{index}": rows_of(params, index) for index, params in enumerate(spec.operands)}
    inputs = [
        ir.Value(name=name, shape=ir.Shape(["rows", N]), type=ir.TensorType(ir.DataType.from_numpy(codes.dtype)))
        for name, codes in feed.items()
    ]
    tape = Tape()
    u, w = input_stage.append(tape, spec, inputs)
    outputs = [u] if w is None else [u, w]
    for value, name in zip(outputs, "uw", strict=False):
        value.name, value.type = name, ir.TensorType(ir.DataType.INT32)
    graph = ir.Graph(inputs, outputs, nodes=tape.nodes, opset_imports={"": 17}, name="stage")
    results = run(ir.to_proto(ir.Model(graph, ir_version=8)), feed)
    wanted = [
        reference.row_stages(spec, *(codes[row].tolist() for codes in feed.values())) for row in range(len(feed["q0"]))
    ]
    np.testing.assert_array_equal(results[0], [row.u for row in wanted])
    if w is not None:
        np.testing.assert_array_equal(results[1], [row.w for row in wanted])
        assert len(np.unique(results[1])) > 1
