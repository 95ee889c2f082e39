from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragkv.errors import ConfigError
from ragkv.retrievers import Document, Splitter


def words(text: str) -> int:
    return len(text.split())


def bytes_of(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def quarters(text: str) -> int:
    """Joined text counts more than the sum of its parts: rounding down hides characters of each part."""
    return len(text) // 4


FRAGMENTS = st.sampled_from(
    [
        "One two three. ",
        "Why?",
        " \n",
        "\n\n",
        "# Head\n",
        "## Two ##\n\n",
        "- item\n",
        "。",
        "é",
        "word ",
        "...",
        "\t",
    ]
)
TEXTS = st.lists(FRAGMENTS | st.text(max_size=40), max_size=60).map("".join)


@settings(max_examples=150, deadline=None)
@given(TEXTS, st.sampled_from([words, bytes_of, quarters]), st.integers(16, 64))
def test_nothing_is_lost_and_every_chunk_fits(text: str, count: object, budget: int) -> None:
    splitter = Splitter(count, budget)  # type: ignore[arg-type]
    chunks = splitter.split(text)
    assert "".join(chunks) == text
    assert all(chunks)
    assert all(count(chunk) <= budget for chunk in chunks)  # type: ignore[operator]


@given(TEXTS)
@settings(max_examples=50, deadline=None)
def test_batch_counting_changes_nothing(text: str) -> None:
    batched = Splitter(bytes_of, 32, count_batch=lambda texts: [bytes_of(text) for text in texts])
    assert batched.split(text) == Splitter(bytes_of, 32).split(text)


def test_sentences_are_packed_up_to_the_budget() -> None:
    sentence = "a b c d e f g hat. "
    assert Splitter(words, 16).split(sentence * 5) == [sentence * 2, sentence * 2, sentence]


def test_a_half_full_chunk_ends_at_the_paragraph() -> None:
    first, second = "one two three four five six seven eight nine.\n\n", "ten eleven.\n\n"
    assert Splitter(words, 16).split(first + second) == [first, second]
    assert Splitter(words, 20).split(second + first) == [second + first]


def test_a_heading_stays_with_what_follows() -> None:
    body = "a b c d e f g h i j k l m n.\n\n"
    text = body + "# Second part\n" + body + "# Third\n\n## Deeper\n\n" + body
    assert Splitter(words, 20).split(text) == [
        body,
        "# Second part\n" + body,
        "# Third\n\n## Deeper\n\n" + body,
    ]


def test_headings_alone_are_kept() -> None:
    text = "# One\n# Two\n"
    assert Splitter(words, 16).split(text) == [text]


def test_a_long_sentence_is_cut_at_white_space() -> None:
    text = " ".join(f"w{i}" for i in range(500))
    chunks = Splitter(words, 16).split(text)
    assert all(chunk.endswith(" ") for chunk in chunks[:-1])
    assert max(map(words, chunks)) <= 16


def test_a_long_word_is_cut_between_characters() -> None:
    chunks = Splitter(bytes_of, 16).split("é" * 1000)
    assert "".join(chunks) == "é" * 1000
    assert max(map(bytes_of, chunks)) <= 16


def test_initials_and_decimals_do_not_end_a_sentence() -> None:
    text = "J. Doe paid 3.50 for it all. " * 2
    assert Splitter(words, 16).split(text * 2) == [text, text]


def test_an_edit_changes_only_its_neighbourhood() -> None:
    paragraphs = [f"Paragraph {i} tells a story of {i} words. It goes on for long enough.\n\n" for i in range(40)]
    before = Splitter(words, 24).split("".join(paragraphs))
    paragraphs[3] = "Paragraph 3 was rewritten and is now much longer than it had been before, by a few words.\n\n"
    after = Splitter(words, 24).split("".join(paragraphs))
    assert len(set(after) - set(before)) <= 3


def test_chunks_carry_their_document() -> None:
    document = Document("doc", "First one here. " * 8, "Title", {"lang": "en"})
    chunks = Splitter(words, 16).split_document(document)
    assert [chunk.id for chunk in chunks] == [f"doc#{i}" for i in range(len(chunks))]
    assert "".join(chunk.text for chunk in chunks) == document.full_text == "Title\n" + document.text
    assert {chunk.title for chunk in chunks} == {"Title"}
    assert all(chunk.metadata == {"lang": "en"} for chunk in chunks)
    assert all(chunk.index_text.count("Title") == 1 for chunk in chunks)


@pytest.mark.parametrize("text", ["Title of it", "# Title\n\nbody", "Title\nbody"])
def test_a_title_that_is_already_there_is_not_repeated(text: str) -> None:
    assert Document("d", text, "Title").full_text == text


def test_the_name_tells_settings_apart() -> None:
    names = {Splitter(words, n, tokenizer=t).name for n in (16, 32) for t in ("a", "b")}
    assert len(names) == 4


def test_a_tiny_budget_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        Splitter(words, 4)
