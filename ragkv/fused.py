"""The fast layer loop on CUDA: a decoder layer in nine launches, and none that waits for the device.

    norm → q, k, v in one product → rotate and write into the KV → attend → output, added to the rows
         → norm → gate and up in one product → activation → down, added to the rows

Residual sums are the products' own accumulation, in float32. Where only a prompt's last row is asked for behind the
last layer, the others end there with their keys and values. The modules of the model stay whole: their matrices become
views of the joined ones, so that the plain loop over ``transformers``' layers runs on the same memory and is the twin
this one is compared with (:mod:`ragkv.selfcheck`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch.nn.functional import linear

from ragkv.attention import AttentionStep, Query
from ragkv.fused_graphs import Captured, LayerGraphs
from ragkv.kernels import twins
from ragkv.kernels.attend import AttendRoom, attend, drop_hopper
from ragkv.kernels.pointwise import rms_norm, silu_mul
from ragkv.kernels.rotate import rope_write
from ragkv.kernels.scores import score_keys
from ragkv.kernels.start import start_rows
from ragkv.kernels.weigh import weigh
from ragkv.lookahead import Look
from ragkv.rows import Joined, Rows, empty_rows
from ragkv.uploading import handed

log = logging.getLogger("ragkv")
_DTYPES = (torch.bfloat16, torch.float16)
_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj")
_REQUIRED = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    *(f"self_attn.{name}.weight" for name in _MATRICES),
    *(f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")),
}
# Of each set, all or none.
_OPTIONAL = [
    {f"self_attn.{name}.bias" for name in _MATRICES[:3]},
    {"self_attn.q_norm.weight", "self_attn.k_norm.weight"},
]
_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Layer:
    """One layer's weights; matrices transposed, (in, out)."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    eps: float
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    value: Any
    norms: tuple[torch.Tensor, torch.Tensor] | None
    norm_eps: float
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    rotates: bool
    scale: float
    window: int | None


class _Part(NamedTuple):
    """Of a room, what belongs to the rows of one prompt. ``q`` is (rows, heads, head_dim)."""

    step: AttentionStep
    rotary: tuple[torch.Tensor, torch.Tensor]
    qkv: torch.Tensor
    q: torch.Tensor
    slots: torch.Tensor
    attend: AttendRoom


class _Room:
    """Memory for some rows, the same for every layer. ``attended`` is (rows, heads · head_dim)."""

    parts: list[_Part]

    def __init__(self, rows: Rows | Joined, layer: Layer, heads: int, head_dim: int) -> None:
        hidden, steps = rows.hidden[0], rows.step.steps
        count, sizes = hidden.shape[0], [step.rows for step in steps]
        self.normed = torch.empty_like(hidden)
        self.qkv = hidden.new_empty((count, layer.qkv.shape[1]))
        self.gate_up = hidden.new_empty((count, layer.gate_up.shape[1]))
        cos, sin = (part[0].contiguous() for part in rows.rotary)
        q = hidden.new_empty((count, heads, head_dim))
        rooms = [
            AttendRoom(some, step.kv.shape.kv_heads, step.length)
            for some, step in zip(torch.split(q, sizes), steps, strict=True)
        ]
        attended = rooms[0].out
        if len(rooms) > 1:
            attended = torch.empty_like(q)
            for room, out in zip(rooms, torch.split(attended, sizes), strict=True):
                room.out = out
        self.attended = attended.view(count, -1)
        rotary = zip(torch.split(cos, sizes), torch.split(sin, sizes), strict=True)
        slots = [step.slots for step in steps]
        parts = zip(steps, rotary, torch.split(self.qkv, sizes), torch.split(q, sizes), slots, rooms, strict=True)
        self.parts = [_Part(*part) for part in parts]

    @cached_property
    def end(self) -> _Room:
        """Of one prompt's room, what belongs to its last row."""
        [part] = self.parts
        end: _Room = object.__new__(_Room)
        end.normed, end.qkv, end.gate_up, end.attended = (
            memory[-1:] for memory in (self.normed, self.qkv, self.gate_up, self.attended)
        )
        attend = AttendRoom(part.q[-1:], part.step.kv.shape.kv_heads, part.step.length)
        attend.out = part.attend.out[-1:]
        end.parts = [part._replace(q=part.q[-1:], slots=part.slots[-1:], attend=attend)]
        return end


class FusedLayers:
    """Runs the layers of a model that :func:`refusal` says nothing against, whose matrices it joins.

    Attributes:
        layers: what each needs.
        graphs: run the layers where they can.
    """

    def __init__(self, model: Any) -> None:
        decoder, config = model.model, model.config
        self._head_dim = int(decoder.layers[0].self_attn.head_dim)
        self._heads = int(config.num_attention_heads)
        self.layers = [_read(layer, config) for layer in decoder.layers]
        self.graphs: LayerGraphs | None = None
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # what the separate matrices held is in pieces that nothing else fits into

    def run(self, index: int, rows: Rows | Joined) -> None:
        """Advance ``rows`` through layer ``index``, writing their keys and values into the KV of their steps. The last
        layer advances the last row alone where the step says that only that is asked for."""
        if isinstance(rows, Joined):
            self.launch(index, rows)
            return
        if rows.room is None and self.graphs is not None:
            self._enter(self.graphs, rows)
        if isinstance(rows.room, Captured) and not rows.step.score_rows:
            rows.room.replay(index)
        else:
            self.launch(index, rows)

    def start(
        self,
        prompt: torch.Tensor,
        step: AttentionStep,
        embedding: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
    ) -> Rows:
        """Rows of the tokens of ``prompt``, int64 (length,) on the host, at the step's positions, before the first
        layer; ``angles`` are cos and sin (positions, rotary_dim) of all positions. Where graphs run the layers, they
        begin in the graphs' room."""
        captured = self._captured(step, embedding, angles[0])  # in a workspace slots are positions
        rows = empty_rows(step, embedding, angles[0]) if captured is None else captured.rows
        cos, sin = rows.rotary
        slots = torch.empty_like(step.positions) if captured is None else rows.step.slots
        with handed(prompt, step.positions.device) as ids:
            start_rows(ids, step.positions, embedding, angles, rows.hidden[0], (cos[0], sin[0]), slots)
        return rows if captured is None else captured.taken(step)

    def weigh(self, scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """:func:`ragkv.kernels.weigh.weigh` with ``weights`` that are on the host: float32 (length,)."""
        with handed(weights, scores.device) as there:
            return weigh(scores, there)

    def capture_all(self) -> Iterator[None]:
        """Capture layers for all numbers of rows before they are needed; yields in between."""
        try:
            if self.graphs is not None:
                yield from self.graphs.capture_all()
        except Exception as failed:
            self._do_without_graphs(failed)

    def _enter(self, graphs: LayerGraphs, rows: Rows) -> None:
        try:
            captured = graphs.taking(rows.step, rows.hidden, rows.rotary[0])
            if captured is not None:
                captured.enter(rows)
        except Exception as failed:  # the rows are as they were
            self._do_without_graphs(failed)

    def _captured(self, step: AttentionStep, hidden: torch.Tensor, rotary: torch.Tensor) -> Captured | None:
        try:
            return None if self.graphs is None else self.graphs.taking(step, hidden, rotary)
        except Exception as failed:
            self._do_without_graphs(failed)
            return None

    def _do_without_graphs(self, failed: Exception) -> None:
        """There is too little memory, or whatever the driver raises."""
        log.warning("layers cannot be captured, so that their kernels are launched one by one: %r", failed)
        self.graphs = None

    def launch(self, index: int, rows: Rows | Joined) -> None:
        """The same, kernel by kernel."""
        layer, room = self.layers[index], self._room(rows)
        hidden = rows.hidden[0]
        rms_norm(hidden, layer.input_norm, layer.eps, room.normed)
        if layer.qkv_bias is None:
            torch.mm(room.normed, layer.qkv, out=room.qkv)
        else:
            torch.addmm(layer.qkv_bias, room.normed, layer.qkv, out=room.qkv)
        for part in room.parts:
            _write(index, layer, part)
        if self._ends(index, rows):
            hidden, room = hidden[-1:], room.end
        for part in room.parts:
            _attend(index, layer, part)
        hidden.addmm_(room.attended, layer.output)
        rms_norm(hidden, layer.post_norm, layer.eps, room.normed)
        torch.mm(room.normed, layer.gate_up, out=room.gate_up)
        hidden.addmm_(silu_mul(room.gate_up), layer.down)

    def _ends(self, index: int, rows: Rows | Joined) -> bool:
        """Whether nobody wants more of layer ``index`` than all rows' KV and what the last row comes to."""
        if index < len(self.layers) - 1 or isinstance(rows, Joined) or not rows.step.last_only:
            return False
        return rows.step.rows > 1 and not rows.step.score_rows and index not in rows.step.kept

    def values(self, index: int, rows: Rows) -> torch.Tensor:
        """Values (rows, kv_heads, head_dim) that layer ``index`` would write for ``rows``."""
        layer, normed = self.layers[index], torch.empty_like(rows.hidden[0])
        rms_norm(rows.hidden[0], layer.input_norm, layer.eps, normed)
        values: torch.Tensor = linear(normed, layer.value.weight, layer.value.bias)
        return values.view(values.shape[0], -1, self._head_dim)

    def find_fault(self) -> str | None:
        """What of selecting, or of attention over one row, some and many, is computed wrongly; compiles what these
        need.

        If it is the kernel for Hopper that is wrong, or cannot be compiled, the one for any device runs instead.
        """
        layer = self.layers[0]
        if fault := self._weighing_fault(layer.qkv.device):
            return fault
        kv_heads = (layer.qkv.shape[1] // self._head_dim - self._heads) // 2
        group = self._heads // kv_heads
        many = 256 // group + 1
        for rows, length in ((1, 700), (16 // group + 1, 700), (many, 700), (many, 1100)):  # the last one splits keys
            # A kernel for windows is the same for all of them, and another one than where prompts are shorter.
            half = length // 2
            for window in {None if w is None else min(w, half) for w in (None, *(each.window for each in self.layers))}:
                fault = self._attention_fault(rows, length, kv_heads, window)
                if fault is not None and drop_hopper(rows * group, self._head_dim, layer.qkv):
                    log.warning("the fused layer loop %s; it does without its kernel for Hopper", fault)
                    return self.find_fault()
                if fault is not None:
                    return fault
        return None

    def _weighing_fault(self, device: torch.device) -> str | None:
        scores, weights = torch.linspace(-1, 1, 2000), torch.linspace(-1, 9, 2000)
        weights[::7] = float("inf")
        try:
            weighed = self.weigh(scores.to(device), weights)
        except Exception as failed:  # whatever the compiler or the driver raises
            return f"failed: {failed!r}"
        return None if torch.equal(weighed.cpu(), twins.weigh(scores, weights)) else "weighs scores wrongly"

    def _attention_fault(self, rows: int, length: int, kv_heads: int, window: int | None) -> str | None:
        try:
            error = self._attention_error(rows, length, kv_heads, window)
        except Exception as failed:  # whatever the compiler or the driver raises
            return f"failed: {failed!r}"
        if error <= _TOLERANCE:
            return None
        return f"computes the attention of {rows} rows, window {window}, {error:.2%} off"

    def _attention_error(self, rows: int, length: int, kv_heads: int, window: int | None) -> float:
        """Of attention, and of the scores that the last row gives."""
        layer = self.layers[0]
        device, dtype = layer.qkv.device, layer.qkv.dtype
        generator = torch.Generator(device).manual_seed(0)
        q, k, v = (
            torch.randn((count, heads, self._head_dim), generator=generator, device=device).to(dtype)
            for count, heads in ((rows, self._heads), (length, kv_heads), (length, kv_heads))
        )
        slots = torch.linspace(length // 2, length - 1, rows, device=device).long()
        results = []
        for attention, scoring in ((attend, score_keys), (twins.attend, twins.score_keys)):
            out, lse = attention(q, k, v, slots, scale=layer.scale, window=window)
            scores = torch.zeros(length, dtype=torch.float32, device=device)
            scoring(q, lse, k, slots, scores, last=1, scale=layer.scale, window=window)
            results.append((out.float(), scores))
        errors = [float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True)]
        return max(errors, key=lambda error: (error != error, error))

    def _room(self, rows: Rows | Joined) -> _Room:
        if not isinstance(rows.room, _Room):
            rows.room = _Room(rows, self.layers[0], self._heads, self._head_dim)
        return rows.room

    def score(self, found: Look, step: AttentionStep) -> None:
        """Add the attention that the step's rows pay, as they are ``found`` to, to the step's scores."""
        forms = list(zip(found.scales, found.windows, strict=True))
        if len(set(forms)) == 1:
            self._score(found.layers[0], found.queries, *forms[0], step)
        else:
            for layer, queries, form in zip(found.layers, found.queries, forms, strict=True):
                self._score(layer, queries, *form, step)

    def _score(self, first: int, rows: torch.Tensor, scale: float, window: int | None, step: AttentionStep) -> None:
        k, v = step.kv.read(first, step.length)
        window = window if window is not None and window < step.length else None
        stride = step.kv.layer_stride
        _, lse = attend(rows, k, v, step.slots, scale=scale, window=window, layer_stride=stride)
        _score(rows, lse, k, step, scale, window, stride)


def _write(index: int, layer: Layer, part: _Part) -> None:
    """Rotate the queries of one prompt's rows and their keys, and write these and their values into its KV."""
    step = part.step
    k, v = step.kv.read(index, step.length)
    rotary = part.rotary if layer.rotates else None
    rope_write(part.qkv, rotary, layer.norms, part.slots, part.q, k, v, eps=layer.norm_eps)
    if index in step.kept:
        step.queries[index] = Query(part.q.clone(), layer.scale, layer.window)


def _attend(index: int, layer: Layer, part: _Part) -> None:
    """Have one prompt's rows look at all its keys."""
    step = part.step
    k, v = step.kv.read(index, step.length)
    window = layer.window if layer.window is not None and layer.window < step.length else None
    _, lse = attend(part.q, k, v, part.slots, scale=layer.scale, window=window, room=part.attend)
    if step.score_rows:
        _score(part.q, lse, k, step, layer.scale, window)


def _score(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    step: AttentionStep,
    scale: float,
    window: int | None,
    layer_stride: int = 0,
) -> None:
    if step.scores is None:
        step.scores = torch.zeros(step.length, dtype=torch.float32, device=k.device)
    score_keys(
        q,
        lse,
        k,
        step.slots,
        step.scores,
        last=step.score_rows,
        scale=scale,
        window=window,
        layer_stride=layer_stride,
    )


def refusal(model: Any) -> str | None:
    """What about ``model`` the fused loop does not know, or None when it can run it."""
    weight = model.get_input_embeddings().weight
    if weight.is_cuda and weight.dtype not in _DTYPES:
        return f"it is for {' and '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, the model is {weight.dtype}"
    for index, layer in enumerate(model.model.layers):
        if reason := _refuses(layer):
            return f"layer {index} {reason}"
    return None


def _refuses(layer: torch.nn.Module) -> str | None:
    names = {name for name, _ in layer.named_parameters()}
    if missing := _REQUIRED - names:
        return f"lacks {min(missing)}"
    if unknown := names - _REQUIRED - {name for known in _OPTIONAL if known <= names for name in known}:
        return f"has {min(unknown)}"
    attention, mlp = cast(Any, layer.self_attn), cast(Any, layer.mlp)
    if type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return f"has the activation {type(mlp.act_fn).__name__}"
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    if hasattr(attention, "q_norm"):
        norms += [attention.q_norm, attention.k_norm]
        if attention.q_norm.weight.shape != (attention.head_dim,):
            return "norms queries over all heads"
    if not all(hasattr(norm, "variance_epsilon") for norm in norms):
        return f"has the norm {type(norms[0]).__name__}"
    if attention.head_dim % 2 or attention.head_dim > 256:
        return f"has heads of {attention.head_dim} dimensions"
    return None


@torch.no_grad()
def _read(layer: Any, config: Any) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    qkv, bias = _join(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, _ = _join(mlp.gate_proj, mlp.up_proj)
    normed = hasattr(attention, "q_norm")
    return Layer(
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        eps=float(layer.input_layernorm.variance_epsilon),
        qkv=qkv.t(),
        qkv_bias=bias,
        value=attention.v_proj,
        norms=(attention.q_norm.weight.detach(), attention.k_norm.weight.detach()) if normed else None,
        norm_eps=float(attention.q_norm.variance_epsilon) if normed else 0.0,
        output=attention.o_proj.weight.detach().t(),
        gate_up=gate_up.t(),
        down=mlp.down_proj.weight.detach().t(),
        rotates=bool(getattr(attention, "use_rope", True)),
        scale=float(attention.scaling),
        window=_window(attention, config),
    )


def _window(attention: Any, config: Any) -> int | None:
    """Mistral's attention asks the configuration; those with windows in some layers know their own."""
    if hasattr(attention, "sliding_window"):
        return cast("int | None", attention.sliding_window)
    return cast("int | None", config.sliding_window) if config.model_type == "mistral" else None


def _join(*linears: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of several linear modules in one matrix and vector, of which theirs become views."""
    joined: list[torch.Tensor | None] = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat(parts)
        for module, view in zip(linears, torch.split(whole, [len(part) for part in parts]), strict=True):
            setattr(module, name, torch.nn.Parameter(view, requires_grad=False))
        joined.append(whole)
    return cast(torch.Tensor, joined[0]), joined[1]
