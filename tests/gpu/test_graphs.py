"""What runs in CUDA graphs beside the same launched kernel by kernel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ragkv.attention import AttentionStep
from ragkv.eval.steps import drained
from ragkv.fused_graphs import MOST_ROWS, Captured
from ragkv.lookahead import look
from ragkv.methods import searched_layers
from ragkv.runner import ModelRunner
from tests import fused_kit
from tests.families import make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

WIDE = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
LONG = {"max_position_embeddings": 8192}


def made(family: str = "llama", dtype: torch.dtype = torch.float16) -> ModelRunner:
    model = make_model(family, options={**WIDE, **LONG}).to("cuda", dtype)
    return ModelRunner(model)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error < 1e-2, float(error)


@pytest.mark.parametrize("family", ["llama", "qwen2-windowed", "smollm3", "qwen3"])
@torch.inference_mode()
def test_layers_give_the_same_in_graphs(family):
    runner = made(family)
    for length, count in ((300, 1), (300, 64), (3000, 65), (3000, 700), (900, 900), (8000, MOST_ROWS), (3000, 450)):
        generator = torch.Generator("cuda").manual_seed(count)
        shape = (length, runner.shape.kv_heads, runner.shape.head_dim)
        stored = torch.randn((runner.shape.layers, 2, *shape), generator=generator, device="cuda").half()
        ids = torch.randint(3, 256, (count,), generator=generator, device="cuda")
        positions = torch.linspace(length - 1 if count == 1 else 0, length - 1, count, device="cuda").long()
        ends = []
        for kv in (runner.workspace(length), runner.new_kv(length)):
            for layer in range(runner.shape.layers):
                for part, some in zip(kv.read(layer, length), stored[layer], strict=True):
                    part.copy_(some)
            step = AttentionStep(kv, positions, length, contiguous=count == length, last_only=True)
            rows = runner.rows(ids, step)
            for layer in range(runner.shape.layers):
                runner.run_layer(layer, rows)
            assert (type(rows.room).__name__ == "Captured") == (len(ends) == 0)
            ends.append((rows.hidden[:, -1].clone(), kv.slots(0, length).clone(), runner.logits(rows)))
        for one, other in zip(*ends, strict=True):
            close(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2-windowed", "smollm3", "qwen3"])
def test_prompts_join_and_part_in_and_out_of_graphs(family, dtype):
    """The first has the workspace: it is in graphs until it joins, and again when it goes on by itself."""
    runner, captured = made(family, dtype), []
    run = runner.fused.run
    runner.fused.run = lambda layer, rows: (run(layer, rows), captured.append(isinstance(rows.room, Captured)))
    fused_kit.check_joined(runner, dtype)
    assert any(captured)
    assert not all(captured)


def test_an_answer_is_gone_along():
    fused_kit.check_along("llama", torch.bfloat16, "cuda")


@pytest.mark.parametrize("family", ["qwen2-windowed", "smollm3"])
def test_the_last_layer_ends_with_the_last_row(family):
    fused_kit.check_the_end(made(family))


@torch.inference_mode()
def test_the_workspace_is_one_prompts_at_a_time():
    runner = made()
    first = runner.workspace(500)
    assert first.slots(0, 1).data_ptr() != runner.workspace(400).slots(0, 1).data_ptr()
    where = first.slots(0, 1).data_ptr()
    del first
    again = runner.workspace(600)
    assert again.slots(0, 1).data_ptr() == where
    assert runner.workspace(runner.max_positions + 1).slots(0, 1).data_ptr() != where


@torch.inference_mode()
def test_looking_ahead_gives_the_same_in_graphs():
    runner = made()
    assert runner.lookahead is not None
    for count in (1, 31, 32, 33, 200):
        ids = torch.randint(3, 256, (count,), device="cuda", generator=torch.Generator("cuda").manual_seed(count))
        positions = torch.arange(5000, 5000 + count, device="cuda")
        tokens = torch.stack((ids, positions))
        plain, (there, fused) = drained(look(runner, ids, positions)), runner.lookahead.look(tokens.cpu().numpy())
        assert torch.equal(there, tokens)
        assert tuple(fused.layers) == tuple(plain.layers) == searched_layers(runner.shape.layers)
        assert (fused.scales, fused.windows) == (plain.scales, plain.windows)
        close(fused.kv, plain.kv)
        close(fused.queries, plain.queries)


@torch.inference_mode()
def test_who_looks_ahead_next_leaves_what_the_device_has_not_read_yet():
    runner = made()
    tokens = [np.stack((np.arange(30) + 3 + 40 * i, np.arange(30))) for i in range(2)]
    expected = [runner.lookahead.look(each)[1].queries.clone() for each in tokens]
    product = torch.randn((4096, 4096), device="cuda")
    torch.cuda.synchronize()
    for _ in range(20):
        product @ product
    found = [runner.lookahead.look(each)[1].queries.clone() for each in tokens]
    assert not torch.equal(*expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
