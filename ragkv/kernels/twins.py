"""The kernels in plain torch: what each must equal, up to rounding. For tests and the self-check, for devices without
them, and readable."""

from __future__ import annotations

import torch


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`ragkv.kernels.attend.attend`, in float32."""
    logits = _logits(q, k, slots, scale, window)  # (heads, rows, length)
    out = logits.softmax(-1) @ _per_head(v.float().nan_to_num(), q.shape[1])
    return out.transpose(0, 1).to(q.dtype), logits.logsumexp(-1).T.contiguous()


def score_keys(
    q: torch.Tensor,
    lse: torch.Tensor,
    k: torch.Tensor,
    slots: torch.Tensor,
    scores: torch.Tensor,
    *,
    last: int,
    scale: float,
    window: int | None = None,
) -> None:
    """As :func:`ragkv.kernels.scores.score_keys`."""
    logits = _logits(q[-last:], k, slots[-last:], scale, window)
    scores += (logits - lse[-last:].T[..., None]).exp().sum(dim=(0, 1))


def weigh(scores: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As :func:`ragkv.kernels.weigh.weigh`."""
    certain, most = weights == float("inf"), torch.finfo(torch.float32).max
    weighed = (scores * weights.masked_fill(certain, 0)).nan_to_num(nan=most, posinf=most)
    return weighed.masked_fill(weights < 0, float("-inf")).masked_fill(certain, float("inf"))


def start_rows(
    prompt: torch.Tensor,
    places: torch.Tensor,
    embedding: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    slots: torch.Tensor,
) -> None:
    """As :func:`ragkv.kernels.start.start_rows`."""
    every = torch.cat((places[:1].expand(len(hidden) - len(places)), places))
    hidden.copy_(embedding[prompt[every]])
    for table, out in zip(angles, rotary, strict=True):
        out.copy_(table[every])
    slots.copy_(every)


def rope_write(
    qkv: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor] | None,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    slots: torch.Tensor,
    out: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    eps: float = 0.0,
) -> None:
    """As :func:`ragkv.kernels.rotate.rope_write`, operation by operation as the library does it."""
    rows, heads, head_dim = out.shape
    queries, keys, values = qkv.view(rows, -1, head_dim).split([heads, k.shape[1], k.shape[1]], dim=1)
    if norms is not None:
        queries, keys = _normed(queries, norms[0], eps), _normed(keys, norms[1], eps)
    out.copy_(_turned(queries, rotary))
    k[slots] = _turned(keys, rotary)
    v[slots] = values


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """As :func:`ragkv.kernels.pointwise.rms_norm`."""
    out.copy_(_normed(x, weight, eps))


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As :func:`ragkv.kernels.pointwise.silu_mul`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate.copy_(torch.nn.functional.silu(gate) * up)


def _per_head(kv: torch.Tensor, heads: int) -> torch.Tensor:
    """(length, kv_heads, head_dim) → float32 (heads, length, head_dim)."""
    return kv.float().repeat_interleave(heads // kv.shape[1], dim=1).transpose(0, 1)


def _logits(q: torch.Tensor, k: torch.Tensor, slots: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    logits = q.float().transpose(0, 1) @ _per_head(k, q.shape[1]).transpose(1, 2) * scale
    keys = torch.arange(k.shape[0], device=k.device)
    seen = keys <= slots[:, None]
    if window is not None:
        seen &= keys > slots[:, None] - window
    return logits.masked_fill(~seen, float("-inf"))


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return weight * (x.float() * scale).to(x.dtype)


def _turned(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
    if rotary is None:
        return x
    cos, sin = (part[:, None] for part in rotary)
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, rest), dim=-1)


def attend_paged(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: torch.Tensor,
    lanes: torch.Tensor,
    positions: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """As :func:`ragkv.kernels.paged.attend_paged`, in float32."""
    out = torch.empty_like(q)
    for row, lane in enumerate(lanes.tolist()):
        length = int(positions[lane]) + 1
        blocks = tables[lane, : -(-length // k.shape[1])].long()
        keys, values = (part[blocks].flatten(0, 1)[:length] for part in (k, v))
        out[row] = attend(q[row : row + 1], keys, values, positions[lane : lane + 1], scale=scale, window=window)[0]
    return out


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    bias: torch.Tensor | None = None,
    gated: bool = False,
    added: bool = False,
) -> None:
    """As :func:`ragkv.kernels.vector.product`."""
    rows = x if norm is None else _normed(x, norm, eps)
    result = torch.nn.functional.linear(rows, weight, bias)
    if gated:
        result = silu_mul(result)
    out.copy_(out + result if added else result)
