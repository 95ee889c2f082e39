"""An engine whose stored KV is in fewer bytes."""

from __future__ import annotations

import pytest

from tests.engine_kit import DOCUMENTS, QUESTION, wait_idle

CODED = ["int8", "fp8"]


@pytest.mark.parametrize("codec", CODED)
def test_entries_shrink_and_the_estimate_says_so(make_engine, tmp_path, codec):
    raw = make_engine(data_dir=tmp_path / "raw", dtype="bfloat16").estimate(DOCUMENTS)
    engine = make_engine(dtype="bfloat16", kv_codec=codec)
    estimate = engine.estimate(DOCUMENTS)
    report = engine.ingest("c", DOCUMENTS)
    assert report.kv_bytes_written == estimate.new_kv_bytes
    assert 0.5 < estimate.new_kv_bytes / raw.new_kv_bytes < 0.75  # scales weigh more in a head of 16
    assert engine.cache_check().ok


@pytest.mark.parametrize("codec", CODED)
def test_answers_come_from_coded_entries(make_engine, codec):
    engine = make_engine(kv_codec=codec)
    engine.ingest("c", DOCUMENTS)
    reused = engine.query(QUESTION, collection="c", method="none")
    assert {source.kv for source in reused.sources} <= {"ram", "ssd"}
    assert reused.recomputed_share == 0


@pytest.mark.parametrize("codec", CODED)
def test_repairing_every_token_is_full_prefill(make_engine, codec):
    """Nothing of the codec's error is left where everything was computed again."""
    engine = make_engine(kv_codec=codec)
    documents = [{"id": d.id, "text": d.text} for d in DOCUMENTS]
    engine.query(QUESTION, documents=documents, method="none")
    wait_idle(engine)
    full = engine.query(QUESTION, documents=documents, method="full")
    repaired = engine.query(QUESTION, documents=documents, method="epic", ratio=1.0)
    assert {source.kv for source in repaired.sources} <= {"ram", "ssd"}
    assert repaired.recomputed_share == 1.0
    assert repaired.text == full.text


def test_another_codec_misses_and_stores_its_own(make_engine):
    make_engine().ingest("c", DOCUMENTS)
    engine = make_engine(kv_codec="int8")
    first = engine.query(QUESTION, collection="c", method="none")
    assert {source.kv for source in first.sources} == {"computed"}
    wait_idle(engine)
    again = engine.query(QUESTION, collection="c", method="none")
    assert {source.kv for source in again.sources} <= {"ram", "ssd"}
