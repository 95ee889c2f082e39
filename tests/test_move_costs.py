"""Moved or computed again: by what each takes, without wavering, and without forgetting to look."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from ragkv.errors import NotFoundError
from ragkv.move_costs import CLEARLY, TRIED_AFTER, TRIED_BLOCKS, Choice, MoveCosts
from tests.blend_kit import token_ids
from tests.families import make_runner
from tests.serving_kit import alone, hall


class Road:
    """A lane as the costs see it."""

    def __init__(self, per_block=None, asked=0):
        self.per_block, self.asked = per_block, asked

    def seconds(self, blocks):
        return None if self.per_block is None else (self.asked + blocks) * self.per_block


def costs_of(out=1.0, back=1.0, disk=1.0, computing=None):
    costs = MoveCosts(Road(out), Road(back), Road(disk))
    for tokens, seconds in (computing or {}).items():
        costs.computed(tokens, seconds)
    return costs


@pytest.mark.parametrize(("moving", "computing"), [(None, 1.0), (1e9, None), (None, None)])
def test_moves_until_both_were_measured(moving, computing):
    assert Choice().blocks(7, moving, computing) == 7


def test_what_is_sooner_is_done():
    assert Choice().blocks(7, 1.0, 9.0) == 7
    assert Choice().blocks(7, 9.0, 1.0) == 0


def test_near_the_border_it_stays_with_what_it_does():
    noise, choice = random.Random(2), Choice()
    near = [noise.uniform(1 / CLEARLY, CLEARLY) for _ in range(200)]
    assert {choice.blocks(5, moving, 1.0) for moving in near} == {5}
    assert choice.blocks(5, CLEARLY + 0.01, 1.0) == 0
    assert {choice.blocks(5, moving, 1.0) for moving in near[: TRIED_AFTER - 2]} == {0}
    assert choice.blocks(5, 1 / CLEARLY - 0.01, 1.0) == 5


def test_a_few_are_moved_at_times_to_see_whether_it_has_become_faster():
    choice = Choice()
    chosen = [choice.blocks(100, 9.0, 1.0) for _ in range(2 * TRIED_AFTER)]
    assert chosen == [*[0] * (TRIED_AFTER - 1), TRIED_BLOCKS] * 2
    few = Choice()
    assert max(few.blocks(3, 9.0, 1.0) for _ in range(TRIED_AFTER)) == 3


def test_from_disk_as_an_h200_and_as_a_cpu():
    """16 tokens of an 8B model: 1.3 ms from an SSD and 0.04 from RAM; 0.4 ms to compute, or half a second."""
    fast = costs_of(back=4e-5, disk=1.3e-3, computing={64: 0.014, 1024: 0.026, 8192: 0.205})
    slow = costs_of(back=4e-5, disk=1.3e-3, computing={64: 2.0, 1024: 32.0, 8192: 256.0})
    assert fast.fetching(500, 8100) == 0
    assert slow.fetching(500, 8100) == 500
    assert fast.counts["recomputed"] == 500
    assert slow.counts["recomputed"] == 0


def test_from_disk_only_what_it_saves_counts():
    """The rest of the prompt is computed anyway, and what launching takes is paid for it."""
    costs = costs_of(back=0.1, disk=1.0, computing={50: 10.0, 100: 10.0})
    assert costs.fetching(2, 90) == 0
    assert costs_of(back=0.1, disk=1.0, computing={50: 5.0, 100: 10.0}).fetching(2, 90) == 2


def test_from_disk_the_way_on_to_the_device_counts():
    assert costs_of(back=1.0, disk=1.0, computing={16: 3.0, 160: 30.0}).fetching(2, 100) == 2
    assert costs_of(back=5.0, disk=1.0, computing={16: 3.0, 160: 30.0}).fetching(2, 100) == 0


def test_what_is_queued_before_counts():
    computing = {16: 4.0, 160: 40.0}
    costs = MoveCosts(Road(1.0), Road(1.0, asked=3), Road(1.0))
    assert costs.loading(1, 16) == 1
    for tokens, seconds in computing.items():
        costs.computed(tokens, seconds)
    assert costs.loading(1, 16) == 1
    busy = MoveCosts(Road(1.0), Road(1.0, asked=50), Road(1.0))
    busy.computed(16, 4.0)
    assert busy.loading(1, 16) == 0


def test_a_copy_is_made_if_there_and_back_is_sooner():
    assert costs_of(out=1.0, back=1.0, computing={16: 2.0}).storing(1, 16) == 1
    costs = costs_of(out=3.0, back=1.0, computing={16: 2.0})
    assert costs.storing(1, 16) == 0
    assert costs.counts["uncopied"] == 1
    assert costs_of(out=1.0, back=3.0, computing={16: 2.0}).storing(1, 16) == 0


def test_without_a_disk_nothing_is_fetched():
    assert MoveCosts(Road(1.0), Road(1.0), None).fetching(3, 50) == 0


def test_nothing_computed_is_no_measurement():
    costs = costs_of()
    costs.computed(0, 1.0)
    assert costs.loading(5, 80) == 5


def test_whatever_is_chosen_changes_no_token(tmp_path):
    runner, whims = make_runner("llama"), random.Random(4)
    prompts = [token_ids(20 + 13 * i, seed=i) for i in range(8)]
    with hall(tmp_path, runner=runner, blocks=24, policy="priority") as place:
        for name in ("storing", "loading"):
            setattr(place.pool.costs, name, lambda blocks, tokens: whims.randrange(blocks + 1))
        asked = [place.ask(prompt, 40) for prompt in prompts]
        while not all(one.ended.wait(0.002) for one in asked):
            for one in asked:
                with suppress(NotFoundError):
                    place.loop.reprioritize(one.generation.id, whims.randrange(10))
        assert [one.tokens for one in asked] == [alone(runner, prompt, 40) for prompt in prompts]
        counts = place.pool.costs.counts
        assert counts["recomputed"] > 0 < counts["loaded"]
        place.check()


def test_the_engine_tells_what_prefills_take(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(MoveCosts, "computed", lambda self, tokens, seconds: told.append((tokens, seconds > 0)))
    with hall(tmp_path) as place:
        place.ask(token_ids(100, seed=1)).wait()
        place.ask([*token_ids(100, seed=1), *token_ids(30, seed=2)]).wait()
    assert told == [(100, True), (34, True)]
