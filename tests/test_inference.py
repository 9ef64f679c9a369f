"""FxpLayerNorm: any array that NumPy knows, `out`, and the way from floats to floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rows import exponents_of, layer_of, noise, params_of

from fxp_layernorm import CodeTypeError, FxpLayerNorm, InputError, LayerNorm, LayerNormSpec, NormKind, plan, reference

N = 24
Codes = np.ndarray[Any, np.dtype[Any]]


def spec_of(source: str, target: str) -> LayerNormSpec:
    return plan(layer_of(NormKind.LAYERNORM, N), params_of(source), params_of(target))


@pytest.fixture(scope="module", params=["int8", "int16"])
def norm(request: pytest.FixtureRequest) -> FxpLayerNorm:
    """A norm whose input and output have one type, so that it can work in place."""
    return FxpLayerNorm(spec_of(request.param, request.param))


@pytest.fixture
def q(norm: FxpLayerNorm) -> Codes:
    return noise(norm.spec.input, N, 10).reshape(2, 5, N)


def unaligned(q: Codes) -> Codes:
    view: Codes = np.frombuffer(b"\0" + q.tobytes(), dtype=np.uint8)[1:].view(q.dtype).reshape(q.shape)
    return view


def read_only(q: Codes) -> Codes:
    copy = q.copy()
    copy.setflags(write=False)
    return copy


LAYOUTS: dict[str, Callable[[Codes], Any]] = {
    "contiguous": lambda q: q,
    "read-only": read_only,
    "Fortran order": np.asfortranarray,
    "every other channel of a wider array": lambda q: np.repeat(q, 2, axis=-1)[..., ::2],
    "reversed twice": lambda q: np.ascontiguousarray(q[..., ::-1])[..., ::-1],
    "every other row": lambda q: np.repeat(q, 2, axis=0)[::2],
    "unaligned": unaligned,
    "broadcast": lambda q: np.broadcast_to(q[:1, :1], q.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_codes(layout: str, norm: FxpLayerNorm, q: Codes) -> None:
    view = LAYOUTS[layout](q)
    before = view.copy()
    y = norm(view)
    np.testing.assert_array_equal(y, reference.run(norm.spec, view))
    np.testing.assert_array_equal(view, before)
    assert y.shape == q.shape
    assert y.dtype == norm.spec.output.dtype.numpy
    assert y.flags.c_contiguous
    assert y.flags.writeable


@pytest.mark.parametrize("shape", [(N,), (0, N), (3, 0, N), (1, N), (2, 3, N), (2, 1, 1, 5, N)])
def test_any_leading_dimensions(shape: tuple[int, ...], norm: FxpLayerNorm) -> None:
    q = noise(norm.spec.input, N, int(np.prod(shape)) // N).reshape(shape)
    y = norm(q)
    assert y.shape == shape
    np.testing.assert_array_equal(y, reference.run(norm.spec, q))


def test_several_normalized_dimensions_with_exponents() -> None:
    """The channels of a row are its elements in C order."""
    qi, qo = params_of("int8", exponents=exponents_of(6, 3)), params_of("int8", exponents=exponents_of(6, 2))
    layer = layer_of(NormKind.LAYERNORM, 6)
    cube = LayerNorm((2, 3))
    cube.weight, cube.bias = layer.gamma.reshape(2, 3), layer.beta.reshape(2, 3)
    flat, deep = FxpLayerNorm(plan(layer, qi, qo)), FxpLayerNorm(plan(cube, qi, qo))
    x = np.random.default_rng(0).standard_normal((4, 2, 3))
    np.testing.assert_array_equal(deep.quantize(x).reshape(4, 6), flat.quantize(x.reshape(4, 6)))
    np.testing.assert_array_equal(deep(deep.quantize(x)).reshape(4, 6), flat(flat.quantize(x.reshape(4, 6))))
    np.testing.assert_array_equal(deep.forward(x).reshape(4, 6), flat.forward(x.reshape(4, 6)))


def test_a_list_is_no_array_of_the_right_type(norm: FxpLayerNorm) -> None:
    with pytest.raises(CodeTypeError, match=f"codes of type int64 were given; the spec takes {norm.spec.input.dtype}"):
        norm([[0] * N])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64", "float32", "bool", ">i2", "O"])
def test_other_types_are_refused(dtype: str, norm: FxpLayerNorm) -> None:
    """Big-endian codes too: their bytes, read as they lie, would be other numbers."""
    with pytest.raises(CodeTypeError, match=f"codes of type {np.dtype(dtype)} were given; the spec takes"):
        norm(np.zeros((2, N), dtype=dtype))


@pytest.mark.parametrize("shape", [(), (N + 1,), (N, 2), (0,), (0, 0), (2, N // 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...], norm: FxpLayerNorm) -> None:
    codes = np.zeros(shape, dtype=norm.spec.input.dtype.numpy)
    for call in (norm, norm.dequantize, norm.quantize, norm.forward):
        with pytest.raises(
            InputError, match=rf"shape \({', '.join(map(str, shape))},?\) .*last dimensions must be \(24,\)"
        ):
            call(codes)


class TestOut:
    def test_takes_the_result_and_is_returned(self, norm: FxpLayerNorm, q: Codes) -> None:
        out = np.empty_like(norm(q))
        assert norm(q, out=out) is out
        np.testing.assert_array_equal(out, norm(q))

    def test_in_place(self, norm: FxpLayerNorm, q: Codes) -> None:
        expected = norm(q)
        assert norm(q, out=q) is q
        np.testing.assert_array_equal(q, expected)

    def test_in_the_same_bytes_as_another_type(self) -> None:
        norm = FxpLayerNorm(spec_of("int8", "uint8"))
        q = noise(norm.spec.input, N, 5000)
        expected = norm(q)
        np.testing.assert_array_equal(norm(q, out=q.view(np.uint8)), expected)

    def test_in_the_same_bytes_but_wider(self) -> None:
        """A row's output covers the rows after the next, and there are more of them than any buffer holds."""
        norm = FxpLayerNorm(spec_of("int8", "int16"))
        buffer = np.zeros((5000, N), dtype=np.int16)
        q = buffer.view(np.int8).reshape(-1)[: 5000 * N].reshape(5000, N)
        q[...] = noise(norm.spec.input, N, 5000)
        expected = norm(q.copy())
        np.testing.assert_array_equal(norm(q, out=buffer), expected)

    def test_in_place_through_another_view(self, norm: FxpLayerNorm, q: Codes) -> None:
        expected = norm(q)
        norm(q[:], out=q)
        np.testing.assert_array_equal(q, expected)

    @pytest.mark.parametrize("shift", [-N, -7, -1, 1, 7, N])
    def test_overlapping(self, shift: int, norm: FxpLayerNorm, q: Codes) -> None:
        """What a row writes must not reach a row, or a channel, that is still to be read."""
        buffer = np.concatenate([q.ravel(), q.ravel(), q.ravel()])
        source, out = buffer[q.size : 2 * q.size], buffer[q.size + shift : 2 * q.size + shift]
        expected = norm(q)
        norm(source.reshape(q.shape), out=out.reshape(q.shape))
        np.testing.assert_array_equal(out.reshape(q.shape), expected)

    def test_overlapping_in_reverse(self, norm: FxpLayerNorm, q: Codes) -> None:
        expected = norm(q)
        norm(q, out=q[::-1, ::-1, ::-1])
        np.testing.assert_array_equal(q[::-1, ::-1, ::-1], expected)

    def test_not_contiguous(self, norm: FxpLayerNorm, q: Codes) -> None:
        wide = np.zeros((*q.shape[:-1], 2 * N), dtype=q.dtype)
        norm(q, out=wide[..., ::2])
        np.testing.assert_array_equal(wide[..., ::2], norm(q))
        assert not wide[..., 1::2].any()

    def test_unaligned(self, norm: FxpLayerNorm, q: Codes) -> None:
        out = np.zeros(q.nbytes + 1, dtype=np.uint8)[1:].view(q.dtype).reshape(q.shape)
        norm(q, out=out)
        np.testing.assert_array_equal(out, norm(q))

    def test_memory_mapped(self, norm: FxpLayerNorm, q: Codes, tmp_path: Path) -> None:
        out = np.memmap(tmp_path / "out", dtype=q.dtype, mode="w+", shape=q.shape)
        assert norm(q, out=out) is out
        out.flush()
        np.testing.assert_array_equal(np.fromfile(tmp_path / "out", dtype=q.dtype).reshape(q.shape), norm(q))

    def test_no_rows(self, norm: FxpLayerNorm, q: Codes) -> None:
        out = q[:0].copy()
        assert norm(q[:0], out=out) is out

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", ">i2"])
    def test_of_another_type(self, dtype: str, norm: FxpLayerNorm, q: Codes) -> None:
        with pytest.raises(CodeTypeError, match=f"out is of type {dtype}; .* an array of {norm.spec.output.dtype}"):
            norm(q, out=np.zeros(q.shape, dtype=dtype))

    def test_that_is_no_array(self, norm: FxpLayerNorm, q: Codes) -> None:
        with pytest.raises(CodeTypeError, match="out is of type list"):
            norm(q, out=q.tolist())

    @pytest.mark.parametrize("shape", [(), (10, N), (2, 5, N + 1), (1, 5, N), (2, 5, N, 1)])
    def test_of_another_shape(self, shape: tuple[int, ...], norm: FxpLayerNorm, q: Codes) -> None:
        with pytest.raises(InputError, match=r"out has the shape .*; the codes have \(2, 5, 24\)"):
            norm(q, out=np.zeros(shape, dtype=q.dtype))

    def test_read_only(self, norm: FxpLayerNorm, q: Codes) -> None:
        with pytest.raises(InputError, match="out is read-only"):
            norm(q, out=read_only(q))


@pytest.mark.parametrize(("source", "target"), [("int8", "uint8"), ("uint16", "int16")])
def test_forward_is_quantize_then_the_kernel_then_dequantize(source: str, target: str) -> None:
    norm = FxpLayerNorm(spec_of(source, target))
    x = np.random.default_rng(0).standard_normal((7, N))
    codes = norm.quantize(x)
    np.testing.assert_array_equal(codes, norm.spec.input.quantize(x))
    y = norm.forward(x)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(y, norm.spec.output.dequantize(norm(codes)))
    assert norm.forward(x.astype(np.float32)).shape == x.shape
    assert norm.forward(x[:0]).shape == (0, N)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_refused(value: float, norm: FxpLayerNorm) -> None:
    x = np.zeros((2, N))
    x[1, 3] = value
    for call in (norm.quantize, norm.forward):
        with pytest.raises(InputError, match="1 of 48 values are NaN or infinite"):
            call(x)


def test_dequantize_takes_output_codes_only() -> None:
    norm = FxpLayerNorm(spec_of("int16", "int8"))
    with pytest.raises(CodeTypeError, match="codes of type int16 were given where int8 is expected"):
        norm.dequantize(np.zeros((2, N), dtype=np.int16))
