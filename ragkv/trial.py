"""How a controller's choice went: the time its prefill took, and how fast what it read came."""

from __future__ import annotations

import logging
import threading
from contextlib import closing
from dataclasses import dataclass

from ragkv.clock import Stopwatch
from ragkv.controller import Actual, Choice, Controller, Reading
from ragkv.errors import StoreError
from ragkv.store import ChunkStore, LayerReader, OpenEntry

_CONTENDED = 0.05
# One entry is to be read as fast as several are.
_BESIDE_DEPTH = 8
log = logging.getLogger("ragkv")


@dataclass
class Trial:
    """What the controller chose, and what is needed to see how it went: of the watch its parts before, and what it had
    shared; the reader after."""

    choice: Choice
    before: dict[str, float]
    shared: float = 0.0
    reader: LayerReader | None = None

    def actual(self, watch: Stopwatch, overlapped: bool) -> Actual:
        spent = {part: seconds - self.before.get(part, 0.0) for part, seconds in watch.parts.items()}
        queue = spent.pop("queue", 0.0)
        total, load, select = sum(spent.values()), spent.get("load", 0.0), spent.get("select", 0.0)
        return Actual(
            total,
            load,
            select,
            total - load - select,
            waited=self.reader.waited if self.reader else 0.0,
            readings=_readings(self.reader) if self.reader else (),
            # A device works on after the host has turned to others: then its time cannot be told from theirs. Nor can
            # that of a layer that was run for several.
            contended=(overlapped and queue > _CONTENDED * total) or watch.shared > self.shared,
        )


def _readings(reader: LayerReader) -> list[Reading]:
    return [Reading(tier, one.nbytes, one.seconds) for tier, one in reader.traffic.items() if one.seconds]


def read_beside(store: ChunkStore, entry: OpenEntry, controller: Controller) -> None:
    """Read an entry whose chunk is being computed, on a thread of its own: it is then in RAM, and its tier measured."""
    reader = store.open_layers([entry], depth=_BESIDE_DEPTH)

    def read() -> None:
        readings: list[Reading] = []
        try:
            with closing(reader):
                if not any(isinstance(slab, StoreError) for slabs in reader for slab in slabs):
                    readings = _readings(reader)
        except StoreError as error:  # the store was closed meanwhile
            log.debug("reading a chunk beside its prompt ended: %s", error)
        finally:
            controller.hear(readings)

    threading.Thread(target=read, name="ragkv-beside", daemon=True).start()
