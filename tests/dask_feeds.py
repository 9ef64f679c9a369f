"""Feeds for a cluster of processes: enough of them that a worker can be lost half-way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx_models import feeds as made

COUNT = 96


def feeds() -> Iterator[dict[str, Any]]:
    """Yield small feeds of several lengths."""
    for index in range(COUNT // 3):
        for feed in made(3):
            yield {"x": feed["x"] * (1 + index % 7)}
