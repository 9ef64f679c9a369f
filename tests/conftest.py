"""What holds for the whole suite: a kernel cache of its own, reproducible property tests, and a patient collector."""

from __future__ import annotations

import gc
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")

# By default garbage is looked for so often that a seventh of the suite's time goes by, as compilers hold many objects.
gc.set_threshold(10_000)


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled kernels in a folder named by their source, so that no edit can ever meet stale code."""
    folder = Path(__file__).parent.parent / "fxp_layernorm"
    sources = sorted((folder / "kernels").glob("*.py"))
    cache = getattr(config, "cache", None)  # absent under -p no:cacheprovider
    if cache is not None and sources:
        digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
        os.environ.setdefault("NUMBA_CACHE_DIR", str(cache.mkdir(f"numba-{digest}")))
