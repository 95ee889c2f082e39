"""Invented names: disjoint between train, dev and test by construction, the atlas common to all.

Every name word is made of syllables and belongs to exactly one split, decided by a digest of the word
itself. Nothing here depends on ``hash()``, on locale or on the Python version.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import cache
from typing import Literal, TypeVar

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")
Kind = Literal["given", "family", "firm", "project", "village", "river", "word", "file"]

NAME_KINDS: tuple[Kind, ...] = ("given", "family", "firm", "project", "village", "river", "word", "file")

T = TypeVar("T")


def digest(text: str) -> int:
    """First eight bytes of SHA-256 as an integer: the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class Dice:
    """Seeded choices built on ``random()`` alone, the one method Python promises never to change."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(digest(seed)).random

    def number(self, low: int, high: int) -> int:
        """An integer with ``low <= n <= high``."""
        return low + int(self.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        return items[int(self.random() * len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = int(self.random() * (i + 1))
            out[i], out[j] = out[j], out[i]
        return out

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """``count`` different items (all of them where there are fewer), in random order."""
        out, n = list(items), len(items)
        for i in range(min(count, n)):
            j = i + int(self.random() * (n - i))
            out[i], out[j] = out[j], out[i]
        return out[:count]


def _words(text: str) -> list[str]:
    return text.split()


_HEADS = _words(
    "bal bar bel ber bir bor bran bren cal car cas cel cor dal dar del dor dral dun el en er fal far fen "
    "fin for gal gar gel gren hal har hel hol il in is jan jar jel jor kal kar kel kir kor lan lar len lin "
    "lor mal mar mel mir mor nal nar nel nor ol or os pal par pel por quel ral ran rel rin ros sal sar sel "
    "sil sor tal tar tel tor tul ul ur val var vel vin vor wal war wel wil yar yel zan zel zor"
)
# The endings of different kinds differ, so that no word can name two kinds of thing.
_TAILS: dict[Kind, list[str]] = {
    "given": _words("a ada ia ina issa eth ette ice io is on us en ano iel omir umi win"),
    "family": _words("ard berg dane fell gate hart house land lock man mere ridge son stone thorn wood well worth"),
    "firm": _words("ance ane aro ax co dex ex eon ico inor ix ora otec ova um ycor"),
    "project": _words("adon amis anthe aris asca egis essa icor ion ivane ode onyx ophel otis uria"),
    "village": _words("bury by combe den ey field ford ham ingham ley moor ness stead ton vale wick"),
    "river": _words("ack aine een ell ent erne irrow isk ogue oon unt usk"),
    "word": _words("ap ebbit ock ig immel ippet ob odge oggin oodle ump unk urrit uzz"),
    "file": _words("adge alk anch andle arb atch avel ebble ench erk ettle idge ilk inch indle irk olt otch"),
}
FIRM_FORMS = _words("Works Mills Foundry Press Glass Trading Shipping Instruments Tools Paper Textiles Ceramics")


@cache
def names(kind: Kind, split: Split) -> tuple[str, ...]:
    """Every name word of one kind that belongs to one split: four fifths train, a tenth each dev and test."""
    words = {head + tail for head in _HEADS for tail in _TAILS[kind]}
    chosen = sorted(word for word in words if _split_of(word) == split and word not in _atlas_words())
    return tuple(word.capitalize() for word in chosen)


def _split_of(word: str) -> Split:
    bucket = digest("split/" + word) % 10
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"


COUNTRIES = (
    "Ardania", "Belmark", "Corvia", "Doranth", "Estmere", "Fellonia",
    "Gravenland", "Hesperin", "Ithmar", "Jorvia", "Kelland", "Lothmar",
)  # fmt: skip
_TOWN_TAILS = _words("abad ava burg dorf esk gorod grad haven holm ik mouth opolis port stad")


@cache
def atlas() -> dict[str, str]:
    """Town to country: 96 towns in 12 countries, the same in every split; a model knows it by heart."""
    dice = Dice("atlas")
    towns = [head.capitalize() + dice.pick(_TOWN_TAILS) for head in dice.sample(_HEADS, 96)]
    return {town: COUNTRIES[i % len(COUNTRIES)] for i, town in enumerate(towns)}


@cache
def _atlas_words() -> frozenset[str]:
    return frozenset(town.lower() for town in atlas())
