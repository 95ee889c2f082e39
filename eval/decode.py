"""Inter-token latency of decoding, beside the time that reading what it must read takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from ragkv.checkpoint import load_checkpoint
from ragkv.config import Settings
from ragkv.decoding import Decoder
from ragkv.errors import InputError
from ragkv.eval.machine import device_name, environment
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.runner import ModelRunner
from ragkv.selfcheck import settle_layer_loop

Row = dict[str, Any]
_GROUPS, _STEPS, _WARM_UP = 7, 8, 4
_TAKEN = _WARM_UP + _GROUPS * _STEPS
_COPIED_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}
_COPIES = 4
_RESERVE = 4 << 30  # of the device's memory: what a step itself needs


def measure_decode(
    settings: Settings, batches: Sequence[int], contexts: Sequence[int], *, say: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Rows of every batch of every context, and the rate their floors are made of.

    A step is what serving does: :meth:`Decoder.step`, the greedy token, which goes back in, and the host's reading it
    one step late. Blocks are scattered over the pool. What does not fit into the device's memory is left out.

    Raises:
        ModelError: the model cannot be used.
        InputError: a context is longer than the model's positions.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    folder = settings.data_dir.expanduser()
    runner = load_checkpoint(settings.model, device=settings.device, dtype=settings.dtype, cache_dir=folder).runner
    settle_layer_loop(runner)
    if max(contexts) + _TAKEN > runner.max_positions:
        raise InputError(f"{max(contexts)} context tokens and {_TAKEN} more: the model has {runner.max_positions}")
    rate = copy_rate(runner)
    cases = [(batch, context, _blocks(context)) for context in contexts for batch in batches]
    rows = []
    for done, (batch, context, blocks) in enumerate(cases):
        say("decode", done, len(cases))
        if _fits(runner, batch * blocks):
            rows.append(_row(runner, batch, context, blocks, rate))
    facts = environment(runner.device) | {"layers": runner.layer_loop, "dtype": str(runner.shape.dtype)}
    return {**facts, "memory_bytes_s": rate, "rows": rows}


def copy_rate(runner: ModelRunner) -> float:
    """Bytes a second that the device's memory reads and writes, the best of several copies."""
    size = _COPIED_BYTES[runner.device.type]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=runner.device) for _ in range(2))

    def copies() -> None:
        for _ in range(_COPIES):
            target.copy_(source)

    return 2 * size * _COPIES / min(_seconds(runner, copies) for _ in range(_GROUPS))


def floor_bytes(runner: ModelRunner, batch: int, context: int) -> int:
    """Weights, without the table of input embeddings, and the KV that every layer's window shows."""
    weights = [
        *runner.decoder.layers.parameters(),
        *runner.decoder.norm.parameters(),
        *runner.model.lm_head.parameters(),
    ]
    attentions = [layer.self_attn for layer in runner.decoder.layers]
    seen = sum(min(context, getattr(each, "sliding_window", None) or context) for each in attentions)
    per_layer: int = runner.shape.entry_bytes(1, "raw") // runner.shape.layers
    return int(sum(weight.numel() * weight.itemsize for weight in weights) + batch * per_layer * seen)


def _blocks(context: int) -> int:
    return -(-(context + _TAKEN) // BLOCK_TOKENS)


def _fits(runner: ModelRunner, blocks: int) -> bool:
    if runner.device.type == "cpu":
        return True
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(runner.device)
    return bool(blocks * BLOCK_TOKENS * runner.shape.entry_bytes(1, "raw") + _RESERVE < free)


@torch.inference_mode()
def _row(runner: ModelRunner, batch: int, context: int, blocks: int, rate: float) -> Row:
    pool = PagedKV(runner.shape, batch * blocks, runner.device)
    pool.with_spare.normal_()
    decoder = Decoder(runner, pool, lanes=batch, max_tokens=blocks * BLOCK_TOKENS)
    order = torch.randperm(batch * blocks, generator=torch.Generator().manual_seed(0)).view(batch, blocks).tolist()
    for lane, table in enumerate(order):
        decoder.enter(lane, lane, context, table)
    loop = _decoding(decoder, list(range(batch)))
    for _ in range(_WARM_UP):
        next(loop)
    itl_ms = 1000 * statistics.median(_seconds(runner, lambda: _advance(loop)) for _ in range(_GROUPS)) / _STEPS
    middle = context + _WARM_UP + _GROUPS * _STEPS // 2
    floor_ms = 1000 * floor_bytes(runner, batch, middle) / rate
    return {
        "batch": batch,
        "context_tokens": context,
        "itl_ms": itl_ms,
        "floor_ms": floor_ms,
        "over_floor": itl_ms / floor_ms,
        "tokens_s": 1000 * batch / itl_ms,
        "device": device_name(runner.device),
    }


def _decoding(decoder: Decoder, lanes: list[int]) -> Iterator[list[int]]:
    """Tokens of each step, read once the next is launched."""
    before: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
    while True:
        tokens = decoder.step(lanes).argmax(-1)
        decoder.put_tokens(lanes, tokens)
        on_host = tokens.to("cpu", non_blocking=True)
        arrived = torch.cuda.current_stream().record_event() if tokens.is_cuda else None
        if before is not None and before[1] is not None:
            before[1].synchronize()
        yield before[0].tolist() if before is not None else []
        before = on_host, arrived


def _advance(loop: Iterator[list[int]]) -> None:
    for _ in range(_STEPS):
        next(loop)


def _seconds(runner: ModelRunner, work: Callable[[], object]) -> float:
    runner.synchronize()
    started = time.perf_counter()
    work()
    runner.synchronize()
    return time.perf_counter() - started
