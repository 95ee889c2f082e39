"""The core on a CUDA device: the same parities as on the CPU, and the pinned loading path."""

from __future__ import annotations

import pytest
import torch

from ragkv.engine import Engine
from ragkv.runner import ModelRunner
from ragkv.selfcheck import find_fault
from tests.families import MOVABLE, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DOCUMENTS = [
    {"id": f"d{i}", "text": f"Person {i} lives in town {i} and works for company {i}. " * 12} for i in range(6)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MOVABLE)
def test_self_check_passes(name, dtype):
    assert find_fault(ModelRunner(make_model(name).to("cuda", dtype))) is None


@pytest.fixture
def engine(tiny_checkpoint, tmp_path):
    settings = {"model": str(tiny_checkpoint), "device": "cuda", "dtype": "float32", "data_dir": tmp_path / "data"}
    with Engine(**settings, chunk_tokens=32, ram_bytes=0, max_tokens=8) as engine:
        yield engine


@pytest.mark.parametrize("method", ["question", "epic", "random", "hkvd"])
def test_repairing_every_token_is_full_prefill(engine, method):
    """With document context all chunks of the prompt are repairable, so ratio 1 recomputes everything."""
    full = engine.query("Where does person 3 live?", documents=DOCUMENTS, method="full")
    engine.query("Where does person 3 live?", documents=DOCUMENTS, method=method)  # encodes in the background
    wait_until_encoded(engine)
    again = engine.query("Where does person 3 live?", documents=DOCUMENTS, method=method, ratio=1.0)
    assert {chunk.kv for chunk in again.sources} == {"ssd"}
    assert again.recomputed_share == 1.0
    assert again.text == full.text


def test_reuse_without_repair_loads_every_layer(engine):
    engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none")
    wait_until_encoded(engine)
    answers = [engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none") for _ in range(3)]
    assert answers[0].recomputed_share == 0.0
    assert len({answer.text for answer in answers}) == 1


def wait_until_encoded(engine):
    import time

    deadline = time.monotonic() + 60
    while engine.health().encoding:
        assert time.monotonic() < deadline
        time.sleep(0.01)
