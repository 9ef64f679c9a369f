"""What observing costs beside the model's own run: `python -m benchmarks.calibration_speed`.

The demo's sentence transformer on 32 texts, one thread, each part in each of several repetitions.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime

from fxp_layernorm import demo
from fxp_layernorm.calibration.norms import NormObserver
from fxp_layernorm.calibration.observation import Job, ModelObserver, ObservedNorm
from fxp_layernorm.export import find_norms, load_model
from fxp_layernorm.runtime import FeedHash, Session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    model = load_model(demo.model_path())
    norms = tuple(
        ObservedNorm(norm.name, norm.layer, norm.input, norm.output)
        for norm in find_norms(model)
        if norm.layer is not None
    )
    feeds = list(demo.feeds(demo.texts()[: demo.CALIBRATION_TEXTS]))
    plain, job = Session(model, threads=1), Job(model, norms)
    values = [job.session().run(feed) for feed in feeds]
    rows = sum(each[norms[0].input].size for each in values) // norms[0].layer.n

    def run() -> None:
        for feed in feeds:
            plain.run(feed)

    def run_exposed() -> None:
        for feed in feeds:
            job.session().run(feed)

    def observe() -> None:
        observers = {norm.name: NormObserver(norm.layer) for norm in norms}
        for number, each in enumerate(values):
            for norm in norms:
                observers[norm.name].update(each[norm.input], each[norm.output], feed=number)
        for observer in observers.values():
            observer.arrays()  # none of the feeds is left waiting

    def take_hashes() -> None:
        data = FeedHash()
        for number, feed in enumerate(feeds):
            data.update(feed, number)

    def calibrate() -> None:
        into = ModelObserver(norms)
        for number, feed in enumerate(feeds):
            job.observe(feed, number, into)
        for observer in into.norms.values():
            observer.arrays()

    parts = {
        "the model's own run in ONNX Runtime": run,
        "the same with 26 inner values as outputs": run_exposed,
        "the observers": observe,
        "the feeds' hashes": take_hashes,
        "all of calibrate's pass": calibrate,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeats):  # each part in each round, so that a busy machine slows all alike
        for name, part in parts.items():
            seconds[name].append(_time(part))
    own = seconds["the model's own run in ONNX Runtime"]
    print(f"{len(norms)} norms, {len(feeds)} feeds, {rows:,} rows a norm, one thread, {repeats} repetitions\n")
    print("| part | s, least | of the model's own run, median | in each repetition |\n|---|---|---|---|")
    for name, found in seconds.items():
        ratios = sorted(part / run for part, run in zip(found, own, strict=True))
        print(f"| {name} | {min(found):.3f} | {statistics.median(ratios):.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")
    print(f"\n(CPython {platform.python_version()}, numpy {np.__version__}, onnxruntime {onnxruntime.__version__})")


def _time(part: Callable[[], None]) -> float:
    start = time.perf_counter()
    part()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
