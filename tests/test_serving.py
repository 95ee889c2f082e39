"""The serving engine: a request's tokens are its own, whoever else is served and whatever happens to its KV."""

from __future__ import annotations

import random
import threading
from contextlib import suppress

import pytest

from ragkv.errors import EngineClosedError, NotFoundError, PromptTooLongError, QueueFullError
from ragkv.sampling import SamplingParams
from tests.blend_kit import Desk, token_ids
from tests.families import make_runner
from tests.serving_kit import alone, hall

MODES = ["recompute", "blockwise", "groups", "async", "reuse"]


@pytest.fixture(scope="module")
def runner():
    return make_runner("llama")


@pytest.fixture(scope="module")
def prompts(runner):
    return [token_ids(20 + 13 * i, seed=i) for i in range(10)]


@pytest.fixture(scope="module")
def answers(runner, prompts):
    return [alone(runner, prompt, 40) for prompt in prompts]


def test_a_batch_answers_as_each_alone(tmp_path, runner, prompts, answers):
    with hall(tmp_path, runner=runner, blocks=200) as place:
        asked = [place.ask(prompt, 40) for prompt in prompts]
        assert [one.wait().tokens for one in asked] == answers
        assert place.loop.stats()["preemptions"] == 0
        place.check()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("preemption", MODES)
def test_preemption_changes_no_token(tmp_path, runner, prompts, answers, preemption, late):
    """Blocks for about three of ten requests, and priorities that change all the time. ``late``: as on a GPU."""
    chooser = random.Random(1)
    with hall(tmp_path, runner=runner, blocks=30, preemption=preemption, policy="priority", late=late) as place:
        asked = [place.ask(prompt, 40) for prompt in prompts]
        while not all(one.ended.wait(0.002) for one in asked):
            for one in asked:
                with suppress(NotFoundError):
                    place.loop.reprioritize(one.generation.id, chooser.randrange(10))
        assert [one.tokens for one in asked] == answers
        assert place.loop.stats()["preemptions"] > 10
        place.check()


def test_preempted_without_room_in_ram_is_computed_again(tmp_path, runner, prompts, answers):
    with hall(tmp_path, runner=runner, blocks=24, host_blocks=3, policy="priority") as place:
        low = place.ask(prompts[9], 40, priority=5)
        while len(low.tokens) < 5:
            pass
        high = [place.ask(prompt, 40, priority=0) for prompt in prompts[6:9]]
        assert [one.wait().tokens for one in high] == answers[6:9]
        assert low.wait().tokens == answers[9]
        assert place.loop.stats()["recomputed_tokens"] > 0
        place.check()


def test_the_same_beginning_is_computed_once(tmp_path, runner):
    shared, ends = token_ids(64, seed=50), [token_ids(9, seed=51 + i) for i in range(4)]
    with hall(tmp_path, runner=runner) as place:
        first = place.ask((*shared, *ends[0])).wait()
        others = [place.ask((*shared, *end)) for end in ends[1:]]
        for one, end in zip([first, *others], ends, strict=True):
            assert one.wait().tokens == alone(runner, (*shared, *end), 12)
        assert [one.generation.known_tokens for one in others] == [64, 64, 64]
        assert place.loop.service() == {"": 73 + 3 * 9 + 4 * 2 * 12}
        place.check()


def test_a_second_turn_goes_on_from_the_first(tmp_path, runner):
    prompt, more = token_ids(40, seed=3), token_ids(11, seed=4)
    with hall(tmp_path, runner=runner) as place:
        first = place.ask(prompt, 20).wait()
        turn = (*prompt, *first.tokens, *more)
        second = place.ask(turn, 20).wait()
        assert second.generation.known_tokens == 48  # of the 59 whose KV there was
        assert second.tokens == alone(runner, turn, 20)


@pytest.mark.parametrize("strategy", ["none", "question", "hkvd", "links"])
def test_a_blended_conversation_is_its_own(tmp_path, strategy):
    desk = Desk(tmp_path)
    chunks = desk.document("d", 30, 41)
    desk.put(*chunks)
    prefix = token_ids(40, seed=8)
    plan = desk.plan(*chunks, prefix=prefix, question=9)
    fields = {"strategy": strategy, "ratio": 0.2}
    with hall(tmp_path, runner=desk.runner, store=desk.store) as place:
        first = place.ask(plan, **fields).wait()
        again = place.ask(plan, **fields).wait()
        assert first.generation.lineage.exact == 40
        assert again.generation.known_tokens == 32
        assert again.tokens == first.tokens
        turn = (*plan.ids, *first.tokens, *token_ids(5, seed=9))
        own = place.ask(turn, lineage=first.generation.lineage).wait()
        assert own.generation.known_tokens == (len(plan.ids) + 11) // 16 * 16
        foreign = place.ask(turn).wait()
        assert foreign.generation.known_tokens == 32
        assert foreign.tokens == alone(desk.runner, turn, 12)
        place.check()
    desk.store.close()


@pytest.mark.parametrize("preemption", ["recompute", "reuse"])
def test_a_preempted_blend_goes_on_as_it_would_have(tmp_path, preemption):
    desk = Desk(tmp_path)
    chunks = desk.document("d", 30, 41)
    desk.put(*chunks)
    plan = desk.plan(*chunks, prefix=token_ids(20, seed=8), question=9)
    fields = {"strategy": "question", "ratio": 0.2}
    with hall(tmp_path / "calm", runner=desk.runner, store=desk.store) as place:
        calm = place.ask(plan, 60, **fields).wait().tokens
    with hall(
        tmp_path, runner=desk.runner, store=desk.store, blocks=12, preemption=preemption, policy="priority"
    ) as place:
        low = place.ask(plan, 60, priority=9, **fields)
        while len(low.tokens) < 3:
            pass
        for seed in range(3):
            place.ask(token_ids(150, seed=seed), 4).wait()
        assert low.wait().tokens == calm
        assert low.generation.preemptions > 0
        place.check()
    desk.store.close()


def test_scores_come_with_their_tokens(tmp_path, runner, prompts):
    with hall(tmp_path, runner=runner) as place:
        asked = place.ask(prompts[0], 6, sampling=SamplingParams(logprobs=3))
        other = place.ask(prompts[1], 6)
        assert [scores.top[0] for scores in asked.wait().scores] == [
            (token, scores.logprob) for token, scores in zip(asked.tokens, asked.scores, strict=True)
        ]
        assert set(other.wait().scores) == {None}


def test_seeds_answer_alike_in_any_company(tmp_path, runner, prompts):
    params = SamplingParams(temperature=1.0, seed=5)
    with hall(tmp_path, runner=runner, blocks=30, policy="priority") as place:
        single = place.ask(prompts[2], 20, sampling=params).wait().tokens
        crowd = [place.ask(prompt, 20, sampling=params, priority=i % 3) for i, prompt in enumerate(prompts)]
        assert crowd[2].wait().tokens == single
        for one in crowd:
            one.wait()
        place.check()


def test_what_can_never_fit_is_refused_at_once(tmp_path, runner):
    with hall(tmp_path, runner=runner, blocks=4) as place:
        with pytest.raises(PromptTooLongError, match="pool_bytes"):
            place.ask(token_ids(60, seed=1), 5)
        assert place.ask(token_ids(60, seed=1), 4).wait().ends == ["length"]
        place.check()


def test_a_full_queue_says_so(tmp_path, runner, prompts):
    with hall(tmp_path, runner=runner, max_running=1, max_queued=2) as place:
        hold = threading.Event()
        first = place.ask(prompts[0])
        first.generation.on_token = lambda *_: hold.wait(20)
        while place.loop.running == 0:
            pass
        waiting = [place.ask(prompts[1]), place.ask(prompts[2])]
        with pytest.raises(QueueFullError):
            place.ask(prompts[3])
        hold.set()
        assert [one.wait().ends for one in [first, *waiting]] == [["length"]] * 3
        place.check()


def test_others_cannot_touch_a_request(tmp_path, runner, prompts):
    with hall(tmp_path, runner=runner) as place:
        asked = place.ask(prompts[0], 300, tenant="a")
        for act in (place.loop.cancel, lambda name, who: place.loop.reprioritize(name, 0, who)):
            with pytest.raises(NotFoundError):
                act(asked.generation.id, "b")
        place.loop.cancel(asked.generation.id, "a")
        assert asked.wait().ends == ["cancelled"]
        with pytest.raises(NotFoundError):
            place.loop.cancel(asked.generation.id, "a")
        place.check()


def test_closing_ends_everybody_once(tmp_path, runner, prompts):
    with hall(tmp_path, runner=runner, blocks=30, max_running=3) as place:
        asked = [place.ask(prompt, 300) for prompt in prompts[:6]]
        while not asked[0].tokens:
            pass
        place.check()
        for one in asked:
            [error] = one.wait().ends
            assert isinstance(error, EngineClosedError)
