"""Norms over other axes than the last: the same rows, found elsewhere in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import exponents_of, layer_of, noise, params_of

from fxp_layernorm import FxpLayerNorm, InputError, LayerNorm, LayerNormSpec, NormKind, RMSNorm, plan, reference

Array = np.ndarray[Any, np.dtype[Any]]

#: normalized shape, axes, and a shape that has them there
PLACES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((6,), (-1,), (3, 6)),
    ((6,), (-2,), (6, 5)),
    ((6,), (-3,), (2, 6, 4, 5)),
    ((6,), (-4,), (6, 2, 1, 3)),
    ((2, 3), (-3, -1), (4, 2, 5, 3)),
    ((2, 3), (-3, -2), (4, 2, 3, 5)),
    ((2, 3), (-4, -1), (2, 4, 5, 3)),
    ((1, 6), (-2, -1), (3, 1, 6)),
]


def placed(shape: tuple[int, ...], axes: tuple[int, ...], kind: NormKind = NormKind.LAYERNORM) -> LayerNorm | RMSNorm:
    """Return a layer with its own gain for each of six channels."""
    flat = layer_of(kind, 6)
    layer = (RMSNorm if kind is NormKind.RMSNORM else LayerNorm)(shape, flat.eps, axes=axes)
    layer.weight = flat.gamma.reshape(shape)
    if isinstance(layer, LayerNorm):
        layer.bias = flat.beta.reshape(shape)
    return layer


def rows_by_hand(array: Array, axes: tuple[int, ...]) -> tuple[list[tuple[int, ...]], Array]:
    """Return the index of each row among the other dimensions, and its elements, picked one by one."""
    normalized = [array.ndim + axis for axis in axes]
    others = [axis for axis in range(array.ndim) if axis not in normalized]
    places = list(np.ndindex(*(array.shape[axis] for axis in others)))
    rows = []
    for place in places:
        row = []
        for element in np.ndindex(*(array.shape[axis] for axis in normalized)):
            index = dict(zip(others, place, strict=True)) | dict(zip(normalized, element, strict=True))
            row.append(array[tuple(index[axis] for axis in range(array.ndim))])
        rows.append(row)
    return places, np.array(rows)


@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize(("shape", "axes", "full"), PLACES)
def test_the_float_layer_normalizes_the_rows_that_lie_there(
    shape: tuple[int, ...], axes: tuple[int, ...], full: tuple[int, ...], kind: NormKind
) -> None:
    x = np.random.default_rng(0).standard_normal(full)
    y = placed(shape, axes, kind)(x)
    assert y.shape == full
    np.testing.assert_allclose(
        rows_by_hand(y, axes)[1], layer_of(kind, 6)(rows_by_hand(x, axes)[1]), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(("shape", "axes", "full"), PLACES)
def test_codes_are_those_of_the_rows_that_lie_there(
    shape: tuple[int, ...], axes: tuple[int, ...], full: tuple[int, ...]
) -> None:
    """Reference, ideal, kernel, sums and the way from and to floats, with a scale for each channel everywhere."""
    qi, qo = params_of("int8", exponents=exponents_of(6, 3)), params_of("int8", exponents=exponents_of(6, 2, seed=1))
    options: dict[str, Any] = {
        "residual": params_of("int8", 3.0, exponents=exponents_of(6, 1)),
        "sum_output": params_of("int8", 9.0),
    }
    spec, flat = plan(placed(shape, axes), qi, qo, **options), plan(layer_of(NormKind.LAYERNORM, 6), qi, qo, **options)
    assert (spec.axes, spec.normalized_shape, spec.G, spec.adder) == (axes, shape, flat.G, flat.adder)
    size = int(np.prod(full))
    q, residual = (noise(qi, 1, size, seed=seed).reshape(full) for seed in (0, 1))
    rows = [rows_by_hand(codes, axes)[1] for codes in (q, residual)]
    y, w = reference.run_with_sum(flat, *rows)

    norm = FxpLayerNorm(spec)
    for found, sums in (reference.run_with_sum(spec, q, residual), norm.with_sum(q, residual)):
        assert found.shape == sums.shape == full
        np.testing.assert_array_equal(rows_by_hand(found, axes)[1], y)
        np.testing.assert_array_equal(rows_by_hand(sums, axes)[1], w)
    ideal = reference.ideal(spec, q, residual)
    np.testing.assert_array_equal(rows_by_hand(ideal, axes)[1], reference.ideal(flat, *rows))

    x = np.random.default_rng(2).standard_normal(full)
    x_rows = rows_by_hand(x, axes)[1]
    np.testing.assert_array_equal(rows_by_hand(norm.quantize(x), axes)[1], qi.quantize(x_rows))
    np.testing.assert_array_equal(rows_by_hand(norm.dequantize(found), axes)[1], qo.dequantize(y))
    expected = FxpLayerNorm(flat).forward(x_rows, x_rows)
    np.testing.assert_array_equal(rows_by_hand(norm.forward(x, x), axes)[1], expected)


LAYOUTS: list[Callable[[Array], Array]] = [
    lambda q: q,
    np.asfortranarray,
    lambda q: np.ascontiguousarray(np.moveaxis(q, -3, -1)).transpose(0, 3, 1, 2),
    lambda q: np.repeat(q, 2, axis=2)[:, :, ::2],
    lambda q: np.ascontiguousarray(q[..., ::-1, ::-1])[..., ::-1, ::-1],
    lambda q: np.broadcast_to(q[:1, :, :1], q.shape),
]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", range(len(LAYOUTS)))
def test_channels_first_in_any_layout_in_place_and_by_threads(layout: int, threads: int) -> None:
    spec = plan(LayerNorm(24, axes=-3), params_of("int8"), params_of("int8"))
    norm = FxpLayerNorm(spec)
    q = LAYOUTS[layout](noise(spec.input, 1, 3 * 24 * 70 * 50).reshape(3, 24, 70, 50))
    small = q[:, :, :2, :3]
    np.testing.assert_array_equal(norm(small), reference.run(spec, small))
    y = norm(q, threads=threads)
    moved = np.ascontiguousarray(np.moveaxis(q, 1, -1))
    expected = np.moveaxis(FxpLayerNorm(plan(LayerNorm(24), spec.input, spec.output))(moved), -1, 1)
    np.testing.assert_array_equal(y, expected)
    out = np.empty_like(q)  # in the layout of q
    assert norm(q, out=out, threads=threads) is out
    np.testing.assert_array_equal(out, expected)
    if q.flags.writeable:
        norm(q, out=q, threads=threads)
        np.testing.assert_array_equal(q, expected)


@settings(max_examples=40)
@given(st.data())
def test_any_axes_of_any_shape(data: st.DataObject) -> None:
    ndim = data.draw(st.integers(1, 5))
    axes = tuple(sorted(data.draw(st.sets(st.integers(-ndim, -1), min_size=1))))
    sizes = st.integers(1, 3)
    full = tuple(data.draw(sizes if axis - ndim in axes else st.integers(0, 3)) for axis in range(ndim))
    layer = LayerNorm(tuple(full[axis] for axis in axes), axes=axes)
    spec = plan(layer, params_of("int8"), params_of("int8"))
    q = noise(spec.input, 1, int(np.prod(full))).reshape(full)
    flat = plan(LayerNorm(layer.n), spec.input, spec.output)
    rows = rows_by_hand(q, axes)[1].astype(np.int8).reshape(-1, layer.n)
    y = FxpLayerNorm(spec)(q)
    assert y.shape == full
    np.testing.assert_array_equal(rows_by_hand(y, axes)[1].reshape(-1, layer.n), reference.run(flat, rows))
    np.testing.assert_array_equal(reference.run(spec, q), y)


@pytest.mark.parametrize(
    "axes", [0, 2, (0,), (-1, -2), (-1, -1), (-2, -1, -3), (), (-1,), 1.5, "ab", True, [[-1]], (-1, 0)]
)
@pytest.mark.parametrize("make", [LayerNorm, RMSNorm])
def test_axes_that_do_not_go_with_the_shape_are_refused(make: Callable[..., Any], axes: Any) -> None:
    with pytest.raises(InputError, match=r"the axes are .*; 2 different negative integers in ascending order"):
        make((2, 3), axes=axes)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (5, 2, 4, 3), (3, 5, 2)])
def test_arrays_without_the_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    layer = LayerNorm((2, 3), axes=(-3, -1))
    spec = plan(layer, params_of("int8"), params_of("int8"))
    shape = (5, 3, 4, 2) if shape == (5, 2, 4, 3) else shape
    codes = np.zeros(shape, dtype=np.int8)
    for call in (layer, FxpLayerNorm(spec), FxpLayerNorm(spec).quantize, lambda q: reference.run(spec, q)):
        with pytest.raises(InputError, match=r"the dimensions -3, -1 must be \(2, 3\)"):
            call(codes)


def test_axes_make_the_round_trip_through_a_file(tmp_path: Path) -> None:
    spec = plan(LayerNorm((2, 3), axes=(-3, -1)), params_of("int8"), params_of("int8"))
    spec.save(tmp_path / "ln.json")
    assert LayerNormSpec.load(tmp_path / "ln.json").axes == (-3, -1)
