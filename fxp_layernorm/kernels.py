"""The Numba kernels: the function of docs/arithmetic.md, compiled, on integer arrays only.

Primitives and row kernel share this file, because Numba's cache doesn't notice an edit to a callee in another one.
All integers wrap in two's complement; the widths that a spec proves are what makes the results exact.

Numba widens int32 operands to int64, and LLVM then can't narrow the shifts again. So what must stay in 32 bits, to
fill the vectors, is written with NumPy's functions (`np.multiply`, `np.right_shift`, ...), which keep the type.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit

from . import team, vectors

#: So many channels are done in all rows of a block before the next, as their G and B then stay in the first cache.
TILE = 2048
#: So many columns are done together, where rows lie across: their codes of all channels should stay in the cache.
COLUMNS = 256
#: Codes that the vectors take at a time.
BLOCK = 64
#: Sums in 32 bits are carried over into 64 after so many codes: their squares, by 16 bits at a time, reach 2**31.
CARRY = 1 << 15


_INTRINSICS = hashlib.sha256(b"".join(Path(path).read_bytes() for path in (vectors.__file__, team.__file__)))


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return Numba's decorator; what it compiles is cached, unless no folder for it is writable."""
    options = {"nogil": True, "error_model": "numpy", **options}

    def decorate(function: Callable[..., Any]) -> Any:
        # Numba's cache goes by the function's name and file, and so notices an edit of the intrinsics too
        function.__qualname__ += f"_{_INTRINSICS.hexdigest()[:8]}"
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)

    return decorate


#: For what a loop over rows or channels calls: LLVM makes vectors only of loops without calls.
_inlined = _jit(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
#: For what kernels share out.
_called = _jit(no_cpython_wrapper=True, no_cfunc_wrapper=True)


@_inlined
def bit_length(value):
    """Return the bit length of an integer in [0, 2**63)."""
    # the exponent of the float is one too large where the integer was rounded up to a power of 2
    exponent: Any = np.float64(value).view(np.int64) >> 52
    bits = max(exponent - 1022, 1)
    return bits - np.int64((value >> (bits - 1)) == 0)


@_inlined
def isqrt(w):
    """Return floor(sqrt(w)) of an integer in [0, 2**62).

    The float seed is off by one at most: w has a relative error of 2**-53 as a float64 and its root is below 2**31.
    """
    r = np.int64(np.sqrt(np.float64(w)))
    r -= np.int64(r * r > w)
    return r + np.int64((r + 1) * (r + 1) <= w)


@_inlined
def floor_divide(a, b, inverse):
    """Return floor(a / b) for |a| < 2**63 and 0 < b < 2**32, given 1.0 / b.

    The float quotient has a relative error below 2**-51, so what is left of a is below 2**12 + 2*b in magnitude and
    exact as a float64; after the second quotient it is off by one b at most, which integers decide.
    """
    quotient = np.int64(np.float64(a) * inverse)
    rest = a - quotient * b
    step = np.int64(np.floor(np.float64(rest) * inverse))
    rest -= step * b
    return quotient + step + np.int64(rest >= b) - np.int64(rest < 0)


@_inlined
def reciprocal_root(V, n, m, x, cut, outer):
    """Return r and R of equation (4) for V > 0.

    `cut` is the largest shift of n before the division; `outer` holds A and l, or is None without eps outside the root.
    """
    j = m - ((bit_length(V) + 1) >> 1)
    r = isqrt((V << 2 * max(j, 0)) >> 2 * max(-j, 0))
    if outer is not None:  # the roots have 31 bits at most, and shifts beyond that leave nothing
        k = min(j, outer[1])
        r = (r >> min(j - k, 32)) + (outer[0] >> min(outer[1] - k, 32))
        above = r >> m
        r, j = r >> above, k - above
    x += j
    y = max(x - cut, 0)
    return r, floor_divide((n << (x - y)) + (r >> 1), r, 1.0 / np.float64(r)) << y


@_inlined
def row_scale(S, V0, n, m, x, h, E, cut, centred, outer):
    """Return R and M = c*R + D, so that p = u*R - M (equations 3 to 6); wraps like the lane that holds p.

    Without branches, so that a loop over rows becomes vectors.
    """
    _, R = reciprocal_root(max((V0 << 2 * h) + E, 1), n, m, x, cut, outer)
    R = R if V0 else np.int64(0)
    inverse = 0.5 / np.float64(n)
    c = floor_divide(2 * S + n, 2 * n, inverse)
    d = S - n * c
    M = c * R + floor_divide(2 * d * R + n, 2 * n, inverse)
    return R, M if centred else np.int64(0)


@_inlined
def byte_moments(q, at, count):
    """Return the sum of codes of 8 bits from `at` on, less the lowest of their type, and that of their squares."""
    S, Q = np.int64(0), np.int64(0)
    ones, middle = vectors.spread(np.int8(1)), vectors.spread(np.int8(-128))
    for start in range(0, count, CARRY):
        s, products = vectors.spread(np.int32(0)), vectors.spread(np.int32(0))
        for k in range(start, min(start + CARRY, count), BLOCK):
            codes = vectors.load_bytes(q, at + k)
            other = vectors.xor(codes, middle)
            # of v from 0 to 255 and v - 128; the product of bytes takes one without a sign and one with it
            v, w = (codes, other) if q.dtype.type(-1) > 0 else (other, codes)
            s, products = vectors.dot_bytes(s, v, ones), vectors.dot_bytes(products, v, w)
        total = vectors.sum_lanes(s)
        S += total
        Q += vectors.sum_lanes(products) + 128 * total
    return S, Q


@_inlined
def shifted(words, shifts, zeros, k):
    """Return words with the codes of a block at the height that the word stage wants (equation 0)."""
    if shifts is None:
        return words
    words = vectors.shift_right(words, vectors.load_words(shifts, k))
    return words if zeros is None else vectors.subtract(words, vectors.load_words(zeros, k))


@_inlined
def word_moments(q, at, count, shifts, zeros):
    """Return the sums of the words of codes from `at` on, and of their squares.

    Squares have 31 bits: their sum is kept modulo 2**32, beside that of their upper halves, which tells what is lost.
    """
    S, Q = np.int64(0), np.int64(0)
    ones = vectors.as_words(vectors.spread(np.int32(0x10001)))
    for start in range(0, count, CARRY):
        s = s2 = squares = squares2 = upper = upper2 = vectors.spread(np.int32(0))
        for k in range(start, min(start + CARRY, count), BLOCK):
            first, second = vectors.code_words(q, at + k)
            first, second = shifted(first, shifts, zeros, k), shifted(second, shifts, zeros, k + 32)
            s, s2 = vectors.dot(s, first, ones), vectors.dot(s2, second, ones)
            squares, squares2 = vectors.dot(squares, first, first), vectors.dot(squares2, second, second)
            upper = vectors.dot(upper, vectors.multiply_high(first, first), ones)
            upper2 = vectors.dot(upper2, vectors.multiply_high(second, second), ones)
        S += vectors.sum_lanes(vectors.add(s, s2))
        above = vectors.add(upper, upper2)
        lost = vectors.subtract(vectors.add(squares, squares2), vectors.shift_left(above, vectors.spread(np.int32(16))))
        Q += (vectors.sum_lanes(above) << 16) + vectors.sum_lanes(lost)
    return S, Q


@_inlined
def moments(q, i, n, zero_point, exponents, accumulator, chunk, split, in_bytes, in_words, height):
    """Return S and Q of row i (equations 0 to 2), Q modulo 2**64.

    Whole blocks are left to vectors where they are faster. The rest is summed over chunks that the accumulator's type
    holds. If `split`, squares reach 31 bits: their sum is then kept modulo 2**32, and beside it the sum of their upper
    halves, which says what the modulus took away. `exponents` holds the channels' exponents and their zero points;
    without them the zero point is left to the end.
    """
    sum_type = accumulator.dtype.type
    # the codes' middle, as far as it isn't 0; bytes are taken without a sign, which spares half of their product
    origin = np.int64(0)
    if exponents is None:
        if q.itemsize == 1:
            origin = np.int64(0 if q.dtype.type(-1) > 0 else -128)
        elif q.dtype.type(-1) > 0:
            origin = np.int64(32768)
    S, Q, done = np.int64(0), np.int64(0), 0
    if in_bytes is not None and vectors.has_bytes():
        done = n & -BLOCK
        S, Q = byte_moments(q, i * q.shape[1], done)
    if in_words is not None and vectors.has_words():
        done = n & -BLOCK
        S, Q = word_moments(q, i * q.shape[1], done, in_words[0], in_words[1])
        S, Q = S >> height, Q >> 2 * height
    start = done
    while start < n:  # not a range, whose length takes a division
        stop = min(start + chunk, n)
        s, squares, upper = sum_type(0), sum_type(0), sum_type(0)
        for k in range(np.uint64(start), np.uint64(stop)):
            u = sum_type(q[i, k])
            if exponents is not None:
                u = np.left_shift(np.subtract(u, sum_type(exponents[1, k])), sum_type(exponents[0, k]))
            elif q.itemsize == 1:
                u = np.bitwise_xor(np.bitwise_and(u, sum_type(255)), sum_type(-origin))
            else:
                u = np.subtract(u, sum_type(origin))
            square = np.multiply(u, u)
            s = np.add(s, u)
            squares = np.add(squares, square)
            if split:
                upper = np.add(upper, np.right_shift(square, sum_type(16)))
        S += s
        high = np.int64(upper) << 16
        Q += high + ((squares - high) & 0xFFFFFFFF) if split else np.int64(squares)
        start = stop
    if exponents is None:
        shift = zero_point - origin
        return S - n * shift, Q - 2 * shift * S + n * shift * shift
    return S, Q


@_inlined
def word_elements(q, out, i, start, stop, words, X, M, s2, ends, wide):
    """Compute output codes of row i by products of words (equations 6 to 9).

    R and M, and so p, are 2**(16 - s1) times as large, so that t is the upper half of 32 bits, where the second product
    takes it from: its factors are pairs of words, of which the lower G is 0. The same zeros pick the even and the odd
    words for the first product. If `wide`, X is more than a word, and its upper word's product is added above.
    """
    G, B, shifts, zeros = words
    source, target = i * q.shape[1], i * out.shape[1]
    high = (X + 0x8000) >> 16
    low = np.int32(X & 0xFFFF)
    even, odd = vectors.as_words(vectors.spread(low)), vectors.as_words(vectors.spread(np.int32(low << 16)))
    upper = vectors.as_words(vectors.spread(np.int32((high & 0xFFFF) * 0x10001)))
    minus_M = vectors.spread(np.int32(-M))
    for k in range(start, stop, BLOCK):
        first, second = vectors.code_words(q, source + k)
        first, second = shifted(first, shifts, zeros, k), shifted(second, shifts, zeros, k + 32)
        p0 = p1 = p2 = p3 = minus_M
        if wide:
            p0, p1 = vectors.add_above(minus_M, vectors.multiply(first, upper))
            p2, p3 = vectors.add_above(minus_M, vectors.multiply(second, upper))
        t0, t1 = vectors.as_words(vectors.dot(p0, first, even)), vectors.as_words(vectors.dot(p1, first, odd))
        t2, t3 = vectors.as_words(vectors.dot(p2, second, even)), vectors.as_words(vectors.dot(p3, second, odd))
        a0 = vectors.dot(vectors.load_ints(B, k), t0, vectors.load_words(G, 2 * k))
        a1 = vectors.dot(vectors.load_ints(B, k + 16), t1, vectors.load_words(G, 2 * k + 32))
        a2 = vectors.dot(vectors.load_ints(B, k + 32), t2, vectors.load_words(G, 2 * k + 64))
        a3 = vectors.dot(vectors.load_ints(B, k + 48), t3, vectors.load_words(G, 2 * k + 96))
        y = vectors.narrow(vectors.shift_in_turn(a0, a1, s2), vectors.shift_in_turn(a2, a3, s2), q, out)
        vectors.store(out, target + k, y if ends is None else vectors.clamp(y, ends[0], ends[1], out))


@_inlined
def long_elements(q, out, i, start, stop, longs, R, M, s1, s2, ends):
    """Compute output codes of row i in 64 bits: p modulo 2**52, of which t is 32 (6 to 9)."""
    G, B = longs
    source, target = i * q.shape[1], i * out.shape[1]
    factor, minus_M, shift = vectors.spread(R), vectors.spread(-M), vectors.spread(s1)
    for k in range(start, stop, 32):
        p0 = vectors.multiply_52(minus_M, vectors.code_longs(q, source + k), factor)
        p1 = vectors.multiply_52(minus_M, vectors.code_longs(q, source + k + 8), factor)
        p2 = vectors.multiply_52(minus_M, vectors.code_longs(q, source + k + 16), factor)
        p3 = vectors.multiply_52(minus_M, vectors.code_longs(q, source + k + 24), factor)
        t0, t1 = vectors.shift_right_unsigned(p0, shift), vectors.shift_right_unsigned(p1, shift)
        t2, t3 = vectors.shift_right_unsigned(p2, shift), vectors.shift_right_unsigned(p3, shift)
        # the lower 32 of each 64 bits are G of one vector at one place, and that of the other at the next
        a0 = vectors.add(vectors.load_longs(B, k), vectors.multiply_32(t0, vectors.load_longs(G, k)))
        a1 = vectors.add(vectors.load_longs(B, k + 8), vectors.multiply_32(t1, vectors.load_longs(G, k + 1)))
        a2 = vectors.add(vectors.load_longs(B, k + 16), vectors.multiply_32(t2, vectors.load_longs(G, k + 16)))
        a3 = vectors.add(vectors.load_longs(B, k + 24), vectors.multiply_32(t3, vectors.load_longs(G, k + 17)))
        y = vectors.narrow(vectors.shift_in_turn(a0, a1, s2), vectors.shift_in_turn(a2, a3, s2), q, out)
        vectors.store(out, target + k, y if ends is None else vectors.clamp(y, ends[0], ends[1], out))


@_inlined
def elements(q, out, i, start, stop, exponents, G, B, R, M, s1, s2, ends):
    """Compute output codes of row i (equations 6 to 9) in the type of B, that of the lane.

    M and B hold their rounding halves, and M the zero point too if there are no exponents. A type of G that is
    narrower than the lane promises that t fits it as well, which halves the work of their product. `ends` holds the
    lowest and the highest code, or is None where they are those of the output's type: LLVM then takes the instruction
    that saturates.
    """
    lane, factor = B.dtype.type, G.dtype.type
    R, M, s1, s2 = lane(R), lane(M), lane(s1), lane(s2)
    limits = np.iinfo(out.dtype)
    lo, hi = (lane(limits.min), lane(limits.max)) if ends is None else (lane(ends[0]), lane(ends[1]))
    for k in range(np.uint64(start), np.uint64(stop)):
        u = lane(q[i, k])
        if exponents is not None:
            u = np.left_shift(np.subtract(u, lane(exponents[1, k])), lane(exponents[0, k]))
        t = np.right_shift(np.subtract(np.multiply(u, R), M), s1)
        a = np.add(np.multiply(lane(factor(t)), lane(G[k])), B[k])
        out[i, k] = out.dtype.type(min(max(np.right_shift(a, s2), lo), hi))


@_inlined
def second_pass(q, out, start, count, exponents, G, B, R, M, constants, ends, words, longs):
    """Compute the output codes of rows, a tile of channels in all of them before the next."""
    n = len(G)
    s1, s2 = constants[6], constants[7]
    word_limit, height, base = constants[11], constants[12], constants[13]
    for left in range(0, n, TILE):
        right = min(left + TILE, n)
        whole = right - (right - left) % BLOCK
        for k in range(count):
            i, done = start + k, left
            if words is not None and vectors.has_words() and R[k] < word_limit:
                done = whole
                X, high_M = R[k] << (16 - s1 - height), (M[k] - base * R[k]) << (16 - s1)
                if X < 1 << 15:
                    word_elements(q, out, i, left, whole, words, X, high_M, s2, ends, False)
                else:
                    word_elements(q, out, i, left, whole, words, X, high_M, s2, ends, True)
            if longs is not None and vectors.has_longs():
                done = whole
                long_elements(q, out, i, left, whole, longs, R[k], M[k] - base * R[k], s1, s2, ends)
            if done < right:
                elements(q, out, i, done, right, exponents, G, B, R[k], M[k], s1, s2, ends)


@_jit()
def run(offer, block, q, out, exponents, G, B, constants, accumulator, outer, ends, in_bytes, in_words, words, longs):
    """Compute rows of codes, `block` at a time at most, with the threads that accept the offer (`team.together`).

    Kernels fail only for want of scratch memory, and threads of a team have nobody to raise an exception to.

    The rows of `q` and `out` may be longer than n, the length of G: what follows is not looked at. The last four
    arguments are None where vectors can't help: with the moments of bytes, or of words (the shifts and zeros that
    make them of codes), and with elements in words or in 64 bits (the same, after G and B).
    """
    if team.together(
        offer, _rows, block, q, out, exponents, G, B, constants, accumulator, outer, ends, in_bytes, in_words, words,
        longs,
    ):  # fmt: skip
        raise MemoryError


@_called
def _rows(
    counter, most, q, out, exponents, G, B, constants, accumulator, outer, ends, in_bytes, in_words, words, longs
):
    """Compute blocks of rows that stay in the cache between the two passes over them, as many as the counter gives."""
    vectors.widest()
    rows, n = len(q), len(G)
    zero_point, m, x, h, E, cut, s1, chunk, centred, split, height = (
        constants[0], constants[1], constants[2], constants[3], constants[4], constants[5], constants[6],
        constants[8], constants[9] != 0, constants[10] != 0, constants[12],
    )  # fmt: skip
    folded = zero_point if exponents is None else np.int64(0)
    block = max(1, min(rows, most, max(8, min(64, 65536 // n))))
    S, Q, R, M = np.empty((4, block), np.int64)
    start = team.take(counter, block)
    while start < rows:
        count = min(block, rows - start)
        for k in range(count):
            S[k], Q[k] = moments(
                q, start + k, n, zero_point, exponents, accumulator, chunk, split, in_bytes, in_words, height
            )
        for k in range(count):
            V0 = n * Q[k] - (S[k] * S[k] if centred else np.int64(0))
            scale, offset = row_scale(S[k], V0, n, m, x, h, E, cut, centred, outer)
            R[k], M[k] = scale, offset + folded * scale - (np.int64(1) << (s1 - 1))
        second_pass(q, out, start, count, exponents, G, B, R, M, constants, ends, words, longs)
        start = team.take(counter, block)


@_jit()
def run_columns(offer, block, q, out, exponents, G, B, constants, accumulator, outer, ends):
    """Compute `run` where rows lie across, in arrays of shape (count, n, positions): `block` positions at a time."""
    if team.together(offer, _columns, block, q, out, exponents, G, B, constants, accumulator, outer, ends):
        raise MemoryError


@_called
def _columns(counter, block, q, out, exponents, G, B, constants, accumulator, outer, ends):
    """Compute blocks of positions, as many as the counter gives; vectors go along them."""
    blocks = -(-q.shape[2] // block)
    part = team.take(counter, 1)
    while part < len(q) * blocks:
        i, left = part // blocks, part % blocks * block
        right = min(left + block, q.shape[2])
        _columns_between(q[i], out[i], left, right, exponents, G, B, constants, accumulator, outer, ends)
        part = team.take(counter, 1)


@_called
def _columns_between(q, out, left, right, exponents, G, B, constants, accumulator, outer, ends):
    """Compute the positions from left to right of arrays of shape (n, positions)."""
    vectors.widest()
    n = len(G)
    zero_point, m, x, h, E, cut, s1, s2, chunk, centred = (
        constants[0], constants[1], constants[2], constants[3], constants[4], constants[5],
        constants[6], constants[7], constants[8], constants[9] != 0,
    )  # fmt: skip
    lane, factor, sum_type = B.dtype.type, G.dtype.type, accumulator.dtype.type
    limits = np.iinfo(out.dtype)
    lo, hi = (lane(limits.min), lane(limits.max)) if ends is None else (lane(ends[0]), lane(ends[1]))
    block = min(right - left, COLUMNS)
    S, Q = np.empty((2, block), np.int64)
    s, squares = np.empty((2, block), accumulator.dtype)
    R, M = np.empty((2, block), B.dtype)
    for start in range(left, right, block):
        base, count = np.uint64(start), np.uint64(min(block, right - start))
        S[:], Q[:] = 0, 0
        for first in range(0, n, chunk):
            s[:], squares[:] = 0, 0
            for c in range(first, min(first + chunk, n)):
                shift = sum_type(0 if exponents is None else exponents[0, c])
                zero = sum_type(zero_point if exponents is None else exponents[1, c])
                for k in range(count):
                    u = np.left_shift(np.subtract(sum_type(q[c, base + k]), zero), shift)
                    s[k] = np.add(s[k], u)
                    squares[k] = np.add(squares[k], np.multiply(u, u))
            for k in range(count):
                S[k] += s[k]
                Q[k] += squares[k]
        for k in range(count):
            V0 = n * Q[k] - (S[k] * S[k] if centred else np.int64(0))
            scale, offset = row_scale(S[k], V0, n, m, x, h, E, cut, centred, outer)
            R[k], M[k] = lane(scale), lane(offset - (np.int64(1) << (s1 - 1)))
        for c in range(n):
            shift = lane(0 if exponents is None else exponents[0, c])
            zero = lane(zero_point if exponents is None else exponents[1, c])
            gain, offset = lane(G[c]), B[c]
            for k in range(count):
                u = np.left_shift(np.subtract(lane(q[c, base + k]), zero), shift)
                t = np.right_shift(np.subtract(np.multiply(u, R[k]), M[k]), lane(s1))
                a = np.add(np.multiply(lane(factor(t)), gain), offset)
                out[c, base + k] = out.dtype.type(min(max(np.right_shift(a, lane(s2)), lo), hi))


@_jit()
def run_sums(offer, block, q, out, residual, sums, adder, coder, arguments):
    """Compute `run` on the sums of codes, where there is a residual, and their codes too, where `sums` isn't None."""
    if team.together(offer, _sums, block, q, out, residual, sums, adder, coder, arguments):
        raise MemoryError


@_called
def _sums(counter, block, q, out, residual, sums, adder, coder, arguments):
    """Compute blocks of rows, as many as the counter gives."""
    n = len(arguments[1])
    u = np.empty((min(block, len(q)), n), np.int32)
    start = team.take(counter, block)
    while start < len(q):
        stop = min(start + block, len(q))
        rows = u[: stop - start]
        add(q[start:stop], None if residual is None else residual[start:stop], rows, *adder)
        if sums is not None:
            sum_codes(rows, sums[start:stop], *coder)
        if team.together(0, _rows, block, team.frozen(rows), out[start:stop], *arguments):
            raise MemoryError
        start = team.take(counter, block)


@_called
def add(q, residual, out, M, N, zeros, other_zeros, shift):
    """Compute the integers u of two operands, or of one where `residual` is None (equation 0), in the type of M.

    The operands' rows may be longer than those of `out`, as in `run`.
    """
    vectors.widest()
    rows, n = out.shape
    wide = M.dtype.type
    half, shift = wide((np.int64(1) << shift) >> 1), wide(shift)
    for i in range(rows):
        for k in range(n):
            total = np.add(np.multiply(np.subtract(wide(q[i, k]), zeros[k]), M[k]), half)
            if residual is not None:
                total = np.add(total, np.multiply(np.subtract(wide(residual[i, k]), other_zeros[k]), N[k]))
            out[i, k] = np.int32(np.right_shift(total, shift))


@_called
def sum_codes(u, out, shifts, zeros, lo, hi):
    """Compute the codes of the sum (equation 31); negative shifts go to the left."""
    vectors.widest()
    rows, n = u.shape
    for i in range(rows):
        for k in range(n):
            right, left = max(shifts[k], 0), max(-shifts[k], 0)
            rounded = ((np.int64(u[i, k]) << left) + ((np.int64(1) << right) >> 1)) >> right
            out[i, k] = out.dtype.type(min(max(rounded + zeros[k], lo), hi))


@_jit()
def serve(offers, count, looks):
    """Help with whatever is offered, until so many looks at all the offers have found nothing."""
    look = 0
    while look < looks:
        for k in range(count):
            if team.join(offers + k * team.OFFER):
                look = 0
        team.rest()
        look += 1
