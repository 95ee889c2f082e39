"""Measuring a machine before it serves: layers over few and many rows, and stored bytes placed in a request's KV.

Disks and networks are not measured here but by the first request that reads from them: a test file of ours would
evict what is stored, and would not be read as entries are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import replace

import numpy as np
import torch

from ragkv.attention import AttentionStep
from ragkv.chunks import ChunkTokens
from ragkv.costs import Curve, Estimate, Machine
from ragkv.kv import RequestKV
from ragkv.loading import LayerLoader
from ragkv.plan import PlannedChunk, Span
from ragkv.retrievers import Chunk
from ragkv.runner import ModelRunner
from ragkv.store import CODECS
from ragkv.streaming import LAYERS_UNDER_WAY

READER_DEPTH = 2
_LADDER = (16, 64, 256, 1024, 4096)
_LAYERS = 2
_PLACED_LAYERS = 12
_REPEATS, _ENOUGH_S = 5, 0.1
_SECONDS = {"cuda": 1.0, "cpu": 2.0}


def measure_machine(
    runner: ModelRunner, codec: str = "raw", clock: Callable[[], float] = time.perf_counter
) -> Generator[None, None, Machine]:
    """Measure what a model costs on this machine: a second on a GPU, two on a CPU. Yields between measurements."""
    bench = _Bench(runner, clock)
    deadline = clock() + _SECONDS[runner.device.type]
    dense: list[tuple[int, float]] = []
    sparse: list[tuple[int, float]] = []
    for rows in _LADDER:
        # Twice a measurement of four times the rows, which take at least four times as long once they fill the machine.
        if rows > bench.most or (sparse and clock() + 8 * bench.spent > deadline):
            break
        dense.append((rows, bench.layer(rows, rows)))
        yield
        sparse.append((rows, bench.layer(rows, rows + 1)))
        yield
    per_pair = bench.per_pair(min(256, dense[-1][0]))
    yield
    placing = bench.placing(codec)
    yield
    cuda = runner.device.type == "cuda"
    return Machine(
        layers=runner.shape.layers,
        dense=Curve([(rows, _without(seconds, per_pair * rows**2 / 2)) for rows, seconds in dense], per_pair),
        sparse=Curve([(rows, _without(seconds, per_pair * rows**2 / 2)) for rows, seconds in sparse], per_pair),
        head=bench.head(),
        tiers={"ram": Estimate(placing)},
        overlapped=cuda,
        window=READER_DEPTH + (LAYERS_UNDER_WAY if cuda else 0),
    )


def _without(seconds: float, attention: float) -> float:
    return max(seconds - attention, seconds / 10)


class _Bench:
    """Runs the first layers of a model over scratch KV. ``spent``: all seconds of the last measurement."""

    def __init__(self, runner: ModelRunner, clock: Callable[[], float]) -> None:
        self._runner, self._clock = runner, clock
        self._shape = replace(runner.shape, layers=min(_LAYERS, runner.shape.layers))
        self.most = runner.max_positions - 1
        self.spent = 0.0

    def layer(self, rows: int, keys: int) -> float:
        """Seconds of a layer over ``rows`` rows, spread over ``keys`` positions; a full prefill if as many."""
        runner, layers = self._runner, self._shape.layers
        kv = RequestKV(self._shape, keys, runner.device)
        for layer in range(layers):
            for tensor in kv.read(layer, keys):
                tensor.zero_()
        positions = (torch.arange(rows, device=runner.device) + 1) * keys // rows - 1
        ids = torch.zeros(rows, dtype=torch.long, device=runner.device)

        def run() -> None:
            stepped = runner.rows(ids, AttentionStep(kv, positions, keys, contiguous=rows == keys))
            for layer in range(layers):
                runner.run_layer(layer, stepped)

        return self._best(run) / layers

    def per_pair(self, rows: int) -> float:
        """Attention's seconds for one row looking at one key: many keys against few."""
        few, many = rows, min(16 * rows, self.most // rows * rows)
        if many <= few:
            return 0.0
        seconds = self.layer(rows, many) - self.layer(rows, few + 1)
        return max(seconds, 0.0) / (rows * (many - few) / 2)

    def head(self) -> float:
        runner = self._runner
        kv = RequestKV(self._shape, 1, runner.device)
        step = AttentionStep(kv, torch.zeros(1, dtype=torch.long, device=runner.device), 1, contiguous=False)
        rows = runner.rows(torch.zeros(1, dtype=torch.long, device=runner.device), step)
        return self._best(lambda: runner.logits(rows))

    def placing(self, codec: str, tokens: int = 512) -> float:
        """Seconds per byte from RAM into a request's KV."""
        runner, layers = self._runner, min(_PLACED_LAYERS, self._runner.shape.layers)
        tokens = min(tokens, self.most)
        slab = np.zeros(CODECS[codec].slab_bytes(runner.shape.geometry, tokens), np.uint8)
        kv = RequestKV(replace(runner.shape, layers=layers), tokens, runner.device)
        span = Span(PlannedChunk(Chunk("", "", 0, ""), 1, 0.0, ChunkTokens((), (), 0, "alone", b"")), 0, tokens, True)

        def slabs() -> Iterator[list[np.ndarray]]:
            while True:
                yield [slab]

        def run() -> None:
            with closing(LayerLoader(runner, kv, [span], slabs(), codec)) as loader:  # type: ignore[arg-type]
                loader.ensure(layers - 1)

        return self._best(run) / (layers * slab.nbytes)

    def _best(self, work: Callable[[], object]) -> float:
        """Seconds of the fastest run after a first one that chooses kernels and maps memory."""
        started = self._clock()
        work()
        best = float("inf")
        for number in range(_REPEATS):
            if number and self._clock() - started > _ENOUGH_S:
                break
            self._runner.synchronize()
            began = self._clock()
            work()
            self._runner.synchronize()
            best = min(best, self._clock() - began)
        self.spent = self._clock() - started
        return best
