"""Threads, overlapping arrays and odd memory layouts change nothing in the result."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import fxp_layernorm as fxp
from fxp_layernorm import inference, threads


def make(input: str = "int8", output: str = "int8", n: int = 48, kind: type = fxp.LayerNorm) -> fxp.FxpLayerNorm:
    rng = np.random.default_rng(n)
    layer = kind(n)
    layer.weight = rng.lognormal(0.0, 0.3, n)
    limits = np.iinfo(output)
    scale = 12 / (int(limits.max) - int(limits.min))
    middle = (int(limits.max) + int(limits.min) + 1) // 2
    exponents = rng.integers(0, 3, n) if input == "uint8" else None
    qi = fxp.QuantParams(input, 0.05 if input.endswith("8") else 0.0002, 3, exponents)
    return fxp.FxpLayerNorm(fxp.plan(layer, qi, fxp.QuantParams(output, scale, middle)))


def codes(norm: fxp.FxpLayerNorm, rows: int) -> np.ndarray:
    limits = np.iinfo(norm.spec.input.dtype.numpy)
    shape = (rows, norm.spec.n)
    return np.random.default_rng(rows).integers(limits.min, limits.max, shape, endpoint=True).astype(limits.dtype)


@pytest.mark.parametrize("kind", [fxp.LayerNorm, fxp.RMSNorm])
@pytest.mark.parametrize(("input", "output"), [("int8", "int8"), ("uint8", "int16"), ("int16", "int16")])
def test_every_number_of_threads_gives_the_same_codes(input: str, output: str, kind: type) -> None:
    norm = make(input, output, kind=kind)
    q = codes(norm, 131)
    expected = fxp.reference.run(norm.spec, q)
    for count in (None, 1, 2, 3, 7, 200):
        np.testing.assert_array_equal(norm(q, threads=count), expected)


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 63, 64, 65, 129])
def test_any_number_of_rows_can_be_shared_out(rows: int) -> None:
    norm = make()
    q = codes(norm, rows)
    np.testing.assert_array_equal(norm(q, threads=4), fxp.reference.run(norm.spec, q))


def test_large_inputs_use_the_cores_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = make(n=64)
    asked: list[int] = []
    call = threads.TEAM.call

    def counted(count: int, *arguments: Any) -> None:
        asked.append(count)
        call(count, *arguments)

    monkeypatch.setattr(inference, "available_cores", lambda: 3)
    monkeypatch.setattr(threads.TEAM, "call", counted)
    large = codes(norm, 3 * inference.THREAD_ELEMENTS // 64)
    small = large[: inference.THREAD_ELEMENTS // 64]
    one = norm(large, threads=1)
    norm(small)
    assert asked == []
    np.testing.assert_array_equal(norm(large), one)
    assert asked == [3]


def test_the_constructor_sets_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = fxp.FxpLayerNorm(make().spec, threads=1)
    monkeypatch.setattr(threads.TEAM, "call", lambda *arguments: pytest.fail("threads were used"))
    norm(codes(norm, 9000))


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_refused(threads: int) -> None:
    norm = make()
    with pytest.raises(fxp.InputError, match="at least 1"):
        norm(codes(norm, 2), threads=threads)
    with pytest.raises(fxp.InputError, match="at least 1"):
        fxp.FxpLayerNorm(norm.spec, threads=threads)


def test_calls_from_several_threads_do_not_mix() -> None:
    norm = make()
    inputs = [codes(norm, rows) for rows in range(100, 140)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda q: norm(q, threads=2), inputs))
    for q, result in zip(inputs, results, strict=True):
        np.testing.assert_array_equal(result, norm(q, threads=1))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("input", "output"), [("int8", "int8"), ("int16", "int16")])
def test_in_place(input: str, output: str, threads: int) -> None:
    norm = make(input, output)
    q = codes(norm, 3001)  # several of the blocks that are copied
    expected = norm(q, threads=1)
    result = norm(q, out=q, threads=threads)
    assert result is q
    np.testing.assert_array_equal(q, expected)


def test_types_of_one_size_share_their_memory() -> None:
    norm = make("int16", "int16")
    unsigned = make("int16", "uint16")
    q = codes(norm, 50)
    expected = unsigned(q)
    out = q.view(np.uint16)
    np.testing.assert_array_equal(unsigned(q, out=out), expected)


def test_an_output_that_overlaps_elsewhere_is_right() -> None:
    norm = make()
    buffer = codes(norm, 41)
    expected = norm(buffer[:40])
    np.testing.assert_array_equal(norm(buffer[:40], out=buffer[1:], threads=2), expected)
    wide = make("int8", "int16")
    memory = np.zeros((20, 48), dtype=np.int16)
    q = memory.view(np.int8).reshape(40, 48)[:20]  # the first half of the output's memory
    q[...] = codes(wide, 20)
    expected = wide(q.copy())
    np.testing.assert_array_equal(wide(q, out=memory), expected)


def test_layouts_and_read_only_inputs() -> None:
    norm = make()
    q = codes(norm, 30)
    expected = norm(q)
    frozen = q.copy()
    frozen.flags.writeable = False
    np.testing.assert_array_equal(norm(frozen), expected)
    assert q.flags.writeable
    np.testing.assert_array_equal(norm(np.asfortranarray(q)), expected)
    np.testing.assert_array_equal(norm(q[::-2]), expected[::-2])
    out = np.empty((48, 30), dtype=np.int8).T
    assert norm(q, out=out) is out
    np.testing.assert_array_equal(out, expected)
    shifted = np.empty(q.size * 2 + 1, dtype=np.int8)[1:].view(np.int16).reshape(q.shape)  # not aligned
    shifted[...] = q
    sixteen = make("int16", "int16")
    np.testing.assert_array_equal(sixteen(shifted), sixteen(shifted.copy()))
    np.testing.assert_array_equal(sixteen(shifted.copy(), out=shifted), shifted)
