"""The report: what files it takes, how speed and quality are joined, that nothing in a file becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from ragkv.errors import InputError
from ragkv.eval.cli import app
from ragkv.eval.palette import look, looks
from ragkv.eval.report import write_report
from ragkv.eval.report.charts import HEIGHT, WIDTH, Band, Point, scatter, x_axis, y_axis
from ragkv.eval.report.files import read_results
from ragkv.eval.report.html import Html, joined, ms, points, setting, tag
from ragkv.eval.report.page import render
from ragkv.eval.report.pareto import front_of, own_times, pairs_of
from ragkv.eval.report.rows import quality, speed

RESULTS = Path(__file__).parent.parent / "eval" / "results"
_VOID = {"br", "input", "meta"}


def _speed(method: str, ratio: float, ttft: float, **more: Any) -> dict[str, Any]:
    row = {"model": "m", "device": "CPU", "tier": "ram", "codec": "raw", "context_tokens": 4096, "batch": 1}
    row |= {"method": method, "ratio": ratio, "ttft_ms": ttft, "full_prefill_ms": 900.0, "recomputed_share": ratio}
    return row | {"floor_ms": ttft / 2, "floor_by": "chip", "parts_ms": {"load": 1.0, "recompute": 3.0}} | more


def _quality(method: str, ratio: float, score: float, **more: Any) -> dict[str, Any]:
    row = {"model": "m", "suite": "worlds", "codec": "raw", "context_policy": "document", "condition": "ordered"}
    row |= {"method": method, "ratio": ratio, "metric": "f1", "exact_match": score, "f1": score, "score": score}
    row |= {"score_interval": [max(score - 0.1, 0), min(score + 0.1, 1)], "recomputed_share": ratio, "questions": 20}
    row |= {"difference_to_full": score - 1, "difference_interval": [score - 1.1, score - 0.9], "worlds": 5}
    return row | {"by_kind": {"a": score, "b": 1.0}, "questions_by_kind": {"a": 10, "b": 10}} | more


# Fields of quality rows that those of older versions lack.
_SINCE = {"model", "suite", "codec", "metric", "score", "score_interval"}
SPEED = [_speed("full", 1.0, 1000.0), _speed("none", 0.0, 50.0), _speed("question", 0.15, 200.0)]
QUALITY = [_quality("full", 1.0, 1.0), _quality("none", 0.0, 0.7), _quality("question", 0.15, 0.9)]


@pytest.fixture
def page(tmp_path: Path):
    """Makes the page of files with the given rows; the page is text."""

    def make(*contents: Any) -> str:
        paths = []
        for number, content in enumerate(contents):
            paths.append(tmp_path / f"result-{number}.json")
            paths[-1].write_text(json.dumps(content), encoding="utf-8")
        return render(read_results(paths), "A report")

    return make


class _Checker(HTMLParser):
    """Reads a page; tags must nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attrs)))
        if name not in _VOID:
            self.open.append(name)

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if not {"style", "script"}.intersection(self.open):
            self.text += f" {data}"

    def ids(self) -> list[str]:
        return [str(attrs["id"]) for _, attrs in self.found if "id" in attrs]


# Markup


def test_what_is_not_markup_is_escaped() -> None:
    evil = "<script>alert('x')</script> & \"y\""
    made = tag("p", evil, ["a<b", None, 3, tag("b", "bold")], class_=evil, data_x=evil, hidden=True, title=None)
    assert made.count("<") == 4
    assert joined([Html("<i>"), "<i>"]) == "<i>&lt;i&gt;"
    read = _Checker(made)
    assert read.found[0] == ("p", {"class": evil, "data-x": evil, "hidden": None})
    assert evil in read.text


def test_numbers_for_people() -> None:
    assert [ms(value) for value in (0.123, 4.56, 123.4, 9999, 25_918)] == [
        "0.12 ms", "4.6 ms", "123 ms", "9,999 ms", "25.9 s",
    ]  # fmt: skip
    assert [points(value) for value in (-0.105, 0.02, 0.0001, -0.0001)] == ["−10.5", "+2.0", "±0.0", "±0.0"]
    assert [setting(*one) for one in (("full", 1.0), ("none", 0.0), ("epic", 0.05))] == ["full", "none", "epic 5%"]


EVIL = "<img src=x onerror=alert(1)>\"'`</script></style><script>alert(1)</script>"


def test_nothing_in_a_file_becomes_markup(page) -> None:
    names = {"model": EVIL, "device": EVIL, "tier": EVIL, "codec": EVIL, "floor_by": EVIL, "parts_ms": {EVIL: 1.0}}
    kinds = {"by_kind": {EVIL: 1.0, "b": 0.5}, "questions_by_kind": {EVIL: 3, "b": 4}}
    words = {"model": EVIL, "suite": EVIL, "codec": EVIL, "context_policy": EVIL, "condition": EVIL}
    text = page(
        {EVIL: EVIL, "command": EVIL, "date": EVIL, "versions": {EVIL: EVIL}, "rows": [
            *(row | names for row in SPEED), _speed(EVIL, 0.5, 3.0) | names,
        ]},
        {"note": [EVIL], "rows": [*(row | words | kinds for row in QUALITY), _quality(EVIL, 0.5, 0.5) | words | kinds]},
    )  # fmt: skip
    read = _Checker(text)
    assert EVIL in read.text
    assert Counter(name for name, _ in read.found)["script"] == 1
    assert not [attrs for name, attrs in read.found if name == "img" or any(key.startswith("on") for key in attrs)]


def test_a_page_stands_alone_and_lets_no_other_script_run(page) -> None:
    text = page({"rows": SPEED}, {"rows": QUALITY})
    read = _Checker(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not [attrs for _, attrs in read.found if "src" in attrs or not str(attrs.get("href", "#")).startswith("#")]
    [policy] = [attrs["content"] for name, attrs in read.found if name == "meta" and "http-equiv" in attrs]
    script = text[text.index("<script>") + 8 : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)
    assert "default-src 'none'" in str(policy)


def test_the_committed_results_make_a_whole_page(tmp_path: Path) -> None:
    read = write_report([RESULTS], tmp_path / "report.html", "All of it")
    assert read.speed
    assert read.quality
    assert read.skipped
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    checked = _Checker(text)
    ids = checked.ids()
    assert len(ids) == len(set(ids))
    assert {"pareto", "ttft", "quality", "times", "scores", "sources"} <= set(ids)
    targets = {str(attrs["href"])[1:] for name, attrs in checked.found if name == "a"}
    assert targets <= set(ids)
    assert not re.search(r"\b(nan|inf|None)\b", text[: text.index("<script>")])
    shown = [attrs for _, attrs in checked.found if attrs.get("class") == "pick" and "hidden" not in attrs]
    assert len(shown) == 1


@pytest.mark.parametrize(
    ("contents", "sections"),
    [
        ([SPEED], {"ttft", "times", "sources"}),
        ([QUALITY], {"quality", "scores", "sources"}),
        ([SPEED, QUALITY], {"pareto", "ttft", "quality", "times", "scores", "sources"}),
        ([SPEED[:2], QUALITY[2:]], {"ttft", "quality", "times", "scores", "sources"}),
    ],
    ids=["times", "scores", "both", "nothing in common"],
)
def test_sections_without_anything_to_show_are_not_there(page, contents: list[Any], sections: set[str]) -> None:
    read = _Checker(page(*contents))
    assert {name for name in read.ids() if name not in ("theme", "tip")} == sections
    assert {str(attrs["href"])[1:] for name, attrs in read.found if name == "a"} == sections


# Joining


def test_settings_are_joined_by_method_ratio_and_codec() -> None:
    rows = [quality(row, {}) for row in [*QUALITY, _quality("none", 0.0, 0.6, codec="int8")]]
    known = [row for row in rows if row]
    times = [speed(row, {}) for row in [*SPEED, _speed("none", 0.0, 30.0, codec="int8"), _speed("hkvd", 0.15, 90.0)]]
    raw = pairs_of(times, known, times[0].place)
    assert [(pair.speed.setting[0], pair.ms, pair.quality.score) for pair in raw] == [
        ("full", 900.0, 1.0),  # the faster one, which speedups are against
        ("none", 50.0, 0.7),
        ("question", 200.0, 0.9),
    ]
    [int8] = pairs_of(times, known, times[3].place)
    assert (int8.ms, int8.quality.score) == (30.0, 0.6)


def test_the_front_holds_what_nothing_beats_in_both() -> None:
    rows = [("full", 1.0, 900.0, 0.98), ("none", 0.0, 50.0, 0.7), ("epic", 0.1, 100.0, 0.7), ("epic", 0.2, 150.0, 0.9),
            ("hkvd", 0.2, 160.0, 0.8), ("random", 0.2, 1000.0, 0.98)]  # fmt: skip
    times = [speed(_speed(method, ratio, ttft), {}) for method, ratio, ttft, _ in rows]
    known = [one for method, ratio, _, score in rows if (one := quality(_quality(method, ratio, score), {}))]
    front = front_of(pairs_of(times, known, times[0].place))
    assert [pair.speed.setting for pair in front] == [("none", 0.0), ("epic", 0.2), ("full", 1.0)]


def test_a_page_says_when_two_models_or_codecs_are_joined(page) -> None:
    assert "Two models" not in page(SPEED, QUALITY)
    other = [row | {"model": "llama", "codec": "fp8"} for row in SPEED]
    text = _Checker(page(other, QUALITY)).text
    assert "the quality of m is joined with the speed of llama" in text
    assert "Quality was measured with raw KV, speed with fp8" in text


def test_times_of_the_very_run_that_gave_the_answers_come_first(page) -> None:
    timed = [row | {"median_ttft_ms": 10.0 + 100 * row["ratio"]} for row in QUALITY]
    rows = [row for one in timed if (row := quality(one, {}))]
    assert [(row.ttft, row.full) for row in own_times(rows)] == [(110.0, 110.0), (10.0, 110.0), (25.0, 110.0)]
    assert own_times(rows[1:]) == []
    read = _Checker(page(timed))
    assert "pareto" in read.ids()
    assert "Two models" not in read.text
    read = _Checker(page(SPEED, timed))
    [shown] = [attrs for _, attrs in read.found if attrs.get("class") == "pick" and "hidden" not in attrs]
    assert shown["data-speed"] == "own"


# Files


def test_rows_of_every_form_are_read(tmp_path: Path) -> None:
    old = {key: value for key, value in QUALITY[0].items() if key not in _SINCE}
    (tmp_path / "old.json").write_text(
        json.dumps({"environment": {"model": "told", "device": "H200"}, "rows": [old | {"exact_match_interval": None}]})
    )
    bare = [{key: value for key, value in row.items() if key not in ("model", "device", "batch")} for row in SPEED]
    (tmp_path / "plain.json").write_text(json.dumps(bare))
    (tmp_path / "other.json").write_text(json.dumps({"rows": [{"policy": "lru"}]}))
    results = read_results([tmp_path])
    [row] = results.quality
    assert (row.panel.model, row.panel.metric, row.score, row.interval) == ("told", "exact_match", 1.0, None)
    assert [(row.place.model, row.place.batch) for row in results.speed] == [("an unnamed model", 1)] * 3
    assert results.skipped == ["other.json"]
    assert [source.facts.get("device") for source in results.sources] == ["H200", None]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "cannot be read as JSON"),
        ("[]", "holds no rows of `ragkv eval ttft`"),
        ('{"rows": [{"policy": "lru"}]}', "holds no rows"),
        (json.dumps([SPEED[0] | {"ttft_ms": "soon"}]), "row 1: 'ttft_ms' is no finite number"),
        (json.dumps([SPEED[0], SPEED[1] | {"ttft_ms": 0}]), "row 2: 'ttft_ms' is not positive"),
        (json.dumps([SPEED[0] | {"floor_ms": math.nan}]), "'floor_ms' is no finite number"),
        (json.dumps([SPEED[0] | {"parts_ms": [1]}]), "'parts_ms' is no table"),
        (json.dumps([SPEED[0] | {"tier": 3}]), "'tier' is no text"),
        (json.dumps([QUALITY[0] | {"score_interval": [1]}]), "'score_interval' is no pair"),
        (json.dumps([QUALITY[0] | {"ratio": None}]), "'ratio' is missing"),
    ],
)
def test_broken_files_and_rows_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(InputError, match=f"rows.json.*{re.escape(message)}"):
        read_results([tmp_path / "rows.json"])


def test_nothing_to_report_and_nowhere_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to report"):
        read_results([tmp_path])
    (tmp_path / "rows.json").write_text(json.dumps(SPEED))
    with pytest.raises(InputError, match="cannot be written"):
        write_report([tmp_path], tmp_path / "nowhere" / "report.html")


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"date": "2026-01-02", "rows": SPEED}))
    (tmp_path / "other.json").write_text("{}")
    call = ["report", str(tmp_path), "--out", str(tmp_path / "r.html"), "--title", "Mine & yours"]
    result = CliRunner().invoke(app, call, catch_exceptions=False)
    assert "3 times and 0 scores of 1 files" in result.stdout.replace("\n", "")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "<h1>Mine &amp; yours</h1>" in text
    assert "measured 2026-01-02" in text


# Drawing

_SHARES = st.floats(0, 100)
_TIMES = st.floats(1e-3, 1e7)


@given(st.lists(st.tuples(_TIMES, _SHARES, st.floats(0, 30)), min_size=1, max_size=12), st.booleans())
def test_every_mark_stands_inside_the_drawing(values: list[tuple[float, float, float]], banded: bool) -> None:
    marks = [
        Point(x, y, max(y - reach, 0), min(y + reach, 100), f"line {i % 3}", look("epic"), f"p{i}", "tip", i % 2 == 0)
        for i, (x, y, reach) in enumerate(values)
    ]
    band = Band(90.0, 80.0, 95.0, "full") if banded else None
    drawn = scatter(marks, title="t", x_title="x", y_title="y", x_text=str, band=band, front=True)
    read = _Checker(drawn)
    for _, attrs in read.found:
        for key, most in (("x", WIDTH), ("x1", WIDTH), ("cx", WIDTH), ("y", HEIGHT), ("y1", HEIGHT), ("cy", HEIGHT)):
            if key in attrs:
                assert -0.5 <= float(str(attrs[key])) <= most + 0.5
    assert sum(str(attrs.get("class", "")).startswith("point") for _, attrs in read.found) == len(values)


@pytest.mark.parametrize("values", [[0.0], [7.0], [0.0, 1e-9], [3.0, 3.0], [1e-3, 1e7], [0.0, 1e6]])
def test_axes_take_any_range(values: list[float]) -> None:
    axis = x_axis(values)
    assert axis.ticks
    assert all(math.isfinite(axis(value)) for value in [*values, *axis.ticks])


def test_a_vertical_axis_keeps_to_shares_and_never_stretches_a_tie() -> None:
    assert y_axis([100.0]).high <= 102.0
    tie = y_axis([50.0, 50.2])
    assert tie.high - tie.low >= 5.0
    assert len(tie.ticks) >= 3


def test_methods_to_come_are_drawn_too() -> None:
    assert look("a method to come") in looks()
    assert look("a method to come") == look("a method to come")
