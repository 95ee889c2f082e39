from __future__ import annotations

import json
import sys
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from ragkv.errors import ConfigError, InputError, MissingExtraError
from ragkv.eval import cache_policy_plot
from ragkv.eval.cache_policy import belady, bound, compare, next_use, simulate, tables
from ragkv.eval.cli import app
from ragkv.eval.traces import Trace, read_trace, zipf_trace
from ragkv.store.policies import POLICIES, make_policy

SMALL = {"chunks": 300, "references": 3000}


def trace_of(chunks: list[int], tokens: list[int] | None = None, context: list[int] | None = None) -> Trace:
    count = max(chunks) + 1
    sizes = np.array(tokens or [1] * count, np.int64)
    return Trace("t", np.array(chunks), np.arange(0, len(chunks), 2), sizes, np.array(context or [0] * count, np.int64))


def best_hits(chunks: list[int], capacity: int) -> int:
    """The most hits any choice of victims gives, by trying them all."""

    @cache
    def best(at: int, here: frozenset[int]) -> int:
        if at == len(chunks):
            return 0
        new = chunks[at]
        if new in here:
            return 1 + best(at + 1, here)
        if len(here) < capacity:
            return best(at + 1, here | {new})
        return max(best(at + 1, here - {victim} | {new}) for victim in here)

    return best(0, frozenset())


CHUNKS = st.lists(st.integers(0, 5), min_size=1, max_size=14)


@given(chunks=CHUNKS, capacity=st.integers(1, 3))
@settings(max_examples=80, deadline=None)
def test_belady_is_the_optimum_for_equal_sizes(chunks, capacity):
    assert belady(trace_of(chunks), capacity).sum() == best_hits(chunks, capacity)


@given(chunks=CHUNKS, sizes=st.lists(st.integers(1, 5), min_size=6, max_size=6), capacity=st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_nobody_exceeds_the_bound(chunks, sizes, capacity):
    trace = trace_of(chunks, sizes[: max(chunks) + 1], [3 * s for s in sizes[: max(chunks) + 1]])
    most = bound(trace, capacity)
    found = [belady(trace, capacity), *(simulate(trace, make_policy(name), capacity) for name in POLICIES)]
    for scores in map(trace.score, found):
        assert all(scores[name] <= most[name] + 1e-9 for name in most)


@given(chunks=st.lists(st.integers(0, 4), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_the_next_use(chunks):
    later = [next((j for j in range(i + 1, len(chunks)) if chunks[j] == c), len(chunks)) for i, c in enumerate(chunks)]
    assert next_use(np.array(chunks)).tolist() == later


def test_what_is_larger_than_the_cache_is_never_found():
    trace = trace_of([0, 0, 1, 1], [5, 2])
    for name in POLICIES:
        assert simulate(trace, make_policy(name), 3).tolist() == [False, False, False, True]
    assert belady(trace, 3).tolist() == [False, False, False, True]


def test_scores():
    trace = trace_of([0, 1, 0, 0], [10, 30], [0, 20])
    assert trace.score(np.array([False, False, True, False])) == pytest.approx(
        {"hits": 1 / 4, "tokens": 10 / 60, "saved": 10 / 80, "requests": (0 + 1 / 2) / 2}
    )


def test_a_whole_comparison():
    result = compare([zipf_trace(0.8, **SMALL)], list(POLICIES), [0.05, 0.2])
    assert len(result["rows"]) == 2 * (len(POLICIES) + 2)
    assert result["winner"] in POLICIES
    for table in tables(result).values():
        assert [line["size"] for line in table] == ["5 %", "20 %"]
        for line in table:
            assert max(line[name] for name in POLICIES) < line["bound"]
        assert table[0]["lru"] < table[1]["lru"]


def test_admission_pays_where_scans_wash_through():
    """What the policies are for, end to end: with scans, LRU keeps least."""
    result = compare([zipf_trace(0.9, scan_share=0.4, **SMALL)], list(POLICIES), [0.05])
    saved = {row["policy"]: row["saved"] for row in result["rows"]}
    assert saved["lru"] < saved["s3-fifo"]
    assert saved["lru"] < saved["cost"]


def test_zipf_traces_are_seeded_skewed_and_scanned():
    one, same, other = (zipf_trace(1.0, seed=seed, **SMALL) for seed in (1, 1, 2))
    assert (one.chunks == same.chunks).all()
    assert (one.chunks != other.chunks).any()
    counts = np.bincount(one.chunks)
    assert (counts[300:] == 1).all(), "scans are never asked for again"
    assert len(counts) - 300 == pytest.approx(0.2 * 3000, rel=0.02)
    assert np.sort(counts)[-30:].sum() > counts.sum() / 4
    assert len(set(one.tokens.tolist())) > 100


def write(path, *lines) -> None:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


def request(at: float, ids: list[int]) -> dict[str, object]:
    return {"timestamp": at, "input_length": 512 * len(ids), "output_length": 3, "hash_ids": ids}


def test_a_conversation_trace(tmp_path):
    path = tmp_path / "talk.jsonl"
    write(path, request(5, [9, 8, 7, 6]), "", request(0, [9, 4]))
    trace = read_trace(path)
    assert trace.name == "talk"
    assert trace.chunks.tolist() == [0, 1, 0, 2, 3, 4], "in the order of time"
    assert trace.starts.tolist() == [0, 2]
    assert trace.tokens.tolist() == [512] * 5
    assert trace.context.tolist() == [0, 512, 512, 1024, 1024]


@pytest.mark.parametrize("line", ["no json", "[1]", '{"timestamp": 0}', json.dumps(request(0, []))])
def test_what_is_no_trace_is_refused_by_its_line(tmp_path, line):
    path = tmp_path / "talk.jsonl"
    write(path, request(0, [1]), line)
    with pytest.raises(InputError, match="line 2 is no request"):
        read_trace(path)


def test_files_that_hold_no_trace(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="holds no request"):
        read_trace(tmp_path / "empty.jsonl")


def run(*args: object):
    return CliRunner().invoke(app, ["cache-policy", *map(str, args)])


@pytest.fixture
def talk(tmp_path):
    path = tmp_path / "talk.jsonl"
    write(path, *(request(i, [0, 1 + i % 7, 2 + i % 5]) for i in range(60)))
    return path


def test_the_command_prints_json_and_draws(talk, tmp_path):
    result = run(talk, "--zipf", "", "--sizes", "50", "--json", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert [row["policy"] for row in printed["rows"]] == [*POLICIES, "belady", "bound"]
    assert set(printed["overall"]) == set(POLICIES)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_tables(talk):
    result = run(talk, "--zipf", "", "--sizes", "20,50", "--policies", "lru,cost")
    assert result.exit_code == 0, result.output
    assert "belady" in result.stdout
    assert "most saved over all" in result.stdout
    assert "s3-fifo" not in result.stdout


@pytest.mark.parametrize(
    ("option", "value"), [("--sizes", "0"), ("--sizes", "x"), ("--sizes", "101"), ("--zipf", "-1"), ("--policies", "q")]
)
def test_wrong_options_are_named(talk, option, value):
    result = run(talk, option, value)
    assert isinstance(result.exception, ConfigError)
    assert option in str(result.exception)


def test_nothing_to_compare(talk):
    assert isinstance(run("--zipf", "").exception, ConfigError)


def test_a_plot_that_cannot_be_drawn_is_said_first(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"\.png"):
        cache_policy_plot.check(tmp_path / "p.docx")
    with pytest.raises(InputError, match="folder that exists"):
        cache_policy_plot.check(tmp_path / "no" / "p.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ragkv\[plots\]'"):
        cache_policy_plot.check(tmp_path / "p.png")
