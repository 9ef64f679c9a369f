"""How near the worst rows come to the proved bound: the table of docs/arithmetic.md, section 12.

python benchmarks/exactness.py prints it, --write puts it there. For each configuration a layer of 768 elements is run
on typical rows, and a search climbs from random rows towards the largest error before the final rounding, first for
that layer, then changing its gains, offsets and output scale too. An error in one channel depends on the row by S, Q
and the channel's own u alone, so that a thousand rows are changed, a few codes each, and judged at once.
"""

from __future__ import annotations

import argparse
import copy
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from fxp_layernorm import (
    FxpLayerNorm,
    LayerNorm,
    LayerNormSpec,
    NormKind,
    PlanError,
    QuantParams,
    RMSNorm,
    plan,
    reference,
)
from fxp_layernorm.adder import code_multipliers
from fxp_layernorm.benchmark import environment
from fxp_layernorm.hardware import PRESETS

PAGE = Path(__file__).parents[1] / "docs" / "arithmetic.md"
Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.longdouble]


@dataclass(frozen=True)
class Effort:
    """How long a row is, how many rows are searched at once, for how many steps, and with how many other layers."""

    n: int
    typical: int
    rows: int
    steps: int
    layers: int
    layer_steps: int


FULL = Effort(n=768, typical=1500, rows=1024, steps=3000, layers=20, layer_steps=250)
QUICK = Effort(n=48, typical=20, rows=32, steps=60, layers=2, layer_steps=20)


@dataclass(frozen=True)
class Configuration:
    """One row of the table: what is planned."""

    name: str
    input: QuantParams
    output: QuantParams
    options: dict[str, Any]
    kind: NormKind = NormKind.LAYERNORM
    eps_outside: bool = False

    def layer(self, n: int) -> LayerNorm | RMSNorm:
        """Return a layer with lognormal gains of either sign."""
        rng = np.random.default_rng(n)
        weight = rng.lognormal(0.0, 0.3, n) * rng.choice([-1.0, 1.0], n)
        if self.kind is NormKind.RMSNORM:
            rms = RMSNorm(n, 1e-5, eps_outside=self.eps_outside)
            rms.weight = weight
            return rms
        layer = LayerNorm(n, 1e-5, eps_outside=self.eps_outside)
        layer.weight, layer.bias = weight, 0.2 * rng.standard_normal(n)
        return layer

    def plan(self, layer: LayerNorm | RMSNorm, octaves: float = 0.0) -> LayerNormSpec:
        """Plan it, with an output scale so many octaves above the usual one."""
        output = replace(self.output, scale=self.output.scale * 2.0**octaves)
        return plan(layer, self.input, output, **self.options)


def sizes(n: int) -> npt.NDArray[np.float64]:
    """Return the standard deviation of each channel: one in fifty is an outlier, 20 times as large."""
    rng = np.random.default_rng(n + 1)
    size = rng.lognormal(0.0, 0.5, n)
    size[rng.permutation(n)[: max(1, n // 50)]] *= 20
    return size


def configurations(n: int) -> Iterator[Configuration]:
    """Yield the rows of the table."""
    size = sizes(n)
    reach = 4.5 * float(size.max())

    def params(dtype: str, largest: float = reach, **options: Any) -> QuantParams:
        base = QuantParams(dtype, 1.0, **options)
        return replace(base, scale=largest / base.hi)

    def spread(dtype: str, top: int) -> QuantParams:
        """Give channels exponents that hold their largest values, at most `top`."""
        base = params(dtype, reach / 2**top)
        exponents = np.clip(np.ceil(np.log2(4.5 * size / (base.scale * base.hi))), 0, top).astype(int)
        return QuantParams(dtype, base.scale, 0, exponents)

    in8, in16, out8, out16 = params("int8"), params("int16"), params("int8", 8.0), params("int16", 8.0)
    for lane in (24, 32, 64):
        yield Configuration(f"8 -> 8, lane {lane}", in8, out8, {"lane": lane})
    for lane in (24, 32):
        yield Configuration(f"8 -> 8, exponents up to 7, lane {lane}", spread("int8", 7), out8, {"lane": lane})
    zeros = tuple(np.random.default_rng(n + 2).integers(-100, 101, n).tolist())
    own = replace(spread("int8", 7), zero_point=zeros), replace(out8, zero_point=zeros)
    yield Configuration("8 -> 8, the same and a zero point a channel on both sides", *own, {"lane": 32})
    for lane in (24, 32):
        yield Configuration(f"16 -> 8, lane {lane}", in16, out8, {"lane": lane})
    for lane in (32, 64):
        yield Configuration(f"16 -> 16, lane {lane}", in16, out16, {"lane": lane})
    yield Configuration("16 -> 16, exponents up to 3, lane 64", spread("int16", 3), out16, {"lane": 64})
    for lane in (24, 32):
        yield Configuration(f"RMSNorm 8 -> 8, lane {lane}", in8, out8, {"lane": lane}, NormKind.RMSNORM)
    yield Configuration("RMSNorm 16 -> 16, lane 64", in16, out16, {"lane": 64}, NormKind.RMSNORM)
    for name, source in (("8", in8), ("16", in16)):
        options = {"residual": params("int8", reach * 0.7), "sum_output": params("int8", reach * 1.3)}
        yield Configuration(f"{name} + 8 -> 8 and the sum at 8", source, out8, options)
    yield Configuration("8 -> 8, eps outside", in8, out8, {}, eps_outside=True)
    yield Configuration("16 -> 16, eps outside", in16, out16, {}, eps_outside=True)
    yield Configuration("8 -> 4", in8, params("int4", 4.0), {})
    yield Configuration("4 -> 4", params("int4", 9.0), params("int4", 4.0), {})
    yield Configuration("20 -> 8, accumulators", params("int20"), out8, {})
    yield Configuration("32 -> 8, accumulators", params("int32"), out8, {})
    yield Configuration(
        "8 -> 8, -127 to 127", params("int8", narrow_range=True), params("int8", 8.0, narrow_range=True), {}
    )
    scales = tuple((4.5 * size / 127).tolist())
    yield Configuration("8 -> 8, a scale a channel", QuantParams("int8", max(scales), 0, None, scales), out8, {})
    for name in PRESETS:
        yield Configuration(f"8 -> 8, `{name}`", in8, out8, {"hardware": name})
    for bits, output in ((8, out8), (16, out16)):
        yield Configuration(f"16 -> {bits}, `carried24`", in16, output, {"hardware": "carried24"})
    yield Configuration(
        "8 + 8 -> 8, `carried24`", in8, out8, {"residual": params("int8", reach * 0.7), "hardware": "carried24"}
    )


class Search:
    """Rows that climb towards the largest error, each of them in one channel of its own."""

    def __init__(self, spec: LayerNormSpec, rows: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.codes: list[Integers] = []
        for params in spec.operands:  # of any size, around any value: what a row needs is found by climbing
            width = (params.hi - params.lo) * 2.0 ** -rng.uniform(0, params.dtype.bits, (rows, 1))
            centre = np.choose(rng.integers(0, 3, (rows, 1)), [params.channel_zeros(spec.n), params.lo, params.hi])
            self.codes.append(_clip(params, centre + width * rng.standard_normal((rows, spec.n))))
        self.start(spec)

    def start(self, spec: LayerNormSpec) -> None:
        """Judge the rows by a spec with the same inputs."""
        self.spec = spec
        steps, zero = spec.output.channel_steps(spec.n).astype(np.longdouble), spec.output.channel_zeros(spec.n)
        self.gain = np.asarray(spec.gamma, dtype=np.longdouble) / steps
        self.offset = np.asarray(spec.beta, dtype=np.longdouble) / steps + zero
        self.G, self.B = np.array(spec.G, dtype=np.int64), np.array(spec.B, dtype=np.int64)
        self.M = code_multipliers(spec.n, spec.operands, spec.adder)
        rows = len(self.codes[0])
        # half of the rows in the channel whose bound is the largest, the others wherever gains are large
        likely = np.argsort(-np.abs(self.gain))[: max(1, spec.n // 16)]
        self.channel = np.where(np.arange(rows) % 2, spec.excess.channel, self.rng.choice(likely, rows))
        u = self.integers([codes[:, :] for codes in self.codes], np.arange(spec.n))
        self.S, self.Q = u.sum(axis=1), np.square(u).sum(axis=1)
        self.error = errors(self, self.S, self.Q, u[np.arange(rows), self.channel], self.channel)

    def integers(self, codes: list[Integers], channels: Integers) -> Integers:
        """Return u of codes of each operand that stand in these channels (equation 0)."""
        adder = self.spec.adder
        total: Any = 0 if adder is None else adder.half
        for operand, params, M in zip(codes, self.spec.operands, self.M, strict=True):
            total = total + (operand - params.channel_zeros(self.spec.n)[channels]) * M[channels]
        return np.asarray(total >> (0 if adder is None else adder.shift), dtype=np.int64)

    def step(self) -> None:
        """Change a few codes of each row, and keep what isn't worse."""
        rng, n, (rows, _) = self.rng, self.spec.n, self.codes[0].shape
        count = min(int(rng.choice([1, 1, 2, 3, 8])), n)
        every = np.arange(rows)
        # different channels, among them the row's own in half of the cases
        stride = rng.integers(1, n // count + 1, (rows, 1))
        first = np.where(rng.random(rows) < 0.5, self.channel, rng.integers(0, n, rows))[:, None]
        channels = (first + stride * np.arange(count)) % n
        old = [codes[every[:, None], channels] for codes in self.codes]
        new, which = list(old), int(rng.integers(len(old)))
        params = self.spec.operands[which]
        width = 2.0 ** rng.uniform(0, params.dtype.bits, (rows, 1))
        moved = old[which] + np.rint(width * rng.standard_normal((rows, count)))
        near = old[which] + rng.choice([-1, 1], (rows, count))
        kind = rng.random((rows, 1))
        zeros = params.channel_zeros(n)[channels]
        end = np.choose(rng.integers(0, 3, (rows, count)), [params.lo, params.hi, zeros])
        new[which] = _clip(params, np.where(kind < 0.5, near, np.where(kind < 0.95, moved, end)))
        before, after = self.integers(old, channels), self.integers(new, channels)
        S = self.S + (after - before).sum(axis=1)
        Q = self.Q + (np.square(after) - np.square(before)).sum(axis=1)
        own = channels == self.channel[:, None]
        alone = [codes[every, self.channel] for codes in self.codes]
        u = np.where(own.any(axis=1), (after * own).sum(axis=1), self.integers(alone, self.channel))
        error = errors(self, S, Q, u, self.channel)
        better = np.flatnonzero(error >= self.error)
        self.codes[which][better[:, None], channels[better]] = new[which][better]
        self.S[better], self.Q[better], self.error[better] = S[better], Q[better], error[better]

    def climb(self, steps: int) -> None:
        """Take so many steps; now and then the best quarter of the rows takes the place of the worst one."""
        for k in range(steps):
            self.step()
            if k % 100 == 99:
                order, quarter = np.argsort(self.error), len(self.error) // 4
                worst, best = order[:quarter], order[len(order) - quarter :]
                for array in (*self.codes, self.S, self.Q, self.error, self.channel):
                    array[worst] = array[best]

    def best(self) -> tuple[float, list[Integers]]:
        """Return the largest error in LSB and its row, both as the reference has them."""
        row = int(np.argmax(self.error))
        codes = [operand[row] for operand in self.codes]
        return seen(self.spec, codes), codes


def errors(search: Search, S: Integers, Q: Integers, u: Integers, channel: Integers) -> npt.NDArray[np.float64]:
    """Return |a / 2**s2 - f| for elements of rows with these sums (equations 3 to 8), -1 where f is out of range."""
    spec, n = search.spec, search.spec.n
    centred = spec.kind is NormKind.LAYERNORM
    V0 = n * Q - (S * S if centred else 0)
    V = np.maximum((V0 << 2 * spec.h) + spec.E, 1)
    bits = np.frexp(V.astype(np.float64))[1].astype(np.int64)
    bits -= (V >> (bits - 1)) == 0  # where the float was rounded up to a power of two
    j = spec.m - ((bits + 1) >> 1)
    w = (V << 2 * np.maximum(j, 0)) >> 2 * np.maximum(-j, 0)
    r = np.sqrt(w.astype(np.float64)).astype(np.int64)
    r -= r * r > w
    r += (r + 1) * (r + 1) <= w
    if spec.A:
        k = np.minimum(j, spec.l)
        r = (r >> np.minimum(j - k, 62)) + (spec.A >> np.minimum(spec.l - k, 62))
        above = r >> spec.m
        r, j = r >> above, k - above
    x = spec.K + spec.h + j
    y = np.maximum(x - (62 - n.bit_length()), 0) if spec.lane == 64 else np.zeros_like(x)
    R = np.where(V0 > 0, (((n << (x - y)) + (r >> 1)) // r) << y, 0)
    c = (2 * S + n) // (2 * n) if centred else np.zeros_like(S)
    D = (2 * (S - n * c) * R + n) // (2 * n) if centred else np.zeros_like(S)
    t = ((u - c) * R - D + (1 << (spec.s1 - 1))) >> spec.s1
    a = t * search.G[channel] + search.B[channel]

    real = np.longdouble
    eps, scale, wide = real(spec.eps), real(spec.scale), V0.astype(real)
    root = np.sqrt(wide) + n * eps / scale if spec.eps_outside else np.sqrt(wide + real(n) ** 2 * eps / scale**2)
    deviation = (n * u - (S if centred else 0)).astype(real)
    normalized = deviation / np.where(V0 > 0, root, real(1))
    f = search.gain[channel] * normalized + search.offset[channel]
    inside = (f >= spec.output.lo - 0.5) & (f <= spec.output.hi + 0.5)
    return np.where(inside, np.abs(a / real(2**spec.s2) - f), real(-1)).astype(np.float64)


def seen(spec: LayerNormSpec, codes: list[Integers]) -> float:
    """Return a row's largest error before the final rounding, in LSB, from the reference's integers."""
    stages = reference.row_stages(spec, *(operand.tolist() for operand in codes))
    a = np.array([t * G + B for t, G, B in zip(stages.t, spec.G, spec.B, strict=True)])
    f = reference.ideal(spec, *_stored(spec, codes))
    inside = (f >= spec.output.lo - 0.5) & (f <= spec.output.hi + 0.5)
    return float(np.abs(a / np.longdouble(2**spec.s2) - f)[inside].max(initial=0))


@dataclass(frozen=True)
class Measured:
    """What one configuration gave; errors in LSB."""

    name: str
    lane: int
    differing: float
    largest: int
    seen: float
    proved: float
    searched: float
    cost: float | None


def measure(configuration: Configuration, effort: Effort) -> Measured:
    """Run typical rows, then search."""
    n, rng = effort.n, np.random.default_rng(0)
    layer, octaves = configuration.layer(n), 0.0
    spec = configuration.plan(layer)
    search = Search(spec, effort.rows, rng)
    search.climb(effort.steps)
    found, worst = search.best()
    values = rng.standard_normal((len(spec.operands), effort.typical, n)) * sizes(n)
    typical = [params.quantize(x).astype(np.int64) for params, x in zip(spec.operands, values, strict=True)]
    rows = _stored(spec, [np.vstack([operand, row]) for operand, row in zip(typical, worst, strict=True)])
    y = FxpLayerNorm(spec)(rows[0], residual=rows[1] if len(rows) > 1 else None)
    rounded = np.clip(np.floor(reference.ideal(spec, *rows) + 0.5), spec.output.lo, spec.output.hi)
    off = np.abs(y - rounded)

    best = found / spec.excess
    for _ in range(effort.layers):
        other, change = copy.deepcopy(layer), octaves + 0.3 * rng.standard_normal()
        few = rng.integers(0, n, 3)
        few[0] = search.spec.excess.channel
        other.weight = layer.gamma.copy()
        other.weight[few] *= np.exp(0.3 * rng.standard_normal(3))
        if isinstance(other, LayerNorm):
            other.bias = layer.beta.copy()
            other.bias[few] += 0.3 * rng.standard_normal(3)
        try:
            search.start(configuration.plan(other, change))
        except PlanError:  # a gain too large for the output scale
            continue
        search.climb(effort.layer_steps)
        ratio = search.best()[0] / search.spec.excess
        if ratio > best:
            best, layer, octaves = ratio, other, change
    cost = None
    if "hardware" in configuration.options:
        free = {name: value for name, value in configuration.options.items() if name != "hardware"}
        cost = float(spec.excess) - float(replace(configuration, options=free).plan(configuration.layer(n)).excess)
    return Measured(
        configuration.name,
        spec.lane,
        float((off[:-1] > 0).mean()),
        int(off.max()),
        found,
        float(spec.excess),
        best,
        cost,
    )


def table(effort: Effort, progress: Callable[[str], None]) -> str:
    """Return the table as Markdown, and what it was measured on."""
    lines = [
        "| configuration | lane | codes that differ | largest difference, LSB | excess seen, LSB | excess proved, LSB "
        "| seen / proved | the same, any layer | cost of the limits, LSB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for configuration in configurations(effort.n):
        progress(configuration.name)
        m = measure(configuration, effort)
        lines.append(
            f"| {m.name} | {m.lane} | {100 * m.differing:.2g} % | {m.largest} | {m.seen:.3g} | {m.proved:.3g} "
            f"| {m.seen / m.proved:.2f} | {m.searched:.2f} | {'' if m.cost is None else f'{m.cost:+.3g}'} |"
        )
    found = environment()
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("python", "fxp-layernorm", "numpy"))
    checked = effort.rows * (effort.steps + effort.layers * effort.layer_steps)
    return "\n".join(
        [
            *lines, "",
            f"n = {effort.n}, {effort.typical:,} typical rows and {checked:,} searched ones for each configuration; "
            f"{versions} ({found['cpu']}).", "",
        ]
    )  # fmt: skip


def _clip(params: QuantParams, values: npt.NDArray[Any]) -> Integers:
    clipped: Integers = np.clip(np.rint(values), params.lo, params.hi).astype(np.int64)
    return clipped


def _stored(spec: LayerNormSpec, codes: list[Integers]) -> list[npt.NDArray[Any]]:
    return [operand.astype(params.dtype.numpy) for operand, params in zip(codes, spec.operands, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short rows and a short search, to try it out")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.name}")
    options = parser.parse_args()
    console = Console(stderr=True)
    with console.status("") as status:
        text = table(QUICK if options.quick else FULL, lambda name: status.update(name))
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        page = re.sub(r"(?<=<!-- printed -->\n).*(?=<!-- end -->)", lambda _: text, page, flags=re.S)
        PAGE.write_text(page, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
