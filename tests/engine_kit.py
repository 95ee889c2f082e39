"""Documents, and ways to look into a running engine, for the tests of the core."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ragkv.engine import Engine
from ragkv.retrievers import Document

PATIENCE_S = 20.0
NAMES = ("Ada", "Bela", "Cyro", "Dara", "Enno")


def document(name: str, sentences: int = 12, **fields) -> Document:
    """About a dozen tokens a sentence; every sentence differs."""
    text = " ".join(
        f"In the year {1900 + i} {name} moved to house number {i * 7} by the river." for i in range(sentences)
    )
    return Document(**{"id": name.lower(), "text": text, "title": f"Life of {name}", **fields})


DOCUMENTS = [document(name, metadata={"initial": name[0]}) for name in NAMES]
QUESTION = "Where did Bela move in 1903?"


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.002)


def wait_idle(engine: Engine) -> None:
    def idle() -> bool:
        health = engine.health()
        return not (health.running or health.queued or health.encoding)

    eventually(idle)


class Probe:
    """Watches every layer the engine runs: ``layers`` is the number of rows of each; holds the thread when told to.

    ``hold_at(rows)`` is asked before each layer; while it holds, ``held`` is set, until :meth:`release`.
    """

    def __init__(self, engine: Engine) -> None:
        self.layers: list[int] = []
        self.held = threading.Event()
        self._go = threading.Event()
        self._hold_at: Callable[[int], bool] | None = None
        self.caches: list[weakref.ref] = []
        runner = engine._checkpoint.runner
        run_layer, new_kv = runner.run_layer, runner.new_kv

        def watched_layer(layer, rows):
            count = rows.hidden.shape[1]
            if self._hold_at and self._hold_at(count):
                self._hold_at = None
                self.held.set()
                assert self._go.wait(PATIENCE_S)
            self.layers.append(count)
            run_layer(layer, rows)

        def watched_kv(*args, **kwargs):
            kv = new_kv(*args, **kwargs)
            self.caches.append(weakref.ref(kv))
            return kv

        runner.run_layer, runner.new_kv = watched_layer, watched_kv

    def hold(self, at: Callable[[int], bool]) -> None:
        self._go.clear()
        self.held.clear()
        self._hold_at = at

    def wait_held(self) -> None:
        assert self.held.wait(PATIENCE_S)

    def release(self) -> None:
        self._hold_at = None
        self._go.set()

    def kv_alive(self) -> int:
        gc.collect()
        return sum(ref() is not None for ref in self.caches)


def prefilling(rows: int) -> bool:
    return rows > 1


def decoding(rows: int) -> bool:
    return rows == 1


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
