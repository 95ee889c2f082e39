"""Text to token ids and back, segment by segment.

A prompt is a list of segments, each tokenised alone and joined as ids: a chunk's ids must not depend on its
neighbours, or its stored KV could not be found again. Text of users and documents is always plain: what
looks like a special token in it stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3
from jinja2 import TemplateError
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from ragkv.errors import InputError, NotAModelError
from ragkv.types import Message

# One sentinel per turn, so that a template may move, repeat or drop turns: Mistral's puts the system text last.
_SLOT = "RAGKV{}SLOT"
_SLOTS = re.compile(r"(RAGKV\w+?SLOT)")
_SYSTEM, _LAST = _SLOT.format("SYSTEM"), _SLOT.format("LAST")
_BASE_QUESTION_END = "\nAnswer:"


class Tokenizer:
    """A checkpoint's tokenizer and chat template."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        # Two backends, each set once: the library's wrapper switches a flag of the one it holds, and a thread
        # that asks for a template's special tokens would turn those in another thread's document into real ones.
        self._plain_backend = _backend(inner, special=False)
        self._special_backend = _backend(inner, special=True)
        self.plain = lru_cache(maxsize=65536)(self._plain)
        self.eos_ids = frozenset(i for i in [inner.eos_token_id] if i is not None)
        # Without tokens added later: fine-tuned checkpoints often hold some the model has no row for.
        self.vocab_size = int(inner.vocab_size)
        self.fingerprint = blake3(inner.backend_tokenizer.to_str().encode()).hexdigest(16)
        self.bos = self._leading_bos()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        try:
            inner = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise NotAModelError(f"{folder} holds no usable tokenizer: {error}", path=str(folder)) from error
        if not getattr(inner, "is_fast", False):
            raise NotAModelError(f"{folder} has no tokenizer.json (fast tokenizer)", path=str(folder))
        return cls(inner)

    def _plain(self, text: str) -> tuple[int, ...]:
        return tuple(self._plain_backend.encode(_encodable(text), add_special_tokens=False).ids)

    def special(self, text: str) -> tuple[int, ...]:
        """Ids of a template's own text, where special tokens count as such."""
        return tuple(self._special_backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._inner.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def count(self, text: str) -> int:
        return len(self._plain_backend.encode(_encodable(text), add_special_tokens=False).ids)

    def count_many(self, texts: Sequence[str]) -> list[int]:
        batch = self._plain_backend.encode_batch([_encodable(text) for text in texts], add_special_tokens=False)
        return [len(encoding.ids) for encoding in batch]

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint was made to be talked to."""
        return bool(self._inner.chat_template)

    def frame(self, system: str, history: Sequence[Message]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids before and after the last user message, which holds chunks and question.

        The chat template is rendered around sentinels and cut there; what stands between two cuts is the
        template's own text. A template that refuses a system message gets the system text in front of the
        first user message. A checkpoint without a template gets a plain completion prompt.

        Raises:
            InputError: the template refuses this conversation, e.g. turns that do not alternate.
        """
        if not self._inner.chat_template:
            return self._base_frame(system, history)
        try:
            rendered, contents = self._render(system, history)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses this conversation: {error}") from error
        head, _, tail = rendered.rpartition(_LAST)
        return self._fill(head, contents), self.special(tail)

    def between(self, system: str) -> tuple[int, ...]:
        """The ids between an answer, as it was generated, and the next user message.

        Raises:
            InputError: as :meth:`frame`.
        """
        if not self._inner.chat_template:
            return self.plain("\n")
        turn = [Message(role="user", content=""), Message(role="assistant", content="")]
        try:
            rendered, _ = self._render(system, turn)
        except TemplateError as error:
            raise InputError(f"the model's chat template refuses a second turn: {error}") from error
        return self.special(_SLOTS.split(rendered.rpartition(_LAST)[0])[-1])

    def _render(self, system: str, history: Sequence[Message]) -> tuple[str, dict[str, str]]:
        """The template's text around sentinels, and what each sentinel stands for."""
        turns = [{"role": m.role, "content": _SLOT.format(i)} for i, m in enumerate(history)]
        turns.append({"role": "user", "content": _LAST})
        contents = {_SLOT.format(i): m.content for i, m in enumerate(history)}
        if not system:
            return self._template(turns), contents
        contents[_SYSTEM] = system
        try:
            rendered = self._template([{"role": "system", "content": _SYSTEM}, *turns])
            if _SYSTEM in rendered:
                return rendered, contents
        except TemplateError:
            pass  # the template refuses a system message; fall through to the first user turn
        turns[0] = {"role": turns[0]["role"], "content": f"{_SYSTEM}\n\n{turns[0]['content']}"}
        return self._template(turns), contents

    def _template(self, messages: list[dict[str, str]]) -> str:
        return str(self._inner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _fill(self, head: str, contents: dict[str, str]) -> tuple[int, ...]:
        """Ids of ``head`` with its sentinels replaced by the plain ids of ``contents``."""
        ids: list[int] = []
        for piece in _SLOTS.split(head):
            ids += self.plain(contents[piece]) if piece in contents else self.special(piece)
        return tuple(ids)

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


def _backend(inner: Any, *, special: bool) -> Backend:
    description = json.loads(inner.backend_tokenizer.to_str())
    if not special:
        # All added tokens, not only those flagged special: `<think>` in a document is text, too.
        description |= {"added_tokens": [], "post_processor": None}
    backend = Backend.from_str(json.dumps(description))
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encodable(text: str) -> str:
    """``text`` with lone surrogates, which no tokenizer takes, replaced by question marks."""
    return text.encode("utf-8", "replace").decode()


def chunk_text(text: str) -> str:
    """A chunk as it stands in a prompt: its text, and a blank line that parts it from the next."""
    return text.strip() + "\n\n"


def question_text(question: str) -> str:
    return f"Question: {question}"
