"""Tables in the docs say what the result files say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ragkv.eval.tables import rendered

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_of_the_docs_are_those_of_the_result_files(page):
    text = page.read_text(encoding="utf-8")
    assert rendered(text, ROOT) == text, "python -m ragkv.eval.tables README.md docs/*.md"


def test_a_table_holds_the_rows_asked_for_and_replaces_what_was_there(tmp_path):
    row = {
        "method": "links", "ratio": 0.1, "context_policy": "alone", "recomputed_share": 0.1, "exact_match": 0.9,
        "exact_match_interval": [0.8, 0.95], "difference_to_full": -0.1, "difference_interval": [-0.2, 0.0],
        "by_kind": {"direct": 1.0, "update": 0.8},
    }  # fmt: skip
    rows = [row, {**row, "context_policy": "document", "exact_match": 0.5}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    page = "before\n<!-- quality rows.json context_policy=alone -->\nold\n<!-- end -->\nafter"
    made = rendered(page, tmp_path)
    assert "| `links` 10% | 10% | 90.0 [80.0, 95.0] | -10.0 [-20.0, 0.0] | 100 | 80 |" in made
    assert "old" not in made
    assert "50.0" not in made
    assert made.startswith("before\n")
    assert made.endswith("\nafter")
    assert rendered(made, tmp_path) == made
    rows = [{**row, "codec": codec, "check_layer": 1} for codec in ("raw", "int8")]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    made = rendered("<!-- quality rows.json -->\n<!-- end -->", tmp_path)
    assert "| method | codec | recomputed | exact match |" in made
    assert "| `links` 10% | int8 | 10% | 90.0 [80.0, 95.0] |" in made
    assert "check" not in made


def test_times_stand_by_length_with_what_the_default_chose(tmp_path):
    row = {
        "method": "default", "ratio": 0.1, "tier": "ssd", "codec": "raw", "ttft_ms": 90.4, "speedup": 1.06,
        "over_floor": 1.18, "chose": "full", "full_prefill_of_matrix_rate": 0.8,
    }  # fmt: skip
    full = {**row, "method": "full", "ttft_ms": 96.0}
    rows = [{**row, "context_tokens": 8192}, {**row, "context_tokens": 4096}, {**full, "context_tokens": 4096}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    made = rendered("<!-- ttft rows.json -->\n<!-- end -->", tmp_path)
    assert "| from | codec | method | 4,096 | 8,192 |" in made
    assert "| ssd | raw | `default` 10% | 90 ms (full), **1.1×**, 1.2 | 90 ms (full), **1.1×**, 1.2 |" in made
    assert "|  |  | `full` | 96 ms, 80% of the matrix rate |  |" in made


def test_a_demo_ends_as_on_a_terminal(tmp_path):
    ways = {"full": (700.0, 1.0), "reuse": (70.4, 0.64), "blend": (200.0, 0.9)}
    summary = {name: {"median_ttft_ms": ms, "accuracy": right} for name, (ms, right) in ways.items()}
    (tmp_path / "demo.json").write_text(json.dumps({"summary": summary}))
    made = rendered("<!-- demo demo.json -->\nold\n<!-- end -->", tmp_path)
    assert f" full {'█' * 30}   700 ms to first token, 100% right\n" in made
    assert f"reuse {'█' * 3}{' ' * 27}    70 ms to first token, 64% right\n" in made
    assert "\nblend starts answering 3.5× sooner than full prefill\n```\n" in made


def test_streams_are_held_against_the_fewest(tmp_path):
    row = {"max_running": 32, "throughput_tok_s": 400.0, "p50_tbt_ms": 50.0, "p99_tbt_ms": 60.0, "step_ms": 55.0}
    rows = [row, {**row, "max_running": 1, "throughput_tok_s": 100.0, "p50_tbt_ms": 8.04}]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    made = rendered("<!-- streams rows.json -->\n<!-- end -->", tmp_path).splitlines()
    assert made[4:6] == ["| 1 | 100 | **1.0×** | 8.0 | 60.0 | 55.0 |", "| 32 | 400 | **4.0×** | 50.0 | 60.0 | 55.0 |"]


def test_tenants_stand_under_their_load(tmp_path):
    own = {"requests": 20, "p50_ttft_ms": 1500.0, "p99_ttft_ms": 2000.0}
    row = {"load": "tenants-overload", "jain": 0.9994, "service_gap": 1042.0, "tenants": {"a": own, "b": own}}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row]}))
    made = rendered("<!-- tenants rows.json -->\n<!-- end -->", tmp_path)
    assert "| `tenants-overload` | 0.999 | 1,042 | a | 20 | 1.5 | 2.0 |\n|  |  |  | b | 20 | 1.5 | 2.0 |" in made
