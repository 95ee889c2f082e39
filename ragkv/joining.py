"""Whether a layer is run for several prompts at once: what that costs those ahead, against what it saves those behind.

Where rows are few a layer takes as long as reading its weights does, so that another prompt's rows are nearly free;
where they are many, it takes as much longer as there are more of them, and whoever is first had better be alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ragkv.costs import Machine


@dataclass(frozen=True)
class Load:
    """What a prompt brings to a layer: ``rows`` that look at ``pairs`` keys in all. ``wait``: seconds until its stored
    KV is there, in which the others do nothing."""

    rows: int
    pairs: float
    wait: float = 0.0


def pays(machine: Machine, ahead: Sequence[Load], another: Load) -> bool:
    """Whether all are through the layer no later in the mean if ``another`` goes along with those ``ahead``, who go
    together, rather than after them."""
    rows, pairs = sum(load.rows for load in ahead), sum(load.pairs for load in ahead)
    first, own = machine.sparse.seconds(rows, pairs), machine.sparse.seconds(another.rows, another.pairs)
    # Where the host only launches what the device does, it waits while the device computes.
    wait = max(0.0, another.wait - own) if machine.overlapped else another.wait
    joined = machine.sparse.seconds(rows + another.rows, pairs + another.pairs) + wait
    return joined <= first + (own + wait) / (len(ahead) + 1)
