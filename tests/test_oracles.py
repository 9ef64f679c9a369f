"""Oracles from outside: torch for the float layer, crfix for correctly rounded integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from rows import adversarial, exponents_of, noise, typical

from fxp_layernorm import LayerNorm, LayerNormSpec, NormKind, QuantParams, RMSNorm, plan, reference

Array = np.ndarray[Any, np.dtype[Any]]


def randomized(module: Any, torch: Any) -> Any:
    """Return the module in float64 with random parameters."""
    module = module.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"elementwise_affine": False}, {"elementwise_affine": False, "bias": False}, {"eps": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("shape", [6, (4, 6), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_layer_norm_is_that_of_torch(shape: Any, leading: tuple[int, ...], options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    module = randomized(torch.nn.LayerNorm(shape, **options), torch)
    layer = LayerNorm.from_torch(module)
    ours = LayerNorm(shape, **options)
    assert (
        (layer.normalized_shape, layer.eps)
        == (ours.normalized_shape, ours.eps)
        == (module.normalized_shape, module.eps)
    )
    for name in ("weight", "bias"):
        values = [getattr(each, name) for each in (module, layer, ours)]
        assert len({value is None for value in values}) == 1, name
    x = np.random.default_rng(0).standard_normal((*leading, *layer.normalized_shape))
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"elementwise_affine": False}], ids=str)
@pytest.mark.parametrize("shape", [6, (4, 6)], ids=str)
def test_rms_norm_is_that_of_torch(shape: Any, options: dict[str, Any]) -> None:
    """In float32: there torch takes float32's machine epsilon where eps is None."""
    torch = pytest.importorskip("torch")
    if not hasattr(torch.nn, "RMSNorm"):
        pytest.skip("torch.nn.RMSNorm came with torch 2.4")
    module = randomized(torch.nn.RMSNorm(shape, **options), torch).float()
    layer = RMSNorm.from_torch(module)
    x = 1e-3 * np.random.default_rng(0).standard_normal((5, *layer.normalized_shape)).astype(np.float32)
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(layer(x), expected, rtol=16 * 2.0**-24)  # no cancellation: a few roundings of float32
    np.testing.assert_allclose(RMSNorm(shape, **options).eps, layer.eps)


def test_from_torch_copies_float32_parameters_exactly() -> None:
    torch = pytest.importorskip("torch")
    module = torch.nn.LayerNorm(8)
    with torch.no_grad():
        module.weight.copy_(torch.linspace(-1, 1, 8) / 3)
    layer = LayerNorm.from_torch(module)
    np.testing.assert_array_equal(layer.gamma, module.weight.detach().numpy().astype(np.float64))
    with torch.no_grad():
        module.weight.zero_()
    assert layer.gamma.any()


FRACTION_IN, FRACTION_GAMMA, FRACTION_BETA = 5, 12, 12
#: crfix is asked for this many more bits than the output has, rounded down: where the real value lies in its LSB.
FINER = 10


def crfix_layer_norm(spec: LayerNormSpec, q: Array, finer: int, mode: str) -> Array:
    """Return crfix's rows in output LSB / 2**finer; it has no zero points, exponents or RMSNorm, so they are folded in.

    An RMSNorm is the first half of the LayerNorm of (u, -u), whose mean is 0.
    """
    crfix = pytest.importorskip("crfix")
    n = spec.n
    u = (q.astype(np.int64) - spec.input.zero_point) << np.array(spec.input.channel_exponents(n))
    fraction_out = round(-np.log2(spec.output.scale))
    down = np.array(spec.output.channel_exponents(n))
    fold = int(down.max())
    gamma = np.array([round(g * 2**FRACTION_GAMMA) for g in spec.gamma]) << (fold - down)
    beta = np.array([round(b * 2**FRACTION_BETA) for b in spec.beta]) << (fold - down)
    beta += spec.output.zero_point << (FRACTION_BETA + fold - fraction_out)
    if spec.kind is NormKind.RMSNORM:
        u, gamma, beta = np.concatenate([u, -u], axis=1), np.tile(gamma, 2), np.tile(beta, 2)
    found: Array = crfix.layernorm(
        u, FRACTION_IN, fraction_out + finer, eps=round(spec.eps * 2**20), fe=20,
        gamma=gamma, fg=FRACTION_GAMMA + fold, beta=beta, fb=FRACTION_BETA + fold, bits=32, mode=mode,
    )  # fmt: skip
    return found[:, :n].astype(np.int64)


def crfix_spec(kind: NormKind, n: int, source: str, target: str, *, e_in: int, e_out: int, lane: int) -> LayerNormSpec:
    """Return a spec whose scales, eps, gains and offsets crfix holds exactly: all are short binary fractions."""
    rng = np.random.default_rng(n)
    eps = 2.0**-17
    layer = RMSNorm(n, eps) if kind is NormKind.RMSNORM else LayerNorm(n, eps)
    layer.weight = np.rint(np.exp(0.3 * rng.standard_normal(n)) * 2**FRACTION_GAMMA) / 2**FRACTION_GAMMA
    if isinstance(layer, LayerNorm):
        layer.bias = np.rint(0.3 * rng.standard_normal(n) * 2**FRACTION_BETA) / 2**FRACTION_BETA
    zero_in = {"int8": -7, "uint8": 121, "int16": 0, "uint16": 32_768}[source]
    zero_out = {"int8": 9, "uint8": 130, "int16": -300, "uint16": 33_000}[target]
    scale_out = 2.0**-4 if target in ("int8", "uint8") else 2.0**-12
    return plan(
        layer,
        QuantParams(source, 2.0**-FRACTION_IN, zero_in, exponents_of(n, e_in) if e_in else None),
        QuantParams(target, scale_out, zero_out, exponents_of(n, e_out, seed=1) if e_out else None),
        lane=lane,
    )


@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize("n", [16, 100, 768])
@pytest.mark.parametrize(
    ("source", "target", "e_in", "e_out", "lane"),
    [
        ("int8", "int8", 0, 0, 24),
        ("uint8", "int8", 0, 0, 32),
        ("int8", "uint8", 5, 3, 32),
        ("int8", "int16", 0, 0, 64),
        ("int16", "int8", 0, 0, 32),
        ("uint16", "uint16", 0, 0, 64),
    ],
)
def test_codes_are_those_of_crfix_but_next_to_a_tie(
    source: str, target: str, e_in: int, e_out: int, lane: int, n: int, kind: NormKind
) -> None:
    """Equal wherever the real value is further than `excess` from a tie, and one LSB apart at most where it isn't."""
    spec = crfix_spec(kind, n, source, target, e_in=e_in, e_out=e_out, lane=lane)
    q = np.concatenate([adversarial(spec.input, n), noise(spec.input, n, 8), typical(spec.input, n, 12)])
    lo, hi = spec.output.dtype.lo, spec.output.dtype.hi
    y = reference.run(spec, q).astype(np.int64)
    rounded = np.clip(crfix_layer_norm(spec, q, 0, "nearest"), lo, hi)
    floor = crfix_layer_norm(spec, q, FINER, "down")  # the real value lies from floor to floor + 1

    assert np.abs(y - rounded).max() <= np.ceil(spec.excess)
    below = (floor + (1 << (FINER - 1))) & ((1 << FINER) - 1)  # how far above the last tie
    margin = int(np.ceil(spec.excess * 2**FINER))
    clear = (below > margin) & (below + 1 < (1 << FINER) - margin)
    np.testing.assert_array_equal(y[clear], rounded[clear])
    assert clear.mean() > 0.9  # else the comparison says little


@pytest.mark.parametrize("kind", NormKind)
def test_the_ideal_lies_where_crfix_has_it(kind: NormKind) -> None:
    """To 2**-10 LSB, without a rounding in common."""
    spec = crfix_spec(kind, 100, "int8", "int16", e_in=4, e_out=2, lane=64)
    q = np.concatenate([adversarial(spec.input, 100), typical(spec.input, 100, 40)])
    floor = crfix_layer_norm(spec, q, FINER, "down")
    np.testing.assert_array_equal(np.floor(reference.ideal(spec, q) * 2**FINER).astype(np.int64), floor)


def test_at_a_tie_crfix_goes_to_even_and_this_package_up() -> None:
    """(1, -1) normalizes to itself for eps = 0: ties at -2.5, -1.5, ... 2.5; away from zero would be a third rule."""
    betas = np.array([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5])
    q = np.array([[1, -1]], dtype=np.int8)
    ours, theirs = [], []
    for beta in betas:
        layer = LayerNorm(2, eps=0.0)
        layer.bias = np.array([beta, 0.0])
        spec = plan(layer, QuantParams("int8", 2.0**-FRACTION_IN), QuantParams("int8", 1.0), lane=32)
        ours.append(int(reference.run(spec, q)[0, 0]))
        theirs.append(int(crfix_layer_norm(spec, q, 0, "nearest")[0, 0]))
    assert ours == [-2, -1, 0, 1, 2, 3]
    assert theirs == [-2, -2, 0, 0, 2, 2]
