"""Decoding fused, in CUDA graphs, against the plain loop on the same blocks."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from ragkv.decoding import Decoder
from ragkv.kernels import paged, vector
from ragkv.kv import RequestKV
from ragkv.paged import PagedKV
from ragkv.runner import ModelRunner
from tests import fused_kit, kernels_kit
from tests.families import make_model
from tests.paged_kit import PAGED_SHAPES, check_attend_paged, check_loops, check_product
from tests.sync_kit import no_waiting

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("window", [None, 1, 40, 1000])
@pytest.mark.parametrize("splits", [None, 1, 3])
@pytest.mark.parametrize("shape", PAGED_SHAPES, ids=str)
def test_attend_paged(shape, splits, window):
    check_attend_paged(paged, shape, torch.bfloat16, "cuda", splits, window)


@pytest.mark.parametrize("case", ["plain", "normed", "gated", "added", "biased"])
@pytest.mark.parametrize(("width", "outputs"), [(64, 96), (896, 1152), (4096, 6144)])
def test_product(width, outputs, case):
    check_product(vector, width, outputs, case, torch.bfloat16, "cuda")


@pytest.mark.parametrize("name", fused_kit.FUSED)
def test_loops(name):
    check_loops(name, torch.float16, "cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@torch.inference_mode()
def test_a_step_never_waits_for_the_device():
    runner = ModelRunner(make_model("llama").to("cuda", torch.bfloat16))
    pool = PagedKV(runner.shape, 8, runner.device)
    pool.with_spare.normal_()
    decoder = Decoder(runner, pool, lanes=3, max_tokens=48)
    for lane in range(3):
        decoder.enter(lane, 5, 20, [2 * lane, 2 * lane + 1])
    decoder.step([0, 1, 2])  # captures
    with no_waiting():
        for _ in range(5):
            decoder.put_tokens([0, 1, 2], decoder.step([0, 1, 2]).argmax(-1))
        decoder.extend(1, [7])
        decoder.step([2, 1, 0])


def test_there_and_back_on_the_device():
    shape = kernels_kit.KvShape(3, 2, 64, torch.bfloat16)
    device = torch.device("cuda")
    pool, kv, back = PagedKV(shape, 6, device), RequestKV(shape, 37, device), RequestKV(shape, 37, device)
    kv.slots(0, 37).normal_()
    pool.scatter(kv, [5, 1, 2], 0, 37)
    pool.gather([5, 1, 2], back, 37)
    assert torch.equal(back.slots(0, 37), kv.slots(0, 37))
    host = PagedKV(shape, 6, torch.device("cpu"), pinned=True)
    host.data.copy_(pool.data)
    assert host.data.is_pinned()
    assert torch.equal(host.data[1], pool.data[1].cpu())
