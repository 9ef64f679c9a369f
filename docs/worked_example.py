"""Print the generated blocks of arithmetic.md: the tie table of section 9 and the worked example of section 11."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from fxp_layernorm import LayerNorm, LayerNormSpec, QuantParams, plan, reference

CODES = [4, -10, 25, -3, 60, 7]


def example_spec() -> LayerNormSpec:
    """Return the spec of the example: six int8 codes, one channel with an exponent, one without a gain."""
    layer = LayerNorm(6, eps=1e-3)
    layer.weight = np.array([1.0, -0.5, 2.0, 0.0, 1.5, 0.75])
    layer.bias = np.array([0.0, 0.25, -0.125, 0.5, 1.0, -1.0])
    return plan(layer, QuantParams("int8", 0.05, -3, [0, 0, 0, 0, 1, 0]), QuantParams("int8", 0.02, 5))


def example() -> str:
    """Return every integer of one row, by equation."""
    spec = example_spec()
    st = reference.row_stages(spec, CODES)
    V0 = (st.V - spec.E) >> 2 * spec.h
    d = st.S - spec.n * st.c
    j = spec.m - ((st.V.bit_length() + 1) >> 1)
    x = spec.K + spec.h + j
    assert spec.lane < 64  # so that k = 0
    p = [(u - st.c) * st.R - st.D for u in st.u]
    a = [t * G + B for t, G, B in zip(st.t, spec.G, spec.B, strict=True)]
    ideal = reference.ideal(spec, np.array(CODES, dtype=spec.input.dtype.numpy))
    lines = [
        f"lane {spec.lane}  n {spec.n}  m {spec.m}  K {spec.K}  h {spec.h}  E {spec.E}  s1 {spec.s1}  s2 {spec.s2}"
        f"  z {spec.input.zero_point}  lo {spec.output.lo}  hi {spec.output.hi}",
        _row("    e", spec.input.channel_exponents(spec.n)),
        _row("    G", spec.G),
        _row("    B", spec.B),
        _row("    q", CODES),
        _row("(0) u", st.u),
        f"(1) S = {st.S}",
        f"(2) Q = {st.Q}",
        f"(3) V0 = {V0}   V = {st.V}",
        f"(4) b = {st.V.bit_length()}   j = {j}   r = {st.r}   x = {x}   k = 0   R = {st.R}",
        f"(5) c = {st.c}   d = {d}   D = {st.D}",
        _row("(6) p", p),
        _row("(7) t", st.t),
        _row("(8) a", a),
        _row("(9) y", st.y),
        _row("ideal", [f"{value:.4f}" for value in ideal]),
        f"excess {spec.excess:.6f} LSB",
    ]
    return "\n".join(lines) + "\n"


def ties() -> str:
    """Return how (v + 2) >> 2 rounds v / 4, beside the rules that it is not."""
    lines = ["   v    v/4   half up   half even   half away   truncated after +1/2"]
    for v in (-10, -7, -6, -5, -2, -1, 0, 1, 2, 5, 6, 7, 10):
        exact = Fraction(v, 4)
        away = int(math.copysign(abs(v) + 2 >> 2, v))
        truncated = int((v + 2) / 4)
        lines.append(f"{v:4d}  {v / 4:5.2f}   {(v + 2) >> 2:7d}   {round(exact):9d}   {away:9d}   {truncated:20d}")
    return "\n".join(lines) + "\n"


def _row(name: str, values: list[int] | list[str] | tuple[int, ...]) -> str:
    return f"{name:5s} " + "".join(f"{value:>11}" for value in values)


if __name__ == "__main__":
    print(ties())
    print(example(), end="")
