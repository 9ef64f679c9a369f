"""Running ONNX models: feeds from files or functions, and sessions that show inner values."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import DataError, FxpError, MissingDependencyError, ModelError

if TYPE_CHECKING:
    import onnx_ir as ir

Feed = Mapping[str, npt.NDArray[Any]]


class Feeds:
    """The inputs of a model's runs, one mapping of input names to arrays a run; they can be gone through repeatedly.

    Parameters
    ----------
    source : path, "package.module:function", mapping, or iterable of mappings
        A .npz file with one array an input (one feed), a folder of such files (a feed each, in the order of their
        names), a function without arguments that yields feeds, or the feeds themselves.

    Raises
    ------
    DataError
        If there is no such file or function, or a file is no .npz.
    """

    def __init__(self, source: str | os.PathLike[str] | Feed | Iterable[Feed] | Callable[[], Iterable[Feed]]) -> None:
        self._files: list[Path] | None = None
        self._feeds: Callable[[], Iterable[Feed]]
        if isinstance(source, str | os.PathLike):
            path = Path(source)
            if path.is_dir():
                self._files = sorted(file for file in path.glob("*.npz") if file.is_file())
                if not self._files:
                    raise DataError(f"the folder {path} holds no .npz file")
            elif path.is_file():
                self._files = [path]
            elif ":" in str(source):
                self._feeds = _function(str(source))
            else:
                raise DataError(f"{path} is neither a file nor a folder, nor a package.module:function")
        elif isinstance(source, Mapping):
            self._feeds = lambda: [source]
        elif callable(source):
            self._feeds = source
        else:
            held = list(source)
            self._feeds = lambda: held

    def __len__(self) -> int:
        """Return the number of feeds, where it is known without running a function; else 0."""
        return len(self._files) if self._files is not None else 0

    def __iter__(self) -> Iterator[Feed]:
        """Yield the feeds; raises DataError if there is none."""
        count = 0
        for feed in map(_read_npz, self._files) if self._files is not None else self._called():
            if not isinstance(feed, Mapping):
                raise DataError(f"a feed is a {type(feed).__name__}; a mapping of input names to arrays is expected")
            count += 1
            yield feed
        if not count:
            raise DataError("the data holds no feed")

    def name(self, number: int) -> str:
        """Return what messages call the feed of this number, the first being 0; its file where it is from one."""
        return f"feed {number}" if self._files is None else f"feed {number} ({self._files[number]})"

    def _called(self) -> Iterator[Feed]:
        try:
            yield from self._feeds()
        except FxpError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise DataError(f"the function that yields feeds raised {type(error).__name__}: {error}") from error


def _function(source: str) -> Callable[[], Iterable[Feed]]:
    module, _, name = source.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's module may raise anything
        raise DataError(f"{source} is neither a file nor a function that can be imported: {error}") from error
    if not callable(function):
        raise DataError(f"{source} is a {type(function).__name__}; a function that yields feeds is expected")
    return function  # type: ignore[no-any-return]


def _read_npz(path: Path) -> Feed:
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                single = file.read(6) == b"\x93NUMPY"
                what = "holds a single array" if single else "is no .npz file, or is cut short"
                raise DataError(f"{path} {what}; write it with np.savez, one array an input")
            file.seek(0)
            return dict(np.load(file, allow_pickle=False))
    except DataError:
        raise
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} can't be read as a .npz file: {error}") from error


def load_external_data(model: ir.Model) -> None:
    """Bring the tensors that a model keeps in other files into memory.

    Raises
    ------
    ModelError
        If such a file is missing or can't be read.
    """
    import onnx_ir as ir

    try:
        ir.external_data.load_to_model(model)
    except (OSError, ValueError) as error:
        raise ModelError(f"the model's external data can't be read: {error}") from error


def _external_tensors(model: ir.Model) -> list[ir.ExternalTensor]:
    """Return the tensors that a model keeps in other files.

    Raises
    ------
    ModelError
        If such a file is missing.
    """
    import onnx_ir as ir

    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = [value.const_value for graph in graphs for value in graph.initializers.values()]
    external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    for tensor in external:
        if not Path(tensor.path).is_file():
            raise ModelError(f"the model's external data can't be read: there is no file {tensor.path}")
    return external


class FeedHash:
    """A hash over feeds: their numbers, and the names, types, shapes and bytes of their arrays.

    It is the sum of a 2048-bit hash of each feed (AdHash), so that feeds can be taken in any order, and parts merged.

    Attributes
    ----------
    total : int
        The sum so far, from 0 to 2**2048 - 1.
    """

    _BYTES = 256

    def __init__(self, total: int = 0) -> None:
        self.total = total

    def update(self, feed: Feed, number: int) -> None:
        """Take in the feed of this number."""
        feed_hash = hashlib.shake_256(f"{number}\n".encode())
        for name in sorted(feed):
            array = np.ascontiguousarray(feed[name])
            feed_hash.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            feed_hash.update(array.tobytes())
        self.merge(FeedHash(int.from_bytes(feed_hash.digest(self._BYTES), "big")))

    def merge(self, other: FeedHash) -> None:
        """Take in the feeds that another hash has seen."""
        self.total = (self.total + other.total) % (1 << (8 * self._BYTES))

    def tobytes(self) -> bytes:
        """Return the sum as bytes, the highest first."""
        return self.total.to_bytes(self._BYTES, "big")

    def hexdigest(self) -> str:
        """Return the SHA-256 of the sum over all feeds so far."""
        return hashlib.sha256(self.tobytes()).hexdigest()


class Session:
    """An ONNX Runtime session that returns named inner values besides the outputs.

    Parameters
    ----------
    model : onnx_ir.Model
        Left as it is. Its external data are read by ONNX Runtime, not by us.
    values : iterable of str, or mapping of str to tuple of int
        Names of inner values to return; of those in bodies of If, Loop and Scan, with the shape of a row, which the
        rows of all passes are returned in.
    threads : int
        Threads within an operator; 0 lets ONNX Runtime choose. The last bits of its floats may depend on it.

    Raises
    ------
    ModelError
        If ONNX Runtime refuses the model.
    MissingDependencyError
        If ONNX Runtime is not installed.
    """

    def __init__(
        self, model: ir.Model, values: Iterable[str] | Mapping[str, tuple[int, ...]] = (), *, threads: int = 0
    ) -> None:
        import onnx_ir as ir

        from .exposure import expose

        ort = _onnxruntime()
        external = _external_tensors(model)
        folders = {Path(tensor.base_dir).resolve() for tensor in external}
        folder = folders.pop() if len(folders) == 1 else None  # where ONNX Runtime can read them itself
        if external and folder is None:
            model = model.clone()
            load_external_data(model)
        proto = ir.to_proto(model)
        self.outputs = [output.name for output in proto.graph.output]
        asked = values if isinstance(values, Mapping) else dict.fromkeys(values, ())
        self._exposed = expose(proto, asked, copied=True)
        self._inner_inputs = [name for name in asked if name not in self._exposed]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            self._session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions share no base
            raise ModelError(f"ONNX Runtime can't load the model: {_first_line(error)}") from error
        self._inputs = {node.name: node for node in self._session.get_inputs()}

    def run(self, feed: Feed) -> dict[str, npt.NDArray[Any]]:
        """Return the outputs and the asked values of one run, by name.

        Raises
        ------
        DataError
            If the feed lacks an input, or an array has another type or shape than the model's input.
        """
        checked = {name: self._check(name, feed) for name in self._inputs}
        unknown = sorted(set(feed) - set(self._inputs))
        if unknown:
            raise DataError(f"the data holds {unknown[0]!r}; the model's inputs are {', '.join(self._inputs)}")
        names = {name: name for name in self.outputs} | self._exposed
        try:
            results = self._session.run(list(names.values()), checked)
        except Exception as error:
            raise DataError(f"ONNX Runtime can't run the model on this data: {_first_line(error)}") from error
        return dict(zip(names, results, strict=True)) | {name: checked[name] for name in self._inner_inputs}

    def _check(self, name: str, feed: Feed) -> npt.NDArray[Any]:
        if name not in feed:
            raise DataError(f"the data lacks the input {name!r}; it holds {', '.join(map(repr, feed)) or 'nothing'}")
        array, expected = np.asarray(feed[name]), self._inputs[name]
        dtype = _NUMPY_TYPES.get(expected.type)
        if dtype is not None and array.dtype != dtype:
            if not np.can_cast(array.dtype, dtype, "safe"):
                raise DataError(
                    f"the input {name!r} has the type {array.dtype}; the model takes {dtype}: convert it with astype"
                )
            array = array.astype(dtype)
        shape = expected.shape
        if len(array.shape) != len(shape):
            raise DataError(f"the input {name!r} has the shape {array.shape}; the model takes {len(shape)} dimensions")
        if any(isinstance(want, int) and want != have for want, have in zip(shape, array.shape, strict=True)):
            raise DataError(f"the input {name!r} has the shape {array.shape}; the model takes {tuple(shape)}")
        return array


_NUMPY_TYPES = {
    f"tensor({name})": np.dtype(dtype)
    for name, dtype in {
        "float": "float32", "double": "float64", "float16": "float16", "bool": "bool",
        **{kind: kind for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    }.items()
}  # fmt: skip


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "running a model needs ONNX Runtime: pip install 'fxp-layernorm[runtime]', or any of its other builds"
        ) from error
    return onnxruntime


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
