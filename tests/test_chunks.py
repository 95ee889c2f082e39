"""Which tokens a chunk is encoded behind, and what that makes of its key."""

from __future__ import annotations

import random

import pytest

from ragkv import chunks
from ragkv.checkpoint import BUNDLED_DIR
from ragkv.chunks import ChunkTokenizer, ChunkTokens, EncodeGroup
from ragkv.store import chunk_key
from ragkv.tokenizer import Tokenizer, chunk_text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(BUNDLED_DIR)


@pytest.fixture(scope="module")
def make(tokenizer):
    def make(limit: int = 40, **options) -> ChunkTokenizer:
        return ChunkTokenizer(
            tokenizer, **{"model_fingerprint": "m", "dtype": "float32", "context_tokens": limit, **options}
        )

    return make


def texts_of(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = ["the", "river", "holds", "many", "small", "grey", "stones", "and", "one", "red", "boat"]
    return [f"Part {i}: " + " ".join(rng.choices(words, k=rng.randint(1, 25))) for i in range(count)]


@pytest.mark.parametrize("limit", [0, 10, 40, 70, 10_000])
def test_context_is_the_longest_run_of_whole_chunks_before_within_the_limit(make, tokenizer, limit):
    texts = texts_of(12)
    own = [tokenizer.plain(chunk_text(text)) for text in texts]
    chunks = make(limit).document(texts, "document")
    for i, chunk in enumerate(chunks):
        first = i - chunk.context_chunks
        assert chunk.ids == own[i]
        assert chunk.context == tuple(t for ids in own[first:i] for t in ids)
        assert len(chunk.context) <= limit
        assert first == 0 or len(chunk.context) + len(own[first - 1]) > limit


def test_a_chunk_alone_gives_the_same_as_its_whole_document(make):
    texts = texts_of(8)
    assert [make().chunk(texts, i, "document") for i in range(8)] == make().document(texts, "document")


def test_alone_means_without_context(make):
    chunks = make().document(texts_of(5), "alone")
    assert all(c.context == () and c.context_chunks == 0 and c.policy == "alone" for c in chunks)


def test_an_edit_changes_only_the_keys_of_the_chunk_and_of_those_that_see_it(make):
    texts = texts_of(12)
    before = make().document(texts, "document")
    edited = 4
    after = make().document([t + " now" if i == edited else t for i, t in enumerate(texts)], "document")
    changed = {i for i in range(12) if before[i].key != after[i].key}
    touched = {i for i in range(12) if any(i - c[i].context_chunks <= edited <= i for c in (before, after))}
    assert changed == touched
    assert edited in changed
    assert len(changed) < 8


@pytest.mark.parametrize(
    "other", [{"model_fingerprint": "n"}, {"dtype": "bfloat16"}, {"policy": "alone"}], ids=lambda o: next(iter(o))
)
def test_keys_differ_by_model_type_and_policy(make, other):
    texts = texts_of(3)
    policy = other.pop("policy", "document")
    before = make().document(texts, "document")
    assert not {c.key for c in before} & {c.key for c in make(**other).document(texts, policy)}


def seen(group: EncodeGroup, bos: tuple[int, ...]) -> dict[bytes, tuple[tuple[int, ...], tuple[int, ...]]]:
    """What each wanted chunk of a group is, and what stands before it in the group's pass."""
    assert group.lead[: len(bos)] == bos
    result, before = {}, group.lead[len(bos) :]
    for ids, key in zip(group.parts, group.keys, strict=True):
        if key is not None:
            assert key not in result
            result[key] = ids, before
        before += ids
    return result


@pytest.mark.parametrize("policy", ["document", "alone"])
@pytest.mark.parametrize("limit", [0, 40, 10_000])
@pytest.mark.parametrize("seed", range(4))
def test_groups_cover_exactly_the_missing_chunks_each_behind_its_own_context(make, tokenizer, policy, limit, seed):
    chunks = make(limit).document(texts_of(12, seed), policy)
    missing = {c.key for c in random.Random(seed).sample(chunks, k=seed * 4)}
    groups = make(limit).groups(chunks, missing)
    found: dict[bytes, tuple] = {}
    for group in groups:
        part = seen(group, tokenizer.bos)
        assert len(part) == group.wanted > 0
        assert group.tokens == len(group.lead) + sum(map(len, group.parts))
        assert group.keys[-1] is not None, "computed more than was needed"
        assert group.policy == policy
        assert not found.keys() & part.keys()
        found |= part
    assert found == {c.key: (c.ids, c.context) for c in chunks if c.key in missing}


def test_a_short_document_takes_one_pass(make):
    chunks = make(10_000).document(texts_of(6), "document")
    assert len(make(10_000).groups(chunks, {c.key for c in chunks})) == 1


def test_equal_chunks_are_encoded_once(make):
    chunks = make().document(["The same text."] * 4, "alone")
    groups = make().groups(chunks, {chunks[0].key})
    assert sum(group.wanted for group in groups) == 1


def test_a_single_chunk_behind_its_context(make, tokenizer):
    chunk = make().document(texts_of(6), "document")[5]
    assert isinstance(chunk, ChunkTokens)
    assert seen(make().single(chunk), tokenizer.bos) == {chunk.key: (chunk.ids, chunk.context)}


def test_nothing_missing_nothing_to_do(make):
    assert make().groups(make().document(texts_of(6), "document"), set()) == []
    assert make().document([], "document") == []


def test_another_salt_is_another_key_and_is_not_shown(make):
    texts = texts_of(3)
    keys = {
        salt: [c.key for c in make(salt=salt).document(texts, "document")] for salt in (b"", b"hunter2", b"hunter3")
    }
    assert not set(keys[b""]) & set(keys[b"hunter2"])
    assert not set(keys[b"hunter3"]) & set(keys[b"hunter2"])
    assert keys[b""] == [c.key for c in make().document(texts, "document")]
    assert "hunter2" not in repr(make(salt=b"hunter2")) + repr(make(salt=b"hunter2").document(texts, "document"))


@pytest.mark.parametrize("policy", ["document", "alone"])
def test_a_chunk_that_is_asked_for_again_is_the_same_and_not_hashed_again(make, monkeypatch, policy):
    chunker, texts, hashed = make(), texts_of(6), []
    monkeypatch.setattr(chunks, "chunk_key", lambda **fields: hashed.append(1) or chunk_key(**fields))
    plain = chunker.document(texts, policy)
    assert len(hashed) == 6
    for _ in range(2):
        assert [chunker.chunk(texts, index, policy) for index in range(6)] == plain
    assert len(hashed) == 12
    changed = [*texts[:2], "Another text.", *texts[3:]]
    assert chunker.chunk(changed, 2, policy) != plain[2]
