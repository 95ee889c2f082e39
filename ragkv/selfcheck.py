"""The self-check at load: is KV that was stored, moved and read back worth what the model itself computes?

A family, a rope or a window handled wrongly does not crash: it answers worse. So a model's blending is only on
after its own forward (the library's, nothing of ours) was reproduced from moved KV, without and with repair. And
layers only run fused after they gave what the library gives; else the plain loop runs them.
"""

from __future__ import annotations

import logging

import torch

from ragkv.attention import NAME, AttentionStep
from ragkv.decoding import Decoder
from ragkv.kv import RequestKV
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.runner import ModelRunner

log = logging.getLogger("ragkv")

DOCUMENT, QUESTION, SHIFT = 48, 16, 96
# What rounding may do, at least: deep models may be off by more, as far as the library is off from itself.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 8e-2}
_OWN_NOISE = 2.0


@torch.inference_mode()
def find_fault(runner: ModelRunner) -> str | None:
    """Why KV of this model cannot be reused, or None when it can. Settles first which loop runs its layers."""
    settle_layer_loop(runner)
    if runner.rope.refusal:
        return runner.rope.refusal
    if runner.max_positions < SHIFT + DOCUMENT + QUESTION:
        return f"the model has only {runner.max_positions} positions, too few to move chunks about"
    try:
        return _compare(runner)
    except Exception as error:  # a check that cannot be run is not passed
        return f"self-check failed: {error!r}; every prompt is prefilled in full"


def _compare(runner: ModelRunner) -> str | None:
    ids = _ids(runner, DOCUMENT + QUESTION)
    expected = _library_logits(runner, ids, SHIFT)
    tolerance = _tolerance(runner, ids, SHIFT, expected)
    poison = torch.zeros(len(ids), dtype=torch.bool)
    poison[:DOCUMENT:3] = True
    for what, poisoned in (("moved KV", None), ("moved KV with repaired tokens", poison)):
        error = _relative_error(_reused_logits(runner, ids, poisoned), expected)
        if not error <= tolerance:
            return (
                f"self-check failed: the answer from {what} is off by {error:.2%} of the model's own "
                f"(at most {tolerance:.1%} is rounding); every prompt is prefilled in full"
            )
    return None


@torch.inference_mode()
def settle_layer_loop(runner: ModelRunner) -> None:
    """Have the plain loop run the layers from now on if the fused one fails or computes something else.

    It also compiles the kernels that requests of any length will need.
    """
    if runner.fused is None:
        return
    try:
        fault = runner.fused.find_fault() or _fused_fault(runner)
    except Exception as error:  # whatever the compiler or the driver raises
        fault = f"failed: {error!r}"
    if fault:
        runner.use_plain_loop(f"the fused layer loop {fault}")
        log.warning("%s; layers run in the plain loop", runner.plain_because)


def _fused_fault(runner: ModelRunner) -> str | None:
    """A prefill, then some of its rows again over its KV, then its last row decoded, alone and beside another."""
    ids = _ids(runner, min(DOCUMENT + QUESTION, runner.max_positions))
    expected = _library_logits(runner, ids, 0)
    kv = runner.workspace(len(ids))  # on CUDA the prefill runs in graphs
    prefilled = runner.logits(runner.prefill(ids, kv))
    slots = runner.tensor([*range(0, len(ids) - QUESTION, 3), *range(max(0, len(ids) - QUESTION), len(ids))])
    step = AttentionStep(kv, slots, len(ids), contiguous=False, score_rows=1)
    rows = runner.rows_of(ids.cpu().numpy(), step, len(ids))
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
    tolerance = _tolerance(runner, ids, 0, expected)
    results = [("a prefill", prefilled), ("rows computed again", runner.logits(rows))]
    results += [("a decoded token", logits) for logits in _decoded(runner, ids, kv)]
    for what, logits in results:
        if not (error := _relative_error(logits, expected)) <= tolerance:
            return f"computes {what} {error:.2%} off what the library does (at most {tolerance:.1%} is rounding)"
    return None


def _decoded(runner: ModelRunner, ids: torch.Tensor, kv: RequestKV) -> list[torch.Tensor]:
    """Logits of the last of ``ids``, the KV of those before it in blocks in reverse: alone, and twice in one batch."""
    last, count = len(ids) - 1, -(-len(ids) // BLOCK_TOKENS)
    pool = PagedKV(runner.shape, 2 * count, runner.device)
    decoder = Decoder(runner, pool, lanes=2, max_tokens=len(ids))
    results: list[torch.Tensor] = []
    for lanes in ([0], [1, 0]):
        for lane in lanes:
            blocks = list(range((lane + 1) * count - 1, lane * count - 1, -1))
            pool.scatter(kv, blocks, 0, last)
            decoder.enter(lane, int(ids[last]), last, blocks)
        results += decoder.step(lanes).clone().unbind()
    return results


def _ids(runner: ModelRunner, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(int(runner.config.vocab_size), (count,), generator=generator).to(runner.device)


def _tolerance(runner: ModelRunner, ids: torch.Tensor, first: int, expected: torch.Tensor) -> float:
    """The relative error that is still rounding: in half precision at least twice that between two attention
    functions of the library."""
    least = _TOLERANCE[runner.shape.dtype]
    if runner.shape.dtype == torch.float32:
        return least
    return max(least, _OWN_NOISE * _relative_error(_library_logits(runner, ids, first, "sdpa"), expected))


def _library_logits(runner: ModelRunner, ids: torch.Tensor, first: int, attention: str = "eager") -> torch.Tensor:
    positions = torch.arange(first, first + len(ids), device=runner.device)
    runner.model.set_attn_implementation(attention)
    try:
        logits = runner.model(ids[None], position_ids=positions[None], use_cache=False).logits
    finally:
        runner.model.set_attn_implementation(NAME)
    return logits[0, -1].float()  # type: ignore[no-any-return]


def _reused_logits(runner: ModelRunner, ids: torch.Tensor, poisoned: torch.Tensor | None) -> torch.Tensor:
    """Next-token logits from a document's KV made at 0, stored as bytes, placed at SHIFT."""
    made = runner.new_kv(DOCUMENT)
    runner.prefill(ids[:DOCUMENT], made)
    moved = runner.new_kv(len(ids), base=SHIFT)
    for layer in range(runner.shape.layers):
        _move(runner, made, moved, layer)
    computed = torch.arange(len(ids)) >= DOCUMENT
    if poisoned is not None:
        for layer in range(runner.shape.layers):
            keys, values = moved.read(layer, DOCUMENT)
            rows = poisoned[:DOCUMENT].to(runner.device)
            moved.write(layer, rows.nonzero()[:, 0], keys[rows] + 1, values[rows] + 1)
        computed |= poisoned
    positions = computed.nonzero()[:, 0].to(runner.device)
    rows_ = runner.rows(ids[positions], AttentionStep(moved, positions + SHIFT, len(ids), contiguous=False))
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows_)
    return runner.logits(rows_)


def _move(runner: ModelRunner, made: RequestKV, moved: RequestKV, layer: int) -> None:
    old = runner.rope.angles(torch.arange(DOCUMENT, device=runner.device))
    new = runner.rope.angles(torch.arange(SHIFT, SHIFT + DOCUMENT, device=runner.device))
    keys, values = made.read(layer, DOCUMENT)
    stored = runner.rope.lift(keys, old, layer).cpu().view(torch.uint8).numpy().tobytes()
    back = torch.frombuffer(bytearray(stored), dtype=keys.dtype).reshape(keys.shape).to(runner.device)
    moved.write(layer, slice(0, DOCUMENT), runner.rope.place(back, new, layer), values)


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
