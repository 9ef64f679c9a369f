"""How the kernels are compiled: Numba's decorators, with a cache that notices an edit of any of their files.

All integers wrap in two's complement; the widths that a spec proves are what makes the results exact.

Numba widens int32 operands to int64, and LLVM then can't narrow the shifts again. So what must stay in 32 bits, to
fill the vectors, is written with NumPy's functions (`np.multiply`, `np.right_shift`, ...), which keep the type.
"""

# mypy: allow-untyped-defs, allow-untyped-calls

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

#: Codes that the vectors take at a time.
BLOCK = 64

_FOLDER = Path(__file__).parent
_SOURCES = [*sorted(_FOLDER.glob("*.py")), _FOLDER.parent / "team.py"]
_DIGEST = hashlib.sha256(b"".join(path.read_bytes() for path in _SOURCES)).hexdigest()[:8]

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
_INSIDE: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator for what callers call; it is cached, unless no folder for it is writable."""

    def decorate(function: Callable[..., Any]) -> Any:
        # Numba's cache goes by the function's name and file, and would not notice an edit of what it calls in another
        function.__qualname__ += f"_{_DIGEST}"
        try:
            compiled = njit(cache=True, **_OPTIONS, **options)(function)
        except RuntimeError:
            return njit(**_OPTIONS, **options)(function)
        # Numba numbers the files. Two processes that compile at once may take the same number, and the index then gives
        # the code for the types of one to the other's, without a word
        with contextlib.suppress(AttributeError):  # these names are Numba's own
            file = compiled._cache._cache_file
            file._data_name = lambda _: f"{file._index_name.removesuffix('nbi')}{uuid.uuid4().hex[:16]}.nbc"
        return compiled

    return decorate


#: For what these call, and the cache holds with them: LLVM makes vectors only of loops without calls.
inlined: Any = njit(forceinline=True, **_OPTIONS, **_INSIDE)
#: For what they share out.
called: Any = jit(**_INSIDE)
