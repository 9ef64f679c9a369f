"""The kernels' primitives: all 16-bit mantissas, and every boundary of larger numbers, against exact integers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from naive import nearest
from numba import njit

from fxp_layernorm import kernels, proof, reference

Array = npt.NDArray[np.int64]

#: n, m, x and the cut of equation (4), for short rows and for long ones, with x = K + h as the planner has it at h = 0.
STAGES = {
    "lane 24, n = 1": (1, 18, 21, None),
    "lane 24, n = 768": (768, 18, 18, None),
    "lane 32, n = 4097": (4097, 24, 24, None),
    "lane 32, n = 65536": (65_536, 24, 22, None),
    "lane 64, n = 1": (1, 31, 60, proof.reciprocal_bits(1)),
    "lane 64, n = 768": (768, 31, 48, proof.reciprocal_bits(768)),
    "lane 64, n = 65535": (65_535, 31, 38, proof.reciprocal_bits(65_535)),
}


def boundaries(limit: int) -> list[int]:
    """Return 2**k, k**2 and (k + 1/2)**2, each +-2, up to below `limit`: where a root or a bit length steps."""
    roots = [1 << k for k in range(32)] + [3 << k for k in range(30)] + [46_341, 94_906_265, 2_147_483_647]
    bases = {1 << k for k in range(63)} | {r * r for r in roots} | {r * r + r for r in roots} | {limit}
    return sorted({b + d for b in bases for d in range(-2, 3) if 0 <= b + d < limit})


@njit
def _roots(values: Any, short: Any = None) -> Any:
    out = np.empty_like(values)
    for k in range(values.size):
        out[k] = kernels.isqrt(values[k], short)
    return out


@njit
def _bits(values: Any) -> Any:
    out = np.empty_like(values)
    for k in range(values.size):
        out[k] = kernels.bit_length(values[k])
    return out


@njit
def _reciprocals(values: Any, n: int, m: int, x: int, cut: int, short: Any) -> Any:
    out = np.empty((values.size, 2), dtype=np.int64)
    for k in range(values.size):
        out[k] = kernels.reciprocal_root(values[k], n, m, x, cut, None, short)
    return out


def mantissas(shift: int) -> Array:
    """Return every 16-bit mantissa above `shift` zeros, and above `shift` ones."""
    values = np.arange(1 << 16, dtype=np.int64) << shift
    return values if shift == 0 else np.concatenate([values, values | ((1 << shift) - 1)])


@pytest.mark.parametrize("shift", range(47))
def test_isqrt_of_every_16_bit_mantissa(shift: int) -> None:
    """Every shift that keeps the mantissas below 2**62, so odd and even bit lengths."""
    values = mantissas(shift)
    root = _roots(values)
    assert (root >= 0).all()
    assert (root * root <= values).all()
    assert (values < (root + 1) * (root + 1)).all()


def test_isqrt_at_every_boundary() -> None:
    values = boundaries(1 << 62)
    assert _roots(np.array(values, dtype=np.int64)).tolist() == [math.isqrt(v) for v in values]


def test_isqrt_of_the_squares_that_a_float_cannot_tell_apart() -> None:
    """Squares of 27 to 31 bits less 1 round to the square in float64: the seed alone would be one too large."""
    k = np.random.default_rng(0).integers(1 << 27, (1 << 31) - 1, 50_000)
    np.testing.assert_array_equal(_roots(k * k - 1), k - 1)
    np.testing.assert_array_equal(_roots(k * k), k)
    np.testing.assert_array_equal(_roots(k * k + 2 * k), k)
    assert (np.floor(np.sqrt((k * k - 1).astype(np.float64))) == k).any()


def test_short_roots_need_no_correction() -> None:
    """Of every square of 26 bits at most that a float might round up to, and around; beyond them it goes astray."""
    k = np.concatenate([np.arange(1, 1 << 20), np.arange((1 << 26) - (1 << 20), 1 << 26)])
    for d in (-1, 0, 1):
        np.testing.assert_array_equal(_roots(k * k + d, True), k - (d < 0))
    assert _roots(np.array([((1 << 27) + 1) ** 2 - 1]), True) == [(1 << 27) + 1]


@pytest.mark.parametrize("shift", [0, 7, 16, 31, 46, 47])
def test_bit_length_of_every_16_bit_mantissa(shift: int) -> None:
    values = mantissas(shift)
    expected = [v.bit_length() for v in values.tolist()]
    assert _bits(values).tolist() == expected


def test_bit_length_at_every_boundary() -> None:
    values = boundaries(1 << 63)
    assert _bits(np.array(values, dtype=np.int64)).tolist() == [v.bit_length() for v in values]


def expected_reciprocals(values: list[int], stage: str) -> list[tuple[int, int]]:
    n, m, x, cut = STAGES[stage]
    return [reference.reciprocal_root(V, n=n, m=m, x=x, cut=cut) for V in values]


def found_reciprocals(values: list[int], stage: str) -> list[tuple[int, int]]:
    n, m, x, cut = STAGES[stage]
    array, cut = np.array(values, dtype=np.int64), 63 if cut is None else cut
    pairs = _reciprocals(array, n, m, x, cut, None)
    if m <= 26:  # then, from some V on, R is small enough for the short way
        short = pairs[:, 1] < (1 << 31) - 1
        assert short.any()
        np.testing.assert_array_equal(_reciprocals(array[short], n, m, x, cut, True), pairs[short])
    return [(r, R) for r, R in pairs.tolist()]


@pytest.mark.parametrize("shift", [0, 15, 30, 46])
@pytest.mark.parametrize("stage", ["lane 24, n = 768", "lane 32, n = 65536", "lane 64, n = 768"])
def test_reciprocal_root_of_every_16_bit_mantissa(stage: str, shift: int) -> None:
    """For V of 1 to 62 bits: shifts that lose bits of V and that don't, with and without the cut."""
    values = mantissas(shift)[1 : 1 << 16].tolist()
    assert found_reciprocals(values, stage) == expected_reciprocals(values, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_reciprocal_root_at_every_boundary(stage: str) -> None:
    values = boundaries(1 << 62)[1:]
    assert values[0] == 1
    assert found_reciprocals(values, stage) == expected_reciprocals(values, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_the_root_fills_its_bits_and_the_reciprocal_is_nearest(stage: str) -> None:
    """2**(m-1) <= r < 2**m for any V; R is n * 2**x over it, rounded to nearest at the last bit that x leaves."""
    n, m, x, cut = STAGES[stage]
    for V in boundaries(1 << 62)[1:]:
        r, R = reference.reciprocal_root(V, n=n, m=m, x=x, cut=cut)
        assert 1 << (m - 1) <= r < 1 << m
        shift = x + m - math.ceil(V.bit_length() / 2)
        y = 0 if cut is None else max(shift - cut, 0)
        assert nearest(Fraction(n << (shift - y), r)) << y == R


@njit
def _quotients(values: Any, divisor: int, short: Any = None) -> Any:
    out = np.empty_like(values)
    for k in range(values.size):
        out[k] = kernels.floor_divide(values[k], divisor, 1.0 / divisor, short)
    return out


#: Of the last ones b * (1.0 / b) falls short of 1, so that a float quotient of a multiple is one too small.
DIVISORS = [
    1, 2, 3, 5, 7, 12, 641, 768, 1536, 65_535, 65_536, 131_072, (1 << 24) - 3, (1 << 31) - 1, (1 << 32) - 1,
    49, 98, 103, 107, 161, 69_985, 14_395_679, 1_965_242_637,
]  # fmt: skip


@pytest.mark.parametrize("divisor", DIVISORS)
def test_floor_divide_at_every_boundary(divisor: int) -> None:
    """Near powers of 2, and around multiples of the divisor, of either sign: where a float quotient goes astray."""
    limit = 1 << 62
    near = boundaries(limit)
    near += [k * divisor + d for k in near if k * divisor < limit - 1 for d in (-1, 0, 1)]
    values = [sign * v for v in near for sign in (1, -1)]
    assert _quotients(np.array(values, dtype=np.int64), divisor).tolist() == [v // divisor for v in values]
    if divisor < 1 << 31:
        values = [v for v in values if abs(v // divisor) < (1 << 31) - 1]
        assert _quotients(np.array(values, dtype=np.int64), divisor, True).tolist() == [v // divisor for v in values]
