"""The row stage, equations (3) to (5): without branches and in 64 bits, so that a loop over rows becomes vectors.

Roots and quotients are float64 seeds that integers put right, so they are those of the definition whatever the seeds'
last bits. Specs of narrow lanes promise more, by a flag that is None for others and so known when the code is compiled:
`short` is True where roots have 26 bits at most, and R and u are below 2**31 - 1.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

from typing import Any

import numpy as np

from .compiled import inlined


@inlined
def bit_length(value):
    """Return the bit length of an integer in [0, 2**63)."""
    # without ones that follow a one, the float isn't rounded up to a power of 2
    exponent: Any = np.float64(value & ~(value >> 1)).view(np.int64) >> 52
    return max(exponent - 1022, 0)


@inlined
def isqrt(w, short):
    """Return floor(sqrt(w)) of an integer in [0, 2**62), or in [0, 2**52) if `short`.

    The float seed is off by one at most: w has a relative error of 2**-53 as a float64 and its root is below 2**31. If
    w < 2**52, then neither w nor the root of k*k - 1 is rounded up, as that is below k by 2**-27 or more.
    """
    r = np.int64(np.sqrt(np.float64(w)))
    if short is None:
        r -= np.int64(r * r > w)
        r += np.int64((r + 1) * (r + 1) <= w)
    return r


@inlined
def product(x, y, short):
    """Return x*y; of 32 bits each if `short`, which is one instruction where 64 are three."""
    return x * y if short is None else np.int64(np.int32(x)) * np.int64(np.int32(y))


@inlined
def floor_divide(a, b, inverse, short):
    """Return floor(a / b) for |a| < 2**63 and 0 < b < 2**32, given 1.0 / b.

    If `short`, b and the quotient's magnitude are below 2**31 - 1. The float quotient has a relative error below
    2**-51, so that a short one is off by one at most, which integers decide. What others leave of a is below
    2**12 + 2*b in magnitude and exact as a float64, which makes a second quotient as good.
    """
    quotient = np.int64(np.floor(np.float64(a) * inverse))
    rest = a - product(quotient, b, short)
    if short is None:
        step = np.int64(np.floor(np.float64(rest) * inverse))
        quotient += step
        rest -= step * b
    return quotient + np.int64(rest >= b) - np.int64(rest < 0)


@inlined
def reciprocal_root(V, n, m, x, cut, outer, short):
    """Return r and R of equation (4) for V > 0.

    `cut` is the largest shift of n before the division; `outer` holds A and l, or is None without eps outside the root.
    """
    j = m - ((bit_length(V) + 1) >> 1)
    r = isqrt((V << 2 * max(j, 0)) >> 2 * max(-j, 0), short)
    if outer is not None:  # the roots have 31 bits at most, and shifts beyond that leave nothing
        k = min(j, outer[1])
        r = (r >> min(j - k, 32)) + (outer[0] >> min(outer[1] - k, 32))
        above = r >> m
        r, j = r >> above, k - above
    x += j
    y = max(x - cut, 0) if short is None else np.int64(0)
    return r, floor_divide((n << (x - y)) + (r >> 1), r, 1.0 / np.float64(r), short) << y


@inlined
def row_scale(S, V0, n, m, x, h, E, cut, centred, outer, short):
    """Return R and M = c*R + D, so that p = u*R - M (equations 3 to 6); wraps like the lane that holds p."""
    _, R = reciprocal_root(max((V0 << 2 * h) + E, 1), n, m, x, cut, outer, short)
    R = R if V0 else np.int64(0)
    inverse = 0.5 / np.float64(n)
    c = floor_divide(2 * S + n, 2 * n, inverse, True)
    d = S - product(n, c, True)
    M = product(c, R, short) + floor_divide(2 * product(d, R, short) + n, 2 * n, inverse, short)
    return R, M if centred else np.int64(0)


@inlined
def row_scales(count, n, exponents, constants, outer, short, words, S, Q, X, N):
    """Put R and M of rows in the place of S and Q, for `plain_elements`, and X and N for the vectors.

    M holds the rounding half of (7), and the zero point too if there are no exponents. X and N are R and M of codes
    less what the vectors take from them, in their height. For `words` X is -1 where t of the lowest or the highest
    code leaves its words.
    """
    m, x, h, E, cut, centred = constants[1], constants[2], constants[3], constants[4], constants[5], constants[9] != 0
    zero_point, origin = (constants[0], constants[15]) if exponents is None else (np.int64(0), np.int64(0))
    base, rise, minus_rise, s1 = constants[13], constants[16], constants[17], constants[6]
    limit, lowest, highest = constants[11], constants[14], constants[18]
    half = np.int64(1) << (s1 - 1)
    # the variance is that of codes from any origin, and the mean moves with it; sums of squares want the zero point
    shift = np.int64(0) if centred else zero_point - origin
    lead = origin if centred else zero_point
    for k in range(count):
        V0 = n * Q[k] - S[k] * (S[k] if centred else 2 * n * shift) + n * n * shift * shift
        scale, offset = row_scale(S[k], V0, n, m, x, h, E, cut, centred, outer, short)
        offset += product(lead, scale, short) - half
        S[k], Q[k] = scale, offset
        X[k], N[k] = scale << rise, (offset - product(base, scale, short)) << minus_rise
    if words is not None and limit < 1 << 62:
        for k in range(count):
            low, high = product(lowest, S[k], short) - Q[k], product(highest, S[k], short) - Q[k]
            X[k] = X[k] if -limit <= low >> s1 and high >> s1 < limit else np.int64(-1)
