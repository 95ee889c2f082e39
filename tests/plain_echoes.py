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
    stale = words.widened(np.maximum(words.met_again(), echoes._ASKED * words.asked()))
    stale += echoes._HEADS * words.head + echoes._APART * words.apart + echoes._OTHER
    stale *= np.where(words.fresh, np.float32(echoes._FRESH), np.float32(1))
    out = np.zeros(len(plan.ids), np.float32)
    out[: plan.question_start] = stale * (words.relevance() + echoes._UNRELATED) * (words.document >= 0)
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
        return _scaled(self._rarity[self._of] * (self._first[self._of] < self._seen_from))

    def asked(self) -> Floats:
        """Rarity, at most 1, of words that the question repeats."""
        return _scaled((self._rarity * self._asked)[self._of])

    def relevance(self) -> Floats:
        """How much of the question's words the token's document shares, rare ones and those of its head counting more;
        or, less, how much a document shares that is linked to it: one of both names a word of the other's head. At
        most 1."""
        count = int(self.document.max()) + 1
        word, document, asked, head = self._held(count)
        spread = np.bincount(word)[word]
        rarity = np.log2(1 + count / spread) - 1 + 1e-3
        shared = np.bincount(document, asked * rarity * (1 + (echoes._NAMED - 1) * head), minlength=count)
        own: Floats = _scaled(shared.astype(np.float32)) ** np.float32(echoes._FOCUS)
        # Two documents that alone hold a word are linked by it; many that hold one are hardly.
        lent: Floats = (own[document] / np.maximum(spread - 1, 1)).astype(np.float32)
        linked = np.maximum(_most(lent, word)[word] * head, _most(lent * head, word)[word])
        relevance = np.maximum(own, echoes._LINKED * _most(linked, document, count))
        return np.where(self.document >= 0, relevance[self.document], 0.0).astype(np.float32)

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
        """Each value lent to its neighbours in its chunk, fading."""
        out = values.copy()
        for d in range(1, echoes._BEHIND + 1):
            lent = np.float32(echoes._FADE**d) * (self._chunk[d:] == self._chunk[:-d])
            out[d:] = np.maximum(out[d:], lent * values[:-d])
        lent = np.float32(echoes._FADE) * (self._chunk[1:] == self._chunk[:-1])
        out[:-1] = np.maximum(out[:-1], lent * values[1:])
        return out


def _most(values: Floats, group: NDArray[np.int64], groups: int = 0) -> Floats:
    """The greatest of the ``values`` of each group, 0 at least."""
    out = np.zeros(max(groups, int(group.max(initial=-1)) + 1), np.float32)
    np.maximum.at(out, group, values)
    return out


def _scaled(values: Floats) -> Floats:
    most = float(values.max(initial=0.0))
    return values / most if most else values
