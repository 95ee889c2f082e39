"""Keys between positions: the library's own rotation, undone and done again."""

from __future__ import annotations

import pytest
import torch

from ragkv.attention import AttentionStep
from tests.blend_kit import close
from tests.families import IMMOVABLE, MOVABLE, make_model, make_runner


@pytest.fixture(params=MOVABLE)
def runner(request):
    return make_runner(request.param)


def keys_at(runner, ids, base):
    """(layers, tokens, kv_heads, head_dim): keys the model itself makes of ``ids`` at positions ``base`` …"""
    kv = runner.new_kv(len(ids), base=base)
    rows = runner.rows(ids, AttentionStep(kv, torch.arange(base, base + len(ids)), len(ids), contiguous=True))
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
    return torch.stack([kv.read(layer, len(ids))[0] for layer in range(runner.shape.layers)]).clone()


@pytest.mark.parametrize("base", [1, 300])
@torch.inference_mode()
def test_lifted_and_placed_keys_are_those_of_the_library_at_the_new_place(runner, base):
    ids = torch.arange(40) + 5
    old, new = runner.rope.angles(torch.arange(40)), runner.rope.angles(torch.arange(base, base + 40))
    made, expected = keys_at(runner, ids, 0), keys_at(runner, ids, base)
    for layer in range(runner.shape.layers):
        close(runner.rope.place(runner.rope.lift(made[layer], old, layer), new, layer), expected[layer])


@torch.inference_mode()
def test_a_lifted_key_of_the_first_layer_depends_on_its_token_alone(runner):
    ids = torch.tensor([9, 8, 7, 9, 9, 8])
    lifted = runner.rope.lift(keys_at(runner, ids, 50)[0], runner.rope.angles(torch.arange(50, 56)), 0)
    close(lifted[0], lifted[3])
    close(lifted[0], lifted[4])
    close(lifted[1], lifted[5])
    assert (lifted[0] - lifted[1]).abs().max() > 0.05


def test_only_layers_with_rope_rotate():
    rope = make_runner("smollm3").rope
    assert rope.rotates == (True, True, True, False)
    keys, angles = torch.randn(3, 2, 16), rope.angles(torch.tensor([5, 6, 7]))
    assert torch.equal(rope.place(keys, angles, 3), keys)
    assert torch.equal(rope.lift(keys, angles, 3), keys)
    assert not torch.equal(rope.place(keys, angles, 0), keys)


def test_partial_rotary_leaves_the_rest_of_the_head():
    rope = make_runner("phi3-partial").rope
    keys = torch.randn(3, 2, 16)
    placed = rope.place(keys, rope.angles(torch.tensor([5, 6, 7])), 0)
    assert torch.equal(placed[..., 8:], keys[..., 8:])
    assert not torch.equal(placed[..., :8], keys[..., :8])


def test_a_rotation_keeps_length_and_adds_up(runner):
    keys = torch.randn(4, 2, runner.shape.head_dim)
    at = torch.tensor([3, 10, 200, 0])
    once = runner.rope.place(keys, runner.rope.angles(at), 0)
    close(once.norm(dim=-1), keys.norm(dim=-1))
    twice = runner.rope.place(once, runner.rope.angles(at + 9), 0)
    close(twice, runner.rope.place(keys, runner.rope.angles(at + at + 9), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotation_is_computed_in_float32(dtype):
    """In half precision the only loss is the rounding of the results."""
    rope = make_runner("llama").rope
    keys, angles = torch.randn(64, 2, 16).to(dtype), rope.angles(torch.arange(400, 464))
    placed = rope.place(keys, angles, 0)
    assert placed.dtype == dtype
    assert torch.equal(placed, rope.place(keys.float(), angles, 0).to(dtype))


@pytest.mark.parametrize("name", IMMOVABLE)
def test_ropes_that_depend_on_the_length_are_refused(name):
    refusal = make_runner(name).rope.refusal
    assert name.split("-")[1] in refusal
    assert "full" in refusal


def test_an_unknown_rope_type_is_refused():
    from ragkv.rope import read_rope

    model = make_model("llama")
    model.model.rotary_emb.rope_type = "spiral"
    assert "'spiral'" in read_rope(model).refusal


@torch.inference_mode()
def test_kept_tables_hold_what_is_computed_for_each_prompt(runner):
    """Of keys and of rows, whether they were made for short prompts or long ones first."""
    for length, positions in ((5, [0, 4]), (300, [0, 7, 299]), (40, [39]), (301, [300, 300])):
        at = torch.tensor(positions)
        for kept, fresh in zip(runner.rope.table(length), runner.rope.angles(at), strict=True):
            assert torch.equal(kept[at], fresh)
        step = AttentionStep(runner.new_kv(512), at, 512, contiguous=False)
        rows = [runner.rows(at % 7, step, reach) for reach in (length, None)]
        for kept, fresh in zip(rows[0].rotary, rows[1].rotary, strict=True):
            assert torch.equal(kept, fresh)
