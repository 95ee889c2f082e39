"""Whether a layer is run for several prompts at once: what that costs those ahead, against what it saves the others.

Where rows are few a layer takes as long as reading its weights does, so that another prompt's rows are nearly free;
where they are many, it takes as much longer as there are more of them, and whoever is first had better be alone. The
more wait for their turn, the more counts that all of it takes less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragkv.costs import Machine

# What is saved must be more than a good prediction may be off by.
_MARGIN = 0.03


@dataclass(frozen=True)
class Load:
    """What a prompt brings to a layer: ``rows`` that look at ``pairs`` keys in all. ``wait``: seconds until its stored
    KV is there, in which the others do nothing."""

    rows: int
    pairs: float
    wait: float = 0.0


def pays(machine: Machine, ahead: Sequence[Load], another: Load, behind: int) -> bool:
    """Whether all are through no later in the mean if ``another`` goes through a layer along with those ``ahead``, who
    go together, rather than after them. So many ``behind`` have their turn once all these have had theirs."""
    first, own = _seconds(machine, ahead), _seconds(machine, [another])
    # Where the host only launches what the device does, it waits while the device computes.
    wait = max(0.0, another.wait - own) if machine.overlapped else another.wait
    joined = _seconds(machine, [*ahead, another]) + wait
    saves = (1 + behind) / (len(ahead) + 1 + behind)  # the share of all whom another's own time would keep waiting
    return joined * (1 + _MARGIN) <= first + (own + wait) * saves


def _seconds(machine: Machine, loads: Sequence[Load]) -> float:
    """Of a layer for all of ``loads`` at once."""
    seconds = machine.sparse.seconds(sum(load.rows for load in loads), sum(load.pairs for load in loads))
    return max(seconds, machine.together) if len(loads) > 1 else seconds
