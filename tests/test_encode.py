"""Chunk entries: the same whether encoded alone or with others, wherever they stood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from ragkv.chunks import ChunkTokenizer, EncodeGroup
from ragkv.encode import encode
from tests.blend_kit import BOS, Desk, close, drain, token_ids
from tests.families import MOVABLE, make_runner


@dataclass
class Words:
    """A tokenizer whose tokens are the numbers in the text."""

    bos: ClassVar[tuple[int, ...]] = BOS
    fingerprint: ClassVar[str] = "words"

    def plain(self, text):
        return tuple(map(int, text.split()))


def document(lengths, context_tokens):
    texts = [" ".join(map(str, token_ids(n, seed))) for seed, n in enumerate(lengths)]
    tokenizer = ChunkTokenizer(Words(), model_fingerprint="m", dtype="float32", context_tokens=context_tokens)
    return tokenizer, tokenizer.document(texts, "document")


def floats(slab):
    return torch.from_numpy(slab.copy()).view(torch.float32)


@pytest.mark.parametrize("context_tokens", [0, 10, 25, 1000])
@pytest.mark.parametrize("family", ["llama", "qwen2-windowed", "smollm3"])
def test_groups_give_what_single_chunks_behind_their_context_give(family, context_tokens):
    runner = make_runner(family)
    tokenizer, chunks = document((9, 14, 6, 11, 8), context_tokens)
    groups = tokenizer.groups(chunks, {chunk.key for chunk in chunks})
    together = {entry.key: entry for group in groups for entry in drain(encode(runner, group))}
    assert together.keys() == {chunk.key for chunk in chunks}
    for chunk in chunks:
        [alone] = drain(encode(runner, tokenizer.single(chunk)))
        grouped = together[chunk.key]
        assert (alone.tokens, alone.context_tokens) == (grouped.tokens, grouped.context_tokens)
        assert alone.tokens == len(chunk.ids)
        for a, b in zip(alone.slabs, grouped.slabs, strict=True):
            close(floats(a), floats(b))


def test_only_wanted_chunks_are_encoded():
    runner = make_runner("llama")
    tokenizer, chunks = document((9, 14, 6, 11), 1000)
    wanted = {chunks[1].key, chunks[2].key}
    [group] = tokenizer.groups(chunks, wanted)
    entries = drain(encode(runner, group))
    assert [entry.key for entry in entries] == [chunks[1].key, chunks[2].key]
    assert group.tokens == 1 + 9 + 14 + 6  # nothing behind the last wanted one is computed


@pytest.mark.parametrize("family", MOVABLE)
def test_entries_do_not_depend_on_where_they_were_computed(tmp_path, family):
    desk = Desk(tmp_path, family)
    first, second = desk.document("d", 12, 15)
    for chunk in (first, second):
        [here] = drain(encode(desk.runner, desk.group(chunk)))
        for a, b in zip(desk.encode(chunk).slabs, here.slabs, strict=True):
            close(floats(a), floats(b))
    desk.store.close()


def test_the_same_chunk_in_the_same_context_gives_the_same_bytes(tmp_path):
    desk = Desk(tmp_path)
    chunk = desk.document("d", 12, 15)[1]
    one, two = (drain(encode(desk.runner, desk.group(chunk)))[0] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(one.slabs, two.slabs, strict=True))
    desk.store.close()


def test_the_context_colours_the_entry_but_not_its_first_layer():
    """Layer 0 knows the token alone; above it, the context shows."""
    runner = make_runner("llama")
    ids = token_ids(10, 1)
    near = drain(encode(runner, EncodeGroup(BOS, (ids,), (b"k",), "document")))[0]
    far = drain(encode(runner, EncodeGroup((*BOS, *token_ids(20, 2)), (ids,), (b"k",), "document")))[0]
    close(floats(near.slabs[0]), floats(far.slabs[0]))
    assert (floats(near.slabs[1]) - floats(far.slabs[1])).abs().max() > 0.01
    assert (near.context_tokens, far.context_tokens) == (1, 21)


def test_later_chunks_of_a_group_do_not_colour_earlier_ones():
    runner = make_runner("llama")
    first, second, other = token_ids(10, 1), token_ids(7, 2), token_ids(7, 3)
    one, two = (
        drain(encode(runner, EncodeGroup(BOS, (first, then), (b"a", None), "document")))[0] for then in (second, other)
    )
    for a, b in zip(one.slabs, two.slabs, strict=True):
        close(floats(a), floats(b), 1e-6)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_a_slab_is_k_then_v_of_every_token(family):
    runner = make_runner(family)
    ids = token_ids(10, 1)
    [entry] = drain(encode(runner, EncodeGroup((), (ids,), (b"k",), "alone")))
    kv = runner.new_kv(10)
    with torch.inference_mode():
        runner.prefill(torch.tensor(ids), kv)
    shape = (2, 10, runner.shape.kv_heads, runner.shape.head_dim)
    for layer, slab in enumerate(entry.slabs):
        assert slab.dtype == np.uint8
        assert slab.nbytes * runner.shape.layers == runner.shape.entry_bytes(10, "raw")
        keys, values = floats(slab).reshape(shape)
        made_keys, made_values = kv.read(layer, 10)
        assert torch.equal(values, made_values)
        close(keys[0], made_keys[0])  # position 0 is not rotated
        close(keys, runner.rope.lift(made_keys, runner.rope.angles(torch.arange(10)), layer))


def test_encoding_yields_between_layers():
    runner = make_runner("llama")
    with torch.inference_mode():
        steps = encode(runner, EncodeGroup(BOS, (token_ids(10, 1),), (b"k",), "alone"))
        assert sum(1 for _ in steps) == runner.shape.layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_stored_as_it_is(dtype):
    from ragkv.runner import ModelRunner
    from tests.families import make_model

    runner = ModelRunner(make_model("llama").to(dtype))
    ids = token_ids(10, 1)
    [entry] = drain(encode(runner, EncodeGroup(BOS, (ids,), (b"k",), "alone")))
    kv = runner.new_kv(11)
    with torch.inference_mode():
        runner.prefill(torch.tensor((*BOS, *ids)), kv)
    stored = torch.from_numpy(entry.slabs[1].copy()).view(dtype).reshape(2, 10, 2, 16)
    assert torch.equal(stored[1], kv.read(1, 11)[1][1:])
    angles = runner.rope.angles(torch.arange(1, 11))
    placed = runner.rope.place(stored[0], angles, 1)
    close(placed.float(), kv.read(1, 11)[0][1:].float(), 0.05)
