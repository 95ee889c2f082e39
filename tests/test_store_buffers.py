from __future__ import annotations

import gc
import itertools
import threading

import numpy as np
import pytest

from ragkv.errors import StoreError
from ragkv.store.buffers import HUGE_PAGE, Buffers, aligned_empty, cut, footprint
from ragkv.store.header import aligned

KIB = 1 << 10


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_its_last_view_is_gone():
    buffers = Buffers(1 << 20)
    first = buffers.take(100 * KIB)
    at, view = address(first), first[5:10].view(np.int8).reshape(-1)
    del first
    again = address(buffers.take(100 * KIB))
    assert again != at
    kept = memoryview(view)
    del view
    again = address(buffers.take(100 * KIB))
    assert again != at
    del kept
    both = {address(array) for array in [buffers.take(100 * KIB), buffers.take(100 * KIB)]}
    assert at in both


def test_arrays_begin_on_a_page_and_have_the_size_asked_for():
    buffers = Buffers(1 << 30)
    for nbytes in (1, 4095, 4096, 6400, 65537, 100_000, 1 << 20):
        array = buffers.take(nbytes)
        assert (array.nbytes, array.dtype, address(array) % 4096) == (nbytes, np.uint8, 0)
        array[:] = 1


def test_whole_huge_pages_are_asked_for_and_nothing_around_them():
    for count in (1, 2, 4):
        array = aligned_empty(count * HUGE_PAGE)
        assert (array.nbytes, address(array) % HUGE_PAGE) == (count * HUGE_PAGE, 0)
        assert array.base.nbytes >= 4 << 20  # from here on numpy asks the kernel for them
    for nbytes in (0, 1, HUGE_PAGE - 4096, HUGE_PAGE + 4096):
        assert aligned_empty(nbytes).base.nbytes == nbytes + 4096


def test_sizes_that_nearly_agree_take_each_others_place():
    buffers = Buffers(1 << 20)
    first = address(buffers.take(242 * KIB))
    second = address(buffers.take(250 * KIB))
    assert first == second
    for nbytes in (64 * KIB, 100_000, (1 << 21) + 1, 3_000_000):
        assert nbytes <= footprint(nbytes) < nbytes * 9 / 8 + 1
    assert footprint(2 << 20) == 2 << 20


def test_small_buffers_share_whole_huge_pages():
    asked: list[int] = []
    buffers = Buffers(1 << 30, lambda nbytes: asked.append(nbytes) or aligned_empty(nbytes))
    lent = [buffers.take(512 * KIB) for _ in range(8)]
    assert asked == [HUGE_PAGE] * 2
    spans = sorted((address(array), address(array) + array.nbytes) for array in lent)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert buffers.nbytes == sum(asked)
    rng = np.random.default_rng(0)
    for nbytes in [64 * KIB, 1 << 20, (1 << 20) + 1, HUGE_PAGE, *rng.integers(64 * KIB, 40 << 20, 500).tolist()]:
        region, count = cut(nbytes)
        assert region % HUGE_PAGE == 0
        assert region <= 10 * nbytes + HUGE_PAGE
        assert region // count >= nbytes
        assert region / count <= aligned(nbytes) * 9 / 8


def test_a_region_is_given_up_when_the_last_of_its_buffers_is_back():
    buffers = Buffers(2 * HUGE_PAGE)
    lent = [buffers.take(512 * KIB) for _ in range(8)]
    one = lent[0]
    lent.clear()
    other = [buffers.take(HUGE_PAGE) for _ in range(2)]  # the region with nothing lent makes room, the other cannot
    assert buffers.nbytes == 3 * HUGE_PAGE
    del other
    assert buffers.nbytes == 2 * HUGE_PAGE
    one[:] = 7
    again = [buffers.take(512 * KIB) for _ in range(3)]
    for array in again:
        array[:] = 1
    assert (one == 7).all()
    buffers.close()
    del again
    assert buffers.nbytes == HUGE_PAGE
    del one, array
    assert buffers.nbytes == 0


def test_beyond_the_limit_few_lent_buffers_keep_no_regions():
    buffers = Buffers(HUGE_PAGE)
    lent = [buffers.take(64 * KIB) for _ in range(33)]
    assert buffers.nbytes == HUGE_PAGE + 64 * KIB
    kept = [buffers.take(nbytes * KIB) for nbytes in (100, 200, 300)]
    assert buffers.nbytes <= HUGE_PAGE + 64 * KIB + sum(map(footprint, (100 * KIB, 200 * KIB, 300 * KIB)))
    del lent, kept
    assert buffers.nbytes <= HUGE_PAGE


def test_what_is_over_the_limit_is_given_up():
    buffers = Buffers(100 * KIB)
    lent = [buffers.take(32 * KIB) for _ in range(5)]
    assert buffers.nbytes == 160 * KIB  # the limit is on what is kept, not on what is lent
    lent.clear()
    buffers.take(32 * KIB)
    assert buffers.nbytes <= 100 * KIB
    big = buffers.take(96 * KIB)  # of another size: the idle ones make room
    assert buffers.nbytes <= footprint(96 * KIB)
    buffers.close()
    del big
    buffers.close()
    assert buffers.nbytes == 0


def test_memory_stays_within_the_limit_and_what_is_lent_whatever_the_sizes():
    limit, rng, lent = 16 << 20, np.random.default_rng(1), []
    buffers = Buffers(limit)
    for _ in range(2000):
        if lent and rng.random() < 0.5:
            del lent[rng.integers(len(lent))]
        else:
            lent.append(buffers.take(int(rng.integers(1, 3 << 20))))
        assert buffers.nbytes <= limit + sum(footprint(array.nbytes) + 4096 for array in lent)
    lent.clear()
    assert buffers.nbytes <= limit


def test_the_callers_memory_is_used_again_and_again():
    asked = []

    def allocate(nbytes: int) -> np.ndarray:
        asked.append(nbytes)
        return aligned_empty(nbytes)

    buffers = Buffers(1 << 20, allocate)
    for _ in range(5):
        buffers.take(5000)
    assert asked == [8192]


def test_an_allocator_that_fails_is_named_and_not_counted():
    buffers = Buffers(1 << 20, lambda nbytes: np.empty(3, np.uint8))
    with pytest.raises(StoreError, match="allocate"):
        buffers.take(4096)
    assert buffers.nbytes == 0


def test_memory_that_comes_back_inside_take_does_not_wait_for_itself():
    """As when a garbage collection runs while the pool is locked."""
    held: list[np.ndarray] = []

    class Cycle:
        def __init__(self, array: np.ndarray) -> None:
            self.array, self.me = array, self

    def allocate(nbytes: int) -> np.ndarray:
        gc.collect()
        return aligned_empty(nbytes)

    buffers = Buffers(1 << 20, allocate)
    held.append(buffers.take(4096))
    Cycle(held.pop())
    with buffers._lock:  # the collection happens with the lock taken
        gc.collect()
    done = threading.Event()
    threading.Thread(target=lambda: (buffers.take(4096), done.set())).start()
    assert done.wait(10)
    assert buffers.nbytes == 4096  # the one that came back was lent again


@pytest.mark.parametrize("nbytes", [8192, 70_000])
def test_many_threads_never_share_memory(nbytes):
    buffers = Buffers(1 << 20)
    wrong: list[int] = []

    def work(seed: int) -> None:
        for i in range(300):
            array = buffers.take(nbytes)
            array[:] = (seed * 50 + i) % 251
            if not (array == (seed * 50 + i) % 251).all():
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert buffers.nbytes <= 2 * 4 * aligned(footprint(nbytes))  # a thread takes its next before it lets go of the last
