"""Reading and writing files: whole or not at all, strict JSON, and a sentence for whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ._version import __version__
from .errors import FxpError, InputError, SpecFileError

T = TypeVar("T")

#: How pydantic reads the dataclasses that are written to files: no unknown key, no conversion.
STRICT: Any = {"extra": "forbid", "strict": True}

#: How many characters a message takes over from a file.
_MOST = 240


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which takes its place when the block ends without an error.

    Raises
    ------
    InputError
        If the folder doesn't exist or can't be written.
    """
    target, temporary = _beside(path)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise InputError(f"{target} can't be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Raise InputError now if `atomic_path` could not write there: work that ends with a file may take hours."""
    _, temporary = _beside(path)
    temporary.unlink(missing_ok=True)


def _beside(path: str | Path) -> tuple[Path, Path]:
    """Return the file that is meant, and an empty new one beside it."""
    target = Path(path)
    try:
        target = target.resolve()  # what a link points to is written, not the link
        if target.exists() and not target.is_file():
            raise InputError(f"{target} is a {'folder' if target.is_dir() else 'device'}; name a file")
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise InputError(f"{target} can't be written: {error.strerror}") from error
    except InputError:
        raise
    except ValueError as error:  # a name that no file can have
        raise InputError(f"{str(target)!r} can't be written: {error}") from error
    return target, Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_json(value: Any, path: str | Path, *, schema_version: int) -> None:
    """Write a dataclass as JSON with its schema version and the version that produced it."""
    text = to_text(document(value, schema_version=schema_version))
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def document(value: Any, *, schema_version: int) -> dict[str, Any]:
    """Return what `save_json` writes."""
    from pydantic import TypeAdapter

    body = TypeAdapter(type(value)).dump_python(value, mode="json")
    return {"schema_version": schema_version, "producer": f"fxp-layernorm {__version__}", **body}


def to_text(document: Any) -> str:
    """Return JSON with an object's members on lines of their own and each list of numbers on one line."""
    text = json.dumps(document, indent=1, allow_nan=False)
    return re.sub(r"\[[-+.,\de\s]*\]", lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"


def load_json(cls: type[T], path: str | Path, *, schema_version: int) -> T:
    """Read a dataclass that `save_json` wrote; whatever is not exactly as it must be is refused."""
    from pydantic import TypeAdapter, ValidationError

    source = Path(path)
    try:
        document = json.loads(source.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except OSError as error:
        raise SpecFileError(f"{source} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SpecFileError(f"{source} is not JSON, or is cut short: {_short(error)}") from error
    if not isinstance(document, dict):
        raise SpecFileError(f"{source} holds a {type(document).__name__}; an object with a schema_version is expected")
    found = document.pop("schema_version", None)
    if type(found) is not int or found != schema_version:
        raise SpecFileError(
            f"{source} has the schema version {_short(repr(found))}; this version of fxp-layernorm ({__version__}) "
            f"reads {schema_version}. Make the file anew, or install the version that wrote it"
        )
    document.pop("producer", None)
    try:
        return TypeAdapter(cls).validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the document"
        raise SpecFileError(
            f"{source}: {_short(place)}: {_short(first['msg'].removeprefix('Value error, '))}"
        ) from error
    except FxpError as error:
        raise SpecFileError(f"{source}: {_short(error)}") from error


def _short(text: object) -> str:
    """Return a message without the middle of what is too long to read: a number of thousands of digits, say."""
    whole = str(text)
    return whole if len(whole) <= _MOST else f"{whole[: _MOST // 2]}[...]{whole[-_MOST // 2 :]}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    if twice:
        raise ValueError(f"the key {twice[0]!r} is given twice")
    return dict(pairs)
