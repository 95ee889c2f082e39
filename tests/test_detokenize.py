"""Tokens to text piece by piece: nothing half, nothing lost, nothing of a stop string."""

from __future__ import annotations

import random

import pytest

from ragkv.checkpoint import BUNDLED_DIR
from ragkv.detokenize import Detokenizer
from ragkv.tokenizer import Tokenizer

ODD = "naïve 日本語 👩‍👩‍👧‍👦 ½ — e\u0301 \U0001f9ff end"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED_DIR)


def run(tokenizer: Tokenizer, ids, stop=()) -> tuple[list[str], Detokenizer]:
    detokenizer = Detokenizer(tokenizer, stop)
    pieces = [detokenizer.push(token) for token in ids]
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == detokenizer.text
    return pieces, detokenizer


def test_characters_split_over_tokens_are_never_handed_out_half(tokenizer):
    ids = tokenizer.plain(ODD)
    assert len(ids) > len(ODD.split())
    pieces, detokenizer = run(tokenizer, ids)
    assert not any("\ufffd" in piece for piece in pieces)
    assert detokenizer.text == ODD


def test_text_comes_as_soon_as_it_is_certain(tokenizer):
    ids = tokenizer.plain("one two three")
    pieces, _ = run(tokenizer, ids)
    assert all(pieces[: len(ids)])
    assert pieces[-1] == ""


@pytest.mark.parametrize("seed", range(20))
def test_pieces_join_to_the_decoded_whole(tokenizer, seed):
    rng = random.Random(seed)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(60)]
    assert run(tokenizer, ids)[1].text == tokenizer.decode(ids)


def test_an_answer_cut_inside_a_character_ends_in_the_replacement_mark(tokenizer):
    ids = tokenizer.plain("a\U0001f9ff")[:-1]
    pieces, detokenizer = run(tokenizer, ids)
    assert "\ufffd" not in "".join(pieces[:-1])
    assert detokenizer.text == tokenizer.decode(ids)


def test_special_tokens_are_not_text(tokenizer):
    ids = [*tokenizer.plain("one"), *tokenizer.special("<|im_start|>"), *tokenizer.plain(" two")]
    assert run(tokenizer, ids)[1].text == "one two"


@pytest.mark.parametrize("stop", ["STOP", "\n\n", "r fi", "日本", "five", " "])
def test_a_stop_string_ends_the_text_wherever_tokens_part_it(tokenizer, stop):
    text = "three 日本語 four five\n\nsix STOP seven"
    ids = tokenizer.plain(text)
    _, detokenizer = run(tokenizer, ids, [stop])
    assert detokenizer.stopped
    assert detokenizer.text == text[: text.index(stop)]
    assert detokenizer.push(ids[0]) == detokenizer.finish() == ""


def test_the_first_of_several_stop_strings_wins(tokenizer):
    _, detokenizer = run(tokenizer, tokenizer.plain("a b c d"), ["d", "c", "b c"])
    assert detokenizer.text == "a "


def test_what_may_become_a_stop_string_is_held_back_until_it_does_not(tokenizer):
    detokenizer = Detokenizer(tokenizer, ["xyz!"])
    sent = "".join(detokenizer.push(token) for token in tokenizer.plain("say xyz"))
    assert sent == "say "
    sent += "".join(detokenizer.push(token) for token in tokenizer.plain("?"))
    assert sent == "say xyz?"
    assert not detokenizer.stopped


def test_the_end_flushes_what_was_held_back(tokenizer):
    pieces, detokenizer = run(tokenizer, tokenizer.plain("say xy"), ["xyz"])
    assert pieces[-1] == "xy"
    assert (detokenizer.text, detokenizer.stopped) == ("say xy", False)


def test_a_stop_string_completed_only_by_the_flush(tokenizer):
    """The last token ends inside a character, so its text comes only with the end."""
    ids = tokenizer.plain("go \U0001f9ff")[:-1]
    detokenizer = run(tokenizer, ids, ["\ufffd"])[1]
    assert (detokenizer.text, detokenizer.stopped) == ("go ", True)
