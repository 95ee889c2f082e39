"""The runner's own promises; parity with the library is in test_families."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from ragkv import checkpoint, loop
from ragkv.runner import ModelRunner, use_device
from tests.blend_kit import token_ids
from tests.engine_kit import eventually
from tests.families import MOVABLE, make_model, make_runner


@pytest.mark.parametrize(("declared", "expected"), [(None, set()), (2, {2}), ([2, 7], {2, 7}), ([], set())])
def test_end_tokens(declared, expected):
    model = make_model("llama")
    model.generation_config.eos_token_id = declared
    assert ModelRunner(model).eos_ids == expected


@pytest.mark.parametrize("name", MOVABLE)
def test_the_shape_is_that_of_what_the_model_writes(name):
    runner = make_runner(name)
    shape = runner.shape
    attention = runner.decoder.layers[0].self_attn
    width = shape.kv_heads * shape.head_dim
    fused = hasattr(attention, "qkv_proj")
    heads = runner.config.num_attention_heads * shape.head_dim
    assert width == ((attention.qkv_proj.out_features - heads) // 2 if fused else attention.k_proj.out_features)
    assert shape.entry_bytes(3, "raw") == 3 * 2 * shape.layers * width * 4


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3"])
@torch.inference_mode()
def test_a_probe_changes_nothing(name):
    runner = make_runner(name)
    kv = runner.new_kv(12)
    rows = runner.start_prefill(runner.tensor(token_ids(12, 1)), kv)
    runner.run_layer(0, rows)
    for part in kv.read(1, 12):
        part.fill_(777.0)
    hidden = rows.hidden.clone()
    runner.probe_values(1, rows)
    assert torch.equal(rows.hidden, hidden)
    assert all((part == 777.0).all() for part in kv.read(1, 12))


@torch.inference_mode()
def test_logits_are_float32_in_every_dtype():
    runner = ModelRunner(make_model("llama").to(torch.bfloat16))
    logits = runner.logits(runner.prefill(runner.tensor(token_ids(5, 1)), runner.new_kv(5)))
    assert (logits.dtype, logits.shape) == (torch.float32, (256,))


@torch.inference_mode()
def test_room_behind_the_prompt_is_not_read():
    """What an earlier owner left in the memory behind the prompt's slots reaches nobody."""
    runner, ids = make_runner("llama"), token_ids(12, 1)
    small, large = runner.new_kv(12), runner.new_kv(40)
    for layer in range(runner.shape.layers):
        for part in large.read(layer, 40):
            part.fill_(float("nan"))
    tensor = runner.tensor(ids)
    expected = runner.logits(runner.prefill(tensor, small))
    assert torch.equal(runner.logits(runner.prefill(tensor, large)), expected)
    assert torch.isfinite(runner.decode(5, 12, large)).all()


def test_layers_run_plain_on_a_cpu_and_say_why():
    assert make_runner("llama").layer_loop == "plain: the fused layer loop needs CUDA"
    assert ModelRunner(make_model("llama"), fused=False).layer_loop == "plain: it was asked for"


def test_a_cpu_never_imports_the_kernels():
    """They need Triton, which only comes with torch for CUDA."""
    code = (
        "import sys; from tests.families import make_runner; make_runner('llama'); "
        "assert not any(name.startswith('ragkv.kernels') for name in sys.modules)"
    )
    folder = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], cwd=folder).returncode == 0


@pytest.mark.parametrize(("device", "used"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_thread_launches_on_the_models_device(monkeypatch, device, used):
    seen = []
    monkeypatch.setattr(torch._C, "_cuda_setDevice", seen.append, raising=False)
    use_device(torch.device(device))
    assert seen == used


def test_the_engine_and_who_loads_the_model_use_its_device(make_engine, monkeypatch):
    seen = []
    for module in (loop, checkpoint):
        monkeypatch.setattr(module, "use_device", lambda device: seen.append((threading.current_thread().name, device)))
    make_engine()
    cpu = torch.device("cpu")
    eventually(lambda: set(seen) == {(threading.current_thread().name, cpu), ("ragkv-engine", cpu)})
