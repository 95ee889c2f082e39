"""Choosing the next token."""

from __future__ import annotations

import torch


class Sampler:
    """Greedy at temperature 0; otherwise temperature, then top-k, then nucleus (top-p) sampling.

    With a seed, the same logits give the same tokens whatever else the server does.
    """

    def __init__(
        self, *, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None
    ) -> None:
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k
        self._generator = torch.Generator()
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Token id drawn from float32 ``logits`` (vocab,)."""
        if self._temperature == 0.0:
            return int(logits.argmax())
        values, tokens = logits.cpu().sort(descending=True)
        # From the highest down, in float64: a temperature near 0 must end in the greedy token, not in infinities.
        values = (values - values[0]).double() / self._temperature
        probabilities = values[: self._top_k or None].softmax(0)
        # A token is kept while the mass before it is below top_p, so the first always is.
        kept = probabilities[probabilities.cumsum(0) - probabilities < self._top_p]
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])
