"""The device tier: hot chunk entries kept on the accelerator, un-rotated and as stored, below the RAM tier.

It holds what a blend has just brought to the device, so filling it costs no transfer of its own, and a blend whose
chunks are here moves nothing over the link. What is here is verified: its bytes came through checksummed reading,
every layer of them, before anybody else is given the entry.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import torch

from ragkv.store import EntryHeader
from ragkv.store.policies import CostAware, evict
from ragkv.store.shelf import MemoryItem, MemoryShelf

ALIGNMENT = 512
"""Layers begin on multiples of it, as device memory is handed out."""
_SHARE_OF_FREE = 0.1


class DeviceTier:
    """Entries on ``device``, never above ``capacity`` bytes; 0 keeps none. Who leaves says the cost-aware policy.

    Prefills lease entries on the thread that owns the model; :meth:`drop` may be called from any thread. Memory is
    handed out and taken back in the order of that thread's stream, so who reads or writes entries on another stream
    must be done before the lease is closed.
    """

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity, self.device = capacity, device
        self.hits = 0
        self._entries: dict[bytes, torch.Tensor] = {}
        self._shelf, self._policy = MemoryShelf(), CostAware()
        self._leases: set[DeviceLease] = set()
        self._taken = 0  # entries and what leases reserve
        self._lock = threading.Lock()

    def lease(self, headers: Iterable[EntryHeader]) -> DeviceLease:
        """Hold those of these entries that are here, and memory for the others, as far as there is room.

        What is held makes room for nobody, so that a prompt larger than the tier does not wash itself out.
        """
        wanted = {header.key: header for header in headers}
        lease = DeviceLease(self)
        if not self.capacity:
            return lease
        with self._lock:
            self._leases.add(lease)
            for key in wanted:
                if key in self._entries:
                    self._use(key)
                    lease.hits[key] = self._entries[key]
            self.hits += len(lease.hits)
            for key, header in wanted.items():
                if key not in lease.hits and (memory := self._memory(header)) is not None:
                    lease.fills[key] = memory
        return lease

    def drop(self, key: bytes) -> None:
        """The entry is gone from the store, or wrong: nobody is given it again, nor what is being filled in for it."""
        with self._lock:
            for lease in self._leases:
                lease.dropped.add(key)
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._shelf.delete(key)
                self._taken -= entry.nbytes

    def clear(self) -> None:
        """Drop everything."""
        for key in list(self._entries):
            self.drop(key)

    @property
    def nbytes(self) -> int:
        """Bytes taken: by entries, and by those being filled in."""
        return self._taken

    def stats(self) -> dict[str, float]:
        """Numbers for a metrics page."""
        return {
            "device_tier_entries": len(self._entries),
            "device_tier_bytes": self._taken,
            "device_tier_capacity_bytes": self.capacity,
            "device_tier_hits": self.hits,
        }

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def end(self, lease: DeviceLease, commit: bool) -> None:
        """For the lease alone."""
        with self._lock:
            self._leases.discard(lease)
            for key, entry in lease.fills.items():
                if commit and key not in lease.dropped and key not in self._entries:
                    item = MemoryItem(entry.nbytes, cost=entry.nbytes)
                    self._entries[key] = entry
                    self._shelf.put(key, item.at(self._policy.admit(self._shelf, item, self._shelf.recall(key))))
                else:
                    self._taken -= entry.nbytes

    def _use(self, key: bytes) -> None:
        item = self._shelf.get(key)
        if item is not None:
            self._shelf.move(key, self._policy.use(self._shelf, item, 1))

    def _memory(self, header: EntryHeader) -> torch.Tensor | None:
        """uint8 (layers, bytes of a layer), or None if it does not fit beside what is held."""
        shape = (header.geometry.layers, -(-header.slab_bytes // ALIGNMENT) * ALIGNMENT)
        if not self._make_room(shape[0] * shape[1]):
            return None
        try:
            memory = torch.empty(shape, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:
            return None  # requests come first; the tier stays as small as they leave it
        self._taken += memory.nbytes
        return memory

    def _make_room(self, nbytes: int) -> bool:
        held = {key for lease in self._leases for key in lease.hits}
        stays = sum(self._entries[key].nbytes for key in held if key in self._entries)
        stays += sum(memory.nbytes for lease in self._leases for memory in lease.fills.values())
        if stays + nbytes > self.capacity:
            return False
        for key, item in self._policy.victims(self._shelf):
            if self._taken + nbytes <= self.capacity:
                break
            if key not in held:
                evict(self._shelf, key, item)
                del self._entries[key]
                self._taken -= item.nbytes
        return self._taken + nbytes <= self.capacity


class DeviceLease:
    """One prefill's view of the tier; close it when the prefill ends, however it ends.

    Attributes:
        hits: entries that are here, by key: uint8 (layers, at least the bytes of a slab), each row a slab as stored.
            Not to be written.
        fills: memory of the same form for entries that are to come, with anything in it. Whoever places an entry's
            layers copies its verified slabs in on the way; :meth:`commit` hands them over.
    """

    def __init__(self, tier: DeviceTier) -> None:
        self.hits: dict[bytes, torch.Tensor] = {}
        self.fills: dict[bytes, torch.Tensor] = {}
        self.dropped: set[bytes] = set()
        self._tier: DeviceTier | None = tier

    def commit(self) -> None:
        """Every layer of ``fills`` is filled in: the tier keeps them, but for those dropped meanwhile. Ends the
        lease."""
        self._end(commit=True)

    def close(self) -> None:
        """End the lease; what was not committed is given up. Closing twice is fine."""
        self._end(commit=False)

    def _end(self, commit: bool) -> None:
        tier, self._tier = self._tier, None
        if tier is not None:
            tier.end(self, commit)


def device_capacity(setting: int | None, device: torch.device) -> int:
    """Bytes of the device tier: ``setting``, or by default a tenth of what is free on a CUDA device, nothing on a CPU
    (where the RAM tier is as near)."""
    if setting is not None:
        return setting
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(_SHARE_OF_FREE * free)
