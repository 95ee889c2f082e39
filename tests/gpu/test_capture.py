"""What may happen beside a capture without spoiling it."""

from __future__ import annotations

import gc

import pytest
import torch

from ragkv.capture import captured, capturing

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

DEVICE = torch.device("cuda")


def test_a_graph_that_nobody_has_any_more_spoils_no_other():
    x = torch.zeros(8, device=DEVICE)
    with capturing(DEVICE):
        (x + 1) * 2
        holder = [captured(lambda: (x + 1) * 2)[0]]
        holder.append(holder)
        del holder
        graph, out = captured(lambda: (x + 1, [[] for _ in range(10_000)])[0] * 2)
    assert gc.isenabled()
    x.fill_(3)
    graph.replay()
    assert out.tolist() == [8.0] * 8


def test_nobody_else_is_given_the_stream():
    with capturing(DEVICE):
        own = torch.cuda.current_stream().cuda_stream
    with capturing(DEVICE):
        assert torch.cuda.current_stream().cuda_stream == own
    others = {torch.cuda.Stream().cuda_stream for _ in range(200)}
    assert own not in others | {torch.cuda.current_stream().cuda_stream}


def test_what_goes_wrong_leaves_no_trace():
    x = torch.zeros(8, device=DEVICE)

    def wrong() -> None:
        x.add_(1)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), capturing(DEVICE):
        captured(wrong)
    assert gc.isenabled()
    with capturing(DEVICE):
        graph, _ = captured(lambda: x.add_(1))
    graph.replay()
    assert x.tolist() == [1.0] * 8
