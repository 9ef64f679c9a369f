"""Feeds: where data comes from, and what is said of data that doesn't fit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_models import N, feeds, model_with_norms

from fxp_layernorm import DataError, export
from fxp_layernorm.runtime import FeedHash, Feeds, Session


def test_file_folder_function_and_arrays_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = feeds()
    folder = tmp_path / "feeds"
    folder.mkdir()
    for index, feed in enumerate(data):
        np.savez(folder / f"{index}.npz", **feed)
    (tmp_path / "my_feeds.py").write_text(
        "import pathlib, numpy as np\n"
        "def load():\n"
        "    for path in sorted((pathlib.Path(__file__).parent / 'feeds').glob('*.npz')):\n"
        "        yield dict(np.load(path))\n"
    )
    monkeypatch.chdir(tmp_path)
    sources: list[Any] = [folder, str(folder), "my_feeds:load", data, lambda: iter(data)]
    for source in sources:
        for _ in range(2):  # each can be gone through again
            read = list(Feeds(source))
            assert len(read) == 3
            for got, want in zip(read, data, strict=True):
                np.testing.assert_array_equal(got["x"], want["x"])
    assert len(Feeds(folder)) == 3
    assert len(list(Feeds(folder / "1.npz"))) == 1
    assert len(list(Feeds(data[0]))) == 1


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("nowhere", "neither a file nor a folder"),
        ("no_such_module:feeds", "neither a file nor a function"),
        ("math:no_such_function", "neither a file nor a function"),
        ("math:pi", "a float; a function that yields feeds"),
    ],
)
def test_sources_that_do_not_exist(source: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Feeds(source)


def test_bad_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=r"holds no \.npz file"):
        Feeds(empty)
    path = tmp_path / "x.npz"
    np.savez(path, x=np.zeros((2, 5, N), dtype=np.float32))
    whole = path.read_bytes()
    for content in (b"", b"PK\x03\x04", b"not a zip", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"x\.npz is no \.npz file, or is cut short; write it with np\.savez"):
            list(Feeds(path))
    path.write_bytes(whole[:64] + b"!" + whole[65:])
    with pytest.raises(DataError, match=r"can't be read as a \.npz file"):
        list(Feeds(path))
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(DataError, match=r"^[^ ]*array\.npy holds a single array"):
        list(Feeds(tmp_path / "array.npy"))
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match="pickle"):
        list(Feeds(path))


@pytest.mark.parametrize("source", [list, lambda: iter([])])
def test_no_feeds(source: Any) -> None:
    with pytest.raises(DataError, match="holds no feed"):
        list(Feeds(source))


def test_feed_that_is_no_mapping() -> None:
    def stream() -> Iterator[Any]:
        yield np.zeros(3)

    with pytest.raises(DataError, match="a feed is a ndarray"):
        list(Feeds(stream))


@pytest.mark.parametrize(
    ("feed", "match"),
    [
        ({}, "lacks the input 'x'; it holds nothing"),
        ({"z": np.zeros(3)}, "lacks the input 'x'; it holds 'z'"),
        ({"x": np.zeros((2, 5, N), np.float32), "z": np.zeros(3)}, "holds 'z'; the model's inputs are x"),
        ({"x": np.zeros((5, N), np.float32)}, r"has the shape \(5, 16\); the model takes 3 dimensions"),
        ({"x": np.zeros((2, 5, N + 1), np.float32)}, r"has the shape \(2, 5, 17\); the model takes"),
        ({"x": np.zeros((2, 5, N), np.float64)}, "has the type float64; the model takes float32"),
        ({"x": np.zeros((2, 5, N), "U3")}, "has the type <U3; the model takes float32"),
        ({"x": np.float32(3)}, r"has the shape \(\)"),
    ],
)
def test_feeds_that_do_not_fit(feed: dict[str, Any], match: str) -> None:
    session = Session(export.load_model(model_with_norms()))
    with pytest.raises(DataError, match=match):
        session.run(feed)


def test_types_that_fit_without_loss_are_taken() -> None:
    session = Session(export.load_model(model_with_norms()))
    x = np.arange(2 * 5 * N).reshape(2, 5, N).astype(np.int16)
    assert session.run({"x": x})["y"].dtype == np.float32


def test_hash_tells_feeds_apart() -> None:
    def digest(*data: dict[str, Any]) -> str:
        feed_hash = FeedHash()
        for number, feed in enumerate(data):
            feed_hash.update(feed, number)
        return feed_hash.hexdigest()

    x = np.arange(12.0)
    distinct = [digest({"x": x}), digest({"y": x}), digest({"x": x.reshape(3, 4)}), digest({"x": x.astype("f4")}),
                digest({"x": x}, {"x": x}), digest({"x": x[::-1]})]  # fmt: skip
    assert len(set(distinct)) == len(distinct)
    assert digest({"x": x, "y": x}) == digest({"y": x, "x": np.asfortranarray(x)})


@given(st.permutations(range(4)), st.integers(0, 4))
def test_hash_does_not_depend_on_the_order_or_the_parts(order: list[int], cut: int) -> None:
    def of(numbers: Iterable[int]) -> FeedHash:
        feed_hash = FeedHash()
        for number in numbers:
            feed_hash.update({"x": np.array(number // 2)}, number)
        return feed_hash

    merged = of(order[:cut])
    merged.merge(of(order[cut:]))
    assert merged.hexdigest() == of(range(4)).hexdigest()
    assert of([1, 0, 3]).hexdigest() != of([0, 2, 3]).hexdigest()
