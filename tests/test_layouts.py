"""Any place in memory: operands and outputs that are views of larger arrays, lie across, overlap or are one another."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import layer_of, noise, params_of

from fxp_layernorm import FxpLayerNorm, LayerNorm, LayerNormSpec, NormKind, plan, reference

Codes = np.ndarray[Any, np.dtype[Any]]


@functools.cache
def spec_of(shape: tuple[int, ...], axes: tuple[int, ...], operands: int) -> LayerNormSpec:
    """Return the spec of a norm, and with two operands of their sum as well."""
    n = int(np.prod(shape))
    flat, layer = layer_of(NormKind.LAYERNORM, n), LayerNorm(shape, axes=axes)
    layer.weight, layer.bias = flat.gamma.reshape(shape), flat.beta.reshape(shape)
    options: dict[str, Any] = {}
    if operands == 2:
        options = {"residual": params_of("int8", 3.0), "sum_output": params_of("int8", 9.0)}
    return plan(layer, params_of("int8"), params_of("int8"), **options)


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[Codes, Codes]:
    """Return a buffer of codes and a view of this shape in it: with axes in any order, steps, margins and flips."""
    ndim = len(shape)
    order = draw(st.permutations(range(ndim)) | st.just(list(range(ndim))))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=ndim, max_size=ndim))
    margins = draw(st.lists(st.sampled_from([0, 0, 0, 1, 3]), min_size=ndim, max_size=ndim))
    full = [size * step + 2 * margin for size, step, margin in zip(shape, steps, margins, strict=True)]
    count = int(np.prod(full))
    buffer = noise(params_of("int8"), 1, count, seed=draw(st.integers(0, 99))).reshape([full[axis] for axis in order])
    view = buffer.transpose(np.argsort(order))
    for axis, (size, step, margin) in enumerate(zip(shape, steps, margins, strict=True)):
        flip = draw(st.sampled_from([1, 1, 1, -1]))
        index = (slice(None),) * axis
        view = view[(*index, slice(margin, margin + size * step, step))][(*index, slice(None, None, flip))]
    return buffer, view


@settings(max_examples=80)
@given(st.data())
def test_any_views_of_any_arrays(data: st.DataObject) -> None:
    """The codes are those of copies, and nothing is written but the output."""
    ndim = data.draw(st.integers(1, 4))
    axes = tuple(range(-data.draw(st.integers(1, ndim)), 0))
    axes = data.draw(st.just(axes) | st.sets(st.integers(-ndim, -1), min_size=1).map(sorted).map(tuple))
    sizes = st.integers(1, 6)
    shape = tuple(data.draw(sizes if axis - ndim in axes else st.integers(0, 9)) for axis in range(ndim))
    spec = spec_of(tuple(shape[axis] for axis in axes), axes, data.draw(st.integers(1, 2)))
    buffers, operands = zip(*(data.draw(views(shape)) for _ in spec.operands), strict=True)
    threads = data.draw(st.sampled_from([None, 1, 3]))
    norm, residual = FxpLayerNorm(spec), operands[1] if len(operands) > 1 else None
    y, w = reference.run_with_sum(spec, *operands) if len(operands) > 1 else (reference.run(spec, *operands), None)

    match data.draw(st.sampled_from(["none", "sum", "out", "same", "overlap"])):
        case "none":
            np.testing.assert_array_equal(norm(operands[0], residual=residual, threads=threads), y)
        case "sum" if w is not None:
            found, sums = norm.with_sum(operands[0], residual, threads=threads)
            np.testing.assert_array_equal(found, y)
            np.testing.assert_array_equal(sums, w)
        case "out" | "sum":
            before = [buffer.copy() for buffer in buffers]
            buffer, out = data.draw(views(shape))
            places = np.zeros(buffer.size, dtype=bool)  # of the buffer that belong to the view
            start = out.ctypes.data - buffer.ctypes.data
            places[np.array([start + np.dot(index, out.strides) for index in np.ndindex(shape)], dtype=int)] = True
            rest = buffer.copy().reshape(-1)
            assert norm(operands[0], out=out, residual=residual, threads=threads) is out
            np.testing.assert_array_equal(out, y)
            np.testing.assert_array_equal(buffer.reshape(-1)[~places], rest[~places])
            for array, old in zip(buffers, before, strict=True):
                np.testing.assert_array_equal(array, old)
        case "same":
            out = data.draw(st.sampled_from(operands))
            norm(operands[0], out=out, residual=residual, threads=threads)
            np.testing.assert_array_equal(out, y)
        case "overlap":
            flat = data.draw(st.sampled_from(buffers)).reshape(-1)
            start = data.draw(st.integers(0, flat.size - y.size))
            out = flat[start : start + y.size].reshape(shape)
            norm(operands[0], out=out, residual=residual, threads=threads)
            np.testing.assert_array_equal(out, y)


def test_rows_of_a_wider_array_are_added_up_to_their_ends() -> None:
    """And no further: the sum's codes lie one after the other, whatever the operands' rows do."""
    spec = spec_of((24,), (-1,), 2)
    wide = [noise(params, 40, 5000, seed=seed) for seed, params in enumerate(spec.operands)]
    q, residual = (codes[:, :24] for codes in wide)
    found, expected = FxpLayerNorm(spec).with_sum(q, residual), FxpLayerNorm(spec).with_sum(q.copy(), residual.copy())
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
