"""What the kernels take of a spec besides the codes: its integers, in the types and the order that suit them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import proof
from .adder import NARROW_BITS, code_multipliers, width
from .proof import NormKind
from .spec import LayerNormSpec

#: Codes that the kernels' vectors take at a time; not imported, as that would load Numba.
BLOCK = 64

_Array = npt.NDArray[Any]
#: G, B, weights and zeros, each in the order of the vectors that they meet, and how many bits of t a lower word has.
_WordTables = tuple[_Array, _Array, _Array | None, _Array | None, int | None]


def kernel_arguments(spec: LayerNormSpec) -> tuple[Any, ...]:
    """Return what `kernels.run` takes after the codes and the output."""
    lane = np.int64 if spec.lane == 64 or spec.accumulator > 32 else np.int32
    # vpmuldq, the product of 32-bit factors, is one step where vpmullq is three; 16-bit factors gain nothing
    narrow = max(spec.row_stage.t_max(spec.s1), *map(abs, spec.G)) < 1 << 31
    codes, added = spec.row_stage.codes, spec.adder is not None
    exponents = None if added or spec.input.channels is None else _channels(spec)
    # without exponents the kernel sums bytes without a sign, and wider codes around their middle
    bits = 8 * spec.input.dtype.numpy.itemsize
    largest = codes.largest if added or exponents is not None or bits > 16 else 255 if bits == 8 else 1 << (bits - 1)
    square = largest * largest
    # 64 squares should fit between two carries; else they are summed in two parts, and as a last resort in 64 bits
    wide = square >= 1 << 31
    split = not wide and 64 * square >= 1 << 31
    chunk = spec.n if wide else 1 << 15 if split else ((1 << 31) - 1) // max(square, 1)
    low = _low_bits(spec)
    top = 16 - spec.s1 - low
    height = _word_height(spec, top)
    words = None if height is None else _word_tables(spec, height, low)
    longs = _long_tables(spec)
    # what the codes are less in the sums and, in words, in the products, unless that is done channel by channel
    unsigned, middle = spec.input.dtype.numpy.kind == "u", 1 << (bits - 1)
    plain = not added and exponents is None
    origin = 0 if not plain else middle * unsigned if bits > 8 else middle * (unsigned - 1)
    base = middle if words is not None and plain and unsigned else 0
    rises = (0, 0) if height is None else (top - height, top)
    zero_point = int(spec.input.channel_zeros(spec.n)[0]) if plain else 0
    lowest, highest = int(spec.ends[0].min()) + zero_point, int(spec.ends[1].max()) + zero_point
    constants = (
        zero_point, spec.m, spec.K + spec.h, spec.h, spec.E,
        proof.reciprocal_bits(spec.n) if spec.lane == 64 else 63,
        spec.s1, spec.s2, min(chunk, spec.n), spec.kind is NormKind.LAYERNORM, split,
        1 << 15 + low if spec.row_stage.t_max(spec.s1) >= 1 << 15 + low else 1 << 62, _carry(spec), base, lowest,
        origin, *rises, highest,
    )  # fmt: skip
    ends = spec.output.lo, spec.output.hi
    return (
        exponents,
        np.array(spec.G, dtype=np.int32 if narrow else lane),
        _offsets(spec).astype(lane),
        np.array(constants, dtype=np.int64),
        np.zeros(0, dtype=np.int64 if wide else np.int32),
        np.array([spec.A, spec.l], dtype=np.int64) if spec.A else None,
        None if ends == type_ends(spec.output.dtype.numpy) else np.array(ends, dtype=np.int64),
        True if lane is np.int32 and spec.m <= 26 else None,
        True if bits == 8 and exponents is None and not added else None,
        _word_sums(spec),
        words,
        longs,
    )


def column_arguments(spec: LayerNormSpec, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what `kernels.run_columns` takes: it sums the squares of u itself, in one part."""
    exponents, G, B, constants, _, outer, ends, short, *_ = arguments
    square = max(spec.row_stage.codes.largest, 1) ** 2
    wide = 64 * square >= 1 << 31
    constants = constants.copy()
    constants[8] = spec.n if wide else min(((1 << 31) - 1) // square, spec.n)
    return exponents, G, B, constants, np.zeros(0, dtype=np.int64 if wide else np.int32), outer, ends, short


def adder_arguments(spec: LayerNormSpec) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return what `kernels.add` and `kernels.sum_codes` take after their arrays."""
    dtype = np.int32 if width(spec.operands, spec.lane) == NARROW_BITS else np.int64
    M = [factors.astype(dtype) for factors in code_multipliers(spec.n, spec.operands, spec.adder)]
    zeros = [params.channel_zeros(spec.n).astype(dtype) for params in spec.operands]
    add = (M[0], M[-1], zeros[0], zeros[-1], 0 if spec.adder is None else spec.adder.shift)
    params = spec.sum_output
    if params is None or spec.adder is None or spec.adder.sum_shift is None:
        return add, ()
    shifts = np.array(params.channel_exponents(spec.n), dtype=np.int64) + spec.adder.sum_shift
    return add, (shifts, np.array(params.channel_zeros(spec.n)), params.lo, params.hi)


def _channels(spec: LayerNormSpec) -> _Array:
    """Return the exponents and the zero points of the input's channels."""
    return np.stack([spec.input.channel_exponents(spec.n), spec.input.channel_zeros(spec.n)]).astype(np.int32)


def type_ends(dtype: np.dtype[Any]) -> tuple[int, int]:
    """Return the lowest and the highest value of an integer type."""
    limits = np.iinfo(dtype)
    return int(limits.min), int(limits.max)


def _offsets(spec: LayerNormSpec) -> npt.NDArray[np.int64]:
    """Return B with the rounding half of equation (9)."""
    return np.array([offset + (1 << (spec.s2 - 1)) for offset in spec.B], dtype=np.int64)


def _low_bits(spec: LayerNormSpec) -> int:
    """Return how many bits of t `kernels.word_elements` takes from a lower word, where G leaves them.

    They are asked for where words hold t up to less than 32 standard deviations; those that the planner wants do.
    """
    return max(0, min(spec.F - 10, 15 - max(map(abs, spec.G)).bit_length(), 16 - spec.s1))


def _word_height(spec: LayerNormSpec, top: int) -> int | None:
    """Return how far above u the words lie that `kernels.word_elements` multiplies; None if it can't hold the spec.

    At most `top`, which is how far p must rise altogether.
    """
    if spec.lane == 64 or spec.accumulator > 32 or spec.output.dtype.bits > 8 or not spec.s1 <= 16 <= spec.s2:
        return None
    if max(map(abs, spec.G)) >= 1 << 15:
        return None
    low, high = int(spec.ends[0].min()), int(spec.ends[1].max())
    if spec.adder is not None or spec.input.dtype.numpy.itemsize > 1:
        exponents = spec.adder is None and spec.input.channels is not None
        words = low >= -(1 << 15) and high < 1 << 15 if spec.adder is not None else spec.input.dtype.bits <= 16
        return None if exponents or not words else 0
    if spec.input.channels is None:  # then words are codes, and zero points wait in M
        return min(8, top)
    heights = range(min(7 - max(spec.input.channel_exponents(spec.n)), top), -1, -1)
    return next((k for k in heights if low << k >= -(1 << 15) and high << k < 1 << 15), None)


def _word_tables(spec: LayerNormSpec, height: int, low: int) -> _WordTables:
    """Return the tables of `kernels.word_elements`.

    Words lie in the order of `products.first_words` and `second_words`; products take the even ones of 32 words before
    the odd ones.
    """
    bytes_in = spec.adder is None and spec.input.dtype.numpy.itemsize == 1
    words = _order(spec.n, bytes_in)
    products = words.reshape(-1, 16, 2).transpose(0, 2, 1).reshape(-1)
    G = np.array(spec.G, dtype=np.int64)[products]
    pairs = np.stack([G * (low > 0), G << low], axis=1).reshape(-1)
    tables = _aligned(pairs, np.int16), _aligned(_offsets(spec)[products], np.int32)
    if not bytes_in or (height == 8 and spec.input.channels is None):
        return *tables, None, None, low or None
    return *tables, *_weights(spec, words, height), low or None


def _order(n: int, bytes_in: bool) -> npt.NDArray[np.int64]:
    """Return the channels of whole blocks in the order of `products.first_words` and `second_words`."""
    k = np.arange(BLOCK)
    word = 4 * (k % 32 // 2) + 2 * (k % 2) + k // 32 if bytes_in else k
    return (np.arange(0, n - n % BLOCK, BLOCK)[:, np.newaxis] + word).reshape(-1)


def _weights(spec: LayerNormSpec, words: npt.NDArray[np.int64], height: int) -> tuple[_Array, _Array | None]:
    """Return the weights that make words of codes by `products.weighted_words`, and what is less then, or None."""
    weights = np.left_shift(1, np.array(spec.input.channel_exponents(spec.n))[words] + height)
    # of a word's two bytes the first is that of the first vector's codes
    pairs = np.zeros((len(words) // 32, 32, 2), dtype=np.int64)
    pairs[0::2, :, 0], pairs[1::2, :, 1] = weights.reshape(-1, 2, 32).transpose(1, 0, 2)
    zeros = (spec.input.channel_zeros(spec.n) - 128 * (spec.input.dtype.numpy.kind == "u"))[words] * weights
    less = None if spec.input.channels is None or not zeros.any() else _aligned(zeros, np.int16)
    return _aligned(pairs.reshape(-1), np.uint8), less


def _word_sums(spec: LayerNormSpec) -> tuple[_Array | None, _Array | None] | None:
    """Return the weights and zeros that make words of codes for `kernels.run`'s sums; None if words can't hold them."""
    if spec.adder is not None:
        return None
    if spec.input.channels is None:
        return (None, None) if spec.input.dtype.numpy.itemsize == 2 else None
    if spec.input.dtype.numpy.itemsize > 1 or max(spec.input.channel_exponents(spec.n)) > 7:
        return None
    return _weights(spec, _order(spec.n, True), 0)


def _carry(spec: LayerNormSpec) -> int:
    """Return how many codes' squares `kernels.run` sums in 16 lanes of 32 bits, where there are channel exponents."""
    largest = max(spec.row_stage.codes.largest, 1)
    return min(((1 << 32) - 1) // largest**2 * 16, 1 << 15) & -BLOCK


def _long_tables(spec: LayerNormSpec) -> tuple[_Array, _Array, _Array | None, _Array | None] | None:
    """Return the tables of `kernels.long_elements`: G, B, weights and zeros; None if it can't hold the spec."""
    shifts = spec.s1 <= 20 and spec.s2 >= 32
    factors = max(spec.row_stage.t_max(spec.s1), *map(abs, spec.G)) < 1 << 31
    if not (spec.lane == 64 and shifts and factors):
        return None
    whole = spec.n - spec.n % BLOCK
    # two vectors in turn, of which one begins a place later
    G = np.array(spec.G[:whole], dtype=np.int64).reshape(-1, 2, 8).transpose(0, 2, 1).reshape(-1)
    tables = _aligned(np.append(G, 0), np.int32), _aligned(_offsets(spec)[:whole], np.int64)
    if spec.adder is not None or spec.input.channels is None:
        return *tables, None, None
    weights = np.left_shift(1, np.array(spec.input.channel_exponents(spec.n), dtype=np.int64))
    zeros = spec.input.channel_zeros(spec.n) * weights
    return *tables, _aligned(weights[:whole], np.int64), _aligned(-zeros[:whole], np.int64)


def _aligned(values: _Array, dtype: type[np.integer[Any]]) -> _Array:
    """Return the values in memory that begins with a line of the cache."""
    size = values.size * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, dtype=np.uint8)
    start = -memory.ctypes.data % 64
    array = memory[start : start + size].view(dtype)
    array[...] = values
    return array
