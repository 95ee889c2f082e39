"""A prefill as steps: a generator that says which layer it wants run, and is gone on with once that was done.

So whoever drives several can run one layer for all of them at once. Where a generator yields ``None`` instead, it has
done something by itself, and others may be served.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

from ragkv.clock import Stopwatch
from ragkv.rows import Joined, Rows
from ragkv.runner import ModelRunner

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class LayerCall:
    """``rows`` are to go through ``layer``, whose stored KV is placed; the time is ``part`` of what ``watch`` cuts."""

    layer: int
    rows: Rows
    watch: Stopwatch
    part: str


Steps = Generator[LayerCall | None, None, T]


def run_calls(runner: ModelRunner, calls: Sequence[LayerCall], joined: Joined | None = None) -> None:
    """Run ``calls``, all for the same layer: one by itself, several in ``joined``, which holds their rows."""
    for call in calls:
        call.watch.lap("queue")
    if joined is None:
        [call] = calls
        runner.run_layer(call.layer, call.rows)
    else:
        runner.run_together(calls[0].layer, joined)
    for call in calls:
        call.watch.lap(call.part, shared=joined is not None)


def alone(runner: ModelRunner, steps: Steps[T]) -> Generator[None, None, T]:
    """Runs what ``steps`` wants run, each call by itself; yields after each."""
    with closing(steps):
        while True:
            try:
                call = next(steps)
            except StopIteration as done:
                result: T = done.value
                return result
            if call is not None:
                run_calls(runner, [call])
            yield
