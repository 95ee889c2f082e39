"""Where chunks speak of the same things: read off token ids alone, before any KV is there.

A chunk's stored KV lacks what chunks that it was encoded without would have told it. Where that is, its own words say:
a name, a code word or a file number that stood in the prompt before, in a chunk it had not seen, is where a model reads
on what it knows of it (induction heads, Olsson et al. 2022). And what a question is about, its words say too.

A word here is a pair of neighbouring tokens: single ones recur everywhere.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ragkv.plan import PromptPlan

Floats = NDArray[np.float32]

# A name is met at its last token, and read on in the tokens behind it.
_BEHIND, _BEFORE, _FADE = 3, 1, 0.8
# A document's first tokens name what it is about, and all of it leans on them.
_HEAD = 12
# Of a document's head, of a word that the question repeats, of a token whose document has earlier chunks that it was
# encoded without, against a rare word met again; and of any other token.
_HEADS, _ASKED, _APART, _OTHER = 2.0, 0.5, 0.5, 0.2
# Of documents that share no word with the question, against the one that shares most.
_UNRELATED = 0.05
# Of a token that recurs all over the prompt, against one that stands once.
_COMMON = 0.1


def hints(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how likely a token's stored KV is stale in what the question needs; only their order and their
    ratios mean anything. 0 outside chunks."""
    if not plan.spans:
        return np.zeros(len(plan.ids), np.float32)
    words = _Words(plan)
    stale = np.maximum(words.met_again(), _ASKED * words.asked())
    stale += _HEADS * words.head + _APART * words.apart + _OTHER
    out = np.zeros(len(plan.ids), np.float32)
    out[: plan.question_start] = stale * (words.relevance() ** 2 + _UNRELATED) * (words.document >= 0)
    return out


def scarcity(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how much a token may carry that is asked for, whoever attends to it: least those that recur
    all over the prompt, such as articles, pronouns and full stops; most, 1, those that stand once."""
    _, same, counts = np.unique(np.asarray(plan.ids, np.int64), return_inverse=True, return_counts=True)
    rarity = _scaled(np.log2(len(plan.ids) / counts).astype(np.float32)[same])
    return (_COMMON + (1 - _COMMON) * rarity**2).astype(np.float32)


class _Words:
    """The words of a prompt. Arrays are (question_start,), a word standing at its last token.

    Attributes:
        document: number of the token's document, -1 in the prefix.
        head: 1 in the first tokens of a document's first chunk.
        apart: 1 where the prompt has an earlier chunk of the token's document that its KV was not encoded behind.
    """

    def __init__(self, plan: PromptPlan) -> None:
        end = plan.question_start
        ids = np.asarray(plan.ids, np.int64)
        words = np.concatenate(([-1], ids[:-1] << 32 | ids[1:]))
        self._question = words[end + 1 :]
        self._words = words[:end]
        self._seen_from = np.zeros(end, np.int64)
        self._chunk = np.full(end, -1)
        self.document = np.full(end, -1)
        self.head = np.zeros(end, np.float32)
        self.apart = np.zeros(end, np.float32)
        numbers: dict[str, int] = {}
        first: dict[str, int] = {}
        for index, span in enumerate(plan.spans):
            name, here = span.chunk.chunk.document_id, slice(span.start, span.end)
            behind = index - span.chunk.tokens.context_chunks if span.context_present else index
            self._chunk[here], self.document[here] = index, numbers.setdefault(name, len(numbers))
            self._seen_from[here] = plan.spans[behind].start
            self.head[span.start : min(span.end, span.start + _HEAD)] = not span.chunk.chunk.ordinal
            self.apart[here] = first.setdefault(name, index) < behind
            self._words[span.start] = -1 - span.start  # no word crosses a chunk's border
        _, self._first, self._same, counts = np.unique(
            self._words, return_index=True, return_inverse=True, return_counts=True
        )
        self._rarity = np.log2(end / counts).astype(np.float32)[self._same]

    def met_again(self) -> Floats:
        """Rarity, at most 1, of words that stood before in what their chunk had not seen, lent to their neighbours."""
        return self._widened(_scaled(self._rarity * (self._first[self._same] < self._seen_from)))

    def asked(self) -> Floats:
        """Rarity, at most 1, of words that the question repeats, lent to their neighbours."""
        return self._widened(_scaled(self._rarity * np.isin(self._words, self._question)))

    def relevance(self) -> Floats:
        """How much of the question's words the token's document shares, rare ones counting more; at most 1."""
        inside = np.isin(self._words, self._question) & (self.document >= 0)
        count = int(self.document.max()) + 1
        pairs = np.unique(np.stack((self._same[inside], self.document[inside])), axis=1)  # (2, words of documents)
        _, word, spread = np.unique(pairs[0], return_inverse=True, return_counts=True)
        shared = np.bincount(pairs[1], np.log2(1 + count / spread)[word] - 1 + 1e-3, minlength=count)
        return np.where(self.document >= 0, _scaled(shared.astype(np.float32))[self.document], 0.0).astype(np.float32)

    def _widened(self, values: Floats) -> Floats:
        """Each value lent to its neighbours in its chunk, fading."""
        out = values.copy()
        for d in range(1, max(_BEHIND, _BEFORE) + 1):
            lent = np.float32(_FADE**d) * (self._chunk[d:] == self._chunk[:-d])
            if d <= _BEHIND:
                out[d:] = np.maximum(out[d:], lent * values[:-d])
            if d <= _BEFORE:
                out[:-d] = np.maximum(out[:-d], lent * values[d:])
        return out


def _scaled(values: Floats) -> Floats:
    most = float(values.max(initial=0.0))
    return values / most if most else values
