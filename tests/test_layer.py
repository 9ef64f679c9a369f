"""The float layer: the golden example, torch's signature and shapes, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from naive import hold
from rows import noise, params_of

from fxp_layernorm import FxpLayerNorm, InputError, LayerNorm, NormKind, PlanError, RMSNorm, plan

GOLDEN_INPUT = np.array(
    [
        [1.4415, 0.1733, -1.2644, -2.7267, -0.0138, -0.0792],
        [2.0240, 0.8238, -0.4269, -0.2043, -1.8146, 0.5594],
        [1.2774, -0.7218, 0.3526, 1.6711, 0.0966, 0.4277],
        [0.7997, 0.1011, 0.5100, 0.7205, -0.5538, -0.2981],
    ]
)
GOLDEN = {
    6: [1.4260, 0.4501, -0.6563, -1.7816, 0.3061, 0.2558],
    (4, 6): [1.2579, 0.0510, -1.3174, -2.7092, -0.1271, -0.1894],
}


@pytest.mark.parametrize("shape", GOLDEN)
def test_golden_example(shape: int | tuple[int, ...]) -> None:
    """To 2e-4, as the input is rounded to 1e-4."""
    y = LayerNorm(shape)(GOLDEN_INPUT)
    assert y.shape == GOLDEN_INPUT.shape
    np.testing.assert_allclose(y[0], GOLDEN[shape], rtol=0, atol=2e-4)


@pytest.mark.parametrize("shape", GOLDEN)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_golden_example_through_the_integers(dtype: str, shape: int | tuple[int, ...]) -> None:
    """Within the proved bound of the ideal of the same codes, and so of the float layer's output for their values."""
    layer = LayerNorm(shape)
    spec = plan(layer, params_of(dtype, 3.0), params_of(dtype, 3.0))
    norm = FxpLayerNorm(spec)
    codes = norm.quantize(GOLDEN_INPUT).reshape(-1, *spec.normalized_shape)
    hold(spec, codes)
    real = (codes.astype(np.float64) - spec.input.zero_point) * spec.input.scale
    expected = layer(real).reshape(GOLDEN_INPUT.shape)
    atol = (0.5 + spec.excess) * spec.output.scale
    np.testing.assert_allclose(
        norm.forward(GOLDEN_INPUT), expected, rtol=2 * 2.0**-24, atol=atol
    )  # float32: 2 roundings


@pytest.mark.parametrize(
    ("shape", "expected"),
    [(6, (6,)), (np.int64(6), (6,)), ([4, 6], (4, 6)), ((4, 6), (4, 6)), ((2, 3, 4), (2, 3, 4)), (1, (1,))],
)
def test_shapes_and_defaults_are_those_of_torch(shape: Any, expected: tuple[int, ...]) -> None:
    layer = LayerNorm(shape)
    assert layer.normalized_shape == expected
    assert layer.n == math.prod(expected)
    assert layer.eps == 1e-5
    np.testing.assert_array_equal(layer.weight, np.ones(expected))
    np.testing.assert_array_equal(layer.bias, np.zeros(expected))


@pytest.mark.parametrize(
    ("layer", "weight", "bias"),
    [
        (LayerNorm(6, bias=False), True, False),
        (LayerNorm(6, elementwise_affine=False), False, False),
        (LayerNorm(6, elementwise_affine=False, bias=True), False, False),
        (LayerNorm(6), True, True),
    ],
)
def test_parameters_that_are_left_out_count_as_ones_and_zeros(layer: LayerNorm, weight: bool, bias: bool) -> None:
    assert (layer.weight is not None, layer.bias is not None) == (weight, bias)
    np.testing.assert_array_equal(layer.gamma, np.ones(6))
    np.testing.assert_array_equal(layer.beta, np.zeros(6))


def test_rms_norm_takes_the_machine_epsilon_where_eps_is_none() -> None:
    assert RMSNorm(6).eps == RMSNorm(6, None).eps == float(np.finfo(np.float32).eps)
    assert RMSNorm(6, 1e-3).eps == 1e-3
    assert RMSNorm(6, elementwise_affine=False).weight is None


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1,)])
def test_any_leading_dimensions(
    make: Callable[[tuple[int, ...]], LayerNorm | RMSNorm], leading: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    """Each row by itself, by the definition."""
    layer = make(shape)
    layer.weight = np.arange(1.0, layer.n + 1).reshape(shape)
    x = np.random.default_rng(0).standard_normal((*leading, *shape))
    y = layer(x)
    assert y.shape == x.shape
    for row, result in zip(x.reshape(-1, layer.n), y.reshape(-1, layer.n), strict=True):
        centred = row - row.mean() if make is LayerNorm else row
        expected = centred / math.sqrt(np.mean(centred**2) + layer.eps) * layer.gamma
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4", ">f8"])
def test_the_float_type_and_the_byte_order_are_kept(dtype: Any) -> None:
    x = np.arange(12.0).reshape(2, 6)
    y = LayerNorm(6)(x.astype(dtype))
    assert y.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(y.astype(np.float64), LayerNorm(6)(x).astype(dtype).astype(np.float64))


def test_float32_input_is_normalized_in_double() -> None:
    """A huge mean over a tiny spread, exact in float32, where float32 sums would lose the spread."""
    x = np.float32(2.0**20) + np.arange(6, dtype=np.float32) / 8
    expected = LayerNorm(6)(np.arange(6, dtype=np.float64) / 8)
    np.testing.assert_array_equal(LayerNorm(6)(x), expected.astype(np.float32))


def test_integers_and_lists_count_as_float64() -> None:
    expected = LayerNorm(3)(np.array([1.0, 2.0, 4.0]))
    for x in ([1, 2, 4], np.array([1, 2, 4], dtype=np.uint8), (1.0, 2.0, 4.0)):
        y = LayerNorm(3)(x)
        assert y.dtype == np.float64
        np.testing.assert_array_equal(y, expected)


def test_views_and_read_only_arrays_are_normalized_in_place_of_their_copies() -> None:
    base = np.random.default_rng(0).standard_normal((6, 8))
    base.setflags(write=False)
    for x in (base.T, base[:, ::-1][:, :6], base[::2, 1:7]):
        np.testing.assert_array_equal(LayerNorm(6)(x), LayerNorm(6)(x.copy()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"normalized_shape": ()}, r"normalized_shape is \(\).*positive integers"),
        ({"normalized_shape": 0}, "normalized_shape is 0"),
        ({"normalized_shape": [4, -6]}, r"normalized_shape is \[4, -6\]"),
        ({"normalized_shape": [2.5]}, r"normalized_shape is \[2.5\]"),
        ({"normalized_shape": 6, "eps": -1e-9}, "eps is -1e-09.*not negative"),
        ({"normalized_shape": 6, "eps": math.nan}, "eps is nan.*finite"),
        ({"normalized_shape": 6, "eps": math.inf}, "eps is inf.*finite"),
    ],
)
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_bad_arguments(make: Callable[..., Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make(**arguments)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.float64(3.0), r"shape \(\).*last dimensions must be \(4, 6\)"),
        (np.zeros(6), r"shape \(6,\).*\(4, 6\)"),
        (np.zeros((6, 4)), r"shape \(6, 4\)"),
        (np.zeros((2, 24)), r"shape \(2, 24\)"),
        (np.zeros((4, 6), dtype=complex), "real values.*complex128"),
        (np.full((4, 6), "1.0"), "real values.*<U3"),
        ([[None] * 6] * 4, "real values.*object"),
    ],
)
def test_bad_input(x: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        LayerNorm((4, 6))(x)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.array([1.0, math.nan, 1.0, math.inf, 1.0, 1.0]), "holds 2 values that are NaN or infinite"),
        (np.ones(5), r"has the shape \(5,\).*normalizes \(6,\)"),
        (np.ones((6, 1)), r"has the shape \(6, 1\)"),
        (np.float64(1.0), r"has the shape \(\)"),
    ],
)
def test_bad_parameters_are_refused_at_use_and_at_planning(name: str, value: Any, words: str) -> None:
    layer = LayerNorm(6)
    setattr(layer, name, value)
    with pytest.raises(InputError, match=f"{name} {words}"):
        layer(np.zeros(6))
    with pytest.raises(InputError, match=f"{name} {words}"):
        plan(layer, params_of("int8"), params_of("int8"))


class FakeTensor:
    """As much of a tensor as `from_torch` touches: what it must not do is import torch."""

    def __init__(self, values: list[float]) -> None:
        self.values = values

    def detach(self) -> FakeTensor:
        return self

    def double(self) -> FakeTensor:
        return self

    def cpu(self) -> FakeTensor:
        return self

    def numpy(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array(self.values)


def test_from_torch_needs_no_torch() -> None:
    module = SimpleNamespace(normalized_shape=(2,), eps=1e-3, weight=FakeTensor([2.0, 3.0]), bias=None)
    layer = LayerNorm.from_torch(module)
    assert (layer.normalized_shape, layer.eps, layer.bias) == ((2,), 1e-3, None)
    np.testing.assert_array_equal(layer.gamma, [2.0, 3.0])


def test_the_kind_of_a_plan_is_that_of_its_layer() -> None:
    qi, qo = params_of("int8"), params_of("int8")
    assert plan(LayerNorm(6), qi, qo).kind is NormKind.LAYERNORM
    assert plan(RMSNorm(6), qi, qo).kind is NormKind.RMSNORM


@pytest.mark.parametrize("shape", [1.5, "a", None, True, (3, 2.5)])
def test_shapes_that_are_no_integers_are_refused(shape: Any) -> None:
    with pytest.raises(InputError, match=r"normalized_shape is .*; it must hold positive integers"):
        LayerNorm(shape)


@pytest.mark.parametrize("eps", ["a", None])
def test_an_eps_that_is_no_number_is_refused(eps: Any) -> None:
    with pytest.raises(InputError, match=r"eps is .*; it must be a number"):
        LayerNorm(4, eps=eps)


def test_from_torch_refuses_modules_of_another_kind() -> None:
    """A LayerNorm taken for an RMSNorm would lose its mean and bias without a word."""
    torch = pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"use LayerNorm\.from_torch"):
        RMSNorm.from_torch(torch.nn.LayerNorm(4))
    for module in (torch.nn.RMSNorm(4), torch.nn.Linear(4, 4), torch.nn.GroupNorm(2, 4)):
        with pytest.raises(InputError, match=r"LayerNorm\.from_torch takes a torch\.nn\.LayerNorm"):
            LayerNorm.from_torch(module)


@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_eps_outside_the_root_is_added_to_the_deviation(make: Callable[..., Any]) -> None:
    x = np.random.default_rng(0).standard_normal((5, 6))
    centred = x - x.mean(axis=1, keepdims=True) if make is LayerNorm else x
    deviation = np.sqrt(np.mean(centred**2, axis=1, keepdims=True))
    np.testing.assert_allclose(make(6, 0.3, eps_outside=True)(x), centred / (deviation + 0.3), rtol=1e-12)


def test_the_unbiased_deviation_is_a_matter_of_weight_and_eps() -> None:
    """As the class says: networks that divide by torch.std plus eps are norms with eps outside."""
    x = np.random.default_rng(0).standard_normal((5, 6))
    factor = math.sqrt(5 / 6)
    layer = LayerNorm(6, 0.3 * factor, eps_outside=True)
    layer.weight = np.full(6, factor)
    expected = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 0.3)
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 1e-5, 1.0, 1e4])
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_eps_outside_through_the_integers(make: Callable[..., Any], eps: float) -> None:
    """From nothing to far above every deviation."""
    spec = plan(make(24, eps, eps_outside=True), params_of("int8", 3.0), params_of("int16", 8.0))
    hold(spec, noise(spec.input, 24, 12))


def test_an_eps_outside_that_leaves_nothing_of_any_row_is_refused() -> None:
    with pytest.raises(PlanError, match=r"n \* eps is 2\^\S+ in units of the input, far above any deviation"):
        plan(LayerNorm(8, 1e300, eps_outside=True), params_of("int8"), params_of("int8"))
    with pytest.raises(PlanError, match=r"no bits left .* n \* eps of 2\^\S+ outside the root"):
        plan(LayerNorm(8, 1e10, eps_outside=True), params_of("int8"), params_of("int8"), lane=24)
