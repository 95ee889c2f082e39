"""Measuring a machine before it serves: layers over few and many rows, and stored bytes placed in a request's KV.

Disks and networks are not measured here but by the first request that reads from them: a test file of ours would
evict what is stored, and would not be read as entries are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import torch

from ragkv.attention import AttentionStep
from ragkv.chunks import ChunkTokens
from ragkv.costs import Curve, Estimate, Machine
from ragkv.errors import StoreError
from ragkv.loading import LayerLoader
from ragkv.pinned import PageLocking
from ragkv.plan import PlannedChunk, Span
from ragkv.retrievers import Chunk
from ragkv.rows import Joined, Rows
from ragkv.runner import ModelRunner
from ragkv.store.buffers import HUGE_PAGE

_READER_DEPTH = 2
_LADDER = (16, 64, 256, 1024, 4096)
_LAYERS = {"cuda": 8, "cpu": 2}
_PLACED_TOKENS = {"cuda": 2048, "cpu": 256}
_REPEATS, _ENOUGH_S = 5, 0.1
_SECONDS = 1.0
_KNOTS = 3
_ALIKE = 1.5

Knots = list[tuple[int, float]]


def measure_machine(
    runner: ModelRunner, codec: str = "raw", clock: Callable[[], float] = time.perf_counter
) -> Generator[None, None, Machine]:
    """Measure what a model costs on this machine: in about two seconds, on a GPU in less once its kernels are compiled.
    Yields between measurements."""
    bench = _Bench(runner, clock)
    dense: Knots = []
    sparse: Knots = []
    for rows in _LADDER:
        # Four times the rows take four times as long once they fill the machine, and are run four times. A curve of
        # fewer knots would be at the mercy of whatever disturbed one of them.
        long = len(sparse) >= _KNOTS and bench.spent + 16 * bench.layers * sparse[-1][1] > _SECONDS
        if rows > bench.most or long:
            break
        dense.append((rows, bench.layer(rows, rows)))
        yield
        sparse.append((rows, bench.layer(rows, rows + 1)))
        yield
    per_pair = bench.per_pair(min(256, dense[-1][0]))
    yield
    placing = bench.placing(codec)
    yield
    together = bench.together()
    yield
    streamed = runner.device.type == "cuda" and runner.fused is not None
    dense, sparse = undisturbed(dense, sparse)
    return Machine(
        layers=runner.shape.layers,
        dense=Curve([(rows, _without(seconds, per_pair * rows**2 / 2)) for rows, seconds in dense], per_pair),
        sparse=Curve([(rows, _without(seconds, per_pair * rows**2 / 2)) for rows, seconds in sparse], per_pair),
        head=bench.head(),
        tiers={"ram": Estimate(placing)},
        overlapped=streamed,
        window=runner.shape.layers if streamed else _READER_DEPTH,
        together=together,
    )


def undisturbed(dense: Knots, sparse: Knots) -> tuple[Knots, Knots]:
    """What two curves over the same rows say of each other and of themselves: whatever else the machine did meanwhile
    can only have made layers slower. Fewer rows never take longer than more, and a layer over some rows of a prompt
    takes hardly longer than a full prefill of as many, or the other way round."""
    most = [_ALIKE * min(one, other) for (_, one), (_, other) in zip(dense, sparse, strict=True)]
    return _rising(dense, most), _rising(sparse, most)


def _rising(knots: Knots, most: list[float]) -> Knots:
    least, found = float("inf"), list[tuple[int, float]]()
    for (rows, seconds), bound in zip(reversed(knots), reversed(most), strict=True):
        least = min(least, seconds, bound)
        found.append((rows, least))
    return found[::-1]


def _as_the_store_has_it(nbytes: int, device: torch.device) -> np.ndarray:
    """Memory like that of the RAM tier. Its locking wants a thread that launches nothing."""
    if device.type != "cuda":
        return np.zeros(nbytes, np.uint8)
    with ThreadPoolExecutor(1) as thread:
        slab = thread.submit(PageLocking(device), -(-nbytes // HUGE_PAGE) * HUGE_PAGE).result()
    slab.fill(0)
    return slab[:nbytes]


def _without(seconds: float, attention: float) -> float:
    return max(seconds - attention, seconds / 10)


class _Bench:
    """Runs the first layers of a model over scratch KV. ``spent``: seconds so far, but for each first run."""

    def __init__(self, runner: ModelRunner, clock: Callable[[], float]) -> None:
        self._runner, self._clock = runner, clock
        self.layers = min(_LAYERS[runner.device.type], runner.shape.layers)
        self.most = runner.max_positions - 1
        self.spent = 0.0

    def layer(self, rows: int, keys: int) -> float:
        """Seconds of a layer over ``rows`` rows, spread over ``keys`` positions; a full prefill if as many."""
        runner = self._runner
        kv = runner.workspace(keys)
        for layer in range(self.layers):
            for tensor in kv.read(layer, keys):
                tensor.zero_()
        positions = (torch.arange(rows, device=runner.device) + 1) * keys // rows - 1
        step = AttentionStep(kv, positions, keys, contiguous=rows == keys, last_only=True)
        stepped = runner.rows(runner.tensor([0] * rows), step)

        def run() -> None:
            for layer in range(self.layers):
                runner.run_layer(layer, stepped)

        return self._best(run) / self.layers

    def per_pair(self, rows: int) -> float:
        """Attention's seconds for one row looking at one key: many keys against few."""
        few, many = rows, min(16 * rows, self.most // rows * rows)
        if many <= few:
            return 0.0
        seconds = self.layer(rows, many) - self.layer(rows, few + 1)
        return max(seconds, 0.0) / (rows * (many - few) / 2)

    def head(self) -> float:
        """Seconds from the last layer to the logits."""
        rows = self._row()
        return self._best(lambda: self._runner.logits(rows))

    def together(self) -> float:
        """Seconds of a layer that is run for two prompts of a row each: hardly more than launching it takes."""
        joined = Joined([self._row(), self._row()])

        def run() -> None:
            for layer in range(self.layers):
                self._runner.run_together(layer, joined)

        return self._best(run) / self.layers

    def _row(self) -> Rows:
        runner = self._runner
        step = AttentionStep(runner.new_kv(1), runner.tensor([0]), 1, contiguous=False)
        return runner.rows(runner.tensor([0]), step)

    def placing(self, codec: str) -> float:
        """Seconds per byte from RAM, where it is page-locked if there is a device, into a request's KV."""
        runner, device = self._runner, self._runner.device
        tokens = min(_PLACED_TOKENS[device.type], self.most)
        nbytes = runner.shape.slab_bytes(tokens, codec)
        slab = _as_the_store_has_it(nbytes, device)
        kv = runner.new_kv(tokens)
        span = Span(PlannedChunk(Chunk("", "", 0, ""), 1, 0.0, ChunkTokens((), (), 0, "alone", b"")), 0, tokens, True)

        def run() -> None:
            slabs: list[list[np.ndarray | StoreError]] = [[slab]] * runner.shape.layers
            with closing(LayerLoader(runner, kv, [span], iter(slabs), codec)) as loader:
                loader.ensure(runner.shape.layers - 1)

        return self._best(run) / (runner.shape.layers * nbytes)

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest run after a first one that chooses kernels and maps memory."""
        work()
        self._runner.synchronize()
        best, started = float("inf"), self._clock()
        for _ in range(_REPEATS):
            began = self._clock()
            work()
            self._runner.synchronize()
            best = min(best, self._clock() - began)
            if self._clock() - started > _ENOUGH_S:
                break
        self.spent += self._clock() - started
        return best
