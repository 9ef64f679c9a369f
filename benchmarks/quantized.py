"""A real transformer that ONNX Runtime has quantized: its norms and residual adds in integers, without calibration.

Runs ONNX Runtime's quantize_static on the demo's model, replaces the norms with the model's own scales, verifies their
codes, and compares the embeddings of texts with the float model's. Prints a table:  python -m benchmarks.quantized
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from fxp_layernorm import demo, export
from fxp_layernorm.benchmark import environment
from fxp_layernorm.calibration import quantized_norms
from fxp_layernorm.export.loading import Model
from fxp_layernorm.params import NormParams
from fxp_layernorm.runtime import Feed, Feeds, Session

#: What quantize_static is told to quantize, and its options.
SCHEMES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "MatMul, Gather, Add, LayerNormalization": (["MatMul", "Gather", "Add", "LayerNormalization"], {}),
    "MatMul, Add, sums left": (["MatMul", "Add"], {"OpTypesToExcludeOutputQuantization": ["Add"]}),
}
COLUMNS = (
    "quantize_static of", "run as", "norms", "with the add", "codes differ", "of", "cosine", "same neighbour",
    "Q/DQ nodes",
)  # fmt: skip


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """What quantize_static takes its data from."""

    def __init__(self, feeds: list[Feed]) -> None:
        self._feeds: Iterator[Feed] = iter(feeds)

    def get_next(self) -> dict[str, Any] | None:
        """Return the next feed, None behind the last."""
        feed = next(self._feeds, None)
        return None if feed is None else dict(feed)


class Judge:
    """Compares a model's sentence embeddings with the float model's."""

    def __init__(self, model: Model, feeds: Feeds) -> None:
        self._feeds = feeds
        self._real = self._embed(model)

    def figures(self, model: Model) -> tuple[str, str]:
        """Return the mean cosine, and how many texts have the same nearest neighbour."""
        found = self._embed(model)
        same = np.mean(demo.nearest(found) == demo.nearest(self._real))
        return f"{np.sum(found * self._real, axis=1).mean():.3f}", f"{100 * same:.1f} %"

    def _embed(self, model: Model) -> npt.NDArray[np.float64]:
        session = Session(export.load_model(model))
        return np.concatenate([demo.embed(session.run(feed)) for feed in self._feeds])


def quantizers(model: onnx.ModelProto) -> int:
    """Return the number of QuantizeLinear and DequantizeLinear nodes."""
    return sum(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def rows_of(quantized: Path, scheme: str, judge: Judge, feeds: Feeds) -> Iterator[Sequence[object]]:
    """Yield the table's rows of a quantized model."""
    nodes = quantizers(onnx.load(quantized))
    yield scheme, "it is", "-", "-", "-", "-", *judge.figures(quantized), nodes
    before: tuple[NormParams, ...] = ()
    for fuse in (False, True):
        params = quantized_norms(quantized, fuse_residual=fuse).params
        if params.norms == before:
            continue
        before = params.norms
        model = export.quantize_model(quantized, params)
        result = export.verify(quantized, model, params, feeds)
        counts = len(params.norms), sum(norm.spec.residual is not None for norm in params.norms)
        form = "integers, --fuse-residual" if fuse else "integers"
        yield "", form, *counts, result.mismatches, f"{result.codes:,}", *judge.figures(model), quantizers(model)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=demo.HELD_OUT_TEXTS, help="held-out texts")
    count = parser.parse_args().texts
    texts, first = demo.texts(), demo.CALIBRATION_TEXTS
    calibration, held_out = list(demo.feeds(texts[:first])), list(demo.feeds(texts[first : first + count]))
    rows: list[Sequence[object]] = [COLUMNS, ["---"] * len(COLUMNS)]
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder, "plain.onnx"), Path(folder, "quantized.onnx")
        quant_pre_process(demo.model_path(), plain, skip_symbolic_shape=True)
        judge = Judge(plain, Feeds(held_out))
        for scheme, (operators, options) in SCHEMES.items():
            quantize_static(
                plain, quantized, Reader(calibration), quant_format=QuantFormat.QDQ, per_channel=True,
                activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, op_types_to_quantize=operators,
                extra_options=options,
            )  # fmt: skip
            rows += rows_of(quantized, scheme, judge, Feeds(held_out))
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")
    machine = environment()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    print(f"\n{count} texts, on an {machine['cpu']}, {machine['system']}, {versions}.")


if __name__ == "__main__":
    main()
