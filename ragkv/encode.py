"""Computing chunk entries: chunks behind their document context, keys un-rotated, one slab per layer."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ragkv.chunks import EncodeGroup
from ragkv.runner import ModelRunner
from ragkv.types import ContextPolicy


@dataclass(frozen=True)
class EncodedChunk:
    """An entry ready for the store: for each layer a uint8 slab of K, position-free, then V.

    ``context_tokens`` counts all that stood in front of it, BOS included.
    """

    key: bytes
    tokens: int
    context_tokens: int
    context_policy: ContextPolicy
    slabs: list[np.ndarray]


def encode(runner: ModelRunner, group: EncodeGroup) -> Generator[None, None, list[EncodedChunk]]:
    """Encode the wanted chunks of ``group``; yields between layers."""
    ids = [*group.lead, *(token for part in group.parts for token in part)]
    kv = runner.new_kv(len(ids))
    rows = runner.start_prefill(runner.tensor(ids), kv)
    angles = runner.rope.angles(rows.step.positions)
    slabs: list[list[np.ndarray]] = [[] for _ in group.parts]
    spans = _spans(group)
    for layer in range(runner.shape.layers):
        runner.run_layer(layer, rows)
        keys, values = kv.read(layer, len(ids))
        both = torch.stack((runner.rope.lift(keys, angles, layer), values)).cpu()
        for index, (start, end) in enumerate(spans):
            if group.keys[index] is not None:
                slabs[index].append(_bytes(both[:, start:end]))
        yield
    return [
        EncodedChunk(key, end - start, start, group.policy, slabs[i])
        for i, (key, (start, end)) in enumerate(zip(group.keys, spans, strict=True))
        if key is not None
    ]


def _spans(group: EncodeGroup) -> list[tuple[int, int]]:
    ends = np.cumsum([len(group.lead), *map(len, group.parts)])
    return [(int(a), int(b)) for a, b in pairwise(ends)]


def _bytes(kv: torch.Tensor) -> np.ndarray:
    return kv.contiguous().view(torch.uint8).numpy().reshape(-1)
