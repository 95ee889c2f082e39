from __future__ import annotations

import errno
import fcntl
import os

import pytest

from ragkv.errors import StoreError
from ragkv.eval.disk import raw_read, raw_write

MIB = 1 << 20


def test_what_was_written_is_read_in_full(tmp_path):
    paths = [tmp_path / name for name in "ab"]
    written = raw_write(paths, 3 * MIB, queue_depth=2, block=MIB)
    assert [path.stat().st_size for path in paths] == [3 * MIB, 3 * MIB]
    assert paths[0].read_bytes()[:4096].count(0) < 100  # random, so that no disk can shrink it
    read = raw_read(paths, queue_depth=3, block=2 * MIB)
    assert (written.nbytes, read.nbytes) == (6 * MIB, 6 * MIB)
    assert read.gbps > 0


def test_without_direct_io_the_figure_says_so(tmp_path, monkeypatch):
    real = fcntl.fcntl

    def refuse(fd, command, argument=0):
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, command, argument)

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert not raw_write([tmp_path / "a"], MIB).direct
    assert not raw_read([tmp_path / "a"]).direct


def test_bad_requests_are_named_and_leak_nothing(tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StoreError, match="whole pages"):
        raw_write([tmp_path / "a"], 1000)
    with pytest.raises(StoreError, match="No such file"):
        raw_read([tmp_path / "none"])
    raw_write([tmp_path / "a"], MIB)
    with pytest.raises(StoreError, match="exists"):
        raw_write([tmp_path / "a"], MIB)
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: 0)
    with pytest.raises(StoreError, match="fewer bytes"):
        raw_read([tmp_path / "a"])
    assert len(os.listdir("/proc/self/fd")) == before
