"""A quality run's cases, spread over processes that each have a model of their own."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing
from pathlib import Path

from ragkv.errors import RagkvError
from ragkv.eval.asker import Asker, Bench, Marks
from ragkv.eval.cases import Case

Say = Callable[[str, int, int], None]
_Numbered = Generator[tuple[int, Marks], None, None]
# A worker keeps its asker, and with it the model, from case to case.
_asker: Asker | None = None


def ask_all(bench: Bench, cases: Sequence[Case], *, jobs: int, say: Say) -> list[Marks]:
    """Marks of every case, in the order of ``cases`` whoever asked them.

    Raises:
        RagkvError: what went wrong in a process, or that one died.
    """
    total = sum(len(case.questions) for case in cases)
    by_number: dict[int, Marks] = {}
    done = 0
    say("ask", done, total)
    with tempfile.TemporaryDirectory(prefix="ragkv-quality-") as name:
        folder = Path(name)
        asked = _here(bench, cases, folder) if jobs == 1 else _spread(bench, cases, folder, jobs)
        with closing(asked):
            for number, by_number[number] in asked:
                done += len(cases[number].questions)
                say("ask", done, total)
    return [by_number[number] for number in range(len(cases))]


def _here(bench: Bench, cases: Sequence[Case], folder: Path) -> _Numbered:
    with bench.asker(folder / "store") as asker:
        for number, case in enumerate(cases):
            yield number, asker.ask(case)


def _spread(bench: Bench, cases: Sequence[Case], folder: Path, jobs: int) -> _Numbered:
    others = multiprocessing.active_children()
    # Only this process answers Ctrl-C; it ends the workers.
    pool = ProcessPoolExecutor(
        min(jobs, len(cases)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    with pool:
        try:
            numbers = {pool.submit(_ask, bench, case, folder): number for number, case in enumerate(cases)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()
        except BaseException as error:
            # Leaving the pool would wait for cases that are being asked.
            for worker in set(multiprocessing.active_children()).difference(others):
                worker.terminate()
            if isinstance(error, BrokenProcessPool):
                raise RagkvError(
                    f"one of {jobs} processes died, perhaps for want of memory; try fewer --jobs"
                ) from error
            raise


def _ask(bench: Bench, case: Case, folder: Path) -> Marks:
    global _asker
    if _asker is None:
        until_exit = ExitStack()
        atexit.register(until_exit.close)
        _asker = until_exit.enter_context(bench.asker(folder / str(os.getpid())))
    return _asker.ask(case)
