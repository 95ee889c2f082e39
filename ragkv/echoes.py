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
Flags = NDArray[np.bool_]
Places = NDArray[np.int64]

# A name is met at its last token, of two at least, and read on in the clause behind it: by these steps, one behind the
# other, so far that a token more counts ``_FADE`` as much.
_STEPS, _FADE = (1, 2, 4, 8), 0.8
# A document's first tokens name what it is about, and all of it leans on them.
_HEAD = 12
# Of a document's head, of a word that the question repeats, of a token whose document has earlier chunks that it was
# encoded without, against a rare word met again; and of any other token.
_HEADS, _ASKED, _APART, _OTHER = 3.0, 0.5, 0.8, 0.2
# Of a word met again that stands in the head of the document asked about, but not in the question: what is said there
# of that document, the question will attend to, but not to a name that it does not know.
_LEADS = 10.0
# A name stands in a prompt a few times; words that recur more often lead on less by as much.
_SELDOM = 4.0
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

# No vocabulary has as many tokens; ids from here on are not counted by a table of all smaller ones.
_MANY = 1 << 20
# 2^64 ÷ the golden ratio: Knuth's multiplicative hashing.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hints(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how likely a token's stored KV is stale in what the question needs; only their order and their
    ratios mean anything. 0 outside chunks."""
    if not plan.spans:
        return np.zeros(len(plan.ids), np.float32)
    parts = _Parts(plan)
    words = _Words(plan, parts)
    relevance, leads = words.relevance()
    stale = _widened(words.echoes(leads), parts.starts)
    stale += parts.leaning()
    weights = relevance + np.float32(_UNRELATED)
    weights[0] = 0
    weights = weights[parts.document]
    if not plan.standing:
        weights[parts.seen_from == 1] *= np.float32(_FRESH)
    stale *= parts.spread(weights)
    return stale


def scarcity(plan: PromptPlan) -> Floats:
    """(prompt tokens,): how much a token may carry that is asked for, whoever attends to it: least those that recur
    all over the prompt, such as articles, pronouns and full stops; most, 1, those that stand once."""
    ids = plan.array
    if ids.max() >= _MANY:
        ids = _firsts(ids)
    counts = np.bincount(ids).take(ids)
    rarity = _rarity(int(counts.max()), len(ids))
    rarity /= float(rarity[counts.min()]) or 1.0
    scarce: Floats = _COMMON + (1 - _COMMON) * rarity**2
    return scarce.take(counts)


def _rarity(most: int, among: int) -> Floats:
    """(most + 1,): how rare is what stands 0 (as if once), 1, 2 … times ``among`` so many."""
    return np.log2(among / np.maximum(np.arange(most + 1), 1)).astype(np.float32)


def _firsts(values: Places) -> Places:
    """For each place of an array, where its value stands first.

    By a table of hashes' slots, in a fraction of the time that sorting takes. A slot is its first value's; others that
    hash there, few, are sorted, so that no prompt can make it slow.
    """
    bits = len(values).bit_length() + 1
    slots = values.view(np.uint64) * _GOLDEN
    slots >>= np.uint64(64 - bits)
    first = _earliest(slots.view(np.int64), np.arange(len(values)), 1 << bits)
    others = (values.take(first) != values).nonzero()[0]
    unplaced = values.take(others)
    first[others] = _earliest(np.sort(unplaced).searchsorted(unplaced), others, len(others))
    return first


def _earliest(slots: Places, places: Places, count: int) -> Places:
    """The first of the ascending ``places`` that has the same one of ``count`` slots."""
    table = np.empty(count, np.int64)
    table[slots[::-1]] = places[::-1]  # of several, the last written stays
    return table.take(slots)


class _Parts:
    """The parts of a prompt: its prefix, each chunk, its question. Arrays have an element for each.

    Attributes:
        starts: where it begins.
        document: number of its document's first part; 0 if it is no chunk.
        documents: how many there are.
        seen_from: the first part that its KV was encoded behind, or itself: of what stands before that it saw nothing.
        heads: places of the first tokens of documents' first chunks.
    """

    def __init__(self, plan: PromptPlan) -> None:
        first: dict[str, int] = {}
        rows = [(0, plan.spans[0].start, 1, 0, 0)]
        for number, span in enumerate(plan.spans, 1):
            chunk = span.chunk.chunk
            behind = span.context_present and span.chunk.tokens.context_chunks
            rows.append((span.start, span.end, chunk.ordinal, behind, first.setdefault(chunk.document_id, number)))
        rows.append((plan.question_start, len(plan.ids), 1, len(rows), 0))
        self.starts, ends, ordinals, behind, self.document = np.array(rows).T
        self.documents = len(first)
        self.seen_from = np.arange(len(rows)) - behind
        self._lengths = ends - self.starts
        opening = (ordinals == 0).nonzero()[0]
        headed, at = (np.arange(_HEAD) < self._lengths[opening, None]).nonzero()
        self._headed = opening[headed]
        self.heads = self.starts[self._headed] + at

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """A value of each part, for all its tokens."""
        return values.repeat(self._lengths)

    def leaning(self) -> Floats:
        """What a token has whatever its words: for its place in its document, and for what that lacks."""
        apart = np.float32(_APART) * (self.document < self.seen_from)
        out = self.spread(apart + np.float32(_OTHER))
        out[self.heads] = (np.float32(_HEADS) + apart + np.float32(_OTHER))[self._headed]
        return out


class _Words:
    """The words of a prompt, each standing at its last token. A word's number is the place where it stands first."""

    def __init__(self, plan: PromptPlan, parts: _Parts) -> None:
        ids, start, end = plan.array, plan.spans[0].start, plan.question_start
        self._parts, self._pairs = parts, np.empty_like(ids)
        np.bitwise_or(ids[:-1] << 32, ids[1:], out=self._pairs[1:])
        self._pairs[parts.starts] = -1 - parts.starts  # no word crosses a border
        self._word = _firsts(self._pairs)
        self._counts = counts = np.bincount(self._word[:end], minlength=len(ids))
        self._rarity = _rarity(int(counts.max()), end).take(counts).take(self._word)
        question = self._word[end:]
        self._question = question[question < end]
        self._asked = np.zeros(end, np.bool_)  # of each number, as ``wanted``
        self._asked[self._question] = True
        wanted = self._asked.copy()
        wanted[self._word[parts.heads]] = True
        # Where words of a head or of the question stand in chunks.
        self._telling = wanted.take(self._word[start:end]).nonzero()[0] + start

    def echoes(self, leads: Floats) -> Floats:
        """(prompt tokens,): rarity, at most 1, of words that stood before in what their chunk had not seen; or, less,
        of those that the question repeats; or, more, of those that stood before and lead to what the question does not
        name, as ``leads`` has it."""
        parts, at = self._parts, self._telling
        again = self._word < parts.spread(parts.starts[parts.seen_from])
        echoes = _scaled(self._rarity * again)
        most = float(self._rarity[self._question].max(initial=0.0)) or 1.0
        word = self._word.take(at)
        seldom = np.minimum(np.float32(_SELDOM) / self._counts.take(word).astype(np.float32), np.float32(1))
        led = np.float32(_LEADS) * leads.take(word) * seldom * again.take(at)
        told = np.where(self._asked.take(word), np.float32(_ASKED / most) * self._rarity.take(at), led)
        echoes[at] = np.maximum(echoes.take(at), told)
        return echoes

    def relevance(self) -> tuple[Floats, Floats]:
        """(parts,), at documents' numbers: how much of the question's words a document shares, rare ones and those of
        its head counting more; or, less, how much a document shares that is linked to it: one of both names a word of
        the other's head. At most 1. And (prompt tokens,), at words' numbers, what a word leads to: how much a
        document shares that has it in its head, less where more documents hold it."""
        word, document, head = self._held()
        parts, words = len(self._parts.starts), len(self._asked)
        spread = np.bincount(word)[word]
        asked = self._asked[word].nonzero()[0]
        asked = asked[self._pairs[word[asked]].argsort()]  # a sum's last bit is not to depend on where words stand
        rarity = np.log2(1 + self._parts.documents / spread[asked]) - 1 + 1e-3
        shared = np.bincount(document[asked], rarity * (1 + (_NAMED - 1) * head[asked]), minlength=parts)
        own: Floats = _scaled(shared.astype(np.float32)) ** np.float32(_FOCUS)
        # Two documents that alone hold a word are linked by it; many that hold one are hardly.
        lent: Floats = (own[document] / np.maximum(spread - 1, 1)).astype(np.float32)
        leads = _most(lent * head, word, words)
        linked = np.maximum(_most(lent, word, words)[word] * head, leads[word])
        relevance: Floats = np.maximum(own, _LINKED * _most(linked, document, parts))
        return relevance, leads

    def _held(self) -> tuple[Places, Places, Flags]:
        """An entry for each document and each word of a head or of the question that it holds: word, document, whether
        the word stands in the document's head."""
        parts, at = self._parts, self._telling
        body = np.ones(len(self._word), np.bool_)
        body[parts.heads] = False
        bits = len(parts.starts).bit_length()
        keys = self._word[at] << bits | parts.spread(parts.document)[at]
        keys = keys << 1 | body[at]
        keys.sort()
        new = np.ones(len(keys), np.bool_)
        np.not_equal(keys[1:] >> 1, keys[:-1] >> 1, out=new[1:])
        keys = keys.take(new.nonzero()[0])
        return keys >> 1 + bits, keys >> 1 & (1 << bits) - 1, (keys & 1) == 0


def _widened(values: Floats, starts: Places) -> Floats:
    """Each value lent to its neighbours in its part, fading: to the token before it and to fifteen behind it."""
    out, before = values.copy(), starts[:, None] - np.arange(1, max(_STEPS) + 1)
    # No part's first token ends a word, so nothing is lent to the part before.
    np.maximum(out[:-1], np.float32(_FADE) * values[1:], out=out[:-1])
    for d in _STEPS:
        lent = np.float32(_FADE**d) * out
        lent.put(before[:, :d], 0, mode="wrap")  # nor to the part behind
        np.maximum(out[d:], lent[:-d], out=out[d:])
    return out


def _most(values: Floats, group: NDArray[np.int64], groups: int) -> Floats:
    """The greatest of the ``values`` of each group, 0 at least."""
    out = np.zeros(groups, np.float32)
    np.maximum.at(out, group, values)
    return out


def _scaled(values: Floats) -> Floats:
    most = float(values.max(initial=0.0))
    return values / most if most else values
