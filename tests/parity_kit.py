"""Blends of every kind beside the library's own forward.

The yardstick is the library's model in float32, eager or sdpa, over the whole prompt at once, with a cache that puts
stored keys and values in the place of those rows that a layer did not compute. It shares nothing with the product: no
loop over layers, no masks, no rope, no codec of torch's. Where all stored KV is exact, the answer must also be that of
the library's plain forward.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache

from ragkv.chunks import ChunkTokens, EncodeGroup
from ragkv.clock import Stopwatch
from ragkv.decoding import Decoder
from ragkv.device_tier import DeviceTier
from ragkv.encode import encode
from ragkv.eval.steps import drained
from ragkv.kv import Known, RequestKV
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.plan import PlannedChunk, PromptPlan, Span, make_plan
from ragkv.prefill import FULL, Prefill, SpanOutcome
from ragkv.retrievers import Chunk
from ragkv.rows import Joined
from ragkv.runner import ModelRunner
from ragkv.selection import STRATEGIES
from ragkv.steps import LayerCall, Steps, run_calls
from ragkv.store import ChunkStore, OpenEntry
from tests.codec_kit import decoded, encoded
from tests.families import BASE, MOVABLE, make_model

AWAY = 61  # where exact KV is made that is to be moved
ROOM = 3
MAX_TOKENS = 4096
LANES = 4
SHARE = 3  # one in so many of a family's pairs is run every time, the others in the slow run
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Relative to what is right: of logits the norm of the difference, of any token's keys and values its largest element.
TOLERANCE = {"float32": 1e-5, "bfloat16": 8e-2, "float16": 1.2e-2}
ROW_TOLERANCE = {"float32": 2e-5, "bfloat16": 2.5e-1, "float16": 3e-2}
# What a codec may take from an answer, where it is compared with the library's plain forward.
CODEC_LOSS = {"raw": 0.0, "int8": 0.04, "fp8": 0.2}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in MOVABLE},
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "qwen3-mqa": ("qwen3", {"num_key_value_heads": 1}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
}


@dataclass(frozen=True)
class Piece:
    """A chunk of a prompt: its tokens, whether it is stored, whose text it repeats, whether its context is there."""

    tokens: int
    stored: bool = True
    repeats: int | None = None
    context: bool = True


LAYOUTS: dict[str, tuple[Piece, ...]] = {
    "plain": (Piece(23), Piece(18)),
    "twice": (Piece(13), Piece(9), Piece(13, repeats=0)),
    "single": (Piece(1), Piece(1), Piece(17), Piece(1)),
    "zero": (),
    "gap": (Piece(15), Piece(11, stored=False), Piece(14)),
    "absent": (Piece(15, stored=False), Piece(11, stored=False)),
    "long": (Piece(40), Piece(5)),
    "alone": (Piece(16), Piece(14, context=False), Piece(6)),
}
PREFIXES = {"none": 0, "bos": 1, "system": 9}
KNOWN = ("nothing", "lead", "prefix", "chunk", "question")
FACTORS: dict[str, Sequence[Any]] = {
    "layout": tuple(LAYOUTS),
    "strategy": (*STRATEGIES, FULL),
    "kv": ("same", "moved", "foreign", "poisoned"),
    "codec": ("raw", "int8", "fp8"),
    "prefix": tuple(PREFIXES),
    "dtype": ("float32", "bfloat16"),
    "company": (False, True),
    "tier": ("ssd", "ram", "device"),
    "ratio": (0.3, 1.0),
    "known": KNOWN,
    "library": ("eager", "sdpa"),
}


@dataclass(frozen=True)
class Case:
    """One prompt.

    ``kv``: what the store has of it: exact KV made at the prompt's own positions (``same``) or elsewhere (``moved``),
    chunks encoded alone (``foreign``), or exact KV in which the tokens to be repaired are spoilt (``poisoned``).
    ``layout``: a name of :data:`LAYOUTS`, or the number of tokens of a single chunk. ``company``: blended while others
    are, in turns, and decoded with them. ``known``: how far the prompt's KV is there from an earlier one: to the last
    token before its prefix ends, to there, to the end of its first chunk, or into its question; no part of a chunk.
    """

    family: str
    layout: str
    strategy: str
    kv: str
    codec: str = "raw"
    prefix: str = "bos"
    dtype: str = "float32"
    company: bool = False
    tier: str = "ssd"
    ratio: float = 0.3
    library: str = "eager"
    question: int = 7
    known: str = "nothing"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return LAYOUTS[self.layout] if self.layout in LAYOUTS else (Piece(int(self.layout)),)

    @property
    def known_tokens(self) -> int:
        prefix, chunks = PREFIXES[self.prefix], [piece.tokens for piece in self.pieces]
        ends = (0, max(0, prefix - 1), prefix, prefix + sum(chunks[:1]), prefix + sum(chunks) + 1)
        return ends[KNOWN.index(self.known)]


def pairs(family: str, *, seed: int = 0, factors: dict[str, Sequence[Any]] = FACTORS) -> list[Case]:
    """The fewest cases found greedily in which any two levels of any two factors meet."""
    chance, names = random.Random(seed), list(factors)
    open_pairs = all_pairs(factors)
    cases = []
    while open_pairs:
        best: tuple[int, dict[str, Any]] = (-1, {})
        for _ in range(12):
            levels = dict(chance.choice(sorted(open_pairs, key=repr)))
            for name in chance.sample(names, len(names)):
                if name not in levels:
                    gains = {x: _gain(levels | {name: x}, name, names, open_pairs) for x in factors[name]}
                    most = max(gains.values())
                    levels[name] = chance.choice([x for x, gain in gains.items() if gain == most])
            best = max(best, (len(_met(levels, names) & open_pairs), levels), key=lambda found: found[0])
        open_pairs -= _met(best[1], names)
        cases.append(Case(family, **best[1]))
    return cases


def share(family: str, of: int, factors: dict[str, Sequence[Any]] = FACTORS) -> list[Case]:
    """The first, and so the most varied, of a family's pairs, one in ``of``, found with a seed of the family's own."""
    cases = _shared(family, tuple(factors.items()))
    return cases[: -(-len(cases) // of)]


@cache
def _shared(family: str, factors: tuple[tuple[str, Sequence[Any]], ...]) -> list[Case]:
    return pairs(family, seed=list(VARIANTS).index(family), factors=dict(factors))


def everything(family: str, factors: dict[str, Sequence[Any]] = FACTORS) -> Iterator[Case]:
    """The full product."""
    for levels in product(*factors.values()):
        yield Case(family, **dict(zip(factors, levels, strict=True)))


def all_pairs(factors: dict[str, Sequence[Any]]) -> set[Any]:
    return {((a, x), (b, y)) for a, b in combinations(factors, 2) for x in factors[a] for y in factors[b]}


def pairs_of(case: Case, factors: dict[str, Sequence[Any]]) -> set[Any]:
    return _met(vars(case), list(factors))


def _met(levels: dict[str, Any], names: list[str]) -> set[Any]:
    return {((a, levels[a]), (b, levels[b])) for a, b in combinations(names, 2)}


def _gain(levels: dict[str, Any], name: str, names: list[str], open_pairs: set[Any]) -> int:
    known = [other for other in names if other in levels]
    return sum(((a, levels[a]), (b, levels[b])) in open_pairs for a, b in combinations(known, 2) if name in (a, b))


class Library:
    """The library's own model, in float32, and what only it can say of keys: how they are rotated."""

    def __init__(self, model: Any, inv_freq: torch.Tensor) -> None:
        self._model = copy.deepcopy(model).float()
        self._model.model.rotary_emb.inv_freq.data = inv_freq
        self.device = self._model.device
        config = self._model.config
        layers = range(config.num_hidden_layers)
        self._rotated = [bool((getattr(config, "no_rope_layers", None) or [1] * len(layers))[i]) for i in layers]

    @torch.inference_mode()
    def forward(
        self, prompts: Sequence[tuple[int, ...]], kind: str, base: int = 0, stored: Sequence[Stored | None] = ()
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Logits (prompts, n, vocab) and, for each layer, K and V (prompts, 2, kv_heads, n, head_dim), rotated.

        Shorter prompts are padded behind their end, where nothing looks.
        """
        self._model.set_attn_implementation(kind)
        length = max(map(len, prompts))
        ids = torch.tensor([(*ids, *[0] * (length - len(ids))) for ids in prompts], device=self.device)
        positions = torch.arange(base, base + length, device=self.device)
        cache = _Injecting(list(stored) or [None] * len(prompts))
        logits = self._model(ids, position_ids=positions[None], past_key_values=cache, use_cache=True).logits
        return logits, cache.seen

    def lift(self, keys: torch.Tensor, start: int, layer: int) -> torch.Tensor:
        """Position-free ``keys`` (n, kv_heads, head_dim), float32, of those rotated for ``start …``."""
        return self._rotate(keys, start, layer, -1)

    def place(self, keys: torch.Tensor, start: int, layer: int) -> torch.Tensor:
        return self._rotate(keys, start, layer, 1)

    def _rotate(self, keys: torch.Tensor, start: int, layer: int, sign: int) -> torch.Tensor:
        keys = keys.float()
        if not self._rotated[layer]:
            return keys
        rotary = self._model.model.rotary_emb
        cos, sin = rotary(keys, torch.arange(start, start + len(keys), device=keys.device)[None])
        scaling = getattr(rotary, "attention_scaling", 1.0)
        cos, sin = (part[0, :, None].float() / scaling for part in (cos, sin))
        turned, rest = keys[..., : cos.shape[-1]], keys[..., cos.shape[-1] :]
        one, two = turned.chunk(2, dim=-1)
        return torch.cat((turned * cos + sign * torch.cat((-two, one), dim=-1) * sin, rest), dim=-1)


@dataclass
class Stored:
    """What a prompt reuses: K and V (layers, 2, kv_heads, n, head_dim), placed, and where they count (layers, n)."""

    kv: torch.Tensor
    where: torch.Tensor


class _Injecting(DynamicCache):
    """Hands out, and keeps, stored keys and values where there are some and the layer's own elsewhere."""

    def __init__(self, stored: list[Stored | None]) -> None:
        super().__init__()
        self._stored = stored
        self.seen: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any) -> Any:
        both = torch.stack(super().update(keys, values, layer), dim=1)
        for row, stored in zip(both, self._stored, strict=True):
            if stored is not None:
                at = stored.where[layer].nonzero()[:, 0]
                row[:, :, at] = stored.kv[layer][:, :, at]
        self.seen.append(both)
        return both[:, 0], both[:, 1]


@dataclass(eq=False)
class Run:
    """What the product made of one case."""

    case: Case
    plan: PromptPlan
    stored: Stored
    exact: bool
    computed: torch.Tensor  # bool (layers, n): the rows each layer was run for
    poisoned: torch.Tensor  # bool (n,)
    outcomes: list[SpanOutcome] = field(default_factory=list)
    source: RequestKV | None = None  # until the next token is decoded
    kv: torch.Tensor | None = None  # (layers, 2, kv_heads, n, head_dim)
    logits: torch.Tensor | None = None  # (2, vocab): after the prompt, and after one token more

    @property
    def next_token(self) -> int:
        return 3 + self.plan.ids[-1] % 200


class World:
    """A model, its library twin, and stores with entries for its prompts."""

    def __init__(
        self, root: Path, family: str, dtype: str, device: str = "cpu", fused: bool | None = None, **options: Any
    ) -> None:
        self.family, self.dtype, self._root = family, dtype, root
        name, variant = VARIANTS[family]
        model = make_model(name, options={**variant, **options}).to(device)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data *= (BASE["hidden_size"] / model.config.hidden_size) ** 0.5  # as sharp attention as ever
        # As from_pretrained leaves it: what rotates stays in float32.
        inv_freq = model.model.rotary_emb.inv_freq.clone()
        model = model.to(DTYPES[dtype])
        model.model.rotary_emb.inv_freq.data = inv_freq
        self.library = Library(model, inv_freq)
        self.runner = ModelRunner(model, fused=fused)
        self._stores: dict[str, ChunkStore] = {}
        self._device_tier = DeviceTier(2**28, self.runner.device)
        self._pool = PagedKV(self.runner.shape, LANES * MAX_TOKENS // BLOCK_TOKENS, self.runner.device)
        self._decoder = Decoder(self.runner, self._pool, lanes=LANES, max_tokens=MAX_TOKENS)
        self._put_already: set[tuple[str, bytes]] = set()
        self._exact: dict[Any, torch.Tensor] = {}
        self._slabs: dict[bytes, torch.Tensor] = {}
        self._watched: WeakKeyDictionary[RequestKV, torch.Tensor] = WeakKeyDictionary()
        self._watch()
        self._spoil()

    def close(self) -> None:
        for store in self._stores.values():
            store.close()

    def store(self, tier: str) -> ChunkStore:
        if tier not in self._stores:
            self._stores[tier] = ChunkStore(
                self._root / f"{self.family}-{self.dtype}-{tier}",
                capacity_bytes=2**28,
                ram_bytes=2**27 if tier == "ram" else 0,
                threads=2,
            )
        return self._stores[tier]

    # Prompts

    def steps(self, case: Case) -> Steps[Run]:
        """Blend, in steps."""
        clean = replace(case, kv="moved") if case.kv == "poisoned" else case
        plan = self.plan(clean)
        poisoned = torch.zeros(len(plan.ids), dtype=torch.bool)
        yield from self._brought(clean, plan)
        if case.kv == "poisoned":
            run = yield from self._blended(clean, plan, poisoned)
            poisoned = self._repaired(plan, run.computed[-1])
            plan = self.plan(case, poisoned)
            yield from self._brought(case, plan)
        return (yield from self._blended(case, plan, poisoned))

    def _brought(self, case: Case, plan: PromptPlan) -> Steps[None]:
        """What a blend has brought to the device is there for the next."""
        if case.tier == "device":
            yield from self._blended(replace(case, strategy="none"), plan, torch.zeros(len(plan.ids)))

    def _blended(self, case: Case, plan: PromptPlan, poisoned: torch.Tensor) -> Steps[Run]:
        length, layers = len(plan.ids), self.runner.shape.layers
        options: dict[str, Any] = {"ratio": case.ratio, "room": ROOM, "watch": Stopwatch(), "seed": 5}
        options["device_tier"] = self._device_tier if case.tier == "device" else None
        known = self._known(case, plan)
        options["known"] = Known(case.known_tokens, lambda kv: kv.slots(0, case.known_tokens).copy_(known))
        steps = Prefill(self.runner, self.store(case.tier), plan, strategy=case.strategy, **options).steps()
        result = yield from steps
        computed = self._watched[result.kv][:, :length]
        run = Run(case, plan, self._stored(plan, computed, known), self._is_exact(case), computed, poisoned)
        yield
        run.logits, run.outcomes, run.source = result.logits[None].float(), result.outcomes, result.kv
        kv = [torch.stack(result.kv.read(layer, length)) for layer in range(layers)]
        run.kv = torch.stack(kv).transpose(2, 3).float()
        return run

    def decode(self, runs: Sequence[Run], chance: random.Random) -> None:
        """The token behind every prompt, in one step, from blocks that lie about in a pool of what nobody wrote."""
        free = chance.sample(range(self._pool.blocks), self._pool.blocks)
        lanes = chance.sample(range(LANES), len(runs))
        for run, lane in zip(runs, lanes, strict=True):
            length = len(run.plan.ids)
            blocks = [free.pop() for _ in range(length // BLOCK_TOKENS + 1)]
            self._pool.data[blocks] = float("nan")
            assert run.source is not None
            self._pool.scatter(run.source, blocks, 0, length)
            self._decoder.enter(lane, run.next_token, length, blocks)
            run.source = None
        for run, lane, logits in zip(runs, lanes, self._decoder.step(lanes).clone(), strict=True):
            assert run.logits is not None
            run.logits = torch.cat((run.logits, logits[None]))
            self._decoder.left(lane)

    def plan(self, case: Case, poisoned: torch.Tensor | None = None) -> PromptPlan:
        """The case's prompt, its stored chunks put into the case's store, some of their tokens (n,) spoilt."""
        seed = f"{case.layout} {case.prefix} {case.question}"
        prefix = _ids(PREFIXES[case.prefix], seed)
        question = _ids(case.question, f"{seed} question")
        planned: list[PlannedChunk] = []
        at = len(prefix)
        for number, piece in enumerate(case.pieces):
            ids = _ids(piece.tokens, f"{seed} {number if piece.repeats is None else piece.repeats}")
            spoilt = () if poisoned is None else tuple(poisoned[at : at + piece.tokens].tolist())
            name = (case.dtype, case.codec, case.kv, seed, at, spoilt, _blind(case))
            key = random.Random(repr((self.family, name))).randbytes(32)
            if piece.repeats is not None:
                key = planned[piece.repeats].tokens.key
            context = () if piece.context else (5, 6)
            tokens = ChunkTokens(ids, context, len(context) // 2, "document", key, case.codec)
            chunk = Chunk(f"{number}", f"d{number}", len(context) // 2, "text")
            planned.append(PlannedChunk(chunk, number, 1.0, tokens))
            at += piece.tokens
        plan = make_plan(prefix, planned, question, budget=MAX_TOKENS)
        for span, piece in zip(plan.spans, case.pieces, strict=True):
            if piece.stored and piece.repeats is None:
                self._put(case, plan, span, None if poisoned is None else poisoned[span.start : span.end])
        return plan

    # Entries

    def _put(self, case: Case, plan: PromptPlan, span: Span, spoilt: torch.Tensor | None) -> None:
        key, store = span.chunk.tokens.key, self.store(case.tier)
        if (case.tier, key) in self._put_already:
            return
        self._put_already.add((case.tier, key))
        kv = self._foreign(span) if case.kv == "foreign" else self._made(case, plan)[:, :, span.start : span.end]
        if spoilt is not None and bool(spoilt.any()):
            kv = kv.clone()
            kv[:, :, spoilt] = float("nan") if _blind(case) else kv[:, :, spoilt] + 5.0
        slabs = [encoded(layer, case.codec) for layer in kv]
        self._slabs[key] = torch.stack(
            [decoded(slab, self.runner.shape, span.length, case.codec) for slab in slabs]
        ).float()
        raw = [layer.contiguous().view(torch.uint8).numpy().reshape(-1) for layer in kv]
        geometry = self.runner.shape.geometry
        assert store.put(key, geometry, raw, tokens=span.length, model="m", codec=case.codec)
        if case.tier == "ram":
            [entry] = store.open([key])
            assert isinstance(entry, OpenEntry)
            with entry, store.open_layers([entry]) as layers:
                assert len(list(layers)) == len(kv)  # what was read to the end stays in memory

    def _made(self, case: Case, plan: PromptPlan) -> torch.Tensor:
        """Exact KV of a whole prompt as the library has it, position-free, in the model's dtype.

        (layers, 2, n, kv_heads, head_dim)
        """
        base = 0 if case.kv == "same" else AWAY
        name = (plan.ids, base)
        if name not in self._exact:
            _, seen = self.library.forward([plan.ids], "eager", base)
            layers = [both[0].transpose(1, 2) for both in seen]
            lifted = [torch.stack((self.library.lift(k, base, i), v)) for i, (k, v) in enumerate(layers)]
            self._exact[name] = torch.stack(lifted).to(DTYPES[self.dtype]).cpu()
        return self._exact[name]

    def _known(self, case: Case, plan: PromptPlan) -> torch.Tensor:
        """What an earlier prompt left, in the model's dtype: exact, or not, where that reused what was not.

        (layers, 2, tokens, kv_heads, head_dim)
        """
        name = (plan.ids, "known")
        if name not in self._exact:
            _, seen = self.library.forward([plan.ids], "eager")
            self._exact[name] = torch.stack([both[0].transpose(1, 2) for both in seen]).to(DTYPES[self.dtype])
        left = self._exact[name][:, :, : case.known_tokens]
        return left * 1.5 if case.kv == "foreign" else left

    def _foreign(self, span: Span) -> torch.Tensor:
        """A chunk's KV as the product encodes it, alone behind a BOS."""
        tokens = span.chunk.tokens
        group = EncodeGroup((1,), (tokens.ids,), (tokens.key,), "alone")
        [chunk] = drained(encode(self.runner, group))
        shape = self.runner.shape
        slabs = [torch.from_numpy(slab.copy()).view(shape.dtype) for slab in chunk.slabs]
        return torch.stack(slabs).reshape(shape.layers, 2, span.length, shape.kv_heads, shape.head_dim)

    def _stored(self, plan: PromptPlan, computed: torch.Tensor, known: torch.Tensor) -> Stored:
        """NaN where nothing is stored: whoever reuses such rows will see it."""
        shape = self.runner.shape
        size = (shape.layers, 2, shape.kv_heads, len(plan.ids), shape.head_dim)
        table = torch.full(size, float("nan"), device=self.library.device)
        for span in plan.spans:
            slabs = self._slabs.get(span.chunk.tokens.key)
            if slabs is None:
                continue
            for layer, both in enumerate(slabs.to(self.library.device)):
                placed = self.library.place(both[0], span.start, layer).to(shape.dtype).float()
                table[layer, :, :, span.start : span.end] = torch.stack((placed, both[1])).transpose(1, 2)
        table[:, :, :, : known.shape[2]] = known.transpose(2, 3).float()
        return Stored(table, ~computed.to(table.device))

    def _repaired(self, plan: PromptPlan, computed: torch.Tensor) -> torch.Tensor:
        """The stored tokens that were computed wherever their chunk stands."""
        where = torch.zeros_like(computed)
        for span in plan.spans:
            if (key := span.chunk.tokens.key) in self._slabs:
                same = [other for other in plan.spans if other.chunk.tokens.key == key]
                everywhere = torch.stack([computed[other.start : other.end] for other in same]).all(dim=0)
                where[span.start : span.end] = everywhere
        return where

    def _is_exact(self, case: Case) -> bool:
        return case.kv != "foreign" and case.layout != "twice"

    def _watch(self) -> None:
        """Keep account of the rows that every layer is run for, whoever runs it."""
        for name in ("run_layer", "run_together"):
            setattr(self.runner, name, self._watching(getattr(self.runner, name)))

    def _watching(self, run_rows: Callable[[int, Any], None]) -> Callable[[int, Any], None]:
        def watched(layer: int, rows: Any) -> None:
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return run_rows(layer, rows)  # what looks ahead: it is nobody's prompt
            for step in rows.step.steps:
                kv = step.kv
                done = self._watched.setdefault(kv, torch.zeros((kv.shape.layers, kv.capacity), dtype=torch.bool))
                done[layer, step.slots.cpu()] = True
            return run_rows(layer, rows)

        return watched

    def _spoil(self) -> None:
        """NaN in every slot of a new KV: what is read but was never written shows, whatever memory held before."""
        for name in ("new_kv", "workspace"):
            setattr(self.runner, name, _spoiling(getattr(self.runner, name)))


def _spoiling(make: Callable[..., RequestKV]) -> Callable[..., RequestKV]:
    def spoilt(*args: Any, **options: Any) -> RequestKV:
        kv = make(*args, **options)
        for layer in range(kv.shape.layers):
            for part in kv.read(layer, kv.capacity):
                part.fill_(float("nan"))
        return kv

    return spoilt


def _blind(case: Case) -> bool:
    """Whether nobody looks at what is spoilt: then it is NaN, which spoils all it touches. Codecs cannot hold it, and
    selectors that look at stored KV must be able to compare it."""
    return case.codec == "raw" and case.strategy in ("none", "epic", "random", "echo", FULL)


def _ids(count: int, seed: str) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(3, 256) for _ in range(count))


class Bench:
    """Runs cases and says what is wrong with them.

    Args:
        slack: how many times the tolerance is let pass: of thousands of cases a few are ill-conditioned.
    """

    def __init__(self, root: Path, device: str = "cpu", *, slack: float = 1.0, **options: Any) -> None:
        self._root, self._device, self.slack, self._options = root, device, slack, options
        self._worlds: dict[tuple[str, str], World] = {}
        self.worst: dict[tuple[str, str], float] = {}

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()

    def world(self, family: str, dtype: str) -> World:
        name = (family, dtype)
        if name not in self._worlds:
            self._worlds[name] = World(self._root, family, dtype, self._device, **self._options)
        return self._worlds[name]

    def faults(self, cases: Sequence[Case], *, seed: int = 0, together: int = 3) -> list[str]:
        """One line for each case that is not as the library has it; none if all are."""
        faults: list[str] = []
        for world, lone, company in self._sorted(cases):
            runs = [run for case in lone for run in interleaved(world, [case], seed)]
            for start in range(0, len(company), together):
                runs += interleaved(world, company[start : start + together], seed + start)
            for kind in sorted({run.case.library for run in runs}):
                faults += self._judged(world, [run for run in runs if run.case.library == kind], kind)
        return faults

    def _sorted(self, cases: Sequence[Case]) -> Iterator[tuple[World, list[Case], list[Case]]]:
        groups: dict[tuple[str, str], tuple[list[Case], list[Case]]] = {}
        for case in cases:
            groups.setdefault((case.family, case.dtype), ([], []))[case.company].append(case)
        for name, (lone, company) in groups.items():
            yield self.world(*name), lone, company

    def _judged(self, world: World, runs: list[Run], kind: str) -> list[str]:
        prompts = [(*run.plan.ids, run.next_token) for run in runs]
        logits, layers = world.library.forward(prompts, kind, stored=[run.stored for run in runs])
        plain, _ = world.library.forward(prompts, kind)
        lines = []
        for i, run in enumerate(runs):
            length = len(run.plan.ids)
            right = torch.stack([layer[i, :, :, :length] for layer in layers])
            wrong = [*misread(run), *self._compare(run, logits[i, length - 1 : length + 1], right)]
            wrong += self._against_plain(run, plain[i, length - 1 : length + 1])
            if wrong:
                lines.append(f"{run.case}: {'; '.join(wrong)}")
        return lines

    def _compare(self, run: Run, logits: torch.Tensor, kv: torch.Tensor) -> list[str]:
        dtype = run.case.dtype
        assert run.logits is not None
        assert run.kv is not None
        found = [
            (f"the {name}", TOLERANCE[dtype], norm_error(run.logits[i], logits[i]))
            for i, name in enumerate(("answer", "next token"))
        ]
        for layer, (got, expected) in enumerate(zip(run.kv, kv, strict=True)):
            for i, part in enumerate("KV"):
                found.append((f"{part} of layer {layer}", ROW_TOLERANCE[dtype], row_error(got[i], expected[i])))
        for name, _, error in found:
            what = (dtype, name.split(" of ")[0])
            self.worst[what] = max(self.worst.get(what, 0.0), error)
        return [f"{name} off by {error:.1e}" for name, limit, error in found if not error <= self.slack * limit]

    def _against_plain(self, run: Run, plain: torch.Tensor) -> list[str]:
        """Exact KV, or such with all that was spoilt recomputed, must answer as if nothing had been reused."""
        if not run.exact or bool((run.poisoned & ~run.computed[-1]).any()):
            return []
        case = run.case
        # Float32 holds an angle of a thousand radians to a ten-thousandth: the library's own answer moves by as much.
        limit = TOLERANCE[case.dtype] + CODEC_LOSS[case.codec] + 1e-7 * len(run.plan.ids)
        if case.kv == "poisoned" and case.codec != "raw":
            return []  # what is spoilt spoils its neighbours' scales
        assert run.logits is not None
        error = norm_error(run.logits, plain)
        what = (f"{case.dtype} {case.codec}", "plain")
        self.worst[what] = max(self.worst.get(what, 0.0), error)
        return [] if error <= self.slack * limit else [f"the plain forward's answers are off by {error:.1e}"]


def misread(run: Run) -> list[str]:
    """What is wrong with which rows were computed, or with what is said about it: parity alone would be content with
    a product that reuses nothing."""
    case, plan, computed = run.case, run.plan, run.computed
    wrong = []
    nowhere = torch.zeros(len(plan.ids), dtype=torch.bool)
    may, stored_rows, known = nowhere.clone(), nowhere.clone(), nowhere.clone()
    known[: case.known_tokens] = True
    for span, piece in zip(plan.spans, case.pieces, strict=True):
        where = slice(span.start, span.end)
        stored_rows[where] = piece.stored and case.strategy != FULL
        may[where] = piece.stored and piece.context
    stored_rows &= ~known
    if bool(computed[:, known].any()):
        wrong.append("what is known was computed again")
    if not bool(computed[:, ~stored_rows & ~known].all()):
        wrong.append("rows that nobody stored were not computed")
    if case.strategy != FULL and bool(computed[:, stored_rows & ~may].any()):
        wrong.append("tokens were repaired without their context")
    share = {"none": 0.0, FULL: 1.0}.get(case.strategy, case.ratio)
    chosen = int((computed[-1] & stored_rows).sum())
    if chosen != round(share * int((may & stored_rows).sum())):
        wrong.append(f"{chosen} tokens were repaired, a share of {share} was asked for")
    for span, piece, outcome in zip(plan.spans, case.pieces, run.outcomes, strict=True):
        rows = int(computed[:, span.start : span.end].sum())
        if outcome.token_layers != rows:
            wrong.append(f"a chunk reports {outcome.token_layers} token-layers, {rows} were run")
        source = case.tier if piece.stored and case.strategy != FULL else "computed"
        if outcome.kv != ("prefix" if span.end <= case.known_tokens else source):
            wrong.append(f"a chunk's KV is said to come from {outcome.kv}")
    return wrong


@torch.inference_mode()
def interleaved(world: World, cases: Sequence[Case], seed: int) -> list[Run]:
    """The runs of ``cases``, advanced a step at a time, mostly whoever is furthest behind; layers that several want are
    run for them at once, or not, as chance has it. What comes next is decoded for all of them together."""
    chance = random.Random(seed)
    going: dict[Steps[Run], LayerCall | None] = {world.steps(case): None for case in cases}
    runs: list[Run] = []
    while going:
        behind = min(going, key=lambda steps: call.layer if (call := going[steps]) is not None else -1)
        steps = behind if chance.random() < 0.8 else chance.choice(list(going))
        if (call := going[steps]) is not None:
            others = [one for one, its in going.items() if its is not None and its.layer == call.layer and one != steps]
            _run([steps, *(one for one in others if chance.random() < 0.8)], going, world.runner)
            continue
        try:
            going[steps] = next(steps)
        except StopIteration as done:
            del going[steps]
            runs.append(done.value)
    world.decode(runs, chance)
    return runs


def _run(several: list[Steps[Run]], going: dict[Steps[Run], LayerCall | None], runner: ModelRunner) -> None:
    calls = [call for steps in several if (call := going[steps]) is not None]
    run_calls(runner, calls, Joined([call.rows for call in calls]) if len(calls) > 1 else None)
    going.update(dict.fromkeys(several))


def norm_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    error = float((actual - expected).norm() / expected.norm())
    return error if error == error else float("inf")


def row_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Of (kv_heads, n, head_dim), the largest error of any token, relative to what is right for that token."""
    off = (actual - expected).abs().amax(dim=(0, 2)) / expected.abs().amax(dim=(0, 2))
    return float(off.nan_to_num(nan=float("inf")).max())
