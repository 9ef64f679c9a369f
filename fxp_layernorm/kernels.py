"""The Numba kernels: the function of docs/arithmetic.md, compiled, on integer arrays only.

Primitives and row kernel share this file, because Numba's cache doesn't notice an edit to a callee in another one.
All integers wrap in two's complement; the widths that a spec proves are what makes the results exact.

Numba widens int32 operands to int64, and LLVM then can't narrow the shifts again. So what must stay in 32 bits, to
fill the vectors, is written with NumPy's functions (`np.multiply`, `np.right_shift`, ...), which keep the type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

#: So many channels are done in all rows of a block before the next, as their G and B then stay in the first cache.
TILE = 2048
#: So many columns are done together, where rows lie across: their codes of all channels should stay in the cache.
COLUMNS = 256


def _jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return Numba's decorator; what it compiles is cached, unless no folder for it is writable."""
    options = {"nogil": True, "error_model": "numpy", **options}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)

    return decorate


#: For what a loop over rows or channels calls: LLVM makes vectors only of loops without calls.
_inlined = _jit(forceinline=True)


@intrinsic
def _widest_vectors(typing_context):  # type: ignore[no-untyped-def]
    """Let the caller's loops use 512-bit vectors, where the CPU has them.

    No instruction of its own, but a hint: LLVM prefers 256 bits on Intel's AVX-512 cores. With it the element stage
    (vpmulld, vpsravd, vpmovsdb) takes 0.75 times as long, and the moments (vpdpwssd) 0.7 times.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        # set.add, because llvmlite knows no attributes in quotes but prints whatever the set holds
        set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.void(), codegen


@_inlined
def bit_length(value):  # type: ignore[no-untyped-def]
    """Return the bit length of an integer in [0, 2**63)."""
    # the exponent of the float is one too large where the integer was rounded up to a power of 2
    exponent: Any = np.float64(value).view(np.int64) >> 52
    bits = max(exponent - 1022, 1)
    return bits - np.int64((value >> (bits - 1)) == 0)


@_inlined
def isqrt(w):  # type: ignore[no-untyped-def]
    """Return floor(sqrt(w)) of an integer in [0, 2**62).

    The float seed is off by one at most: w has a relative error of 2**-53 as a float64 and its root is below 2**31.
    """
    r = np.int64(np.sqrt(np.float64(w)))
    r -= np.int64(r * r > w)
    return r + np.int64((r + 1) * (r + 1) <= w)


@_inlined
def floor_divide(a, b, inverse):  # type: ignore[no-untyped-def]
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
def reciprocal_root(V, n, m, x, cut, outer):  # type: ignore[no-untyped-def]
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
def row_scale(S, V0, n, m, x, h, E, cut, centred, outer):  # type: ignore[no-untyped-def]
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
def moments(q, i, n, zero_point, exponents, accumulator, chunk, split):  # type: ignore[no-untyped-def]
    """Return S and Q of row i (equations 0 to 2), Q modulo 2**64.

    Sums over chunks that the accumulator's type holds. If `split`, squares reach 31 bits: their sum is then kept
    modulo 2**32, and beside it the sum of their upper halves, which says what the modulus took away. Without exponents
    the zero point is left to the end.
    """
    sum_type = accumulator.dtype.type
    zero = sum_type(zero_point)
    # the codes' middle, as far as it isn't 0; bytes are taken without a sign, which spares half of their product
    origin = np.int64(0)
    if exponents is None:
        if q.itemsize == 1:
            origin = np.int64(0 if q.dtype.type(-1) > 0 else -128)
        elif q.dtype.type(-1) > 0:
            origin = np.int64(32768)
    S, Q = np.int64(0), np.int64(0)
    for start in range(0, n, chunk):
        s, squares, upper = sum_type(0), sum_type(0), sum_type(0)
        for k in range(np.uint64(start), np.uint64(min(start + chunk, n))):
            u = sum_type(q[i, k])
            if exponents is not None:
                u = np.left_shift(np.subtract(u, zero) if zero else u, sum_type(exponents[k]))
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
    if exponents is None:
        shift = zero_point - origin
        return S - n * shift, Q - 2 * shift * S + n * shift * shift
    return S, Q


@_inlined
def elements(q, out, i, start, stop, zero_point, exponents, G, B, R, M, s1, s2, ends):  # type: ignore[no-untyped-def]
    """Compute output codes of row i (equations 6 to 9) in the type of B, that of the lane.

    M and B hold their rounding halves, and M the zero point too if there are no exponents. A type of G that is
    narrower than the lane promises that t fits it as well, which halves the work of their product. `ends` holds the
    lowest and the highest code, or is None where they are those of the output's type: LLVM then takes the instruction
    that saturates.
    """
    lane, factor = B.dtype.type, G.dtype.type
    R, M, zero, s1, s2 = lane(R), lane(M), lane(zero_point), lane(s1), lane(s2)
    limits = np.iinfo(out.dtype)
    lo, hi = (lane(limits.min), lane(limits.max)) if ends is None else (lane(ends[0]), lane(ends[1]))
    for k in range(np.uint64(start), np.uint64(stop)):
        u = lane(q[i, k])
        if exponents is not None:
            u = np.left_shift(np.subtract(u, zero) if zero else u, lane(exponents[k]))
        t = np.right_shift(np.subtract(np.multiply(u, R), M), s1)
        a = np.add(np.multiply(lane(factor(t)), lane(G[k])), B[k])
        out[i, k] = out.dtype.type(min(max(np.right_shift(a, s2), lo), hi))


@_jit()
def run(q, out, exponents, G, B, constants, accumulator, outer, ends):  # type: ignore[no-untyped-def]
    """Compute rows of codes, in blocks that stay in the cache between the two passes over them.

    The rows of `q` and `out` may be longer than n, the length of G: what follows is not looked at.
    """
    _widest_vectors()  # type: ignore[call-arg]
    rows, n = len(q), len(G)
    zero_point, m, x, h, E, cut, s1, s2, chunk, centred, split = (
        constants[0], constants[1], constants[2], constants[3], constants[4], constants[5],
        constants[6], constants[7], constants[8], constants[9] != 0, constants[10] != 0,
    )  # fmt: skip
    folded = zero_point if exponents is None else np.int64(0)
    block = max(1, min(rows, max(8, min(64, 65536 // n))))
    S, Q, R, M = np.empty((4, block), np.int64)
    for start in range(0, rows, block):
        count = min(block, rows - start)
        for k in range(count):
            S[k], Q[k] = moments(q, start + k, n, zero_point, exponents, accumulator, chunk, split)
        for k in range(count):
            V0 = n * Q[k] - (S[k] * S[k] if centred else np.int64(0))
            scale, offset = row_scale(S[k], V0, n, m, x, h, E, cut, centred, outer)
            R[k], M[k] = scale, offset + folded * scale - (np.int64(1) << (s1 - 1))
        for left in range(0, n, TILE):
            right = min(left + TILE, n)
            for k in range(count):
                elements(q, out, start + k, left, right, zero_point, exponents, G, B, R[k], M[k], s1, s2, ends)


@_jit()
def run_columns(q, out, left, right, exponents, G, B, constants, accumulator, outer, ends):  # type: ignore[no-untyped-def]
    """Compute `run` where rows lie across: positions from left to right of arrays of shape (n, positions).

    Vectors go along the positions.
    """
    _widest_vectors()  # type: ignore[call-arg]
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
                shift = sum_type(0 if exponents is None else exponents[c])
                for k in range(count):
                    u = np.left_shift(np.subtract(sum_type(q[c, base + k]), sum_type(zero_point)), shift)
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
            shift = lane(0 if exponents is None else exponents[c])
            gain, offset = lane(G[c]), B[c]
            for k in range(count):
                u = np.left_shift(np.subtract(lane(q[c, base + k]), lane(zero_point)), shift)
                t = np.right_shift(np.subtract(np.multiply(u, R[k]), M[k]), lane(s1))
                a = np.add(np.multiply(lane(factor(t)), gain), offset)
                out[c, base + k] = out.dtype.type(min(max(np.right_shift(a, lane(s2)), lo), hi))


@_jit()
def add(q, residual, out, M, N, zero_points, shift):  # type: ignore[no-untyped-def]
    """Compute the integers u of two operands, or of one where `residual` is None (equation 0), in the type of M.

    The operands' rows may be longer than those of `out`, as in `run`.
    """
    _widest_vectors()  # type: ignore[call-arg]
    rows, n = out.shape
    wide = M.dtype.type
    first, second = wide(zero_points[0]), wide(zero_points[1])
    half, shift = wide((np.int64(1) << shift) >> 1), wide(shift)
    for i in range(rows):
        for k in range(n):
            total = np.add(np.multiply(np.subtract(wide(q[i, k]), first), M[k]), half)
            if residual is not None:
                total = np.add(total, np.multiply(np.subtract(wide(residual[i, k]), second), N[k]))
            out[i, k] = np.int32(np.right_shift(total, shift))


@_jit()
def sum_codes(u, out, shifts, zero_point, lo, hi):  # type: ignore[no-untyped-def]
    """Compute the codes of the sum (equation 31); negative shifts go to the left."""
    _widest_vectors()  # type: ignore[call-arg]
    rows, n = u.shape
    for i in range(rows):
        for k in range(n):
            right, left = max(shifts[k], 0), max(-shifts[k], 0)
            rounded = ((np.int64(u[i, k]) << left) + ((np.int64(1) << right) >> 1)) >> right
            out[i, k] = out.dtype.type(min(max(rounded + zero_point, lo), hi))
