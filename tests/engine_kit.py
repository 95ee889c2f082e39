"""Documents, and ways to look into a running engine, for the tests of the core."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from ragkv.engine import Engine
from ragkv.retrievers import Document
from tests.store_kit import PATIENCE_S, eventually

NAMES = ("Ada", "Bela", "Cyro", "Dara", "Enno")


def document(name: str, sentences: int = 12, **fields) -> Document:
    """About a dozen tokens a sentence; every sentence differs."""
    text = " ".join(
        f"In the year {1900 + i} {name} moved to house number {i * 7} by the river." for i in range(sentences)
    )
    return Document(**{"id": name.lower(), "text": text, "title": f"Life of {name}", **fields})


DOCUMENTS = [document(name, metadata={"initial": name[0]}) for name in NAMES]
QUESTION = "Where did Bela move in 1903?"


def wait_idle(engine: Engine) -> None:
    def idle() -> bool:
        health = engine.health()
        return not (health.running or health.queued or health.encoding)

    eventually(idle)


class Ran(NamedTuple):
    """``rows`` tokens went through one layer of a prompt's or chunk's prefill, or through all of a decode step."""

    what: Literal["layer", "decode"]
    rows: int


class Probe:
    """Logs what the engine computes, in order, and holds its thread when told to.

    ``hold_at(ran)`` is asked before each layer or decode step; when it says so, ``held`` is set and the thread waits
    for :meth:`release`.
    """

    def __init__(self, engine: Engine) -> None:
        self.log: list[Ran] = []
        self.held = threading.Event()
        self._go = threading.Event()
        self._hold_at: Callable[[Ran], bool] | None = None
        self.workspaces: list[weakref.ref] = []
        self._pool = engine._loop._pool
        runner, decoder = engine._checkpoint.runner, engine._loop._decodes._decoder
        run_layer, new_kv, step = runner.run_layer, runner.new_kv, decoder.step

        def watched_layer(layer, rows):
            self._see(Ran("layer", rows.hidden.shape[1]))
            run_layer(layer, rows)

        def watched_step(lanes):
            self._see(Ran("decode", len(lanes)))
            return step(lanes)

        def watched_kv(*args, **kwargs):
            kv = new_kv(*args, **kwargs)
            self.workspaces.append(weakref.ref(kv))
            return kv

        runner.run_layer, runner.new_kv, decoder.step = watched_layer, watched_kv, watched_step

    def _see(self, ran: Ran) -> None:
        if self._hold_at and self._hold_at(ran):
            self._hold_at = None
            self.held.set()
            assert self._go.wait(PATIENCE_S)
        self.log.append(ran)

    @property
    def layers(self) -> list[int]:
        """Rows of each layer of a prefill."""
        return [ran.rows for ran in self.log if prefilling(ran)]

    @property
    def steps(self) -> list[int]:
        """Rows of each decode step."""
        return [ran.rows for ran in self.log if decoding(ran)]

    def hold(self, at: Callable[[Ran], bool]) -> None:
        self._go.clear()
        self.held.clear()
        self._hold_at = at

    def wait_held(self) -> None:
        assert self.held.wait(PATIENCE_S)

    def release(self) -> None:
        self._hold_at = None
        self._go.set()

    def all_released(self) -> bool:
        """No prefill's workspace is alive, and nobody needs a block of the pool; asked while nothing runs."""
        gc.collect()
        return not any(ref() for ref in self.workspaces) and self._pool.available == self._pool.memory.blocks


def prefilling(ran: Ran) -> bool:
    return ran.what == "layer"


def decoding(ran: Ran) -> bool:
    return ran.what == "decode"


@contextmanager
def in_threads(*calls: Callable[[], object]) -> Iterator[list[object]]:
    """Runs ``calls``; afterwards the list holds their results, or exceptions, in order."""
    results: list[object] = [None] * len(calls)

    def run(index: int) -> None:
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    yield results
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), "a call hangs"
