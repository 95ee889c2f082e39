"""The plain twin of ragkv/echoes.py: equal words found by sorting, every value spread over all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ragkv import echoes
from ragkv.plan import PromptPlan

Floats = NDArray[np.float32]


def hints(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how likely a token's stored KV is stale in what the question needs; only their order and their
    ratios mean anything. 0 outside chunks."""
    if not plan.spans:
        return np.zeros(len(plan.ids), np.float32)
    words = _Words(plan)
    relevance, leads = words.relevance()
    own = np.maximum(words.met_again(), np.maximum(words.asked(), words.led(leads)))
    stale = words.widened(own)
    stale += echoes._HEADS * words.head + echoes._APART * words.apart + echoes._OTHER
    weights = (relevance + np.float32(echoes._UNRELATED)) * (words.document >= 0)
    out = np.zeros(len(plan.ids), np.float32)
    out[: plan.question_start] = stale * (weights * np.where(words.fresh, np.float32(echoes._FRESH), np.float32(1)))
    return out


def scarcity(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how much a token may carry that is asked for, whoever attends to it: least those that recur
    all over the prompt, such as articles, pronouns and full stops; most, 1, those that stand once."""
    _, of, counts = np.unique(plan.array, return_inverse=True, return_counts=True)
    rarity = _scaled(np.log2(len(plan.ids) / counts).astype(np.float32)[of])
    return (echoes._COMMON + (1 - echoes._COMMON) * rarity**2).astype(np.float32)


class _Words:
    """The words of a prompt. Arrays are (question_start,), a word standing at its last token.

    Attributes:
        document: number of the token's document, -1 in the prefix.
        head: 1 in the first tokens of a document's first chunk.
        apart: 1 where the prompt has an earlier chunk of the token's document that its KV was not encoded behind.
        fresh: where the prompt has no earlier chunk at all that its KV was not encoded behind.
    """

    def __init__(self, plan: PromptPlan) -> None:
        end, ids = plan.question_start, plan.array
        words = np.concatenate(([-1], ids[:-1] << 32 | ids[1:]))
        starts = np.array([span.start for span in plan.spans])
        lengths = np.array([span.length for span in plan.spans])
        words[starts] = -1 - starts  # no word crosses a chunk's border
        values, self._first, self._of, counts = np.unique(
            words[:end], return_index=True, return_inverse=True, return_counts=True
        )
        self._rarity = np.log2(end / counts).astype(np.float32)
        self._seldom = np.minimum(np.float32(echoes._SELDOM) / counts.astype(np.float32), np.float32(1))
        self._asked = np.isin(values, words[end + 1 :])

        numbers: dict[str, int] = {}
        first: dict[str, int] = {}
        documents, behind, apart = [], [], []
        for index, span in enumerate(plan.spans):
            name = span.chunk.chunk.document_id
            documents.append(numbers.setdefault(name, len(numbers)))
            behind.append(index - span.chunk.tokens.context_chunks if span.context_present else index)
            apart.append(first.setdefault(name, index) < behind[-1])
        in_prefix = end - int(lengths.sum())

        def spread(values: Any, prefix: int = 0) -> NDArray[Any]:
            """A value of each chunk, for all its tokens."""
            return np.repeat(np.concatenate(([prefix], values)), np.concatenate(([in_prefix], lengths)))

        self._chunk = spread(np.arange(len(starts)), -1)
        self._seen_from = spread(starts[behind])
        self.document = spread(documents, -1)
        self.apart = spread(apart).astype(np.float32)
        self.fresh = spread(np.array(behind) == 0) & (not plan.standing)
        self.head = np.zeros(end, np.float32)
        for span in plan.spans:
            self.head[span.start : min(span.end, span.start + echoes._HEAD)] = not span.chunk.chunk.ordinal

    def met_again(self) -> Floats:
        """Rarity, at most 1, of words that stood before in what their chunk had not seen."""
        return _scaled(self._rarity[self._of] * self._again())

    def asked(self) -> Floats:
        """A share of the rarity, scaled, of words that the question repeats."""
        most = float((self._rarity * self._asked).max(initial=0.0)) or 1.0
        return np.float32(echoes._ASKED / most) * (self._rarity * self._asked)[self._of]

    def led(self, leads: Floats) -> Floats:
        """A multiple of what each word ``leads`` to, where it stood before, unless the question repeats it."""
        most = np.float32(echoes._LEADS) * leads[self._of] * self._seldom[self._of]
        return most * (self._again() & ~self._asked[self._of])

    def _again(self) -> NDArray[np.bool_]:
        return self._first[self._of] < self._seen_from

    def relevance(self) -> tuple[Floats, Floats]:
        """How much of the question's words the token's document shares, rare ones and those of its head counting more;
        or, less, how much a document shares that is linked to it: one of both names a word of the other's head. At
        most 1. And for each word what the document whose head holds it shares, less where others hold it too."""
        count = int(self.document.max()) + 1
        word, document, asked, head = self._held(count)
        spread = np.bincount(word)[word]
        rarity = np.log2(1 + count / spread) - 1 + 1e-3
        shared = np.bincount(document, asked * rarity * (1 + (echoes._NAMED - 1) * head), minlength=count)
        own: Floats = _scaled(shared.astype(np.float32)) ** np.float32(echoes._FOCUS)
        # Two documents that alone hold a word are linked by it; many that hold one are hardly.
        lent: Floats = (own[document] / np.maximum(spread - 1, 1)).astype(np.float32)
        leads = _most(lent * head, word, len(self._asked))
        linked = np.maximum(_most(lent, word)[word] * head, leads[word])
        relevance = np.maximum(own, echoes._LINKED * _most(linked, document, count))
        return np.where(self.document >= 0, relevance[self.document], 0.0).astype(np.float32), leads

    def _held(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """An entry for each of the ``count`` documents and each word of a head or of the question that it holds: word,
        document, whether the question repeats the word, whether it stands in the document's head."""
        of, head = self._of, self.head > 0
        wanted = self._asked.copy()
        wanted[of[head]] = True
        inside = wanted[of] & (self.document >= 0)
        pairs, entry = np.unique(of[inside] * count + self.document[inside], return_inverse=True)
        word, document = np.divmod(pairs, count)
        return word, document, self._asked[word], np.bincount(entry, head[inside], len(word)) > 0

    def widened(self, values: Floats) -> Floats:
        """Each value lent to its neighbours in its chunk, fading: to one before it and to those behind it."""
        out = values.copy()
        lent = np.float32(echoes._FADE) * (self._chunk[1:] == self._chunk[:-1])
        out[:-1] = np.maximum(out[:-1], lent * values[1:])
        for d in echoes._STEPS:
            lent = np.float32(echoes._FADE**d) * (self._chunk[d:] == self._chunk[:-d])
            out[d:] = np.maximum(out[d:], lent * out[:-d])
        return out


def _most(values: Floats, group: NDArray[np.int64], groups: int = 0) -> Floats:
    """The greatest of the ``values`` of each group, 0 at least."""
    out = np.zeros(max(groups, int(group.max(initial=-1)) + 1), np.float32)
    np.maximum.at(out, group, values)
    return out


def _scaled(values: Floats) -> Floats:
    most = float(values.max(initial=0.0))
    return values / most if most else values
