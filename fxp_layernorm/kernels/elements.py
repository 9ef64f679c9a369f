"""The second pass, equations (6) to (9): the output codes of the rows of a block."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from . import products, vectors
from .compiled import BLOCK, inlined
from .moments import first_half, second_half

#: So many channels are done in all rows of a block before the next, as their G and B then stay in the first cache.
TILE = 1024


@inlined
def word_elements(q, out, row, later, start, stop, words, X, M, s2, ends, wide):
    """Compute output codes of a row by products of words (equations 6 to 9).

    X is R and M so much larger, and with it p, that t is the upper half of 32 bits, where the second product takes it
    from: its factors are pairs of words, of which the lower G is 0. Where t has more bits, `low` says how many of them
    are left in the lower half; the lower factor is then G, and the upper one so much larger. Zeros as in the second
    product pick the even and the odd words for the first one. If `wide`, X is more than a word, and its upper word's
    product is added above. Meanwhile the second cache fetches the codes of a later row.
    """
    G, B, weights, zeros, low = words
    source, target, later = row * q.shape[1], row * out.shape[1], later * q.shape[1]
    scale, minus_M = vectors.spread(np.int32(X)), vectors.spread(np.int32(-M))
    even = vectors.as_words(vectors.both(scale, vectors.spread(np.int32(0xFFFF))))
    odd = vectors.as_words(vectors.shift_left(scale, vectors.spread(np.int32(16))))
    upper = products.upper_words(scale)
    for i in range(start, stop, BLOCK):
        vectors.fetch(q, later, i)
        first, second = first_half(q, source, i, weights, zeros), second_half(q, source, i, weights, zeros)
        p0 = p1 = p2 = p3 = minus_M
        if wide:
            p0, p1 = products.add_above(minus_M, vectors.multiply(first, upper))
            p2, p3 = products.add_above(minus_M, vectors.multiply(second, upper))
        t0, t1 = products.split(products.dot(p0, first, even), low), products.split(products.dot(p1, first, odd), low)
        t2, t3 = products.split(products.dot(p2, second, even), low), products.split(products.dot(p3, second, odd), low)
        a0 = products.dot(vectors.load_ints(B, 0, i), t0, vectors.load_words(G, 0, 2 * i))
        a1 = products.dot(vectors.load_ints(B, 16, i), t1, vectors.load_words(G, 32, 2 * i))
        a2 = products.dot(vectors.load_ints(B, 32, i), t2, vectors.load_words(G, 64, 2 * i))
        a3 = products.dot(vectors.load_ints(B, 48, i), t3, vectors.load_words(G, 96, 2 * i))
        y = products.narrow(products.shift_in_turn(a0, a1, s2), products.shift_in_turn(a2, a3, s2), q, out)
        vectors.store(out, target, i, y if ends is None else vectors.clamp(y, ends[0], ends[1], out))


@inlined
def long_codes(q, row, i, weights, zeros):
    """Return 8 codes in 64 bits, or, with weights, their u (equation 0) modulo 2**52."""
    codes = products.code_longs(q, row, i)
    if weights is None:
        return codes
    return products.multiply_52(vectors.load_longs(zeros, 0, i), codes, vectors.load_longs(weights, 0, i))


@inlined
def long_elements(q, out, row, later, start, stop, longs, R, M, s1, s2, ends):
    """Compute output codes of a row in 64 bits: p modulo 2**52, of which t is 32 (6 to 9); `later` as before."""
    G, B, weights, zeros = longs
    source, target, later = row * q.shape[1], row * out.shape[1], later * q.shape[1]
    scale, minus_M, shift = vectors.spread(R), vectors.spread(-M), vectors.spread(s1)
    for block in range(start, stop, BLOCK):
        vectors.fetch(q, later, block)
        for i in range(block, block + BLOCK, 32):
            p0 = products.multiply_52(minus_M, long_codes(q, source, i, weights, zeros), scale)
            p1 = products.multiply_52(minus_M, long_codes(q, source, i + 8, weights, zeros), scale)
            p2 = products.multiply_52(minus_M, long_codes(q, source, i + 16, weights, zeros), scale)
            p3 = products.multiply_52(minus_M, long_codes(q, source, i + 24, weights, zeros), scale)
            t0, t1 = vectors.shift_right_unsigned(p0, shift), vectors.shift_right_unsigned(p1, shift)
            t2, t3 = vectors.shift_right_unsigned(p2, shift), vectors.shift_right_unsigned(p3, shift)
            # the lower 32 of each 64 bits are G of one vector at one place, and that of the other at the next
            a0 = vectors.add(vectors.load_longs(B, 0, i), products.multiply_32(t0, vectors.load_longs(G, 0, i)))
            a1 = vectors.add(vectors.load_longs(B, 8, i), products.multiply_32(t1, vectors.load_longs(G, 1, i)))
            a2 = vectors.add(vectors.load_longs(B, 16, i), products.multiply_32(t2, vectors.load_longs(G, 16, i)))
            a3 = vectors.add(vectors.load_longs(B, 24, i), products.multiply_32(t3, vectors.load_longs(G, 17, i)))
            y = products.narrow(products.shift_in_turn(a0, a1, s2), products.shift_in_turn(a2, a3, s2), q, out)
            vectors.store(out, target, i, y if ends is None else vectors.clamp(y, ends[0], ends[1], out))


@inlined
def plain_elements(q, out, i, start, stop, exponents, G, B, R, M, s1, s2, ends):
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


@inlined
def second_pass(q, out, start, count, later, exponents, G, B, R, M, X, N, constants, ends, words, longs):
    """Compute the output codes of rows, a tile of channels in all of them before the next.

    R and M are those of `plain_elements`; X and N those of `word_elements`, where X isn't negative, or N of
    `long_elements`. Meanwhile the second cache fetches the rows from `later` on.
    """
    n = len(G)
    s1, s2 = constants[6], constants[7]
    for left in range(0, n, TILE):
        right = min(left + TILE, n)
        whole = right - (right - left) % BLOCK
        plain = whole < right
        if words is not None and vectors.has_words():
            for k in range(count):
                if 0 <= X[k] < 1 << 15:
                    word_elements(q, out, start + k, later + k, left, whole, words, X[k], N[k], s2, ends, False)
                elif X[k] >= 0:
                    word_elements(q, out, start + k, later + k, left, whole, words, X[k], N[k], s2, ends, True)
                else:
                    plain = True
        elif longs is not None and vectors.has_longs():
            for k in range(count):
                long_elements(q, out, start + k, later + k, left, whole, longs, R[k], N[k], s1, s2, ends)
        else:
            plain = True
        if plain:
            for k in range(count):
                first = left
                if words is not None and vectors.has_words() and X[k] >= 0:
                    first = whole
                if longs is not None and vectors.has_longs():
                    first = whole
                if first < right:
                    scale, offset = R[k], M[k]
                    plain_elements(q, out, start + k, first, right, exponents, G, B, scale, offset, s1, s2, ends)
