"""Cache policies on traces: the very classes that serve, on a shelf in memory, against what could be had at best."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv.eval.traces import Ints, Trace
from ragkv.store.policies import Policy, evict, make_policy
from ragkv.store.shelf import MemoryItem, MemoryShelf

Found = NDArray[np.bool_]


def compare(
    traces: Sequence[Trace],
    policies: Sequence[str],
    shares: Sequence[float],
    *,
    say: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, Any]:
    """Every policy on every trace, with room for each of ``shares`` (0 to 1) of the trace's distinct tokens.

    ``rows`` has one dict per trace, share and policy, with the scores of ``Trace.score``. Two more "policies" say
    what could be had: ``belady`` knows the future and evicts what is asked for last, which is the optimum (in
    hits and tokens) where all sizes are equal; ``bound`` is what no policy can exceed, see ``bound``.
    ``overall`` is each policy's mean of ``saved``, ``winner`` the policy where it is highest.
    """
    rows: list[dict[str, Any]] = []
    total = len(traces) * len(shares)
    for number, (trace, share) in enumerate((t, s) for t in traces for s in shares):
        say("simulate", number, total)
        capacity = int(share * trace.tokens.sum())
        scores = {name: trace.score(simulate(trace, make_policy(name), capacity)) for name in policies}
        scores["belady"] = trace.score(belady(trace, capacity))
        scores["bound"] = bound(trace, capacity)
        at = {"trace": trace.name, "share": share}
        rows += [at | {"policy": name} | score for name, score in scores.items()]
    say("simulate", total, total)
    overall = {name: statistics.fmean(r["saved"] for r in rows if r["policy"] == name) for name in policies}
    return {"rows": rows, "overall": overall, "winner": max(overall, key=overall.__getitem__)}


def simulate(trace: Trace, policy: Policy, capacity: int) -> Found:
    """Which references find their chunk, (references,). A chunk that is missing is computed and put."""
    items = [MemoryItem(int(t), int(c)) for t, c in zip(trace.tokens, trace.cost, strict=True)]
    keys = [number.to_bytes(8, "little") for number in range(len(items))]
    shelf = MemoryShelf()
    found = np.zeros(len(trace.chunks), bool)
    for at, number in enumerate(trace.chunks.tolist()):
        key = keys[number]
        item = shelf.get(key)
        if item is not None:
            found[at] = True
            shelf.move(key, policy.use(shelf, item, 1))
        elif items[number].nbytes <= capacity:
            make_room(shelf, policy, capacity - items[number].nbytes)
            shelf.put(key, items[number].at(policy.admit(shelf, items[number], shelf.recall(key))))
    return found


def make_room(shelf: MemoryShelf, policy: Policy, room: int) -> None:
    """Evict until no more than ``room`` is taken."""
    if sum(shelf.state.nbytes) <= room:
        return
    for key, item in policy.victims(shelf):
        evict(shelf, key, item)
        if sum(shelf.state.nbytes) <= room:
            return


def belady(trace: Trace, capacity: int) -> Found:
    """Which references find their chunk if the one asked for last (or never again) always leaves first."""
    later = next_use(trace.chunks).tolist()
    tokens = trace.tokens.tolist()
    here: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    used = 0
    found = np.zeros(len(later), bool)
    for at, number in enumerate(trace.chunks.tolist()):
        if number in here:
            found[at] = True
        elif tokens[number] <= capacity:
            used += tokens[number]
            while used > capacity:
                when, victim = heapq.heappop(heap)
                if here.get(victim) == -when:
                    used -= tokens[victim]
                    del here[victim]
        else:
            continue
        here[number] = later[at]
        heapq.heappush(heap, (-later[at], number))
    return found


def bound(trace: Trace, capacity: int) -> dict[str, float]:
    """What no policy can exceed, for ``hits``, ``tokens`` and ``saved`` each on its own.

    A hit needs its chunk's bytes for all the time since its last use. If the capacity had to hold only on the
    average over the whole trace, the best choice would be the hits with the highest value per byte and time.
    (PFOO-L of Berger, Beckmann and Harchol-Balter, "Practical bounds on optimal caching with variable object
    sizes", SIGMETRICS 2018, with values.)
    """
    later = next_use(trace.chunks)
    here = np.flatnonzero(later < len(later))
    number = trace.chunks[here]
    need = (later[here] - here) * trace.tokens[number].astype(float)
    budget = float(capacity) * len(later)

    def best(value: Ints) -> float:
        order = np.argsort(need / value[number], kind="stable")
        spent = np.cumsum(need[order])
        part = np.clip((budget - (spent - need[order])) / need[order], 0, 1)
        return float((part * value[number][order]).sum() / value[trace.chunks].sum())

    return {"hits": best(np.ones_like(trace.tokens)), "tokens": best(trace.tokens), "saved": best(trace.cost)}


def next_use(chunks: Ints) -> Ints:
    """Per reference, when its chunk is referred to next; (references,), their number where it never is."""
    order = np.argsort(chunks, kind="stable")
    later = np.full(len(chunks), len(chunks), np.int64)
    same = chunks[order[1:]] == chunks[order[:-1]]
    later[order[:-1][same]] = order[1:][same]
    return later


def tables(result: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """A table per score: a line for each trace and size, a column for each policy."""
    return {score: _pivot(result["rows"], score) for score in ("saved", "hits")}


def _pivot(rows: Sequence[dict[str, Any]], score: str) -> list[dict[str, Any]]:
    lines: dict[tuple[str, float], dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(
            (row["trace"], row["share"]), {"trace": row["trace"], "size": f"{100 * row['share']:g} %"}
        )
        line[row["policy"]] = row[score]
    return list(lines.values())
