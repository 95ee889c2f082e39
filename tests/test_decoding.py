"""Requests decoded together, in scattered blocks, against each decoded alone."""

from __future__ import annotations

import pytest
import torch

from ragkv.decoding import Decoder
from ragkv.errors import RagkvError
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.runner import ModelRunner
from tests.blend_kit import close, token_ids
from tests.families import IMMOVABLE, MOVABLE, make_runner

LENGTHS = (5, 16, 31, 47)
STEPS = 20
# Scattered, and one of them (the last) in a single run.
TABLES = ([20, 3], [1, 22, 4], [9, 8, 7, 0], [10, 11, 12, 13, 14])


def prefilled(runner: ModelRunner, pool: PagedKV, lane: int) -> int:
    """A prompt's KV in the pool; its next token."""
    ids = runner.tensor(token_ids(LENGTHS[lane], lane))
    kv = runner.new_kv(len(ids))
    logits = runner.logits(runner.prefill(ids, kv))
    pool.scatter(kv, TABLES[lane], 0, len(ids))
    return int(logits.argmax())


@torch.inference_mode()
def alone(runner: ModelRunner, lane: int, steps: int = STEPS) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the last logits of one request by itself."""
    ids = runner.tensor(token_ids(LENGTHS[lane], lane))
    kv = runner.new_kv(len(ids) + steps)
    logits = runner.logits(runner.prefill(ids, kv))
    tokens = [int(logits.argmax())]
    for position in range(len(ids), len(ids) + steps):
        logits = runner.decode(tokens[-1], position, kv)
        tokens.append(int(logits.argmax()))
    return tokens, logits


@torch.inference_mode()
def new_decoder(runner: ModelRunner) -> tuple[Decoder, PagedKV]:
    pool = PagedKV(runner.shape, 24, runner.device)
    pool.data.fill_(float("nan"))  # reading what nobody wrote shows
    return Decoder(runner, pool, lanes=4, max_tokens=80), pool


@pytest.mark.parametrize("name", [*MOVABLE, *IMMOVABLE])
@torch.inference_mode()
def test_together_as_alone(name):
    runner = make_runner(name)
    decoder, pool = new_decoder(runner)
    lanes = [2, 0, 3, 1]
    tokens = {lane: [prefilled(runner, pool, lane)] for lane in lanes}
    for lane in lanes:
        decoder.enter(lane, tokens[lane][0], LENGTHS[lane], TABLES[lane])
    for _ in range(STEPS):
        logits = decoder.step(lanes)
        chosen = logits.argmax(-1)
        decoder.put_tokens(lanes, chosen)
        for lane, token in zip(lanes, chosen.tolist(), strict=True):
            tokens[lane].append(token)
    assert (logits.dtype, logits.shape) == (torch.float32, (4, 256))
    for row, lane in enumerate(lanes):
        expected, last = alone(runner, lane)
        assert tokens[lane] == expected
        close(logits[row], last)


@torch.inference_mode()
def test_lanes_come_and_go():
    """One leaves and comes back elsewhere, in other blocks; one begins later; tables grow on the way."""
    runner = make_runner("qwen3")
    decoder, pool = new_decoder(runner)
    tokens = {lane: [prefilled(runner, pool, lane)] for lane in (0, 2, 3)}
    for lane in (0, 2):
        decoder.enter(lane, tokens[lane][0], LENGTHS[lane], TABLES[lane][: (LENGTHS[lane] + 3) // BLOCK_TOKENS + 1])
    _run(decoder, {0: 0, 2: 2}, tokens, 3)
    decoder.left(2)
    decoder.enter(3, tokens[3][0], LENGTHS[3], TABLES[3])
    _run(decoder, {3: 3, 0: 0}, tokens, 5)
    moved = [21, 19, 18]
    pool.data[moved] = pool.data[TABLES[2][:3]]
    pool.data[TABLES[2][:3]] = float("nan")
    decoder.enter(2, tokens[2][-1], LENGTHS[2] + 3, moved)
    decoder.extend(0, TABLES[0][1:])
    decoder.extend(2, [23])
    _run(decoder, {0: 0, 2: 2, 3: 3}, tokens, 8)
    for lane, got in tokens.items():
        assert got == alone(runner, lane, len(got) - 1)[0]


def _run(decoder: Decoder, requests: dict[int, int], tokens: dict[int, list[int]], steps: int) -> None:
    lanes = list(requests)
    for _ in range(steps):
        chosen = decoder.step(lanes).argmax(-1)
        decoder.put_tokens(lanes, chosen)
        for lane, token in zip(lanes, chosen.tolist(), strict=True):
            tokens[requests[lane]].append(token)


@torch.inference_mode()
def test_a_row_is_not_touched_by_what_others_do():
    """The same lane alone and beside others: the blocks it wrote are the same."""
    runner = make_runner("llama")
    results = []
    for lanes in ([1], [0, 1, 3]):
        decoder, pool = new_decoder(runner)
        for lane in lanes:
            decoder.enter(lane, prefilled(runner, pool, lane), LENGTHS[lane], TABLES[lane])
        decoder.step(lanes)
        results.append(pool.data[TABLES[1]].nan_to_num(-1.0))
    close(results[0], results[1])


def test_a_table_that_is_too_short_or_too_long_is_refused():
    decoder, _ = new_decoder(make_runner("llama"))
    decoder.enter(0, 5, 16, [3])
    with pytest.raises(RagkvError, match="lane 0 is at 16"):
        decoder.step([0])
    with pytest.raises(RagkvError, match="table holds 5"):
        decoder.extend(0, [1, 2, 4, 5, 6])
    with pytest.raises(RagkvError, match="lane 4"):
        decoder.enter(4, 5, 0, [1])
