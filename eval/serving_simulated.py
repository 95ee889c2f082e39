"""A measured run once more in the simulator: the same arrivals and lengths, through the same scheduler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragkv.errors import InputError
from ragkv.eval.priorities import PriorityTrace
from ragkv.eval.serving_drive import Drive, Life
from ragkv.eval.serving_engine import Sizes
from ragkv.eval.simulate import EngineModel, Reassign, simulate
from ragkv.eval.simulated import SimRequest, SimResult
from ragkv.eval.step_costs import StepCosts
from ragkv.loop import PREFILLS


def read_costs(path: Path) -> StepCosts:
    """Of a result file of ``ragkv eval serving``, or of one that holds nothing but costs.

    Raises:
        InputError: it cannot be read, or holds none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return StepCosts(**content.get("costs", content))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} holds no step costs ({error}); make it with --simulate --out", path=str(path)
        ) from error


def simulated(
    drive: Drive,
    options: dict[str, Any],
    costs: StepCosts,
    pool: Sizes,
    *,
    preemption: Any,
    stall_s: float,
    trace: PriorityTrace | None = None,
    frequency: float = 0.0,
) -> Drive:
    """What ``drive`` would have been.

    ``stall_s`` of prefill beside a decode step are so many tokens by ``costs``. ``trace`` is one that was not
    advanced yet, ``frequency`` its updates a step; without it everybody keeps the priority it had last.
    """
    lives = sorted((life for life in drive.lives if life.fate not in ("refused", "failed")), key=lambda life: life.due)
    room = round(stall_s / costs.prefill_token_s) if costs.prefill_token_s else 1 << 20
    engine = EngineModel(pool.blocks, max(16, room), PREFILLS, preemption, pool.host_blocks)
    numbers = [life.ask.number for life in lives]
    places = {number: place for place, number in enumerate(numbers)}
    first = trace.now[numbers].tolist() if trace is not None else [life.priority for life in lives]
    requests = [_request(life, priority, places) for life, priority in zip(lives, first, strict=True)]
    reassign = _reassigned(trace, frequency, numbers) if trace is not None else lambda turns: None
    result = simulate(requests, options, costs, engine, reassign)
    served = [_life(life, result, place) for place, life in enumerate(lives)]
    return Drive(served, 0.0, result.ended, _counters(result, pool))


def as_json(costs: StepCosts) -> dict[str, float]:
    return asdict(costs)


def _reassigned(trace: PriorityTrace, frequency: float, numbers: Sequence[int]) -> Reassign:
    def reassign(turns: int) -> Sequence[int] | None:
        updates = int(turns * frequency)
        return trace.advance(updates)[numbers].tolist() if updates > trace.updates else None

    return reassign


def _request(life: Life, priority: int, places: dict[int, int]) -> SimRequest:
    ask = life.ask
    return SimRequest(
        at=ask.at,
        prompt_tokens=life.prompt_tokens,
        output_tokens=ask.output,
        tenant=ask.tenant,
        weight=ask.weight,
        priority=priority,
        # What a conversation finds is for the simulator to find; prompts that merely begin alike are not its business.
        cached_tokens=life.known_tokens if ask.after is None else 0,
        after=places[ask.after] if ask.after is not None else None,
    )


def _life(life: Life, result: SimResult, place: int) -> Life:
    outcome = result.outcomes[place]
    times = [float(at) for at in result.token_times(outcome)]
    return Life(
        life.ask,
        outcome.came,
        life.prompt_tokens,
        life.priority,
        life.known_tokens,
        times,
        ended=times[-1] if times else None,
        fate="done" if times else "refused",
    )


def _counters(result: SimResult, pool: Sizes) -> dict[str, float]:
    return {
        "steps": len(result.step_ends),
        "step_seconds": result.busy_s,
        "scheduler_seconds": 0.0,
        "idle_seconds": result.ended - result.busy_s,
        "preemptions": result.preemptions,
        "swap_in_bytes": float(result.loaded_blocks * pool.block_bytes),
        "swap_out_bytes": float(result.copied_blocks * pool.block_bytes),
        "prefix_hit_tokens": float(result.found_tokens),
    }
