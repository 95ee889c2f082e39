"""What a blend recomputes, what it leaves alone, and that it repairs what it recomputes."""

from __future__ import annotations

import pytest
import torch

from ragkv.selection import STRATEGIES
from tests.blend_kit import Desk, close

REPAIRING = sorted(set(STRATEGIES) - {"none"})
LAYERS = 4


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.store.close()


def test_none_recomputes_no_context_token(desk):
    chunks = [desk.document(name, n)[0] for name, n in (("a", 20), ("b", 17))]
    desk.put(*chunks)
    result = desk.run(desk.plan(*chunks), "none", 1.0)
    assert [(o.repaired_tokens, o.token_layers, o.why) for o in result.outcomes] == [(0, 0, None)] * 2


@pytest.mark.parametrize("strategy", ["epic", "random", "question"])
def test_a_selected_token_costs_every_layer(desk, strategy):
    chunks = [desk.document(name, n)[0] for name, n in (("a", 20), ("b", 17))]
    desk.put(*chunks)
    outcomes = desk.run(desk.plan(*chunks), strategy, 0.2).outcomes
    assert sum(o.repaired_tokens for o in outcomes) == round(0.2 * 37)
    assert [o.token_layers for o in outcomes] == [o.repaired_tokens * LAYERS for o in outcomes]


def test_dense_layers_of_hkvd_count(desk):
    """Layer 0 over all repairable tokens, then the selected ones through the other three."""
    free, [later] = desk.document("a", 20), desk.document("b", 9, 17)[1:]
    [missing] = desk.document("c", 5)
    desk.put(*free, later)
    result = desk.run(desk.plan(*free, later, missing), "hkvd", 0.2)
    repairable, protected, computed = result.outcomes
    assert (repairable.repaired_tokens, repairable.token_layers) == (20, 20 + 4 * (LAYERS - 1))
    assert (protected.repaired_tokens, protected.token_layers) == (0, 0)
    assert (computed.repaired_tokens, computed.token_layers) == (5, 5 * LAYERS)


@pytest.mark.parametrize("strategy", REPAIRING)
def test_the_budget_is_a_share_of_what_may_be_repaired(desk, strategy):
    """20 tokens may be repaired, 17 may not, 5 are computed anyway: half of the 20 are selected."""
    free, [later] = desk.document("a", 20), desk.document("b", 9, 17)[1:]
    [missing] = desk.document("c", 5)
    desk.put(*free, later)
    plan = desk.plan(*free, later, missing)
    result, reuse = desk.run(plan, strategy, 0.5), desk.run(plan, "none")
    layers = LAYERS - 1 if strategy == "hkvd" else LAYERS
    selected = (result.outcomes[0].token_layers - (20 if strategy == "hkvd" else 0)) / layers
    assert selected == 10
    assert reuse.outcomes[2].token_layers == result.outcomes[2].token_layers == 20


@pytest.mark.parametrize("family", ["llama", "qwen2-windowed", "smollm3", "llama-llama3"])
@pytest.mark.parametrize("strategy", REPAIRING)
def test_tokens_whose_context_is_absent_keep_their_kv_bit_for_bit(tmp_path, strategy, family):
    desk = Desk(tmp_path, family)
    free, [later] = desk.document("a", 20), desk.document("b", 9, 17)[1:]
    desk.put(*free, later)
    plan = desk.plan(*free, later)
    span = plan.spans[1]
    assert not span.context_present
    result = desk.run(plan, strategy, 1.0)
    assert "context" in result.outcomes[1].why
    assert result.outcomes[1].token_layers == 0
    stored = desk.encode(later).slabs
    angles = desk.runner.rope.angles(torch.arange(span.start, span.end))
    for layer, slab in enumerate(stored):
        keys, values = torch.from_numpy(slab.copy()).view(torch.float32).reshape(2, 17, -1, desk.geometry.head_dim)
        assert torch.equal(desk.kv(result, span)[layer, 0], desk.runner.rope.place(keys, angles, layer))
        assert torch.equal(desk.kv(result, span)[layer, 1], values)
    desk.store.close()


@pytest.mark.parametrize("strategy", REPAIRING)
def test_a_document_with_its_context_present_is_repaired(desk, strategy):
    first, second = desk.document("d", 9, 17)
    desk.put(first, second)
    outcomes = desk.run(desk.plan(first, second), strategy, 1.0).outcomes
    assert [o.why for o in outcomes] == [None, None]
    assert [o.repaired_tokens for o in outcomes] == [9, 17]


@pytest.mark.parametrize("family", ["llama", "mistral-windowed", "qwen2-yarn", "smollm3-windowed", "phi3-partial"])
@pytest.mark.parametrize("exact", [True, False])
def test_poisoned_tokens_that_are_selected_are_repaired(tmp_path, family, exact):
    """Stored K and V of the very tokens epic selects are spoilt: nothing of it reaches the answer."""
    clean, spoilt = Desk(tmp_path / "clean", family), Desk(tmp_path / "spoilt", family)

    def prompt(desk):
        if exact:
            return desk.document("d", 20, 6)
        return [*desk.document("a", 20), *desk.document("b", 6)]

    chunks, same = prompt(clean), prompt(spoilt)
    clean.put(*chunks)
    spoilt.put(*same, poison={chunk: range(3) for chunk in same})
    plan, other = clean.plan(*chunks), spoilt.plan(*same)
    expected = clean.run(plan, "epic", 6 / 26)
    repaired = spoilt.run(other, "epic", 6 / 26)
    close(repaired.logits, expected.logits)
    for mine, theirs in zip(other.spans, plan.spans, strict=True):
        close(spoilt.kv(repaired, mine), clean.kv(expected, theirs))
    assert (spoilt.run(other, "none").logits - clean.run(plan, "none").logits).abs().max() > 0.01
    if exact:
        close(repaired.logits, clean.library(plan))
    clean.store.close()
    spoilt.store.close()


@pytest.mark.parametrize("strategy", ["epic", "random", "none"])
@pytest.mark.parametrize("family", ["llama", "smollm3-windowed"])
def test_nothing_that_stands_later_reaches_an_earlier_token(tmp_path, strategy, family):
    """The last chunk's stored KV is spoilt throughout: what was computed before it stays the same."""
    clean, spoilt = Desk(tmp_path / "clean", family), Desk(tmp_path / "spoilt", family)
    results = []
    for desk, poison in ((clean, False), (spoilt, True)):
        first, second, last = (desk.document(name, n)[0] for name, n in (("a", 20), ("b", 17), ("c", 12)))
        desk.put(first, last, poison={last: range(12)} if poison else None)  # the second is missing
        plan = desk.plan(first, second, last)
        result = desk.run(plan, strategy, 0.3, seed=4)
        results.append([desk.kv(result, span) for span in plan.spans])
        desk.store.close()
    for a, b in list(zip(*results, strict=True))[:2]:
        close(a, b, 1e-6)
    assert (results[0][2] - results[1][2]).abs().max() > 1


@pytest.mark.parametrize("strategy", REPAIRING)
def test_repair_brings_the_kv_closer_to_full_prefill(desk, strategy):
    chunks = [desk.document(name, n)[0] for name, n in (("a", 40), ("b", 40), ("c", 40))]
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    full = desk.run(plan, "full")

    def distance(result):
        return sum(float((desk.kv(result, s) - desk.kv(full, s)).square().sum()) for s in plan.spans)

    assert distance(desk.run(plan, strategy, 0.5)) < 0.9 * distance(desk.run(plan, "none"))


def test_a_long_history_in_front_is_computed_exactly(desk):
    chunks = desk.document("d", 20, 17)
    desk.put(*chunks)
    plan = desk.plan(*chunks, prefix=(1, 9, 8, 7, 6, 5))
    close(desk.run(plan, "epic", 1.0).logits, desk.library(plan))
