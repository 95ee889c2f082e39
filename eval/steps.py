"""Running the core's generators, which yield between layers so that an engine can do other things meanwhile."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")


def drained(steps: Generator[None, None, T]) -> T:
    """The result of a generator nobody else waits for."""
    while True:
        try:
            next(steps)
        except StopIteration as done:
            result: T = done.value
            return result
