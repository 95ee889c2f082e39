"""Uploads that pass whatever the copy engine is doing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from ragkv import uploading
from ragkv.kernels.weigh import weigh
from ragkv.uploading import copy_each, copy_over, handed, uploaded, uploaded_together

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def numbers(size, dtype, generator):
    if dtype == torch.bool:
        return torch.rand(size, generator=generator) < 0.5
    return (1000 * torch.rand(size, generator=generator)).to(dtype)


def test_what_arrives_is_what_was_sent_however_late_the_device_reads_it():
    """Several times round the memory that uploads share, on two streams that are busy meanwhile."""
    generator = torch.Generator().manual_seed(0)
    streams = [torch.cuda.current_stream(), torch.cuda.Stream()]
    product = torch.randn((2048, 2048), device=DEVICE)
    sent, arrived = [], []
    for turn in range(120):
        dtype = (torch.bool, torch.int64, torch.float32, torch.bfloat16)[turn % 4]
        tensor = numbers((turn + 1, 2000), dtype, generator)
        with torch.cuda.stream(streams[turn % 2]):
            product @ product
            arrived.append(uploaded(tensor, DEVICE))
        sent.append(tensor.clone())
        tensor.zero_()
    torch.cuda.synchronize()
    assert sum(tensor.nbytes for tensor in sent) > 4 * uploading._HALF
    for one, other in zip(sent, arrived, strict=True):
        assert other.is_cuda
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (uploading._HALF // 8 + 1,)])
def test_nothing_and_much(shape):
    tensor = torch.full(shape, 7, dtype=torch.int64)
    assert torch.equal(uploaded(tensor, DEVICE).cpu(), tensor)
    assert uploaded(tensor, DEVICE).shape == tensor.shape


def test_several_at_once_arrive_as_they_are():
    generator = torch.Generator().manual_seed(0)
    sizes = [(7, torch.int64), (3, torch.bool), (0, torch.float32), (65, torch.bool), (9, torch.float32)]
    sent = [numbers((size,), dtype, generator) for size, dtype in sizes]
    arrived = uploaded_together([*sent, sent[0].view(7, 1)], DEVICE)
    for one, other in zip([*sent, sent[0].view(7, 1)], arrived, strict=True):
        assert other.is_cuda
        assert other.dtype == one.dtype
        assert torch.equal(one, other.cpu())


@pytest.mark.parametrize("many", [False, True])
def test_another_stream_finds_what_came_on_it(many):
    """And need not wait for the current one, where it is little."""
    sent = [torch.arange(n, dtype=torch.int64) for n in ((70, uploading._HALF) if many else (70, 3))]
    product, other = torch.randn((4096, 4096), device=DEVICE), torch.cuda.Stream()
    torch.stack([uploaded(tensor, DEVICE).sum() for tensor in sent])  # loads what is run below
    product @ product
    torch.cuda.synchronize()
    for _ in range(50):
        product @ product
    arrived = uploaded_together(sent, DEVICE, other)
    with torch.cuda.stream(other):
        sums = torch.stack([tensor.sum() for tensor in arrived])
    other.synchronize()
    assert torch.cuda.current_stream().query() == many
    assert sums.tolist() == [int(tensor.sum()) for tensor in sent]


def test_what_is_handed_stays_until_it_is_read():
    """Several times round the memory that all share, on two streams that are busy meanwhile."""
    generator = torch.Generator().manual_seed(0)
    streams, zeros = [torch.cuda.current_stream(), torch.cuda.Stream()], torch.zeros(300_000, device=DEVICE)
    product = torch.randn((2048, 2048), device=DEVICE)
    sent, seen = [], []
    torch.cuda.synchronize()
    for turn in range(40):
        tensor = torch.rand(300_000, generator=generator)
        with torch.cuda.stream(streams[turn % 2]):
            product @ product
            with handed(tensor, DEVICE) as there:
                seen.append(weigh(zeros + 1, there))
        sent.append(tensor.clone())
        tensor.zero_()
    torch.cuda.synchronize()
    assert sum(tensor.nbytes for tensor in sent) > 4 * uploading._HALF
    assert all(torch.equal(one, other.cpu()) for one, other in zip(sent, seen, strict=True))


@pytest.mark.parametrize("size", [1, 7, 100_000, uploading._HALF // 4 + 1])
def test_what_is_handed_is_read_where_it_is(size):
    generator = torch.Generator().manual_seed(size)
    zeros = torch.zeros(size, device=DEVICE)
    for _ in range(4):
        tensor = torch.randn(size, generator=generator)
        with handed(tensor, DEVICE) as there:
            assert there.is_cuda == (tensor.nbytes > uploading._HALF)
            seen = weigh(zeros + 1, there)
        expected = tensor.masked_fill(tensor < 0, float("-inf"))
        tensor.zero_()
        assert torch.equal(seen.cpu(), expected)


def test_an_upload_does_not_wait_for_what_is_copied_over():
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=DEVICE)
    copying = torch.cuda.Stream()
    uploaded(torch.ones(3), DEVICE)
    torch.cuda.synchronize()
    each = (np.full(4, value, np.int64) for value in (target.data_ptr(), source.data_ptr(), source.nbytes))
    copy_over(*each, copying)
    small = uploaded(torch.ones(3), DEVICE)
    assert small.tolist() == [1.0] * 3
    assert not copying.query()  # 4 GB take a good while
    torch.cuda.synchronize()


@pytest.mark.parametrize("copy", [copy_over, copy_each])
def test_what_is_copied_over_lies_where_it_was_to_lie(copy):
    source = torch.randint(0, 255, (1 << 20,), dtype=torch.uint8).pin_memory()
    target = torch.zeros_like(source, device=DEVICE)
    places = [(0, 64, 100), (4096, 0, 64), (70000, 30000, 500000)]  # to, from, bytes
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    to, at, nbytes = np.array(places, np.int64).T
    copy(to + target.data_ptr(), at + source.data_ptr(), nbytes, stream)
    stream.synchronize()
    expected = torch.zeros_like(source)
    for to, at, nbytes in places:
        expected[to : to + nbytes] = source[at : at + nbytes]
    assert torch.equal(target.cpu(), expected)


@pytest.mark.parametrize("copy", [copy_over, copy_each])
def test_a_copy_that_cannot_be_is_an_error(copy):
    with pytest.raises(RuntimeError, match="CUDA error"):
        copy(*np.array([[0], [0], [64]], np.int64), torch.cuda.Stream())
