"""Random specs of everything that can be planned, for property tests, and the hardest rows of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import reject
from hypothesis import strategies as st
from rows import KINDS, LANES, Codes, adversarial, exponents_of, layer_of, noise

from fxp_layernorm import DType, LayerNorm, LayerNormSpec, PlanError, QuantParams, RMSNorm, plan
from fxp_layernorm.hardware import PRESETS, Hardware

NARROW = [dtype for dtype in DType if dtype.bits <= 16]
WIDE = [dtype for dtype in DType if dtype.bits > 16]
SIZES = st.integers(1, 150)


@st.composite
def params(draw: st.DrawFn, n: int, dtypes: Sequence[DType] = NARROW, *, reach: float | None = None) -> QuantParams:
    """Return parameters of any code range, zero point and kind of scale; `reach` is about what the codes cover."""
    dtype, narrow = draw(st.sampled_from(dtypes)), draw(st.booleans())
    lo, hi = dtype.lo + narrow, dtype.hi
    zero_point = draw(st.sampled_from([lo, hi, (lo + hi + 1) // 2]) | st.integers(lo, hi))
    if draw(st.integers(0, 2)) == 0:
        zero_point = np.random.default_rng(draw(st.integers(0, 9))).integers(lo, hi, n, endpoint=True).tolist()
    scale = 2 * reach / (hi - lo) if reach is not None else 2.0 ** draw(st.floats(-14, 2))
    kind, seed = draw(st.sampled_from(["tensor", "tensor", "exponents", "scales"])), draw(st.integers(0, 9))
    if kind == "exponents":
        return QuantParams(
            dtype, scale, zero_point, exponents_of(n, draw(st.sampled_from([1, 5, 15])), seed=seed), narrow_range=narrow
        )
    if kind == "scales":
        octaves = draw(st.sampled_from([0.5, 4.0]))
        scales = scale * np.exp2(-octaves * np.random.default_rng(seed).random(n))
        return QuantParams(dtype, scales.max(), zero_point, channel_scales=scales, narrow_range=narrow)
    return QuantParams(dtype, scale, zero_point, narrow_range=narrow)


@st.composite
def hardware(draw: st.DrawFn) -> Hardware | str | None:
    """Return no limits, a preset, or any limits."""
    if (named := draw(st.sampled_from([None, None, None, *PRESETS, "random"]))) != "random":
        return named
    return Hardware(
        multiplier=(draw(st.integers(10, 32)), draw(st.integers(10, 32))),
        accumulator=draw(st.none() | st.integers(20, 64)),
        lanes=tuple(draw(st.lists(st.sampled_from(LANES), min_size=1, unique=True))),
        offset=draw(st.sampled_from([0, 0, 7, 16])),
        root=draw(st.none() | st.integers(8, 31)),
        radicand=draw(st.integers(36, 62)),
    )


@st.composite
def layers(draw: st.DrawFn, n: int, unit: float) -> LayerNorm | RMSNorm:
    """Return a layer whose eps may be nothing, far below or far above the variance of codes worth `unit`."""
    layer = layer_of(
        draw(st.sampled_from(KINDS)),
        n,
        gamma=draw(st.floats(0, 2)),
        beta=draw(st.floats(0, 5)),
        eps=draw(st.sampled_from([0.0, 1e-12, 1e-5]) | st.floats(-30, 30).map(lambda e: unit**2 * 2.0**e)),
        seed=draw(st.integers(0, 99)),
    )
    layer.eps_outside = draw(st.booleans())
    if layer.eps_outside:
        layer.eps = math.sqrt(layer.eps)
    return layer


@st.composite
def specs(
    draw: st.DrawFn,
    sizes: st.SearchStrategy[int] = SIZES,
    *,
    inputs: Sequence[DType] = NARROW * 5 + WIDE * 4,
    residuals: Sequence[DType | None] = (*[None] * 60, *NARROW, *WIDE),
    outputs: Sequence[DType] = NARROW,
) -> LayerNormSpec:
    """Return whatever the planner takes; what it refuses is not counted as an example."""
    size = draw(sizes)
    qi = draw(params(size, inputs))
    residual = draw(st.sampled_from(residuals))
    options: dict[str, Any] = {"hardware": draw(hardware())}
    if residual is not None:
        reach = (qi.hi - qi.lo) * qi.scale / 2
        options["residual"] = draw(params(size, [residual], reach=reach * 2.0 ** draw(st.floats(-12, 12))))
        if draw(st.booleans()):
            sums = draw(params(size, NARROW, reach=reach * 2.0 ** draw(st.floats(-3, 3))))
            options["sum_output"] = QuantParams(sums.dtype, sums.scale, sums.zero_point, sums.exponents)
    layer = draw(layers(size, qi.scale))
    qo = draw(params(size, outputs, reach=2.0 ** draw(st.floats(-2, 6))))
    try:
        return plan(layer, qi, qo, **options)
    except PlanError:
        reject()


def rows_of(spec: LayerNormSpec, *, seed: int = 0, budget: int = 2000) -> list[Codes]:
    """Return codes of each operand: adversarial rows and noise, each set of rows against the other operand's."""
    limit = max(4, budget // spec.n)
    rows = [
        np.concatenate([adversarial(params, spec.n, limit, seed=seed), noise(params, spec.n, 2, seed=seed)])
        for params in spec.operands
    ]
    count = min(map(len, rows))
    if len(rows) == 1:
        return rows
    # the operands' rows at the same end, at opposite ones, and whatever else the second one has
    first, second = (codes[:count] for codes in rows)
    return [np.concatenate([first] * 3), np.concatenate([second, second[::-1], np.roll(second, seed, axis=0)])]
