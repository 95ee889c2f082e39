"""How many requests a second keep a limit: the queue's arithmetic, and the measurement around it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from ragkv import presets
from ragkv.errors import ConfigError
from ragkv.eval.arrivals import highest_rate, poisson, serve_at, times_in_system, typical_arrivals
from ragkv.eval.cli import app
from ragkv.eval.load import LoadPlan
from ragkv.eval.ttft_show import brief_load, show_load


def test_times_are_those_of_a_queue_walked_by_hand() -> None:
    arrivals, services = np.array([1.0, 1.5, 9.0, 9.1, 9.2]), np.array([2.0, 1.0, 0.5, 3.0, 1.0])
    free, expected = 0.0, []
    for at, service in zip(arrivals, services, strict=True):
        free = max(at, free) + service
        expected.append(free - at)
    assert times_in_system(arrivals, services) == pytest.approx(expected)


def test_times_agree_with_theory() -> None:
    """The mean wait with exponential services and a load of 0.7: load ÷ (1 - load) services."""
    services = np.random.default_rng(3).exponential(1.0, 200_000)
    times = times_in_system(poisson(0.7, 200_000, 1), services)
    assert times.mean() == pytest.approx(1 / 0.3, rel=0.05)


def test_the_rate_found_just_keeps_the_limit() -> None:
    measured = [0.1, 0.12, 0.11]
    rate = highest_rate(measured, 0.5, 90)
    assert 1 / 0.11 > rate > 3

    def at(rate: float) -> float:
        services = np.random.default_rng(5).choice(measured, 100_000)
        return float(np.percentile(times_in_system(poisson(rate, 100_000, 6), services), 90))

    assert at(rate) == pytest.approx(0.5, rel=0.1)
    assert at(1.05 * rate) > 0.5 > at(0.95 * rate)
    assert highest_rate(measured, 0.5, 50) > rate > highest_rate(measured, 0.5, 99)


def test_faster_service_serves_more_than_in_proportion() -> None:
    slow, fast = highest_rate([1.0], 2.0, 90), highest_rate([0.25], 2.0, 90)
    assert fast > 5 * slow


def test_what_is_never_in_time_has_no_rate() -> None:
    assert highest_rate([0.6, 0.7], 0.5, 90) == 0.0


def test_typical_arrivals_just_keep_the_limit() -> None:
    measured = [0.3, 0.31]
    rate = highest_rate(measured, 0.9, 90)
    arrivals, times = typical_arrivals(rate, 30, measured, 0.9, 90)
    assert len(arrivals) == len(times) == 30
    assert 0.85 < np.percentile(times, 90) <= 0.9


def test_nobody_is_served_before_coming_and_waiting_counts() -> None:
    now = [100.0]
    served: list[tuple[str, float]] = []

    def serve(name: str) -> None:
        served.append((name, now[0] - 100))
        now[0] += 2.0

    def sleep(seconds: float) -> None:
        now[0] += seconds

    times = serve_at(np.array([1.0, 2.0, 9.0]), ["a", "b", "c"], serve, clock=lambda: now[0], sleep=sleep)
    assert served == [("a", 1.0), ("b", 3.0), ("c", 9.0)]
    assert times == pytest.approx([2.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tier": "remote"}, "'remote' is not one of device, ram, ssd"),
        ({"codec": "zip"}, "'zip' is not one of raw"),
        ({"pool": 3}, "3 chunks of 512 tokens are too few"),
        ({"limit": 1.0}, "--limit more than 1"),
        ({"percentile": 100.0}, "--percentile"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoadPlan(**options)


def test_the_command_measures_every_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = presets._options(4, 64, 96, (4, 2), 9000, 512, rope_parameters=presets._rope(1e4))
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Preset("qwen2", shapes))
    monkeypatch.setenv("RAGKV_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAGKV_DEVICE", "cpu")
    command = "load --model random:tiny --context 48 --chunk-tokens 16 --pool 5 --prompts 3 --question-tokens 4"
    options = f" --methods none,default --confirm-s 0.1 --out {tmp_path / 'rows.json'} --json"
    done = CliRunner().invoke(app, (command + options).split())
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [row["method"] for row in rows] == ["full", "none", "default"]
    full = rows[0]["requests_per_s"]
    assert rows[0]["relative_to_full"] == (1.0 if full else None)
    assert {row["ttft_limit_ms"] for row in rows} == {rows[0]["ttft_limit_ms"]}
    for row in rows:
        assert (row["chose"] is not None) == (row["method"] == "default")
        if row["requests_per_s"]:
            assert row["confirmed"] == (row["p90_ttft_ms"] <= row["ttft_limit_ms"])
            assert 0.9 * row["simulated_requests_per_s"] < row["requests_per_s"] <= row["simulated_requests_per_s"]
            assert row["relative_to_full"] == (pytest.approx(row["requests_per_s"] / full) if full else None)
            assert row["p50_ttft_ms"] <= row["p90_ttft_ms"] <= row["p99_ttft_ms"]
            assert 0 < row["utilisation"] < 1
            assert row["requests"] >= 12
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["rows"] == rows
    assert {"command", "date", "gpu", "versions"} <= saved.keys()
    text = io.StringIO()
    show_load(Console(file=text, width=80), rows)
    assert "requests/s" in text.getvalue()
    assert "48 tokens from ram, raw: p90 within" in text.getvalue()


def test_a_limit_that_full_prefill_keeps_at_no_rate_leaves_nothing_to_compare_with():
    row = {"method": "none", "chose": None, "ratio": 0.0, "requests_per_s": 3.0, "relative_to_full": None}
    assert brief_load({**row, "confirmed": True, "service_ms": 5.0})["to full"] == ""
