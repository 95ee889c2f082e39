"""Rooms and sizes of graphs, without a device: a graph launches again what it saw launched (tests/gpu: real ones)."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ragkv import fused_graphs
from ragkv.attention import AttentionStep
from ragkv.fused_graphs import MOST_ROWS, LayerGraphs, sizes_that_pay
from ragkv.kernels import twins
from ragkv.rows import Joined
from ragkv.runner import ModelRunner
from tests.families import make_model

ALL = list(range(32, MOST_ROWS + 1, 32))
CPU = torch.device("cpu")


def test_every_size_that_takes_less_than_the_next():
    assert sizes_that_pay(float) == ALL


def test_a_size_that_takes_longer_than_a_greater_one_is_left_out():
    ms = {size: float(size) for size in ALL} | {448: 600.0, 480: 511.0}
    assert sizes_that_pay(ms.__getitem__) == [size for size in ALL if size not in (448, 480)]


def test_where_all_take_the_same_there_is_one():
    assert sizes_that_pay(lambda size: 1.0) == [MOST_ROWS]


@pytest.fixture
def runner():
    return ModelRunner(make_model("llama", options={"max_position_embeddings": 4096}))


@pytest.fixture
def graphs(monkeypatch, runner):
    """Over a model's plain layers, whose rows are written in place as the fused ones are. ``launched`` has the rows of
    every launch that was not a replay."""
    launched = []

    def run(layer, rows):
        launched.append(rows.step.rows)
        step = AttentionStep(rows.step.kv, rows.step.slots, rows.step.length, contiguous=False)  # masks are kept by it
        moved = replace(rows, step=step)
        runner.run_layer(layer, moved)
        rows.hidden.copy_(moved.hidden)

    def captured(launch, pool):
        launch()
        return SimpleNamespace(replay=launch), None

    class Mark:
        def __init__(self, **_): ...
        def record(self): ...
        def synchronize(self): ...
        def elapsed_time(self, other):
            return float(launched[-1])

    monkeypatch.setattr(fused_graphs, "capturing", lambda device: nullcontext())
    monkeypatch.setattr(fused_graphs, "captured", captured)
    monkeypatch.setattr(fused_graphs, "MOST_ROWS", 128)
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=1 << 28))
    graphs = LayerGraphs(runner.shape, 1000, CPU, run)
    graphs.launched = launched
    return graphs


def rows_of(runner, kv, count, length):
    """So many rows of a prompt, the last one last."""
    positions = torch.linspace(length - 1 if count == 1 else 0, length - 1, count).long()
    step = AttentionStep(kv, positions, length, contiguous=count == length, last_only=True)
    return runner.rows(positions % 50 + 3, step)


def entered(graphs, rows):
    room = graphs.taking(rows.step, rows.hidden, rows.rotary[0])
    if room is not None:
        room.enter(rows)
    return room


def fill(kv, length, seed):
    stored = torch.randn(kv.slots(0, length).shape, generator=torch.Generator().manual_seed(seed))
    kv.slots(0, length).copy_(stored)


@torch.inference_mode()
def test_rows_come_to_the_same_whatever_the_size_of_their_graph(runner, graphs):
    for seed, (count, length) in enumerate([(1, 300), (31, 31), (32, 200), (33, 200), (128, 128), (100, 500), (7, 9)]):
        kv, own = graphs.lease(length), runner.new_kv(length)
        fill(kv, length, seed)
        fill(own, length, seed)
        rows, plain = rows_of(runner, kv, count, length), rows_of(runner, own, count, length)
        room = entered(graphs, rows)
        graphs.launched.clear()
        for layer in range(runner.shape.layers):
            room.replay(layer)
            runner.run_layer(layer, plain)
        assert set(graphs.launched) == {-(-count // 32) * 32}
        torch.testing.assert_close(rows.hidden, plain.hidden, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kv.slots(0, length), own.slots(0, length), rtol=1e-4, atol=1e-4)
        del kv, rows, room


def started(runner, graphs, kv, count, length):
    """As :func:`rows_of`, where their graphs are."""
    rows = rows_of(runner, kv, count, length)
    room = graphs.taking(rows.step, rows.hidden, rows.rotary[0])
    (cos, sin), weight = room.rows.rotary, runner.decoder.embed_tokens.weight
    places, prompt = rows.step.positions, torch.arange(length) % 50 + 3
    table = runner._rotary_table(weight, length)
    twins.start_rows(prompt, places, weight, table, room.rows.hidden[0], (cos[0], sin[0]), room.rows.step.slots)
    return room.taken(rows.step)


@pytest.mark.parametrize("count", [1, 40, 64])
@torch.inference_mode()
def test_rows_that_started_in_a_graph_go_on_beside_others_and_come_back(runner, graphs, count):
    kv, own = graphs.lease(200), runner.new_kv(200)
    for each in (kv, own):
        fill(each, 200, 1)
    rows, plain = started(runner, graphs, kv, count, 200), rows_of(runner, own, count, 200)
    rows.room.replay(0)
    joined = Joined([rows_of(runner, runner.new_kv(50), 50, 50), rows])
    for layer in (1, 2):
        runner.run_together(layer, joined)
    assert rows.room is None
    room = entered(graphs, rows)
    for layer in range(3, runner.shape.layers):
        room.replay(layer)
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, plain)
    torch.testing.assert_close(rows.hidden, plain.hidden, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(kv.slots(0, 200), own.slots(0, 200), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_what_is_timed_and_captured_for_one_prompt_leaves_its_kv_alone(runner, graphs):
    kv = graphs.lease(60)
    fill(kv, 60, 1)
    before = kv.slots(0, 60).clone()
    entered(graphs, rows_of(runner, kv, 40, 60))
    assert torch.equal(kv.slots(0, 60), before)


@torch.inference_mode()
def test_who_graphs_are_not_for_is_sent_away(runner, graphs):
    kv = graphs.lease(300)
    assert graphs.lease(10) is None
    assert entered(graphs, rows_of(runner, runner.new_kv(300), 40, 300)) is None  # another's KV
    assert entered(graphs, rows_of(runner, kv, 129, 300)) is None
    rows = rows_of(runner, kv, 40, 300)
    rows.step.score_rows = 1
    assert entered(graphs, rows) is None
    del kv, rows
    assert graphs.lease(10) is not None


@torch.inference_mode()
def test_all_are_captured_while_nobody_has_the_workspace(runner, graphs):
    assert list(graphs.capture_all()) == []  # nobody knows yet which
    kv = graphs.lease(60)
    rows = rows_of(runner, kv, 40, 60)
    entered(graphs, rows)
    before = rows.hidden.clone()
    assert list(graphs.capture_all()) == []
    assert torch.equal(rows.hidden, before)
    del kv, rows
    capturing = graphs.capture_all()
    next(capturing)
    assert graphs.lease(60) is not None
    assert len(list(capturing)) == 1  # 32 and 96 rows; 64 and 128 were there
    graphs.launched.clear()
    kv = graphs.lease(90)
    entered(graphs, rows_of(runner, kv, 90, 90))
    assert graphs.launched == []


@torch.inference_mode()
def test_without_memory_for_its_graphs_the_next_greater_ones_take_rows(monkeypatch, runner, graphs, caplog):
    kv = graphs.lease(200)
    entered(graphs, rows_of(runner, kv, 100, 200))
    monkeypatch.setattr(fused_graphs, "captured", lambda launch, pool: nothing_left())
    for _ in range(2):
        graphs.launched.clear()
        entered(graphs, rows_of(runner, kv, 40, 200)).replay(0)
        assert graphs.launched[-1] == 128
    assert caplog.text.count("nothing is left") == 2  # for 64 and 96 rows, once each


def nothing_left():
    raise torch.OutOfMemoryError("nothing is left")
