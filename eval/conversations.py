"""Conversations of several turns: found in a trace of single requests by what their prompts share, or invented."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ragkv.eval.traces import TraceRequest

_LEAST_QUESTION = 16
_TURNS, _QUESTION, _PROMPT, _OUTPUT = 4, 64, 1200, 180


class Turn(NamedTuple):
    """Tokens that are new in the prompt, and tokens of the reply."""

    new: int
    output: int


def from_trace(requests: Sequence[TraceRequest]) -> list[list[Turn]]:
    """Conversations of two turns and more, in the order of their first request.

    A request is the next turn of the latest earlier one whose blocks it repeats: all of them but the last, which the
    reply has filled up since. The first block does not count: in the public trace it is the same in every request.
    New in it are the tokens that it is longer than the earlier prompt and its reply, 16 at the least. What was gone on
    with already is not gone on with again: of branches the first is the conversation.
    """
    ends: dict[int, int] = {}  # the last whole block of a request, and the latest request it is that of
    before: dict[int, int] = {}
    for number, request in enumerate(requests):
        known = (ends[block] for block in reversed(request.hash_ids[1:]) if block in ends)
        if (earlier := next(known, None)) is not None and requests[earlier].input_length < request.input_length:
            before[number] = earlier
            del ends[_last_whole(requests[earlier])]
        if len(request.hash_ids) > 2:
            ends[_last_whole(request)] = number
    lines: dict[int, list[int]] = {}
    for number in range(len(requests)):
        line = lines.pop(before[number]) if number in before else []
        lines[number] = [*line, number]
    found = sorted((line for line in lines.values() if len(line) > 1), key=lambda line: line[0])
    return [_turns([requests[number] for number in line]) for line in found]


def _last_whole(request: TraceRequest) -> int:
    return request.hash_ids[-2]


def _turns(requests: Sequence[TraceRequest]) -> list[Turn]:
    turns, context = [], 0
    for request in requests:
        new = max(request.input_length - context, _LEAST_QUESTION)
        turns.append(Turn(new, max(request.output_length, 1)))
        context = request.input_length + request.output_length
    return turns


def invented(count: int, rng: np.random.Generator) -> list[list[Turn]]:
    """Geometrically many turns, four on average, two at least; log-normal lengths: a first prompt of about 1,200 tokens
    (the median), questions of 64, replies of 180."""
    turns = 2 + rng.geometric(1 / (_TURNS - 1), count) - 1
    return [[_invented(_PROMPT if place == 0 else _QUESTION, rng) for place in range(many)] for many in turns]


def _invented(new: int, rng: np.random.Generator) -> Turn:
    lengths = rng.lognormal(np.log([new, _OUTPUT]), [0.8, 0.6]).astype(int)
    return Turn(max(int(lengths[0]), _LEAST_QUESTION), max(int(lengths[1]), 4))


def capped(turns: Sequence[Turn], *, prompt: int, output: int, context: int) -> list[Turn]:
    """The turns that fit ``context`` tokens when new tokens are at most ``prompt``, and those of a reply ``output``."""
    kept, length = [], 0
    for new, reply in turns:
        turn = Turn(min(new, prompt), min(reply, output))
        length += sum(turn)
        if length > context:
            break
        kept.append(turn)
    return kept
