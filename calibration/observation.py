"""Observing all norms of a model: the job that a process does, what comes of it, and the file that keeps it."""

from __future__ import annotations

import json
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from .. import files
from ..axes import row_shape
from ..errors import DataError, FxpError, SpecFileError
from ..layer import LayerNorm, RMSNorm
from ..runtime import Feed, FeedHash, Session, load_external_data
from .norms import NormObserver
from .observers import Arrays

STATE_VERSION = 2
#: Seconds between two writings of the state file, and how many times longer than a writing that is at the least.
SAVE_SECONDS, SAVE_SHARE = 10.0, 20.0


@dataclass(frozen=True)
class ObservedNorm:
    """A norm of the model: its name, its layer, and the names of the tensors that it reads and writes."""

    name: str
    layer: LayerNorm | RMSNorm
    input: str
    output: str


class ModelObserver:
    """What was seen of all norms of a model; like the observers that it holds, it merges in any order.

    Attributes
    ----------
    norms : dict of str to NormObserver
    feeds : int
    data : FeedHash
    """

    def __init__(self, norms: tuple[ObservedNorm, ...]) -> None:
        self.norms = {norm.name: NormObserver(norm.layer) for norm in norms}
        self.feeds = 0
        self.data = FeedHash()

    def merge(self, other: Self) -> None:
        """Take in what another observer of the same model has seen."""
        for name, observer in self.norms.items():
            observer.merge(other.norms[name])
        self.feeds += other.feeds
        self.data.merge(other.data)


class Job:
    """Runs a model on feeds, from several threads at once if need be, and observes its norms.

    Each operator runs on one thread, so that the activations' last bits don't depend on the machine's number of cores.
    A job can be pickled: the model then goes along with its external data.

    Parameters
    ----------
    model : onnx_ir.Model
    norms : tuple of ObservedNorm
    """

    def __init__(self, model: ir.Model, norms: tuple[ObservedNorm, ...]) -> None:
        self.model, self.norms = model, norms
        self._prepare()

    def _prepare(self) -> None:
        self._lock = threading.Lock()
        self._locks = {norm.name: threading.Lock() for norm in self.norms}
        self._session: Session | None = None

    def __getstate__(self) -> dict[str, Any]:
        model = self.model.clone()
        load_external_data(model)
        return {"model": ir.to_proto(model).SerializeToString(), "norms": self.norms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.model, self.norms = ir.from_proto(onnx.ModelProto.FromString(state["model"])), state["norms"]
        self._prepare()

    def session(self) -> Session:
        """Return the session, made at the first call in each process.

        Raises
        ------
        ModelError
            If ONNX Runtime refuses the model.
        """
        with self._lock:
            if self._session is None:
                shapes = {
                    value: row_shape(norm.layer.normalized_shape, norm.layer.axes)
                    for norm in self.norms
                    for value in (norm.input, norm.output)
                }
                self._session = Session(self.model, shapes, threads=1)
            return self._session

    def observe(self, feed: Feed, number: int, into: ModelObserver) -> None:
        """Run the feed of this number, and observe its norms.

        Raises
        ------
        DataError
            If the feed doesn't fit the model, or a norm's values are beyond float32's range.
        """
        try:
            values = self.session().run(feed)
        except DataError as error:
            raise DataError(f"feed {number}: {error}") from error
        for norm in self.norms:
            with self._locks[norm.name]:
                try:
                    into.norms[norm.name].update(values[norm.input], values[norm.output], feed=number)
                except FxpError as error:
                    raise DataError(f"feed {number}, norm {norm.name!r}: {error}") from error
        with self._lock:
            into.data.update(feed, number)
            into.feeds += 1


class StateFile:
    """A file that keeps what was observed, so that interrupted work goes on where it stood.

    It is a .npz without pickled objects: the observers' arrays, and a header in JSON with its version, the model's hash
    and the feeds seen. It is replaced as a whole.

    Parameters
    ----------
    path : path
    model_sha256 : str
    """

    def __init__(self, path: str | Path, model_sha256: str) -> None:
        self._path, self._model = Path(path), model_sha256
        self._saved, self._took = time.monotonic(), 0.0
        files.check_writable(path)

    @property
    def due(self) -> bool:
        """Whether the last writing is some time ago."""
        return time.monotonic() - self._saved >= max(SAVE_SECONDS, SAVE_SHARE * self._took)

    def save(self, observer: ModelObserver) -> None:
        """Write what was observed."""
        start = time.monotonic()
        header = {
            "schema_version": STATE_VERSION, "model_sha256": self._model, "norms": list(observer.norms),
            "feeds": observer.feeds, "data": observer.data.tobytes().hex(),
        }  # fmt: skip
        arrays: Arrays = {"header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)}
        for index, norm in enumerate(observer.norms.values()):
            arrays.update((f"{index}.{name}", array) for name, array in norm.arrays().items())
        with files.atomic_path(self._path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        self._saved = time.monotonic()
        self._took = self._saved - start

    def load(self, observer: ModelObserver) -> bool:
        """Bring what was saved into a new observer, and return whether there is such a file.

        Raises
        ------
        SpecFileError
            If the file is damaged, of another version, or of another model.
        """
        if not self._path.exists():
            return False
        with self._reading() as arrays:
            header = json.loads(arrays["header"].tobytes())
            version = header["schema_version"]
            if version != STATE_VERSION:
                raise SpecFileError(
                    f"{self._path} has the version {version!r}; this version of fxp-layernorm reads {STATE_VERSION}"
                )
            if header["model_sha256"] != self._model:
                raise SpecFileError(f"{self._path} holds what was observed of another model; remove it to start anew")
            if header["norms"] != list(observer.norms):
                raise SpecFileError(
                    f"{self._path} holds what was observed of other tensors of the model: --fuse-residual and --target "
                    "observe what is added before a norm, too; remove it to start anew"
                )
            for index, norm in enumerate(observer.norms.values()):
                prefix = f"{index}."
                norm.restore({key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)})
            observer.feeds = int(header["feeds"])
            observer.data = FeedHash(int(header["data"], 16))
        return True

    @contextmanager
    def _reading(self) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                yield archive
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            if isinstance(error, SpecFileError):
                raise
            whole = isinstance(error, OSError) or zipfile.is_zipfile(self._path)
            reason = error if whole else "it is another kind of file, or is cut short"
            raise SpecFileError(
                f"{self._path} can't be read as saved observers: {reason}; remove it to start anew"
            ) from error
