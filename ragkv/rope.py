"""Moving keys between positions.

Stored keys are position-free: the rotation a key got when its chunk was encoded is undone in float32 once,
and applied again for the position the chunk gets in a prompt (RoPE, Su et al. 2021). Rotations use the
frequencies alone: a checkpoint's ``attention_scaling`` (YaRN) is a factor already inside the key, and
applying it again would be wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

MOVABLE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """The rotation of a model's keys.

    Attributes:
        inv_freq: float32 (rotary_dim / 2,), radians per position.
        rotates: for each layer, whether it rotates at all (NoPE layers do not).
        refusal: why keys of this model cannot be moved, or None when they can.
    """

    inv_freq: torch.Tensor
    rotates: tuple[bool, ...]
    refusal: str | None
    _tables: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list, repr=False, compare=False)

    def table(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`angles` of positions 0, 1 … and at least as far as ``length``, computed once; on a GPU any stream may
        use them."""
        device = self.inv_freq.device
        if not self._tables or len(self._tables[-1][0]) < length:
            positions = torch.arange(1 << (max(length, 1) - 1).bit_length(), device=device)
            self._tables[:] = [self.angles(positions)]
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return self._tables[-1]

    def angles(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin for integer ``positions`` (n,): each float32 (n, 1, rotary_dim / 2)."""
        radians = positions[:, None].float() * self.inv_freq
        return radians.cos()[:, None], radians.sin()[:, None]

    def place(self, keys: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], layer: int) -> torch.Tensor:
        """Position-free ``keys`` (n, kv_heads, head_dim) rotated to the positions behind ``angles``."""
        return _rotate(keys, *angles) if self.rotates[layer] else keys

    def lift(self, keys: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], layer: int) -> torch.Tensor:
        """The inverse of :meth:`place`: ``keys`` as the model made them, without their position."""
        cos, sin = angles
        return _rotate(keys, cos, -sin) if self.rotates[layer] else keys


def read_rope(model: Any) -> Rope:
    """The rope of a ``transformers`` decoder (``model.model.rotary_emb`` and its layers)."""
    rotary = model.model.rotary_emb
    kind = str(rotary.rope_type)
    refusal = None
    if kind not in MOVABLE:
        refusal = (
            f"rope type {kind!r} depends on the prompt's length, so stored keys cannot be moved; "
            f"every prompt is prefilled in full (movable types: {', '.join(MOVABLE)})"
        )
    rotates = tuple(bool(getattr(layer.self_attn, "use_rope", True)) for layer in model.model.layers)
    return Rope(rotary.inv_freq.detach().float().clone(), rotates, refusal)


def _rotate(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    k = keys.float()
    first, second, rest = k[..., :half], k[..., half : 2 * half], k[..., 2 * half :]
    out = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return out.to(keys.dtype)
