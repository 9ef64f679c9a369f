"""The kernels' vectors on CPUs that have fewer instructions than this one: other code, the same codes."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fxp_layernorm import arguments, kernels
from fxp_layernorm.kernels import elements, moments

SSE2 = "+64bit,+cmov,+cx16,+sse,+sse2"
AVX2 = f"{SSE2},+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+bmi,+bmi2,+fma,+lzcnt"
AVX512 = f"{AVX2},+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512cd"
#: By the kind of vectors: bytes, words and words with an upper half, shifted words, and 64 bits.
CHECK = """
import dataclasses, sys, numpy as np
sys.path.insert(0, sys.argv[1])
from numba.core.registry import cpu_target
from rows import KINDS, adversarial, exponents_of, layer_of, noise, params_of, typical
from fxp_layernorm import FxpLayerNorm, plan, reference
assert cpu_target.target_context.codegen().magic_tuple()[2] == sys.argv[2]
n = 200
for source, target, largest in eval(sys.argv[3]):
    exponents = exponents_of(n, largest) if largest else None
    for kind in KINDS:
        params = params_of(source, exponents=exponents)
        if largest:
            zeros = np.random.default_rng(n).integers(params.lo, params.hi, n, endpoint=True)
            params = dataclasses.replace(params, zero_point=tuple(zeros.tolist()))
        spec = plan(layer_of(kind, n), params, params_of(target))
        norm, q = FxpLayerNorm(spec), np.concatenate([f(spec.input, n, 5) for f in (adversarial, noise, typical)])
        assert any(tables is not None for tables in norm._arguments[-2:])
        np.testing.assert_array_equal(norm(q, threads=2), reference.run(spec, q))
"""
#: Two that take different ways through every vector but those of 64 bits, and the others.
QUICK = [("uint8", "int8", 3), ("int16", "uint8", 0)]
EXHAUSTIVE = [pytest.mark.slow, pytest.mark.exhaustive]
ALL = [
    *QUICK, ("int8", "uint8", 0), ("uint16", "int8", 0), ("int8", "int8", 5), ("int16", "int16", 0),
    ("int8", "uint16", 3),
]  # fmt: skip


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the features are those of x86")
@pytest.mark.parametrize(
    ("cpu", "features", "pairings"),
    [
        ("haswell", AVX2, QUICK),
        pytest.param("haswell", AVX2, ALL, marks=EXHAUSTIVE),
        pytest.param("x86-64", SSE2, ALL, marks=EXHAUSTIVE),
        pytest.param("skylake-avx512", AVX512, ALL, marks=EXHAUSTIVE),
    ],
    ids=["avx2, quick", "avx2", "sse2", "avx512 without vnni"],
)
def test_other_instructions_give_the_same_codes(
    cpu: str, features: str, pairings: list[tuple[str, str, int]], tmp_path: Path
) -> None:
    variables = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(tmp_path)}
    if pairings is QUICK:
        variables["NUMBA_BOUNDSCHECK"] = "1"  # indices are checked once
    command = [sys.executable, "-c", CHECK, str(Path(__file__).parent), features, repr(pairings)]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kernels_and_arguments_agree_on_the_size_of_a_block() -> None:
    assert arguments.BLOCK == kernels.BLOCK
    assert elements.TILE % kernels.BLOCK == 0
    assert moments.CARRY % kernels.BLOCK == 0
