"""The first pass, equations (0) to (2): S and Q of the rows of a block."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from . import products, vectors
from .compiled import BLOCK, inlined

#: Sums in 32 bits are carried over into 64 after so many codes: their squares, by 16 bits at a time, reach 2**31.
CARRY = 1 << 15
#: The rows whose sums the vectors take at a time. What is left of a block repeats its last row.
ROWS = vectors.rows(8)


@inlined
def byte_sums(q, rows, count, S, Q, k):
    """Add the sums of rows' codes of 8 bits, less the lowest of their type, and those of their squares, from k on."""
    ones, middle = vectors.spread(np.int8(1)), vectors.spread(np.int8(-128))
    for start in range(0, count, CARRY):
        s = squares = vectors.zero(rows)
        for i in range(start, min(start + CARRY, count), BLOCK):
            codes = vectors.load_bytes(q, rows, i)
            other = vectors.xor(codes, middle)
            # of v from 0 to 255 and v - 128; the product of bytes takes one without a sign and one with it
            v, w = (codes, other) if q.dtype.type(-1) > 0 else (other, codes)
            s, squares = products.dot_bytes(s, v, ones), products.dot_bytes(squares, v, w)
        vectors.add_sums(S, k, s, 0)
        vectors.add_sums(Q, k, vectors.add(squares, vectors.shift_left(s, vectors.spread(np.int32(7)))), 0)


@inlined
def first_half(q, rows, i, weights, zeros):
    """Return the first words of a block of rows' codes (equation 0), in the height and less the zeros of the tables."""
    if weights is None:
        return products.first_words(q, rows, i)
    words = products.first_weighted(q, rows, i, weights)
    return words if zeros is None else vectors.subtract(words, vectors.load_words(zeros, 0, i))


@inlined
def second_half(q, rows, i, weights, zeros):
    """Return the other words of a block."""
    if weights is None:
        return products.second_words(q, rows, i)
    words = products.second_weighted(q, rows, i, weights)
    return words if zeros is None else vectors.subtract(words, vectors.load_words(zeros, 32, i))


@inlined
def word_sums(q, rows, count, S, Q, k):
    """Add the sums of rows' codes of 16 bits, less the middle of an unsigned type, and those of their squares.

    Squares have 31 bits: their sum is kept modulo 2**32, beside that of their upper halves, which tells what is lost.
    """
    ones = vectors.as_words(vectors.spread(np.int32(0x10001)))
    for start in range(0, count, CARRY):
        s = squares = upper = vectors.zero(rows)
        for i in range(start, min(start + CARRY, count), BLOCK):
            words = first_half(q, rows, i, None, None)
            s, squares = products.dot(s, words, ones), products.dot(squares, words, words)
            upper = products.dot(upper, products.multiply_high(words, words), ones)
            words = second_half(q, rows, i, None, None)
            s, squares = products.dot(s, words, ones), products.dot(squares, words, words)
            upper = products.dot(upper, products.multiply_high(words, words), ones)
        vectors.add_sums(S, k, s, 0)
        vectors.add_sums(Q, k, upper, 16)
        high = vectors.shift_left(upper, vectors.spread(np.int32(16)))
        vectors.add_sums(Q, k, vectors.subtract(squares, high), 0)


@inlined
def weighted_sums(q, rows, count, weights, zeros, carry, S, Q, k):
    """Add the sums of rows' u (equation 0) and those of their squares; codes of 8 bits with channel exponents.

    The sum of as many squares in a lane as `carry` allows stays below 2**32.
    """
    ones = vectors.as_words(vectors.spread(np.int32(0x10001)))
    for start in range(0, count, carry):
        s = squares = vectors.zero(rows)
        for i in range(start, min(start + carry, count), BLOCK):
            words = first_half(q, rows, i, weights, zeros)
            s, squares = products.dot(s, words, ones), products.dot(squares, words, words)
            words = second_half(q, rows, i, weights, zeros)
            s, squares = products.dot(s, words, ones), products.dot(squares, words, words)
        vectors.add_sums(S, k, s, 0)
        vectors.add_sums(Q, k, products.widen(squares), 0)


@inlined
def plain_sums(q, i, start, n, exponents, accumulator, chunk, split, origin):
    """Return the sums of row i's codes from `start` on, less the origin, or of their u, and those of their squares.

    They are summed over chunks that the accumulator's type holds. If `split`, squares reach 31 bits: their sum is then
    kept modulo 2**32, and beside it the sum of their upper halves, which says what the modulus took away. `exponents`
    holds the channels' exponents and their zero points.
    """
    sum_type = accumulator.dtype.type
    S, Q = np.int64(0), np.int64(0)
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
    return S, Q


@inlined
def word_pass(q, start, count, whole, weights, zeros, carry, S, Q):
    """Add the sums of whole blocks of rows' codes as words: with channel exponents if there are weights.

    The tables come one by one, as Numba counts the references to what is taken from a tuple, here once for all rows.
    """
    width = q.shape[1]
    for k in range(0, count, len(ROWS)):
        rows = vectors.place(ROWS, count - k - 1, (start + k) * width, width)
        if weights is None:
            word_sums(q, rows, whole, S, Q, k)
        else:
            weighted_sums(q, rows, whole, weights, zeros, carry, S, Q, k)


@inlined
def byte_pass(q, start, count, whole, S, Q):
    """Add the sums of whole blocks of rows' codes as bytes."""
    width = q.shape[1]
    for k in range(0, count, len(ROWS)):
        byte_sums(q, vectors.place(ROWS, count - k - 1, (start + k) * width, width), whole, S, Q, k)


@inlined
def first_pass(q, start, count, n, exponents, constants, accumulator, in_bytes, in_words, S, Q):
    """Compute S and Q of rows: of their codes less the origin, or of their u if there are channel exponents.

    Whole blocks of codes are left to vectors where they are faster; S and Q have room for whole `ROWS`.
    """
    chunk, split, carry, origin = constants[8], constants[10] != 0, constants[12], constants[15]
    S[:], Q[:] = 0, 0
    done = 0
    if in_bytes is not None and vectors.has_bytes():
        done = n & -BLOCK
        byte_pass(q, start, count, done, S, Q)
    if in_words is not None and vectors.has_words():
        done = n & -BLOCK
        word_pass(q, start, count, done, in_words[0], in_words[1], carry, S, Q)
    if done < n:
        for k in range(count):
            s, squares = plain_sums(q, start + k, done, n, exponents, accumulator, chunk, split, origin)
            S[k] += s
            Q[k] += squares
