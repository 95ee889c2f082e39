"""A measured run once more in the simulator: the same arrivals and lengths, through the same scheduler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ragkv.errors import InputError
from ragkv.eval.serving_drive import Drive, Life
from ragkv.eval.serving_engine import Sizes
from ragkv.eval.simulate import EngineModel, simulate
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
    drive: Drive, options: dict[str, Any], costs: StepCosts, pool: Sizes, *, preemption: Any, stall_s: float
) -> Drive:
    """What ``drive`` would have been. Follow-ups come when they really came; priorities stay what they were last.

    ``stall_s`` of prefill beside a decode step are so many tokens by ``costs``.
    """
    lives = sorted((life for life in drive.lives if life.fate not in ("refused", "failed")), key=lambda life: life.due)
    room = round(stall_s / costs.prefill_token_s) if costs.prefill_token_s else 1 << 20
    engine = EngineModel(pool.blocks, max(16, room), PREFILLS, preemption)
    sessions = _sessions(lives)
    requests = [_request(life, drive.started, session) for life, session in zip(lives, sessions, strict=True)]
    result = simulate(requests, options, costs, engine)
    served = [_life(life, result, place) for place, life in enumerate(lives)]
    ended = float(result.step_ends[-1]) if len(result.step_ends) else 0.0
    return Drive(served, 0.0, ended, _counters(result, pool))


def as_json(costs: StepCosts) -> dict[str, float]:
    return asdict(costs)


def _sessions(lives: Sequence[Life]) -> list[str]:
    """A name for every conversation; single requests have none."""
    first: dict[int, int] = {}
    for life in lives:
        ask = life.ask
        first[ask.number] = first.get(ask.after, ask.after) if ask.after is not None else ask.number
    turns = list(first.values())
    many = {number for number in turns if turns.count(number) > 1}
    return [str(first[life.ask.number]) if first[life.ask.number] in many else "" for life in lives]


def _request(life: Life, started: float, session: str) -> SimRequest:
    return SimRequest(
        at=life.due - started,
        prompt_tokens=life.prompt_tokens,
        output_tokens=life.ask.output,
        tenant=life.ask.tenant,
        weight=life.ask.weight,
        priority=life.priority,
        # What a conversation finds is for the simulator to find; prompts that merely begin alike are not its business.
        cached_tokens=0 if session else life.known_tokens,
        session=session,
    )


def _life(life: Life, result: SimResult, place: int) -> Life:
    outcome = result.outcomes[place]
    times = [float(at) for at in result.token_times(outcome)]
    return Life(
        life.ask,
        outcome.request.at,
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
        "idle_seconds": (float(result.step_ends[-1]) if len(result.step_ends) else 0.0) - result.busy_s,
        "preemptions": result.preemptions,
        "swap_in_bytes": 0.0,
        "swap_out_bytes": float(result.swapped_blocks * pool.block_bytes),
        "prefix_hit_tokens": 0.0,
    }
