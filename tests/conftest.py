"""A tiny random checkpoint with the bundled tokenizer, and engines over it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ragkv.checkpoint import BUNDLED_DIR
from ragkv.engine import Engine
from tests.families import make_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    """No setting of the machine may reach a test, nothing may be written outside tmp_path."""
    import os

    for name in list(os.environ):
        if name.startswith("RAGKV_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("RAGKV_CONTROLLER", "off")  # it chooses by the speed of the machine


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-model")
    return save_checkpoint(folder, "qwen3", vocab_size=8192, max_position_embeddings=2048)


def save_checkpoint(folder: Path, family: str, **options) -> Path:
    model = make_model(family, options=options)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (BUNDLED_DIR / name).exists():
            shutil.copy(BUNDLED_DIR / name, folder / name)
    return folder


@pytest.fixture
def make_engine(tiny_checkpoint, tmp_path):
    """Engines over the tiny model; closed at the end of the test."""
    engines: list[Engine] = []

    def make(**overrides) -> Engine:
        settings = {
            "model": str(tiny_checkpoint),
            "device": "cpu",
            "dtype": "float32",
            "data_dir": tmp_path / "data",
            "chunk_tokens": 32,
            "context_tokens": 64,
            "store_bytes": 2**28,
            "ram_bytes": 2**24,
            "max_tokens": 8,
            **overrides,
        }
        engines.append(Engine(**settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture
def engine(make_engine) -> Engine:
    return make_engine()
