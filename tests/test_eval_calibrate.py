"""Calibration: the cheapest setting that holds, what is asked, how answers are compared, what is written where."""

from __future__ import annotations

import io
import json
import os
import tomllib
from collections.abc import Callable, Generator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ragkv import cli, selection
from ragkv.blend import Blend, Start
from ragkv.calibrated import Calibration
from ragkv.checkpoint import load_checkpoint
from ragkv.config import Settings, load_settings
from ragkv.errors import ConfigError, InputError, ModelError, NotAModelError, NotFoundError, RagkvError, StoreFullError
from ragkv.eval import calibrate as calibration
from ragkv.eval.calibrate import Result, Wish, calibrate
from ragkv.eval.calibrate_show import plot, show
from ragkv.eval.choice import PILOT, Candidate, Finding, Mark, Search, grid, loss_interval, questions_needed
from ragkv.eval.compared import Compared
from ragkv.eval.config_edit import edit
from ragkv.eval.corpus import Corpus
from ragkv.eval.probes import Probe, continuations, read_probes, sensible, written
from ragkv.retrievers import Chunk
from tests.conftest import save_checkpoint
from tests.engine_kit import DOCUMENTS, QUESTION

SIZES = {"raw": 1.0, "int8": 0.52, "fp8": 0.51}
RECORD: dict[str, Any] = {
    "model": "m",
    "fingerprint": "f",
    "date": date(2026, 11, 23),
    "method": "question",
    "ratio": 0.3,
    "kv_codec": "int8",
    "context_policy": "document",
    "chunk_tokens": 128,
    "recomputed_share": 0.29,
    "wanted_loss": 0.01,
    "loss": 0.0,
    "loss_interval": (0.0, 0.0095),
    "proven": True,
    "questions": 400,
    "asked": "given",
}


def _silent(stage: str, done: int, total: int) -> None:
    return


# The search, on synthetic measurements

Loses = Callable[[Candidate, int], float]


def _search(
    loses: Loses,
    questions: int = 400,
    wanted: float = 0.01,
    methods: tuple[str, ...] = ("none", "good", "bad"),
    kl: Callable[[Candidate], float] = lambda candidate: 0.0,
) -> tuple[Finding, list[tuple[Candidate, int]]]:
    """What is found where a candidate loses ``loses`` on a question, and what was asked for it."""
    asked: list[tuple[Candidate, int]] = []

    def measure(candidate: Candidate, question: int) -> Mark:
        asked.append((candidate, question))
        return Mark(1.0 - loses(candidate, question), 1.0, kl(candidate), candidate.ratio)

    search = Search(measure, questions, wanted, bytes_share=SIZES, say=_silent)
    return search.run(grid(methods, calibration.RATIOS)), asked


def _good_from(ratio: float, codecs: tuple[str, ...] = ("raw", "int8", "fp8")) -> Loses:
    """``good`` loses nothing from ``ratio`` on, everything else a tenth of the questions."""

    def loses(candidate: Candidate, question: int) -> float:
        fine = candidate.method == "good" and candidate.ratio >= ratio and candidate.codec in codecs
        return float(not fine and question % 10 == 3)

    return loses


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.5])
def test_the_cheapest_setting_that_holds_is_chosen(ratio: float) -> None:
    finding, _ = _search(_good_from(ratio, ("raw",)))
    assert finding.chosen is not None
    assert finding.chosen.candidate == Candidate("good", ratio)
    assert finding.proven


def test_plain_reuse_is_chosen_where_it_holds() -> None:
    finding, _ = _search(lambda candidate, question: 0.0)
    assert finding.chosen is not None
    assert finding.chosen.candidate == Candidate("none", 0.0, "fp8")


def test_of_those_that_cost_the_same_the_closest_to_full_prefill_is_chosen() -> None:
    finding, _ = _search(
        lambda candidate, question: float(candidate.ratio < 0.1 and question % 10 == 3),
        kl=lambda candidate: 0.1 if candidate.method == "good" else 0.2,
        methods=("bad", "good", "worse"),
    )
    assert finding.chosen is not None
    assert finding.chosen.candidate[:2] == ("good", 0.1)


@pytest.mark.parametrize(
    ("hold", "codec"), [(("raw",), "raw"), (("raw", "int8"), "int8"), (("raw", "int8", "fp8"), "fp8")]
)
def test_fewer_bytes_are_chosen_where_they_hold_too(hold: tuple[str, ...], codec: str) -> None:
    finding, _ = _search(_good_from(0.2, hold))
    assert finding.chosen is not None
    assert finding.chosen.candidate == Candidate("good", 0.2, codec)


def test_bytes_never_outweigh_the_recomputed_share() -> None:
    """int8 would hold at half the ratio already, if it were asked: shares are settled without it."""
    finding, asked = _search(_good_from(0.2))
    assert finding.chosen is not None
    assert finding.chosen.candidate.ratio == 0.2
    assert {candidate.ratio for candidate, _ in asked if candidate.codec != "raw"} == {0.2}


def test_what_harms_is_rejected_whatever_it_costs() -> None:
    finding, _ = _search(lambda candidate, question: float(candidate.method != "none"))
    assert finding.chosen is not None
    assert finding.chosen.candidate.method == "none"


def test_nothing_that_holds_is_no_choice() -> None:
    finding, asked = _search(lambda candidate, question: float(question % 20 == 3))
    assert finding.chosen is None
    assert not any(tally.complete for tally in finding.tallies)
    assert len(asked) < 0.25 * 400 * len(finding.tallies)


def test_a_loss_within_the_wish_by_estimate_alone_is_chosen_only_where_nothing_is_proven() -> None:
    def loses(candidate: Candidate, question: int) -> float:
        cheap = candidate.ratio < 0.3
        return float(question in (7, 19, 101) and cheap) or float(candidate.ratio < 0.1 and question % 10 == 3)

    finding, _ = _search(loses)  # 3 of 400 are within 1%, and up to 2.2% are likely
    assert finding.proven
    assert finding.chosen is not None
    assert finding.chosen.candidate.ratio == 0.3
    finding, _ = _search(lambda c, q: loses(c._replace(ratio=min(c.ratio, 0.1)), q))
    assert not finding.proven
    assert finding.chosen is not None
    assert finding.chosen.candidate.ratio == 0.1
    assert finding.chosen.loss == pytest.approx(3 / 400)


def test_too_few_questions_prove_nothing_and_one_loss_is_too_much() -> None:
    finding, _ = _search(_good_from(0.1), questions=20)
    assert not finding.proven
    assert finding.chosen is not None
    assert finding.chosen.candidate[:2] == ("good", 0.1)
    assert finding.chosen.interval == (0.0, pytest.approx(0.161, abs=1e-3))
    finding, _ = _search(lambda candidate, question: float(question == 17), questions=20)
    assert finding.chosen is None
    finding, _ = _search(lambda candidate, question: float(question == 17), questions=20, wanted=0.05)
    assert finding.chosen is not None


def test_losses_may_be_parts_of_a_question() -> None:
    finding, _ = _search(lambda candidate, question: 0.02 if candidate.ratio < 0.2 else 0.001, questions=1000)
    assert finding.chosen is not None
    assert finding.chosen.candidate.ratio == 0.2
    assert finding.chosen.loss == pytest.approx(0.001)


def test_giving_up_early_changes_no_result() -> None:
    """The same choice as of one who asks every candidate everything, over worlds of losses."""
    for seed in range(20):
        draws = torch.rand((8, 60), generator=torch.Generator().manual_seed(seed))
        rates = {ratio: 0.12 * (1 - 2 * ratio) for ratio in (0.0, *calibration.RATIOS)}

        def loses(candidate: Candidate, question: int, draws=draws, rates=rates) -> float:
            row = list(rates).index(candidate.ratio)
            return float(draws[row, question] < rates[candidate.ratio])

        finding, asked = _search(loses, questions=60, wanted=0.05, methods=("good",))
        means = {c: sum(loses(c, q) for q in range(60)) / 60 for c in grid(["good"], calibration.RATIOS)}
        proven = [c for c, mean in means.items() if loss_interval(60 * mean, 60)[1] <= 0.05]
        likely = [c for c, mean in means.items() if mean <= 0.05]
        expected = min(proven or likely, key=lambda c: c.ratio, default=None)
        assert (finding.chosen and finding.chosen.candidate[:2]) == (expected and expected[:2])
        assert len(set(asked)) == len(asked)


def test_a_given_up_candidate_counts_for_no_less_than_it_lost() -> None:
    finding, _ = _search(lambda candidate, question: float(candidate.ratio < 0.5 and question in range(100, 120)))
    for tally in finding.tallies:
        if not tally.complete and tally.lost:
            assert tally.loss >= tally.lost / 400
            assert tally.interval[0] <= tally.loss <= tally.interval[1]
            assert len(tally.sample) == PILOT


def test_intervals_and_how_many_questions_a_proof_takes() -> None:
    assert loss_interval(0, 400)[1] < 0.01 < loss_interval(0, 380)[1]
    assert questions_needed(0.01) == 381
    assert questions_needed(0.05) == 73
    assert questions_needed(0.0) is None


def test_a_repair_of_nothing_is_tried_once() -> None:
    candidates = grid(("none", "epic", "hkvd"), (0.0, 0.1, 0.2))
    assert candidates == [
        Candidate("none", 0.0),
        *(Candidate(method, ratio) for ratio in (0.1, 0.2) for method in ("epic", "hkvd")),
    ]


# What is asked


def _write(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_questions_one_a_line(tmp_path: Path) -> None:
    path = _write(tmp_path, "q.txt", "\ufeffWho is Ada?\n\n  Where is Bela? \n")
    assert read_probes(path) == [Probe("Who is Ada?"), Probe("Where is Bela?")]


def test_questions_with_answers(tmp_path: Path) -> None:
    lines = [
        {"question": "a?", "answers": ["1", "one"]},
        {"question": "b?", "answer": "2", "kind": "x"},
        {"question": "c?"},
    ]
    path = _write(tmp_path, "q.jsonl", "\n".join(map(json.dumps, lines)))
    assert read_probes(path) == [Probe("a?", ("1", "one")), Probe("b?", ("2",)), Probe("c?")]


@pytest.mark.parametrize(
    ("name", "text", "tells"),
    [
        ("q.txt", " \n\n", "no questions"),
        ("q.jsonl", '{"question": "a?"}\nWho?', "line 2: not valid JSON"),
        ("q.jsonl", '{"query": "a?"}', 'line 1: there is no "question"; a line must be'),
        ("q.jsonl", '["a?"]', "line 1: a JSON object is needed, not list"),
        ("q.jsonl", '{"question": " "}', "blank"),
        ("q.jsonl", '{"question": "a?", "answers": [3]}', "must be text"),
    ],
)
def test_a_question_file_that_cannot_be_used_says_where(tmp_path: Path, name: str, text: str, tells: str) -> None:
    with pytest.raises(InputError, match=tells):
        read_probes(_write(tmp_path, name, text))


def test_a_question_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path / "q.txt", tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(InputError, match="cannot read questions"):
            read_probes(path)


TEXT = "The lighthouse of Zorwick was built by Ada Kirwood in 1871."


@pytest.mark.parametrize(
    ("reply", "question"),
    [
        ("Who built the lighthouse of Zorwick?", "Who built the lighthouse of Zorwick?"),
        ('  "Who built the lighthouse?"\n', "Who built the lighthouse?"),
        ("Ada Kirwood", None),
        ("Who built it?", None),  # too few words, and none of the text's
        ("What is the capital of France?", None),
        ("Sure! Here is one:\nWho built the lighthouse of Zorwick?", None),
        ("Who built the lighthouse of Zorwick", None),
        ("", None),
    ],
)
def test_what_counts_as_a_question_about_a_text(reply: str, question: str | None) -> None:
    assert sensible(reply, TEXT) == question


def _chunks(texts: list[str]) -> list[Chunk]:
    return [Chunk(f"d#{i}", "d", i, text) for i, text in enumerate(texts)]


def test_questions_the_model_writes() -> None:
    chunks = _chunks([f"Harbour number {i} lies in Zorwick." for i in range(20)])
    found = written(
        chunks, lambda message: f"What is known of harbour {message.split()[2]} there?", 9, lambda done: None
    )
    assert [probe.source for probe in found] == [f"d#{i}" for i in range(9)]
    assert len({probe.question for probe in found}) == 9


def test_a_model_that_writes_no_questions_is_soon_left_alone() -> None:
    for reply in ("owl", "What is known of harbour things there?"):  # nonsense, or the same to everything
        asked: list[str] = []

        def write(message: str, asked: list[str] = asked, reply: str = reply) -> str:
            asked.append(message)
            return reply

        chunks = _chunks([f"Harbour number {i} lies in Zorwick." for i in range(50)])
        assert written(chunks, write, 10, lambda done: None) == []
        assert len(asked) < 10


def test_sentences_are_cut_in_the_middle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_checkpoint(str(tiny_checkpoint), device="cpu", cache_dir=tmp_path).tokenizer
    first = "The lighthouse of Zorwick was built by Ada Kirwood in the year 1871. Short one."
    chunks = _chunks([first, "Bela moved to house number 17 by the river in the year 1903, and stayed there."])
    probes = list(continuations(chunks, tokenizer, 5))
    assert [probe.source for probe in probes] == ["d#0", "d#1"]
    for probe, chunk in zip(probes, chunks, strict=True):
        assert chunk.text.startswith(tokenizer.decode((*probe.ids, *probe.rest)))
        assert probe.question == tokenizer.decode(probe.ids)
        assert len(probe.rest) == 5
    assert probes == list(continuations(chunks, tokenizer, 5))


# Answers beside full prefill's, of a real model


@pytest.fixture
def settings(tiny_checkpoint: Path, tmp_path: Path) -> Settings:
    return load_settings(
        model=str(tiny_checkpoint),
        device="cpu",
        dtype="float32",
        data_dir=tmp_path / "data",
        chunk_tokens=48,
        context_tokens=96,
        store_bytes=2**26,
        ram_bytes=2**22,
        top_k=4,
    )


@pytest.fixture
def compared(settings: Settings, tmp_path: Path) -> Generator[Callable[..., Compared]]:
    checkpoint = load_checkpoint(settings.model, device="cpu", dtype="float32", cache_dir=tmp_path)
    with Corpus(settings, checkpoint, tmp_path / "corpus", room=6) as corpus:
        corpus.add(DOCUMENTS, _silent)
        yield lambda *probes: Compared(corpus, checkpoint, probes, room=6)


@pytest.fixture
def sentence(tiny_checkpoint: Path, tmp_path: Path) -> Probe:
    tokenizer = load_checkpoint(str(tiny_checkpoint), device="cpu", cache_dir=tmp_path).tokenizer
    ids = tokenizer.plain("In the year 1903 Bela moved to house number 21 by the river.")
    return Probe("In the year 1903 Bela moved", ids=ids[:8], rest=ids[8:14])


def test_repairing_everything_agrees_with_full_prefill(compared: Callable[..., Compared], sentence: Probe) -> None:
    both = compared(Probe(QUESTION), sentence)
    for number in range(2):
        mark = both.mark(Candidate("epic", 1.0), number)
        assert (mark.agreement, mark.tokens, mark.right) == (1.0, 1.0, None)
        assert mark.kl < 1e-6
        assert mark.share <= 1.0


def test_reuse_and_codecs_are_told_apart_by_divergence(compared: Callable[..., Compared]) -> None:
    one = compared(Probe(QUESTION))
    reuse = one.mark(Candidate("none", 0.0), 0)
    coded = one.mark(Candidate("none", 0.0, "int8"), 0)
    assert reuse.share == 0.0
    assert reuse.kl > 1e-5
    assert coded.kl != reuse.kl
    assert coded.kl == pytest.approx(reuse.kl, rel=0.5)


def test_deviations_are_what_hkvd_selects_by(
    compared: Callable[..., Compared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """None at the first layer, whose values are the tokens' own."""
    one, scores = compared(Probe(QUESTION)), list[torch.Tensor]()
    take = Blend.take

    def watched(blend: Blend, each: torch.Tensor) -> torch.Tensor:
        scores.append(each[blend.repairable].double())
        return take(blend, each)

    monkeypatch.setattr(Blend, "take", watched)
    one.mark(Candidate("hkvd", 0.2), 0)
    deviations = one.deviations(0)
    assert float(deviations[0].max()) < 1e-9
    assert float(deviations[1].mean()) > 1e-3
    torch.testing.assert_close(deviations[1] / deviations[1].sum(), scores[0] / scores[0].sum(), rtol=1e-4, atol=1e-6)


def test_an_answer_is_generated_to_its_end_where_it_leaves_full_prefills(
    compared: Callable[..., Compared], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A blend that answers otherwise is what a greedy run over it says, token by token."""
    monkeypatch.setitem(selection.STRATEGIES, "harm", _harm)
    one = compared(Probe(QUESTION))
    wrong = one.mark(Candidate("harm", 0.2), 0)
    assert (wrong.agreement, wrong.right) == (0.0, None)
    texts: list[str] = []
    monkeypatch.setattr("ragkv.eval.compared.same_answer", lambda one, two: bool(texts.append(one)))
    again = one.mark(Candidate("harm", 0.2), 0)
    assert again == wrong
    accepted = compared(Probe(QUESTION, answers=(texts[0],)))
    assert accepted.mark(Candidate("harm", 0.2), 0)[0] == 1.0
    assert not accepted.right(0)
    assert accepted.mark(Candidate("harm", 0.2), 0).right


def test_a_store_too_small_for_one_prompt_is_an_error(settings: Settings, tmp_path: Path) -> None:
    small = settings.model_copy(update={"store_bytes": 2**17})
    checkpoint = load_checkpoint(settings.model, device="cpu", dtype="float32", cache_dir=tmp_path)
    with Corpus(small, checkpoint, tmp_path / "corpus", room=6) as corpus:
        corpus.add(DOCUMENTS, _silent)
        with pytest.raises(StoreFullError, match="store_bytes"):
            Compared(corpus, checkpoint, [Probe(QUESTION)], room=6).mark(Candidate("none", 0.0), 0)


# The whole


def _harm(blend: Blend) -> Generator[None, None, Start]:
    """Answers from something else than was asked."""
    start = yield from selection.none(blend)  # the true one
    start.rows.hidden = -start.rows.hidden.roll(7, dims=1)
    return start


def _helps_from_a_fifth(blend: Blend) -> Generator[None, None, Start]:
    if blend.ratio < 0.2:
        return (yield from _harm(blend))
    blend.ratio = 1.0
    return (yield from selection.epic(blend))


@pytest.fixture
def rigged(monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = {"none": _harm, "random": _harm, "epic": _helps_from_a_fifth}
    monkeypatch.setattr(calibration, "RATIOS", (0.1, 0.2, 0.5))
    monkeypatch.setattr(calibration, "STRATEGIES", strategies)
    for name, strategy in strategies.items():
        monkeypatch.setitem(selection.STRATEGIES, name, strategy)


QUESTIONS = [Probe(f"Where did {name} move in {year}?") for name in ("Ada", "Bela", "Cyro") for year in (1903, 1907)]


@pytest.mark.usefixtures("rigged")
def test_strategies_that_harm_are_rejected_and_the_first_that_does_not_is_chosen(settings: Settings) -> None:
    result = calibrate(settings, DOCUMENTS, Wish(probes=QUESTIONS, room=4), say=_silent)
    assert (result.values["method"], result.values["ratio"]) == ("epic", 0.2)
    assert result.calibration.loss == 0.0
    assert not result.calibration.proven
    assert any("6 questions are too few" in warning for warning in result.warnings)
    harmed = [row for row in result.rows if row["method"] != "epic" or row["ratio"] < 0.2]
    assert len(harmed) == 1 + 3 + 1
    assert min(row["loss"] for row in harmed) > 0.5
    assert [row["chosen"] for row in result.rows].count(True) == 1
    assert list(settings.data_dir.glob("calibrate-*")) == []


def test_nothing_within_the_loss_recommends_full(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RATIOS", (0.5,))
    monkeypatch.setattr(calibration, "STRATEGIES", {"none": _harm, "epic": _harm})
    monkeypatch.setitem(selection.STRATEGIES, "none", _harm)
    monkeypatch.setitem(selection.STRATEGIES, "epic", _harm)
    result = calibrate(settings, DOCUMENTS, Wish(probes=QUESTIONS, room=4), say=_silent)
    assert result.values == {"method": "full", "check_layer": 1}
    assert result.calibration.recomputed_share == 1.0
    assert any("no setting stays within" in warning for warning in result.warnings)
    assert not any(row["chosen"] for row in result.rows)


def test_a_model_that_writes_no_questions_continues_sentences(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "RATIOS", (0.5,))
    result = calibrate(settings, DOCUMENTS, Wish(limit=4, room=4, loss=0.9), say=_silent)
    assert result.asked == "continued"
    assert result.calibration.questions == 4
    assert any("--questions" in warning for warning in result.warnings)
    assert result.calibration.asked == "continued"
    assert result.full_right is None


def test_questions_the_model_wrote_are_asked_as_such(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RATIOS", (0.5,))
    words = {"Ada": 0, "Bela": 0, "Cyro": 0, "Dara": 0, "Enno": 0}

    def write(scribe: object, message: str) -> str:
        name = next(name for name in words if name in message)
        words[name] += 1
        return f"Where did {name} move in the year 19{words[name]:02}?"

    monkeypatch.setattr("ragkv.eval.compared.Scribe.__call__", write)
    result = calibrate(settings, DOCUMENTS, Wish(limit=3, room=4, loss=0.9), say=_silent)
    assert (result.asked, result.calibration.questions) == ("written", 3)


def test_a_model_whose_kv_cannot_be_reused_has_nothing_to_calibrate(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "dynamic").mkdir()
    model = save_checkpoint(tmp_path / "dynamic", "llama-dynamic", vocab_size=8192)
    with pytest.raises(ModelError, match=r"nothing to calibrate.*dynamic"):
        calibrate(settings.model_copy(update={"model": str(model)}), DOCUMENTS, Wish(probes=QUESTIONS), say=_silent)


def test_questions_that_find_nothing_are_left_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RATIOS", (0.5,))
    bm25 = settings.model_copy(update={"retrieval": "bm25"})
    probes = [Probe("xyzzy"), *QUESTIONS[:2], Probe("Bela " * 3000)]
    result = calibrate(bm25, DOCUMENTS, Wish(probes=probes, room=4, loss=0.9), say=_silent)
    assert result.calibration.questions == 2
    assert any("2 questions were left out" in warning for warning in result.warnings)
    with pytest.raises(InputError, match="none of the questions finds"):
        calibrate(bm25, DOCUMENTS, Wish(probes=[Probe("xyzzy")], room=4), say=_silent)


# The configuration


def test_editing_keeps_what_people_wrote(tmp_path: Path) -> None:
    path = _write(
        tmp_path,
        "ragkv.toml",
        '# mine\r\nmodel = "x"  # small\r\nratio = 0.2 # why\r\n\r\n[calibration]\r\nmodel = "old"\r\n',
    )
    path.chmod(0o640)
    edit(path, {"method": "question", "ratio": 0.3, "calibration": {"model": "new", "date": date(2026, 11, 23)}})
    text = path.read_bytes().decode()
    assert text.startswith('# mine\r\nmodel = "x"  # small\r\nratio = 0.3 # why\r\n')
    assert tomllib.loads(text) == {
        "model": "x",
        "ratio": 0.3,
        "method": "question",
        "calibration": {"model": "new", "date": date(2026, 11, 23)},
    }
    assert path.stat().st_mode & 0o777 == 0o640
    assert os.listdir(tmp_path) == ["ragkv.toml"]


def test_a_new_file_and_a_link(tmp_path: Path) -> None:
    edit(tmp_path / "new.toml", {"method": "none"})
    (tmp_path / "link.toml").symlink_to("new.toml")
    edit(tmp_path / "link.toml", {"top_k": 3})
    assert (tmp_path / "link.toml").is_symlink()
    assert tomllib.loads((tmp_path / "new.toml").read_text()) == {"method": "none", "top_k": 3}


def test_an_interrupted_edit_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path, "ragkv.toml", "top_k = 3\n")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        edit(path, {"top_k": 4})
    assert path.read_text() == "top_k = 3\n"
    assert os.listdir(tmp_path) == ["ragkv.toml"]


def test_files_that_cannot_be_edited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not valid TOML"):
        edit(_write(tmp_path, "bad.toml", "top_k = = 3"), {"top_k": 4})
    with pytest.raises(ConfigError, match="no folder"):
        edit(tmp_path / "nowhere" / "ragkv.toml", {"top_k": 4})
    with pytest.raises(ConfigError, match="cannot read"):
        edit(tmp_path, {"top_k": 4})


def test_a_record_fits_its_model_and_setting_only() -> None:
    record = Calibration(**RECORD)
    fitting = load_settings(method="question", ratio=0.3, kv_codec="int8")
    assert record.doubt("f", fitting) is None
    assert "another model (m" in str(record.doubt("other", fitting))
    for name, value in (
        ("method", "epic"),
        ("ratio", 0.1),
        ("kv_codec", "raw"),
        ("context_policy", "alone"),
        ("chunk_tokens", 64),
    ):
        doubt = record.doubt("f", fitting.model_copy(update={name: value}))
        assert name in str(doubt)
        assert repr(value) in str(doubt)
    indifferent = Calibration(**RECORD | {"method": "none"})
    assert indifferent.doubt("f", fitting.model_copy(update={"method": "none", "ratio": 0.9})) is None
    compares = Calibration(**RECORD | {"method": "hkvd", "check_layer": 2})
    for layer, fits in ((2, True), (1, False)):
        other = fitting.model_copy(update={"method": "hkvd", "check_layer": layer})
        assert (compares.doubt("f", other) is None) == fits
    assert "400 questions (given): loss against full prefill 0.0% [0.0%, 0.9%" in str(record)
    assert "not certain" in str(Calibration(**RECORD | {"proven": False}))


# The command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    for document in DOCUMENTS:
        (tmp_path / "docs" / f"{document.id}.txt").write_text(document.text, encoding="utf-8")
    _write(tmp_path, "q.txt", "\n".join(probe.question for probe in QUESTIONS))
    return tmp_path


def _run(settings: Settings, *arguments: str) -> Any:
    names = ("device", "dtype", "chunk_tokens", "context_tokens", "store_bytes", "ram_bytes", "top_k")
    sets = [part for name in names for part in ("--set", f"{name}={getattr(settings, name)}")]
    model = () if "--model" in arguments else ("--model", settings.model)
    command = ["calibrate", *arguments, *model, "--data-dir", str(settings.data_dir), *sets]
    return CliRunner().invoke(cli.app, command)


@pytest.mark.usefixtures("rigged")
def test_calibrated_is_what_the_engine_then_says_it_is(
    settings: Settings, folder: Path, make_engine: Any, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("matplotlib")
    _write(folder, "ragkv.toml", f'# mine\nchunk_tokens = 48 # small\ndata_dir = "{settings.data_dir}"\n')
    result = _run(settings, "-d", "docs", "--questions", "q.txt", "--tokens", "4", "--plot", "loss.png", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["settings"]["method"] == "epic"
    assert (folder / "loss.png").stat().st_size > 10_000
    text = (folder / "ragkv.toml").read_text()
    assert text.startswith("# mine\nchunk_tokens = 48 # small\n")
    written_settings = load_settings()
    assert written_settings.calibration == Calibration(**report["calibration"])
    configured = {name: getattr(written_settings, name) for name in ("method", "ratio", "kv_codec", "calibration")}

    health = make_engine(chunk_tokens=48, **configured).health()
    assert health.calibrated
    assert "6 questions (given): loss against full prefill 0.0%" in health.calibration

    (folder / "other").mkdir()
    other = save_checkpoint(folder / "other", "llama", vocab_size=8192)
    caplog.clear()
    health = make_engine(model=str(other), data_dir=folder / "b", chunk_tokens=48, **configured).health()
    assert not health.calibrated
    assert "of another model" in health.calibration
    assert "of another model" in caplog.text


def test_without_a_calibration_the_engine_says_so(engine: Any) -> None:
    health = engine.health()
    assert not health.calibrated
    assert "ragkv calibrate" in health.calibration


def test_what_people_see(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "RATIOS", (0.5,))
    _write(folder, "docs/empty.md", " ")
    result = _run(settings, "-d", "docs", "--questions", "q.txt", "--tokens", "4", "--out", "new.toml", "--loss", "0.9")
    assert result.exit_code == 0, result.output
    assert "rejected: empty.md holds no text" in result.stdout
    assert "method = " in result.stdout
    assert "recomputed, " in result.stdout
    assert "6 questions given" in result.stdout
    assert "written to new.toml" in result.stdout
    assert not (folder / "ragkv.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["-d", "nowhere"], NotFoundError),
        (["-d", "empty"], InputError),
        (["-d", "docs", "--questions", "nowhere.txt"], InputError),
        (["-d", "docs", "--questions", "blank.txt"], InputError),
        (["-d", "docs", "--out", "nowhere/ragkv.toml"], ConfigError),
        (["-d", "docs", "--out", "bad.toml"], ConfigError),
        (["-d", "docs", "--plot", "loss.xyz"], InputError),
        (["-d", "docs", "--plot", "nowhere/loss.png"], InputError),
    ],
)
def test_bad_input_is_told_before_the_model_is_loaded(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], error: type[RagkvError]
) -> None:
    (folder / "empty").mkdir()
    _write(folder, "blank.txt", "\n")
    _write(folder, "bad.toml", "= 1")
    monkeypatch.setattr(calibration, "load_checkpoint", lambda *_, **__: pytest.fail("too late"))
    result = _run(settings, *arguments)
    assert isinstance(result.exception, error), result.output
    assert result.exception.message


@pytest.mark.parametrize("arguments", [["--loss", "1.5"], ["--loss", "-1"], ["--limit", "0"], ["--tokens", "0"]])
def test_numbers_out_of_range_are_refused(settings: Settings, folder: Path, arguments: list[str]) -> None:
    assert _run(settings, "-d", "docs", *arguments).exit_code == 2


def test_an_unknown_model_is_told_before_the_documents_are_read_in(settings: Settings, folder: Path) -> None:
    result = _run(settings, "-d", "docs", "--model", "./no-model")
    assert isinstance(result.exception, NotAModelError)
    assert not (folder / "ragkv.toml").exists()


def test_an_interrupted_calibration_leaves_nothing(
    settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[int] = []

    def mark(compared: Compared, candidate: Candidate, number: int) -> Mark:
        marks.append(number)
        if len(marks) == 20:
            raise KeyboardInterrupt
        return Mark(1.0, 1.0, 0.0, 0.1)

    monkeypatch.setattr(Compared, "mark", mark)
    before = _write(folder, "ragkv.toml", "# mine\n").read_text()
    assert _run(settings, "-d", "docs", "--questions", "q.txt", "--plot", "loss.png").exit_code != 0
    assert len(marks) == 20
    assert (folder / "ragkv.toml").read_text() == before
    assert not (folder / "loss.png").exists()
    assert list(settings.data_dir.glob("calibrate-*")) == []


def test_a_table_and_a_plot_of_whatever_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    finding, _ = _search(_good_from(0.1), kl=lambda candidate: float("inf") if candidate.method == "bad" else 0.1)
    rows = [calibration._row(tally, finding) for tally in finding.tallies]
    result = Result(Calibration(**RECORD), "given", rows, ["a note"], None)
    json.dumps(result.to_json(), allow_nan=False)
    shown = io.StringIO()
    show(Console(file=shown, width=80), result)
    assert "a note" in shown.getvalue()
    assert "→ good   0.10    fp8" in shown.getvalue()
    plot(result, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").stat().st_size > 10_000
