"""The speed yardstick: rows as promised, chunks that really come from their tier, a floor that counts what it must."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from ragkv import presets
from ragkv.checkpoint import load_checkpoint
from ragkv.config import Settings, load_settings
from ragkv.errors import ConfigError, PromptTooLongError, StoreError
from ragkv.eval import rates, ttft_bench
from ragkv.eval.cli import app
from ragkv.eval.machine import device_name
from ragkv.eval.rates import Rates, Work, matrix_rate, memory_rate, ram_rate, work_of
from ragkv.eval.ttft import Plan, measure_ttft
from ragkv.eval.ttft_bench import Bench, opened
from ragkv.eval.ttft_show import plot, show
from ragkv.eval.ttft_stores import Place
from ragkv.prefill import SpanOutcome
from tests.remote_kit import FakeTier

MODEL = "random:tiny"
COLUMNS = [
    "model",
    "tier",
    "codec",
    "context_tokens",
    "method",
    "ratio",
    "recomputed_share",
    "ttft_ms",
    "full_prefill_ms",
    "speedup",
    "floor_ms",
    "over_floor",
    "bytes_loaded",
    "device",
]
DEVICE, RAM, SSD, REMOTE = (Place(tier, "raw") for tier in ("device", "ram", "ssd", "remote"))
TINY: dict[str, Any] = {"chunk_tokens": 16, "question_tokens": 5, "passes": 1}


def _silent(stage: str, done: int, total: int) -> None:
    return


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    options = presets._options(4, 64, 96, (4, 2), 9000, 512, rope_parameters=presets._rope(1e4))
    monkeypatch.setitem(presets.PRESETS, "tiny", presets.Preset("qwen2", options))
    made_up = Rates(1e9, 1e9, None, {"device": 1e10, "ram": 1e9, "ssd": 1e8, "remote": 1e7})
    monkeypatch.setattr(Bench, "rates", lambda self, context: made_up)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(model=MODEL, data_dir=tmp_path, dtype="float32", device="cpu", threads=1)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with _opened(tmp_path, DEVICE, RAM, SSD) as bench:
        yield bench


def _opened(folder: Path, *places: Place, remote: FakeTier | None = None) -> Any:
    checkpoint = load_checkpoint(MODEL, device="cpu", dtype="float32", cache_dir=folder)
    return opened(
        checkpoint,
        places,
        [40],
        chunk_tokens=16,
        question_tokens=5,
        folder=folder,
        remote=remote,
        remote_timeout_ms=1000,
    )


# Rows


def test_rows_are_as_promised(settings: Settings) -> None:
    asked = (("full", 1.0), ("none", 0.0), ("question", 0.5), ("hkvd", 0.25), ("default", 0.15))
    plan = Plan((32, 40), asked=asked, codecs=("raw", "int8"), **TINY)
    result = measure_ttft(settings, plan, say=_silent)
    rows = result["rows"]
    assert [list(row)[: len(COLUMNS)] for row in rows] == [COLUMNS] * 40
    json.dumps(result)
    for row in rows:
        full, none = "full" in (row["method"], row["chose"]), row["method"] == "none"
        assert (row["chose"] in ("full", "blend", "split")) == (row["method"] == "default")
        assert row["passes"] == 1
        assert row["later_ms"] == pytest.approx(row["ttft_ms"] - row["full_prefill_ms"])
        flops = row["full_prefill_tflops"] * 1e12
        assert row["full_prefill_of_matrix_rate"] == pytest.approx(flops / result["rates"]["flops"])
        assert row["speedup"] == pytest.approx(row["full_prefill_ms"] / row["ttft_ms"])
        assert row["full_prefill_ms"] == min(row["library_prefill_ms"], row["ragkv_prefill_ms"])
        assert row["over_floor"] == pytest.approx(row["ttft_ms"] / max(row["floors_ms"].values()))
        assert (row["bytes_loaded"] == 0) == full
        assert full or row["bytes_loaded"] < 32 * 1024 * 4 or row["codec"] == "raw"
        assert (row["recomputed_share"] == 0) == none
    [half] = {row["recomputed_share"] for row in rows if row["method"] == "question"}
    assert half == 0.5
    assert {row["bytes_loaded"] for row in rows if row["method"] == "none" and row["codec"] == "raw"} == {
        tokens * 4 * 2 * 2 * 16 * 4 for tokens in (32, 40)
    }


def test_chunks_come_from_the_tier_asked_for(bench: Bench) -> None:
    requests = bench.requests(40, "raw")
    for place in (DEVICE, RAM, SSD, DEVICE, SSD):
        bench.settle(place, requests)
        run = bench.run(place, requests, "epic", 0.5)
        assert [outcome.kv for outcome in run.outcomes] == [place.tier] * 3
        assert [span.length for span in run.plan.spans] == [16, 16, 8]
        assert sum(run.parts.values()) == pytest.approx(run.seconds)


def test_of_requests_at_once_the_median_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = bench.requests(40, "raw", 3)
    assert len({tuple(chunk.tokens.key for chunk in one.chunks) for one in requests}) == 3
    assert len({one.question for one in requests}) == 3
    from_ssd = bench.run(SSD, requests, "none", 0.0, tries=1)
    assert {outcome.kv for outcome in from_ssd.outcomes} == {"ssd"}
    bench.settle(RAM, requests)
    run = bench.run(RAM, requests, "none", 0.0)
    assert run.plan.spans[0].chunk.chunk == requests[1].chunks[0].chunk
    assert run.service < run.seconds < 3 * run.service
    assert run.parts["queue"] > 0.3 * run.service  # it waited for the first
    seconds, service = bench.run_library(requests)
    assert service < seconds < 3 * service


def test_the_device_tier_moves_nothing_over_the_link() -> None:
    some = Rates(flops=100.0, memory=10.0, link=5.0, tiers={"device": 10.0})
    assert Work(20, 30, 700.0).floor_s("device", some) == {"tier": 2.0, "link": 0.0, "memory": 3.0, "chip": 7.0}


def test_the_device_tier_stands_alone_or_beside_others(settings: Settings) -> None:
    asked: Any = (("none", 0.0), ("default", 0.15))
    for tiers in (("device",), ("ssd", "device", "ram")):
        plan = Plan((40,), tiers=tiers, codecs=("int8",), asked=asked, **TINY)
        rows = measure_ttft(settings, plan, say=_silent)["rows"]
        assert [row["tier"] for row in rows] == [tier for tier in tiers for _ in asked]
        assert all(row["bytes_loaded"] for row in rows if row["method"] == "none")


def test_the_floor_of_a_batch_is_that_of_its_middle(settings: Settings) -> None:
    plan = Plan((32,), tiers=("ram",), asked=(("none", 0.0),), **TINY)
    [alone] = measure_ttft(settings, plan, say=_silent)["rows"]
    [three] = measure_ttft(settings, replace(plan, batch=3), say=_silent)["rows"]
    assert three["batch"] == 3
    assert three["floor_ms"] == pytest.approx(2 * alone["floor_ms"])


def test_every_pass_is_saved_and_a_budget_leaves_three(settings: Settings) -> None:
    saved: list[list[Any]] = []
    plan = Plan((16, 32), tiers=("ram",), asked=(("none", 0.0),), **{**TINY, "passes": 9}, budget_s=0.001)
    result = measure_ttft(settings, plan, say=_silent, save=lambda so_far: saved.append(so_far["rows"]))
    passes = [[(row["context_tokens"], row["passes"]) for row in rows] for rows in saved]
    first, second = ([(tokens, n) for n in (1, 2, 3, 3)] for tokens in (16, 32))  # the machine is measured once more
    assert passes == [[one] for one in first] + [[(16, 3), one] for one in second]
    assert saved[-1] == result["rows"]
    assert {row["passes"] for row in result["rows"]} == {3}
    plenty = measure_ttft(settings, replace(plan, budget_s=1000.0), say=_silent)
    assert {row["passes"] for row in plenty["rows"]} == {9}


def test_what_is_being_measured_is_told_before_it_begins(settings: Settings) -> None:
    said: list[tuple[str, int, int]] = []
    plan = Plan((16,), tiers=("ram", "ssd"), asked=(("none", 0.0), ("epic", 0.25)), **TINY)
    measure_ttft(settings, replace(plan, passes=2), say=lambda *step: said.append(step))
    turns = [
        "the library's full prefill",
        "full prefill",
        "none from ram, raw",
        "epic 25% from ram, raw",
        "none from ssd, raw",
        "epic 25% from ssd, raw",
    ]
    told = [step for step in said if step[0].startswith("16 tokens")]
    assert [step[1:] for step in told] == [(done, 14) for done in range(15)]
    names = [name.removeprefix("16 tokens: ") for name, _, _ in told]
    assert names[:2] == ["all chunks into ram, raw", "all chunks into ssd, raw"]
    assert sorted(names[2:8]) == sorted(names[8:14]) == sorted(turns)
    assert names[2:8] != names[8:14]
    assert names[14] == "16 tokens"
    assert [said[0], said[2]] == [("load", 0, 1), ("encoding chunks", 0, 1)]
    assert ("measuring the machine", 0, 1) in said


def test_in_whichever_order_they_run_figures_are_each_ones_own(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {"full": 8.0, "none": 1.0, "epic": 2.0}
    run = Bench.run

    def timed(bench: Bench, place: Place, requests: Any, method: Any, ratio: float, **options: int) -> Any:
        ran = run(bench, place, requests, method, ratio, **options)
        return ran._replace(seconds=seconds[method] + (place.tier == "ssd"))

    monkeypatch.setattr(Bench, "run", timed)
    plan = Plan((16,), tiers=("ram", "ssd"), asked=(("none", 0.0), ("epic", 0.25)), **TINY)
    rows = measure_ttft(settings, replace(plan, passes=3), say=_silent)["rows"]
    assert {(row["method"], row["tier"]): row["ttft_ms"] for row in rows} == {
        ("none", "ram"): 1000.0,
        ("none", "ssd"): 2000.0,
        ("epic", "ram"): 2000.0,
        ("epic", "ssd"): 3000.0,
    }
    assert {row["ragkv_prefill_ms"] for row in rows} == {8000.0}


def test_interrupting_leaves_the_passes_so_far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGKV_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAGKV_DEVICE", "cpu")
    library, turns = Bench.run_library, iter(range(2))

    def twice(self: Bench, requests: Any) -> Any:
        if next(turns, None) is None:
            raise KeyboardInterrupt
        return library(self, requests)

    monkeypatch.setattr(Bench, "run_library", twice)
    command = f"ttft --model {MODEL} --context 32 --tiers ram --methods none --chunk-tokens 16 --out r.json".split()
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert [row["passes"] for row in json.loads(Path("r.json").read_text())["rows"]] == [2]
    assert "32 tokens: all chunks into ram, raw" in done.stderr


def test_a_cpu_is_named_with_the_threads_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for threads, said in ((1, "CPU, 8 cores, 1 thread"), (3, "CPU, 8 cores, 3 threads")):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        assert device_name(torch.device("cpu")) == said


def test_what_the_controller_computes_is_told_and_what_is_lost_is_refused(bench: Bench) -> None:
    requests = bench.requests(40, "raw")
    run = bench.run(SSD, requests, "default", 0.15)
    assert run.forecast is not None
    assert {outcome.kv for outcome in run.outcomes} <= {"ssd", "computed"}
    with pytest.raises(StoreError, match="not stored yet"):
        bench.run(SSD, bench.requests(48, "raw"), "default", 0.15)


def test_a_chunk_from_elsewhere_is_no_measurement(bench: Bench) -> None:
    with pytest.raises(StoreError, match="came from 'computed', not 'ssd': not stored yet"):
        bench.run(SSD, bench.requests(48, "raw"), "none", 0.0)


def test_the_remote_tier_stays_remote_and_is_left_empty(tmp_path: Path) -> None:
    tier = FakeTier()
    with _opened(tmp_path, REMOTE, remote=tier) as bench:
        requests = bench.requests(40, "raw")
        assert len(tier.objects) == 3
        for _ in range(2):
            run = bench.run(REMOTE, requests, "question", 0.5)
            assert {outcome.kv for outcome in run.outcomes} == {"remote"}
        assert bench._tier_rate(REMOTE, 40) > 0
    assert not tier.objects
    assert not list(tmp_path.glob("ragkv-eval-ttft-*"))


def test_the_library_prefills_the_same_ids(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    forward = bench.runner.model.forward

    def watched(ids: Any, **options: Any) -> Any:
        seen["ids"], seen["attention"] = ids, bench.runner.config._attn_implementation
        return forward(ids, **options)

    monkeypatch.setattr(bench.runner.model, "forward", watched)
    requests = bench.requests(40, "raw")
    assert bench.run_library(requests)[0] > 0
    assert tuple(seen["ids"][0].tolist()) == bench.run(RAM, requests, "full", 1.0).plan.ids
    assert seen["attention"] == "sdpa"
    assert bench.runner.config._attn_implementation == "ragkv"


# Floors


def test_the_floor_counts_matrices_and_attention_to_the_causal_limit(bench: Bench) -> None:
    run = bench.run(RAM, bench.requests(40, "raw"), "full", 1.0)
    work = work_of(bench.runner, run.plan, run.outcomes, 0)
    model = bench.runner.model
    *layers, last = [sum(p.numel() for p in layer.parameters() if p.dim() > 1) for layer in model.model.layers]
    kv = sum(getattr(model.model.layers[-1].self_attn, name).weight.numel() for name in ("k_proj", "v_proj"))
    # Of the last layer: keys and values of all rows, and the rest of the prompt's last.
    end = 2 * (last - kv + model.lm_head.weight.numel()) + 4 * 4 * 16 * 45
    rows = 2 * 45 * (sum(layers) + kv) + len(layers) * 4 * 4 * 16 * sum(range(1, 46))
    assert work.flops == pytest.approx(rows + end)
    nothing = work_of(bench.runner, run.plan, [SpanOutcome("ram")] * 3, 7)
    rows = 2 * 5 * (sum(layers) + kv) + len(layers) * 4 * 4 * 16 * sum(range(41, 46))
    assert nothing.flops == pytest.approx(rows + end)
    assert nothing.memory_bytes == work.memory_bytes


def test_each_resource_has_its_own_time() -> None:
    some = Rates(flops=100.0, memory=10.0, link=5.0, tiers={"ssd": 2.0})
    assert Work(20, 30, 700.0).floor_s("ssd", some) == {"tier": 10.0, "link": 4.0, "memory": 3.0, "chip": 7.0}
    best = some.best(Rates(flops=50.0, memory=20.0, link=6.0, tiers={"ssd": 3.0}))
    assert best == Rates(100.0, 20.0, 6.0, {"ssd": 3.0})


def test_rates_are_measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_COPIED_BYTES", 1 << 16)
    monkeypatch.setitem(rates._LEAST_MATRIX_FLOPS, "cpu", 1e6)
    assert min(matrix_rate(bench.runner), memory_rate(bench.runner), ram_rate(), bench._tier_rate(SSD, 40)) > 0


# Refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tiers": ("tape",)}, "'tape' is no tier; there are device, ram, ssd, remote"),
        ({"codecs": ("zip",)}, "'zip' is not one of raw"),
        ({"batch": 0}, "--batch"),
        ({"asked": ()}, "nothing to measure"),
        ({"passes": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan((64,), **options)


def test_a_remote_tier_must_be_configured(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="remote_url"):
        measure_ttft(settings, Plan((16,), tiers=("remote",)), say=_silent)


def test_a_context_must_fit_the_model(settings: Settings) -> None:
    with pytest.raises(PromptTooLongError, match="512 positions"):
        measure_ttft(settings, Plan((512,)), say=_silent)


# Doors


def test_the_command_prints_saves_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAGKV_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("RAGKV_DEVICE", "cpu")
    command = f"ttft --model {MODEL} --context 32 --tiers ram --methods full,none,epic --ratio 0.5 --passes 1".split()
    command += ["--chunk-tokens", "16", "--question-tokens", "4", "--out", "r.json", "--plot", "r.svg", "--json"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(row["method"], row["ratio"]) for row in rows] == [("full", 1.0), ("none", 0.0), ("epic", 0.5)]
    saved = json.loads(Path("r.json").read_text())
    assert saved["rows"] == rows
    assert {"command", "date", "gpu", "versions"} <= saved.keys()
    assert 1 < saved["host_loop_us"] < 10_000
    assert "time to first token" in Path("r.svg").read_text()
    text = io.StringIO()
    show(Console(file=text, width=80), rows)
    assert "speedups are against" in text.getvalue()
    assert "50.0%" in text.getvalue()


def test_a_plot_needs_a_known_ending(tmp_path: Path) -> None:
    from ragkv.errors import InputError

    with pytest.raises(InputError, match="cannot be drawn"):
        plot([], tmp_path / "rows.xyz")


def test_settling_gives_up_with_the_reason(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ttft_bench, "_SETTLE_TRIES", 2)
    with pytest.raises(StoreError, match="not stored yet"):
        bench.settle(RAM, bench.requests(48, "raw"))
