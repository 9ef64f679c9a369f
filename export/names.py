"""Names that nothing else in a model has."""

from __future__ import annotations


def unique_name(name: str, taken: set[str]) -> str:
    """Return `name`, or `name` with a number, that is not taken yet, and take it."""
    free, count = name, 0
    while free in taken:
        count += 1
        free = f"{name}_{count}"
    taken.add(free)
    return free
