"""The fused layer loop against the plain one in Triton's interpreter (tests/gpu: compiled), and what it refuses."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton, and TRITON_INTERPRET=1 before it is imported", allow_module_level=True)

from ragkv import fused
from ragkv.fused import refusal
from ragkv.kernels import attend
from ragkv.runner import ModelRunner
from ragkv.selfcheck import find_fault, settle_layer_loop
from tests import fused_kit as kit
from tests.families import MOVABLE, make_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize("name", kit.FUSED)
def test_passes(name):
    kit.check_passes(name, torch.float32, "cpu")


def test_passes_in_half_precision():
    kit.check_passes("qwen3", torch.float16, "cpu")


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_values(name):
    kit.check_values(name, torch.float32, "cpu")


def test_some_rows_go_on():
    kit.check_some_rows_go_on("qwen3", torch.float32, "cpu")


def test_rows_start():
    kit.check_starts(ModelRunner(make_model("llama"), fused=True))


@pytest.mark.parametrize("name", ["llama", "qwen2-windowed", "qwen3", "smollm3"])
def test_looking_ahead(name):
    kit.check_looking_ahead(name, torch.float32, "cpu")


@pytest.mark.parametrize("name", ["qwen2-windowed", "smollm3"])
def test_rows_of_several_prompts(name):
    kit.check_joined(ModelRunner(make_model(name), fused=True), torch.float32)


@torch.inference_mode()
def test_layers_that_cannot_be_captured_are_launched_kernel_by_kernel(caplog):
    class Graphs:
        def taking(self, *_):
            raise torch.OutOfMemoryError("nothing is left")

    runner, ids = ModelRunner(make_model("llama"), fused=True), torch.arange(3, 20)
    expected = runner.logits(runner.prefill(ids, runner.new_kv(17)))
    runner.fused.graphs = Graphs()
    assert torch.equal(runner.logits(runner.prefill(ids, runner.new_kv(17))), expected)
    assert runner.fused.graphs is None
    assert "nothing is left" in caplog.text


def test_an_answer_is_gone_along():
    kit.check_along("llama", torch.float32, "cpu")


@pytest.mark.parametrize("name", ["qwen2-windowed", "smollm3"])
def test_the_last_layer_ends_with_the_last_row(name):
    kit.check_the_end(ModelRunner(make_model(name), fused=True))


@pytest.mark.parametrize("name", sorted(set(MOVABLE) - set(kit.FUSED)))
def test_what_it_does_not_know_is_refused(name):
    model = make_model(name)
    if name == "llama-linear":
        assert refusal(model) is None
    else:
        assert refusal(model).startswith("layer 0 ")


def test_a_bias_it_does_not_know_is_refused():
    reason = refusal(make_model("llama", options={"mlp_bias": True}))
    assert "bias" in reason


def test_the_library_still_runs_on_the_joined_weights():
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        plain, fused = make_model("qwen2"), ModelRunner(make_model("qwen2"), fused=True)
        plain.set_attn_implementation("eager")
        fused.model.set_attn_implementation("eager")
        assert torch.equal(fused.model(ids).logits, plain(ids).logits)
    attention = fused.decoder.layers[0].self_attn
    storages = {linear.weight.untyped_storage().data_ptr() for linear in (attention.q_proj, attention.v_proj)}
    assert len(storages) == 1


@pytest.mark.parametrize("name", ["qwen3", "mistral-windowed"])
def test_the_check_at_load_passes(name):
    runner = ModelRunner(make_model(name), fused=True)
    settle_layer_loop(runner)
    assert runner.plain_because is None
    assert find_fault(runner) is None


@pytest.mark.parametrize("broken", ["wrong", "raises"])
@pytest.mark.parametrize("helps", [True, False])
def test_a_kernel_for_hopper_that_is_wrong_is_dropped(broken, helps, monkeypatch, caplog):
    runner, dropped = ModelRunner(make_model("llama"), fused=True), []
    true = attend.attend

    def attention(*args, **options):
        if dropped and helps:
            return true(*args, **options)
        if broken == "raises":
            raise RuntimeError("no such instruction")
        out, lse = true(*args, **options)
        return 2 * out, lse

    monkeypatch.setattr(fused, "attend", attention)
    monkeypatch.setattr(fused, "drop_hopper", lambda *rows: (dropped.append(rows), len(dropped) == 1)[1])
    settle_layer_loop(runner)
    assert len(dropped) == (1 if helps else 2)
    assert (runner.fused is not None) == helps
    assert "without its kernel for Hopper" in caplog.text


@pytest.mark.parametrize("broken", ["wrong", "raises"])
def test_a_fused_loop_that_is_wrong_is_left(broken, monkeypatch, caplog):
    runner = ModelRunner(make_model("llama"), fused=True)
    true = runner.fused.run

    def run(index, rows):
        if broken == "raises":
            raise RuntimeError("no such instruction")
        true(index, rows)
        rows.hidden[:, -1] += 1.0

    monkeypatch.setattr(runner.fused, "run", run)
    settle_layer_loop(runner)
    assert runner.fused is None
    assert runner.plain_because.startswith("the fused layer loop")
    assert "plain" in caplog.text
    assert find_fault(runner) is None
