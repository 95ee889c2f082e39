"""The parity suite can fail: each of these faults in the product is found by its cases, and where only some of the
circumstances show a fault, the others do not."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import AttentionInterface

from ragkv import attention, gathering, prefill, selection, unpacking
from ragkv.attention import NAME, AttentionStep
from ragkv.blend import Blend
from ragkv.decoding import Decoder
from ragkv.device_tier import DeviceTier
from ragkv.kv import NOTHING, Known, RequestKV
from ragkv.loading import LayerLoader
from ragkv.plan import PromptPlan, Span
from ragkv.prefill import FULL, Prefill
from ragkv.rope import Rope, read_rope
from ragkv.rows import Joined
from ragkv.store.source import RamSource
from ragkv.unpacking import Unpacker
from tests.families import make_model
from tests.parity_kit import SHARE, Bench, Case, share

AT_ONCE = 8
Patch = Callable[[pytest.MonkeyPatch], None]
MUTANTS: dict[str, Mutant] = {}


@dataclass(frozen=True)
class Mutant:
    """``families``: those whose cases find it, each of them. ``spared``: families it does not touch. ``only``: the
    cases that it can touch at all. Where it does not reach it must not be found: it is the circumstance that finds it.
    """

    patch: Patch
    families: tuple[str, ...]
    spared: tuple[str, ...]
    only: Callable[[Case], bool] | None


def mutant(
    *families: str, spared: tuple[str, ...] = (), only: Callable[[Case], bool] | None = None
) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        MUTANTS[patch.__name__] = Mutant(patch, families or ("llama",), spared, only)
        return patch

    return register


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)
        bench = Bench(tmp_path_factory.mktemp("parity"))
        yield bench
        bench.close()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_of_the_product_is_found(bench, monkeypatch, name):
    mutant = MUTANTS[name]
    for family in {*mutant.families, *mutant.spared}:
        bench.world(family, "float32")  # made while everything is well
    mutant.patch(monkeypatch)
    for family in mutant.families:
        assert found(bench, cases(family)), f"{name} lives with {family}"
    for family in mutant.spared:
        assert bench.faults(cases(family)[:AT_ONCE]) == []
    if mutant.only:
        others = [case for case in cases(mutant.families[0]) if not mutant.only(case)]
        assert bench.faults(others[: 2 * AT_ONCE]) == []


@cache
def cases(family: str) -> list[Case]:
    """The suite's own."""
    return share(family, SHARE)


def found(bench: Bench, cases: list[Case]) -> bool:
    return any(bench.faults(cases[start : start + AT_ONCE]) for start in range(0, len(cases), AT_ONCE))


# Attention


@mutant("llama", "mistral-windowed")
def causal_mask_at_the_bottom_right(monkeypatch):
    def mask(step, window):
        last = step.length - step.rows + torch.arange(step.rows)
        keys = torch.arange(step.length)
        allowed = keys <= last[:, None]
        return allowed if window is None else allowed & (keys > last[:, None] - window)

    monkeypatch.setattr(AttentionStep, "mask", mask)


@mutant()
def repaired_rows_see_the_future(monkeypatch):
    monkeypatch.setattr(AttentionStep, "mask", lambda step, window: torch.ones(step.rows, step.length).bool())


@mutant("mistral-windowed", "qwen2-windowed", "smollm3-windowed", spared=("llama",))
def window_ignored(monkeypatch):
    mask = AttentionStep.mask
    monkeypatch.setattr(AttentionStep, "mask", lambda step, window: mask(step, None))


@mutant("mistral-windowed", spared=("mistral",))
def window_too_wide_by_one(monkeypatch):
    mask = AttentionStep.mask
    monkeypatch.setattr(AttentionStep, "mask", lambda step, window: mask(step, window and window + 1))


@mutant()
def full_prefill_without_a_causal_mask(monkeypatch):
    sdpa = attention.sdpa
    monkeypatch.setattr(attention, "sdpa", lambda *qkv, is_causal=False, **rest: sdpa(*qkv, **rest))


@mutant("llama", spared=("llama-mha", "qwen3-mqa"))
def query_heads_read_each_others_keys(monkeypatch):
    right = AttentionInterface._global_mapping[NAME]

    def attend(module, query, key, value, step, **options):
        groups = query.unflatten(1, (-1, key.shape[1])).transpose(1, 2).flatten(1, 2)
        out, weights = right(module, groups, key, value, step, **options)
        return out.unflatten(2, (key.shape[1], -1)).transpose(2, 3).flatten(2, 3), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, NAME, attend)


@mutant()
def the_token_after_the_prompt_stands_one_too_far(monkeypatch):
    enter = Decoder.enter
    monkeypatch.setattr(
        Decoder, "enter", lambda loop, lane, token, position, blocks: enter(loop, lane, token, position + 1, blocks)
    )


# Positions


@mutant()
def keys_rotated_twice(monkeypatch):
    place = Rope.place

    def twice(rope, keys, angles, layer):
        return place(rope, place(rope, keys, angles, layer), angles, layer)

    monkeypatch.setattr(Rope, "place", twice)


@mutant()
def keys_not_rotated(monkeypatch):
    monkeypatch.setattr(Rope, "place", lambda rope, keys, angles, layer: keys)


@mutant("qwen2-yarn", spared=("qwen2", "llama-llama3"))
def yarn_scaling_applied_again(monkeypatch):
    place = Rope.place
    model = make_model("qwen2-yarn")
    yarn, scaling = read_rope(model).inv_freq, model.model.rotary_emb.attention_scaling

    def scaled(rope, keys, angles, layer):
        placed = place(rope, keys, angles, layer)
        return placed * scaling if torch.equal(rope.inv_freq, yarn) else placed

    monkeypatch.setattr(Rope, "place", scaled)


@mutant("llama-linear", "llama-llama3", "qwen2-yarn", spared=("llama", "qwen2"))
def scaled_frequencies_ignored(monkeypatch):
    plain = read_rope(make_model("llama")).inv_freq

    def angles(rope, positions):
        radians = positions[:, None].float() * plain
        return radians.cos()[:, None], radians.sin()[:, None]

    monkeypatch.setattr(Rope, "angles", angles)


@mutant("phi3-partial", spared=("phi3",))
def dimensions_rotated_that_rest(monkeypatch):
    whole = read_rope(make_model("phi3")).inv_freq

    def angles(rope, positions):
        radians = positions[:, None].float() * whole
        return radians.cos()[:, None], radians.sin()[:, None]

    monkeypatch.setattr(Rope, "angles", angles)


@mutant("smollm3", "smollm3-windowed", spared=("llama",))
def nope_layers_rotated(monkeypatch):
    place = Rope.place

    def always(rope, keys, angles, layer):
        return place(rope, keys, angles, rope.rotates.index(True))

    monkeypatch.setattr(Rope, "place", always)


@mutant()
def positions_rounded_to_the_kv_s_dtype(monkeypatch):
    """Angles, not positions, are what half precision spoils: hundreds of radians are not held to a tenth."""

    def angles(rope, positions):
        radians = (positions[:, None].float() * rope.inv_freq).bfloat16().float()
        return radians.cos()[:, None], radians.sin()[:, None]

    monkeypatch.setattr(Rope, "angles", angles)


# Loading


def placing(monkeypatch: pytest.MonkeyPatch, move: Callable[[list[Span]], list[Span]]) -> None:
    """Load the chunks to where ``move`` says they stand."""
    monkeypatch.setattr(
        prefill, "LayerLoader", lambda runner, kv, spans, *rest: LayerLoader(runner, kv, move(list(spans)), *rest)
    )


def moved(span: Span, by: int) -> Span:
    return Span(span.chunk, span.start + by, span.end + by, span.context_present)


@mutant()
def chunks_stand_one_too_far(monkeypatch):
    placing(monkeypatch, lambda spans: [moved(span, 1) for span in spans])


@mutant(only=lambda case: case.prefix != "none" or case.known == "chunk")
def the_prefix_does_not_count(monkeypatch):
    placing(monkeypatch, lambda spans: [moved(span, -spans[0].start) for span in spans])


@mutant(only=lambda case: case.layout == "twice")
def a_text_that_stands_twice_is_placed_once(monkeypatch):
    def first_of_its_kind(spans):
        places = {}
        return [places.setdefault(span.chunk.tokens.key, span) for span in spans]

    placing(monkeypatch, first_of_its_kind)


@mutant(only=lambda case: case.layout == "gap")
def a_chunk_in_between_is_forgotten(monkeypatch):
    def adjacent(positions, base):
        return slice(int(positions[0]) - base, int(positions[0]) - base + len(positions))

    monkeypatch.setattr(gathering, "_as_slice", adjacent)


@mutant()
def keys_and_values_swapped(monkeypatch):
    unpack = Unpacker.unpack
    monkeypatch.setattr(Unpacker, "unpack", lambda unpacker, stage: unpack(unpacker, stage)[::-1])


@mutant(only=lambda case: case.codec != "raw")
def every_chunk_has_the_first_ones_key_scales(monkeypatch):
    scale_keys = Unpacker._scale_keys
    monkeypatch.setattr(Unpacker, "_scale_keys", lambda unpacker, keys, scales: scale_keys(unpacker, keys, scales[:1]))


@mutant(only=lambda case: case.codec == "fp8")
def float8_at_half_its_worth(monkeypatch):
    monkeypatch.setattr(unpacking, "_HALF_OF_E4M3", 128.0)


@mutant()
def the_last_layer_keeps_what_was_there(monkeypatch):
    ensure = LayerLoader.ensure
    monkeypatch.setattr(LayerLoader, "ensure", lambda loader, layer: ensure(loader, min(layer, 2)))


@mutant(only=lambda case: case.tier == "ram")
def memory_hands_out_another_layer(monkeypatch):
    slab = RamSource.slab
    monkeypatch.setattr(RamSource, "slab", lambda source, layer, buffer: slab(source, (layer + 1) % 4, buffer))


@mutant(only=lambda case: case.tier == "device")
def the_device_hands_out_another_layer(monkeypatch):
    right = DeviceTier.lease

    def lease(tier, headers):
        lent = right(tier, headers)
        lent.hits.update({key: entry.roll(1, dims=0) for key, entry in lent.hits.items()})
        return lent

    monkeypatch.setattr(DeviceTier, "lease", lease)


@mutant()
def stored_kv_is_placed_over_what_was_repaired(monkeypatch):
    def advance(blend, rows, first, end, part):
        for layer in range(first, end):
            if layer == 0:
                blend.loader.ensure(0)
            blend.runner.run_layer(layer, rows)
            blend.loader.ensure(layer)
            yield

    monkeypatch.setattr(Blend, "advance", advance)


# Rows


@mutant()
def repaired_rows_keep_their_old_values(monkeypatch):
    write = RequestKV.write

    def keys_alone(kv, layer, slots, keys, values):
        if isinstance(slots, torch.Tensor) and len(slots) > 1:
            values = torch.where(
                kv.read(layer, kv.capacity)[1][slots].isnan(), values, kv.read(layer, kv.capacity)[1][slots]
            )
        write(kv, layer, slots, keys, values)

    monkeypatch.setattr(RequestKV, "write", keys_alone)


@mutant(only=lambda case: any(not piece.stored for piece in case.pieces))
def what_is_missing_is_not_computed(monkeypatch):
    class Forgetful(Blend):
        def __init__(self, runner, plan, kv, loader, reused, **options):
            super().__init__(runner, plan, kv, loader, reused, **options)
            for span in set(plan.spans) - set(reused):
                self.required[span.start : span.end] = False

    monkeypatch.setattr(prefill, "Blend", Forgetful)


@mutant(only=lambda case: case.layout == "alone")
def what_must_not_be_repaired_is(monkeypatch):
    class Eager(Blend):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.repairable = ~self.required
            self.repairable[: self.known] = False

        @property
        def budget(self):
            return round(self.ratio * int(self.repairable.sum()))

    monkeypatch.setattr(prefill, "Blend", Eager)
    monkeypatch.setattr(
        prefill, "repair_budget", lambda spans, ratio: round(ratio * sum(span.length for span in spans))
    )


@mutant(only=lambda case: case.strategy == "hkvd")
def rows_change_places_behind_the_check_layer(monkeypatch):
    hkvd = selection.STRATEGIES["hkvd"]

    def mixed_up(blend):
        start = yield from hkvd(blend)
        if start.layer:
            start.rows.hidden = start.rows.hidden.roll(1, dims=1)
        return start

    monkeypatch.setitem(selection.STRATEGIES, "hkvd", mixed_up)


@mutant()
def nothing_is_reused(monkeypatch):
    init = Prefill.__init__

    def init_in_full(self, *args, strategy, **options):
        init(self, *args, strategy=FULL, **options)

    monkeypatch.setattr(Prefill, "__init__", init_in_full)


@mutant()
def twice_as_much_is_repaired(monkeypatch):
    budget = Blend.budget.fget
    monkeypatch.setattr(Blend, "budget", property(lambda blend: min(2 * budget(blend), int(blend.repairable.sum()))))


# What is known


def knowing(monkeypatch: pytest.MonkeyPatch, change: Callable[[Known, PromptPlan], Known]) -> None:
    """Prefills take ``change`` of what is known for it."""
    init = Prefill.__init__

    def changed(self, runner, store, plan, *, known=NOTHING, **options):
        init(self, runner, store, plan, known=change(known, plan) if known.tokens else known, **options)

    monkeypatch.setattr(Prefill, "__init__", changed)


def is_known(case: Case) -> bool:
    return case.known_tokens > 0


def knows_a_chunk(case: Case) -> bool:
    return case.known in ("chunk", "question") and bool(case.pieces)


@mutant(only=is_known)
def what_is_known_is_not_brought(monkeypatch):
    knowing(monkeypatch, lambda known, plan: Known(known.tokens))


@mutant(only=is_known)
def what_is_known_is_one_token_more(monkeypatch):
    knowing(monkeypatch, lambda known, plan: Known(known.tokens + 1, known.fill))


@mutant(only=is_known)
def what_is_known_ends_a_token_sooner(monkeypatch):
    knowing(monkeypatch, lambda known, plan: Known(known.tokens - 1, known.fill))


@mutant(only=is_known)
def what_is_known_stands_a_token_too_far(monkeypatch):
    def fill(known, kv):
        known.fill(kv)
        slots = kv.slots(0, known.tokens)
        slots.copy_(slots.roll(1, dims=2))

    knowing(monkeypatch, lambda known, plan: Known(known.tokens, lambda kv: fill(known, kv)))


@mutant(only=knows_a_chunk)
def chunks_that_are_known_are_loaded_and_repaired_again(monkeypatch):
    def prefix(known, plan):
        return Known(min([known.tokens, *[span.start for span in plan.spans]]), known.fill)

    knowing(monkeypatch, prefix)


@mutant("olmo2", "phi3-windowed", only=lambda case: case.strategy == "links" and is_known(case))
def what_looks_ahead_writes_over_what_is_known(monkeypatch):
    sought = selection._sought

    def forgetful(blend, *rest):
        blend.known = 0
        return sought(blend, *rest)

    monkeypatch.setattr(selection, "_sought", forgetful)


# Company


@mutant("llama", "qwen3", only=lambda case: case.company)
def rows_computed_together_are_turned_by_each_others_angles(monkeypatch):
    init = Joined.__init__

    def rolled(joined, members):
        init(joined, members)
        joined.rotary = tuple(part.roll(members[0].step.rows, dims=1) for part in joined.rotary)

    monkeypatch.setattr(Joined, "__init__", rolled)


@mutant(only=lambda case: case.company)
def requests_decode_from_each_others_blocks(monkeypatch):
    step = Decoder.step

    def step_from_others(decoder, lanes):
        states = [decoder._lanes[lane] for lane in lanes]
        tables = [state.blocks for state in states]
        for state, blocks in zip(states, tables[1:] + tables[:1], strict=True):
            state.blocks = blocks + tables[-1] * 9  # however long it is
        return step(decoder, lanes)

    monkeypatch.setattr(Decoder, "step", step_from_others)


@mutant(only=lambda case: case.company)
def requests_share_their_kv(monkeypatch):
    init, pool = RequestKV.__init__, {}

    def init_from_pool(kv, shape, capacity, device, base=0):
        init(kv, shape, capacity, device, base)
        shared = pool.setdefault(
            shape, torch.empty((shape.layers, 2, 512, shape.kv_heads, shape.head_dim), dtype=shape.dtype)
        )
        if capacity > 32:  # what looks ahead is smaller, and must not break but for what is tried here
            kv._data = shared[:, :, :capacity]

    monkeypatch.setattr(RequestKV, "__init__", init_from_pool)
