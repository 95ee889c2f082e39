"""Choices of the controller on machines that only exist on paper, against the best choice in hindsight."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest

from ragkv.controller import MARGIN, Actual, Choice, Controller
from ragkv.costs import Curve, Machine, Times, Work
from tests.controller_kit import World, serve, work

FAST_GPU_SLOW_DISK = {"tiers": {"ssd": 1 / 0.4e9, "remote": 1 / 0.2e9}}
SLOW_CPU_FAST_RAM = {"row": 4e-4, "pair": 1e-8, "place": 1 / 3e9, "overlapped": False}
BALANCED = {"tiers": {"ssd": 1 / 2e9, "remote": 1 / 1e9}}
WORLDS = {"fast GPU, slow disk": FAST_GPU_SLOW_DISK, "slow CPU, fast RAM": SLOW_CPU_FAST_RAM, "balanced": BALANCED}


def subsets(count):
    return [chosen for size in range(count + 1) for chosen in combinations(range(count), size)]


def test_nothing_is_chosen_before_the_machine_was_measured_or_where_nothing_is_stored():
    assert Controller().choose(work()) is None
    assert Controller(World().machine()).choose(work(chunks=0)) is None


def test_a_slow_disk_on_a_fast_gpu_is_not_waited_for():
    world = World(**FAST_GPU_SLOW_DISK)
    controller = Controller(world.machine())
    for _ in range(3):
        serve(controller, world, work())
    choice, _ = serve(controller, world, work())
    assert choice.way == "full"
    assert choice.why.startswith("full prefill is predicted to be faster: ")
    assert "of loading from ssd" in choice.why
    assert choice.why_computed(0) == choice.why


def test_a_disk_that_nobody_knows_is_not_waited_for_but_read_beside():
    for rate, then in ((8e9, "blend"), (0.2e9, "full")):
        world = World(tiers={"ssd": 1 / rate})
        controller = Controller(world.machine())
        first, _ = serve(controller, world, work())
        assert first.way == "full"
        assert first.beside is not None
        assert serve(controller, world, work())[0].way == then


def test_a_slow_cpu_loads_everything():
    world = World(**SLOW_CPU_FAST_RAM)
    controller = Controller(world.machine())
    for tier in ("ram", "ssd", "remote"):
        choice, actual = serve(controller, world, work(tier=tier))
        assert choice.way == "blend"
        assert actual.total < world.full(work(tier=tier)) / 3


def test_computing_starts_while_loading_goes_on():
    """A disk about as fast as the chip: some chunks are computed, and both ways alone are slower."""
    world = World(tiers={"ssd": 1 / 2e9})
    controller, job = Controller(world.machine()), work(chunks=16, strategy="epic")
    for _ in range(4):
        choice, actual = serve(controller, world, job)
    assert choice.way == "split"
    assert choice.why_computed(0) == "computed: faster than loading it from ssd"
    assert actual.total < 0.95 * world.full(job)
    assert actual.total < 0.95 * world.run(job, range(16)).total


@pytest.mark.parametrize("chunks", [16, 24, 64, 128])
@pytest.mark.parametrize("rate", [0.5e9, 1e9, 2e9, 4e9])
def test_of_many_chunks_the_best_number_is_loaded(chunks, rate):
    world = World(tiers={"ssd": 1 / rate})
    controller, job = Controller(world.machine()), work(chunks=chunks, strategy="epic")
    serve(controller, world, job)  # reads beside
    choice, machine = controller.choose(job), controller.machine
    assert choice.way == "split"
    best = min(machine.blend(job, job.pieces[computed:]).total for computed in range(1, chunks))
    assert choice.times.total == best


def test_chunks_on_the_slowest_tier_are_computed_first():
    world = World(tiers={"ssd": 1 / 8e9, "remote": 1 / 1e9})
    controller, job = Controller(world.machine()), work(tiers=["ram", "remote", "ssd", "remote", "ram", "ssd"])
    for _ in range(4):
        choice, _ = serve(controller, world, job)
    computed = set(range(6)) - set(choice.loaded)
    assert computed
    assert computed <= {1, 3} or computed >= {1, 3}


def test_what_a_context_knew_is_computed_last():
    world = World(tiers={"ssd": 1 / 2e9})
    controller, job = Controller(world.machine()), work(chunks=16, strategy="epic", kept=(0, 1, 2, 3))
    for _ in range(4):
        choice, _ = serve(controller, world, job)
    assert choice.way == "split"
    assert {0, 1, 2, 3} <= set(choice.loaded)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("tier", ["ram", "ssd", "remote"])
@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("strategy", ["none", "question", "epic", "hkvd"])
def test_the_choice_is_nearly_the_best_of_all_subsets(name, tier, chunks, strategy):
    world = World(**WORLDS[name])
    controller, job = Controller(world.machine()), work(chunks, tier=tier, strategy=strategy)
    for _ in range(5):
        _, actual = serve(controller, world, job)
    assert actual.total <= world.best(job, subsets(chunks)) * (1 + MARGIN + 0.02)
    assert actual.total <= world.full(job) * 1.001


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_regret_over_a_long_run_of_all_kinds_of_prompts_is_small(name, noise):
    world = World(**WORLDS[name], noise=noise)
    controller = Controller(world.machine())
    jobs = [work(chunks, tier=tier) for chunks in (1, 2, 4, 8, 12) for tier in ("ram", "ssd", "remote")]
    mixed = work(tiers=["ram", "ssd", "ssd", "remote", "ram", "ssd"])
    spent = best = full = 0.0
    for turn in range(600):
        job = mixed if turn % 7 == 0 else world.random.choice(jobs)
        choice, actual = serve(controller, world, job)
        if turn < 10:
            continue
        options = [(), tuple(range(len(job.pieces))), choice.loaded]
        spent, best, full = spent + actual.total, best + world.best(job, options), full + world.full(job)
    assert spent <= best * (1.05 + noise / 2)
    assert spent <= full * 1.02


def test_a_disk_that_was_slow_once_is_tried_again_and_the_trying_is_bounded():
    world = World(tiers={"ssd": 1 / 8e9})
    controller, job = Controller(world.machine()), work()
    assert [serve(controller, world, job)[0].way for _ in range(5)] == ["full"] + ["blend"] * 4
    world.tiers["ssd"] = 1 / 0.3e9
    for _ in range(20):
        last, _ = serve(controller, world, job)
    assert last.way == "full"
    lost = sum(actual.total - world.full(job) for _, actual in (serve(controller, world, job) for _ in range(1000)))
    assert lost <= 0.03 * 1000 * world.full(job)
    world.tiers["ssd"] = 1 / 8e9
    ways = [serve(controller, world, job)[0].way for _ in range(400)]
    assert ways[-1] != "full"
    assert ways.count("full") < 300


@pytest.mark.parametrize("slower", [1.15, 1.5])
def test_a_way_that_just_loses_is_tried_now_and_then_for_little(slower):
    """Repairing so much that blending takes longer than a full prefill."""
    job, world = work(1, tier="ram", strategy="epic", ratio=0.95), World(launch=0.0)
    machine = world.machine()
    machine.sparse = Curve([(n, slower * world.row * n) for n in (16, 4096)], slower * world.pair)
    controller = Controller(machine)
    served = [serve(controller, world, job) for _ in range(500)]
    assert (controller.stats()["controller_explored"] > 0) == (slower < 1.2)
    assert served[0][0].way == "full"
    assert sum(actual.total for _, actual in served) <= 500 * world.full(job) * 1.02


@pytest.mark.parametrize(("gain", "way"), [(0.02, "blend"), (0.05, "split")])
def test_nothing_more_is_computed_for_a_gain_that_may_be_none(monkeypatch, gain, way):
    job = work(4, tier="ram")
    monkeypatch.setattr(Machine, "full", lambda *_, **__: Times(2.0))
    monkeypatch.setattr(
        Machine, "blend", lambda _, work, loaded, **__: Times(1 - gain * (len(loaded) < 4), load=0.5, recompute=0.5)
    )
    assert Controller(World().machine()).choose(job).way == way


def held_up() -> tuple[Controller, Work]:
    """A controller that has read from a disk once, and a prompt that a split is predicted to win by some 11%."""
    world, job = World(tiers={"ssd": 1 / 0.5e9}, row=1e-6), work(chunks=16, strategy="epic")
    controller = Controller(world.machine())
    serve(controller, world, job)  # reads beside
    assert controller.margin("ssd") == MARGIN
    return controller, job


def outcome(controller: Controller, job: Work, late: float, *, contended: bool = False) -> Choice:
    """A prompt that takes so much longer than predicted, its disk being as fast as ever."""
    choice = controller.choose(job)
    controller.learn(choice, Actual((1 + late) * choice.times.total, contended=contended))
    return choice


def test_what_came_later_than_predicted_must_win_by_more():
    """Launching is held up by the threads that read: the first time shows it, and the costs take longer to."""
    controller, job = held_up()
    choice = outcome(controller, job, late=0.2)
    assert choice.way == "split"
    assert MARGIN < 1 - choice.times.total / choice.full.total < 0.15
    assert controller.margin("ssd") == pytest.approx(0.2)
    assert controller.stats()["controller_margin"] == pytest.approx(0.2)
    choice = controller.choose(job)
    assert choice.way == "full"
    assert choice.why.startswith("loading must win by 18%, and is predicted to take ")
    assert controller.choose(work(chunks=16, tier="ram", strategy="epic")).way == "blend"
    assert controller.margin("ram") == MARGIN


def test_what_came_late_is_tried_again_on_a_busy_machine_too():
    controller, job = held_up()
    outcome(controller, job, late=10.0)
    assert controller.margin("ssd") == 0.25
    ways = [outcome(controller, job, late=0.0, contended=True).way for _ in range(60)]
    assert ways[0] == "full"
    assert ways[-1] == "split"


def test_what_the_costs_have_learnt_is_not_held_against_it_again():
    """Slower than predicted is believed when it comes twice; from then on it is predicted so."""
    controller, job = Controller(World().machine()), work(tier="ram")
    slow = 1.4 * controller.choose(job).times.total
    margins = []
    for _ in range(8):
        controller.learn(controller.choose(job), Actual(slow))
        margins.append(controller.margin("ram"))
    assert margins[0] == 0.25
    assert margins[1] < 0.2
    assert margins[-1] == MARGIN


def test_a_split_wins_over_loading_everything_whatever_came_late(monkeypatch):
    controller, job = held_up()
    outcome(controller, job, late=10.0)
    monkeypatch.setattr(Machine, "full", lambda *_, **__: Times(2.0))
    monkeypatch.setattr(
        Machine, "blend", lambda _, work, loaded, **__: Times(1 - 0.2 * (len(loaded) < 16), load=0.5, recompute=0.5)
    )
    assert controller.choose(job).way == "split"


def test_on_a_busy_machine_nothing_is_tried_for_what_it_would_not_measure():
    """Only one in STALE_AFTER may be tried; where others share the machine no try would be the last."""
    job = work(1, tier="ram", strategy="epic", ratio=0.95)
    machine = World(launch=0.0).machine()
    machine.sparse = Curve([(n, 1.15 * 2e-6 * n) for n in (16, 4096)], 1.15e-10)
    controller = Controller(machine)
    for _ in range(100):
        choice = controller.choose(job)
        controller.learn(choice, Actual(choice.times.total, contended=True))
    assert controller.stats()["controller_explored"] == 0


def test_what_is_known_already_takes_no_time():
    known = replace(work(8), length=work(8).length + 8192, known=8192)
    moved = replace(known, pieces=tuple(replace(p, start=p.start + 8192) for p in known.pieces))
    world = World(pair=0.0)
    machine = world.machine()
    assert machine.full(moved).total == pytest.approx(machine.full(work(8)).total)
    assert machine.blend(moved, moved.pieces).total == pytest.approx(machine.blend(work(8), work(8).pieces).total)
    machine = World().machine()
    assert machine.full(moved).total > machine.full(work(8)).total  # its rows look at more keys


def test_a_blend_that_became_fast_is_found_though_it_lost_before():
    job = work(tier="ram", strategy="epic", ratio=0.8)
    world = World(row=3e-6)
    machine = world.machine()
    machine.sparse = Curve([(n, 4.2e-6 * n) for n in (16, 4096)], world.pair)
    controller = Controller(machine)
    ways = [serve(controller, world, job)[0].way for _ in range(100)]
    assert ways[0] == "full"
    assert ways[-1] == "blend"


def test_one_hiccup_changes_nothing():
    world = World(tiers={"ssd": 1 / 8e9})
    controller, job = Controller(world.machine()), work()
    for _ in range(5):
        before, _ = serve(controller, world, job)
    world.tiers["ssd"] *= 50
    serve(controller, world, job)
    world.tiers["ssd"] /= 50
    assert serve(controller, world, job)[0].way == before.way != "full"


def test_a_machine_that_was_measured_wrong_is_known_after_a_few_requests():
    """Measured while others had the chip: everything seemed four times as slow, or as fast."""
    for factor in (0.25, 4.0):
        world, seemed = World(), World(row=2e-6 * factor, pair=1e-10 * factor)
        controller, job = Controller(seemed.machine()), work(tier="ram")
        errors = []
        for _ in range(8):
            choice, actual = serve(controller, world, job)
            errors.append(abs(choice.times.total / actual.total - 1))
        assert errors[0] > 0.3
        assert errors[-1] < 0.1


def test_a_selector_that_takes_longer_than_its_rows_is_learned():
    world = World(**SLOW_CPU_FAST_RAM)
    controller, job = Controller(world.machine()), work(tier="ram")
    for _ in range(4):
        choice = controller.choose(job)
        actual = world.run(job, choice.loaded)
        slow = Actual(actual.total + 2 * actual.select, actual.load, 3 * actual.select, actual.recompute)
        controller.learn(choice, slow)
    assert controller.choose(job).times.select == pytest.approx(3 * actual.select, rel=0.1)


def test_times_that_others_share_say_nothing_of_the_chip():
    world = World()
    controller, job = Controller(world.machine()), work(tier="ram")
    choice = controller.choose(job)
    before = choice.times.total
    for _ in range(5):
        controller.learn(choice, Actual(10 * before, contended=True))
    assert controller.choose(job).times.total == pytest.approx(before)
    assert controller.stats()["controller_error"] == 0.0


def test_the_report_holds_prediction_and_outcome():
    world = World(**SLOW_CPU_FAST_RAM)
    controller, job = Controller(world.machine()), work()
    choice = controller.choose(job)
    actual = world.run(job, choice.loaded)
    forecast = controller.learn(choice, actual)
    assert forecast.way == "blend"
    assert forecast.why.startswith("blending is predicted to be faster: ")
    assert forecast.total_ms == pytest.approx(forecast.load_ms + forecast.select_ms + forecast.recompute_ms)
    assert forecast.actual_total_ms == pytest.approx(1000 * actual.total)
    assert forecast.full_ms > forecast.blend_ms == forecast.total_ms


def test_stats_count_ways_and_tell_rates_and_errors():
    world = World(**FAST_GPU_SLOW_DISK)
    controller = Controller(world.machine())
    assert controller.stats()["controller_error"] == 0.0
    for _ in range(10):
        serve(controller, world, work())
    stats = controller.stats()
    assert stats["controller_full"] + stats["controller_blend"] + stats["controller_split"] == 10
    assert stats["controller_chunks_computed"] >= 8 * stats["controller_full"]
    assert stats["controller_error"] < 0.1
    assert stats["controller_ssd_bytes_per_second"] == pytest.approx(0.4e9, rel=0.05)


def test_one_piece_at_a_time_is_read_beside_what_is_computed():
    world = World(**FAST_GPU_SLOW_DISK)
    controller, job = Controller(world.machine(), warms=True), work()
    for _ in range(4):
        serve(controller, world, job)
    first, second = controller.choose(job), controller.choose(job)
    assert first.way == second.way == "full"
    assert first.beside is not None
    assert second.beside is None
    controller.hear([])
    third = controller.choose(job)
    assert third.beside not in (None, first.beside)


def test_without_a_ram_tier_to_warm_reading_beside_only_measures_now_and_then():
    world = World(**FAST_GPU_SLOW_DISK)
    controller = Controller(world.machine())
    beside = [serve(controller, world, work())[0].beside for _ in range(100)]
    assert 3 <= sum(one is not None for one in beside) <= 7


def test_what_is_in_ram_is_not_read_beside():
    world = World(row=1e-8, pair=0.0, place=1 / 1e9)
    controller = Controller(world.machine(), warms=True)
    choice, _ = serve(controller, world, work(tier="ram"))
    assert (choice.way, choice.beside) == ("full", None)
