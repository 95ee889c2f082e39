"""The fast decoding loop on CUDA: one row of each of many requests, captured in CUDA graphs.

    norm, q, k, v → rotate, write into the pool → attend by block table → output, added → norm, gate, up, activation
         → down, added

Tokens, positions and block tables stay on the device. A graph is captured for a number of rows when it is first needed;
rows that are too many decode a spare lane, which never moves and writes into the pool's spare block.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from ragkv.capture import captured, capturing
from ragkv.fused import Layer
from ragkv.kernels.paged import PagedRoom, attend_paged
from ragkv.kernels.pointwise import rms_norm, silu_mul
from ragkv.kernels.rotate import rope_write
from ragkv.kernels.vector import product
from ragkv.paged import BLOCK_TOKENS, PagedKV
from ragkv.paged_step import Lane
from ragkv.runner import ModelRunner
from ragkv.uploading import uploaded

_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)


class _Room:
    """Memory for ``rows`` rows, the same for every layer."""

    def __init__(self, hidden: torch.Tensor, layer: Layer, heads: int, kv_heads: int, head_dim: int) -> None:
        rows = hidden.shape[0]
        self.normed = torch.empty_like(hidden)
        self.qkv = hidden.new_empty((rows, layer.qkv.shape[1]))
        self.q = hidden.new_empty((rows, heads, head_dim))
        self.gate_up = hidden.new_empty((rows, layer.gate_up.shape[1]))
        self.active = hidden.new_empty((rows, layer.gate_up.shape[1] // 2))
        self.attend = PagedRoom(self.q, kv_heads)


class FusedLoop:
    """Decodes lanes whose state it keeps on the device; see :class:`ragkv.decoding.Decoder`, which it stands behind."""

    def __init__(self, runner: ModelRunner, layers: Sequence[Layer], pool: PagedKV, lanes: int, width: int) -> None:
        self._runner, self._layers, self._pool, self._spare = runner, layers, pool, lanes
        self._sizes = sorted({*(size for size in _SIZES if size < lanes), *range(192, lanes, 64), lanes})
        self._cuda, places = runner.device.type == "cuda", lanes + 1
        # In one piece, so that all changes of a step go up in one copy.
        self._starts = (0, places, 2 * places, 2 * places + lanes)
        self._width = width
        self._state = torch.zeros(self._starts[-1] + places * width, dtype=torch.int32, device=runner.device)
        self._tokens, self._positions, self._order, tables = torch.tensor_split(self._state, self._starts[1:])
        self._tables = tables.view(places, width)
        self._tables[lanes] = pool.spare
        self._nobody = torch.full_like(self._order, lanes)
        self._numbers: tuple[int, ...] = ()
        self._changes: dict[int, int] = {}
        self._logits = torch.empty((lanes, runner.vocab_size), dtype=torch.float32, device=runner.device)
        self._graphs: dict[int, Any] = {}
        self._graph_memory = torch.cuda.graph_pool_handle() if self._cuda else None

    def enter(self, number: int, token: int, position: int) -> None:
        self._changes[number] = token
        self._changes[self._starts[1] + number] = position

    def extend(self, number: int, first: int, blocks: Sequence[int]) -> None:
        start = self._starts[3] + number * self._width + first
        self._changes.update(enumerate(blocks, start))

    def put_tokens(self, numbers: tuple[int, ...], tokens: torch.Tensor) -> None:
        same = numbers == self._numbers
        index = self._order[: len(numbers)].long() if same else self._up(numbers)
        self._tokens.index_copy_(0, index, tokens.int())

    def step(self, numbers: tuple[int, ...], lanes: Sequence[Lane]) -> torch.Tensor:
        size = self._sizes[bisect_left(self._sizes, len(numbers))]
        if self._cuda and size not in self._graphs:
            self._graphs[size] = self._capture(size)
        if numbers != self._numbers:
            padded = (*numbers, *[self._spare] * (size - len(numbers)))
            self._changes.update(enumerate(padded, self._starts[2]))
            self._numbers = numbers
        if self._changes:
            changes = self._up([*zip(*self._changes.items(), strict=True)])
            self._state.index_copy_(0, changes[0], changes[1].int())
            self._changes.clear()
        if self._cuda:
            self._graphs[size].replay()
        else:
            self._run(self._order[:size])
        return self._logits[: len(numbers)]

    def _up(self, numbers: Any) -> torch.Tensor:
        """int64, on the device, without waiting for it."""
        return uploaded(torch.tensor(numbers), self._runner.device)

    def _capture(self, size: int) -> Any:
        """A graph of ``size`` rows."""
        with capturing(self._runner.device):
            self._run(self._nobody[:size])  # what is compiled once must be before
            graph, _ = captured(lambda: self._run(self._order[:size]), self._graph_memory)
        return graph

    def _run(self, lanes: torch.Tensor) -> None:
        """One row of each of ``lanes`` int32 (rows,)."""
        index = lanes.long()
        positions = self._positions[index]
        decoder = self._runner.decoder
        hidden = decoder.embed_tokens(self._tokens[index])
        cos, sin = decoder.rotary_emb(hidden[None], positions.long()[None])
        rotary = cos[0].contiguous(), sin[0].contiguous()
        blocks = self._tables[index, positions.long() // BLOCK_TOKENS].long()
        # A row of a pool's layer, counted from its first: tokens are as far apart as everywhere in it.
        data = self._pool.with_spare
        slots = blocks * (data.stride(0) // data.stride(3)) + positions % BLOCK_TOKENS
        shape, config = self._pool.shape, self._runner.config
        room = _Room(hidden, self._layers[0], int(config.num_attention_heads), shape.kv_heads, shape.head_dim)
        for number, layer in enumerate(self._layers):
            self._run_layer(layer, data[:, number], hidden, rotary, slots, lanes, room)
        self._logits[: len(lanes)].copy_(self._runner.model.lm_head(decoder.norm(hidden)))
        self._positions[index] = positions + (lanes < self._spare)

    def _run_layer(
        self,
        layer: Layer,
        kv: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        slots: torch.Tensor,
        lanes: torch.Tensor,
        room: _Room,
    ) -> None:
        """``kv`` is (blocks, 2, BLOCK_TOKENS, kv_heads, head_dim); ``hidden`` (rows, hidden_size) is added to."""
        rows = len(hidden)
        own = rows == 1  # from two rows on cuBLAS is faster, with all that it needs beside it
        if own:
            product(hidden, layer.qkv.t(), room.qkv, norm=layer.input_norm, eps=layer.eps, bias=layer.qkv_bias)
        else:
            rms_norm(hidden, layer.input_norm, layer.eps, room.normed)
            if layer.qkv_bias is None:
                torch.mm(room.normed, layer.qkv, out=room.qkv)
            else:
                torch.addmm(layer.qkv_bias, room.normed, layer.qkv, out=room.qkv)
        turning = rotary if layer.rotates else None
        first = kv[0, :, :1]
        rope_write(room.qkv, turning, layer.norms, slots, room.q, first[0], first[1], eps=layer.norm_eps)
        attended = attend_paged(
            room.q,
            kv[:, 0],
            kv[:, 1],
            self._tables,
            lanes,
            self._positions,
            scale=layer.scale,
            window=layer.window,
            room=room.attend,
        ).view(rows, -1)
        if own:
            product(attended, layer.output.t(), hidden, added=True)
            product(hidden, layer.gate_up.t(), room.active, norm=layer.post_norm, eps=layer.eps, gated=True)
            product(room.active, layer.down.t(), hidden, added=True)
            return
        hidden.addmm_(attended, layer.output)
        rms_norm(hidden, layer.post_norm, layer.eps, room.normed)
        torch.mm(room.normed, layer.gate_up, out=room.gate_up)
        hidden.addmm_(silu_mul(room.gate_up), layer.down)
