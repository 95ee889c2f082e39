"""Which tokens each strategy repairs, how many, and what that does to the answer."""

from __future__ import annotations

import pytest
import torch

from ragkv.attention import NAME
from ragkv.blend import Blend
from ragkv.clock import Stopwatch
from ragkv.echoes import hints
from ragkv.loading import LayerLoader
from ragkv.selection import STRATEGIES
from tests.blend_kit import Desk, close, drain

REPAIRING = sorted(set(STRATEGIES) - {"none"})


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.store.close()


def blended(desk, plan, strategy, ratio, seed=0):
    """The Blend after its run over all chunks of ``plan``, and its last rows."""
    kv = desk.runner.new_kv(len(plan.ids))
    entries = desk.store.open([span.chunk.tokens.key for span in plan.spans])
    reader = desk.store.open_layers(entries)
    loader = LayerLoader(desk.runner, kv, plan.spans, reader)
    options = {"strategy": STRATEGIES[strategy], "ratio": ratio, "watch": Stopwatch(), "seed": seed}
    blend = Blend(desk.runner, plan, kv, loader, list(plan.spans), **options)
    with reader:
        rows = drain(blend.run())
    for entry in entries:
        entry.close()
    return blend, rows


def selected(blend):
    return (blend.computed & ~blend.required).nonzero()[:, 0].tolist()


def three_documents(desk):
    chunks = [desk.document(name, n)[0] for name, n in (("a", 20), ("b", 3), ("c", 17))]
    desk.put(*chunks)
    return desk.plan(*chunks)  # a at 1 … 20, b at 21 … 23, c at 24 … 40


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.15, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_budget_is_spent_and_never_exceeded(desk, strategy, ratio):
    blend, _ = blended(desk, three_documents(desk), strategy, ratio)
    budget = 0 if strategy == "none" else round(ratio * 40)
    assert len(selected(blend)) == budget
    assert blend.computed[0]
    assert blend.computed[41:].all()


def test_none_selects_nothing_whatever_the_ratio(desk):
    blend, _ = blended(desk, three_documents(desk), "none", 1.0)
    assert selected(blend) == []


def test_epic_takes_the_same_number_at_the_start_of_every_chunk(desk):
    plan = three_documents(desk)
    assert selected(blended(desk, plan, "epic", 6 / 40)[0]) == [1, 2, 21, 22, 24, 25]
    # The chunk of three has no fourth and fifth: the others have them.
    assert selected(blended(desk, plan, "epic", 13 / 40)[0]) == [*range(1, 6), 21, 22, 23, *range(24, 29)]


def test_random_depends_on_the_seed_alone(desk):
    plan = three_documents(desk)
    first, same, other = (selected(blended(desk, plan, "random", 0.3, seed)[0]) for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize("strategy", ["question", "links"])
@pytest.mark.parametrize("family", ["llama", "qwen2-windowed", "smollm3", "phi3"])
def test_what_the_question_attends_to_in_the_middle_layers_is_taken(tmp_path, family, strategy):
    """With exact KV, the scores are the library's own attention weights of layers 1 and 2 (of four); `links` weighs
    them by its hints."""
    desk = Desk(tmp_path, family)
    chunks = desk.document("d", 20, 3, 17)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    model = desk.runner.model
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        weights = model(torch.tensor([plan.ids]), output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(NAME)
    scores = sum(weights[layer][0, :, plan.question_start :].sum(dim=(0, 1)) for layer in (1, 2))
    expected = {"question": scores, "links": scores * torch.from_numpy(hints(plan))}
    best = {name: (one[1:41].topk(8).indices + 1).sort().values.tolist() for name, one in expected.items()}
    assert best["question"] != best["links"]
    assert selected(blended(desk, plan, strategy, 0.2)[0]) == best[strategy]
    desk.store.close()


def test_echo_takes_what_the_words_hint_at(desk):
    plan = three_documents(desk)
    expected = torch.from_numpy(hints(plan))
    blend, _ = blended(desk, plan, "echo", 0.2)
    rest = [j for j in range(1, 41) if j not in selected(blend)]
    assert expected[selected(blend)].min() >= expected[rest].max()


def test_question_sees_the_stored_keys_not_fresh_ones(desk):
    """A stored key that draws all attention is selected, and then repaired."""
    first, second = desk.document("d", 20, 17)
    desk.put(first)
    encoded = desk.encode(second)
    for slab in encoded.slabs:
        slab.view("float32").reshape(2, 17, -1)[0, 5] *= 60.0
    desk.store.put(second.tokens.key, desk.geometry, encoded.slabs, tokens=17, model="m")
    plan = desk.plan(first, second)
    blend, rows = blended(desk, plan, "question", 2 / 37)
    assert plan.spans[1].start + 5 in selected(blend)
    close(desk.runner.logits(rows), desk.library(plan))


def test_hkvd_takes_the_tokens_whose_values_deviate_most(desk):
    """Exact KV with three tokens spoilt: hkvd finds and repairs just these."""
    first, second = desk.document("d", 20, 17)
    desk.put(first, second, poison={first: [4, 19], second: [8]})
    plan = desk.plan(first, second)
    blend, rows = blended(desk, plan, "hkvd", 3 / 37)
    assert selected(blend) == [5, 20, 29]
    assert blend.dense_layers == 1
    close(desk.runner.logits(rows), desk.library(plan))


def test_hkvd_compares_values_of_its_check_layer_only(desk):
    """d = Σ (V_new − V_old)² at layer 1: a spoilt key there, or a spoilt value above, draws nothing."""
    [chunk] = desk.document("d", 20)
    encoded = desk.encode(chunk)
    rows = [slab.view("float32").reshape(2, 20, -1) for slab in encoded.slabs]
    rows[1][0, 3] += 9.0
    rows[2][1, 4] += 9.0
    rows[1][1, 7] += 0.5
    rows[1][1, 11] += 0.3
    desk.store.put(chunk.tokens.key, desk.geometry, encoded.slabs, tokens=20, model="m")
    blend, _ = blended(desk, desk.plan(chunk), "hkvd", 0.05)
    assert selected(blend) == [8]
    blend, _ = blended(desk, desk.plan(chunk), "hkvd", 0.1)
    assert selected(blend) == [8, 12]


@pytest.mark.parametrize("strategy", REPAIRING)
def test_nothing_to_repair_is_full_reuse(desk, strategy):
    first, second = desk.document("d", 20, 17)
    desk.put(second)
    plan = desk.plan(second)  # its context is not in the prompt
    result, reuse = desk.run(plan, strategy, 0.5), desk.run(plan, "none")
    assert torch.equal(result.logits, reuse.logits)
    assert result.outcomes[0].token_layers == 0
    assert first not in [span.chunk for span in plan.spans]
