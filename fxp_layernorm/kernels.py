"""The Numba kernels: the function of docs/arithmetic.md, compiled, on integer arrays only.

Primitives and row kernel share this file, because Numba's cache doesn't notice an edit to a callee in another one.
All integers wrap in two's complement; the widths that a spec proves are what makes the results exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray[Any]

_jit = njit(cache=True, nogil=True, error_model="numpy", boundscheck=None)


@_jit
def bit_length(value):  # type: ignore[no-untyped-def]
    """Return the bit length of an integer in [0, 2**63)."""
    bits = 0
    for step in (32, 16, 8, 4, 2, 1):
        if value >> step:
            value >>= step
            bits += step
    return bits + (1 if value else 0)


@_jit
def isqrt(w):  # type: ignore[no-untyped-def]
    """Return floor(sqrt(w)) of an integer in [0, 2**62).

    The float seed is off by one at most: w has a relative error of 2**-53 as a float64 and its root is below 2**31.
    """
    r = np.int64(np.sqrt(np.float64(w)))
    if r * r > w:
        r -= 1
    elif (r + 1) * (r + 1) <= w:
        r += 1
    return r


@_jit
def reciprocal_root(V, n, m, x, cut):  # type: ignore[no-untyped-def]
    """Return r and R of equation (4) for V > 0; `cut` is the largest shift of n before the division."""
    j = m - ((bit_length(V) + 1) >> 1)
    r = isqrt(V << (2 * j) if j >= 0 else V >> (-2 * j))
    x += j
    y = max(x - cut, 0)
    return r, ((n << (x - y)) + (r >> 1)) // r << y


@_jit
def row_scale(S, V0, n, m, x, h, E, cut, centred):  # type: ignore[no-untyped-def]
    """Return R and M = c*R + D, so that p = u*R - M (equations 3 to 6); wraps like the lane that holds p."""
    R = np.int64(0)
    if V0:
        _, R = reciprocal_root((V0 << (2 * h)) + E, n, m, x, cut)
    if not centred:
        return R, np.int64(0)
    c = (2 * S + n) // (2 * n)
    d = S - n * c
    return R, c * R + (2 * d * R + n) // (2 * n)


@_jit
def moments(codes, zero_point, exponents, accumulator, chunk):  # type: ignore[no-untyped-def]
    """Return S and Q of a row (equations 0 to 2), summed in the accumulator's type over chunks that it can hold."""
    sum_type = accumulator.dtype.type
    n = codes.size
    S, Q = np.int64(0), np.int64(0)
    for start in range(0, n, chunk):
        s, q = sum_type(0), sum_type(0)
        for k in range(start, min(start + chunk, n)):
            u = sum_type(sum_type(codes[k]) - sum_type(zero_point))
            if exponents.size:
                u = sum_type(u << (exponents[k] & 31))
            s = sum_type(s + u)
            q = sum_type(q + sum_type(u * u))
        S += s
        Q += q
    return S, Q


@_jit
def elements(codes, out, zero_point, exponents, G, B, R, M, s1, s2, lo, hi):  # type: ignore[no-untyped-def]
    """Compute a row's output codes from R and M (equations 6 to 9) in the type of G, that of the lane."""
    lane = G.dtype.type
    mask = lane(8 * G.itemsize - 1)
    R, M, zero_point = lane(R), lane(M), lane(zero_point)
    half1, half2 = lane(1) << lane(s1 - 1), lane(1) << lane(s2 - 1)
    for k in range(codes.size):
        u = lane(lane(codes[k]) - zero_point)
        if exponents.size:
            u = lane(u << (exponents[k] & 31))
        p = lane(lane(u * R) - M)
        t = lane(lane(p + half1) >> (s1 & mask))
        a = lane(lane(t * G[k]) + B[k])
        y = lane(lane(a + half2) >> (s2 & mask))
        out[k] = min(max(y, lo), hi)


@_jit
def run(q, out, zero_point, exponents, G, B, constants, centred, accumulator, chunk):  # type: ignore[no-untyped-def]
    """Compute rows of codes."""
    lane = G.dtype.type
    n = q.shape[1]
    m, x, h, E, cut, s1, s2, lo, hi = constants
    for i in range(q.shape[0]):
        S, Q = moments(q[i], zero_point, exponents, accumulator, chunk)
        R, M = row_scale(S, n * Q - (S * S if centred else 0), n, m, x, h, E, cut, centred)
        elements(q[i], out[i], zero_point, exponents, G, B, R, M, s1, s2, lane(lo), lane(hi))
