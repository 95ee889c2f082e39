"""Choosing the next tokens: the batch against a plain twin, and what it promises about seeds and batches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from ragkv.sampling import Sampler, SamplingParams, sample
from tests.sync_kit import no_waiting

CPU = torch.device("cpu")
LOGITS = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
INF = float("inf")
SETTINGS = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=1.3),
    "top_p": SamplingParams(temperature=1.0, top_p=0.6),
    "top_k": SamplingParams(temperature=1.5, top_k=4),
    "min_p": SamplingParams(temperature=1.5, min_p=0.2),
    "repetition": SamplingParams(temperature=1.0, repetition_penalty=1.8),
    "presence": SamplingParams(temperature=1.0, presence_penalty=1.5),
    "frequency": SamplingParams(temperature=1.0, frequency_penalty=0.9),
    "rewarded": SamplingParams(temperature=1.0, presence_penalty=-0.5, frequency_penalty=-0.5, repetition_penalty=0.7),
    "greedy, penalized": SamplingParams(repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.7),
    "all": SamplingParams(
        temperature=1.4,
        top_p=0.9,
        top_k=12,
        min_p=0.02,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
    ),
}


def sample_one(
    logits: Sequence[float], params: SamplingParams, uniform: float, prompt: Sequence[int], answer: Sequence[int]
) -> int:
    """The plain twin: one request, token by token."""
    scores = list(logits)
    for token in {*prompt, *answer}:
        factor = params.repetition_penalty
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token in set(answer):
        scores[token] -= params.presence_penalty + params.frequency_penalty * answer.count(token)
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))
    if params.temperature == 0:
        return order[0]
    best = scores[order[0]]
    weights = [1.0 if scores[t] == best else math.exp((scores[t] - best) / params.temperature) for t in order]
    weights = [weight for weight in weights[: params.top_k or None] if weight >= params.min_p]
    total, kept = sum(weights), []
    while len(kept) < len(weights) and sum(kept) < params.top_p * total:
        kept.append(weights[len(kept)])
    below = 0.0
    for token, weight in zip(order, kept, strict=False):
        below += weight
        if uniform * sum(kept) < below:
            return token
    raise AssertionError("the uniform is not below 1")


def sampler(params: SamplingParams, prompt: Sequence[int] = (), vocab: int = 5) -> Sampler:
    return Sampler(params, prompt, vocab, CPU)


def draws(count: int = 300, logits: torch.Tensor = LOGITS, **params: float) -> list[int]:
    """``count`` first tokens of as many requests, seeds 0, 1, …"""
    samplers = [sampler(SamplingParams(**params, seed=seed), vocab=len(logits)) for seed in range(count)]
    return sample(logits.expand(count, -1), samplers).tokens.tolist()


def walks(params: Sequence[SamplingParams], logits: torch.Tensor, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Tokens of a batch, one list a request; ``logits`` (steps, rows, vocab)."""
    samplers = [sampler(p, prompt, logits.shape[-1]) for p, prompt in zip(params, prompts, strict=True)]
    return torch.stack([sample(step, samplers).tokens for step in logits], dim=1).tolist()


def twin(params: SamplingParams, logits: torch.Tensor, prompt: Sequence[int]) -> list[int]:
    """The same of one request by :func:`sample_one`; ``logits`` (steps, vocab)."""
    answer: list[int] = []
    stream = sampler(SamplingParams(seed=params.seed))
    for step in logits.tolist():
        answer.append(sample_one(step, params, 0.0 if params.temperature == 0 else stream.uniform(), prompt, answer))
    return answer


def some_logits(*shape: int, seed: int = 0) -> torch.Tensor:
    """Half of them whole numbers, so that there are ties."""
    logits = 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(torch.arange(shape[-1]) % 2 == 0, logits.round(), logits)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_batch_gives_what_the_plain_twin_gives(name):
    logits, prompts = some_logits(30, 8, 41), [[row, 2 * row, 40] for row in range(8)]
    params = [replace(SETTINGS[name], seed=row) for row in range(8)]
    got = walks(params, logits, prompts)
    assert got == [twin(p, logits[:, row], prompts[row]) for row, p in enumerate(params)]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_changes_what_is_chosen(name):
    """Or the parity above would show nothing."""
    logits, prompts = some_logits(30, 8, 41), [[row, 2 * row, 40] for row in range(8)]
    other = SamplingParams(temperature=0.0 if SETTINGS[name].temperature else 1.0)
    plain = SamplingParams(temperature=SETTINGS[name].temperature) if name not in ("greedy", "temperature") else other
    got, without = (walks([replace(p, seed=row) for row in range(8)], logits, prompts) for p in (SETTINGS[name], plain))
    assert got != without


def test_who_else_is_in_the_batch_does_not_matter():
    logits = some_logits(20, len(SETTINGS), 41)
    params = [replace(p, seed=row) for row, p in enumerate(SETTINGS.values())]
    prompts = [[row] for row in range(len(params))]
    alone = [walks([p], logits[:, row : row + 1], [prompts[row]])[0] for row, p in enumerate(params)]
    assert walks(params, logits, prompts) == alone
    assert walks(params[::-1], logits.flip(1), prompts[::-1]) == alone[::-1]


def test_requests_that_come_go_and_are_preempted_keep_their_tokens():
    logits = some_logits(20, len(SETTINGS), 41)
    params = [replace(p, seed=row) for row, p in enumerate(SETTINGS.values())]
    expected = walks(params, logits, [[1, 2]] * len(params))
    samplers, got = [sampler(p, [1, 2], 41) for p in params], [[] for _ in params]
    generator = torch.Generator().manual_seed(0)
    while any(len(tokens) < 20 for tokens in got):
        order = torch.randperm(len(params), generator=generator).tolist()[:4]
        rows = [row for row in order if len(got[row]) < 20]
        if rows:
            step = torch.stack([logits[len(got[row]), row] for row in rows])
            for row, token in zip(rows, sample(step, [samplers[row] for row in rows]).tokens.tolist(), strict=True):
                got[row].append(token)
    assert got == expected


def test_seeds_are_streams():
    flat = torch.zeros(1, 1000)
    first, again, other, far, *unseeded = [
        walks([SamplingParams(temperature=1.0, seed=seed)], flat.expand(20, 1, -1), [[]])[0]
        for seed in (7, 7, 8, 7 + 2**32, None, None)
    ]
    assert first == again
    assert len({*map(tuple, (first, other, far, *unseeded))}) == 5


@pytest.mark.parametrize("one_request", [True, False])
def test_tokens_follow_the_distribution(one_request):
    """Pearson's test at 0.1%, 4 degrees of freedom, within one stream and over the first numbers of many."""
    params, count = SamplingParams(temperature=0.7, seed=0), 4000
    tokens = walks([params], LOGITS.expand(count, 1, -1), [[]])[0] if one_request else draws(count, temperature=0.7)
    expected = count * (LOGITS.double() / 0.7).softmax(0)
    found = torch.bincount(torch.tensor(tokens), minlength=5)
    assert ((found - expected) ** 2 / expected).sum() < 18.47


def test_truncation_keeps_the_best_and_all_of_them():
    two = float(LOGITS.softmax(0).topk(2).values.sum())
    assert set(draws(temperature=2.0, top_k=3)) == {1, 4, 2}
    assert set(draws(temperature=9.0, top_k=1)) == {1}
    assert set(draws(temperature=9.0, top_k=99)) == {0, 1, 2, 3, 4}
    assert set(draws(temperature=1.0, top_p=two - 0.01)) == {1, 4}
    assert set(draws(temperature=1.0, top_p=two + 0.01)) == {1, 4, 2}
    assert set(draws(temperature=1.0, top_p=1e-9)) == {1}
    assert set(draws(temperature=1.0, min_p=0.99 * math.exp(-1.0))) == {1, 4, 2}
    assert set(draws(temperature=1.0, min_p=1.01 * math.exp(-1.0))) == {1, 4}
    assert set(draws(temperature=9.0, min_p=1.0)) == {1}


def test_top_p_is_of_what_top_k_left():
    assert set(draws(logits=torch.zeros(10), temperature=1.0, top_k=2, top_p=0.4)) == {0}
    assert set(draws(logits=torch.zeros(10), temperature=1.0, top_k=2, top_p=0.6)) == {0, 1}


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-6, 1e-40, 5e-324])
@pytest.mark.parametrize("scale", [50.0, 1e37])
def test_a_temperature_near_zero_ends_in_the_most_likely_token(temperature, scale):
    assert set(draws(20, LOGITS * scale, temperature=temperature)) == {1}


@pytest.mark.parametrize("temperature", [0.5, 10.0])
@pytest.mark.parametrize(
    ("logits", "possible"),
    [
        ([-INF, 0.0, -INF, 0.0], {1, 3}),
        ([INF, 0.0, -INF, INF], {0, 3}),
        ([3.4e38, -3.4e38, 0.0, 3.4e38], {0, 3}),
        ([-INF, -INF, -INF], {0, 1, 2}),
        ([-7.0], {0}),
    ],
)
def test_extreme_logits(logits, possible, temperature):
    assert set(draws(200, torch.tensor(logits), temperature=temperature)) == possible
    assert draws(2, torch.tensor(logits)) == [min(possible)] * 2


@pytest.mark.parametrize("params", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}])
def test_a_uniform_just_below_one_ends_among_what_is_kept(params, monkeypatch):
    monkeypatch.setattr(Sampler, "uniform", lambda _: 1 - 2**-53)
    logits = torch.tensor([0.0, -0.1, -50.0, -INF])
    last = 0 if params == {"top_p": 0.5} else 1
    assert draws(1, logits, temperature=1.0, **params)[0] in ({1, 2} if not params else {last})


def test_logits_stay_and_a_step_without_wishes_tells_no_logprobs():
    logits = some_logits(1, 41)
    before = logits.clone()
    sampled = sample(logits, [sampler(SETTINGS["all"], [1, 2], 41)])
    assert torch.equal(logits, before)
    assert sampled.tokens.dtype == torch.int64
    assert sampled.logprobs is sampled.top_ids is sampled.top_logprobs is None


def test_logprobs_are_the_models_own():
    logits = some_logits(3, 41)
    logits += torch.linspace(0, 0.1, 41)  # no ties
    params = [
        SamplingParams(),
        replace(SETTINGS["all"], logprobs=0, seed=3),
        replace(SETTINGS["repetition"], logprobs=5),
    ]
    sampled = sample(logits, [sampler(p, [1, 2], 41) for p in params])
    expected = logits.log_softmax(1)
    torch.testing.assert_close(sampled.logprobs, expected.gather(1, sampled.tokens[:, None])[:, 0])
    values, ids = expected.sort(dim=1, descending=True)
    assert torch.equal(sampled.top_ids, ids[:, :5])
    torch.testing.assert_close(sampled.top_logprobs, values[:, :5])


def test_more_logprobs_than_tokens():
    sampled = sample(LOGITS[None], [sampler(SamplingParams(logprobs=20))])
    assert sampled.top_ids.tolist() == [[1, 4, 2, 0, 3]]


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_the_tokens_are_the_same():
    device, logits = torch.device("cuda"), some_logits(20, len(SETTINGS), 1000)
    params = [replace(p, seed=row, logprobs=2) for row, p in enumerate(SETTINGS.values())]
    expected = walks(params, logits, [[1, 2]] * len(params))
    samplers, steps = [Sampler(p, [1, 2], 1000, device) for p in params], logits.to(device)
    with no_waiting():
        sampled = [sample(step, samplers).to_host() for step in steps]
    torch.cuda.synchronize()
    assert torch.stack([step.tokens for step in sampled], dim=1).tolist() == expected


def test_penalties_need_no_prompt():
    assert walks([SamplingParams(presence_penalty=1.0)], LOGITS.expand(2, 1, -1), [[]]) == [[1, 4]]
