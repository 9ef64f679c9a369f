"""Every consumer on every word and form, bit by bit, and the cost of each word: ``python -m benchmarks.targets``.

Consumers are taken from virtual environments of their own under ``--environments``; ``--install`` makes those that are
missing. One that can't be had is listed as not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx

import fxp_layernorm as fxp
from fxp_layernorm import reference
from fxp_layernorm.benchmark import environment
from fxp_layernorm.export import to_onnx

from .cost import cost_tables

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "targets.md"
MARK = "<!-- printed -->\n"
SECONDS = 60

#: The packages of each consumer, and how it is called in the tables.
CONSUMERS = {
    "onnxruntime": ("onnxruntime", "ONNX Runtime"),
    "reference": ("onnx", "onnx.reference"),
    "openvino": ("openvino", "OpenVINO, CPU"),
    "tract": ("tract", "tract"),
    "tvm": ("apache-tvm", "Apache TVM, LLVM"),
    "emx": ("emx-onnx-cgen", "emx-onnx-cgen, gcc"),
    "qnn": ("onnxruntime-qnn", "onnxruntime-qnn, x86 HTP"),
    "qnn_alone": ("onnxruntime-qnn", "the same, nothing on the CPU"),
}
WORDS = ("int64", "int24", "float24")
#: The forms, and the type of the graph's input and output where it is not the codes'.
FORMS: dict[str, tuple[str, str | None]] = {
    "inline": ("inline", None), "inline, int32 in and out": ("inline", "int32"), "function": ("function", None),
}  # fmt: skip
LENGTHS = (64, 120, 384, 768)
OPSETS = (13, 17, 21)
#: The codes of most models, int8 with one scale, and those of a few.
PLAIN, *OTHERS = ("plain codes", "channel exponents", "a residual add", "16-bit codes")


class Case(NamedTuple):
    """One model."""

    word: str
    form: str
    n: int
    opset: int
    dynamic: bool
    codes: str = PLAIN


CASES = [
    Case(*values)
    for grid in ((LENGTHS, OPSETS, (False, True), (PLAIN,)), (LENGTHS[:1], OPSETS[1:2], (False, True), OTHERS))
    for values in itertools.product(WORDS, FORMS, *grid)
]


#: A spec, its rows of codes, and what its outputs are to be.
_Task: TypeAlias = tuple[fxp.LayerNormSpec, list[npt.NDArray[Any]], list[npt.NDArray[Any]]]


@dataclass
class Answers:
    """What a consumer made of the cases of one word and form."""

    exact: list[Case]
    wrong: list[Case]
    refused: dict[Case, str]

    def __str__(self) -> str:
        every = [*self.exact, *self.wrong, *self.refused]
        if len(self.exact) == len(every):
            return "exact"
        parts = []
        if self.exact:
            parts.append(f"exact {_which(self.exact, every)}")
        if self.wrong:
            parts.append(f"**wrong** {_which(self.wrong, every)}".rstrip())
        for message, _ in Counter(self.refused.values()).most_common():
            cases = [case for case, found in self.refused.items() if found == message]
            parts.append(f"refused {_which(cases, every)}".rstrip() + f": {message}")
        return "; ".join(parts)


def _which(cases: list[Case], every: list[Case]) -> str:
    """Say which cases these are, in as few words as tell them apart; nothing where they are all."""
    if len(cases) == len(every):
        return ""
    found = []
    for name in ("codes", "n", "opset", "dynamic"):
        values = sorted({getattr(case, name) for case in cases})
        if len(values) == len({getattr(case, name) for case in every}):
            continue
        every = [case for case in every if getattr(case, name) in values]
        if name == "codes":
            found.append(", ".join(values))
        elif name == "dynamic":
            found.append("dynamic" if values[0] else "static")
        else:
            found.append(f"{name} {', '.join(map(str, values))}")
    return f"({'; '.join(found)})" if found else f"({len(cases)} cases)"


def spec_and_rows(n: int, codes: str = PLAIN) -> tuple[fxp.LayerNormSpec, list[npt.NDArray[Any]]]:
    """Return a LayerNorm that every word holds, and rows that go to the ends of its values, for each operand."""
    rng = np.random.default_rng(n)
    layer = fxp.LayerNorm(n)
    layer.weight = np.exp(0.3 * rng.standard_normal(n)) * rng.choice([-1.0, 1.0], n)
    layer.bias = 0.2 * rng.standard_normal(n)
    side = fxp.QuantParams("int8", 16 / 255, -5)
    if codes == "16-bit codes":
        side = fxp.QuantParams("uint16", 16 / 65535, 1 << 15)
    exponents = rng.integers(0, 8, n) if codes == "channel exponents" else None
    added = codes == "a residual add"
    spec = fxp.plan(
        layer, fxp.QuantParams(side.dtype, side.scale, side.zero_point, exponents), side, hardware="carried24",
        residual=fxp.QuantParams("int8", 10 / 255, 7) if added else None,
        sum_output=fxp.QuantParams("int8", 20 / 255, 3) if added else None,
    )  # fmt: skip
    k, low, high = np.arange(n), side.lo, side.hi
    ends = [
        np.where(k < n // 2, high, low), np.where(k == n - 1, high, low), np.where(k == n - 1, high - 1, high),
        np.where(k == 0, low, high), np.where(k % 2 == 0, low, high), np.full(n, high), np.full(n, low),
        low + (high - low) * k // (n - 1), high - rng.integers(0, 2, n), rng.integers(0, 2, n) + low,
    ]  # fmt: skip
    outliers = np.where(rng.random(n) < 0.02, 20.0, 1.0)
    unit = (high - low) / 51
    normal = np.clip(np.rint(rng.standard_normal((8, n)) * outliers * unit + side.zero_point), low, high)
    rows = np.concatenate([ends, normal, rng.integers(low, high, (6, n), endpoint=True)]).astype(side.dtype.numpy)
    return spec, [rows, rows[::-1].copy()] if added else [rows]


class Consumer:
    """A consumer in its own environment, at work on one job after the other."""

    def __init__(self, name: str, python: Path) -> None:
        script = Path(__file__).parent / "consumer.py"
        self._process = subprocess.Popen(
            [python, script, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def run(self, job: dict[str, Any]) -> str | None:
        """Return None where the job was done, else what went wrong."""
        assert self._process.stdin is not None
        print(json.dumps(job), file=self._process.stdin, flush=True)
        error: str | None = self._answer()["error"]
        return error

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # consumers print too
            if line.startswith('{"'):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError("the consumer can't be imported")


def interpreter(name: str, folder: Path, install: bool) -> Path:
    """Return the interpreter of a consumer's environment."""
    package = CONSUMERS[name][0]
    home = folder / package
    python = home / "bin" / "python"
    if not python.exists() and install:
        print(f"installing {package}", file=sys.stderr)
        venv.create(home, with_pip=True)
        packages = {package, "numpy", "onnx", *(["onnxruntime"] if "onnxruntime" in package else [])}
        subprocess.run([python, "-m", "pip", "install", "--quiet", *sorted(packages)], check=True)
    return python if python.exists() else Path(sys.executable)


def version(python: Path, package: str) -> str:
    """Return the version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def shorten(error: str, folder: str) -> str:
    """Return the telling part of a message, without what differs from run to run."""
    error = re.split(r"Stack backtrace|\bstack backtrace", error)[0]
    text = " ".join(error.replace(folder, "").replace("|", "/").split())
    text = re.sub(r"OK \([0-9.]+s\)|idx=-?\d+|#\d+ |\b(node_\w+?)_\d+\b", r"\1", text)  # what differs by model
    text = re.sub(r"_[0-9a-f]{8}\b|_[0-9a-f]{8}(?=_)|[0-9.]+ KiB|[0-9a-f]{64}", "", text)  # a function's hash, sizes
    return text if len(text) <= 160 else f"{text[:70]} ... {text[-85:]}"


def run(name: str, python: Path, cases: list[Case], jobs: int = 1) -> dict[tuple[str, str], Answers]:
    """Run a consumer on the cases, in as many processes."""
    found: dict[tuple[str, str], Answers] = {}
    for case in cases:
        found.setdefault((case.word, case.form), Answers([], [], {}))
    keys = {(case.n, case.codes) for case in cases}
    tasks = dict[tuple[int, str], _Task]()
    for key in keys:
        spec, rows = spec_and_rows(*key)
        run_spec = reference.run_with_sum if spec.sum_output is not None else reference.run
        wanted = run_spec(spec, *rows)
        tasks[key] = spec, rows, list(wanted) if isinstance(wanted, tuple) else [wanted]
    # what takes longest doesn't come last
    left = sorted(cases, key=lambda case: (case.codes != PLAIN, case.n))
    with ThreadPoolExecutor(jobs) as pool:
        for answers in pool.map(lambda _: _work(name, python, left, tasks), range(jobs)):
            for case, outcome in answers.items():
                answer = found[case.word, case.form]
                if isinstance(outcome, str):
                    answer.refused[case] = outcome
                else:
                    (answer.exact if outcome else answer.wrong).append(case)
    return found


def _work(name: str, python: Path, left: list[Case], tasks: dict[tuple[int, str], _Task]) -> dict[Case, bool | str]:
    """Take cases from the end of the list while there are any: whether each is exact, or why it was refused."""
    done: dict[Case, bool | str] = {}
    consumer = Consumer(name, python)
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            key: str(Path(folder) / end)
            for key, end in (("model", "m.onnx"), ("inputs", "q.npz"), ("outputs", "y.npz"))
        }
        while left:
            case = left.pop()
            spec, rows, wanted = tasks[case.n, case.codes]
            form, io = FORMS[case.form]
            leading = ("rows",) if case.dynamic else (len(rows[0]),)
            onnx.save(to_onnx(spec, case.word, form, leading=leading, io=io, opset=case.opset), paths["model"])
            operands = zip(("q", "residual"), rows, strict=False)
            feed: dict[str, Any] = {key: codes.astype(io or codes.dtype) for key, codes in operands}
            np.savez(paths["inputs"], **feed)
            for old in ("outputs", "error"):
                Path(paths["outputs"] + (".error" if old == "error" else "")).unlink(missing_ok=True)
            error = consumer.run({**paths, "seconds": SECONDS})
            if error is not None:
                done[case] = shorten(error, folder)
                continue
            with np.load(paths["outputs"]) as file:
                found = [file[key] for key in file.files]
                done[case] = len(found) == len(wanted) and all(
                    np.array_equal(y, codes) and y.dtype == (io or codes.dtype)
                    for y, codes in zip(found, wanted, strict=True)
                )
    consumer.close()
    return done


def main() -> None:
    """Print the tables, and write them into docs/targets.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".targets"), help="the consumers' environments")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing, with pip")
    parser.add_argument("--only", choices=CONSUMERS, action="append", help="run this consumer; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="how many models to run at a time")
    parser.add_argument("--write", action="store_true", help=f"write the tables into {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    lines = ["## Who takes what", "", f"| consumer | form | {' | '.join(WORDS)} |", "|---|---|" + "---|" * len(WORDS)]
    for name, (package, title) in CONSUMERS.items():
        if arguments.only and name not in arguments.only:
            lines += rows_of_page(page, title)
            continue
        python = interpreter(name, arguments.environments, arguments.install)
        start = time.perf_counter()
        try:
            found = run(name, python, CASES, arguments.jobs)
        except RuntimeError:
            lines.append(f"| {title} | |{' not run |' * len(WORDS)}")
            continue
        print(f"{title}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        for index, form in enumerate(FORMS):
            first = f"{title} {version(python, package)}" if not index else ""
            lines.append(f"| {first} | {form} | {' | '.join(str(found[word, form]) for word in WORDS)} |")
    facts = environment()
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    machine = f"Printed on an {facts['cpu']}, {facts['system']}, {versions}."
    text = "\n".join([*lines, "", *cost_tables(), "", machine, ""])
    print(text)
    if arguments.write:
        PAGE.write_text(page[: page.index(MARK) + len(MARK)] + text)


def rows_of_page(page: str, title: str) -> list[str]:
    """Return the rows that the page has for a consumer."""
    rows = [line for line in page.splitlines() if line.startswith("| ") and "|---" not in line]
    starts = [index for index, row in enumerate(rows) if row.startswith(f"| {title} ")]
    return [row for start in starts[:1] for row in [rows[start], *_following(rows[start + 1 :])]]


def _following(rows: list[str]) -> Iterator[str]:
    """Return the rows without a consumer's name, which belong to the one above."""
    return itertools.takewhile(lambda row: row.startswith("|  |"), rows)


if __name__ == "__main__":
    main()
