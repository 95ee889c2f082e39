"""Which tokens each strategy repairs, how many, and what that does to the answer."""

from __future__ import annotations

import pytest
import torch

from ragkv.attention import NAME
from ragkv.blend import Blend
from ragkv.clock import Stopwatch
from ragkv.echoes import hints, scarcity
from ragkv.loading import LayerLoader
from ragkv.methods import outline
from ragkv.selection import STRATEGIES
from ragkv.steps import alone
from tests.blend_kit import Desk, close, drain

REPAIRING = sorted(set(STRATEGIES) - {"none"})
LAYERS = 4


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.store.close()


def blended(desk, plan, strategy, ratio, seed=0):
    """The Blend after its run over all chunks of ``plan``, and its last rows."""
    kv = desk.runner.new_kv(len(plan.ids))
    entries = desk.store.open([span.chunk.tokens.key for span in plan.spans])
    order = outline(strategy, LAYERS).loading_order(LAYERS)
    reader = desk.store.open_layers(entries, order=order)
    loader = LayerLoader(desk.runner, kv, plan.spans, reader, order=order)
    options = {"strategy": STRATEGIES[strategy], "ratio": ratio, "watch": Stopwatch(), "seed": seed}
    blend = Blend(desk.runner, plan, kv, loader, list(plan.spans), **options)
    with reader:
        rows = drain(alone(desk.runner, blend.steps()))
    for entry in entries:
        entry.close()
    return blend, rows


def selected(blend, rows):
    return [place for place in rows.step.positions.tolist() if not blend.required[place]]


def three_documents(desk):
    chunks = [desk.document(name, n)[0] for name, n in (("a", 20), ("b", 3), ("c", 17))]
    desk.put(*chunks)
    return desk.plan(*chunks)  # a at 1 … 20, b at 21 … 23, c at 24 … 40


@pytest.mark.parametrize("ratio", [0.0, 0.01, 0.1, 0.15, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_budget_is_spent_and_never_exceeded(desk, strategy, ratio):
    blend, rows = blended(desk, three_documents(desk), strategy, ratio)
    budget = 0 if strategy == "none" else round(ratio * 40)
    assert len(selected(blend, rows)) == budget
    assert {0, *range(41, blend.length)} <= set(rows.step.positions.tolist())


def test_none_selects_nothing_whatever_the_ratio(desk):
    blend, rows = blended(desk, three_documents(desk), "none", 1.0)
    assert selected(blend, rows) == []


def test_epic_takes_the_same_number_at_the_start_of_every_chunk(desk):
    plan = three_documents(desk)
    assert selected(*blended(desk, plan, "epic", 6 / 40)) == [1, 2, 21, 22, 24, 25]
    # The chunk of three has no fourth and fifth: the others have them.
    assert selected(*blended(desk, plan, "epic", 13 / 40)) == [*range(1, 6), 21, 22, 23, *range(24, 29)]


def test_random_depends_on_the_seed_alone(desk):
    plan = three_documents(desk)
    first, same, other = (selected(*blended(desk, plan, "random", 0.3, seed)) for seed in (1, 1, 2))
    assert first == same
    assert first != other


FAMILIES = ["llama", "qwen2-windowed", "smollm3", "phi3"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_question_attends_to_in_the_middle_layers_is_taken(tmp_path, family):
    """With exact KV, the scores are the library's own attention weights of layers 1 and 2 (of four)."""
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
    best = (scores[1:41].topk(8).indices + 1).sort().values.tolist()
    assert selected(*blended(desk, plan, "question", 0.2)) == best
    desk.store.close()


class _OneLayer:
    """The cache of a layer that has ``keys`` (1, kv_heads, n, head_dim) in front, of values that do not matter."""

    def __init__(self, keys: torch.Tensor) -> None:
        self.keys = keys

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: object, **__: object):
        return torch.cat((self.keys, keys), dim=2), torch.cat((torch.zeros_like(self.keys), values), dim=2)


def looked_for(runner, plan, layer: int) -> torch.Tensor:
    """What the question's rows pay to the context at ``layer``, by the library's own modules: rows that saw no context
    before look at the context's exact keys."""
    model, start, first = runner.model, plan.question_start, plan.spans[0].start
    positions = torch.cat((torch.arange(first), torch.arange(start, len(plan.ids))))[None]
    own = torch.tensor(plan.ids)[positions]
    with torch.inference_mode():
        known = model(torch.tensor([plan.ids]), use_cache=True).past_key_values.layers[layer].keys[:, :, first:start]
        # With a mask, or else the library takes the gap in the positions for the border of another text.
        options = {"position_ids": positions, "attention_mask": torch.ones_like(own), "use_cache": False}
        hidden = model(own, output_hidden_states=True, **options).hidden_states[layer]
        block, rows = model.model.layers[layer], positions.shape[1]
        mask = torch.zeros(1, 1, rows, start - first + rows)
        mask[..., start - first :] = torch.full((rows, rows), float("-inf")).triu(1)
        mask[:, :, :first, : start - first] = float("-inf")  # the prompt's first tokens stand before it
        _, weights = block.self_attn(
            block.input_layernorm(hidden),
            position_embeddings=model.model.rotary_emb(hidden, positions),
            attention_mask=mask,
            past_key_values=_OneLayer(known),
            position_ids=positions,
        )
    return weights[0, :, first:, : start - first].sum(dim=(0, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_links_takes_what_the_question_will_attend_to_weighed_by_hints_and_scarcity(tmp_path, family):
    """The question's queries come from rows that saw nothing of the context; the keys are the stored ones."""
    desk = Desk(tmp_path, family)
    chunks = desk.document("d", 20, 3, 17)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    desk.runner.model.set_attn_implementation("eager")
    [layer] = outline("links", LAYERS).searched
    scores = looked_for(desk.runner, plan, layer) * torch.from_numpy(hints(plan) * scarcity(plan))[1:41]
    desk.runner.model.set_attn_implementation(NAME)
    best = (scores.topk(8).indices + 1).sort().values.tolist()
    assert selected(*blended(desk, plan, "links", 0.2)) == best
    desk.store.close()


def test_echo_takes_what_the_words_hint_at(desk):
    plan = three_documents(desk)
    expected = torch.from_numpy(hints(plan))
    blend, rows = blended(desk, plan, "echo", 0.2)
    rest = [j for j in range(1, 41) if j not in selected(blend, rows)]
    assert expected[selected(blend, rows)].min() >= expected[rest].max()


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
    assert plan.spans[1].start + 5 in selected(blend, rows)
    close(desk.runner.logits(rows), desk.library(plan))


def test_hkvd_takes_the_tokens_whose_values_deviate_most(desk):
    """Exact KV with three tokens spoilt: hkvd finds and repairs just these."""
    first, second = desk.document("d", 20, 17)
    desk.put(first, second, poison={first: [4, 19], second: [8]})
    plan = desk.plan(first, second)
    blend, rows = blended(desk, plan, "hkvd", 3 / 37)
    assert selected(blend, rows) == [5, 20, 29]
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
    blend, rows = blended(desk, desk.plan(chunk), "hkvd", 0.05)
    assert selected(blend, rows) == [8]
    blend, rows = blended(desk, desk.plan(chunk), "hkvd", 0.1)
    assert selected(blend, rows) == [8, 12]


@pytest.mark.parametrize("strategy", REPAIRING)
def test_nothing_to_repair_is_full_reuse(desk, strategy):
    first, second = desk.document("d", 20, 17)
    desk.put(second)
    plan = desk.plan(second)  # its context is not in the prompt
    result, reuse = desk.run(plan, strategy, 0.5), desk.run(plan, "none")
    assert torch.equal(result.logits, reuse.logits)
    assert result.outcomes[0].token_layers == 0
    assert first not in [span.chunk for span in plan.spans]
