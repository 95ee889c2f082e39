"""The fused layer loop against the plain one, on any device."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ragkv.attention import AttentionStep
from ragkv.eval.compared import along
from ragkv.eval.steps import drained
from ragkv.fused_graphs import Captured
from ragkv.lookahead import look
from ragkv.prefill import PrefillResult
from ragkv.rows import Joined
from ragkv.runner import ModelRunner, Rows
from tests.families import make_model

FUSED = [
    "llama",
    "llama-llama3",
    "mistral",
    "mistral-windowed",
    "qwen2",
    "qwen2-windowed",
    "qwen2-yarn",
    "qwen3",
    "smollm3",
    "smollm3-windowed",
]
# Twice what the plain loop itself is off in these dtypes; what is wrong is off by half of everything.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.12}


def runners(name: str, dtype: torch.dtype, device: str) -> tuple[ModelRunner, ModelRunner]:
    """The same weights, fused and plain."""
    fused = ModelRunner(make_model(name).to(device, dtype), fused=True)
    assert fused.plain_because is None
    return fused, ModelRunner(make_model(name).to(device, dtype), fused=False)


def ids_of(runner: ModelRunner, count: int) -> torch.Tensor:
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(3)).to(runner.device)


def scattered(runner: ModelRunner, kv, ids: torch.Tensor, score_rows: int = 0, last_only: bool = False) -> Rows:
    """Every third row and the last eight again, on top of what ``kv`` holds."""
    chosen = torch.arange(len(ids)) % 3 == 0
    chosen[-8:] = True
    positions = chosen.nonzero()[:, 0].to(runner.device)
    options = {"score_rows": score_rows, "last_only": last_only}
    step = AttentionStep(kv, positions + kv.base, len(ids), contiguous=False, **options)
    if kv.base:
        return runner.rows(ids[positions], step)
    return runner.rows_of(ids.cpu().numpy(), step, len(ids))


def near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(actual).all()
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    assert error <= TOLERANCE[dtype], f"off by {error:.2%}"


@torch.inference_mode()
def check_starts(runner: ModelRunner) -> None:
    """Rows begin where the runner puts them as those that are embedded by themselves, in memory of their own and in
    that of graphs for more rows."""
    ids = ids_of(runner, 61)
    positions = torch.cat((torch.arange(5, 9), torch.arange(40, 61))).to(runner.device)
    step = AttentionStep(runner.new_kv(61), positions, 61, contiguous=False, last_only=True)
    expected = runner.rows(ids[positions], step, 61)
    room = runner.rows(ids[:32], AttentionStep(step.kv, torch.arange(32, device=runner.device), 32, contiguous=False))
    graphs, captured = runner.fused.graphs, Captured(room, [])
    for own in (True, False):
        runner.fused.graphs = None if own else SimpleNamespace(taking=lambda *_: captured)
        rows = runner.rows_of(ids.cpu().numpy(), step, 61)
        assert rows.step is step
        assert rows.room is (None if own else captured)
        assert torch.equal(rows.hidden, expected.hidden)
        assert all(torch.equal(*parts) for parts in zip(rows.rotary, expected.rotary, strict=True))
    runner.fused.graphs = graphs
    assert torch.equal(room.step.slots[7:], positions)
    for part in (room.hidden[0], room.rotary[0][0], room.rotary[1][0], room.step.slots):
        assert (part[:7] == part[7]).all()


@torch.inference_mode()
def check_passes(name: str, dtype: torch.dtype, device: str) -> None:
    """A prefill, some rows again with their attention collected, a token decoded."""
    results = []
    for runner in runners(name, dtype, device):
        ids = ids_of(runner, 61)
        kv = runner.new_kv(70, base=5)
        for layer in range(runner.shape.layers):
            for part in kv.read(layer, 70):
                part.fill_(float("nan"))
        logits = runner.logits(runner.prefill(ids, kv))
        first = torch.stack([torch.stack(kv.read(layer, 61)) for layer in range(runner.shape.layers)])
        rows = scattered(runner, kv, ids, score_rows=8)
        for layer in range(runner.shape.layers):
            runner.run_layer(layer, rows)
        decoded = runner.decode(7, 5 + 61, kv)
        results.append((logits, first, rows.hidden, runner.logits(rows), rows.step.scores, decoded))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        near(actual, expected, dtype)


@torch.inference_mode()
def check_values(name: str, dtype: torch.dtype, device: str) -> None:
    """A probe gives what the layer then writes, and advances nothing."""
    fused, _ = runners(name, dtype, device)
    ids, kv = ids_of(fused, 20), fused.new_kv(20)
    rows = fused.start_prefill(ids, kv)
    fused.run_layer(0, rows)
    for part in kv.read(1, 20):
        part.fill_(777.0)
    hidden = rows.hidden.clone()
    values = fused.probe_values(1, rows)
    assert torch.equal(rows.hidden, hidden)
    assert all((part == 777.0).all() for part in kv.read(1, 20))
    fused.run_layer(1, rows)
    near(values, kv.read(1, 20)[1], dtype)


@torch.inference_mode()
def check_some_rows_go_on(name: str, dtype: torch.dtype, device: str) -> None:
    """Rows taken out of others' hidden states between two layers, as a check layer does it."""
    results = []
    for runner in runners(name, dtype, device):
        ids, kv = ids_of(runner, 40), runner.new_kv(40)
        dense = runner.start_prefill(ids, kv)
        runner.run_layer(0, dense)
        for layer in range(1, runner.shape.layers):
            for part in kv.read(layer, 40):
                part.fill_(0.5)
        rows = scattered(runner, kv, ids)
        rows.hidden = dense.hidden[:, rows.step.positions]
        for layer in range(1, runner.shape.layers):
            runner.run_layer(layer, rows)
        results.append(runner.logits(rows))
    near(results[0], results[1], dtype)


@torch.inference_mode()
def check_along(name: str, dtype: torch.dtype, device: str) -> None:
    """What would be picked at every place of an answer, read off one pass."""
    results = []
    for runner in runners(name, dtype, device):
        ids, kv = ids_of(runner, 40), runner.workspace(40)
        result = PrefillResult(runner.logits(runner.prefill(ids[:25], kv)), kv, 0, list)
        results.append(along(runner, result, 25, ids[25:].tolist()))
    near(results[0], results[1], dtype)


@torch.inference_mode()
def check_the_end(runner: ModelRunner) -> None:
    """In the last layer all rows write their KV, and the last row alone goes on, where only that is asked for."""
    last = runner.shape.layers - 1
    for score_rows, last_only in ((0, True), (0, False), (6, True)):
        rows = repaired(runner, 61, 1, score_rows, last_only)
        for layer in range(last):
            runner.run_layer(layer, rows)
        before = rows.hidden.clone()
        runner.run_layer(last, rows)
        assert not torch.equal(rows.hidden[:, -1], before[:, -1])
        assert torch.equal(rows.hidden[:, :-1], before[:, :-1]) == (last_only and not score_rows)
        assert all(torch.isfinite(part).all() for part in rows.step.kv.read(last, 61))


def prompt(runner: ModelRunner, length: int, seed: int) -> Rows:
    """The rows of a prefill."""
    ids = torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).to(runner.device)
    return runner.start_prefill(ids, runner.new_kv(length))


def repaired(runner: ModelRunner, length: int, seed: int, score_rows: int = 0, last_only: bool = False) -> Rows:
    """Some rows over keys that are there, anything in the slots of the rows."""
    ids = torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).to(runner.device)
    kv = runner.workspace(length)
    runner.prefill(ids, kv)
    rows = scattered(runner, kv, ids, score_rows, last_only)
    for layer in range(runner.shape.layers):
        for part in kv.read(layer, length):
            part[rows.step.slots] = float("nan")
    return rows


@torch.inference_mode()
def check_joined(runner: ModelRunner, dtype: torch.dtype) -> None:
    """Prompts of several kinds that join, part and join again, beside each by itself: what they come to, what they
    write, and the attention that was collected."""

    layers = range(runner.shape.layers)

    def prompts() -> list[Rows]:
        kinds = [repaired(runner, 61, 1), repaired(runner, 45, 2, score_rows=6), prompt(runner, 17, 3)]
        return [*kinds, prompt(runner, 1, 4), repaired(runner, 90, 5)]

    def ends(rows: Rows) -> list[torch.Tensor]:
        kv = [part.clone() for layer in layers for part in rows.step.kv.read(layer, rows.step.length)]
        scores = [] if rows.step.scores is None else [rows.step.scores]
        return [rows.hidden[:, -1].clone(), runner.logits(rows), *kv, *scores]

    expected = []
    for rows in prompts():
        for layer in layers:
            runner.run_layer(layer, rows)
        expected.append(ends(rows))
    del rows  # where there is but one workspace, the first has it again
    together = prompts()
    runner.run_layer(0, together[0])
    runner.run_together(0, Joined(together[1:]))
    runner.run_together(1, Joined(together))
    runner.run_layer(2, together[0])
    runner.run_together(2, Joined([together[3], together[1], together[2]]))
    runner.run_layer(2, together[4])
    joined = Joined(together[::-1])
    for layer in layers[3:]:
        runner.run_together(layer, joined)
    for rows, right in zip(together, expected, strict=True):
        for one, other in zip(ends(rows), right, strict=True):
            near(one, other, dtype)


@torch.inference_mode()
def check_looking_ahead(name: str, dtype: torch.dtype, device: str) -> None:
    """Queries of a few rows that stand apart, and the attention that the last six pay to other keys."""
    results = []
    for runner in runners(name, dtype, device):
        ids, kv = ids_of(runner, 61), runner.new_kv(61)
        runner.prefill(ids, kv)
        positions = torch.cat((torch.arange(3), torch.arange(55, 61))).to(runner.device)
        found = drained(look(runner, ids[positions], positions))
        step = AttentionStep(kv, positions[3:], 61, contiguous=False, score_rows=6)
        runner.score(found.behind(3), step)
        results.append((found.queries, found.kv, step.scores))
    for actual, expected in zip(*results, strict=True):
        assert actual.shape == expected.shape
        near(actual, expected, dtype)
