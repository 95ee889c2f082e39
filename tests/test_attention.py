"""The exact mask: no row ever sees a later position, or one outside its layer's window."""

from __future__ import annotations

import pytest
import torch

from ragkv.attention import AttentionStep
from tests.blend_kit import close, token_ids
from tests.families import MOVABLE, make_runner

LENGTH = 48
ROWS = torch.tensor([5, 6, 19, 30, 31, 47])


def filled(runner, base=0, seed=3):
    """A KV whose every slot holds something finite and large."""
    kv = runner.new_kv(LENGTH, base=base)
    generator = torch.Generator().manual_seed(seed)
    size = (LENGTH, runner.shape.kv_heads, runner.shape.head_dim)
    for layer in range(runner.shape.layers):
        k, v = (torch.randn(size, generator=generator) for _ in range(2))
        kv.write(layer, slice(0, LENGTH), k, v)
    return kv


def hidden_after(runner, kv, positions, score_rows=0):
    ids = torch.tensor(token_ids(len(positions), 5))
    step = AttentionStep(kv, positions, LENGTH, contiguous=False, score_rows=score_rows)
    rows = runner.rows(ids, step)
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
    return rows.hidden[0], step


@pytest.mark.parametrize("score_rows", [0, 2])
@pytest.mark.parametrize("family", MOVABLE)
@torch.inference_mode()
def test_no_row_sees_a_later_position(family, score_rows):
    runner = make_runner(family)
    expected, _ = hidden_after(runner, filled(runner), ROWS, score_rows)
    for index, position in enumerate(ROWS.tolist()):
        kv = filled(runner)
        for layer in range(runner.shape.layers):
            kv.read(layer, LENGTH)[0][position + 1 :] = 50.0
            kv.read(layer, LENGTH)[1][position + 1 :] = 50.0
        actual, _ = hidden_after(runner, kv, ROWS, score_rows)
        torch.testing.assert_close(actual[: index + 1], expected[: index + 1], rtol=1e-6, atol=1e-6)
        if position + 1 < LENGTH:
            assert (actual[-1] - expected[-1]).abs().max() > 1e-3  # the last row sees what was changed


@pytest.mark.parametrize("score_rows", [0, 6])
@pytest.mark.parametrize("family", ["mistral-windowed", "phi3-windowed"])
@torch.inference_mode()
def test_no_row_sees_beyond_the_window(family, score_rows):
    """All layers have a window of 12: the row at 47 sees 36 … 47, and rows it sees in lower layers see as little."""
    runner = make_runner(family)
    expected, _ = hidden_after(runner, filled(runner), torch.tensor([47]), min(score_rows, 1))
    for slot, seen in ((35, False), (36, True)):
        kv = filled(runner)
        for layer in range(runner.shape.layers):
            kv.read(layer, LENGTH)[1][: slot + 1] += 5.0
        actual, _ = hidden_after(runner, kv, torch.tensor([47]), min(score_rows, 1))
        assert ((actual - expected).abs().max() > 1e-4) == seen


@pytest.mark.parametrize("family", ["qwen2-windowed", "smollm3-windowed"])
def test_windows_are_per_layer(family):
    runner = make_runner(family)
    windows = [layer.self_attn.sliding_window for layer in runner.decoder.layers]
    assert windows == [None, 12, None, 12]
    step = AttentionStep(runner.new_kv(LENGTH), ROWS, LENGTH, contiguous=False)
    assert step.mask(12).sum(dim=1).tolist() == [6, 7, 12, 12, 12, 12]
    assert step.mask(None).sum(dim=1).tolist() == (ROWS + 1).tolist()
    assert torch.equal(step.mask(LENGTH), step.mask(None))


@pytest.mark.parametrize("base", [0, 70])
@torch.inference_mode()
def test_slots_are_counted_from_the_base(base):
    runner = make_runner("llama")
    step = AttentionStep(runner.new_kv(LENGTH, base), ROWS + base, LENGTH, contiguous=False)
    keys = torch.arange(LENGTH)
    assert torch.equal(step.mask(None), keys <= ROWS[:, None])


@pytest.mark.parametrize("family", ["llama", "mistral-windowed", "qwen3", "phi3", "smollm3", "olmo2"])
@torch.inference_mode()
def test_scores_are_the_librarys_attention_weights(family):
    runner = make_runner(family)
    ids = torch.tensor(token_ids(LENGTH, 7))
    kv = runner.new_kv(LENGTH)
    runner.prefill(ids, kv)
    question = torch.arange(LENGTH - 8, LENGTH)
    plain = AttentionStep(kv, question, LENGTH, contiguous=False)
    scored = AttentionStep(kv, question, LENGTH, contiguous=False, score_rows=5)
    hidden = []
    for step in (plain, scored):
        rows = runner.rows(ids[question], step)
        for layer in range(runner.shape.layers):
            runner.run_layer(layer, rows)
        hidden.append(rows.hidden)
    close(hidden[1], hidden[0])
    runner.model.set_attn_implementation("eager")
    weights = runner.model(ids[None], output_attentions=True, use_cache=False).attentions
    expected = sum(layer[0, :, -5:].sum(dim=(0, 1)) for layer in weights)
    close(scored.scores, expected)
    assert plain.scores is None


@pytest.mark.parametrize("family", ["llama", "mistral-windowed"])
@torch.inference_mode()
def test_a_single_row_equals_the_same_row_among_others(family):
    runner = make_runner(family)
    ids = torch.tensor(token_ids(LENGTH, 7))
    full = runner.logits(runner.prefill(ids, runner.new_kv(LENGTH)))
    kv = runner.new_kv(LENGTH)
    runner.prefill(ids[:-1], kv)
    close(runner.decode(int(ids[-1]), LENGTH - 1, kv), full)
    kv = runner.new_kv(LENGTH)
    runner.prefill(ids, kv)
    lone = AttentionStep(kv, torch.tensor([LENGTH - 1]), LENGTH, contiguous=False, score_rows=1)
    rows = runner.rows(ids[-1:], lone)
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
    close(runner.logits(rows), full)
