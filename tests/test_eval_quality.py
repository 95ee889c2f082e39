"""The quality yardstick: what is asked, that shortcuts change no answer, intervals, rows, table and plot."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ragkv.config import Settings, load_settings
from ragkv.errors import InputError, MissingExtraError, NotAModelError, PromptTooLongError, RagkvError
from ragkv.eval import cases, jobs
from ragkv.eval.asker import Bench, Mark, Marks, Setting
from ragkv.eval.branches import generate_all, slots_behind
from ragkv.eval.cases import Draw, draw_cases, groups, in_order, neighbour
from ragkv.eval.cli import app
from ragkv.eval.quality import grid, measure_quality
from ragkv.eval.quality_plot import plot
from ragkv.eval.quality_rows import read_rows, with_score
from ragkv.eval.quality_table import show
from ragkv.eval.score import paired_interval, rows_of, wilson
from ragkv.eval.worlds import KINDS, WorldDocument, make_world
from ragkv.pipeline import DEFAULT_STRATEGY
from ragkv.plan import make_plan
from tests.blend_kit import BOS, Desk, token_ids

DRAW = Draw(limit=14, size=12, context_tokens=None, seed=0, split="test")


def _words(document: WorldDocument) -> int:
    return sum(len(chunk.split()) for chunk in document.chunks)


def _silent(stage: str, done: int, total: int) -> None:
    return


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(data_dir=tmp_path, dtype="float32", device="cpu", threads=1)


# What is asked


def test_kinds_are_asked_in_equal_numbers_and_never_more_than_two_of_a_world() -> None:
    drawn = draw_cases(Draw(30, 12, None, 0, "test"), _words)
    kinds = Counter(question.kind for case in drawn for question in case.questions)
    assert kinds == {kind: 4 + (i < 2) for i, kind in enumerate(KINDS)}
    assert max(max(Counter(q.kind for q in case.questions).values()) for case in drawn) == 2
    assert drawn == draw_cases(Draw(30, 12, None, 0, "test"), _words)


def test_questions_with_a_neighbour_to_miss() -> None:
    drawn = draw_cases(Draw(14, 12, None, 0, "test", neighbours=True), _words)
    for case in drawn:
        for away, questions in groups(case, "neighbour-missing"):
            assert away is not None
            for question in questions:
                assert neighbour(question) == away
                assert (away[0], away[1] + 1) in question.evidence
    assert sum(len(case.questions) for case in drawn) == 14


@pytest.mark.parametrize(("tokens", "most"), [(1000, 1300), (6000, 6000)])
def test_contexts_grow_to_about_the_tokens_asked_for(tokens: int, most: int) -> None:
    for case in draw_cases(Draw(14, 12, tokens, 0, "dev"), _words):
        assert 0.9 * tokens < sum(map(_words, case.documents)) <= most
        held = {(d.id, number) for d in case.documents for number in range(len(d.chunks))}
        assert held.issuperset(place for question in case.questions for place in question.evidence)


def test_worlds_without_a_kind_are_an_error_and_no_endless_search(monkeypatch: pytest.MonkeyPatch) -> None:
    world = replace(make_world(0, "test", 4), questions=[])
    monkeypatch.setattr(cases, "make_world", lambda *_: world)
    with pytest.raises(InputError, match=r"kind direct, coref.*--size"):
        draw_cases(Draw(2, 12, None, 0, "test"), _words)


def test_documents_stand_shuffled_or_in_the_worlds_order() -> None:
    [case] = draw_cases(Draw(7, 30, None, 0, "test"), _words)
    ids = [document.id for document in in_order(case, "shuffled")]
    assert ids == [document.id for document in in_order(case, "neighbour-missing")]
    ordered = in_order(case, "ordered")
    assert ordered == list(case.documents)
    assert sorted(document.id for document in ordered) == sorted(ids)
    assert [document.id for document in ordered] != ids


# Shortcuts change no answer


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-windowed"])
@pytest.mark.parametrize("strategy", ["full", "none", "epic", "hkvd", "random"])
def test_branches_continue_as_each_question_does_alone(tmp_path: Path, family: str, strategy: str) -> None:
    desk = Desk(tmp_path, family)
    chunks = [*desk.document("a", 20, 13), *desk.document("b", 17)]
    desk.put(*chunks)
    prompts = [token_ids(length, 50 + length) for length in (9, 5, 32)]
    plans = [make_plan(BOS, chunks, prompt, budget=500) for prompt in prompts]
    ends = frozenset({_first_token(desk, plans[1], strategy)})  # one branch ends at once, before the others
    start = plans[0].question_start
    result = desk.run(plans[0], strategy, 0.3, room=slots_behind(prompts, 6))
    for layer in range(desk.runner.shape.layers):  # never written, never harmful
        result.kv.read(layer, result.kv.capacity)[1][start:] = float("nan")
    together = generate_all(desk.runner, result.kv, start, prompts, ends=ends, room=6)
    assert together == [_alone(desk, plan, strategy, ends, 6) for plan in plans]
    assert together[1] == []
    assert max(map(len, together)) == 6


@torch.inference_mode()
def test_branches_stay_out_of_loops_that_know_no_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, "llama")
    chunks = desk.document("a", 20, 13)
    desk.put(*chunks)
    prompts = [token_ids(9, 1), token_ids(5, 2)]
    plan = make_plan(BOS, chunks, prompts[0], budget=500)
    result = desk.run(plan, "none", 0.0, room=slots_behind(prompts, 2))
    monkeypatch.setattr(desk.runner, "fused", object())  # whoever runs a layer in it fails
    answers = generate_all(desk.runner, result.kv, plan.question_start, prompts, ends=frozenset(), room=2)
    assert list(map(len, answers)) == [2, 2]


def test_a_world_asked_at_once_gives_the_marks_of_each_question_asked_alone(settings: Settings) -> None:
    asked = grid(["full", "none", "hkvd"], [0.3], ["alone"], 0.3)
    _both_ways(settings, asked, Draw(2, 4, None, 3, "test"))


@pytest.mark.slow
def test_the_same_of_every_method_and_policy(settings: Settings) -> None:
    asked = grid(["full", "none", "epic", "hkvd", "random", "default"], [0.1, 0.3], ["alone", "document"], 0.3)
    _both_ways(settings, asked, DRAW)


def _both_ways(settings: Settings, asked: list[Setting], draw: Draw) -> None:
    conditions = cases.CONDITIONS[1:]
    fast = measure_quality(settings, asked, conditions, draw, say=_silent)
    slow = measure_quality(settings, asked, conditions, draw, each_alone=True, say=_silent)
    assert all(row.pop("median_ttft_ms") > 0 for row in slow)
    assert fast == slow
    for row in fast:
        assert row["recomputed_share"] >= {"full": 1.0, "none": 0.0}.get(row["method"], 0.9 * row["ratio"])
        assert row["chunks"] == pytest.approx(fast[0]["chunks"] - (row["condition"] == "neighbour-missing"))


def test_a_prompt_over_the_models_positions_is_refused(settings: Settings) -> None:
    draw = Draw(1, 12, 17_000, 0, "test")
    with pytest.raises(PromptTooLongError, match="does not fit the 16368"):
        measure_quality(settings, grid(["none"], [], ["alone"], 0.1), ["shuffled"], draw, say=_silent)


def test_settings_that_give_the_same_answers_are_one_work() -> None:
    assert Setting("default", 0.1, "alone").work == Setting(DEFAULT_STRATEGY, 0.1, "alone")
    assert Setting("hkvd", 0.0, "alone").work == Setting("none", 0.0, "alone")
    assert Setting("full", 1.0, "alone").work == Setting("full", 1.0, "document").work


def test_the_grid_gives_ratios_to_methods_that_have_one() -> None:
    asked = grid(["full", "none", "epic", "default"], [0.1, 0.2], ["alone"], 0.15)
    assert [(s.method, s.ratio) for s in asked] == [
        ("full", 1.0), ("none", 0.0), ("epic", 0.1), ("epic", 0.2), ("default", 0.15),
    ]  # fmt: skip


# Processes


@pytest.mark.slow
def test_rows_do_not_depend_on_the_number_of_processes(settings: Settings) -> None:
    asked = grid(["full", "random", "question"], [0.2], ["alone"], 0.2)
    seen: list[tuple[int, int]] = []
    rows = [
        measure_quality(settings, asked, ["shuffled"], DRAW, jobs=n, say=lambda _, done, of: seen.append((done, of)))
        for n in (1, 2)
    ]
    assert rows[0] == rows[1]
    assert seen.count((14, 14)) == 2


@pytest.mark.slow
def test_what_goes_wrong_in_a_process_is_the_runs_error(settings: Settings, tmp_path: Path) -> None:
    bench = Bench("/nowhere", "cpu", "float32", tmp_path, 0, 1, (Setting("none", 0.0, "alone"),), ("shuffled",))
    drawn = draw_cases(DRAW, _words)
    with pytest.raises(NotAModelError, match="/nowhere"):
        jobs.ask_all(bench, drawn, jobs=2, say=_silent)
    with pytest.raises(RagkvError, match="processes died"):
        jobs.ask_all(_Dying(*vars(bench).values()), drawn, jobs=2, say=_silent)


class _Dying(Bench):
    def asker(self, folder: Path) -> Any:
        os._exit(9)


# Figures


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"), [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (95, 100, 0.8882, 0.9785)]
)
def test_wilson(right: int, asked: int, low: float, high: float) -> None:
    assert wilson(right, asked) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_differences_are_resampled_by_world() -> None:
    assert paired_interval([[0, 0], [0, 0, 0]]) == (0.0, 0.0)
    assert paired_interval([[1, -1]]) is None
    whole = paired_interval([[1] * 10] * 10 + [[-1] * 10] * 10)
    mixed = paired_interval([[1, -1] * 5] * 20)
    assert whole is not None
    assert mixed == (0.0, 0.0)
    assert whole == pytest.approx((-0.4, 0.4), abs=0.1)
    assert whole == paired_interval([[1] * 10] * 10 + [[-1] * 10] * 10)


FULL, NONE = Setting("full", 1.0, "document"), Setting("none", 0.0, "document")


def _marks(setting: Setting, *right: bool) -> list[Mark]:
    kinds = ("direct", "coref")
    return [
        Mark(kinds[i % 2], ("July",), "July" if one else "June", (7,) if one else (8, 9), setting.ratio, 800 + i, 12)
        for i, one in enumerate(right)
    ]


def _rows() -> list[dict[str, Any]]:
    asked: list[Marks] = [
        {("shuffled", FULL): _marks(FULL, True, True), ("shuffled", NONE): _marks(NONE, True, False)},
        {("shuffled", FULL): _marks(FULL, True, False), ("shuffled", NONE): _marks(NONE, True, False)},
    ]
    return rows_of([FULL, NONE, Setting("epic", 0.0, "document")], ["shuffled"], asked)


def test_rows_say_what_they_rest_on() -> None:
    full, none, epic = _rows()
    assert json.loads(json.dumps(none)) == {
        "method": "none",
        "ratio": 0.0,
        "context_policy": "document",
        "condition": "shuffled",
        "metric": "exact_match",
        "exact_match": 0.5,
        "exact_match_interval": [pytest.approx(0.15, abs=0.01), pytest.approx(0.85, abs=0.01)],
        "score": 0.5,
        "score_interval": [pytest.approx(0.15, abs=0.01), pytest.approx(0.85, abs=0.01)],
        "token_agreement": 0.75,
        "token_agreement_interval": [0.5, 1.0],
        "answer_match": 0.75,
        "answer_match_interval": [pytest.approx(0.30, abs=0.01), pytest.approx(0.95, abs=0.01)],
        "by_kind": {"direct": 1.0, "coref": 0.0},
        "questions_by_kind": {"direct": 2, "coref": 2},
        "recomputed_share": 0.0,
        "questions": 4,
        "questions_cut": 0,
        "questions_scored": 4,
        "worlds": 2,
        "context_tokens": 800.5,
        "chunks": 12,
        "relative_to_full": pytest.approx(0.5 / 0.75),
        "difference_to_full": -0.25,
        "difference_interval": [-0.5, 0.0],
    }
    assert epic == none | {"method": "epic"}
    assert (full["relative_to_full"], full["difference_to_full"]) == (1.0, 0.0)


def test_without_full_prefill_nothing_is_relative_to_it() -> None:
    [row] = rows_of([NONE], ["shuffled"], [{("shuffled", NONE): _marks(NONE, True)}])
    assert row["relative_to_full"] is row["difference_to_full"] is row["difference_interval"] is None
    assert row["token_agreement"] is row["answer_match_interval"] is None


# What people see


def test_the_table_shows_intervals_and_kinds() -> None:
    text = io.StringIO()
    show(Console(file=text, width=40), _rows())
    assert "behind their document, shuffled" in text.getvalue()
    assert "50.0 [15.0, 85.0]" in text.getvalue()
    assert "-25.0 [-50.0, 0.0]" in text.getvalue()
    assert "4 questions, 2 worlds of 12 chunks, 800 tokens" in text.getvalue()


@pytest.mark.parametrize("kinds", [False, True])
def test_the_plot_is_drawn(tmp_path: Path, kinds: bool) -> None:
    plot(_rows(), tmp_path / "rows.png", kinds=kinds)
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_needs_a_format_and_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"\.png"):
        plot(_rows(), tmp_path / "rows.txt")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ragkv\[plots\]'"):
        plot(_rows(), tmp_path / "rows.png")


def test_rows_of_an_earlier_run_are_shown_and_drawn_again(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(_rows()))
    call = ["quality", "--rows", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.svg"), "--json"]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert json.loads(result.stdout) == [with_score(row) for row in json.loads(json.dumps(_rows()))]
    assert "<svg" in (tmp_path / "rows.svg").read_text()


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '[{"method": "full"}]', "[3]"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(InputError, match="rows of a quality run"):
        read_rows(tmp_path / "rows.json")


def _first_token(desk: Desk, plan: Any, strategy: str) -> int:
    return int(desk.run(plan, strategy, 0.3).logits.argmax())


def _alone(desk: Desk, plan: Any, strategy: str, ends: frozenset[int], room: int) -> list[int]:
    result = desk.run(plan, strategy, 0.3, room=room)
    token, tokens = int(result.logits.argmax()), []
    while token not in ends and len(tokens) < room:
        tokens.append(token)
        token = int(desk.runner.decode(token, len(plan.ids) + len(tokens) - 1, result.kv).argmax())
    return tokens
