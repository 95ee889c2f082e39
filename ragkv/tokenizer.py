"""Text to token ids and back, segment by segment.

A prompt is a list of segments, each tokenised alone and joined as ids: a chunk's ids must not depend on its
neighbours, or its stored KV could not be found again. Text of users and documents is always plain: what
looks like a special token in it stays text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3
from jinja2 import TemplateError
from transformers import AutoTokenizer

from ragkv.errors import NotAModelError
from ragkv.types import Message

_SYSTEM, _USER, _ASSISTANT = "RAGKVSYSTEMSLOT", "RAGKVUSERSLOT", "RAGKVASSISTANTSLOT"
_BASE_QUESTION_END = "\nAnswer:"


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.plain = lru_cache(maxsize=65536)(self._plain)
        self.eos_ids = frozenset(i for i in [inner.eos_token_id] if i is not None)
        self.vocab_size = len(inner)
        self.fingerprint = blake3(inner.backend_tokenizer.to_str().encode()).hexdigest(16)
        self.bos = self._leading_bos()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        try:
            inner = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise NotAModelError(f"{folder} holds no usable tokenizer: {error}", path=str(folder)) from error
        if not getattr(inner, "is_fast", False):
            raise NotAModelError(f"{folder} has no tokenizer.json (fast tokenizer)", path=str(folder))
        return cls(inner)

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._inner(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def special(self, text: str) -> tuple[int, ...]:
        """Ids of a template's own text, where special tokens count as such."""
        return tuple(self._inner(text, add_special_tokens=False)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def count(self, text: str) -> int:
        return len(self._inner(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def count_many(self, texts: Sequence[str]) -> list[int]:
        if not texts:
            return []
        batch = self._inner(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return [len(ids) for ids in batch]

    def frame(self, system: str, history: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and after the last user message, which holds chunks and question.

        The chat template is rendered around sentinels and cut there; what stands between two cuts is the
        template's own text. A template that refuses a system message gets the system text in front of the
        first user message. A checkpoint without a template gets a plain completion prompt.
        """
        if not self._inner.chat_template:
            return self._base_frame(system, history)
        rendered, contents = self._render(system, history)
        head, _, tail = rendered.rpartition(_USER)
        return self._fill(head, contents), self.special(tail)

    def _render(self, system: str, history: Sequence[Message]) -> tuple[str, list[str]]:
        turns = [{"role": m.role, "content": _USER if m.role == "user" else _ASSISTANT} for m in history]
        turns.append({"role": "user", "content": _USER})
        contents = [m.content for m in history]
        if not system:
            return self._template(turns), contents
        try:
            rendered = self._template([{"role": "system", "content": _SYSTEM}, *turns])
            if _SYSTEM in rendered:
                return rendered, [system, *contents]
        except TemplateError:
            pass  # the template refuses a system message; fall through to the first user turn
        turns[0] = {"role": turns[0]["role"], "content": f"{_SYSTEM}\n\n{turns[0]['content']}"}
        return self._template(turns), [system, *contents]

    def _template(self, messages: list[dict[str, str]]) -> str:
        return str(self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _fill(self, head: str, contents: list[str]) -> tuple[int, ...]:
        """Ids of ``head`` with its sentinels replaced, in order, by the plain ids of ``contents``."""
        ids: list[int] = []
        for content in contents:
            cuts = [(at, s) for s in (_SYSTEM, _USER, _ASSISTANT) if (at := head.find(s)) >= 0]
            at, sentinel = min(cuts)
            ids += self.special(head[:at])
            ids += self.plain(content)
            head = head[at + len(sentinel) :]
        return (*ids, *self.special(head))

    def _base_frame(self, system: str, history: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        ids = [*self.bos, *(self.plain(system + "\n\n") if system else ())]
        for message in history:
            lead = "Question: " if message.role == "user" else "Answer: "
            ids += self.plain(f"{lead}{message.content}\n")
        return tuple(ids), self.plain(_BASE_QUESTION_END)

    def _leading_bos(self) -> tuple[int, ...]:
        """The BOS a prompt of this checkpoint begins with, if it does."""
        bos = self._inner.bos_token_id
        if bos is None:
            return ()
        added = self._inner("")["input_ids"][:1] == [bos]
        templated = bool(self._inner.chat_template) and self._begins_with(bos)
        return (bos,) if added or templated else ()

    def _begins_with(self, bos: int) -> bool:
        head, _ = self.frame("", [])
        return head[:1] == (bos,)


def chunk_text(text: str) -> str:
    """A chunk as it stands in a prompt: its text, and a blank line that parts it from the next."""
    return text.strip() + "\n\n"


def question_text(question: str) -> str:
    return f"Question: {question}"
