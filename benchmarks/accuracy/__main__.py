"""Prints docs/accuracy.md's tables; ``--write`` puts them there, ``--json FILE`` keeps the figures."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fxp_layernorm.benchmark import environment

from .cases import CASES, Case, Problem
from .peers import PEERS, Peer

PAGE = Path(__file__).parents[2] / "docs" / "accuracy.md"
BITS = (8, 16)
IDEAL, OURS = PEERS[0].name, PEERS[1].name


@dataclass(frozen=True)
class Measured:
    """One peer on one case: errors against the ideal in LSB of the common grid, SQNR in real units.

    `not_finite` is the share of outputs that are NaN or infinite; where there are any, the errors are None.
    """

    sqnr_db: float | None
    rms_lsb: float | None
    max_lsb: float | None
    differing: float | None
    not_finite: float


def measure(peer: Peer, problems: Iterable[Problem]) -> Measured:
    """Return a peer's errors over the rows of some problems."""
    signal = noise = squares = largest = 0.0
    count = bad = differing = 0
    for problem in problems:
        y = np.asarray(peer.run(problem), dtype=np.float64)
        bad += int(np.count_nonzero(~np.isfinite(y)))
        count += y.size
        y = np.clip(y, problem.output.dtype.lo, problem.output.dtype.hi)
        error = y - problem.ideal
        signal += float(np.square(problem.ideal * problem.output.scale).sum())
        noise += float(np.square(error * problem.output.scale).sum())
        squares += float(np.square(error).sum())
        largest = max(largest, float(np.abs(error).max()))
        differing += int(np.count_nonzero(y != np.floor(problem.ideal + 0.5)))
    if bad:
        return Measured(None, None, None, None, bad / count)
    return Measured(10 * math.log10(signal / noise), math.sqrt(squares / count), largest, differing / count, 0.0)


def run(cases: Iterable[Case] = CASES) -> dict[int, dict[str, dict[str, Measured]]]:
    """Return what was measured, by codes' width, peer and case; peers that are not installed are left out."""
    peers = [peer for peer in PEERS if importlib.util.find_spec(peer.module)]
    found: dict[int, dict[str, dict[str, Measured]]] = {bits: {} for bits in BITS}
    for case in cases:
        for bits in BITS:
            problems = list(case.problems(bits))
            for peer in peers:
                if bits in peer.bits:
                    found[bits].setdefault(peer.name, {})[case.name] = measure(peer, problems)
        print(f"measured: {case.name}", file=sys.stderr)
    return found


def tables(found: dict[int, dict[str, dict[str, Measured]]]) -> str:
    """Return the tables in Markdown; a figure better than that of this package's default, as printed, is bold."""
    parts = []
    for bits, peers in found.items():
        parts.append(f"### {bits}-bit codes in and out\n\nSQNR, dB:\n")
        parts.append(_table(peers, lambda measured: measured.sqnr_db, "{:.2f}".format, best=max))
        parts.append("\nRMS error, LSB:\n")
        parts.append(_table(peers, lambda measured: measured.rms_lsb, "{:.4f}".format))
        parts.append("\nLargest error, LSB:\n")
        parts.append(_table(peers, lambda measured: measured.max_lsb, "{:.4f}".format))
        parts.append("\nCodes that differ from the rounded ideal, %:\n")
        parts.append(_table(peers, lambda measured: measured.differing, percent))
        parts.append("")
    return "\n".join(parts)


def percent(share: float) -> str:
    """Return a share in percent, with two digits."""
    return f"{100 * share:.2g}" if share < 0.0995 else f"{100 * share:.0f}"


def _table(
    peers: dict[str, dict[str, Measured]],
    figure: Callable[[Measured], float | None],
    form: Callable[[float], str],
    best: Callable[[float, float], float] = min,
) -> str:
    names = list(next(iter(peers.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for peer, by_case in peers.items():
        cells = [
            _cell(by_case[name], peers[OURS][name], figure, form, best, rival=peer not in (IDEAL, OURS))
            for name in names
        ]
        lines.append(f"| {peer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(
    measured: Measured,
    ours: Measured,
    figure: Callable[[Measured], float | None],
    form: Callable[[float], str],
    best: Callable[[float, float], float],
    *,
    rival: bool,
) -> str:
    value, standard = figure(measured), figure(ours)
    if value is None or standard is None:
        return f"NaN ({percent(measured.not_finite)} %)"
    text = form(value)
    shown, compared = float(text), float(form(standard))
    return f"**{text}**" if rival and shown != compared and best(shown, compared) == shown else text


def notes() -> str:
    """Return what the columns hold and how each row was fed, and on what it was measured."""
    known = environment()
    for name in ("transformers", "crfix", "onnx"):
        if importlib.util.find_spec(name):
            known["versions"][name] = importlib.metadata.version(name)
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    lines = ["Columns:", ""]
    lines += [f"- **{case.name}**: {case.meaning}" for case in CASES]
    lines += ["", "Rows:", ""]
    lines += [f"- **{peer.name}**: {peer.fed}" for peer in PEERS]
    return "\n".join([*lines, "", f"Measured with {versions} ({known['cpu']})."])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    options = parser.parse_args()
    found = run()
    text = f"{notes()}\n\n{tables(found)}"
    print(text)
    if options.write:
        page = re.sub(
            r"(?<=<!-- printed -->\n).*(?=<!-- end -->)",
            lambda _: text,
            PAGE.read_text(encoding="utf-8"),
            flags=re.DOTALL,
        )
        PAGE.write_text(page, encoding="utf-8")
    if options.json:
        figures = {
            bits: {
                peer: {case: asdict(measured) for case, measured in by_case.items()} for peer, by_case in peers.items()
            }
            for bits, peers in found.items()
        }
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
