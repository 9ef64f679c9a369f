"""Docstrings of modules, printed as JSON: a script for a fresh interpreter, as what a process imports changes them.

PyTorch, for one, puts a function of its own in the place of `inspect.getfile`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Iterator


def docstrings(module: str) -> Iterator[str]:
    """Yield the docstrings of a module's public functions and classes, white space folded."""
    try:
        members = vars(importlib.import_module(module))
    except ImportError:  # not every build of Python has all of them
        return
    for key in sorted(members):
        if not key.startswith("_") and (inspect.isroutine(members[key]) or inspect.isclass(members[key])):
            yield " ".join((inspect.getdoc(members[key]) or "").split())


if __name__ == "__main__":
    print(json.dumps([text for name in sys.argv[1:] for text in docstrings(name)]))
