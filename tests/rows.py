"""Layers, parameters and rows of codes: typical ones, and those that go for the widths and the bound."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from fxp_layernorm import DType, LayerNorm, NormKind, QuantParams, RMSNorm

Codes = npt.NDArray[Any]

KINDS = list(NormKind)
LANES = [24, 32, 64]
#: The types that fill their storage.
DTYPES = [DType.INT8, DType.UINT8, DType.INT16, DType.UINT16]
PAIRINGS = list(itertools.product(DTYPES, DTYPES))
#: Output LSB are chosen so that typical values, within 8 standard deviations, cover the codes.
REACH = 8.0


def layer_of(
    kind: NormKind, n: int, *, gamma: float = 0.3, beta: float = 0.2, eps: float = 1e-5, seed: int = 0
) -> LayerNorm | RMSNorm:
    """Return a layer with gains of random sign, lognormal with this sigma, and normal offsets."""
    rng = np.random.default_rng(seed)
    weight = np.exp(gamma * rng.standard_normal(n)) * rng.choice([-1.0, 1.0], n)
    if kind is NormKind.RMSNORM:
        rms = RMSNorm(n, eps)
        rms.weight = weight
        return rms
    layer = LayerNorm(n, eps)
    layer.weight, layer.bias = weight, beta * rng.standard_normal(n)
    return layer


def params_of(dtype: DType | str, reach: float = REACH, *, exponents: npt.ArrayLike | None = None) -> QuantParams:
    """Return parameters whose codes cover -reach to reach, with a zero point a little off the middle."""
    dtype = DType.parse(dtype)
    zero_point = (dtype.lo + dtype.hi + 1) // 2 - 5
    return QuantParams(dtype, 2 * reach / (dtype.hi - dtype.lo), zero_point, exponents)  # type: ignore[arg-type]


def exponents_of(n: int, largest: int, *, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return channel exponents from 0 to `largest`, both of them present where there are channels enough."""
    exponents = np.random.default_rng(seed).integers(0, largest + 1, n)
    exponents[0], exponents[-1] = 0, largest
    return exponents


def typical(params: QuantParams, n: int, rows: int, *, outliers: float = 20.0, seed: int = 0) -> Codes:
    """Return normal rows that reach the codes' ends, a channel in fifty `outliers` times as large as the rest."""
    rng = np.random.default_rng(seed)
    size = np.ones(n)
    size[rng.permutation(n)[: n // 50]] = outliers
    values = rng.standard_normal((rows, n)) * size
    half = (params.hi - params.lo) / 2
    return _clip(params, params.channel_zeros(n) + np.rint(values * half / max(4.0, 2.5 * float(size.max()))))


def noise(params: QuantParams, n: int, rows: int, *, seed: int = 0) -> Codes:
    """Return rows of codes that are equally likely."""
    rng = np.random.default_rng(seed)
    return rng.integers(params.lo, params.hi, (rows, n), endpoint=True).astype(params.dtype.numpy)


def adversarial(params: QuantParams, n: int, limit: int | None = None, *, seed: int = 0) -> Codes:
    """Return the first `limit` of the rows that reach the widths' and the bound's ends, the sharpest ones first."""
    rng = np.random.default_rng(seed)
    lo, hi, zero = params.lo, params.hi, params.channel_zeros(n)
    k = np.arange(n)
    periods = [p for p in (2, 6, n // 4, n // 3, n - 1) if p > 1]
    rows = [
        np.where(k < n // 2, hi, lo),  # the largest variance
        np.where(k == n - 1, hi, lo),  # the largest normalized value, from a spike
        np.where(k == n - 1, hi - 1, hi),  # the smallest variance that is not 0, and a huge mean
        zero + _toward(params, zero) * (k == n // 2),  # the same around 0, which is RMSNorm's smallest
        np.where(k == 0, lo, hi),
        hi - rng.integers(0, 2, n),
        lo + rng.integers(0, 2, n),
        np.where(k % 2 == 0, lo, hi),
        np.where(k == 0, lo + 1, lo),
        np.full(n, lo),
        np.full(n, hi),
        zero,
        lo + (hi - lo) * k // max(n - 1, 1),  # a ramp
        equal_integers(params, n),
        equal_integers(params, n) + (k == 0),
        *(np.where(k // p % 2 == 0, hi, lo) for p in periods),
    ]
    return _clip(params, np.stack(rows[:limit]))


def equal_integers(params: QuantParams, n: int) -> npt.NDArray[np.int64]:
    """Return a row whose integers u are all equal though its codes may differ (by the channel exponents)."""
    exponents = np.array(params.channel_exponents(n))
    zero = params.channel_zeros(n)
    row = zero + _toward(params, zero) * np.left_shift(1, exponents.max() - exponents)
    inside = (row >= params.lo) & (row <= params.hi)
    return row if inside.all() else np.array(zero)


def _toward(params: QuantParams, codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return 1, or -1 where that is beyond the codes."""
    return np.where(codes < params.hi, 1, -1)


def _clip(params: QuantParams, values: npt.NDArray[Any]) -> Codes:
    clipped: Codes = np.clip(values, params.lo, params.hi).astype(params.dtype.numpy)
    return clipped
