"""Quality on a user's own questions: forms of files, named errors, cases, known values of figures, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ragkv.config import Settings, load_settings
from ragkv.errors import ConfigError, InputError, PromptTooLongError
from ragkv.eval.asker import Mark, Setting
from ragkv.eval.cases import Case
from ragkv.eval.cli import app
from ragkv.eval.data import Data, data_cases
from ragkv.eval.metrics import exact_match, f1, rouge_l, squad_normalised
from ragkv.eval.quality import grid, measure_quality
from ragkv.eval.questions import AskedQuestion, QuestionFile, jsonl, read_questions
from ragkv.eval.score import JUDGES, rows_of
from ragkv.retrievers import Splitter

CTXS = [{"title": "Oak", "text": "The oak was felled in July."}, {"title": "Elm", "text": "The elm still stands."}]
ITEM = {"question": "When was the oak felled?", "answers": ["July"], "ctxs": CTXS}


@pytest.fixture
def write(tmp_path: Path):
    def writes(content: Any, name: str = "data.json") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return writes


def _silent(stage: str, done: int, total: int) -> None:
    return


# Files


@pytest.mark.parametrize(
    "entry",
    [
        ITEM,
        {"question": ITEM["question"], "answer": "July", "contexts": CTXS},
        {"query": ITEM["question"], "answers": {"text": ["July"], "answer_start": [24]}, "passages": CTXS},
        {
            "question": ITEM["question"],
            "answer": "July",
            "answer_aliases": [],
            "paragraphs": [{"idx": i, "title": c["title"], "paragraph_text": c["text"]} for i, c in enumerate(CTXS)],
        },
        {
            "question": ITEM["question"],
            "answer": ["July"],
            "context": [["Oak", ["The oak was", " felled in July."]], ["Elm", "The elm still stands."]],
        },
    ],
    ids=["cacheblend", "contexts", "squad answers", "musique", "hotpotqa"],
)
def test_forms_of_other_data_sets_are_understood(write, entry: dict[str, Any]) -> None:
    assert read_questions(write([entry])) == read_questions(write([ITEM]))


def test_plain_texts_are_contexts_without_titles(write) -> None:
    several = read_questions(write([{"question": "What?", "ctxs": ["One text.", "Another."]}]))
    assert [(p.title, p.text) for p in several.passages] == [("", "One text."), ("", "Another.")]
    [one] = read_questions(write([{"input": "What?", "context": "One text.", "answers": ["1", 1, " "]}])).questions
    assert one.passages == (several.passages[0].id,)
    assert one.answers == ("1",)


def test_json_and_json_lines_hold_the_same(write) -> None:
    items = [ITEM, {**ITEM, "question": "Does the elm stand?", "answers": ["yes"], "type": "bool"}]
    listed = read_questions(write(json.dumps(items, indent=2)))
    lines = "\ufeff" + "\r\n\n".join(json.dumps(item) for item in items)
    assert read_questions(write(lines, "data.jsonl")) == listed
    assert [q.kind for q in listed.questions] == ["", "bool"]
    assert len(listed.passages) == 2
    assert [json.loads(line)["title"] for line in jsonl(listed.passages)] == ["Oak", "Elm"]


@pytest.mark.parametrize(
    ("item", "field"),
    [
        ({"answers": ["July"], "ctxs": CTXS}, "question"),
        ({**ITEM, "question": " "}, "question"),
        ({**ITEM, "question": 7}, "question"),
        ({"question": "When?", "answers": ["July"]}, "ctxs"),
        ({**ITEM, "ctxs": []}, "ctxs"),
        ({**ITEM, "ctxs": {"title": "Oak"}}, "ctxs"),
        ({**ITEM, "ctxs": [CTXS[0], {"title": "Elm"}]}, r"ctxs\[1\].text"),
        ({**ITEM, "ctxs": [CTXS[0], {"title": "Elm", "paragraph_text": "\n"}]}, r"ctxs\[1\].paragraph_text"),
        ({**ITEM, "ctxs": [None]}, r"ctxs\[0\]"),
        ({**ITEM, "ctxs": ["broken \ud800 text"]}, r"ctxs\[0\]"),
        ({**ITEM, "ctxs": [{"title": ["Oak"], "text": "felled"}]}, "title"),
        ({**ITEM, "answers": [["July"]]}, "answers"),
        ({**ITEM, "answer": True}, "answer"),
    ],
)
@pytest.mark.parametrize("lines", [False, True])
def test_errors_name_line_entry_and_field(write, item: dict[str, Any], field: str, lines: bool) -> None:
    text = "\n".join(json.dumps(one) for one in (ITEM, item)) if lines else json.dumps([ITEM, item], indent=1)
    line = 2 if lines else text.count("\n", 0, text.index("\n {", 5)) + 2
    with pytest.raises(InputError, match=f"line {line} \\(entry 2\\): '{field}'") as caught:
        read_questions(write(text))
    assert (caught.value.context["line"], caught.value.context["entry"]) == (line, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ("[]", "holds no questions"),
        ("[3]", "line 1: entry 1 is no JSON object"),
        (f"[{json.dumps(ITEM)} {json.dumps(ITEM)}]", "Expecting ',' or ']'"),
        ('[{"question": "a"', "Expecting"),
        (f"[{json.dumps(ITEM)}] x", "Extra data"),
        (f"{json.dumps(ITEM)}\n{{no json}}\n", "line 2: "),
        ("[" * 100_000, "cannot read questions"),
    ],
)
def test_files_that_are_no_question_files(write, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_questions(write(text))


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read questions"):
        read_questions(tmp_path / "none.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot read questions"):
        read_questions(tmp_path / "bytes.json")


# Figures; those of ROUGE-L are of Lin (2004) and of rouge-score's own page


@pytest.mark.parametrize(
    ("text", "bare"),
    [("The  Eiffel-Tower!", "eiffeltower"), ("An apple a day.", "apple day"), ("a an the", ""), ("Theatre", "theatre")],
)
def test_squads_normalisation(text: str, bare: str) -> None:
    assert squad_normalised(text) == bare


@pytest.mark.parametrize(
    ("answer", "golds", "exact", "words"),
    [
        ("the oak", ["Oak."], 1.0, 1.0),
        ("an old oak tree", ["oak tree"], 0.0, 0.8),
        ("elm", ["oak", "elm tree"], 0.0, 2 / 3),
        ("oak oak", ["oak"], 0.0, 2 / 3),
        ("", ["oak"], 0.0, 0.0),
        ("the", ["a"], 1.0, 1.0),
        ("Exeter College in Oxford", ["Exeter College", "Oxford"], 0.0, 2 / 3),
    ],
)
def test_exact_match_and_f1(answer: str, golds: list[str], exact: float, words: float) -> None:
    assert exact_match(answer, golds) == exact
    assert f1(answer, golds) == pytest.approx(words)


@pytest.mark.parametrize(
    ("answer", "golds", "value"),
    [
        ("the cat is on the mat", ["the cat sat on the mat"], 5 / 6),
        ("police kill the gunman", ["police killed the gunman"], 0.75),
        ("the gunman kill police", ["police killed the gunman"], 0.5),
        ("The quick brown fox jumps over the lazy dog", ["The quick brown dog jumps on the log."], 10 / 17),
        ("a b c d", ["x y", "b d"], 2 / 3),
        ("", ["a"], 0.0),
        ("über-große Straße", ["ÜBER große straße"], 1.0),
    ],
)
def test_rouge_l(answer: str, golds: list[str], value: float) -> None:
    assert rouge_l(answer, golds) == pytest.approx(value)


# How a file is judged


def _file(*answers: tuple[str, ...]) -> QuestionFile:
    return QuestionFile(tuple(AskedQuestion("What?", own, ("p",)) for own in answers), ())


@pytest.mark.parametrize(
    ("answers", "metric", "room"),
    [
        ([("July",), (), ("15",), ("word " * 13,)], "f1", 32),
        ([("word " * 13,)], "rouge_l", 128),
        ([("word " * 13, "short")], "f1", 32),
        ([(), ()], "token_agreement", 32),
    ],
)
def test_the_metric_suits_the_answers(answers: list[tuple[str, ...]], metric: str, room: int) -> None:
    data = Data(_file(*answers), "data.json")
    assert (data.judged_by(), data.room()) == (metric, room)
    assert Data(data.file, "data.json", answer_tokens=5).room() == 5


def test_a_metric_of_accepted_answers_needs_some() -> None:
    with pytest.raises(ConfigError, match=r"--metric f1.*none of the questions.*--metric agreement"):
        Data(_file(()), "data.json", "f1").judged_by()


def test_questions_over_the_same_context_are_one_case_and_long_texts_are_split(write) -> None:
    long = {"title": "Long", "text": " ".join(f"Sentence number {i} stands here." for i in range(40))}
    items = [
        {"question": "First?", "ctxs": [CTXS[0], long]},
        {"question": "Second?", "ctxs": [CTXS[1]]},
        {"question": "Third?", "ctxs": [CTXS[0], long, CTXS[0]]},
        {"question": "Fourth?", "ctxs": [CTXS[1]]},
    ]
    data = Data(read_questions(write(items)), "data.json", limit=3)
    first, second = data_cases(data, Splitter(lambda text: len(text.split()), 40))
    assert [[q.text for q in case.questions] for case in (first, second)] == [["First?", "Third?"], ["Second?"]]
    short, split = first.documents
    assert short.chunks == ("Oak\nThe oak was felled in July.",)
    assert len(split.chunks) > 3
    assert "".join(split.chunks) == f"Long\n{long['text']}"


FULL, NONE = Setting("full", 1.0, "document"), Setting("none", 0.0, "document")


def _mark(answer: str, *golds: str, tokens: tuple[int, ...] = (1, 2)) -> Mark:
    return Mark("", golds, answer, tokens, 0.5, 100, 2)


def test_rows_judge_what_has_answers_and_compare_everything_with_full() -> None:
    asked = [
        {("ordered", FULL): [_mark("July.", "July")], ("ordered", NONE): [_mark("July 4", "July", tokens=(1, 3))]},
        {("ordered", FULL): [_mark("Oak")], ("ordered", NONE): [_mark("the oak")]},
        {("ordered", FULL): [_mark("elm\nQ: and", "elm")], ("ordered", NONE): [_mark("ash", "elm", tokens=(9,))]},
    ]
    full, none = rows_of([FULL, NONE], ["ordered"], asked, metric="f1", judges=JUDGES)
    assert (full["exact_match"], full["f1"], full["score"]) == (1.0, 1.0, 1.0)
    assert none["f1"] == none["score"] == pytest.approx(1 / 3)
    assert none["exact_match"] == 0.0
    assert none["token_agreement"] == pytest.approx((0.5 + 1.0 + 0.0) / 3)
    assert none["answer_match"] == pytest.approx(1 / 3)
    assert (none["questions"], none["questions_scored"], none["by_kind"]) == (3, 2, {})
    assert none["difference_to_full"] == pytest.approx(1 / 3 - 1)
    assert none["difference_interval"] == (-1.0, pytest.approx(2 / 3 - 1))
    low, high = none["f1_interval"]
    assert 0.0 <= low <= none["f1"] <= high <= 2 / 3


def test_without_accepted_answers_the_row_says_so() -> None:
    asked = [{("ordered", FULL): [_mark("July")], ("ordered", NONE): [_mark("July", tokens=(1,))]}]
    row = rows_of([FULL, NONE], ["ordered"], asked, metric="token_agreement", judges=JUDGES)[1]
    assert row["exact_match"] is row["f1"] is row["exact_match_interval"] is None
    assert (row["score"], row["difference_to_full"]) == (0.5, -0.5)


# Whole runs


@pytest.fixture
def settings(tiny_checkpoint: Path, tmp_path: Path) -> Settings:
    return load_settings(
        model=str(tiny_checkpoint), data_dir=tmp_path, dtype="float32", device="cpu", threads=1, chunk_tokens=16
    )


def _items(count: int) -> list[dict[str, Any]]:
    texts = [
        f"Tree {i} was felled in July. It stood for {i} years. Nobody knows why it fell." for i in range(2 * count)
    ]
    return [
        {"question": f"When did tree {i} fall?", "answers": ["July"], "ctxs": texts[2 * i : 2 * i + 2], "kind": "tree"}
        for i in range(count)
    ]


def test_a_run_over_a_users_file(write, settings: Settings) -> None:
    data = Data(read_questions(write(_items(3))), "trees.json", answer_tokens=4)
    asked = grid(["full", "none", "question", "epic"], [0.0, 0.3], ["document"], 0.3)
    rows = measure_quality(settings, asked, ["ordered", "shuffled"], data, say=_silent)
    assert len(rows) == 2 * 6
    for row in rows:
        assert (row["suite"], row["metric"], row["questions"], row["worlds"]) == ("trees.json", "f1", 3, 3)
        assert row["by_kind"] == {"tree": row["f1"]}
        assert row["chunks"] > 3  # two passages a question, each split
        if row["method"] == "full":
            assert row["token_agreement"] == row["answer_match"] == 1.0
    none, nothing = rows[1], rows[2]
    assert nothing["method"] == "question"
    assert none | {"method": "question"} == nothing


def test_a_context_over_the_models_positions_loses_its_end(write, settings: Settings) -> None:
    items = _items(1)
    items[0]["ctxs"] += [f"Filler text {i}: " + "many words stand here. " * 40 for i in range(12)]
    data = Data(read_questions(write(items + _items(2)[1:])), "data.json", answer_tokens=2)
    [row] = measure_quality(settings, grid(["none"], [], ["alone"], 0.3), ["ordered"], data, say=_silent)
    assert row["questions_cut"] == 1
    assert 600 < row["context_tokens"] < 2048
    too_long = Data(read_questions(write([{"question": "why " * 3000, "ctxs": ["Text."]}])), "d")
    with pytest.raises(PromptTooLongError, match="shorten the question"):
        measure_quality(settings, grid(["full"], [], ["alone"], 0.3), ["ordered"], too_long, say=_silent)


def test_agreement_needs_full_prefill_and_no_file_has_neighbours(settings: Settings) -> None:
    data = Data(_file(()), "data.json")
    with pytest.raises(ConfigError, match="add `full`"):
        measure_quality(settings, grid(["none"], [], ["alone"], 0.3), ["ordered"], data, say=_silent)
    asked = grid(["full"], [], ["alone"], 0.3)
    with pytest.raises(ConfigError, match="neighbour-missing"):
        measure_quality(settings, asked, ["neighbour-missing"], data, say=_silent)


def test_the_command_line(write, settings: Settings, tmp_path: Path) -> None:
    options = ["--data", str(write(_items(2))), "--model", settings.model, "--methods", "full,none", "--limit", "1"]
    options += ["--max-tokens", "3", "--save", str(tmp_path / "saved.json"), "--plot", str(tmp_path / "plot.svg")]
    env = {"RAGKV_DATA_DIR": str(tmp_path), "RAGKV_DTYPE": "float32", "RAGKV_THREADS": "1", "RAGKV_DEVICE": "cpu"}
    result = CliRunner().invoke(app, ["quality", *options], env=env, catch_exceptions=False)
    assert "1 questions, 1 contexts of" in result.stdout
    assert "F1" in result.stdout
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert {"command", "date", "device", "versions"} <= saved.keys()
    assert [row["method"] for row in saved["rows"]] == ["full", "none"]
    assert "F1, %" in (tmp_path / "plot.svg").read_text()
    again = CliRunner().invoke(app, ["quality", "--rows", str(tmp_path / "saved.json")], catch_exceptions=False)
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "d.json", "--size", "8"], "--size does not go with --data"),
        (["--data", "d.json", "--context-tokens", "800"], "--context-tokens does not go with --data"),
        (["--metric", "f1"], "--metric does not go with worlds"),
        (["--data", "d.json", "--metric", "bleu"], "--metric: 'bleu' is not one of auto"),
        (["--save", "nowhere/rows.json"], "cannot be written"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["quality", *options])
    assert isinstance(result.exception, ConfigError | InputError)
    assert message in str(result.exception)


def test_cases_carry_no_evidence(write) -> None:
    [case] = data_cases(Data(read_questions(write([ITEM])), "d"), Splitter(len, 100))
    assert isinstance(case, Case)
    assert case.questions[0].evidence == ()
