"""Rows of several prompts that go through layers as one, beside each by itself."""

from __future__ import annotations

import pytest
import torch

from ragkv.attention import AttentionStep
from ragkv.clock import Stopwatch
from ragkv.rows import Joined
from ragkv.runner import ModelRunner
from ragkv.steps import LayerCall, alone, run_calls
from tests import fused_kit
from tests.families import MOVABLE, make_runner


@pytest.mark.parametrize("name", MOVABLE)
def test_each_has_its_own_answer(name):
    fused_kit.check_joined(make_runner(name), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    runner = make_runner("qwen2-windowed")
    runner = ModelRunner(runner.model.to(dtype))
    fused_kit.check_joined(runner, dtype)


@torch.inference_mode()
def test_joined_rows_are_views_until_one_goes_on_elsewhere():
    runner = make_runner("llama")
    one, other = (fused_kit.prompt(runner, length, seed=length) for length in (9, 14))
    joined = Joined([one, other])
    assert joined.holds([one, other])
    assert not joined.holds([other, one])
    assert not joined.holds([one])
    runner.run_together(0, joined)
    assert joined.holds([one, other])
    assert one.hidden.data_ptr() == joined.hidden.data_ptr()
    assert (one.hidden.shape[1], other.hidden.shape[1]) == (one.step.rows, other.step.rows)
    runner.run_layer(1, one)
    assert not joined.holds([one, other])


@torch.inference_mode()
def test_a_step_of_other_rules_is_not_taken_for_causal():
    runner = make_runner("llama")
    one, other = (fused_kit.prompt(runner, length, seed=length) for length in (9, 14))
    assert Joined([one, other]).step.causal

    class Blind(AttentionStep):
        causal = False

    other.step = Blind(other.step.kv, other.step.positions, 14, contiguous=True)
    assert not Joined([one, other]).step.causal


@torch.inference_mode()
def test_the_time_of_a_joined_layer_is_each_ones_and_shared():
    runner, now = make_runner("llama"), [0.0]
    watches = [Stopwatch(lambda: now[0]) for _ in range(2)]
    prompts = [fused_kit.prompt(runner, length, seed=length) for length in (9, 14)]
    calls = [
        LayerCall(0, rows, watch, part)
        for rows, watch, part in zip(prompts, watches, ("select", "recompute"), strict=True)
    ]
    run_together = runner.run_together

    def slow(layer, joined):
        now[0] += 5.0
        run_together(layer, joined)

    runner.run_together = slow
    now[0] = 2.0
    run_calls(runner, calls, Joined(prompts))
    assert [watch.parts for watch in watches] == [{"queue": 2.0, "select": 5.0}, {"queue": 2.0, "recompute": 5.0}]
    assert [watch.shared for watch in watches] == [5.0, 5.0]
    now[0] = 8.0
    run_calls(runner, calls[:1])
    assert watches[0].parts == {"queue": 3.0, "select": 5.0}
    assert watches[0].shared == 5.0


def test_steps_run_alone_end_with_whoever_drives_them():
    closed = []

    def steps():
        try:
            yield None
            yield None
        finally:
            closed.append(True)
        return 7

    driven = alone(make_runner("llama"), steps())
    next(driven)
    driven.close()
    assert closed == [True]
    driven = alone(make_runner("llama"), steps())
    assert [next(driven), next(driven)] == [None, None]
    with pytest.raises(StopIteration) as done:
        next(driven)
    assert done.value.value == 7
