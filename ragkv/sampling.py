"""Choosing the next token of many requests at once, on the device.

Rows of a batch are independent: the k-th token of a request takes the k-th number of the request's own stream of
uniforms, so the same logits give the same tokens whoever else is in the batch, and however often it was preempted.
Nothing waits for the device, and nothing depends on the host knowing what was chosen before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ragkv.uploading import uploaded

_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class SamplingParams:
    """How a request chooses its tokens; as in the OpenAI API and vLLM.

    Attributes:
        temperature: 0 chooses the most probable token.
        top_p: keep the most probable tokens that make up this much.
        top_k: keep so many; 0: all.
        min_p: keep those with at least this share of the best one's probability.
        repetition_penalty: divides positive logits, and multiplies negative ones, of tokens in prompt or answer (CTRL,
            Keskar et al. 2019).
        presence_penalty, frequency_penalty: taken off the logits of tokens in the answer, once, and for each time.
        seed: of the stream of uniforms; None: another one each time.
        logprobs: tell each token's log probability, and of so many best ones; None: none. They are the model's own,
            before penalties and temperature.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < _LEAST_TEMPERATURE

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Sampler:
    """What choosing a request's tokens remembers: its stream of uniforms, and how often each token stands where.

    Attributes:
        counts: int32 (vocab,) on the device, of tokens in the answer; None without penalties. ``prompted``: bool, in
            the prompt.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Sequence[int], vocab_size: int, device: torch.device
    ) -> None:
        self.params = params
        self._uniforms = random.Random(params.seed)  # noqa: S311  (no secret)
        self.counts: torch.Tensor | None = None
        self.prompted: torch.Tensor | None = None
        if params.penalized:
            self.counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)
            prompted = torch.zeros(vocab_size, dtype=torch.bool)
            prompted[torch.tensor(sorted(set(prompt_ids)), dtype=torch.int64)] = True
            self.prompted = uploaded(prompted, device)

    def uniform(self) -> float:
        """The next number in [0, 1)."""
        return self._uniforms.random()


@dataclass
class Sampled:
    """``tokens`` int64 (rows,); where somebody asked for them, their ``logprobs`` (rows,), and the best tokens' ids and
    log probabilities, (rows, n) for the largest n asked for."""

    tokens: torch.Tensor
    logprobs: torch.Tensor | None = None
    top_ids: torch.Tensor | None = None
    top_logprobs: torch.Tensor | None = None

    def to_host(self) -> Sampled:
        """The same on the host, as soon as the device gets there; nothing is waited for."""
        return Sampled(*(None if part is None else _on_host(part) for part in vars(self).values()))  # type: ignore[arg-type]


def sample(logits: torch.Tensor, samplers: Sequence[Sampler]) -> Sampled:
    """A token for every row of ``logits``, float32 (rows, vocab), which stay as they are."""
    params = [sampler.params for sampler in samplers]
    raw = logits
    if any(p.penalized for p in params):
        logits = _penalized(logits, samplers)
    tokens = logits.argmax(dim=-1)
    chance = [row for row, p in enumerate(params) if not p.greedy]
    if chance:
        rows = uploaded(torch.tensor(chance), logits.device)
        tokens[rows] = _drawn(logits[rows], [samplers[row] for row in chance])
    for row, sampler in enumerate(samplers):
        if sampler.counts is not None:
            sampler.counts.index_add_(0, tokens[row : row + 1], sampler.counts.new_ones(1))
    wanted = [p.logprobs for p in params if p.logprobs is not None]
    return Sampled(tokens, *_scores(raw, tokens, max(wanted))) if wanted else Sampled(tokens)


def _penalized(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    logits = logits.clone()
    for row, sampler in enumerate(samplers):
        counts, prompted, p = sampler.counts, sampler.prompted, sampler.params
        if counts is None or prompted is None:
            continue
        said = counts > 0
        scaled = torch.where(logits[row] > 0, logits[row] / p.repetition_penalty, logits[row] * p.repetition_penalty)
        logits[row] = torch.where(said | prompted, scaled, logits[row])
        logits[row] -= p.frequency_penalty * counts + p.presence_penalty * said
    return logits


def _drawn(logits: torch.Tensor, samplers: Sequence[Sampler]) -> torch.Tensor:
    """Inverse of the distribution function at each row's uniform, over tokens from the most probable down."""
    device, size = logits.device, logits.shape[1]
    table = [
        (p.temperature, p.top_k or size, p.min_p, p.top_p, sampler.uniform())
        for sampler in samplers
        for p in [sampler.params]
    ]
    columns = uploaded(torch.tensor(table, dtype=torch.float64), device)[:, :, None]
    temperature, top_k, min_p, top_p, uniforms = columns.unbind(1)

    values, tokens = logits.sort(dim=-1, descending=True, stable=True)
    # From the highest down, in float64: a temperature near 0 must end in the greedy token, not in infinities.
    values = (values.double() - values[:, :1].double()) / temperature
    rank = torch.arange(size, device=device)
    values = values.nan_to_num(nan=0.0).masked_fill(rank >= top_k, float("-inf"))
    values = values.masked_fill(values < min_p.log(), float("-inf"))
    probabilities = values.softmax(dim=-1)
    # A token is kept while the mass before it is below top_p, so the first always is.
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    mass = kept.cumsum(dim=-1)
    place = (mass <= uniforms * mass[:, -1:]).sum(dim=-1, keepdim=True)
    # Rounding must not choose what was not kept: sums of a parallel scan need not grow.
    place = place.minimum((kept > 0).sum(dim=-1, keepdim=True) - 1)
    return tokens.gather(-1, place)[:, 0]


def _scores(logits: torch.Tensor, tokens: torch.Tensor, best: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(best, logits.shape[-1]), dim=-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], top.indices, top.values


def _on_host(part: torch.Tensor) -> torch.Tensor:
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return host.copy_(part, non_blocking=True)
