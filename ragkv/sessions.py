"""Conversations that a server remembers between turns: which tokens stand in them, and how their KV came about."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

from ragkv.lineage import Lineage
from ragkv.types import Message

# A transcript of 8,000 tokens takes 64 kB.
MOST = 4096


@dataclass(frozen=True)
class Session:
    """A conversation after some turns.

    Attributes:
        ids: all its tokens, retrieved chunks and answers included, as the model saw them.
        chunks: keys of the chunks that stand in it.
    """

    system: str
    turns: tuple[Message, ...]
    ids: tuple[int, ...]
    lineage: Lineage
    chunks: frozenset[bytes]


class Sessions:
    """The last ``most`` conversations, by who leads them and the name they gave it. Thread-safe."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._kept: OrderedDict[tuple[str, str], Session] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tenant: str, name: str) -> Session | None:
        with self._lock:
            session = self._kept.get((tenant, name))
            if session is not None:
                self._kept.move_to_end((tenant, name))
            return session

    def put(self, tenant: str, name: str, session: Session) -> None:
        with self._lock:
            self._kept[tenant, name] = session
            self._kept.move_to_end((tenant, name))
            while len(self._kept) > self._most:
                self._kept.popitem(last=False)

    def __len__(self) -> int:
        return len(self._kept)
