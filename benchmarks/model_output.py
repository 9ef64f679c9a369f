"""What calibration may serve, measured on many texts: `python -m benchmarks.model_output`.

It prints the tables of docs/model_output.md, for the demo's sentence transformer with all norms in int8, calibrated on
32 texts and compared with the float model on all others. The norms are simulated, as calibration itself does it.
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from fxp_layernorm import demo
from fxp_layernorm.analysis.precision import Target, meet_target
from fxp_layernorm.calibration import CalibrationOptions, ModelCalibration, ModelObjective, NormCalibration, tune_model
from fxp_layernorm.calibration.norms import folds_of
from fxp_layernorm.calibration.search import Sample, choose, smallest_output_scale
from fxp_layernorm.calibration.simulation import Sides, Simulation
from fxp_layernorm.export import load_model
from fxp_layernorm.layer import LayerNorm
from fxp_layernorm.runtime import Feeds, Session

Floats = npt.NDArray[np.float64]
Choice = Mapping[str, Sides]

#: How the channels share a scale, by the heading of the table.
SHARING = {
    "exponents in, a scale a channel out": CalibrationOptions(),
    "exponents": CalibrationOptions.of(scales="exponents"),
    "a scale a channel": CalibrationOptions.of(scales="channel"),
    "one scale, asymmetric": CalibrationOptions.of(scales="tensor"),
    "one scale, symmetric": CalibrationOptions.of(scales="tensor", symmetric=True),
}


class Texts:
    """The texts that are held out, and what the float model makes of them."""

    def __init__(self, names: list[str], texts: list[str]) -> None:
        self._feeds = list(demo.feeds(texts))
        self._simulation = Simulation(demo.model_path(), names, residuals=True)
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._real = self._run({})

    def row(self, choice: Choice) -> str:
        """Return the end of a table's row: cosine, same nearest neighbour, SQNR of all output values."""
        outputs, embeddings = self._run(choice)
        real, real_embeddings = self._real
        cosine = float(np.sum(embeddings * real_embeddings, axis=1).mean())
        same = float(np.mean(_nearest(embeddings) == _nearest(real_embeddings)))
        noise = sum(_power(a.astype(np.float64) - b) for a, b in zip(outputs, real, strict=True))
        signal = sum(_power(values.astype(np.float64)) for values in real)
        return f"{cosine:.6f} | {100 * same:.1f} % | {10 * np.log10(signal / noise):.2f} dB |"

    def _run(self, choice: Choice) -> tuple[list[npt.NDArray[np.float32]], Floats]:
        runs = list(self._pool.map(lambda feed: self._simulation.run(feed, choice), self._feeds))
        return [run["last_hidden_state"] for run in runs], np.concatenate([demo.embed(run) for run in runs])


def _power(values: Floats) -> float:
    return float(np.square(values).sum())


def _nearest(embeddings: Floats) -> npt.NDArray[np.int64]:
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(np.argmax(similarity, axis=1))


def consumers_weights(calibration: ModelCalibration) -> dict[str, Floats]:
    """Return what a squared error of each output channel adds to the outputs of the MatMul nodes that read it.

    That is the squared length of each row of their weights, the sum over the nodes; 1 where no such node reads it.
    """
    model = onnx.load(demo.model_path())
    readers = {
        norm.output: [node for node in model.graph.node if norm.output in node.input] for norm in calibration.norms
    }
    factors = {
        output: [node.input[1] for node in nodes if node.op_type == "MatMul"] for output, nodes in readers.items()
    }
    (feed, *_) = demo.feeds(demo.texts()[:1])
    values = Session(load_model(model), [name for names in factors.values() for name in names]).run(feed)
    weights = {}
    for norm in calibration.norms:
        rows = [np.square(values[name].astype(np.float64)).sum(axis=1) for name in factors[norm.output]]
        weights[norm.name] = np.sum(rows, axis=0) if rows else np.ones(norm.normalized_shape)
    return weights


def weighted(calibration: NormCalibration, options: CalibrationOptions, weights: Floats) -> Sides:
    """Return the parameters with the least error of a norm's outputs, their squares weighted by channel."""
    layer = calibration.layer
    scaled = LayerNorm(layer.normalized_shape, eps=layer.eps)  # whose error has the weights in it
    scaled.weight, scaled.bias = layer.gamma * np.sqrt(weights), layer.beta * np.sqrt(weights)
    input = NormCalibration(scaled, calibration.observer).spec(options).input
    outputs = np.asarray(layer(calibration.observer.sample.rows()), dtype=np.float64)
    smallest = smallest_output_scale(layer.n, layer.gamma, layer.beta)
    sample = Sample(outputs, weights[None], folds_of(calibration.observer.sample.ids))
    return Sides(input, choose(calibration.observer.output, options.output, sample, smallest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, help="held-out texts [default: all there are]")
    parser.add_argument("--target", default="cosine=0.999", help="as of fxp-layernorm calibrate")
    arguments = parser.parse_args()
    first, texts = demo.CALIBRATION_TEXTS, demo.texts()
    calibration = ModelCalibration(demo.model_path(), observe_addends=True)
    feeds = Feeds(list(demo.feeds(texts[:first])))
    calibration.observe(feeds)
    held_out = texts[first:][: arguments.texts]
    judge, weights = Texts(calibration.names, held_out), consumers_weights(calibration)
    print(f"{len(held_out)} texts\n")
    print("| scales | least error of | cosine | same nearest neighbour | SQNR |\n|---|---|---|---|---|")
    for heading, options in SHARING.items():
        params = calibration.params(options)
        own = {norm.name: Sides.of(norm.spec) for norm in params.norms}
        print(f"| {heading} | the norm's output | {judge.row(own)}", flush=True)
        read = {name: weighted(calibration.calibration(name), options, weights[name]) for name in calibration.names}
        print(f"| {heading} | what reads it | {judge.row(read)}", flush=True)
    options = CalibrationOptions()
    adding = ModelCalibration(demo.model_path(), fuse_residual=True)
    adding.observe(feeds)
    choice = {norm.name: Sides.of(norm.spec) for norm in adding.params(options).norms}
    print(f"| {next(iter(SHARING))}, residuals fused | the norm's output | {judge.row(choice)}", flush=True)
    objective = ModelObjective(demo.model_path(), calibration.names, feeds, residuals=True)
    tuned, _ = tune_model(calibration, objective, calibration.params(options), options)
    choice = {norm.name: Sides.of(norm.spec) for norm in tuned.norms}
    print(f"| {next(iter(SHARING))} | the model's outputs | {judge.row(choice)}\n", flush=True)

    found = meet_target(calibration, objective, options, Target.parse(arguments.target))
    choice = {norm.name: Sides.of(norm.spec) for norm in found.params.norms}
    print(f"Target {arguments.target}, on {objective.feeds} feeds, {len(found.curve)} points; on the texts held out:")
    print(f"| {found.chosen.cost_pj:.2f} pJ an element | {judge.row(choice)}")
    print("\n| norm | input | adds | output | pJ an element | noise |\n|---|---|---|---|---|---|")
    for name, each in found.chosen.formats.items():
        adds = "yes" if each.residual else "no"
        print(f"| {name} | {each.input} | {adds} | {each.output} | {each.cost_pj:.2f} | {each.noise:.1e} |")
    print(f"\n(CPython {platform.python_version()}, numpy {np.__version__}, onnxruntime {onnxruntime.__version__})")


if __name__ == "__main__":
    main()
