"""The model runner: ``transformers``' decoder layers, driven one by one over a request's own KV.

The layer loop belongs to the caller (a prefill or a blend), because between two layers it loads, selects or
yields; the runner only knows how to run one layer for some rows. Not thread-safe: the engine thread owns it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ragkv.attention import AttentionStep, Query
from ragkv.host_memory import keep_freed
from ragkv.kv import KvShape, RequestKV
from ragkv.lookahead import Look
from ragkv.methods import CHECK_LAYER
from ragkv.rope import read_rope
from ragkv.rows import Joined, Rows
from ragkv.uploading import uploaded

if TYPE_CHECKING:
    from ragkv.fused import FusedLayers
    from ragkv.fused_lookahead import FusedLookahead


_SWITCH_S = 5e-4


def use_device(device: torch.device) -> None:
    """Have all that this thread launches go to ``device``: kernels go to the thread's own, whatever they are given."""
    if device.index is not None and device.type == "cuda":  # without a number it is the thread's own already
        torch.cuda.set_device(device)


class _Probed(Exception):  # noqa: N818  (not an error: it carries the values out of the library's layer)
    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


class _Probe:
    """A cache that stops the layer once its keys and values are known, before attention."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> None:
        raise _Probed(values)


class ModelRunner:
    """Runs a loaded causal LM whose attention implementation is :data:`ragkv.attention.NAME`.

    Args:
        fused: run layers with :mod:`ragkv.fused`. By default on CUDA, where it knows the model's layers; True asks for
            it anywhere (a CPU needs Triton's interpreter), False for the plain loop over the library's modules.

    Attributes:
        plain_because: why layers run in the plain loop, or None where they run fused.
        check_layer: where values of this model best tell `hkvd` what is stale; :mod:`ragkv.methods` reads it.
    """

    def __init__(self, model: Any, *, fused: bool | None = None) -> None:
        self.model = model.eval()
        self.decoder = model.model
        self.config = model.config
        weight = model.get_input_embeddings().weight
        self.device: torch.device = weight.device
        attention = self.decoder.layers[0].self_attn
        self.shape = KvShape(
            layers=len(self.decoder.layers),
            kv_heads=int(self.config.num_key_value_heads),
            head_dim=int(attention.head_dim),
            dtype=weight.dtype,
        )
        self.rope = read_rope(model)
        self.check_layer = CHECK_LAYER
        self.vocab_size = int(weight.shape[0])
        self.max_positions = int(self.config.max_position_embeddings)
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.eos_ids = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        if self.device.type == "cuda":
            # Who launches kernels must not wait for the interpreter as long as a prefill takes.
            sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_S))
        else:
            keep_freed()
        self._rotary: tuple[torch.Tensor, torch.Tensor] | None = None
        self.fused: FusedLayers | None = None
        self.lookahead: FusedLookahead | None = None
        self.plain_because: str | None = "the fused layer loop needs CUDA"
        if fused is False:
            self.plain_because = "it was asked for"
        elif fused or self.device.type == "cuda":
            self._fuse()

    def _fuse(self) -> None:
        try:
            from ragkv.fused import FusedLayers, refusal  # needs Triton
            from ragkv.fused_graphs import LayerGraphs
            from ragkv.fused_lookahead import FusedLookahead
        except ImportError as error:
            self.plain_because = f"the fused layer loop cannot be imported: {error}"
            return
        self.plain_because = refusal(self.model)
        if self.plain_because is None:
            self.fused = FusedLayers(self.model)
            if self.device.type == "cuda":
                self.lookahead = FusedLookahead(self)
                self.fused.graphs = LayerGraphs(self.shape, self.max_positions, self.device, self.fused.launch)

    def capture_all(self) -> Iterator[None]:
        """Have ready, on CUDA, what prompts would otherwise wait for once; yields in between."""
        if self.fused is not None:
            yield from self.fused.capture_all()

    def use_plain_loop(self, because: str) -> None:
        """Run layers with the library's own modules from now on."""
        self.fused, self.lookahead, self.plain_because = None, None, because

    @property
    def layer_loop(self) -> str:
        """``fused``, or ``plain:`` and why."""
        return "fused" if self.plain_because is None else f"plain: {self.plain_because}"

    def new_kv(self, capacity: int, base: int = 0) -> RequestKV:
        return RequestKV(self.shape, capacity, self.device, base)

    def workspace(self, capacity: int) -> RequestKV:
        """KV for a prefill: the one whose layers run in graphs, if nobody has it now."""
        graphs = self.fused.graphs if self.fused is not None else None
        leased = graphs.lease(capacity) if graphs is not None else None
        return self.new_kv(capacity) if leased is None else leased

    def rows(self, ids: torch.Tensor, step: AttentionStep, reach: int | None = None) -> Rows:
        """Embed token ``ids`` (rows,) for the positions of ``step``, which are below ``reach`` if that is known."""
        return self.rows_from(self.decoder.embed_tokens(ids[None]), step, reach)

    def rows_from(self, hidden: torch.Tensor, step: AttentionStep, reach: int | None = None) -> Rows:
        """The same of ``hidden`` states (1, rows, hidden_size) of some layer."""
        if reach is None or self.rope.refusal is not None:
            return Rows(hidden, self.decoder.rotary_emb(hidden, step.positions[None]), step)
        cos, sin = (part[step.positions][None] for part in self._rotary_table(hidden, reach))
        return Rows(hidden, (cos, sin), step)

    def rows_of(self, prompt: NDArray[np.int64], step: AttentionStep, reach: int) -> Rows:
        """Embed those tokens of ``prompt``, its ids, that stand at the positions of ``step``, all below ``reach``."""
        ids = torch.from_numpy(prompt)
        embed = self.decoder.embed_tokens
        # Others do more than look up.
        plain = type(embed) is torch.nn.Embedding and embed.weight.is_contiguous()
        if self.fused is not None and self.rope.refusal is None and plain:
            return self.fused.start(ids, step, embed.weight, self._rotary_table(embed.weight, reach))
        return self.rows(uploaded(ids, self.device)[step.positions], step, reach)

    def _rotary_table(self, like: torch.Tensor, reach: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The library's cos and sin (positions, rotary_dim), which do not change with the prompt: computed once."""
        if self._rotary is None or len(self._rotary[0]) < reach:
            positions = torch.arange(1 << (reach - 1).bit_length(), device=self.device)
            cos, sin = self.decoder.rotary_emb(like, positions[None])
            self._rotary = cos[0].contiguous(), sin[0].contiguous()
        return self._rotary

    def run_layer(self, layer: int, rows: Rows) -> None:
        """Advance ``rows`` through one layer, writing their keys and values into the step's KV."""
        self._run(layer, rows)

    def run_together(self, layer: int, joined: Joined) -> None:
        """The same for rows of several prompts: products and norms are of all of them, KV and attention each one's."""
        self._run(layer, joined)
        joined.hand_out()

    def _run(self, layer: int, rows: Rows | Joined) -> None:
        if self.fused is not None and rows.step.causal:
            self.fused.run(layer, rows)
            return
        rows.hidden = self.decoder.layers[layer](
            rows.hidden,
            attention_mask=rows.step,
            position_ids=rows.step.positions[None],
            past_key_values=rows.step,
            use_cache=True,
            position_embeddings=rows.rotary,
        )

    def score(self, found: Look, step: AttentionStep) -> None:
        """Add the attention that the step's rows pay, as they are ``found`` to, to the step's scores."""
        if self.fused is not None:
            self.fused.score(found, step)
            return
        for layer, *query in zip(found.layers, found.queries, found.scales, found.windows, strict=True):
            step.score(layer, Query(*query))

    def probe_values(self, layer: int, rows: Rows) -> torch.Tensor:
        """Values (rows, kv_heads, head_dim) that ``layer`` would write for ``rows``; writes and advances nothing."""
        if self.fused is not None:
            return self.fused.values(layer, rows)
        try:
            self.decoder.layers[layer](
                rows.hidden,
                attention_mask=None,
                position_ids=rows.step.positions[None],
                past_key_values=_Probe(),
                use_cache=True,
                position_embeddings=rows.rotary,
            )
        except _Probed as probed:
            return probed.values[0].transpose(0, 1)
        raise RuntimeError("the layer did not update its cache")

    def logits(self, rows: Rows) -> torch.Tensor:
        """float32 (vocab,) next-token logits of the last row."""
        last = self.decoder.norm(rows.hidden[:, -1:])
        return self.model.lm_head(last)[0, 0].float()  # type: ignore[no-any-return]

    def start_prefill(self, ids: torch.Tensor, kv: RequestKV, done: int = 0) -> Rows:
        """Rows of a plain prefill of ``ids`` (n,) into ``kv``, behind the ``done`` slots that it has."""
        end = done + int(ids.shape[0])
        positions = torch.arange(kv.base + done, kv.base + end, device=self.device)
        return self.rows(ids, AttentionStep(kv, positions, end, contiguous=not done, last_only=True), kv.base + end)

    def prefill(self, ids: torch.Tensor, kv: RequestKV) -> Rows:
        """:meth:`start_prefill` through all layers."""
        rows = self.start_prefill(ids, kv)
        for layer in range(self.shape.layers):
            self.run_layer(layer, rows)
        return rows

    def decode(self, token: int, position: int, kv: RequestKV) -> torch.Tensor:
        """Logits after one more ``token`` at ``position``."""
        ids = torch.tensor([token], device=self.device)
        positions = torch.tensor([position], device=self.device)
        rows = self.rows(ids, AttentionStep(kv, positions, position - kv.base + 1, contiguous=False))
        for layer in range(self.shape.layers):
            self.run_layer(layer, rows)
        return self.logits(rows)

    def tensor(self, ids: Any) -> torch.Tensor:
        """int64, on the device."""
        return uploaded(torch.from_numpy(np.array(ids, np.int64)), self.device)

    def moment(self) -> torch.cuda.Event | None:
        """When the device has done what was launched so far; None on a CPU, where that is now."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
