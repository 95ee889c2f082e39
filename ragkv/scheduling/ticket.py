"""A request as the scheduler sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class State(Enum):
    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    DONE = "done"


@dataclass(eq=False)
class Ticket:
    """What a request wants and has. The engine keeps ``blocks`` and ``wants`` up to date before every plan; the fields
    that have no place in the constructor, and ``state`` and ``preemptions``, are the scheduler's.

    Args:
        prompt_tokens: of the whole prompt, cached or not.
        max_tokens: of output, at most.
        wants: device blocks it must get to start (whole prompt and the first block of output) or to resume; while it
            runs, those its next step needs and it has not.
        most: device blocks of its own at its longest, prompt and ``max_tokens``. Who may not be preempted any more is
            started only when all of them are to be had.
        blocks: device blocks that preempting it would give back.
        weight: of its tenant, under ``vtc``.
        priority: lower is sooner.
    """

    id: str
    prompt_tokens: int
    max_tokens: int
    wants: int
    most: int
    blocks: int = 0
    tenant: str = ""
    weight: float = 1.0
    priority: int = 0
    arrived: float = field(default=0.0, init=False)
    state: State = field(default=State.NEW, init=False)
    preemptions: int = field(default=0, init=False)
    # Its place within its line (the policy's figure, then order of submission), and what of its prompt is not charged.
    place: tuple[float, int] = field(default=(0.0, 0), init=False, repr=False)
    unpaid: int = field(default=0, init=False, repr=False)
    prefilling: bool = field(default=True, init=False, repr=False)
