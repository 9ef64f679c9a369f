"""The rows that all are compared on: plain ones, each peer's traps, and a real model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fxp_layernorm import LayerNorm, QuantParams, demo, plan, reference
from fxp_layernorm.export import find_norms, load_model
from fxp_layernorm.quantization import DType
from fxp_layernorm.runtime import Session

Floats = npt.NDArray[np.float64]

ROWS = 128
#: Of each of the real model's norms.
REAL_ROWS = 32


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows of codes, the layer, and the grid of the output: the largest ideal value is the largest code.

    All codes are symmetric, with the zero point 0, which every peer supports.
    """

    layer: LayerNorm
    input: QuantParams
    codes: npt.NDArray[np.int64]
    bits: int

    @property
    def n(self) -> int:
        """Length of a row."""
        return self.layer.n

    @cached_property
    def output(self) -> QuantParams:
        """The common output grid."""
        dtype = DType(f"int{self.bits}")
        unit = plan(self.layer, self.input, QuantParams(dtype, 1.0))
        largest = float(np.abs(reference.ideal(unit, self.codes.astype(self.input.dtype.numpy))).max())
        return QuantParams(dtype, float(np.float32((largest or 1.0) / dtype.hi)))

    @cached_property
    def ideal(self) -> Floats:
        """The real value of the same codes, in output LSB, clamped."""
        spec = plan(self.layer, self.input, self.output)
        values = reference.ideal(spec, self.codes.astype(self.input.dtype.numpy)).astype(np.float64)
        return np.clip(values, self.output.dtype.lo, self.output.dtype.hi)


@dataclass(frozen=True)
class Case:
    """One column of the tables."""

    name: str
    meaning: str
    problems: Callable[[int], Iterator[Problem]]


def problem(layer: LayerNorm, x: Floats, bits: int, reach: float | None = None) -> Problem:
    """Return real rows as codes, of which the highest stands for `reach`, by default the largest value."""
    dtype = DType(f"int{bits}")
    scale = float(np.float32((reach or float(np.abs(x).max())) / dtype.hi))
    params = QuantParams(dtype, scale)
    return Problem(layer, params, params.quantize(x).astype(np.int64), bits)


def layer_of(n: int, eps: float = 1e-5) -> LayerNorm:
    """Return a layer with lognormal gains of random sign, and normal offsets."""
    rng = np.random.default_rng(n)
    layer = LayerNorm(n, eps)
    layer.weight = np.exp(0.3 * rng.standard_normal(n)) * rng.choice([-1.0, 1.0], n)
    layer.bias = 0.2 * rng.standard_normal(n)
    return layer


def _rows(n: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((ROWS, n))


def _plain(bits: int) -> Iterator[Problem]:
    yield problem(layer_of(512), _rows(512), bits)


def _odd_length(bits: int) -> Iterator[Problem]:
    yield problem(layer_of(1000), _rows(1000), bits)


def _large_mean(bits: int) -> Iterator[Problem]:
    for n in (512, 1000):
        yield problem(layer_of(n), 20 + _rows(n), bits)


def _small_variance(bits: int) -> Iterator[Problem]:
    yield problem(layer_of(768), _rows(768), bits, reach=127 / 1.5)


def _outliers(bits: int) -> Iterator[Problem]:
    x = _rows(768)
    x[:, np.random.default_rng(2).permutation(768)[:15]] *= 20
    yield problem(layer_of(768), x, bits)


def _epsilon(bits: int) -> Iterator[Problem]:
    yield problem(layer_of(768, eps=1e-5), 10**-2.5 * _rows(768), bits)


def _constant(bits: int) -> Iterator[Problem]:
    yield problem(layer_of(768), np.repeat(np.linspace(-1, 1, ROWS)[:, None], 768, axis=1), bits)


def _zero_gain(bits: int) -> Iterator[Problem]:
    layer = layer_of(768)
    assert layer.weight is not None
    layer.weight[::96] = 0.0
    yield problem(layer, _rows(768), bits)


def real_norms() -> Iterator[tuple[LayerNorm, Floats]]:
    """Yield the norms of the demo's model, and rows of their inputs on real text."""
    model = load_model(demo.model_path())
    norms = [norm for norm in find_norms(model) if isinstance(norm.layer, LayerNorm)]
    session = Session(model, [norm.input for norm in norms])
    seen: dict[str, list[Floats]] = {norm.name: [] for norm in norms}
    for feed in demo.feeds(demo.texts()[:ROWS]):
        values = session.run(feed)
        real = feed["attention_mask"].reshape(-1) == 1
        for norm in norms:
            rows = values[norm.input].astype(np.float64)
            seen[norm.name].append(rows.reshape(-1, rows.shape[-1])[real])
    for norm in norms:
        rows = np.concatenate(seen[norm.name])
        assert isinstance(norm.layer, LayerNorm)
        yield norm.layer, rows[np.linspace(0, len(rows) - 1, REAL_ROWS).astype(np.int64)]


def _real(bits: int) -> Iterator[Problem]:
    for layer, x in real_norms():
        yield problem(layer, x, bits)


CASES = (
    Case("plain", "normal rows, n = 512", _plain),
    Case("n = 1000", "normal rows of a length that is no power of two", _odd_length),
    Case("large mean", "a mean of 20 standard deviations, n = 512 and 1000", _large_mean),
    Case("small variance", "a standard deviation of 1.5 codes of 8 bits (386 of 16 bits), n = 768", _small_variance),
    Case("outliers", "15 of 768 channels 20 times as large", _outliers),
    Case("eps", "eps as large as the variance, n = 768", _epsilon),
    Case("constant", "rows of equal values, n = 768: the output is beta", _constant),
    Case("gain 0", "8 of 768 channels with gamma = 0", _zero_gain),
    Case("MiniLM", f"{REAL_ROWS} rows of each of the sentence transformer's 13 norms, n = 384, eps 1e-12", _real),
)
