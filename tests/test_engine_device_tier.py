"""An engine that keeps hot entries on its device (here a CPU, whose tensors do as well)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ragkv.device_tier import DeviceTier
from tests.blend_kit import Desk, close
from tests.engine_kit import DOCUMENTS, QUESTION
from tests.store_kit import flip

ROOM = 2**24


def tiers(answer) -> set[str]:
    return {source.kv for source in answer.sources}


@pytest.mark.parametrize("codec", ["raw", "int8", "fp8"])
def test_what_is_asked_again_comes_from_the_device_and_says_the_same(make_engine, codec):
    engine = make_engine(kv_codec=codec, device_bytes=ROOM)
    engine.ingest("c", DOCUMENTS)
    for method in ("none", "question"):
        plain = make_engine(kv_codec=codec).query(QUESTION, collection="c", method=method)
        engine.query(QUESTION, collection="c", method=method)
        hot = engine.query(QUESTION, collection="c", method=method)
        assert tiers(hot) == {"device"}
        assert hot.text == plain.text
        assert hot.recomputed_share == plain.recomputed_share
    metrics = engine.metrics()
    assert 0 < metrics["device_tier_bytes"] <= metrics["device_tier_capacity_bytes"] == ROOM
    assert metrics["device_tier_hits"] > 0


def test_on_a_cpu_it_is_off_unless_asked_for(make_engine):
    engine = make_engine()
    engine.ingest("c", DOCUMENTS)
    for _ in range(3):
        assert "device" not in tiers(engine.query(QUESTION, collection="c", method="none"))
    assert engine.metrics()["device_tier_capacity_bytes"] == 0


def test_a_deleted_document_leaves_the_device_at_once(make_engine):
    engine = make_engine(device_bytes=ROOM)
    engine.ingest("c", DOCUMENTS)
    engine.query(QUESTION, collection="c", method="none")
    held = engine.metrics()["device_tier_entries"]
    assert held
    for document in DOCUMENTS:
        engine.delete_document("c", document.id)
    assert engine.metrics()["device_tier_entries"] == 0
    assert engine.metrics()["device_tier_bytes"] == 0


def test_what_the_store_gives_up_leaves_the_device(make_engine):
    engine = make_engine(device_bytes=ROOM)
    engine.ingest("c", DOCUMENTS)
    engine.query(QUESTION, collection="c", method="none")
    assert engine.metrics()["device_tier_entries"]
    engine.cache_clear()
    assert engine.metrics()["device_tier_entries"] == 0
    assert tiers(engine.query(QUESTION, collection="c", method="none")) == {"computed"}


def test_a_prompt_may_mix_the_device_and_other_tiers(tmp_path):
    desk = Desk(tmp_path)
    one, two, three = desk.document("a", 20, 13, alone=True) + desk.document("b", 17)
    desk.put(one, two, three)
    tier = DeviceTier(ROOM, desk.runner.device)
    desk.run(desk.plan(two), "none", device_tier=tier)
    plan = desk.plan(one, two, three)
    mixed, plain = desk.run(plan, "none", device_tier=tier), desk.run(plan, "none")
    assert [outcome.kv for outcome in mixed.outcomes] == ["ssd", "device", "ssd"]
    close(mixed.logits, plain.logits, 0.0)
    hot = desk.run(plan, "epic", 0.3, device_tier=tier)
    assert {outcome.kv for outcome in hot.outcomes} == {"device"}
    close(hot.logits, desk.run(plan, "epic", 0.3).logits, 0.0)


def test_a_chunk_found_damaged_on_the_way_is_not_kept(tmp_path):
    desk = Desk(tmp_path)
    one, two = desk.document("a", 20, 13, alone=True)
    desk.put(one, two)
    path = Path(desk.store.folder.entry_path(two.tokens.key))
    flip(path, 8 * (path.stat().st_size - 8192))
    tier = DeviceTier(ROOM, desk.runner.device)
    result = desk.run(desk.plan(one, two), "none", device_tier=tier)
    assert [outcome.kv for outcome in result.outcomes] == ["ssd", "computed"]
    assert one.tokens.key in tier
    assert two.tokens.key not in tier
    assert desk.run(desk.plan(one), "none", device_tier=tier).outcomes[0].kv == "device"


def test_a_prefill_given_up_halfway_keeps_nothing(tmp_path):
    desk = Desk(tmp_path)
    [one] = desk.document("a", 20)
    desk.put(one)
    tier = DeviceTier(ROOM, desk.runner.device)
    with torch.inference_mode():
        steps = desk.prefill(desk.plan(one), "none", device_tier=tier).run()
        next(steps)
        assert tier.nbytes
        steps.close()
    assert (len(tier), tier.nbytes) == (0, 0)
