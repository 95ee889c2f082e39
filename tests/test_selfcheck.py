"""The check at load: right families pass, every wrong handling of KV is caught with a reason."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ragkv import attention, runner, selfcheck
from ragkv.rope import Rope
from ragkv.runner import ModelRunner
from ragkv.selfcheck import find_fault
from tests.families import IMMOVABLE, MOVABLE, make_model, make_runner

ROTATING = [name for name in MOVABLE if not name.startswith("smollm3")]


@pytest.mark.parametrize("name", MOVABLE)
def test_every_movable_family_passes(name):
    assert find_fault(make_runner(name)) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen2-yarn", "qwen3", "smollm3-windowed"])
def test_half_precision_passes(name, dtype):
    assert find_fault(ModelRunner(make_model(name).to(dtype))) is None


@pytest.mark.parametrize("name", IMMOVABLE)
def test_a_rope_that_cannot_be_moved_is_named(name):
    assert name.split("-")[1] in find_fault(make_runner(name))


def test_too_few_positions():
    assert "100 positions" in find_fault(ModelRunner(make_model("llama", options={"max_position_embeddings": 100})))


def assert_caught(model):
    fault = find_fault(model)
    assert fault is not None
    assert fault.startswith("self-check failed")
    assert "in full" in fault


@pytest.mark.parametrize("name", MOVABLE)
def test_keys_that_are_not_rotated(name, monkeypatch):
    monkeypatch.setattr(Rope, "place", lambda self, keys, angles, layer: keys)
    assert_caught(make_runner(name))


@pytest.mark.parametrize("name", MOVABLE)
def test_keys_that_are_neither_lifted_nor_placed(name, monkeypatch):
    """Invisible to a check that reads KV where it was made."""
    for method in ("place", "lift"):
        monkeypatch.setattr(Rope, method, lambda self, keys, angles, layer: keys)
    assert_caught(make_runner(name))


def test_yarns_scaling_applied_twice(monkeypatch):
    model = make_runner("qwen2-yarn")
    scaling = model.decoder.rotary_emb.attention_scaling
    assert scaling > 1.1
    place = Rope.place
    monkeypatch.setattr(Rope, "place", lambda self, keys, angles, layer: place(self, keys * scaling, angles, layer))
    assert_caught(model)


@pytest.mark.parametrize("name", ["llama-llama3", "llama-linear", "qwen2-yarn"])
def test_unscaled_frequencies(name):
    model = make_runner(name)
    plain = make_runner(name.split("-")[0]).rope.inv_freq
    model.rope = replace(model.rope, inv_freq=plain)
    assert_caught(model)


def test_nope_layers_rotated():
    model = make_runner("smollm3")
    model.rope = replace(model.rope, rotates=(True,) * 4)
    assert_caught(model)


def test_interleaved_pairs_taken_for_halves(monkeypatch):
    from ragkv import rope

    def interleaved(keys, cos, sin):
        pairs = keys.unflatten(-1, (-1, 2))
        first, second = pairs[..., 0], pairs[..., 1]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)

    monkeypatch.setattr(rope, "_rotate", interleaved)
    assert_caught(make_runner("llama"))


@pytest.mark.parametrize("name", [name for name in MOVABLE if "windowed" in name])
def test_a_window_ignored(name, monkeypatch):
    mask = attention.AttentionStep.mask
    monkeypatch.setattr(attention.AttentionStep, "mask", lambda self, window: mask(self, None))
    assert_caught(make_runner(name))


def test_a_mask_that_shows_the_future(monkeypatch):
    """The causal mask shifted to the bottom right: only repaired tokens can tell."""

    def shifted(self, window):
        rows = torch.arange(self.rows)[:, None] + self.length - self.rows
        return torch.arange(self.length) <= rows

    monkeypatch.setattr(attention.AttentionStep, "mask", shifted)
    fault = find_fault(make_runner("llama"))
    assert "repaired" in fault


def test_keys_written_to_the_wrong_slots(monkeypatch):
    write = selfcheck.RequestKV.write

    def off_by_one(self, layer, slots, keys, values):
        write(self, layer, slots, keys.roll(1, 0), values)

    monkeypatch.setattr(selfcheck.RequestKV, "write", off_by_one)
    assert_caught(make_runner("llama"))


def test_answers_that_are_not_numbers():
    model = make_runner("llama")
    with torch.no_grad():
        model.decoder.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    assert_caught(model)


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), KeyError("x"), TypeError("y"), IndexError("z")])
def test_a_model_that_breaks_under_the_check_is_a_reason_not_an_error(monkeypatch, error):
    def fail(self, layer, rows):
        raise error

    monkeypatch.setattr(runner.ModelRunner, "run_layer", fail)
    fault = find_fault(make_runner("llama"))
    assert "self-check failed" in fault
    assert str(error) in fault


def test_the_model_is_left_as_it_was(monkeypatch):
    model = make_runner("llama")
    find_fault(model)
    assert model.config._attn_implementation == attention.NAME
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: 1 / 0)
    assert find_fault(model) is not None
    assert model.config._attn_implementation == attention.NAME
