"""What callers call: whole arrays of codes, by rows or by columns, and what is added before; alone or as a team."""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import numpy as np

from .. import team
from . import vectors
from .compiled import called, jit
from .elements import second_pass
from .moments import first_pass
from .row_stage import row_scale, row_scales

#: So many codes of a block of rows should stay in the first cache between the two passes over them.
BLOCK_CODES = 16384
#: The next block is fetched meanwhile if it has at most so many codes: the second cache should hold both, and outputs.
FETCHED = 65536
#: So many columns are done together, where rows lie across: their codes of all channels should stay in the cache.
COLUMNS = 256


@jit()
def run(
    offer, block, q, out, exponents, G, B, constants, accumulator, outer, ends, short, in_bytes, in_words, words, longs
):
    """Compute rows of codes, `block` at a time at most, with the threads that accept the offer (`team.together`).

    Kernels fail only for want of scratch memory, and threads of a team have nobody to raise an exception to.

    The rows of `q` and `out` may be longer than n, the length of G: what follows is not looked at. The last four
    arguments are None where vectors can't help: with the moments of bytes, or of words (the weights and zeros that
    make them of codes), and with elements in words (the same, after G and B) or in 64 bits (G and B).
    """
    if team.together(
        offer, _rows, block, q, out, exponents, G, B, constants, accumulator, outer, ends, short, in_bytes,
        in_words, words, longs,
    ):  # fmt: skip
        raise MemoryError


@called
def _rows(
    ticket, most, q, out, exponents, G, B, constants, accumulator, outer, ends, short, in_bytes, in_words, words, longs
):
    """Compute blocks of rows that stay in the cache between the two passes over them, as many as `team.take` gives."""
    vectors.widest()
    rows, n = len(q), len(G)
    block = max(1, min(rows, most, max(8, min(64, BLOCK_CODES // n & -8))))
    S, Q, X, N = np.empty((4, block + 7 & -8), np.int64)
    parts = -(-rows // block)
    part = team.take(ticket, parts)
    while part >= 0:
        start = part * block
        count = min(block, rows - start)
        first_pass(q, start, count, n, exponents, constants, accumulator, in_bytes, in_words, S, Q)
        row_scales(count, n, exponents, constants, outer, short, words, S, Q, X, N)
        later = start + team.direction(ticket) * count if count * n <= FETCHED else start
        second_pass(q, out, start, count, later, exponents, G, B, S, Q, X, N, constants, ends, words, longs)
        part = team.take(ticket, parts)


@jit()
def run_columns(offer, block, q, out, exponents, G, B, constants, accumulator, outer, ends, short):
    """Compute `run` where rows lie across, in arrays of shape (count, n, positions): `block` positions at a time."""
    if team.together(offer, _columns, block, q, out, exponents, G, B, constants, accumulator, outer, ends, short):
        raise MemoryError


@called
def _columns(ticket, block, q, out, exponents, G, B, constants, accumulator, outer, ends, short):
    """Compute blocks of positions, as many as `team.take` gives; vectors go along them."""
    blocks = -(-q.shape[2] // block)
    part = team.take(ticket, len(q) * blocks)
    while part >= 0:
        i, left = part // blocks, part % blocks * block
        right = min(left + block, q.shape[2])
        _columns_between(q[i], out[i], left, right, exponents, G, B, constants, accumulator, outer, ends, short)
        part = team.take(ticket, len(q) * blocks)


@called
def _columns_between(q, out, left, right, exponents, G, B, constants, accumulator, outer, ends, short):
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
            scale, offset = row_scale(S[k], V0, n, m, x, h, E, cut, centred, outer, short)
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


@jit()
def run_sums(offer, block, q, out, residual, sums, adder, coder, arguments):
    """Compute `run` on the sums of codes, where there is a residual, and their codes too, where `sums` isn't None."""
    if team.together(offer, _sums, block, q, out, residual, sums, adder, coder, arguments):
        raise MemoryError


@called
def _sums(ticket, block, q, out, residual, sums, adder, coder, arguments):
    """Compute blocks of rows, as many as `team.take` gives."""
    n = len(arguments[1])
    u = np.empty((min(block, len(q)), n), np.int32)
    parts = -(-len(q) // block)
    part = team.take(ticket, parts)
    while part >= 0:
        start = part * block
        stop = min(start + block, len(q))
        rows = u[: stop - start]
        add(q[start:stop], None if residual is None else residual[start:stop], rows, *adder)
        if sums is not None:
            sum_codes(rows, sums[start:stop], *coder)
        if team.together(0, _rows, block, team.frozen(rows), out[start:stop], *arguments):
            raise MemoryError
        part = team.take(ticket, parts)


@called
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


@called
def sum_codes(u, out, shifts, zeros, lo, hi):
    """Compute the codes of the sum (equation 31); negative shifts go to the left."""
    vectors.widest()
    rows, n = u.shape
    for i in range(rows):
        for k in range(n):
            right, left = max(shifts[k], 0), max(-shifts[k], 0)
            rounded = ((np.int64(u[i, k]) << left) + ((np.int64(1) << right) >> 1)) >> right
            out[i, k] = out.dtype.type(min(max(rounded + zeros[k], lo), hi))


@jit()
def serve(offers, count, looks):
    """Help with whatever is offered, until so many looks at all the offers have found nothing."""
    look = 0
    while look < looks:
        for k in range(count):
            if team.join(offers + k * team.OFFER):
                look = 0
        team.rest()
        look += 1
