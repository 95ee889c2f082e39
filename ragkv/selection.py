"""Which stored tokens to repair: the strategies, by name.

A strategy is a generator over a :class:`~ragkv.blend.Blend`; it yields as all :mod:`ragkv.steps` do and returns a
:class:`~ragkv.blend.Start`. It may select at once, look at the question's attention first, or run some layers
densely, and it never selects tokens that are not repairable.

    none      nothing: full reuse
    epic      the first tokens of every chunk (EPIC, ICML'25)
    random    tokens at random: the yardstick every idea must beat
    question  tokens the question attends to in the middle layers (ProphetKV, QCFuse 2026)
    echo      tokens whose own words say that they lean on chunks they were encoded without
    links     those that the question will attend to: both at once
    hkvd      tokens whose values deviate most at a check layer (CacheBlend, EuroSys'25)

``full`` is no strategy here: it is the plain prefill of :mod:`ragkv.prefill`.
"""

from __future__ import annotations

import torch

from ragkv.attention import AttentionStep
from ragkv.blend import Blend, Start, Strategy
from ragkv.echoes import Floats, hints, scarcity
from ragkv.lookahead import Look, look
from ragkv.methods import outline
from ragkv.prelude import Prelude
from ragkv.steps import Steps


def none(blend: Blend) -> Steps[Start]:
    yield from ()
    return _at_once(blend, blend.required_places)


def epic(blend: Blend) -> Steps[Start]:
    """The same number of tokens at the start of every chunk; short chunks leave theirs to the others.

    What is left goes to the first chunks: equal scores would leave it to the sort, and so to the prompt's length.
    """
    yield from ()
    scores = torch.full((blend.length,), float("-inf"))
    for number, span in enumerate(blend.reused):
        scores[span.start : span.end] = -torch.arange(span.length, dtype=torch.float) - number / len(blend.reused)
    return _at_once(blend, blend.take(scores))


def random(blend: Blend) -> Steps[Start]:
    yield from ()
    scores = torch.rand(blend.length, generator=torch.Generator().manual_seed(blend.seed))
    return _at_once(blend, blend.take(scores))


def question(blend: Blend) -> Steps[Start]:
    """What the question's rows attend to, over the reused KV."""
    if not blend.budget:
        return (yield from none(blend))
    scores = yield from _attended(blend)
    return _selected(blend, scores)


def echo(blend: Blend) -> Steps[Start]:
    """What :func:`~ragkv.echoes.hints` says: known before any KV is loaded, and nothing is run to find it out."""
    yield from ()
    return _selected(blend, torch.from_numpy(hints(blend.plan)))


def links(blend: Blend) -> Steps[Start]:
    """What the question will attend to (:mod:`ragkv.lookahead`), each token weighed by its hint and its scarcity: of
    all tokens that matter few are stale, of all stale ones few matter, and function words hardly ever do."""
    if not blend.budget:
        return (yield from none(blend))
    prelude = blend.prelude or Prelude(blend.runner, blend.plan)
    found = prelude.found or (yield from _look(blend, prelude))
    scores = yield from _sought(blend, prelude.positions, found)
    # Words are read while the device does what was launched so far.
    return _selected(blend, scores, hints(blend.plan) * scarcity(blend.plan))


def hkvd(blend: Blend) -> Steps[Start]:
    """Dense up to the check layer; there compare fresh values with stored ones, d = Σ (V_new − V_old)², and go
    on with the tokens that differ most."""
    check = outline("hkvd", blend.runner.shape.layers, blend.runner.check_layer).dense
    if not blend.budget:
        return (yield from none(blend))
    # Rows that must not be repaired may not be recomputed on the way either.
    dense = blend.rows(blend.places(blend.required | blend.repairable))
    yield from blend.advance(dense, 0, check, "recompute")
    blend.loader.ensure(check)
    blend.watch.lap("load")
    fresh = blend.runner.probe_values(check, dense)
    positions = dense.step.positions
    stored = blend.kv.read(check, blend.length)[1][positions]
    deviation = (fresh.float() - stored.float()).square().sum(dim=(1, 2))
    scores = torch.zeros(blend.length, device=positions.device).index_copy_(0, positions, deviation)
    chosen = blend.take(scores)
    rows = blend.rows(chosen, dense.hidden[:, torch.searchsorted(positions, chosen)])
    blend.watch.lap("select")
    return Start(rows, check, dense_layers=check)


def _attended(blend: Blend) -> Steps[torch.Tensor]:
    """float32 (length,) on the device: run only the required rows over the reused KV, up to three quarters of the
    depth, and add up the attention that the question's rows pay from one quarter on."""
    asked = outline("question", blend.runner.shape.layers).asked
    rows = blend.rows(blend.required_places, score_question=True)
    score_rows, rows.step.score_rows = rows.step.score_rows, 0
    yield from blend.advance(rows, 0, asked.start, "select")
    rows.step.score_rows = score_rows
    yield from blend.advance(rows, asked.start, asked.stop, "select")
    if rows.step.scores is None:
        raise RuntimeError("the attention function collected no scores")
    return rows.step.scores


def _sought(blend: Blend, positions: torch.Tensor, found: Look) -> Steps[torch.Tensor]:
    """float32 (length,) on the device: the attention that the question's rows, which saw none of the context, pay to
    its stored keys. ``found`` is of ``positions``."""
    asking = blend.length - blend.plan.question_start
    lead = len(positions) - asking
    step = AttentionStep(blend.kv, positions[lead:], blend.length, contiguous=False, score_rows=asking)
    first, known = found.layers.start, min(blend.known, lead)
    own = positions[known:]
    if blend.least > len(own):
        # What is not computed yet has no keys but its own, and memory may hold anything, NaN too.
        blend.kv.write_layers(first, blend.kv.slot(blend.required_places), torch.zeros_like(found.kv[:, :, :1]))
    blend.kv.write_layers(first, blend.kv.slot(own), found.kv[:, :, known:])
    for layer in found.layers:
        blend.loader.ensure(layer)
    blend.watch.lap("load")
    blend.runner.score(found.behind(lead), step)
    blend.watch.lap("select")
    yield None
    blend.watch.lap("queue")
    if step.scores is None:
        raise RuntimeError("the attention function collected no scores")
    return step.scores


def _look(blend: Blend, prelude: Prelude) -> Steps[Look]:
    """Layer by layer, where looking ahead is no single launch."""
    steps = look(blend.runner, prelude.ids, prelude.positions)
    while True:
        try:
            next(steps)
        except StopIteration as done:
            found: Look = done.value
            return found
        blend.watch.lap("select")
        yield None
        blend.watch.lap("queue")


def _selected(blend: Blend, scores: torch.Tensor, weights: Floats | None = None) -> Start:
    start = _at_once(blend, blend.take(scores, weights))
    blend.watch.lap("select")
    return start


def _at_once(blend: Blend, positions: torch.Tensor) -> Start:
    return Start(blend.rows(positions), 0)


STRATEGIES: dict[str, Strategy] = {
    "none": none,
    "epic": epic,
    "random": random,
    "question": question,
    "echo": echo,
    "links": links,
    "hkvd": hkvd,
}
