"""Loading a Hugging Face checkpoint: which ones are supported, in what dtype, and what identifies it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as library_logging

from ragkv import attention, presets
from ragkv.errors import ConfigError, NotAModelError, UnsupportedArchitectureError
from ragkv.runner import ModelRunner, use_device
from ragkv.tokenizer import Tokenizer

# Each of these has parity tests against the library's own forward (tests/test_families.py).
SUPPORTED = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")
BUNDLED = "bundled"
BUNDLED_DIR = Path(__file__).parent / "demo" / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
# Second copies of the weights, in other layouts.
HUB_FILES_NOT = ["consolidated*", "original/*", "onnx/*"]


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model and what stored KV must match to be its own.

    ``model_fingerprint`` covers the configuration and the weights' content, ``tokenizer.fingerprint`` the
    vocabulary, so that a retrained or edited checkpoint never reads another one's entries.
    """

    name: str
    runner: ModelRunner
    tokenizer: Tokenizer
    model_fingerprint: str


def load_checkpoint(name: str, *, device: str = "auto", dtype: str = "auto", cache_dir: Path) -> Checkpoint:
    """Load ``name``: ``bundled``, a folder, a hub id, or ``random:<preset>`` (:mod:`ragkv.presets`).

    Weights are read from safetensors only, and no code of the checkpoint is run. A CUDA device becomes that of the
    calling thread.

    Raises:
        NotAModelError: nothing loadable there.
        UnsupportedArchitectureError: a model type without parity tests.
        ConfigError: a device that is not there.
    """
    library_logging.disable_progress_bar()
    where = find_device(device)
    use_device(where)
    if presets.is_random(name):
        return _random(name, where, _dtype(dtype, where))
    folder = _resolve(name)
    config = _read_config(name, folder)
    tokenizer = _load_tokenizer(name, folder)
    model = _load_model(name, folder, config, _dtype(dtype, where))
    runner = ModelRunner(model.to(where))
    if tokenizer.vocab_size > runner.vocab_size:
        raise NotAModelError(
            f"the tokenizer of {name!r} has {tokenizer.vocab_size} tokens, the model only {runner.vocab_size}: they do "
            "not belong together",
            model=name,
        )
    fingerprint = _fingerprint(folder, config, cache_dir / "fingerprints.json")
    return Checkpoint(name, runner, tokenizer, fingerprint)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of checkpoint ``name`` alone. Raises NotAModelError."""
    return _load_tokenizer(name, BUNDLED_DIR if presets.is_random(name) else _resolve(name))


def _random(name: str, device: torch.device, dtype: torch.dtype) -> Checkpoint:
    """Every preset's vocabulary is larger than the bundled tokenizer's."""
    runner = ModelRunner(presets.random_model(name, device, dtype))
    return Checkpoint(name, runner, load_tokenizer(name), presets.fingerprint(name, device, dtype))


def _load_tokenizer(name: str, folder: Path) -> Tokenizer:
    # Without any of these the library makes up an empty vocabulary and says nothing.
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise NotAModelError(f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES)})", model=name)
    return Tokenizer.load(folder)


def _load_model(name: str, folder: Path, config: Any, dtype: torch.dtype) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=attention.NAME,
            output_loading_info=True,
        )
    except Exception as error:  # the library raises whatever it trips over in a broken checkpoint
        raise NotAModelError(
            f"the checkpoint {name!r} could not be loaded: {error}; download it again", model=name
        ) from error
    if missing := sorted(report["missing_keys"]):
        # The library fills them with random numbers and goes on.
        raise NotAModelError(
            f"the checkpoint {name!r} lacks {len(missing)} of its weights, {missing[0]!r} first; download it again",
            model=name,
        )
    return model


def _resolve(name: str) -> Path:
    if name == BUNDLED:
        return BUNDLED_DIR
    try:
        folder = Path(name).expanduser()
        is_folder, is_there = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError) as error:
        raise NotAModelError(f"{name!r} is not a model: {error}", model=name) from error
    if is_folder:
        return folder
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local or is_there:
        raise NotAModelError(
            f"{name!r} is not a model: give a folder with config.json and *.safetensors, a hub id "
            f"(owner/name), {BUNDLED!r}, or {presets.PREFIX}<preset>",
            model=name,
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_NOT))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise NotAModelError(
            f"{name!r} is neither a folder here nor a model the hub gave us: {' '.join(str(error).split())}", model=name
        ) from error


def _read_config(name: str, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise NotAModelError(f"{folder} holds no config.json, so it is not a Hugging Face checkpoint", model=name)
    try:
        declared = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = declared["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotAModelError(f"{folder / 'config.json'} names no model_type: {error}", model=name) from error
    if kind not in SUPPORTED:
        raise UnsupportedArchitectureError(
            f"{name!r} is a {kind!r} model; ragkv runs {', '.join(SUPPORTED)}", model=name, architecture=kind
        )
    if not list(folder.glob("*.safetensors")):
        raise NotAModelError(
            f"{folder} holds no *.safetensors; convert the weights (pickled checkpoints are not loaded)",
            model=name,
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as in _load_model
        raise NotAModelError(f"{folder / 'config.json'} cannot be used: {error}", model=name) from error


def find_device(wanted: str) -> torch.device:
    """The device that the setting ``device`` means here.

    Raises:
        ConfigError: it is not there, or no device at all.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"setting 'device': {wanted!r} is not one of auto, cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"setting 'device': {wanted!r} is not one of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"setting 'device': {wanted!r} is not here ({torch.cuda.device_count()} CUDA devices); use cpu or auto"
        )
    return device


def _dtype(wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    fast_bf16 = device.type == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if fast_bf16 else torch.float32


def _fingerprint(folder: Path, config: Any, cache: Path) -> str:
    """blake3 over configuration and weights; the weights' part is remembered by path, size and mtime."""
    facts = config.to_dict()
    # Where it lies and which library reads it says nothing of the model: a copy or an update keeps its entries.
    for name in ("_name_or_path", "transformers_version"):
        facts.pop(name, None)
    digest = blake3(json.dumps(facts, sort_keys=True, default=str).encode())
    known = _read_cache(cache)
    for path in sorted(folder.glob("*.safetensors")):
        stat = path.stat()
        stamp = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if stamp not in known:
            known[stamp] = blake3(max_threads=blake3.AUTO).update_mmap(str(path)).hexdigest()
            _write_cache(cache, known)
        digest.update(known[stamp].encode())
    return digest.hexdigest(16)


def _read_cache(path: Path) -> dict[str, str]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in data.items()} if isinstance(data, dict) else {}


def _write_cache(path: Path, known: dict[str, str]) -> None:
    # Only a shortcut: a folder that cannot be written costs a second hash next time, nothing else.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(known), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return
