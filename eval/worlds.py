"""Invented worlds: documents whose facts hang together across chunks, and questions that need those links.

A world is made from a seed and a split alone and is the same on every machine and Python version. People,
firms, projects and villages each have a document of one to three chunks; a *code book* says what the invented
words on lockers, seals and flags stand for; *notices* correct facts stated elsewhere, and name only the file that
the corrected document is. A chunk after the first mostly says "she" or "it". The kinds of question:

- ``direct``: the answer and the name stand in one chunk;
- ``coref``: the name stands only in an earlier chunk of the same document;
- ``bridge``: two hops across documents ("the firm where … works");
- ``gloss``: the document gives an invented word, the code book its meaning;
- ``compare``: the larger or smaller of two numbers from two documents;
- ``update``: a notice about the document's file replaces what the document says;
- ``memory``: the document names a town, and only the atlas (never in a document) knows its country.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from ragkv.eval.worlds_names import FIRM_FORMS, NAME_KINDS, SPLITS, Dice, Split, atlas, names
from ragkv.eval.worlds_text import ATTRIBUTES, ENTRIES, ENTRY_ASKS, FILLERS, PRONOUNS, TITLES, UPDATES, Attribute

__all__ = ["KINDS", "Link", "Question", "World", "WorldDocument", "make_world"]

KINDS = ("direct", "coref", "bridge", "gloss", "compare", "update", "memory")
# Facts that a notice may correct: what changes in life, and nothing other questions build upon.
_CHANGEABLE = frozenset(
    {
        "trade",
        "pet",
        "instrument",
        "drink",
        "door",
        "holiday",
        "product",
        "director",
        "trucks",
        "feast",
        "task",
        "start",
        "mayor",
        "known",
        "fair",
    }
)
_SECOND_TYPES = ("person", "person", "firm", "village", "project", "codes", "codes", "codes", "notices")
_WEIGHTED_TYPES = ("person",) * 4 + ("firm",) * 2 + ("project",) * 2 + ("village",) * 2


@dataclass(frozen=True)
class WorldDocument:
    """A document as its chunks: the first opens with a title line, each is about 64 to 128 tokens."""

    id: str
    title: str
    chunks: list[str]


@dataclass(frozen=True)
class Question:
    """A question with its one right answer; ``evidence`` lists every (document id, chunk number) it needs.

    ``via`` is the name a ``bridge`` leads over.
    """

    text: str
    answer: str
    kind: str
    evidence: list[tuple[str, int]]
    via: str = ""


@dataclass(frozen=True)
class Link:
    """A word that stands in two documents, each of which tells something about it.

    ``places`` are (document id, chunk number). Whoever has read ``places[0]`` knows, on meeting the word at
    ``places[1]``, what ``tells[0]`` says of it; and the other way round.
    """

    word: str
    places: tuple[tuple[str, int], tuple[str, int]]
    tells: tuple[str, str]


@dataclass(frozen=True)
class World:
    """``documents`` stand in the order a reader would want: notices and code book before what they speak of."""

    documents: list[WorldDocument]
    questions: list[Question]
    links: list[Link]


@dataclass
class _Fact:
    attribute: Attribute
    value: str
    target: _Entity | None = None
    meaning: str = ""
    chunk: int = 0
    named: bool = True
    changed: bool = False


@dataclass
class _Entity:
    type: str
    name: str
    doc: str
    file: str
    pronoun: tuple[str, str, str]
    facts: dict[str, _Fact] = field(default_factory=dict)

    def evidence(self, fact: _Fact) -> list[tuple[str, int]]:
        here = (self.doc, fact.chunk)
        return [here] if fact.named else [here, (self.doc, 0)]


_Known = tuple[_Entity, _Fact]


def make_world(seed: int, split: Split, size: int = 12, per_kind: int = 6) -> World:
    """A world of about ``size`` chunks (three at least) with up to ``per_kind`` questions of every kind.

    From ten chunks on every kind occurs; a smaller world holds a random few of them.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
    return _Maker(Dice(f"world/{split}/{seed}/{size}"), split, max(size, 3)).make(per_kind)


class _Maker:
    def __init__(self, dice: Dice, split: Split, size: int) -> None:
        self.dice, self.split, self.size = dice, split, size
        self.entities: list[_Entity] = []
        self.fresh = {kind: iter(dice.shuffled(names(kind, split))) for kind in NAME_KINDS}
        self.codes: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self.book: list[tuple[str, str]] = []
        self.entries: dict[str, tuple[str, tuple[str, int]]] = {}
        self.updates: list[tuple[_Entity, _Fact, str, tuple[str, int]]] = []

    def make(self, per_kind: int) -> World:
        plan = self._plan()
        chunks_of = {}
        for number, (type_, chunks) in enumerate(plan):
            if type_ in ATTRIBUTES:
                name, file, doc = self._name(type_), next(self.fresh["file"]), f"{type_}-{number}"
                entity = _Entity(type_, name, doc, file, self.dice.pick(PRONOUNS[type_]))
                self.entities.append(entity)
                chunks_of[entity.doc] = chunks
        for entity in self.entities:
            self._give_facts(entity, chunks_of[entity.doc], any(type_ == "codes" for type_, _ in plan))
        documents = self.dice.shuffled([self._write(entity, chunks_of[entity.doc]) for entity in self.entities])
        for number, (type_, chunks) in enumerate(plan):
            if type_ == "codes":
                documents.insert(0, self._code_book(f"codes-{number}"))
            elif type_ == "notices":
                documents.insert(0, self._notices(f"notices-{number}", chunks))
        return World(documents, self._questions(per_kind), [*self._links()])

    # What there is ---------------------------------------------------------------------------------------

    def _plan(self) -> list[tuple[str, int]]:
        """Documents as (type, number of chunks). Small worlds draw two or three documents that interlock."""
        dice, length = self.dice, {"person": (2, 3), "firm": (1, 2), "project": (1, 2), "village": (1, 2)}
        if self.size < 10:
            types = ["person", dice.pick(_SECOND_TYPES)]
            extras = dice.shuffled(("firm", "village", "codes", "notices", "person", "project"))
        else:
            types = ["person", "person", "firm", dice.pick(("village", "project")), "codes", "notices"]
            extras = []
        plan: list[tuple[str, int]] = []
        total = 0
        while types or total < self.size:
            type_ = types.pop(0) if types else extras.pop() if extras else dice.pick(_WEIGHTED_TYPES)
            if type_ in ("codes", "notices") and any(type_ == t for t, _ in plan):
                continue
            # The code book's length follows from the words used: about one chunk for every eight others.
            share = 1 + self.size // (8 if type_ == "codes" else 14)
            chunks = dice.number(*length[type_]) if type_ in length else share
            plan.append((type_, chunks))
            total += chunks
        return plan

    def _name(self, type_: str) -> str:
        if type_ == "person":
            return f"{next(self.fresh['given'])} {next(self.fresh['family'])}"
        if type_ == "firm":
            return f"{next(self.fresh['firm'])} {self.dice.pick(FIRM_FORMS)}"
        return f"Project {next(self.fresh['project'])}" if type_ == "project" else next(self.fresh["village"])

    def _give_facts(self, entity: _Entity, chunks: int, codes: bool) -> None:
        dice = self.dice
        choices = dice.shuffled([a for a in ATTRIBUTES[entity.type] if codes or not a.gloss])
        # A number to compare and a word to look up come first, or small worlds would lack those kinds.
        choices.sort(key=lambda a: not ((a.extreme[0] or a.gloss) and dice.random() < 0.5))
        for attribute in choices[: chunks * 5 + dice.number(0, 2)]:
            entity.facts[attribute.name] = self._fact(attribute, entity)
        ordered = dice.shuffled(list(entity.facts.values()))
        named = [chunk == 0 or dice.random() < 0.25 for chunk in range(chunks)]
        for i, fact in enumerate(ordered):
            fact.chunk = i * chunks // len(ordered)
            fact.named = named[fact.chunk]

    def _fact(self, attribute: Attribute, entity: _Entity) -> _Fact:
        if attribute.gloss:
            meaning, word = self.dice.pick(self._code_words(attribute.values))
            if (meaning, word) not in self.book:
                self.book.append((meaning, word))
            return _Fact(attribute, word, meaning=meaning)
        if attribute.leads_to:
            others = [e for e in self.entities if e.type == attribute.leads_to and e is not entity]
            target = self.dice.pick(others) if others else None
            return _Fact(attribute, target.name if target else self._name(attribute.leads_to), target)
        return _Fact(attribute, self._value(attribute))

    def _value(self, attribute: Attribute) -> str:
        values = attribute.values
        if not isinstance(values, str):
            return self.dice.pick(values)
        if values.startswith("number:"):
            _, low, high = values.split(":")
            return str(self.dice.number(int(low), int(high)))
        if values == "town":
            return self.dice.pick(_towns())
        return next(self.fresh["river"]) if values == "river" else self._name("person")

    def _code_words(self, meanings: tuple[str, ...] | str) -> list[tuple[str, str]]:
        key = tuple(meanings)
        if key not in self.codes:
            chosen = self.dice.sample(key, 3 + self.size // 16)
            self.codes[key] = [(meaning, next(self.fresh["word"])) for meaning in chosen]
        return self.codes[key]

    # What is written -------------------------------------------------------------------------------------

    def _write(self, entity: _Entity, chunks: int) -> WorldDocument:
        texts = []
        for chunk in range(chunks):
            facts = [fact for fact in entity.facts.values() if fact.chunk == chunk]
            says = [(self.dice.pick(fact.attribute.says), fact.value) for fact in self.dice.shuffled(facts)]
            for filler in self.dice.sample(FILLERS[entity.type], self.dice.number(2, 3)):
                says.insert(self.dice.number(0, len(says)), (filler, ""))
            named = chunk == 0 or any(fact.named for fact in facts)
            texts.append(" ".join(self._sentences(entity, says, named)))
        title = self.dice.pick(TITLES[entity.type]).format(n=entity.name, f=entity.file)
        return _document(entity.doc, title, texts)

    def _sentences(self, entity: _Entity, says: list[tuple[str, str]], named: bool) -> Iterator[str]:
        """In a chunk that names its subject the name stands in the first sentence that can hold it."""
        must = named
        for template, value in says:
            use_name = named and (must or self.dice.random() < 0.4)
            must = must and "{" not in template.replace("{v}", "")
            yield _render(template, entity.name if use_name else "", entity.pronoun, value)

    def _code_book(self, doc: str) -> WorldDocument:
        spare = [pair for pairs in self.codes.values() for pair in pairs if pair not in self.book]
        short = max((3 if self.size < 6 else 7) - len(self.book), 1)
        entries = self.dice.shuffled(self.book + self.dice.sample(spare, short))
        texts, per_chunk = [], 9
        for start in range(0, max(len(entries), 1), per_chunk):
            lines = []
            for meaning, word in entries[start : start + per_chunk]:
                self.entries[word] = (meaning, (doc, start // per_chunk))
                lines.append(self.dice.pick(ENTRIES).format(w=word, v=meaning))
            lines += self.dice.sample(FILLERS["codes"], self.dice.number(not lines, 2))
            texts.append(" ".join(lines))
        return _document(doc, self.dice.pick(TITLES["codes"]), texts)

    def _notices(self, doc: str, chunks: int) -> WorldDocument:
        facts = [(e, f) for e in self.entities for f in e.facts.values() if f.attribute.name in _CHANGEABLE]
        changes = self.dice.sample(facts, chunks * 4)
        texts = []
        for chunk in range(chunks):
            lines = self.dice.sample(FILLERS["notices"], self.dice.number(1, 3))
            for entity, fact in changes[chunk * 4 : chunk * 4 + 4]:
                lines.insert(self.dice.number(0, len(lines)), self._update(entity, fact, doc, chunk))
            texts.append(" ".join(lines) or FILLERS["notices"][0])
        return _document(doc, self.dice.pick(TITLES["notices"]), texts)

    def _update(self, entity: _Entity, fact: _Fact, doc: str, chunk: int) -> str:
        value = fact.value
        while value == fact.value:
            value = self._value(fact.attribute)
        fact.changed = True
        self.updates.append((entity, fact, value, (doc, chunk)))
        return self.dice.pick(UPDATES).format(l=fact.attribute.label, f=entity.file, v=value)

    # What is asked ---------------------------------------------------------------------------------------

    def _links(self) -> Iterator[Link]:
        for entity in self.entities:
            for fact in entity.facts.values():
                if fact.attribute.gloss:
                    places = (entity.doc, fact.chunk), self.entries[fact.value][1]
                    yield Link(fact.value, places, (entity.name, fact.meaning))
        for entity, _, value, notice in self.updates:
            yield Link(entity.file, ((entity.doc, 0), notice), (entity.name, value))

    def _questions(self, per_kind: int) -> list[Question]:
        makers: list[Callable[[], Iterator[Question]]] = [
            self._plain, self._bridges, self._glosses, self._compares, self._updated, self._memories,
        ]  # fmt: skip
        by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
        for maker in makers:
            for question in maker():
                by_kind[question.kind].append(question)
        return [q for questions in by_kind.values() for q in self.dice.sample(questions, per_kind)]

    def _ask(self, templates: Sequence[str], **words: str) -> str:
        return self.dice.pick(templates).format(**words)

    def _settled(self) -> Iterator[tuple[_Entity, _Fact]]:
        for entity in self.entities:
            for fact in entity.facts.values():
                if not fact.changed:
                    yield entity, fact

    def _plain(self) -> Iterator[Question]:
        for entity, fact in self._settled():
            asks = fact.attribute.marks if fact.attribute.gloss else fact.attribute.asks
            text = self._now(fact, self._ask(asks, x=entity.name))
            yield Question(text, fact.value, "direct" if fact.named else "coref", entity.evidence(fact))
        for word, (meaning, place) in self.entries.items():
            yield Question(self._ask(ENTRY_ASKS, w=word), meaning, "direct", [place])

    def _now(self, fact: _Fact, text: str) -> str:
        changeable = fact.attribute.name in _CHANGEABLE
        return text.replace("?", " now?") if changeable and self.dice.random() < 0.3 else text

    def _bridges(self) -> Iterator[Question]:
        for entity, link in self._settled():
            if link.target is None:
                continue
            phrase = self._ask(link.attribute.phrases, n=entity.name)
            for fact in link.target.facts.values():
                if fact.changed or fact.attribute.gloss or fact.value == entity.name:
                    continue
                evidence = entity.evidence(link) + link.target.evidence(fact)
                text = self._ask(fact.attribute.asks, x=phrase)
                yield Question(text, fact.value, "bridge", evidence, link.value)

    def _glosses(self) -> Iterator[Question]:
        for entity, fact in self._settled():
            if fact.attribute.gloss:
                evidence = [*entity.evidence(fact), self.entries[fact.value][1]]
                yield Question(self._ask(fact.attribute.asks, x=entity.name), fact.meaning, "gloss", evidence)

    def _pairs(self) -> Iterator[tuple[_Known, _Known]]:
        """Pairs of entities with different values of one number."""
        known: dict[str, list[_Known]] = {}
        for entity, fact in self._settled():
            if fact.attribute.extreme[0]:
                known.setdefault(fact.attribute.name, []).append((entity, fact))
        for all_ in known.values():
            for first in all_:
                for second in self.dice.sample(all_, 4):
                    if first[1].value != second[1].value:
                        yield first, second

    def _compares(self) -> Iterator[Question]:
        for first, second in self._pairs():
            least = self.dice.random() < 0.5
            text = self._ask(first[1].attribute.extreme[least], a=first[0].name, b=second[0].name)
            value = _least_first(first, second)[0 if least else 1][1].value
            yield Question(text, value, "compare", _both(first, second))

    def _updated(self) -> Iterator[Question]:
        for entity, fact, value, notice in self.updates:
            text = self._now(fact, self._ask(fact.attribute.asks, x=entity.name))
            yield Question(text, value, "update", [(entity.doc, 0), notice])

    def _memories(self) -> Iterator[Question]:
        for entity, fact in self._settled():
            if fact.attribute.memory:
                text = self._ask(fact.attribute.memory, x=entity.name)
                yield Question(text, atlas()[fact.value], "memory", entity.evidence(fact))


def _least_first(first: _Known, second: _Known) -> list[_Known]:
    return sorted((first, second), key=lambda known: int(known[1].value))


def _both(first: _Known, second: _Known) -> list[tuple[str, int]]:
    return first[0].evidence(first[1]) + second[0].evidence(second[1])


@cache
def _towns() -> tuple[str, ...]:
    return tuple(atlas())


def _document(doc: str, title: str, texts: list[str]) -> WorldDocument:
    return WorldDocument(doc, title, [f"{title}\n{texts[0]}", *texts[1:]])


@cache
def _parts(template: str) -> tuple[str, ...]:
    return tuple(re.split(r"(\{\w+\})", template))


def _render(template: str, name: str, pronoun: tuple[str, str, str], value: str) -> str:
    """Fill a sentence; the name, where given, takes the first place a subject can stand, pronouns the rest."""
    out: list[str] = []
    for part in _parts(template):
        if part == "{v}":
            if out and out[-1].lower().endswith(" a ") and value[0] in "aeiou":
                out[-1] = out[-1][:-1] + "n "
            out.append(value)
        elif part.startswith("{"):
            out.append(_subject(part[1:-1], name, pronoun))
            name = ""
        else:
            out.append(part)
    return "".join(out)


def _subject(form: str, name: str, pronoun: tuple[str, str, str]) -> str:
    if name:
        return f"{name}'s" if form in "Pp" else name
    word = pronoun[1] if form == "s0" else pronoun[2] if form in "Pp" else pronoun[0]
    return word[0].upper() + word[1:] if form.isupper() else word
