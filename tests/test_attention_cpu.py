"""Blocks of matrix products against their plain twin: one softmax under the whole mask."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from ragkv import attention_cpu
from ragkv.attention_cpu import attend, blocks_of, causal_blocks

LENGTH, DIM = 300, 16
SCATTERED = [0, 2, 3, 11, *range(40, 75), 120, *range(190, 199), 250, 299]
ROWS = {"scattered": SCATTERED, "all": list(range(LENGTH)), "last": list(range(280, LENGTH)), "one": [137]}
# Exact to rounding: each dtype's, of outputs near 1.
BOUNDS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def mask_of(positions, window=None):
    rows, keys = torch.tensor(positions)[:, None], torch.arange(LENGTH)
    return (keys <= rows) & (keys > rows - (window or LENGTH))


def tensors(rows, dtype, *, kv_heads=2, group=3, sharpness=1.0):
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(kv_heads, group, rows, DIM, generator=generator) * sharpness
    k, v = torch.randn(2, LENGTH, kv_heads, DIM, generator=generator)
    return q.to(dtype), k.to(dtype).transpose(0, 1), v.to(dtype).transpose(0, 1)


def twin(q, k, v, mask, scale, score_rows=1):
    """In float64: (rows, kv_heads, group, head_dim) and the scored rows' weights (length,)."""
    logits = q.double() @ k.double()[:, None].transpose(-1, -2) * scale
    weights = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1)
    return (weights @ v.double()[:, None]).permute(2, 0, 1, 3), weights[:, :, -score_rows:].sum(dim=(0, 1, 2))


@pytest.mark.parametrize("heads", [(1, 1), (2, 3), (4, 1)])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("window", [None, 1, 9, 120])
@pytest.mark.parametrize("rows", ROWS)
def test_every_row_is_attended_as_under_the_whole_mask(rows, window, dtype, heads):
    """Scored and not: float32 has a kernel of its own for the latter."""
    mask = mask_of(ROWS[rows], window)
    q, k, v = tensors(len(mask), dtype, kv_heads=heads[0], group=heads[1])
    score_rows = min(20, len(mask))
    out, scores = attend(q, k, v, blocks_of(mask, heads[0] * heads[1]), 0.3, score_rows)
    expected, weights = twin(q, k, v, mask, 0.3, score_rows)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    torch.testing.assert_close(scores.double(), weights, rtol=4 * BOUNDS[dtype], atol=BOUNDS[dtype])
    out, none = attend(q, k, v, blocks_of(mask, heads[0] * heads[1]), 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])
    assert none is None


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("length", [1, 64, 65, LENGTH])
def test_a_prefill_is_attended_as_under_the_causal_mask(length, dtype):
    mask = mask_of(range(length))[:, :length]
    q, k, v = tensors(length, dtype)
    out, _ = attend(q, k[:, :length], v[:, :length], causal_blocks(length, 6), 0.3)
    expected, _ = twin(q, k[:, :length], v[:, :length], mask, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


@pytest.mark.parametrize("score_rows", [0, 5])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_the_size_of_blocks_changes_nothing(monkeypatch, size, window, score_rows):
    mask = mask_of(SCATTERED, window)
    q, k, v = tensors(len(mask), torch.float32)
    expected, weights = twin(q, k, v, mask, 0.25, 5)
    monkeypatch.setattr(attention_cpu, "_MIN_ROWS", size)
    monkeypatch.setattr(attention_cpu, "_MAX_ROWS", size)
    blocks = blocks_of(mask, 6)
    assert len(blocks) == -(-len(mask) // size)
    out, scores = attend(q, k, v, blocks, 0.25, score_rows)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=2e-6)
    if score_rows:
        torch.testing.assert_close(scores.double(), weights, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("value", [3e4, float("inf"), float("nan")])
@pytest.mark.parametrize("window", [None, 12])
def test_keys_that_a_row_may_not_see_cannot_reach_it(window, value):
    """Whatever stands there, down to the rounding."""
    positions = list(range(40, 140, 2))
    mask = mask_of(positions, window)
    q, k, v = tensors(len(mask), torch.bfloat16)
    expected, _ = attend(q, k, v, blocks_of(mask, 6), 0.25)
    for index in (0, 17, 49):
        poisoned = k.clone()
        poisoned[:, ~mask[index]] = value
        out, _ = attend(q, poisoned, v, blocks_of(mask, 6), 0.25)
        assert torch.equal(out[index], expected[index])


def test_logits_far_from_zero_are_nearly_as_exact_as_the_fused_kernels():
    """A key bias (Qwen2) moves all logits of a row together; in bfloat16 one of 100 is off by up to a quarter."""
    mask = mask_of(list(range(200, LENGTH)))
    q, k, v = tensors(len(mask), torch.bfloat16)
    q[..., 0], k[..., 0] = 10.0, 10.0
    expected, _ = twin(q, k, v, mask, 1.0)
    fused = sdpa(q, k[:, None].expand(-1, 3, -1, -1), v[:, None].expand(-1, 3, -1, -1), attn_mask=mask, scale=1.0)
    out, _ = attend(q, k, v, blocks_of(mask, 6), 1.0)

    def error(actual):
        return (actual.double() - expected).square().mean().sqrt()

    assert error(out) < 2.5 * error(fused.permute(2, 0, 1, 3))


def test_blocks_look_at_no_key_that_no_row_sees():
    mask = mask_of(list(range(100, 164)), window=10)
    [block] = blocks_of(mask, 1)
    assert block.keys == slice(91, 164)
    assert mask[block.rows, block.keys].any(dim=0).all()
    one, two = blocks_of(mask_of([*range(10, 74), *range(200, 264)]), 1)
    assert (one.keys, one.common) == (slice(0, 74), slice(0, 11))
    assert (two.keys, two.common) == (slice(0, 264), slice(0, 201))
