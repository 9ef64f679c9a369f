"""Observers: exact, and the same in any order and any grouping of the feeds."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx_models import feeds, model_with_norms

import fxp_layernorm as fxp
from fxp_layernorm import DataError
from fxp_layernorm.calibration import ModelCalibration, norms, observers
from fxp_layernorm.calibration.histograms import Histogram
from fxp_layernorm.calibration.norms import NormObserver, TensorObserver
from fxp_layernorm.calibration.observers import ExactSum, MinMaxObserver, Observer, RowSample, row_ids
from fxp_layernorm.runtime import Feeds

N = 3
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
#: Feeds of a few rows, of any float32 numbers: zeros of both signs, subnormal and huge ones.
FEEDS = st.lists(hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.just(N)), elements=FLOATS), min_size=1)


def same(first: Observer, second: Observer) -> None:
    a, b = first.arrays(), second.arrays()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].tobytes() == b[name].tobytes(), name


def layer() -> fxp.LayerNorm:
    return fxp.LayerNorm(N, eps=1e-3)


def observed(feeds: list[npt.NDArray[Any]], chosen: list[int]) -> NormObserver:
    observer = NormObserver(layer())
    for index in chosen:
        observer.update(feeds[index], feeds[index] * np.float32(0.25), feed=index)
    return observer


@settings(max_examples=40)
@given(FEEDS, st.data())
def test_any_order_and_any_grouping_give_the_same_state(feeds: list[npt.NDArray[Any]], data: st.DataObject) -> None:
    """Merging is associative and commutative, and splitting the feeds over observers changes nothing."""
    everything = observed(feeds, list(range(len(feeds))))
    order = data.draw(st.permutations(range(len(feeds))))
    same(observed(feeds, order), everything)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(feeds)), min_size=2, max_size=2)))
    parts = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] :]]
    for grouping in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        first, second, third = (observed(feeds, parts[index]) for index in grouping)
        first.merge(second)
        first.merge(third)
        same(first, everything)
        left, middle, right = (observed(feeds, parts[index]) for index in grouping)
        middle.merge(right)
        left.merge(middle)
        same(left, everything)


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(2)), elements=FLOATS), st.sampled_from([4, 16]))
def test_histogram_counts_each_value_where_it_belongs(rows: npt.NDArray[Any], half: int) -> None:
    """In exact arithmetic: the width is the narrowest that holds all, and bin b holds trunc(v / width)."""
    histogram = Histogram(2, half)
    for row in rows:  # one at a time, so that it has to grow
        histogram.update(row[None], np.abs(row))
    assert histogram.counts.sum(axis=1).tolist() == [len(rows)] * 2
    for channel, values in enumerate(rows.T.tolist()):
        width = Fraction(2) ** int(histogram.width[channel])
        largest = max(map(abs, values))
        assert largest < half * width
        assert histogram.width[channel] == -100 or 2 * largest >= half * width
        expected = np.bincount([int(Fraction(value) / width) + half for value in values], minlength=2 * half)
        np.testing.assert_array_equal(histogram.counts[channel], expected)


@given(st.lists(st.lists(FLOATS, min_size=2, max_size=2), min_size=1, max_size=12))
def test_sums_are_exact(numbers: list[list[float]]) -> None:
    total = ExactSum(2)
    for pair in numbers:
        total.add(np.array([pair], dtype=np.float32))
    for channel in range(2):
        exact = sum(map(Fraction, (pair[channel] for pair in numbers)), Fraction(0)) / len(numbers)
        assert total.mean()[channel] == float(exact)


def test_quantiles_are_those_of_the_values_to_a_bin() -> None:
    values = np.random.default_rng(0).standard_t(3, size=(20_000, 2)) * [1, 40]
    histogram = Histogram(2, 1 << 10)
    histogram.update(values, np.abs(values).max(axis=0))
    for shares in ((0.001, 0.999), (0.3, 0.5), (0.0, 1.0)):
        low, high = histogram.quantiles(shares)
        bin_width = 2 * 2.0 ** histogram.width.astype(float)  # that of the bin around zero
        assert (np.abs(low - np.quantile(values, shares[0], axis=0)) <= bin_width).all()
        assert (np.abs(high - np.quantile(values, shares[1], axis=0)) <= bin_width).all()


def test_percentiles_leave_out_their_share_and_never_widen_the_range() -> None:
    values = np.random.default_rng(0).normal(size=(10_000, 4)).astype(np.float32)
    observer = TensorObserver(4)
    observer.update(values, np.zeros(len(values), dtype=np.int64))
    low, high = observer.percentile_range(98, by_channel=True)
    np.testing.assert_allclose(low, np.quantile(values, 0.01, axis=0), atol=0.03)
    np.testing.assert_allclose(high, np.quantile(values, 0.99, axis=0), atol=0.03)
    low, high = observer.percentile_range(100, by_channel=False)
    assert (low, high) == (values.min(), values.max())


def test_mean_range_is_that_of_the_feeds() -> None:
    feeds = [np.array([[-1.0, 0.5], [2.0, 1.0]]), np.array([[4.0, 0.25]])]
    observer = TensorObserver(2)
    for feed in feeds:
        observer.update(feed, np.arange(len(feed)))
    low, high = observer.mean_range()
    assert low.tolist() == [1.5, 0.375]
    assert high.tolist() == [3.0, 0.625]


def test_minmax_observer_is_that_of_all_rows() -> None:
    x = np.random.default_rng(3).normal(size=(300, 48))
    observer = MinMaxObserver(48)
    for part in np.array_split(x, 7):
        observer.update(part)
    np.testing.assert_array_equal(observer.low, x.min(axis=0))
    np.testing.assert_array_equal(observer.high, x.max(axis=0))
    assert observer.rows == 300


@given(st.lists(st.integers(0, 40), min_size=1, max_size=20), st.integers(1, 12))
def test_row_sample_is_bounded_and_does_not_depend_on_the_parts(parts: list[int], capacity: int) -> None:
    total = sum(parts)
    rows, ids = np.arange(total, dtype=float)[:, None], row_ids(7, 0, total)
    whole, piecewise = RowSample(capacity, 1), RowSample(capacity, 1)
    whole.update(rows, ids)
    start = 0
    for size in parts:
        piecewise.update(rows[start : start + size], ids[start : start + size])
        start += size
    kept = whole.rows()[:, 0]
    assert len(kept) == min(capacity, total)
    assert (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(piecewise.rows()[:, 0], kept)


def test_row_sample_is_a_fair_draw() -> None:
    """Of 64 feeds with 1000 rows each, every feed and every part of a feed is drawn from alike."""
    sample = RowSample(6400, 2)
    for feed in range(64):
        rows = np.stack([np.full(1000, feed), np.arange(1000)], axis=1).astype(np.float32)
        sample.update(rows, row_ids(feed, 0, 1000))
    feeds = np.bincount(sample.rows()[:, 0].astype(int), minlength=64)
    parts = np.bincount((sample.rows()[:, 1] // 100).astype(int), minlength=10)
    # six standard deviations of a binomial draw
    assert (np.abs(feeds - 100) <= 6 * np.sqrt(100)).all()
    assert (np.abs(parts - 640) <= 6 * np.sqrt(640)).all()


def test_rows_that_are_not_finite_are_left_out_and_counted() -> None:
    x = np.ones((4, N), dtype=np.float32)
    x[1, 2], x[2, 0], x[2, 1] = np.nan, np.inf, -np.inf
    y = np.zeros_like(x)
    y[3, 1] = np.nan
    observer = NormObserver(layer())
    observer.update(x, y)
    assert (observer.rows, observer.left_out) == (1, 3)
    assert observer.bad_inputs.tolist() == [1, 1, 1]
    assert observer.bad_outputs.tolist() == [0, 1, 0]
    assert observer.sample.rows().shape == (1, N)


def waited_for(feeds: list[npt.NDArray[Any]]) -> tuple[NormObserver, NormObserver]:
    """Return observers of the same feeds: one whose state was never read, and one whose was read after each feed."""
    waiting, settled = NormObserver(layer()), NormObserver(layer())
    for index, feed in enumerate(feeds):
        given = feed.copy()
        waiting.update(given, given * 2, feed=index)
        given[:] = 7  # what the caller does to its array afterwards is no concern of the observer
        settled.update(feed, feed * 2, feed=index)
        settled.arrays()
    return waiting, settled


@pytest.mark.parametrize("rows", [[3, 1, 2], [1] * 6, [10, 4, 2, 1], [30, 1]])
def test_feeds_that_wait_to_be_taken_in_are_part_of_the_state(rows: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait, in values or in feeds, and whatever reads the state: results are as if none did."""
    for module in (norms, observers):
        monkeypatch.setattr(module, "MOST_WAITING", 4)
    monkeypatch.setattr(norms, "WAITING_VALUES", 16 * N)
    monkeypatch.setattr(norms, "SAMPLED_ELEMENTS", 0)  # samples of 64 rows
    rng = np.random.default_rng(1)
    feeds = [(rng.normal(size=(count, N)) * 2.0 ** rng.integers(-9, 9)).astype(np.float32) for count in rows * 4]
    readers: list[Callable[[NormObserver], Iterable[Any]]] = [
        lambda observer: observer.output.mean_range(),
        lambda observer: observer.output.percentile_range(90, by_channel=True),
        lambda observer: observer.output.percentile_range(90, by_channel=False),
        lambda observer: [observer.sample.rows()],
        lambda observer: [observer.sample.ids],
        lambda observer: pickle.loads(pickle.dumps(observer)).arrays().values(),
        lambda observer: observer.arrays().values(),
    ]
    for count in (2, 5, len(feeds)):
        for read in readers:
            waiting, settled = waited_for(feeds[:count])
            for found, expected in zip(read(waiting), read(settled), strict=True):
                np.testing.assert_array_equal(found, expected)


def test_saved_state_is_the_whole_state() -> None:
    rng = np.random.default_rng(0)
    feeds = [rng.normal(size=(5, N)).astype(np.float32) for _ in range(3)]
    saved, restored = observed(feeds, [0, 1]), NormObserver(layer())
    restored.restore(saved.arrays())
    same(restored, saved)
    for observer in (saved, restored):
        observer.update(feeds[2], feeds[2] * np.float32(0.25), feed=2)
        same(observer, observed(feeds, [0, 1, 2]))


@pytest.mark.parametrize("change", ["missing", "shape", "dtype", "sample"])
def test_a_state_of_another_form_is_refused(change: str) -> None:
    arrays = observed([np.ones((5, N), dtype=np.float32)], [0]).arrays()
    if change == "missing":
        del arrays["output.ranges.lows"]
    elif change == "shape":
        arrays["output.ranges.lows"] = np.zeros(N + 1)
    elif change == "dtype":
        arrays["input._tensor.counts"] = arrays["input._tensor.counts"].astype(np.float64)
    else:
        arrays["sample._rows"] = np.zeros((5, N), dtype=object)
    with pytest.raises(DataError, match="of another form"):
        NormObserver(layer()).restore(arrays)


def test_nothing_waits_once_a_model_is_observed() -> None:
    """Several threads read the observers then, and the first to take in what waits would leave the others none."""
    calibration = ModelCalibration(model_with_norms())
    calibration.observe(Feeds(feeds()))
    for norm in calibration._seen.norms.values():
        assert norm.sample._rows.size
        assert not [side for side in (norm.input, norm.output, norm.sample) if side._waiting]
