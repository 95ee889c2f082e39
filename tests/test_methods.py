"""What methods depend on, and what they run before their main pass: the same to who runs them, loads for them and
predicts what they take."""

from __future__ import annotations

import pytest
import torch

from ragkv.costs import Piece, Work, passes
from ragkv.methods import outline, parameters
from ragkv.prelude import lookahead_positions
from ragkv.runner import ModelRunner
from ragkv.selection import STRATEGIES
from tests.blend_kit import Desk
from tests.engine_kit import DOCUMENTS
from tests.families import make_model

LAYERS = 12


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    desk.runner = ModelRunner(make_model("llama", options={"num_hidden_layers": LAYERS}))
    desk.geometry = desk.runner.shape.geometry
    yield desk
    desk.store.close()


@pytest.fixture
def ran(desk, monkeypatch):
    """Every layer that is run, and over how many rows."""
    calls, run_layer = [], desk.runner.run_layer

    def watched(layer, rows):
        calls.append((layer, rows.step.rows))
        run_layer(layer, rows)

    monkeypatch.setattr(desk.runner, "run_layer", watched)
    return calls


def prompt(desk):
    """Two chunks that may be repaired and one that may not, and the work they are to the cost model."""
    one, two = desk.document("d", 20, 13)
    _, kept = desk.document("e", 5, 11)
    plan = desk.plan(one, two, kept)
    pieces = [Piece(span.length, span.start, 100, "ssd", span.context_present) for span in plan.spans]
    assert [piece.repairable for piece in pieces] == [True, True, False]
    return (one, two, kept), plan, pieces


@pytest.mark.parametrize("ratio", [0.0, 1 / 3])
@pytest.mark.parametrize("check_layer", [1, 3, 99])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_run_is_what_is_predicted(desk, ran, strategy, ratio, check_layer):
    chunks, plan, pieces = prompt(desk)
    desk.runner.check_layer = check_layer
    desk.put(*chunks)
    ran.clear()
    desk.run(plan, strategy, ratio)
    work = Work(len(plan.ids), tuple(pieces), strategy, ratio, len(lookahead_positions(plan)), check_layer)
    expected = [
        (layer, round(one.rows))
        for one in passes(work, pieces, LAYERS)
        if one.rows  # what is scored by the keys of a layer runs none
        for layer in range(one.first, one.end)
    ]
    assert ran == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_layers_come_in_the_order_in_which_they_are_needed(desk, monkeypatch, strategy):
    """None waits for one that is needed later."""
    chunks, plan, _ = prompt(desk)
    desk.put(*chunks)
    wanted = []

    def watch(blend):
        ensure = blend.loader.ensure
        blend.loader.ensure = lambda layer: (wanted.append(layer), ensure(layer))
        return run(blend)

    run = STRATEGIES[strategy]
    monkeypatch.setitem(STRATEGIES, strategy, watch)
    desk.run(plan, strategy, 1 / 3)
    assert list(dict.fromkeys(wanted)) == outline(strategy, LAYERS).loading_order(LAYERS)


def test_a_method_depends_on_its_parameters_alone(desk):
    """Others than ``hkvd`` do not care where it would compare values, and those without a ratio not for one."""
    chunks, plan, _ = prompt(desk)
    desk.put(*chunks)

    def answers(strategy):
        for desk.runner.check_layer, ratio in ((1, 0.2), (5, 0.2), (1, 0.8)):
            yield desk.run(plan, strategy, ratio).logits

    for strategy in (*STRATEGIES, "full"):
        first, other_layer, other_ratio = answers(strategy)
        assert torch.equal(first, other_layer) == ("check_layer" not in parameters(strategy))
        assert torch.equal(first, other_ratio) == ("ratio" not in parameters(strategy))


def test_hkvd_compares_values_of_the_check_layer(desk):
    """A spoilt value there draws it; what is spoilt before or behind that layer does not."""
    [chunk] = desk.document("d", 20)
    encoded = desk.encode(chunk)
    for layer, token in ((2, 4), (3, 7), (4, 11)):
        encoded.slabs[layer].view("float32").reshape(2, 20, -1)[1, token] += 5.0
    desk.store.put(chunk.tokens.key, desk.geometry, encoded.slabs, tokens=20, model="m")
    for desk.runner.check_layer, token in ((2, 4), (3, 7), (4, 11)):
        plan = desk.plan(chunk)
        repaired = desk.kv(desk.run(plan, "hkvd", 0.05), plan.spans[0])
        stored = desk.kv(desk.run(plan, "none"), plan.spans[0])
        changed = (repaired != stored)[-1].flatten(2).any(dim=2).any(dim=0)
        assert changed.nonzero().flatten().tolist() == [token]


def test_the_setting_is_the_layer_at_which_values_are_compared(make_engine):
    engine = make_engine(check_layer=3, controller="off")
    engine.ingest("c", DOCUMENTS[:1])
    answer = engine.query("Where did Ada move in 1903?", collection="c", top_k=50, method="hkvd", ratio=0.1)
    kept = round(0.1 * answer.usage.context_tokens)
    layers = 4 * answer.usage.context_tokens
    assert answer.recomputed_share == (3 * answer.usage.context_tokens + kept) / layers


@pytest.mark.parametrize(("layers", "searched"), [(1, (0,)), (4, (2,)), (12, (6, 7, 8)), (32, (18, 19, 20, 21))])
def test_at_most_four_layers_of_the_third_quarter_are_searched(layers, searched):
    found = outline("links", layers)
    assert (found.searched, found.ahead) == (searched, searched[-1] + 1)
    assert sorted(found.loading_order(layers)) == list(range(layers))


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_method_needs_layers_that_there_are_not(strategy, layers):
    found = outline(strategy, layers)
    assert {*found.searched, *found.asked} <= set(range(layers))
    assert found.dense < layers
