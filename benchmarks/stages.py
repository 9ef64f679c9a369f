"""Where the kernel's time goes: moments, row stage and elements over n, and whole calls over the number of rows.

Prints a table, and draws docs/performance.svg:  python benchmarks/stages.py --plot docs/performance.svg
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit
from rich.console import Console
from rich.table import Table

from fxp_layernorm.benchmark import PAIRINGS, Pairing, environment
from fxp_layernorm.inference import FxpLayerNorm
from fxp_layernorm.kernels import vectors
from fxp_layernorm.kernels.elements import second_pass
from fxp_layernorm.kernels.moments import first_pass
from fxp_layernorm.kernels.row_stage import row_scales

LENGTHS = (16, 32, 64, 128, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
ROWS = tuple(1 << k for k in range(15))
#: Codes for each measurement: they and their output stay in a cache of 1 MB.
ELEMENTS = 1 << 18

_jit = njit(nogil=True, error_model="numpy")


@_jit
def moments(q, n, S, Q, exponents, constants, accumulator, in_bytes, in_words):  # type: ignore[no-untyped-def]
    """Run the first pass alone."""
    vectors.widest()
    for start in range(0, len(q), 64):
        rows = slice(start, start + 64)
        count = min(64, len(q) - start)
        first_pass(q, start, count, n, exponents, constants, accumulator, in_bytes, in_words, S[rows], Q[rows])


@_jit
def row_stage(S, Q, R, M, X, N, n, exponents, constants, outer, short, words):  # type: ignore[no-untyped-def]
    """Run the row stage alone."""
    vectors.widest()
    R[:], M[:] = S, Q
    for start in range(0, S.size, 64):
        rows = slice(start, min(start + 64, S.size))
        row_scales(rows.stop - start, n, exponents, constants, outer, short, words, R[rows], M[rows], X[rows], N[rows])


@_jit
def elements(q, out, exponents, G, B, R, M, X, N, constants, ends, words, longs):  # type: ignore[no-untyped-def]
    """Run the second pass alone."""
    vectors.widest()
    for start in range(0, len(q), 64):
        rows = slice(start, start + 64)
        count, x, y = min(64, len(q) - start), X[rows], N[rows]
        second_pass(
            q, out, start, count, start + count, exponents, G, B, R[rows], M[rows], x, y, constants, ends, words, longs
        )


def fastest(call: Callable[[], object], seconds: float = 0.2) -> float:
    """Return the shortest time of a call: what the code takes where nothing disturbs it."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def codes_and_norm(pairing: Pairing, rows: int, n: int) -> tuple[np.ndarray[Any, Any], FxpLayerNorm]:
    """Return codes of three quarters of the type's range, and a norm for them."""
    limits = np.iinfo(pairing.input)
    low, high = int(limits.min) * 3 // 4, int(limits.max) * 3 // 4
    return np.random.default_rng(0).integers(low, high, (rows, n)).astype(pairing.input), pairing.norm(n)


def stages(pairing: Pairing, n: int) -> dict[str, float]:
    """Return the nanoseconds a row of each stage, of the whole call and of a copy."""
    rows = max(ELEMENTS // n, 8)
    q, norm = codes_and_norm(pairing, rows, n)
    out = norm(q)
    exponents, G, B, constants, accumulator, outer, ends, short, in_bytes, in_words, words, longs = norm._arguments
    S, Q, R, M, X, N = np.zeros((6, rows + 7 & -8), dtype=np.int64)
    calls: dict[str, Callable[[], object]] = {
        "moments": lambda: moments(q, n, S, Q, exponents, constants, accumulator, in_bytes, in_words),
        "row stage": lambda: row_stage(S, Q, R, M, X, N, n, exponents, constants, outer, short, words),
        "elements": lambda: elements(q, out, exponents, G, B, R, M, X, N, constants, ends, words, longs),
        "call": lambda: norm(q, out=out, threads=1),
        "copy": lambda: np.copyto(out, q, casting="unsafe"),
    }
    return {name: fastest(call) / rows * 1e9 for name, call in calls.items()}


def calls_over_rows(pairing: Pairing, n: int = 768) -> dict[int, float]:
    """Return the microseconds of a call for each number of rows, one thread."""
    times = {}
    for rows in ROWS:
        q, norm = codes_and_norm(pairing, rows, n)
        out = norm(q)
        times[rows] = fastest(lambda norm=norm, q=q, out=out: norm(q, out=out, threads=1)) * 1e6  # type: ignore[misc]
    return times


def draw(path: str, by_length: dict[int, dict[str, float]], by_rows: dict[str, dict[int, float]]) -> None:
    """Draw both as one figure."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "fxp-layernorm"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    lengths = list(by_length)
    parts = [[by_length[n][stage] / n for n in lengths] for stage in ("moments", "row stage", "elements")]
    left.stackplot(
        lengths, parts, labels=("moments", "row stage", "elements"), colors=("#9ecae1", "#fdae6b", "#3182bd")
    )
    left.plot(lengths, [by_length[n]["call"] / n for n in lengths], "k-", label="whole call")
    left.plot(lengths, [by_length[n]["copy"] / n for n in lengths], "k:", label="copy")
    left.set(
        xscale="log", xlabel="n, elements a row", ylabel="ns an element", title="int8 -> int8, by stage", ylim=(0, None)
    )
    left.legend()
    for name, times in by_rows.items():
        right.plot(list(times), list(times.values()), label=name)
    right.set(xscale="log", yscale="log", xlabel="rows of 768", ylabel="us a call", title="Whole calls, one thread")
    right.legend()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--plot", metavar="FILE", help="draw the figure, too; needs matplotlib")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(environment()["cpu"])
    for pairing in PAIRINGS:
        table = Table(
            "n", "moments", "row stage", "elements", "call", "copy", "call, Gelem/s", title=f"{pairing}, ns a row"
        )
        by_length = {}
        for n in LENGTHS if pairing is PAIRINGS[0] else (64, 768, 4096):
            by_length[n] = times = stages(pairing, n)
            table.add_row(f"{n:,}", *(f"{value:,.1f}" for value in times.values()), f"{n / times['call']:.2f}")
        console.print(table)
        if pairing is PAIRINGS[0]:
            lengths = by_length
    if arguments.plot:
        draw(arguments.plot, lengths, {str(pairing): calls_over_rows(pairing) for pairing in PAIRINGS})


if __name__ == "__main__":
    main()
