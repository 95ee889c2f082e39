"""Token ids to streamable text: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from ragkv.tokenizer import Tokenizer

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Incremental decoding of one answer.

    ``text`` is all the text handed out so far; ``stopped`` is set once a stop string was met, which is cut
    off together with all that follows.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Decoding starts at `_prefix`, a few tokens back, because a token's text can depend on the one before.
        self._prefix = self._read = 0
        self._pending = ""
        self.text = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that is now certain, possibly empty."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        now = self._tokenizer.decode(self._ids[self._prefix :])
        if now.endswith(_INCOMPLETE) or len(now) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(self._pending + now[len(before) :])

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        rest = self._pending + self._tokenizer.decode(self._ids[self._prefix :])[len(before) :]
        self._pending = ""
        at = self._first_stop(rest)
        self.stopped = at is not None
        self.text += rest[:at]
        return rest[:at]

    def _release(self, text: str) -> str:
        at = self._first_stop(text)
        if at is not None:
            self.stopped, self._pending = True, ""
        else:
            at = len(text) - self._held_back(text)
            self._pending = text[at:]
        self.text += text[:at]
        return text[:at]

    def _first_stop(self, text: str) -> int | None:
        found = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        return min(found) if found else None

    def _held_back(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
