"""Documents into collections, their chunks' KV into the store; what is computed, and what is not."""

from __future__ import annotations

import threading
import time

import pytest

from ragkv.errors import DocumentError, InputError, NotFoundError
from ragkv.retrievers import Document
from ragkv.types import DocumentIn
from tests.conftest import save_checkpoint
from tests.engine_kit import DOCUMENTS, QUESTION, Probe, document, in_threads, wait_idle
from tests.test_engine import check_report

ALL = {"top_k": 1000, "collection": "c", "max_tokens": 2}


def stored_files(engine) -> list:
    from pathlib import Path

    folder = engine._store.folder
    return [Path(folder.entry_path(key)) for key in folder.entry_keys()]


def test_the_report_says_what_was_done(engine):
    report = engine.ingest("c", DOCUMENTS)
    assert (report.added, report.replaced, report.unchanged, report.rejected) == (5, 0, 0, [])
    assert report.encoded == report.chunks == engine.cache_stats().entries > 20
    assert (report.reused, report.deferred, report.warnings) == (0, 0, [])
    assert engine.cache_check().ok


def test_the_second_time_nothing_is_computed(engine):
    first = engine.ingest("c", DOCUMENTS)
    probe = Probe(engine)
    again = engine.ingest("c", DOCUMENTS)
    assert probe.layers == []
    assert (again.unchanged, again.encoded, again.reused, again.kv_bytes_written) == (5, 0, first.chunks, 0)


def test_another_collection_shares_what_is_stored(engine):
    engine.ingest("c", DOCUMENTS)
    again = engine.ingest("d", DOCUMENTS)
    assert (again.added, again.encoded) == (5, 0)


def test_an_edit_computes_only_the_chunk_and_those_that_saw_it(engine):
    text = document("Ada", 30).text
    engine.ingest("c", [*DOCUMENTS[1:], Document("ada", text)])
    edited = Document("ada", text.replace("1929", "1729"))
    report = engine.ingest("c", [*DOCUMENTS[1:], edited])
    assert (report.unchanged, report.replaced) == (4, 1)
    assert report.encoded == 1
    early = Document("ada", text.replace("1910", "1710"))
    report = engine.ingest("c", [early])
    # The chunk itself, the one that is back at its first text (stored already), and at most three that see it.
    assert 1 < report.encoded <= 4
    assert report.encoded + report.reused == report.chunks


def test_equal_chunks_are_computed_once_and_the_report_adds_up(engine):
    twins = [Document(f"twin{i}", document("Ada").text) for i in range(3)]
    estimate = engine.estimate(twins)
    report = engine.ingest("c", twins)
    assert report.encoded * 3 == report.chunks
    assert report.encoded + report.reused + report.deferred == report.chunks
    assert report.kv_bytes_written == estimate.new_kv_bytes


@pytest.mark.parametrize("policy", ["document", "alone"])
def test_the_estimate_is_what_ingest_then_writes(make_engine, policy):
    engine = make_engine(context_policy=policy)
    probe = Probe(engine)
    estimate = engine.estimate(DOCUMENTS)
    assert probe.layers == []
    assert engine.cache_stats().entries == 0
    report = engine.ingest("c", DOCUMENTS)
    assert (estimate.documents, estimate.chunks) == (5, report.chunks)
    assert estimate.new_kv_bytes == estimate.kv_bytes == report.kv_bytes_written
    assert estimate.encode_tokens == sum(probe.layers) // 4
    again = engine.estimate(DOCUMENTS)
    assert (again.new_kv_bytes, again.encode_tokens, again.kv_bytes) == (0, 0, estimate.kv_bytes)


def test_lazy_documents_are_computed_at_first_use_and_stored_then(engine):
    report = engine.ingest("c", DOCUMENTS, encode="lazy")
    assert (report.encoded, report.deferred) == (0, report.chunks)
    assert engine.cache_stats().entries == 0
    first = engine.query(QUESTION, collection="c", top_k=5)
    check_report(first)
    assert {(c.kv, c.why) for c in first.chunks} == {("computed", "not stored yet")}
    wait_idle(engine)
    assert engine.cache_stats().entries == 5
    second = engine.query(QUESTION, collection="c", top_k=5, system="Behind something else.")
    check_report(second)
    assert {c.kv for c in second.chunks} <= {"ssd", "ram"}
    assert second.usage.cached_tokens > 0


def test_lazily_and_eagerly_computed_entries_are_the_same(make_engine, tmp_path):
    eager, lazy = make_engine(data_dir=tmp_path / "a"), make_engine(data_dir=tmp_path / "b")
    eager.ingest("c", DOCUMENTS[:2])
    lazy.ingest("c", DOCUMENTS[:2], encode="lazy")
    lazy.query(QUESTION, **ALL)
    wait_idle(lazy)
    assert {p.name for p in stored_files(eager)} == {p.name for p in stored_files(lazy)}
    answers = [engine.query(QUESTION, collection="c", top_k=20, method="none") for engine in (eager, lazy)]
    assert answers[0].text == answers[1].text
    assert answers[0].recomputed_share == answers[1].recomputed_share == 0


def test_a_chunk_asked_for_by_many_is_computed_once_in_the_background(engine):
    engine.ingest("c", DOCUMENTS, encode="lazy")
    for _ in range(3):
        list(engine.stream(QUESTION, collection="c", top_k=5, max_tokens=1))
    wait_idle(engine)
    assert engine.cache_stats().entries == 5


def test_bad_documents_are_listed_and_the_rest_goes_in(make_engine):
    engine = make_engine(max_document_bytes=2000)
    bad = [
        Document("empty", " \n\t"),
        Document("large", "x" * 2001),
        Document("surrogate", "a\ud800b"),
        Document("not json", "text", metadata={"a": object()}),
        Document("", "a text without a name"),
    ]
    report = engine.ingest("c", [bad[0], DOCUMENTS[0], *bad[1:], DOCUMENTS[1]])
    assert report.added == 2
    assert {r.document_id for r in report.rejected} == {d.id for d in bad}
    assert all(r.error == "document" and r.message for r in report.rejected)
    assert [info.id for info in engine.documents("c")] == ["ada", "bela"]
    assert report.encoded == report.chunks == engine.cache_stats().entries


@pytest.mark.parametrize("title", ["\ud800", "t" * 5000, ""])
def test_an_odd_title_costs_nothing_but_the_document(engine, title):
    report = engine.ingest("c", [Document("odd", "A text.", title), DOCUMENTS[0]])
    assert report.added + len(report.rejected) == 2
    engine.query("text?", collection="c")


def test_bad_documents_do_not_break_the_estimate(engine):
    estimate = engine.estimate([Document("a", ""), Document("b", "a\ud800b"), DOCUMENTS[0]])
    assert estimate.documents == 1


def test_only_bad_documents_are_an_error_and_leave_no_collection(engine):
    with pytest.raises(DocumentError, match="no text"):
        engine.ingest("c", [Document("a", ""), Document("b", " ")])
    assert engine.collections() == []


def test_documents_may_be_given_as_the_client_takes_them(engine):
    given = ["A text alone.", {"id": "d", "text": "A text.", "metadata": {"n": 1}}, DocumentIn(id="i", text="Another.")]
    assert engine.estimate(given).documents == 3
    report = engine.ingest("c", [*given, {"id": "bad", "txt": "x"}, 5])
    assert report.added == 3
    assert [info.id for info in engine.documents("c")][1:] == ["d", "i"]
    assert [(one.document_id, one.error) for one in report.rejected] == [("bad", "input"), ("documents[4]", "input")]
    assert "documents[3].txt" in report.rejected[0].message


@pytest.mark.parametrize("documents", ["a text", {"text": "a text"}, 5])
def test_what_is_no_list_of_documents_is_an_input_error(engine, documents):
    with pytest.raises(InputError, match="put a single one into a list"):
        engine.ingest("c", documents)
    assert engine.collections() == []


def test_nothing_is_nothing(engine):
    report = engine.ingest("c", [])
    assert (report.added, report.chunks, report.encoded) == (0, 0, 0)
    assert engine.estimate([]).kv_bytes == 0


def test_the_first_of_documents_with_one_id_stays_and_others_are_rejected_by_name(engine):
    said: list[tuple[str, int, int]] = []
    twins = [Document("a", "First text."), Document("a", "Second text."), Document("a", "First text.")]
    report = engine.ingest("c", twins, progress=lambda *step: said.append(step))
    assert (report.added, report.replaced, report.unchanged) == (1, 0, 1)
    [rejected] = report.rejected
    assert (rejected.document_id, rejected.error) == ("a", "document")
    assert "give each its own id" in rejected.message
    assert engine.document("c", "a").text == "First text."
    assert report.encoded + report.reused == report.chunks == 1
    assert [step for step in said if step[0] == "split"] == [("split", 2, 2)]


def test_a_document_that_cannot_be_used_keeps_no_other_of_its_id_out(engine):
    report = engine.ingest("c", [Document("a", " "), Document("a", "A text.")])
    assert (report.added, [one.document_id for one in report.rejected]) == (1, ["a"])
    assert engine.document("c", "a").text == "A text."


def test_progress_reaches_its_total_where_the_collection_refuses_a_document(engine):
    said: list[tuple[str, int, int]] = []
    bad = Document("not json", "text", metadata={"a": object()})
    engine.ingest("c", [DOCUMENTS[0], bad], progress=lambda *step: said.append(step))
    assert ("split", 2, 2) in said


def test_odd_unicode_survives(engine):
    text = "👩‍👩‍👧 e\u0301 \u202e <|im_end|> \x00 日本語。終わり。"
    engine.ingest("c", [Document("odd", text)])
    assert engine.document("c", "odd").text == text
    check_report(engine.query("日本語?", collection="c"))


def test_a_store_too_small_for_a_chunk_defers_it_and_still_answers(make_engine):
    engine = make_engine(store_bytes=2**20, ram_bytes=0, chunk_tokens=1024, context_tokens=0)
    big = [document("Ada", 50)]
    report = engine.ingest("c", big)
    assert (report.encoded, report.deferred) == (0, report.chunks)
    assert "raise store_bytes" in report.warnings[0]
    answer = engine.query(QUESTION, **ALL)
    check_report(answer)
    assert answer.recomputed_share == 1.0
    wait_idle(engine)
    assert engine.health().status == "ok"


def test_a_store_that_overflows_evicts_and_still_answers(make_engine):
    engine = make_engine(store_bytes=2**20, ram_bytes=0)
    report = engine.ingest("c", DOCUMENTS)
    stats = engine.cache_stats()
    assert stats.evictions > 0
    assert stats.bytes <= 2**20
    assert report.encoded == report.chunks
    for _ in range(2):
        answer = engine.query(QUESTION, **ALL)
        check_report(answer)
        assert {c.kv for c in answer.chunks} >= {"computed"}
        wait_idle(engine)
    assert engine.cache_check().ok


def test_draining_waits_until_what_a_question_missed_is_stored(make_engine, monkeypatch):
    engine = make_engine()
    encode_later = engine._ingestor.encode_later

    def late(spans):
        time.sleep(0.05)  # an answer of one token is over by then, if it may be
        encode_later(spans)

    monkeypatch.setattr(engine._ingestor, "encode_later", late)
    report = engine.ingest("c", DOCUMENTS[:2], encode="lazy")
    engine.query(QUESTION, **{**ALL, "max_tokens": 1})
    said: list[tuple[str, int, int]] = []
    assert engine.drain(progress=lambda *step: said.append(step))
    assert said[-1] == ("store", report.chunks, report.chunks)
    engine.close()
    assert make_engine().cache_stats().entries == report.chunks


def test_draining_ends_when_its_time_is_over_or_the_engine_closes(engine, monkeypatch):
    assert engine.drain(0.0), "nothing waits"
    engine.ingest("c", DOCUMENTS[:2], encode="lazy")
    go = threading.Event()
    put = engine._store.put
    monkeypatch.setattr(engine._store, "put", lambda *args, **fields: go.wait(20) and put(*args, **fields))
    engine.query(QUESTION, **ALL)
    assert not engine.drain(0.01)
    with in_threads(engine.drain, engine.close) as ended:
        go.set()
    assert ended == [True, None]


def test_a_cleared_store_fills_again(engine):
    engine.ingest("c", DOCUMENTS)
    before = engine.cache_stats().entries
    expected = engine.query(QUESTION, method="none", **ALL)
    assert engine.cache_clear() == before
    answer = engine.query(QUESTION, method="none", **ALL)
    check_report(answer)
    assert answer.recomputed_share == 1.0
    wait_idle(engine)
    assert engine.cache_stats().entries == before
    again = engine.query(QUESTION, method="none", **ALL)
    assert (again.text, again.recomputed_share) == (expected.text, 0.0)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_entries_are_computed_reported_and_replaced(make_engine, damage, caplog):
    engine = make_engine(ram_bytes=0)
    engine.ingest("c", DOCUMENTS[:3])
    fields = {**ALL, "method": "none", "max_tokens": 8}
    expected = engine.query(QUESTION, **fields)
    assert expected.recomputed_share == 0
    victim = sorted(stored_files(engine))[0]
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-5000] ^= 0x10
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    answer = engine.query(QUESTION, **fields)
    check_report(answer)
    [computed] = [c for c in answer.chunks if c.kv == "computed"]
    assert computed.why
    assert 0 < answer.recomputed_share < 1
    wait_idle(engine)
    healed = engine.query(QUESTION, **fields)
    assert {c.kv for c in healed.chunks} == {"ssd"}
    assert (healed.text, healed.recomputed_share) == (expected.text, 0.0)
    assert engine.cache_check().ok


def test_every_entry_damaged_at_once(make_engine):
    engine = make_engine(ram_bytes=0)
    engine.ingest("c", DOCUMENTS[:2])
    for path in stored_files(engine):
        data = bytearray(path.read_bytes())
        for at in range(4096, len(data), 1000):
            data[at] ^= 1
        path.write_bytes(data)
    answer = engine.query(QUESTION, **ALL)
    check_report(answer)
    assert answer.recomputed_share == 1.0
    assert answer.text == engine.query(QUESTION, method="full", **ALL).text


def test_deleting_a_document_removes_its_kv(engine):
    engine.ingest("c", DOCUMENTS[:1])
    kept = set(stored_files(engine))
    engine.ingest("c", DOCUMENTS)
    for doc in DOCUMENTS[1:]:
        engine.delete_document("c", doc.id)
    assert set(stored_files(engine)) == kept
    assert engine.cache_stats().entries == len(kept)
    answer = engine.query(QUESTION, **ALL)
    assert {c.document_id for c in answer.chunks} == {"ada"}
    with pytest.raises(NotFoundError):
        engine.delete_document("c", "bela")


def test_deleting_removes_kv_of_both_context_policies(engine):
    engine.ingest("c", DOCUMENTS[:1])
    engine.ingest("c", DOCUMENTS[:1], context_policy="alone")
    engine.delete_document("c", "ada")
    assert engine.cache_stats().entries == 0


def test_a_store_of_another_model_is_never_hit(make_engine, tmp_path):
    with make_engine() as first:
        report = first.ingest("c", DOCUMENTS[:2])
    other = save_checkpoint(tmp_path / "other", "llama", vocab_size=8192, max_position_embeddings=2048)
    engine = make_engine(model=str(other))
    assert engine.estimate(DOCUMENTS[:2]).new_kv_bytes > 0
    answer = engine.query(QUESTION, **ALL)
    check_report(answer)
    assert {(c.kv, c.why) for c in answer.chunks} == {("computed", "not stored yet")}
    wait_idle(engine)
    assert sorted(engine.cache_stats().entries_by_model.values()) == [report.chunks] * 2


def test_progress_covers_every_stage_and_reaches_its_total(engine):
    said: list[tuple[str, int, int]] = []
    report = engine.ingest("c", DOCUMENTS, progress=lambda *step: said.append(step))
    assert {stage for stage, _, _ in said} == {"split", "index", "encode"}
    for stage in ("split", "index", "encode"):
        done = max(d for s, d, _ in said if s == stage)
        assert done == next(t for s, _, t in said if s == stage)
    assert ("encode", report.chunks, report.chunks) in said


def test_a_failing_progress_callback_does_not_kill_the_engine(engine, monkeypatch):
    def broken(*_):
        raise RuntimeError("no encoding today")
        yield

    def progress(stage, *_):
        if stage == "encode":
            raise RuntimeError("no progress today")

    engine.ingest("c", DOCUMENTS[:1], progress=progress)
    monkeypatch.setattr("ragkv.encodings.encode", broken)
    report = engine.ingest("c", DOCUMENTS[1:], progress=progress)
    assert report.deferred == report.chunks
    assert "no encoding today" in report.warnings[0]
    monkeypatch.undo()
    assert engine.health().status == "ok"
    assert engine.query(QUESTION, collection="c").text


def test_filters_keep_a_document_out_of_answers(engine):
    engine.ingest("c", DOCUMENTS)
    answer = engine.query("Where did Ada move?", filters={"initial": {"$in": ["B", "C"]}}, **ALL)
    assert {c.document_id for c in answer.chunks} == {"bela", "cyro"}
    assert not any("Ada" in c.text for c in answer.chunks)
