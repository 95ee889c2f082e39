"""The core on a CUDA device: the same parities as on the CPU, and the pinned loading path."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from ragkv.chunks import ChunkTokens
from ragkv.engine import Engine
from ragkv.kv import KvShape
from ragkv.loading import LayerLoader
from ragkv.pinned import PageLocking
from ragkv.plan import PlannedChunk, Span
from ragkv.retrievers import Chunk
from ragkv.runner import ModelRunner
from ragkv.selfcheck import find_fault
from ragkv.store import CODECS
from ragkv.unpacking import Unpacker
from tests.codec_kit import decoded, encoded, random_kv
from tests.engine_kit import wait_idle
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
    wait_idle(engine)
    again = engine.query("Where does person 3 live?", documents=DOCUMENTS, method=method, ratio=1.0)
    assert {chunk.kv for chunk in again.sources} == {"ssd"}
    assert again.recomputed_share == 1.0
    assert again.text == full.text


def test_reuse_without_repair_loads_every_layer(engine):
    engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none")
    wait_idle(engine)
    answers = [engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none") for _ in range(3)]
    assert answers[0].recomputed_share == 0.0
    assert len({answer.text for answer in answers}) == 1


@pytest.mark.parametrize("lengths", [[1], [500], [7, 1, 300, 64]])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_unpacking_on_the_device_equals_the_stores_own_decoding(codec, dtype, lengths):
    """Bit for bit: a product in float32, rounded once, is the same everywhere."""
    shape = KvShape(1, 3, 40, dtype)
    slabs = [encoded(random_kv(shape, n, seed=i), codec) for i, n in enumerate(lengths)]
    unpacker = Unpacker(codec, shape, lengths, torch.device("cuda"))
    stage = torch.empty(unpacker.nbytes, dtype=torch.uint8)
    for slab, pieces in zip(slabs, unpacker.pieces, strict=True):
        for to, source in pieces:
            stage[to] = torch.from_numpy(slab[source])
    got = torch.stack(unpacker.unpack(stage.cuda())).cpu()
    plain = [decoded(slab, shape, n, codec) for slab, n in zip(slabs, lengths, strict=True)]
    assert got.dtype == dtype
    assert torch.equal(got, torch.cat(plain, dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("codec", CODECS)
def test_layers_land_as_on_a_cpu(codec, dtype):
    chunk = PlannedChunk(Chunk("c", "d", 0, ""), 1, 1.0, ChunkTokens((), (), 0, "alone", b"key", codec))
    places = [Span(chunk, 3, 40, True), Span(chunk, 40, 41, True), Span(chunk, 60, 200, True)]
    devices = ("cpu", "cuda")
    runners = {device: ModelRunner(make_model("llama").to(device, dtype)) for device in devices}
    shape = runners["cpu"].shape
    layers = [
        [encoded(random_kv(shape, s.length, seed=10 * i + s.start), codec) for s in places] for i in range(shape.layers)
    ]
    landed = {}
    for device in devices:
        kv = runners[device].new_kv(200)
        for layer in range(shape.layers):
            for part in kv.read(layer, 200):
                part.zero_()
        with closing(LayerLoader(runners[device], kv, places, iter(layers), codec)) as loader:
            loader.ensure(shape.layers - 1)
        landed[device] = [torch.stack(kv.read(layer, 200)).cpu() for layer in range(shape.layers)]
    tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
    for cpu, cuda in zip(landed["cpu"], landed["cuda"], strict=True):
        assert torch.equal(cuda[1], cpu[1])
        torch.testing.assert_close(cuda[0], cpu[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("codec", ["int8", "fp8"])
def test_coded_entries_are_reused_and_repaired(tiny_checkpoint, tmp_path, codec):
    settings = {"model": str(tiny_checkpoint), "device": "cuda", "dtype": "bfloat16", "data_dir": tmp_path / "data"}
    with Engine(**settings, chunk_tokens=32, ram_bytes=0, max_tokens=8, kv_codec=codec) as engine:
        engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none")
        wait_idle(engine)
        reused = [engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none") for _ in range(2)]
        assert {chunk.kv for chunk in reused[0].sources} == {"ssd"}
        assert reused[0].text == reused[1].text
        assert reused[0].recomputed_share == 0.0


@pytest.mark.parametrize("nbytes", [4096, 3 << 20, 10 << 20])
def test_memory_of_the_ram_tier_is_page_locked_and_moves_as_it_is(nbytes):
    allocate = PageLocking(torch.device("cuda"))
    for value in (1, 2, 3):  # memory may come back at the same address
        memory = allocate(nbytes)
        memory[:] = value
        assert torch.from_numpy(memory).is_pinned()
        moved = torch.from_numpy(memory).to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        assert moved.eq(value).all()
        del memory, moved


def test_chunks_in_ram_lie_in_page_locked_memory(tiny_checkpoint, tmp_path):
    settings = {"model": str(tiny_checkpoint), "device": "cuda", "dtype": "float32", "data_dir": tmp_path / "data"}
    with Engine(**settings, chunk_tokens=32, ram_bytes=1 << 26, device_bytes=0, max_tokens=8) as engine:
        engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none")
        wait_idle(engine)
        answers = [engine.query("Where does person 3 live?", documents=DOCUMENTS, method="none") for _ in range(2)]
        assert [{chunk.kv for chunk in answer.sources} for answer in answers] == [{"ssd"}, {"ram"}]
        assert answers[0].text == answers[1].text
        memory = engine._store._ram.buffers.take(1 << 20)
        assert torch.from_numpy(memory).is_pinned()
