"""Folders that are checkpoints, folders that are not, and what tells one checkpoint from another."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ragkv import attention
from ragkv.checkpoint import SUPPORTED, load_checkpoint
from ragkv.errors import ConfigError, NotAModelError, UnsupportedArchitectureError
from tests.conftest import save_checkpoint


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    """A whole checkpoint of its own, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "model")


@pytest.fixture
def load(tmp_path):
    def load(name, **options):
        return load_checkpoint(
            str(name), **{"device": "cpu", "dtype": "float32", "cache_dir": tmp_path / "cache", **options}
        )

    return load


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_folder_is_loaded(load, folder):
    checkpoint = load(folder)
    assert checkpoint.name == str(folder)
    assert checkpoint.runner.shape.dtype == torch.float32
    assert checkpoint.runner.device.type == "cpu"
    assert checkpoint.runner.config._attn_implementation == attention.NAME
    assert not checkpoint.runner.model.training
    assert checkpoint.tokenizer.plain("Hello there")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SUPPORTED)
def test_every_supported_family_is_loaded_whole(load, tmp_path, family, tied):
    """Tied output weights are not in the file, and not missing."""
    path = save_checkpoint(tmp_path / family, family, vocab_size=8192, tie_word_embeddings=tied)
    runner = load(path).runner
    ids = torch.tensor([5, 6, 7])
    with torch.inference_mode():
        assert torch.isfinite(runner.logits(runner.prefill(ids, runner.new_kv(3)))).all()


@pytest.mark.parametrize("name", ["", "nothing/here/at-all", "./nothing", "/no/such/folder", "no-such-model"])
def test_a_path_that_is_nothing(load, name):
    with pytest.raises(NotAModelError) as caught:
        load(name)
    assert "model" in caught.value.context


@pytest.mark.parametrize("name", ["~no-such-user/model", "x" * 5000, "a\0b"])
def test_a_name_that_is_no_path(load, name):
    with pytest.raises(NotAModelError):
        load(name)


def test_a_file_is_not_a_model(load, tmp_path):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_text("x")
    with pytest.raises(NotAModelError, match="is not a model"):
        load("owner/model")


@pytest.mark.parametrize("name", ["owner/name", "owner/na:me"])
def test_a_hub_id_that_cannot_be_had_offline(load, name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(NotAModelError, match=name) as caught:
        load(name)
    assert "\n" not in caught.value.message


def test_an_empty_folder(load, tmp_path):
    with pytest.raises(NotAModelError, match=r"no config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"{}", b'{"model_type"', b"\xff\xfe\x00"])
def test_a_config_that_is_no_config(load, folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(NotAModelError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": 6},
        {"num_attention_heads": 0},
        {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"hidden_size": 32},
        {"vocab_size": 300},
    ],
)
@pytest.mark.filterwarnings("ignore")  # the library says more about some of these
def test_a_config_that_cannot_be_or_does_not_fit_the_weights(load, folder, changes):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(NotAModelError):
        load(folder)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "", None, ["llama"], "no-such-type"])
def test_an_architecture_without_parity_tests(load, folder, kind):
    edit_json(folder / "config.json", model_type=kind)
    with pytest.raises(UnsupportedArchitectureError, match="qwen3") as caught:
        load(folder)
    assert caught.value.context["architecture"] == kind


def test_a_folder_without_weights(load, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(NotAModelError, match="safetensors"):
        load(folder)


def test_pickled_weights_are_never_opened(load, folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(NotAModelError, match="pickled"):
        load(folder)
    assert not (folder.parent / "pwned").exists()


def test_code_in_a_checkpoint_is_not_run(load, folder):
    (folder / "evil.py").write_text("open('pwned', 'w')\nclass Config: pass\nclass Model: pass\n")
    edit_json(folder / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Model", None]})
    load(folder)
    assert not (folder.parent / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 4000, None])
def test_damaged_weights(load, folder, content):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000] if content is None else content)
    with pytest.raises(NotAModelError, match="could not be loaded"):
        load(folder)


@pytest.mark.filterwarnings("ignore")
def test_a_missing_weight_is_not_made_up(load, folder):
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(NotAModelError, match=r"layers\.1\.self_attn\.q_proj"):
        load(folder)


def test_a_missing_shard(load, folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = list(load_file(folder / "model-00001-of-00002.safetensors"))
    files = [f"model-0000{1 + (i == 0)}-of-00002.safetensors" for i in range(len(names))]
    index = {"metadata": {}, "weight_map": dict(zip(names, files, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(NotAModelError, match="00002-of-00002"):
        load(folder)


@pytest.mark.parametrize("gone", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
def test_a_missing_tokenizer(load, folder, gone):
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(NotAModelError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("content", ["", "not json", "{}", "[]"])
def test_a_damaged_tokenizer(load, folder, content):
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(NotAModelError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize("device", ["gpu", "", "mps", "meta", "cuda:x", "tpu:0"])
def test_an_unknown_device(load, folder, device):
    with pytest.raises(ConfigError, match="auto, cpu, cuda"):
        load(folder, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_here(load, folder, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="use cpu or auto"):
        load(folder, device=device)


def test_auto_device_without_cuda(load, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load(folder, device="auto").runner.device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(load, folder, dtype):
    runner = load(folder, dtype=dtype).runner
    assert runner.shape.dtype == getattr(torch, dtype)
    assert {parameter.dtype for parameter in runner.model.parameters()} == {runner.shape.dtype}


@pytest.mark.parametrize("fast", [True, False])
def test_auto_dtype_follows_the_hardware(load, folder, fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert load(folder, dtype="auto").runner.shape.dtype == (torch.bfloat16 if fast else torch.float32)


# Fingerprints


def test_the_fingerprint_follows_the_content_not_the_place(load, folder, tmp_path):
    here = load(folder).model_fingerprint
    copied = load(shutil.copytree(folder, tmp_path / "copy")).model_fingerprint
    (tmp_path / "link").symlink_to(folder)
    assert here == copied == load(tmp_path / "link").model_fingerprint == load(f"{folder}/").model_fingerprint
    assert load(folder, dtype="bfloat16").model_fingerprint == here  # dtype is a field of its own in every key


def test_one_changed_weight_changes_the_fingerprint(load, folder):
    before = load(folder).model_fingerprint

    def nudge(weights):
        weights["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-3

    edit_weights(folder, nudge)
    assert load(folder).model_fingerprint != before


@pytest.mark.parametrize(
    "changes", [{"rms_norm_eps": 1e-3}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}]
)
def test_a_changed_configuration_changes_the_fingerprint(load, folder, changes):
    before = load(folder).model_fingerprint
    edit_json(folder / "config.json", **changes)
    assert load(folder).model_fingerprint != before


def test_a_library_update_does_not_change_the_fingerprint(load, folder):
    before = load(folder).model_fingerprint
    edit_json(folder / "config.json", transformers_version="5.99.0")
    assert load(folder).model_fingerprint == before


def test_weights_are_hashed_once_per_size_and_time(load, folder, tmp_path):
    """Behind an unchanged size and time a change goes unseen (that is the price), a new time shows it."""
    before = load(folder).model_fingerprint
    path = folder / "model.safetensors"
    stat = path.stat()

    def negate(weights):
        weights["model.norm.weight"] *= -1

    edit_weights(folder, negate)
    assert path.stat().st_size == stat.st_size
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load(folder).model_fingerprint == before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load(folder).model_fingerprint != before
    assert load(folder, cache_dir=tmp_path / "other").model_fingerprint != before


@pytest.mark.parametrize("content", ["", "not json", "[]", "7"])
def test_a_damaged_cache_costs_a_hash(load, folder, tmp_path, content):
    before = load(folder).model_fingerprint
    [cache] = (tmp_path / "cache").iterdir()
    cache.write_text(content)
    assert load(folder).model_fingerprint == before


def test_a_cache_that_cannot_be_written_costs_nothing_else(load, folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert load(folder, cache_dir=tmp_path / "file" / "cache").model_fingerprint == load(folder).model_fingerprint
