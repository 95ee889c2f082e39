"""Where chunks speak of the same things: read off token ids alone, before any KV is there.

A chunk's stored KV lacks what chunks that it was encoded without would have told it. Where that is, its own words say:
a name, a code word or a file number that stood in the prompt before, in a chunk it had not seen, is where a model reads
on what it knows of it (induction heads, Olsson et al. 2022). And what a question is about, its words say too.

A word here is a pair of neighbouring tokens: single ones recur everywhere.
"""

from __future__ import annotations

from typing import Any

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
_HEADS, _ASKED, _APART, _OTHER = 3.0, 0.5, 0.8, 0.2
# Of chunks that lack no chunk before them, against all others.
_FRESH = 0.1
# Of a word that the question shares with a document's head, against one that it shares with the rest.
_NAMED = 4.0
# Of documents linked to the one that shares most words with the question, and of those that have nothing to do with it.
_LINKED, _UNRELATED = 0.3, 0.05
# The power of relevance: higher, and the second of two documents a question asks about gets too little.
_FOCUS = 1.25
# Of a token that recurs all over the prompt, against one that stands once.
_COMMON = 0.1


def hints(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how likely a token's stored KV is stale in what the question needs; only their order and their
    ratios mean anything. 0 outside chunks."""
    if not plan.spans:
        return np.zeros(len(plan.ids), np.float32)
    words = _Words(plan)
    stale = words.widened(np.maximum(words.met_again(), _ASKED * words.asked()))
    stale += _HEADS * words.head + _APART * words.apart + _OTHER
    stale *= np.where(words.fresh, np.float32(_FRESH), np.float32(1))
    out = np.zeros(len(plan.ids), np.float32)
    out[: plan.question_start] = stale * (words.relevance() + _UNRELATED) * (words.document >= 0)
    return out


def scarcity(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how much a token may carry that is asked for, whoever attends to it: least those that recur
    all over the prompt, such as articles, pronouns and full stops; most, 1, those that stand once."""
    groups = _Groups(plan.array)
    rarity = _scaled(np.log2(len(plan.ids) / groups.counts).astype(np.float32)[groups.of])
    return (_COMMON + (1 - _COMMON) * rarity**2).astype(np.float32)


class _Groups:
    """Equal values of an array, as numpy's ``unique`` has them, whose stable sort takes several times as long.

    Attributes:
        values: one of each, ascending; ``counts`` and ``first``: how often it stands there, and where at first.
        of: for each place, the number of its value.
    """

    def __init__(self, array: NDArray[np.int64]) -> None:
        order = np.argsort(array)
        ordered = array[order]
        begins = np.empty(len(array), np.bool_)
        begins[:1] = True
        np.not_equal(ordered[1:], ordered[:-1], out=begins[1:])
        starts = np.flatnonzero(begins)
        self.values = ordered[starts]
        self.counts = np.diff(starts, append=len(array))
        self.first = np.minimum.reduceat(order, starts)
        self.of = np.empty(len(array), np.int64)
        self.of[order] = np.cumsum(begins) - 1


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
        self._groups = _Groups(words[:end])
        self._rarity = np.log2(end / self._groups.counts).astype(np.float32)
        self._asked = np.isin(self._groups.values, words[end + 1 :])

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
            self.head[span.start : min(span.end, span.start + _HEAD)] = not span.chunk.chunk.ordinal

    def met_again(self) -> Floats:
        """Rarity, at most 1, of words that stood before in what their chunk had not seen."""
        of = self._groups.of
        return _scaled(self._rarity[of] * (self._groups.first[of] < self._seen_from))

    def asked(self) -> Floats:
        """Rarity, at most 1, of words that the question repeats."""
        return _scaled((self._rarity * self._asked)[self._groups.of])

    def relevance(self) -> Floats:
        """How much of the question's words the token's document shares, rare ones and those of its head counting more;
        or, less, how much a document shares that is linked to it: one of both names a word of the other's head. At
        most 1."""
        count = int(self.document.max()) + 1
        word, document, asked, head = self._held(count)
        spread = np.bincount(word)[word]
        rarity = np.log2(1 + count / spread) - 1 + 1e-3
        shared = np.bincount(document, asked * rarity * (1 + (_NAMED - 1) * head), minlength=count)
        own: Floats = _scaled(shared.astype(np.float32)) ** np.float32(_FOCUS)
        # Two documents that alone hold a word are linked by it; many that hold one are hardly.
        lent: Floats = (own[document] / np.maximum(spread - 1, 1)).astype(np.float32)
        linked = np.maximum(_most(lent, word)[word] * head, _most(lent * head, word)[word])
        relevance = np.maximum(own, _LINKED * _most(linked, document, count))
        return np.where(self.document >= 0, relevance[self.document], 0.0).astype(np.float32)

    def _held(self, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """An entry for each of the ``count`` documents and each word of a head or of the question that it holds: word,
        document, whether the question repeats the word, whether it stands in the document's head."""
        of, head = self._groups.of, self.head > 0
        wanted = self._asked.copy()
        wanted[of[head]] = True
        inside = wanted[of] & (self.document >= 0)
        pairs = _Groups(of[inside] * count + self.document[inside])
        word, document = np.divmod(pairs.values, count)
        return word, document, self._asked[word], np.bincount(pairs.of, head[inside], len(word)) > 0

    def widened(self, values: Floats) -> Floats:
        """Each value lent to its neighbours in its chunk, fading."""
        out = values.copy()
        for d in range(1, max(_BEHIND, _BEFORE) + 1):
            lent = np.float32(_FADE**d) * (self._chunk[d:] == self._chunk[:-d])
            if d <= _BEHIND:
                out[d:] = np.maximum(out[d:], lent * values[:-d])
            if d <= _BEFORE:
                out[:-d] = np.maximum(out[:-d], lent * values[d:])
        return out


def _most(values: Floats, group: NDArray[np.int64], groups: int = 0) -> Floats:
    """The greatest of the ``values`` of each group, 0 at least."""
    out = np.zeros(max(groups, int(group.max(initial=-1)) + 1), np.float32)
    np.maximum.at(out, group, values)
    return out


def _scaled(values: Floats) -> Floats:
    most = float(values.max(initial=0.0))
    return values / most if most else values
