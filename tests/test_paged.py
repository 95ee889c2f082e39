"""Memory of the pool: what was copied in comes out, whatever blocks it lay in."""

from __future__ import annotations

import pytest
import torch

from ragkv.kv import KvShape, RequestKV
from ragkv.paged import BLOCK_TOKENS, PagedKV

CPU = torch.device("cpu")
SHAPE = KvShape(3, 2, 8, torch.float32)


def filled(tokens: int) -> RequestKV:
    kv = RequestKV(SHAPE, tokens, CPU)
    kv.slots(0, tokens).normal_(generator=torch.Generator().manual_seed(tokens))
    return kv


@pytest.mark.parametrize("blocks", [[2, 3, 4], [5, 1, 4], [3, 4, 0]])
@pytest.mark.parametrize("tokens", [1, 16, 37, 48])
def test_there_and_back(blocks, tokens):
    pool, kv, back = PagedKV(SHAPE, 6, CPU), filled(tokens), RequestKV(SHAPE, tokens, CPU)
    pool.data.fill_(7.0)
    pool.scatter(kv, blocks, 0, tokens)
    pool.gather(blocks, back, tokens)
    assert torch.equal(back.slots(0, tokens), kv.slots(0, tokens))
    written = torch.zeros(6, BLOCK_TOKENS, dtype=torch.bool)
    for token in range(tokens):
        written[blocks[token // BLOCK_TOKENS], token % BLOCK_TOKENS] = True
    assert (pool.data.movedim(3, 1)[~written] == 7.0).all()


def test_a_token_lies_where_it_is_looked_for():
    pool, kv = PagedKV(SHAPE, 6, CPU), filled(40)
    pool.scatter(kv, [4, 1, 2], 0, 40)
    for token in (0, 15, 16, 39):
        there = pool.data[[4, 1, 2][token // BLOCK_TOKENS], :, :, token % BLOCK_TOKENS]
        assert torch.equal(there, kv.slots(token, token + 1)[:, :, 0])


def test_the_rest_of_a_prompt_is_added_to_what_is_there():
    pool, kv = PagedKV(SHAPE, 6, CPU), filled(45)
    pool.scatter(kv, [4], 0, 16)
    pool.scatter(kv, [0, 5], 16, 29)
    back = RequestKV(SHAPE, 45, CPU)
    pool.gather([4, 0, 5], back, 45)
    assert torch.equal(back.slots(0, 45), kv.slots(0, 45))


def test_consecutive_blocks_are_read_without_a_copy():
    pool = PagedKV(SHAPE, 6, CPU)
    pool.data.normal_()
    both = pool.keys_and_values(1, 2, 3)
    assert both.untyped_storage().data_ptr() == pool.data.untyped_storage().data_ptr()
    expected = pool.data[2:5, 1].permute(1, 3, 0, 2, 4).flatten(2, 3)
    assert torch.equal(both, expected)


def test_sizes():
    pool = PagedKV(SHAPE, 6, CPU)
    assert pool.data.shape == (6, 3, 2, BLOCK_TOKENS, 2, 8)
    assert pool.block_bytes == SHAPE.entry_bytes(BLOCK_TOKENS, "raw")
    assert pool.data.numel() * 4 == 6 * pool.block_bytes
