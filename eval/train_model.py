"""The bundled model for training: Qwen3 written for packed rows, saved under the library's own weight names.

A row packs many contexts, and behind each context many questions that see it but not each other; FlexAttention
skips the blocks that the mask leaves empty. Apart from the mask the function is exactly
``transformers.Qwen3ForCausalLM``; ``save`` proves it before it writes.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128


@dataclass(frozen=True)
class Shape:
    """Hyper-parameters by their Hugging Face names; the defaults make 19.1M parameters."""

    vocab_size: int = 8192
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 64
    intermediate_size: int = 768
    rope_theta: float = 500_000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 16384


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows. ``context`` numbers the contexts of a row; ``turn`` is 0 on context tokens and
    numbers the questions; all are (rows, row length)."""

    ids: Tensor
    position: Tensor
    context: Tensor
    turn: Tensor


class Norm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, h, kv, hd = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
        self.hd = hd
        self.q_proj = nn.Linear(d, h * hd, bias=False)
        self.k_proj = nn.Linear(d, kv * hd, bias=False)
        self.v_proj = nn.Linear(d, kv * hd, bias=False)
        self.o_proj = nn.Linear(h * hd, d, bias=False)
        self.q_norm, self.k_norm = Norm(hd, shape.rms_norm_eps), Norm(hd, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor) -> Tensor:
        rows, length, _ = x.shape
        q, k, v = (p(x).view(rows, length, -1, self.hd) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _rotate(self.q_norm(q), cos, sin).transpose(1, 2), _rotate(self.k_norm(k), cos, sin).transpose(1, 2)
        v = v.transpose(1, 2)
        if isinstance(mask, BlockMask):
            out = flex_attention(q, k.to(q.dtype), v, block_mask=mask, enable_gqa=True)
        else:
            out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return functional.linear(out.transpose(1, 2).reshape(rows, length, -1), self.o_proj.weight)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(functional.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(shape), Mlp(shape)
        self.input_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)
        self.post_attention_layernorm = Norm(shape.hidden_size, shape.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: BlockMask | Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        added: Tensor = self.mlp(self.post_attention_layernorm(x))
        return x + added


class Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape.hidden_size, shape.rms_norm_eps)


class DemoModel(nn.Module):
    """``forward`` gives hidden states at chosen positions only, ``head`` their logits.

    ``recall`` holds two heads on middle layers, for training alone: they are neither saved nor used afterwards.
    """

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.model = Body(shape)
        self.recall = nn.ModuleList(nn.Linear(shape.hidden_size, 2 * shape.hidden_size, bias=False) for _ in range(2))
        self.middle = [max(1, shape.num_hidden_layers * twelfths // 12) for twelfths in (5, 7)]
        half = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
        self.register_buffer("frequencies", shape.rope_theta**-half, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * shape.num_hidden_layers) if small else 1))

    def forward(self, rows: Rows, chosen: Tensor, hints: Tensor, late: Tensor) -> tuple[Tensor, Tensor]:
        """``chosen`` (n,) and ``hints`` (m,) hold positions in the flattened batch.

        Returns the last hidden states (n, hidden), and of ``hints`` (m, 2, hidden) which two tokens a middle layer
        recalls there: the fifth of twelve, or the seventh where ``late`` (m,) holds.
        """
        angles = rows.position[..., None].float() * self.frequencies  # (rows, length, head_dim / 2)
        angles = torch.cat((angles, angles), -1)[:, :, None]
        cos, sin = angles.cos(), angles.sin()
        mask = block_mask(rows) if rows.ids.is_cuda else dense_mask(rows)
        x = self.model.embed_tokens(rows.ids)
        if rows.ids.is_cuda:
            x, cos, sin = x.bfloat16(), cos.bfloat16(), sin.bfloat16()
        recalled = []
        for done, layer in enumerate(self.model.layers, 1):
            x = layer(x, cos, sin, mask)
            recalled += [
                head(x.flatten(0, 1)[hints])
                for head, middle in zip(self.recall, self.middle, strict=True)
                if middle == done
            ]
        asked = torch.where(late[:, None], recalled[1], recalled[0])
        return x.flatten(0, 1)[chosen], asked.view(len(hints), 2, x.shape[-1])

    def head(self, x: Tensor) -> Tensor:
        """Logits (n, vocabulary) of hidden states (n, hidden)."""
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def dense_mask(rows: Rows) -> Tensor:
    """Boolean (rows, 1, length, length): the plain twin of ``block_mask``."""
    at = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    c, t = rows.context, rows.turn
    seen = (t[:, None, :] == 0) | (t[:, :, None] == t[:, None, :])
    return (seen & (c[:, :, None] == c[:, None, :]) & (at[:, None] >= at[None, :]))[:, None]


def block_mask(rows: Rows) -> BlockMask:
    """The same mask for FlexAttention. Blocks are classed from the range of contexts and turns they hold."""
    context, turn = rows.context, rows.turn

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same_turn = (turn[b, k] == 0) | (turn[b, q] == turn[b, k])
        return (q >= k) & (context[b, q] == context[b, k]) & same_turn

    partial, full = block_kinds(rows)
    return BlockMask.from_kv_blocks(*_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=seen)


def block_kinds(rows: Rows) -> tuple[Tensor, Tensor]:
    """(rows, 1, blocks, blocks) booleans: blocks to mask element by element, and blocks seen whole.

    ``partial`` may hold blocks that turn out empty, never the reverse.
    """
    c = rows.context.view(len(rows.context), -1, BLOCK)
    t = rows.turn.view(len(rows.turn), -1, BLOCK)
    c_low, c_high, t_low, t_high = c.amin(-1), c.amax(-1), t.amin(-1), t.amax(-1)
    at = torch.arange(c.shape[1], device=c.device)
    overlap = (c_low[:, :, None] <= c_high[:, None, :]) & (c_high[:, :, None] >= c_low[:, None, :])
    turns = (t_low[:, None, :] == 0) | (
        (t_high[:, :, None] >= t_low[:, None, :]) & (t_low[:, :, None] <= t_high[:, None, :])
    )
    any_ = overlap & turns & (at[:, None] >= at[None, :])
    one = (c_low == c_high)[:, :, None] & (c_low == c_high)[:, None, :] & (c_low[:, :, None] == c_low[:, None, :])
    full = one & (t_high[:, None, :] == 0) & (at[:, None] > at[None, :])
    return (any_ & ~full)[:, None], full[:, None]


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of the true blocks of every block row, in FlexAttention's form."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int(), order.int().contiguous()


def hf_config(shape: Shape) -> dict[str, object]:
    config = asdict(shape)
    theta = config.pop("rope_theta")
    return {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **config,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rope_theta": theta,
        "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": True,
        "use_sliding_window": False, "sliding_window": None, "initializer_range": 0.02, "use_cache": True,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3, "dtype": "bfloat16",
    }  # fmt: skip


def load(folder: Path, model: DemoModel) -> None:
    weights = {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({**{f"recall.{k}": v for k, v in model.recall.state_dict().items()}, **weights})


def save(model: DemoModel, folder: Path) -> None:
    """Write config, generation config and bf16 weights; raise if the library's forward would differ."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: w for name, w in model.state_dict().items() if not name.startswith("recall.")}
    weights = {name: w.detach().cpu().bfloat16().contiguous() for name, w in kept.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3, "do_sample": False, "max_new_tokens": 32}
    for name, content in (("config.json", hf_config(model.shape)), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    error = parity_error(model.shape, folder)
    if not error < 1e-3:
        raise RuntimeError(f"the saved model differs from Qwen3ForCausalLM by {error:.2e}; do not use {folder}")


def parity_error(shape: Shape, folder: Path) -> float:
    """Relative logit error of our forward against the library's, both in float32 on the saved weights."""
    from transformers import Qwen3ForCausalLM

    ours = DemoModel(shape)
    load(folder, ours)
    theirs = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(0, shape.vocab_size, (2, 200), generator=torch.Generator().manual_seed(0))
    rows = Rows(ids, torch.arange(200).expand(2, -1), torch.zeros_like(ids), torch.zeros_like(ids))
    with torch.no_grad():
        expected = theirs(ids).logits.flatten(0, 1)
        got = ours.head(ours(rows, torch.arange(400), torch.arange(0), torch.arange(0) > 0)[0])
    return float((got - expected).norm() / expected.norm())
