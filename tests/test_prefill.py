"""Chunks stored, moved and read back through encode, store, loader and blend, against the library's own forward."""

from __future__ import annotations

import contextlib
import dataclasses
import gc

import numpy as np
import pytest
import torch

from ragkv import prefill
from ragkv.clock import Stopwatch
from ragkv.errors import RemoteError
from ragkv.kv import Known
from ragkv.lookahead import look
from ragkv.prelude import Prelude
from ragkv.selection import STRATEGIES
from tests.blend_kit import Desk, close, drain
from tests.families import MOVABLE
from tests.remote_kit import FakeTier
from tests.store_kit import flip

REPAIRING = sorted(set(STRATEGIES) - {"none"})


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.store.close()


@pytest.mark.parametrize("family", MOVABLE)
def test_exact_kv_moved_through_the_store_answers_as_the_library(tmp_path, family):
    """Two chunks whose KV is exact in this prompt, encoded 61 positions away, nothing repaired."""
    desk = Desk(tmp_path, family)
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    expected = desk.library(plan)
    result = desk.run(plan, "none")
    close(result.logits, expected)
    assert [outcome.kv for outcome in result.outcomes] == ["ssd", "ssd"]
    assert sum(outcome.token_layers for outcome in result.outcomes) == 0
    for strategy in STRATEGIES:
        close(desk.run(plan, strategy, 0.3).logits, expected)
    desk.store.close()


@pytest.mark.parametrize("family", MOVABLE)
def test_decoding_goes_on_from_blended_kv(tmp_path, family):
    desk = Desk(tmp_path, family)
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    blended, full = desk.run(plan, "epic", 0.2), desk.run(plan, "full")
    with torch.inference_mode():
        for step, token in enumerate((7, 77, 177)):
            at = len(plan.ids) + step
            close(desk.runner.decode(token, at, blended.kv), desk.runner.decode(token, at, full.kv))
    desk.store.close()


def test_kv_that_is_not_exact_is_seen(desk):
    """The parity above can fail: chunks of two documents do not know each other, and the answer shows it."""
    [one], [two] = desk.document("a", 23), desk.document("b", 18)
    desk.put(one, two)
    plan = desk.plan(one, two)
    assert (desk.run(plan, "none").logits - desk.library(plan)).abs().max() > 0.01


@pytest.mark.parametrize("family", ["llama", "qwen2-windowed", "smollm3", "phi3-partial"])
@pytest.mark.parametrize("strategy", REPAIRING)
def test_ratio_one_is_a_full_prefill(tmp_path, family, strategy):
    desk = Desk(tmp_path, family)
    [one], [two], [three] = (desk.document(name, n) for name, n in (("a", 23), ("b", 18), ("c", 7)))
    desk.put(one, two)
    plan = desk.plan(one, two, three)  # the third is missing
    result = desk.run(plan, strategy, 1.0)
    close(result.logits, desk.library(plan))
    full = desk.run(plan, "full")
    for span in plan.spans:
        close(desk.kv(result, span), desk.kv(full, span))
    assert [o.token_layers for o in result.outcomes] == [span.length * 4 for span in plan.spans]
    desk.store.close()


def test_full_is_the_library_and_touches_no_store(desk):
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    result = desk.run(plan, "full")
    close(result.logits, desk.library(plan))
    assert [(o.kv, o.token_layers) for o in result.outcomes] == [("computed", 92), ("computed", 72)]
    assert all(o.why == "full prefill was asked for" for o in result.outcomes)
    assert result.to_encode == []


def test_a_reason_against_blending_reaches_every_chunk(tmp_path):
    desk = Desk(tmp_path, "llama-dynamic")
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    refusal = desk.runner.rope.refusal
    result = desk.run(plan, "epic", 0.2, blending_off=refusal)
    close(result.logits, desk.library(plan))
    assert [o.why for o in result.outcomes] == [refusal, refusal]
    assert [o.kv for o in result.outcomes] == ["computed", "computed"]
    desk.store.close()


@pytest.mark.parametrize("strategy", [*STRATEGIES, "full"])
def test_a_prompt_without_chunks(desk, strategy):
    plan = desk.plan(question=20)
    result = desk.run(plan, strategy, 0.5)
    close(result.logits, desk.library(plan))
    assert (result.outcomes, result.to_encode) == ([], [])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_missing_chunk_is_computed_and_the_others_still_blend(desk, strategy):
    first, second, third = desk.document("d", 23, 18, 11)
    desk.put(first, third)
    plan = desk.plan(first, second, third)
    result = desk.run(plan, strategy, 0.2)
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["ssd", "computed", "ssd"]
    missing = result.outcomes[1]
    assert (missing.why, missing.repaired_tokens, missing.token_layers) == ("not stored yet", 18, 72)
    assert [span.chunk for span in result.to_encode] == [second]


def test_all_chunks_missing(desk):
    chunks = desk.document("d", 23, 18)
    plan = desk.plan(*chunks)
    result = desk.run(plan, "question", 0.2)
    close(result.logits, desk.library(plan))
    assert [o.why for o in result.outcomes] == ["not stored yet"] * 2
    assert [span.chunk for span in result.to_encode] == chunks


def test_the_same_chunk_twice_in_a_prompt(desk):
    [one] = desk.document("a", 23)
    [two] = desk.document("b", 18)
    desk.put(one, two)
    plan = desk.plan(one, two, desk.again(one, "c"))
    result = desk.run(plan, "none")
    assert [o.kv for o in result.outcomes] == ["ssd"] * 3
    close(desk.run(plan, "epic", 1.0).logits, desk.library(plan))


def entry_path(desk, chunk):
    name = chunk.tokens.key.hex()
    return desk.store.folder.root / "entries" / name[:2] / f"{name}.kv"


def damage(desk, chunk, layer):
    [entry] = desk.store.open([chunk.tokens.key])
    with entry:
        offset = entry.header.slabs[layer].offset
    flip(entry_path(desk, chunk), offset * 8 + 99)


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_damaged_layer_costs_its_chunk_a_recompute(desk, strategy, layer):
    first, second, third = desk.document("d", 23, 18, 11)
    desk.put(first, second, third)
    damage(desk, second, layer)
    plan = desk.plan(first, second, third)
    result = desk.run(plan, strategy, 0.2)
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["ssd", "computed", "ssd"]
    assert "unreadable" in result.outcomes[1].why
    assert "checksum" in result.outcomes[1].why
    assert result.outcomes[1].token_layers == 72
    assert [span.chunk for span in result.to_encode] == [second]
    assert desk.free(first)
    assert desk.free(third)


def test_several_damaged_chunks_and_a_missing_one(desk):
    chunks = desk.document("d", 23, 18, 11, 14)
    desk.put(*chunks[:3])
    damage(desk, chunks[0], 3)
    damage(desk, chunks[2], 1)
    plan = desk.plan(*chunks)
    result = desk.run(plan, "hkvd", 0.2)
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["computed", "ssd", "computed", "computed"]
    assert "unreadable" in result.outcomes[0].why
    assert "unreadable" in result.outcomes[2].why
    assert result.outcomes[3].why == "not stored yet"
    assert len(result.to_encode) == 3


def test_a_damaged_chunk_that_stands_twice_is_called_damaged_both_times(desk):
    [one] = desk.document("a", 23)
    [two] = desk.document("b", 18)
    desk.put(one, two)
    damage(desk, one, 2)
    result = desk.run(desk.plan(one, two, desk.again(one, "c")), "none")
    assert ["unreadable" in (o.why or "") for o in result.outcomes] == [True, False, True]


def test_a_damaged_header_is_named(desk):
    [one], [two] = desk.document("a", 23), desk.document("b", 18)
    desk.put(one, two)
    flip(entry_path(desk, one), 300)
    result = desk.run(desk.plan(one, two), "none")
    assert [o.kv for o in result.outcomes] == ["computed", "ssd"]
    assert "unreadable" in result.outcomes[0].why


@pytest.fixture
def afar(tmp_path):
    """A desk whose chunks can be sent to a remote tier."""
    with contextlib.closing(FakeTier()) as tier:
        desk = Desk(tmp_path, remote=tier)
        yield desk, tier
        desk.store.close()


def send(desk, *chunks):
    desk.put(*chunks)
    assert desk.store.drain(20)
    desk.store.clear()


def test_remote_chunks_blend_like_local_ones(afar):
    desk, _ = afar
    first, second, third = desk.document("d", 23, 18, 11)
    send(desk, first, third)
    desk.put(second)
    plan = desk.plan(first, second, third)
    result = desk.run(plan, "none")
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["remote", "ssd", "remote"]
    assert result.to_encode == []


@pytest.mark.parametrize("layer", range(4))
def test_a_remote_tier_that_fails_on_the_way_costs_its_chunks_a_recompute(afar, layer):
    desk, tier = afar
    first, second, third = desk.document("d", 23, 18, 11)
    send(desk, first, third)
    desk.put(second)

    def fail_from_layer(method):
        if method == "get" and tier.asked.count("get") > 2 * layer:
            raise RemoteError("the plug is out")

    tier.before = fail_from_layer
    plan = desk.plan(first, second, third)
    result = desk.run(plan, "hkvd", 0.2)
    close(result.logits, desk.library(plan))
    assert [o.kv for o in result.outcomes] == ["computed", "ssd", "computed"]
    assert "unreadable" in result.outcomes[0].why
    assert [span.chunk for span in result.to_encode] == [first, third]


WRONG = {
    "codec": {"codec": "int8"},
    "shape": {"layers": 3},
    "token count": {"tokens": 5},
    "codec and token count and shape": {"codec": "fp8", "tokens": 40, "kv_heads": 1, "dtype": "bfloat16"},
}


def put_wrong(desk, chunk, *, codec="raw", tokens=None, **shape):
    """Store sound bytes under a key that stands for something else."""
    geometry = dataclasses.replace(desk.geometry, **shape)
    tokens = tokens or len(chunk.tokens.ids)
    half = np.zeros((tokens, geometry.kv_heads, geometry.head_dim), geometry.numpy_dtype)
    slabs = [(half, half)] * geometry.layers
    assert desk.store.put(chunk.tokens.key, geometry, slabs, tokens=tokens, model="m", codec=codec)


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("tier", ["ssd", "ram", "remote"])
def test_an_entry_that_is_not_what_its_key_says_is_a_miss_and_not_met_again(tmp_path, tier, what):
    with contextlib.closing(FakeTier()) as remote:
        desk = Desk(tmp_path, ram_bytes=2**24 if tier == "ram" else 0, remote=remote if tier == "remote" else None)
        first, second, third = desk.document("d", 23, 18, 11)
        put_wrong(desk, second, **WRONG[what])
        if tier == "remote":
            send(desk, first, third)
        else:
            desk.put(first, third)
        if tier == "ram":
            for chunk in (first, second, third):
                with desk.store.open([chunk.tokens.key])[0] as entry:
                    list(desk.store.open_layers([entry]))
        plan = desk.plan(first, second, third)
        result = desk.run(plan, "hkvd", 0.2)
        close(result.logits, desk.library(plan))
        assert [o.kv for o in result.outcomes] == [tier, "computed", tier]
        assert result.outcomes[1].why == f"its stored KV is not this chunk's: another {what}"
        assert [span.chunk for span in result.to_encode] == [second]
        stats = desk.store.stats()
        assert (stats.remote.corrupt if tier == "remote" else stats.corrupt) == 1
        assert desk.store.drain(20)
        assert desk.run(plan, "none").outcomes[1].why == "not stored yet"
        desk.put(second)
        assert [o.why for o in desk.run(plan, "none").outcomes] == [None] * 3
        desk.store.close()


def test_an_entry_under_another_ones_key_is_a_miss(desk, monkeypatch):
    """The store sees to that itself; whatever stands in for it need not."""
    chunks = desk.document("d", 23, 18, 18)
    desk.put(*chunks)
    plan, opened = desk.plan(*chunks), desk.store.open
    swap = {chunks[1].tokens.key: chunks[2].tokens.key}
    monkeypatch.setattr(desk.store, "open", lambda keys: opened([swap.get(key, key) for key in keys]))
    result = desk.run(plan, "none")
    close(result.logits, desk.library(plan))
    assert result.outcomes[1].why == "its stored KV is not this chunk's: another key"


@pytest.mark.parametrize("layer", range(1, 5))
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cancelled_half_way_leaves_no_lease(desk, strategy, layer):
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    steps = desk.prefill(desk.plan(*chunks), strategy, 0.2).run()
    with torch.inference_mode():
        for _ in range(layer):
            next(steps)
        assert not any(desk.free(chunk) for chunk in chunks)
        steps.close()
    assert all(desk.free(chunk) for chunk in chunks)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_leases_end_with_success(desk, strategy):
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    result = desk.run(desk.plan(*chunks), strategy, 0.2)
    assert all(desk.free(chunk) for chunk in chunks)
    assert torch.isfinite(result.logits).all()


def test_leases_end_with_an_error_even_while_it_is_handled(desk, monkeypatch):
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    run_layer = desk.runner.run_layer

    def fail(layer, rows):
        if layer == 2:
            raise RuntimeError("out of memory")
        run_layer(layer, rows)

    monkeypatch.setattr(desk.runner, "run_layer", fail)
    gc.disable()  # nothing may depend on the collector, nor on the frames that the error keeps alive
    try:
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            desk.run(desk.plan(*chunks), "epic", 0.2)
        assert all(desk.free(chunk) for chunk in chunks)
        assert caught.value.__traceback__ is not None
    finally:
        gc.enable()


def test_leases_end_when_the_kv_cannot_be_allocated(desk, monkeypatch):
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)

    def fail(capacity, base=0):
        raise MemoryError

    monkeypatch.setattr(desk.runner, "new_kv", fail)
    with pytest.raises(MemoryError):
        desk.run(desk.plan(*chunks), "none")
    assert all(desk.free(chunk) for chunk in chunks)


def test_a_chunk_read_before_comes_from_ram(tmp_path):
    desk = Desk(tmp_path, ram_bytes=2**24)
    chunks = desk.document("d", 23, 18)
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    cold, warm = desk.run(plan, "none"), desk.run(plan, "none")
    assert [o.kv for o in cold.outcomes] == ["ssd", "ssd"]
    assert [o.kv for o in warm.outcomes] == ["ram", "ram"]
    assert torch.equal(cold.logits, warm.logits)
    assert all(desk.free(chunk) for chunk in chunks)
    desk.store.close()


def test_the_parts_of_the_watch_add_up(desk):
    chunks = desk.document("d", 23, 18)
    desk.put(chunks[0])
    watch = Stopwatch()
    desk.run(desk.plan(*chunks), "question", 0.2, watch=watch)
    assert set(watch.parts) == {"lookup", "load", "select", "recompute", "queue"}
    assert sum(map(watch.ms, watch.parts)) == pytest.approx(watch.total_ms)


def test_the_loader_stops_at_an_error_of_the_store(desk):
    """An error that is not a chunk's own is not mistaken for one."""
    chunks = desk.document("d", 23)
    desk.put(*chunks)

    class Broken:
        def __iter__(self):
            return self

        def __next__(self):
            raise OSError("gone")

        def close(self):
            pass

    desk.store.open_layers = lambda entries, order: Broken()
    with pytest.raises(OSError, match="gone"):
        drain(desk.prefill(desk.plan(*chunks), "none").run())
    assert desk.free(chunks[0])


@pytest.mark.parametrize("strategy", ["none", "epic", "question", "full"])
@pytest.mark.parametrize("known", [0, 24, 60])
def test_how_many_rows_a_prompt_takes_is_known_before_it_is_opened(desk, strategy, known):
    """The chunk in the middle stands without its context: nothing of it is repaired."""
    chunks = [*desk.document("d", 23), desk.document("e", 5, 18)[1], *desk.document("f", 18)]
    desk.put(*chunks)
    run_layer, rows = desk.runner.run_layer, []
    desk.runner.run_layer = lambda layer, some: rows.append(some.step.rows) or run_layer(layer, some)
    options = {"known": Known(known, lambda kv: kv.slots(0, known).zero_()), "tail": (7, 8)}
    prefill = desk.prefill(desk.plan(*chunks), strategy, 0.3, **options)
    least = prefill.least_rows
    drain(prefill.run())
    blended = strategy != "full" and known < 60
    assert rows[-1 - desk.runner.shape.layers * blended] == least
    assert (rows[-1] == 2) == blended


# What is begun before there is memory


@pytest.mark.parametrize(("strategy", "ratio", "begun"), [("links", 0.2, 1), ("links", 0.0, 0), ("echo", 0.2, 0)])
def test_what_can_be_begun_early_is_begun_before_anything_is_read(desk, monkeypatch, strategy, ratio, begun):
    chunks = desk.document("d", 20, 15)
    desk.put(*chunks)
    order = []
    open_layers = desk.store.open_layers
    monkeypatch.setattr(prefill, "Prelude", lambda *given: (order.append("begun"), Prelude(*given))[1])
    monkeypatch.setattr(desk.store, "open_layers", lambda *a, **k: (order.append("read"), open_layers(*a, **k))[1])
    desk.run(desk.plan(*chunks), strategy, ratio)
    assert order == ["begun"] * begun + ["read"]


def test_chunks_that_may_not_be_repaired_are_begun_nothing_for(desk, monkeypatch):
    first, second = desk.document("d", 20, 15)
    desk.put(first, second)
    monkeypatch.setattr(prefill, "Prelude", None)
    result = desk.run(desk.plan(second), "links", 0.5)
    assert result.outcomes[0].repaired_tokens == 0


@pytest.mark.parametrize("most", [9, 10])
def test_looking_ahead_in_one_launch_selects_the_same(desk, monkeypatch, most):
    """A question of nine tokens behind a prefix of one: ten rows."""

    class Launched:
        def __init__(self):
            self.most, self.looked = most, 0

        def look(self, tokens):
            self.looked += 1
            there = torch.from_numpy(tokens)
            return there, drain(look(desk.runner, *there))

    chunks = [desk.document(name, 20)[0] for name in "abc"]
    desk.put(*chunks)
    plan = desk.plan(*chunks)
    expected = desk.run(plan, "links", 0.2)
    launched = Launched()
    monkeypatch.setattr(desk.runner, "lookahead", launched)
    actual = desk.run(plan, "links", 0.2)
    assert launched.looked == (most == 10)
    assert [o.repaired_tokens for o in actual.outcomes] == [o.repaired_tokens for o in expected.outcomes]
    assert torch.equal(actual.logits, expected.logits)


def test_what_became_of_chunks_is_counted_when_somebody_asks(desk):
    """Which waits for a device: after the first token."""
    chunks = [desk.document(name, 20)[0] for name in "ab"]
    desk.put(*chunks)
    result = desk.run(desk.plan(*chunks), "links", 0.2)
    assert "outcomes" not in vars(result)
    assert sum(outcome.repaired_tokens for outcome in result.outcomes) == 8
    assert result.outcomes is result.outcomes
