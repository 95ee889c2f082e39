from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest

from ragkv.errors import StoreError, StoreFullError
from ragkv.store import commit
from ragkv.store.check import row_of
from ragkv.store.commit import GroupCommit
from ragkv.store.header import EntryHeader
from ragkv.store.index import Index
from ragkv.store.txn import IndexTxn
from tests.store_kit import GEOMETRY, TOKENS, key_for


@pytest.fixture
def index(tmp_path):
    index = Index(tmp_path / "index", read_only=False)
    yield index
    index.close()


def enter(i: int) -> Callable[[IndexTxn], int]:
    def work(txn: IndexTxn) -> int:
        txn.put(key_for(i), row_of(EntryHeader(key_for(i), GEOMETRY, TOKENS, "m"), 4096))
        return i

    return work


class Crowd:
    """Work that arrives while a first piece holds the transaction, and is served together afterwards."""

    def __init__(self, commits: GroupCommit, index: Index) -> None:
        self.commits = commits
        self.answers: dict[int, Any] = {}
        self.transactions = 0
        write = index.write

        def counted(work: Callable[[IndexTxn], Any]) -> Any:
            self.transactions += 1
            return write(work)

        index.write = counted

    def run(self, *works: Callable[[IndexTxn], Any], folder: str | None = None) -> None:
        inside, go = threading.Event(), threading.Event()

        def first(txn: IndexTxn) -> None:
            inside.set()
            go.wait(10)

        threads = [threading.Thread(target=self.commits.run, args=(first,))]
        threads[0].start()
        inside.wait(10)
        for i, work in enumerate(works):
            threads.append(threading.Thread(target=self._one, args=(i, work, folder)))
            threads[-1].start()
        while len(self.commits._waiting) < len(works):
            pass
        go.set()
        for thread in threads:
            thread.join(10)

    def _one(self, i: int, work: Callable[[IndexTxn], Any], folder: str | None) -> None:
        try:
            self.answers[i] = self.commits.run(work, folder=folder)
        except BaseException as error:
            self.answers[i] = error


def test_work_that_waits_together_shares_a_transaction_and_a_sync(index, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(commit, "sync_folder", synced.append)
    crowd = Crowd(GroupCommit(index), index)
    crowd.run(*map(enter, range(5)), folder=str(tmp_path))
    assert crowd.answers == {i: i for i in range(5)}
    assert crowd.transactions == 2
    assert synced == [str(tmp_path)]
    assert all(index.get_many([key_for(i) for i in range(5)]))


def test_a_failing_one_fails_alone_and_leaves_nothing(index):
    def fail(txn: IndexTxn) -> None:
        enter(9)(txn)
        raise StoreFullError("no room")

    crowd = Crowd(GroupCommit(index), index)
    crowd.run(enter(0), fail, enter(1))
    assert crowd.answers[0] == 0
    assert crowd.answers[2] == 1
    assert isinstance(crowd.answers[1], StoreFullError)
    rows = index.get_many([key_for(i) for i in (0, 1, 9)])
    assert [row is not None for row in rows] == [True, True, False]


def test_names_are_durable_before_their_rows(index, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(commit, "sync_folder", lambda path: seen.append(index.get_many([key_for(1)])[0]))
    GroupCommit(index).run(enter(1), folder=str(tmp_path))
    assert seen == [None]
    assert index.get_many([key_for(1)])[0] is not None


def test_a_folder_that_cannot_be_synced_enters_nothing(index, tmp_path, monkeypatch):
    def fsync(fd: int) -> None:
        raise OSError(5, "Input/output error")

    commits = GroupCommit(index)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(StoreError, match="Input/output"):
        commits.run(enter(1), folder=str(tmp_path))
    monkeypatch.undo()
    assert index.get_many([key_for(1)])[0] is None
    assert commits.run(enter(1)) == 1


def test_whoever_waits_behind_an_interrupted_one_is_served(index):
    interrupted = []

    def interrupt(txn: IndexTxn) -> str:
        if not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        return "again"

    crowd = Crowd(GroupCommit(index), index)
    crowd.run(interrupt, enter(1), enter(2))
    assert sum(isinstance(answer, KeyboardInterrupt) for answer in crowd.answers.values()) == 1
    assert len(crowd.answers) == 3
    assert crowd.commits.run(enter(3)) == 3


def test_work_of_many_threads_is_all_done(index):
    commits = GroupCommit(index)
    threads = [
        threading.Thread(target=lambda n=n: [commits.run(enter(100 * n + i)) for i in range(20)]) for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(index.get_many([key_for(100 * n + i) for n in range(6) for i in range(20)]))
