"""Parity with the library's own forward, for every supported family."""

from __future__ import annotations

import pytest
import torch

from ragkv.attention import NAME, AttentionStep
from ragkv.checkpoint import SUPPORTED
from ragkv.runner import ModelRunner
from tests.families import IMMOVABLE, MOVABLE, make_model

LENGTH, START, END = 60, 17, 44


@pytest.fixture(params=MOVABLE)
def model(request):
    return make_model(request.param)


def library_logits(model, ids, positions):
    """The library's own eager forward, last token, at explicit positions."""
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            return model(ids[None], position_ids=positions[None], use_cache=False).logits[0, -1].float()
    finally:
        model.set_attn_implementation(NAME)


def token_ids(n, seed=1):
    return torch.randint(3, 256, (n,), generator=torch.Generator().manual_seed(seed))


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_every_supported_family_is_here():
    assert {family for family, _ in MOVABLE.values()} == set(SUPPORTED)


@pytest.mark.parametrize("name", [*MOVABLE, *IMMOVABLE])
@torch.inference_mode()
def test_full_prefill(name):
    model = make_model(name)
    runner, ids = ModelRunner(model), token_ids(LENGTH)
    actual = runner.logits(runner.prefill(ids, runner.new_kv(LENGTH)))
    assert_close(actual, library_logits(model, ids, torch.arange(LENGTH)))


@torch.inference_mode()
def test_decode(model):
    runner, ids = ModelRunner(model), token_ids(LENGTH)
    kv = runner.new_kv(LENGTH)
    runner.prefill(ids[:-3], kv)
    for position in range(LENGTH - 3, LENGTH):
        logits = runner.decode(int(ids[position]), position, kv)
    assert_close(logits, library_logits(model, ids, torch.arange(LENGTH)))


@torch.inference_mode()
def test_moved_kv_reads_back_without_repair(model):
    """KV made at positions 0…, lifted, placed 100 further, and read by a question there."""
    runner, ids, shift = ModelRunner(model), token_ids(LENGTH), 100
    made = runner.new_kv(END)
    runner.prefill(ids[:END], made)
    moved = runner.new_kv(LENGTH, base=shift)
    old = runner.rope.angles(torch.arange(END))
    new = runner.rope.angles(torch.arange(shift, shift + END))
    for layer in range(runner.shape.layers):
        keys, values = made.read(layer, END)
        lifted = runner.rope.lift(keys, old, layer)
        moved.write(layer, slice(0, END), runner.rope.place(lifted, new, layer), values)
    positions = torch.arange(shift + END, shift + LENGTH)
    rows = runner.rows(ids[END:], AttentionStep(moved, positions, LENGTH, contiguous=False))
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
    assert_close(runner.logits(rows), library_logits(model, ids, torch.arange(shift, shift + LENGTH)))


@torch.inference_mode()
def test_poisoned_rows_are_repaired(model):
    """Exact KV with some rows poisoned; recomputing just these gives the exact answer, not recomputing not."""
    runner, ids = ModelRunner(model), token_ids(LENGTH)
    expected = library_logits(model, ids, torch.arange(LENGTH))
    poisoned = torch.zeros(LENGTH, dtype=torch.bool)
    poisoned[START:END:3] = True

    def answer(selected):
        kv = runner.new_kv(LENGTH)
        runner.prefill(ids, kv)
        for layer in range(runner.shape.layers):
            keys, values = (t[poisoned] for t in kv.read(layer, LENGTH))
            kv.write(layer, poisoned, keys + 3.0, values - 3.0)
        positions = selected.nonzero()[:, 0]
        rows = runner.rows(ids[positions], AttentionStep(kv, positions, LENGTH, contiguous=False))
        for layer in range(runner.shape.layers):
            runner.run_layer(layer, rows)
        return runner.logits(rows)

    question = torch.arange(LENGTH) >= END
    assert_close(answer(poisoned | question), expected)
    assert (answer(question) - expected).abs().max() > 0.1


@torch.inference_mode()
def test_probe_gives_the_values_the_layer_would_write(model):
    runner, ids = ModelRunner(model), token_ids(LENGTH)
    kv = runner.new_kv(LENGTH)
    rows = runner.start_prefill(ids, kv)
    runner.run_layer(0, rows)
    values = runner.probe_values(1, rows)
    runner.run_layer(1, rows)
    torch.testing.assert_close(values, kv.read(1, LENGTH)[1])


@pytest.mark.parametrize("name", IMMOVABLE)
def test_unmovable_rope_is_refused_by_name(name):
    refusal = ModelRunner(make_model(name)).rope.refusal
    assert refusal is not None
    assert name.split("-")[1] in refusal
