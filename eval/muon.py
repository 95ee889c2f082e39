"""Muon for many matrices of few shapes: the update of ``torch.optim.Muon``, one batched product per shape.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A model of 84 small
matrices is bound by kernel launches when they are orthogonalised one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.775, 2.0315)
_STEPS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz steps in bfloat16, scaled to AdamW's step size, and weight decay."""

    def __init__(
        self, matrices: Iterable[Tensor], *, lr: float, weight_decay: float = 0.05, momentum: float = 0.95
    ) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": same} for same in by_shape.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            matrices = group["params"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]
            if not state:
                state["momentum"] = torch.zeros_like(gradient)
            momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonalised(gradient.lerp_(momentum, group["momentum"]))
            rate = group["lr"] * 0.2 * max(gradient.shape[1:]) ** 0.5
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(matrices, list(update.to(gradient.dtype).unbind()), alpha=-rate)


def orthogonalised(batch: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, nearly, of (n, rows, columns), in bfloat16."""
    a, b, c = _COEFFICIENTS
    tall = batch.shape[1] > batch.shape[2]
    x = batch.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
