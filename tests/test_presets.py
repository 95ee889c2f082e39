"""Random weights in the shapes of known models: right shapes, the same numbers again, made where they are wanted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from ragkv import presets
from ragkv.checkpoint import load_checkpoint, load_tokenizer
from ragkv.errors import NotAModelError
from ragkv.presets import PRESETS, Preset
from ragkv.selfcheck import find_fault

CPU = torch.device("cpu")
# Parameters as the model cards count them, in millions.
KNOWN = {
    "llama-3.1-8b": 8030,
    "llama-3.2-1b": 1236,
    "qwen2.5-0.5b": 494,
    "qwen2.5-7b": 7616,
    "qwen2.5-32b": 32764,
    "qwen3-8b": 8191,
    "mistral-7b": 7248,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    options = presets._options(2, 64, 96, (4, 2), 9000, 512, rope_parameters=presets._rope(1e4))
    monkeypatch.setitem(PRESETS, "tiny", Preset("qwen2", options))


@pytest.mark.parametrize("name", KNOWN)
def test_a_preset_has_as_many_parameters_as_its_model(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PRESETS[name].config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == KNOWN[name]


@pytest.mark.parametrize("name", KNOWN)
def test_its_keys_can_be_moved_and_no_layer_has_a_window(name: str) -> None:
    from ragkv.rope import read_rope

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PRESETS[name].config)
    assert read_rope(model).refusal is None
    assert all(getattr(layer.self_attn, "sliding_window", None) is None for layer in model.model.layers)


def test_the_same_weights_every_time_and_the_self_check_passes(tmp_path: Path) -> None:
    first, again = (
        load_checkpoint("random:tiny", device="cpu", dtype="float32", cache_dir=tmp_path / name) for name in "ab"
    )
    ids = torch.arange(20)[None]
    # The library takes the step that our own attention needs only from us.
    for one in (first, again):
        one.runner.model.set_attn_implementation("eager")
    assert torch.equal(first.runner.model(ids).logits, again.runner.model(ids).logits)
    assert first.model_fingerprint == again.model_fingerprint
    for one in (first, again):
        one.runner.model.set_attn_implementation("ragkv")
    assert find_fault(first.runner) is None


def test_made_in_the_dtype_asked_for_and_never_wider(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    original = torch.Tensor.normal_

    def watched(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.add(tensor.dtype)
        return original(tensor, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "normal_", watched)
    model = presets.random_model("random:tiny", CPU, torch.bfloat16)
    assert seen == {torch.bfloat16} == {p.dtype for p in model.parameters()}
    assert not model.model.layers[0].self_attn.q_proj.bias.any()
    assert (model.model.norm.weight == 1).all()


def test_other_weights_have_another_fingerprint() -> None:
    fingerprints = {
        presets.fingerprint(name, torch.device(device), dtype)
        for name in ("random:tiny", "random:qwen2.5-0.5b")
        for device in ("cpu", "cuda")
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert len(fingerprints) == 8


def test_an_unknown_preset_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(NotAModelError, match=r"random:llama-3\.1-8b, random:llama-3\.2-1b"):
        load_checkpoint("random:gpt-9", device="cpu", dtype="float32", cache_dir=tmp_path)


def test_the_tokenizer_is_the_bundled_one() -> None:
    assert load_tokenizer("random:tiny").fingerprint == load_tokenizer("bundled").fingerprint
