"""``ragkv eval serving --url``: the same loads on a running server, through its REST API."""

from __future__ import annotations

from typing import Any

import torch

from ragkv.config import Settings
from ragkv.eval.machine import environment
from ragkv.eval.serving_drive import Driver, Say
from ragkv.eval.serving_http import Texts, facts_of, keys_of, opened_server
from ragkv.eval.serving_plan import Budget, Save, ServingPlan
from ragkv.paged import BLOCK_TOKENS

_TICK_S = 0.1


def measure_server(
    url: str, settings: Settings, plan: ServingPlan, *, say: Say, save: Save = lambda result: None
) -> dict[str, Any]:
    """:func:`ragkv.eval.serving.measure_serving` of a running server: a row for each load. How it schedules is for
    its own settings to say.

    Raises:
        ConfigError: a load's tenants are not in the configuration.
        ServerError: it does not answer.
    """
    clock, loads = Budget(plan.budget_s), plan.workloads()
    facts = facts_of(url, settings)
    result: dict[str, Any] = {"rows": [], **environment(torch.device("cpu")), **facts}
    for done, (load, workload) in enumerate(loads.items()):
        if (limit := clock.share(len(loads) - done)) <= 0:
            break
        make = Texts(workload, plan.shape.chunk_tokens)
        with opened_server(url, keys_of(workload, settings)) as loop:
            pool_tokens = BLOCK_TOKENS * int(loop.stats()["pool_blocks"])
            driver = Driver(loop, make, workload, seed=plan.shape.seed, frequency=plan.frequency, tick_s=_TICK_S)
            drive = driver.run(limit, lambda stage, done, total, load=load: say(load, done, total))  # type: ignore[misc]
        row = {**plan.facts(load, workload), "policy": "server", "preemption": "server", "pool_tokens": pool_tokens}
        result["rows"].append({**row, **plan.measured(drive), "model": facts["model"], "device": facts["device"]})
        save(result)
    return result
