"""What the chunk store tells people: its state, what a check found, gauges."""

from __future__ import annotations

from dataclasses import asdict

from ragkv.store import ChunkStore, StoreStats
from ragkv.types import RemoteInfo, StoreCheck, StoreInfo


def store_metrics(stats: StoreStats) -> dict[str, float]:
    """The store's gauges by name; those of a remote tier only where there is one."""
    gauges: dict[str, float] = {
        "store_entries": stats.entries,
        "store_bytes": stats.bytes,
        "store_capacity_bytes": stats.capacity_bytes,
        "store_ram_bytes": stats.ram_bytes,
        "store_hits_ram": stats.hits_ram,
        "store_hits_ssd": stats.hits_ssd,
        "store_misses": stats.misses,
        "store_corrupt": stats.corrupt,
        "store_evictions": stats.evictions,
    }
    if stats.remote is None:
        return gauges
    numbers = {name: value for name, value in asdict(stats.remote).items() if isinstance(value, int)}
    return {
        **gauges,
        "store_hits_remote": stats.hits_remote,
        "store_remote_open": stats.remote.breaker != "closed",
        **{f"store_remote_{name}": value for name, value in numbers.items()},
    }


def store_info(store: ChunkStore, sessions: ChunkStore | None) -> StoreInfo:
    """Of the chunk store, and how much the one of idle conversations holds, if there is one."""
    stats = store.stats()
    return StoreInfo(
        path=str(store.folder.root),
        policy=store.policy,
        entries=stats.entries,
        bytes=stats.bytes,
        capacity_bytes=stats.capacity_bytes,
        ram_entries=stats.ram_entries,
        ram_bytes=stats.ram_bytes,
        ram_capacity_bytes=stats.ram_capacity_bytes,
        hits_ram=stats.hits_ram,
        hits_ssd=stats.hits_ssd,
        hits_remote=stats.hits_remote,
        misses=stats.misses,
        corrupt=stats.corrupt,
        evictions=stats.evictions,
        entries_by_model=stats.models,
        session_bytes=sessions.stats().bytes if sessions else 0,
        remote=None if stats.remote is None else RemoteInfo(**asdict(stats.remote)),
    )


def store_check(store: ChunkStore, *, fix: bool) -> StoreCheck:
    report = store.check(fix=fix)
    return StoreCheck(
        entries=report.entries,
        orphan_files=len(report.orphans),
        missing_files=len(report.missing),
        corrupt_entries=len(report.corrupt),
        miscounted_entries=len(report.miscounted),
        foreign_entries=len(report.foreign),
        tables_sound=report.tables_sound,
        fixed=report.fixed,
        ok=report.clean or report.fixed,
    )
