"""Code types and quantization parameters: rounding, saturation, channel exponents, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxp_layernorm import CodeTypeError, DType, InputError, QuantParams


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("int8", DType.INT8), (DType.UINT8, DType.UINT8), (np.int16, DType.INT16), (np.dtype("uint16"), DType.UINT16),
        (np.dtype(">i2"), DType.INT16),
    ],
)  # fmt: skip
def test_types_by_name_or_numpy_dtype(value: Any, expected: DType) -> None:
    assert DType.parse(value) is expected
    info = np.iinfo(expected.value)
    assert (expected.lo, expected.hi, expected.numpy) == (info.min, info.max, np.dtype(expected.value))


@pytest.mark.parametrize("value", ["int64", "int1", "uint17", "INT8", "", np.float32, np.dtype("int64"), 8, None, int])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(InputError, match=r"can't have the type.*use int8, uint8, int16, uint16"):
        DType.parse(value)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quantize_rounds_ties_to_even_not_up_nor_away(dtype: Any) -> None:
    """Half up would give 1, 2, 3, 0, -1, -2; away from zero 1, 2, 3, -1, -2, -3."""
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5], dtype=dtype) * dtype(0.25)
    assert QuantParams("int8", 0.25).quantize(x).tolist() == [0, 2, 2, 0, -2, -2]
    assert QuantParams("int8", 0.25, 1).quantize(x).tolist() == [1, 3, 3, 1, -1, -1]  # before the zero point is added


@pytest.mark.parametrize("dtype", DType)
def test_quantize_saturates(dtype: DType) -> None:
    params = QuantParams(dtype, 2.0**-126, dtype.hi - 1)
    x = np.array([-3.4e38, -1.0, 0.0, 1.0, 3.4e38])
    for values in (x, x.astype(np.float32)):  # float32 overflows on the way
        codes = params.quantize(values)
        assert codes.dtype == dtype.numpy
        assert codes.tolist() == [dtype.lo, dtype.lo, dtype.hi - 1, dtype.hi, dtype.hi]


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if dtype.bits <= 16])
@pytest.mark.parametrize("exponents", [None, (0, 3, 15, 1)])
def test_every_code_survives_the_way_to_float_and_back(dtype: DType, exponents: tuple[int, ...] | None) -> None:
    params = QuantParams(dtype, 0.037, (dtype.lo + dtype.hi) // 2 + 1, exponents)
    codes = np.arange(dtype.lo, dtype.hi + 1).astype(dtype.numpy).reshape(-1, 4)
    real = params.dequantize(codes)
    assert real.dtype == np.float32
    steps = np.float32(0.037) * 2.0 ** np.array(exponents or (0,) * 4)
    expected = ((codes.astype(np.int64) - params.zero_point) * steps).astype(np.float32)
    np.testing.assert_array_max_ulp(real, expected, 1)
    np.testing.assert_array_equal(params.quantize(real), codes)


@given(
    value=st.floats(-1e6, 1e6, width=32),
    scale=st.floats(2.0**-20, 2.0**20, width=32),
    zero_point=st.integers(-128, 127),
    exponent=st.integers(0, 15),
)
def test_quantize_is_the_nearest_code_by_an_integer_oracle(
    value: float, scale: float, zero_point: int, exponent: int
) -> None:
    """In float64, whose quotient of float32 numbers rounds too finely to reach or leave a tie."""
    quotient = value / 2**exponent / scale
    floor = math.floor(quotient)
    rest = quotient - floor
    nearest = floor + (rest > 0.5 or (rest == 0.5 and floor % 2 == 1))
    expected = min(max(nearest + zero_point, -128), 127)
    params = QuantParams("int8", scale, zero_point, [exponent])
    assert params.quantize(np.array([value])).item() == expected


def test_integers_bools_and_lists_count_as_float64() -> None:
    params = QuantParams("int8", 0.5)
    for x in ([1, 0, 1], np.array([True, False, True]), np.array([1, 0, 1], dtype=np.uint8)):
        assert params.quantize(x).tolist() == [2, 0, 2]
    assert params.quantize(1.0).shape == ()
    assert params.quantize(np.zeros((0, 3))).shape == (0, 3)


def test_big_endian_and_strided_arrays_give_the_same_codes() -> None:
    params = QuantParams("int16", 0.01, 3)
    x = np.random.default_rng(0).standard_normal((5, 8))
    expected = params.quantize(x)
    np.testing.assert_array_equal(params.quantize(x.astype(">f8")), expected)
    np.testing.assert_array_equal(params.quantize(np.asfortranarray(x)), expected)
    np.testing.assert_array_equal(params.quantize(x[:, ::2]), expected[:, ::2])
    codes = expected[:, ::-1]
    np.testing.assert_array_equal(params.dequantize(codes), params.dequantize(codes.copy()))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ([0.0, math.nan, 1.0], "1 of 3 values are NaN or infinite"),
        ([math.inf, -math.inf, 1.0], "2 of 3 values are NaN or infinite"),
        (np.full((2, 2), np.nan, dtype=np.float32), "4 of 4 values"),
        ([1j], "real values.*complex128"),
        (["a"], "real values.*<U1"),
        ([None], "real values.*object"),
    ],
)
def test_what_quantize_refuses(x: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        QuantParams("int8", 0.5).quantize(x)


def test_shapes_that_do_not_fit_the_exponents_are_refused() -> None:
    params = QuantParams("int8", 0.5, exponents=[0, 1, 2])
    for shape in ((4,), (3, 4), (), (3, 0)):
        with pytest.raises(
            InputError, match=rf"shape \({', '.join(map(str, shape))},?\) can't have 3 channel exponents"
        ):
            params.quantize(np.zeros(shape))
        with pytest.raises(InputError, match="3 channel exponents"):
            params.dequantize(np.zeros(shape, dtype=np.int8))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", ">i2"])
def test_dequantize_refuses_other_types(dtype: str) -> None:
    with pytest.raises(CodeTypeError, match=f"{dtype} were given where int8 is expected"):
        QuantParams("int8", 0.5).dequantize(np.zeros(3, dtype=dtype))


@pytest.mark.parametrize("scale", [0.0, -0.05, math.nan, math.inf, 1e-39, 5e-324, 2.0**-127, 2.0**128, 1e300])
def test_scales_that_are_no_normal_positive_float32_are_refused(scale: float) -> None:
    with pytest.raises(InputError, match=r"the scale is .*normal, positive float32"):
        QuantParams("int8", scale)


def test_scales_at_the_ends_of_float32_are_taken() -> None:
    for scale in (float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)):
        assert QuantParams("int8", scale).scale == scale


@pytest.mark.parametrize(
    ("dtype", "zero_point"),
    [
        ("int8", -129),
        ("int8", 128),
        ("uint8", -1),
        ("uint8", 256),
        ("uint16", 65_536),
        ("int8", 1.5),
        ("int8", math.nan),
    ],
)
def test_zero_points_outside_the_codes_are_refused(dtype: str, zero_point: Any) -> None:
    with pytest.raises(InputError, match=f"the zero point is {zero_point}; {dtype} codes go from"):
        QuantParams(dtype, 0.05, zero_point)


@pytest.mark.parametrize("exponent", [-1, 16, 1.5, 10**30, math.nan, math.inf])
def test_exponents_outside_their_range_are_refused(exponent: Any) -> None:
    with pytest.raises(InputError, match=f"a channel exponent is {exponent}.*integer from 0 to 15"):
        QuantParams("int8", 0.05, exponents=[0, exponent])


def test_parameters_are_frozen_compare_by_value_and_hold_plain_numbers() -> None:
    params = QuantParams(np.int8, np.float32(0.5), np.int64(3), np.array([0, 2]))  # type: ignore[arg-type]
    assert params == QuantParams("int8", 0.5, 3, (0, 2))
    assert hash(params) == hash(QuantParams("int8", 0.5, 3, (0, 2)))
    assert [type(v) for v in (params.scale, params.zero_point, *(params.exponents or ()))] == [float, int, int, int]
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.scale = 1.0  # type: ignore[misc]


def test_exponents_from_an_iterator_are_not_lost() -> None:
    assert QuantParams("int8", 0.5, exponents=iter([0, 2])).exponents == (0, 2)  # type: ignore[arg-type]


def test_exponents_that_are_all_zero_are_one_scale_for_the_tensor() -> None:
    params = QuantParams("int8", 0.5, exponents=[0, 0, 0])
    assert params == QuantParams("int8", 0.5)
    assert params.channel_exponents(3) == (0, 0, 0)
    assert QuantParams("int8", 0.5, exponents=[0, 2]).channel_exponents(2) == (0, 2)


@pytest.mark.parametrize("dtype", DType)
def test_a_narrow_range_leaves_the_lowest_code_out(dtype: DType) -> None:
    whole, narrow = QuantParams(dtype, 0.5, dtype.hi), QuantParams(dtype, 0.5, dtype.hi, narrow_range=True)
    assert (whole.lo, whole.hi) == (dtype.lo, dtype.hi)
    assert (narrow.lo, narrow.hi) == (dtype.lo + 1, dtype.hi)
    assert narrow.quantize([-1e30, 1e30]).tolist() == [dtype.lo + 1, dtype.hi]
    assert narrow.outside(np.array([dtype.lo, dtype.lo + 1, dtype.hi], dtype=dtype.numpy)) == 1
    with pytest.raises(InputError, match=f"{dtype} codes go from {dtype.lo + 1} to {dtype.hi}"):
        QuantParams(dtype, 0.5, dtype.lo, narrow_range=True)


@pytest.mark.parametrize("dtype", [dtype for dtype in DType if dtype.bits <= 16])
def test_codes_are_held_in_the_smallest_type_that_has_room(dtype: DType) -> None:
    limits = np.iinfo(dtype.numpy)
    assert limits.min <= dtype.lo
    assert dtype.hi <= limits.max
    assert dtype.hi - dtype.lo + 1 == 2**dtype.bits
    assert dtype.numpy.itemsize == (1 if dtype.bits <= 8 else 2)


def test_a_scale_a_channel_is_the_tensor_scale_of_each() -> None:
    scales = (0.5, 0.037, 3e-5)
    params = QuantParams("int8", 0.5, 3, channel_scales=scales)
    x = np.random.default_rng(0).standard_normal((20, 3)) * np.array(scales) * 100
    codes = params.quantize(x)
    for channel, scale in enumerate(scales):
        alone = QuantParams("int8", scale, 3)
        np.testing.assert_array_equal(codes[:, channel], alone.quantize(x[:, channel]))
        np.testing.assert_array_equal(params.dequantize(codes)[:, channel], alone.dequantize(codes[:, channel]))
    assert params.channels == 3
    assert params.channel_steps(3).tolist() == list(scales)
    with pytest.raises(InputError, match=r"shape \(4,\) can't have 3 scales"):
        params.quantize(np.zeros(4))


def test_a_zero_point_a_channel_is_the_tensor_zero_point_of_each() -> None:
    zeros = (-128, 3, 127)
    params = QuantParams("int8", 0.5, np.array(zeros), (0, 2, 1))
    assert params == QuantParams("int8", 0.5, zeros, [0, 2, 1])
    x = np.random.default_rng(0).standard_normal((20, 3)) * 100
    for values in (x, x.astype(np.float32)):
        codes = params.quantize(values)
        for channel, (zero_point, exponent) in enumerate(zip(zeros, (0, 2, 1), strict=True)):
            alone = QuantParams("int8", 0.5 * 2**exponent, zero_point)
            np.testing.assert_array_equal(codes[:, channel], alone.quantize(values[:, channel]))
            np.testing.assert_array_equal(params.dequantize(codes)[:, channel], alone.dequantize(codes[:, channel]))
    assert params.channels == 3
    with pytest.raises(InputError, match=r"shape \(4,\) can't have 3 zero points"):
        QuantParams("int8", 0.5, zeros).quantize(np.zeros(4))
    same = QuantParams("int8", 0.5, [7, 7, 7])
    assert (same.zero_point, same.channels) == (7, None)


@pytest.mark.parametrize(
    ("zero_point", "options", "words"),
    [
        ([0, 128], {}, "a channel's zero point is 128; int8 codes go from -128 to 127"),
        ([-128, 0], {"narrow_range": True}, "a channel's zero point is -128; int8 codes go from -127"),
        ([0, 0.5], {}, r"a channel's zero point is 0\.5"),
        ([0, "1"], {}, "a channel's zero point is '1'"),
        ([0, [1]], {}, r"a channel's zero point is \[1\]"),
        ([], {}, "the zero points are none"),
        ("12", {}, "the zero point is '12'"),
        (None, {}, "the zero point is None"),
        ([0, 1], {"exponents": [1, 0, 1]}, "of different numbers: 3, 2"),
        ([0, 1, 2], {"channel_scales": [1.0, 0.5]}, "of different numbers: 2, 3"),
    ],
)
def test_zero_points_that_make_no_sense_are_refused(zero_point: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        QuantParams("int8", 1.0, zero_point, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"channel_scales": [0.5, 0.2]}, "the scale must be the largest of them"),
        ({"channel_scales": []}, "the scale must be the largest of them"),
        ({"channel_scales": [1.0, 0.5], "exponents": [0, 1]}, "channel scales go without exponents"),
        ({"channel_scales": [1.0, math.nan]}, "the scale is nan"),
        ({"channel_scales": [1.0, 0.0]}, r"the scale is 0\.0"),
        ({"channel_scales": 1.0}, "the channel_scales are 1.0; they must be numbers, one a channel"),
        ({"channel_scales": "11"}, "the scale is '1'"),
        ({"narrow_range": 1}, "narrow_range is 1; it must be true or false"),
    ],
)
def test_scales_and_ranges_that_make_no_sense_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        QuantParams("int8", 1.0, **options)
