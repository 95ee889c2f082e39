"""TTFT of blended against full prefill on random weights of a known shape, stored chunks in RAM or on SSD.

    python -m tests.bench.blend --shape llama-3.1-8b --tokens 4096 8192 --tier ram ssd --json out.json

Everything is timed in one run, in turn, medians of several passes. No quality: the weights are random.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ragkv.attention import NAME
from ragkv.chunks import ChunkTokens, EncodeGroup
from ragkv.clock import Stopwatch
from ragkv.encode import encode
from ragkv.plan import PlannedChunk, PromptPlan, make_plan
from ragkv.prefill import Prefill
from ragkv.retrievers import Chunk
from ragkv.runner import ModelRunner
from ragkv.store import ChunkStore, Geometry, chunk_key

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": (
        "llama",
        {
            "vocab_size": 1024,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    ),
    "llama-3.1-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
}
CHUNK, PREFIX, QUESTION = 512, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tier", choices=("ram", "ssd"), nargs="+", default=["ram", "ssd"])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    runner = build(arguments.shape)
    rows = []
    with torch.inference_mode():
        for tokens in arguments.tokens:
            for tier in arguments.tier:
                rows += measure(runner, tokens, tier, arguments.passes)
                for row in rows[-METHODS_COUNT:]:
                    print(json.dumps(row), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(runner), "rows": rows}, indent=1) + "\n")


METHODS = (("full", 0.0), ("none", 0.0), ("question", 0.05), ("question", 0.15), ("epic", 0.15), ("hkvd", 0.15))
METHODS_COUNT = len(METHODS)


def build(shape: str) -> ModelRunner:
    family, options = SHAPES[shape]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    config = CONFIG_MAPPING[family](**options, max_position_embeddings=32768)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)
    return ModelRunner(model.eval())


def measure(runner: ModelRunner, tokens: int, tier: str, passes: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        ram = 64 << 30 if tier == "ram" else 0
        with ChunkStore(folder, capacity_bytes=64 << 30, ram_bytes=ram) as store:
            plan = fill(runner, store, tokens)
            times: dict[tuple[str, float], list[float]] = {method: [] for method in METHODS}
            parts: dict[tuple[str, float], dict[str, float]] = {}
            for number in range(passes + 2):  # the first two passes warm up kernels and tiers
                for method in METHODS:
                    spent, watch = run(runner, store, plan, *method)
                    if number >= 2:
                        times[method].append(spent)
                        parts[method] = {part: seconds * 1000 for part, seconds in watch.parts.items()}
    full = statistics.median(times[METHODS[0]])
    return [
        {
            "tokens": len(plan.ids),
            "tier": tier,
            "method": name,
            "ratio": ratio,
            "ttft_ms": statistics.median(spent) * 1000,
            "speedup": full / statistics.median(spent),
            "parts_ms": parts[(name, ratio)],
        }
        for (name, ratio), spent in times.items()
    ]


def fill(runner: ModelRunner, store: ChunkStore, tokens: int) -> PromptPlan:
    """Encode and store random chunks; a plan over them."""
    generator = torch.Generator().manual_seed(tokens)
    shape = runner.shape
    geometry = Geometry(shape.layers, shape.kv_heads, shape.head_dim, str(shape.dtype).removeprefix("torch."))

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(runner.config.vocab_size, (count,), generator=generator).tolist())

    planned = []
    for number in range(tokens // CHUNK):
        own = ids(CHUNK)
        key = chunk_key(
            model="bench",
            tokenizer="",
            dtype=geometry.dtype,
            codec="raw",
            context_policy="alone",
            context=(),
            tokens=own,
        )
        steps = encode(runner, EncodeGroup((), (own,), (key,), "alone"))
        while True:
            try:
                next(steps)
            except StopIteration as done:
                encoded = done.value[0]
                break
        store.put(key, geometry, encoded.slabs, tokens=CHUNK, model="bench")
        chunk = Chunk(f"d{number}#0", f"d{number}", 0, "", {})
        planned.append(PlannedChunk(chunk, number + 1, 0.0, ChunkTokens(own, (), 0, "alone", key)))
    return make_plan(ids(PREFIX), planned, ids(QUESTION), budget=32768)


def run(
    runner: ModelRunner, store: ChunkStore, plan: PromptPlan, strategy: str, ratio: float
) -> tuple[float, Stopwatch]:
    """Seconds to the first token id on the host."""
    runner.synchronize()
    started, watch = time.perf_counter(), Stopwatch()
    steps = Prefill(runner, store, plan, strategy=strategy, ratio=ratio, room=1, watch=watch).run()
    while True:
        try:
            next(steps)
        except StopIteration as done:
            int(done.value.logits.argmax())
            return time.perf_counter() - started, watch


def environment(runner: ModelRunner) -> dict[str, str]:
    cuda = runner.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
        "command": "python -m tests.bench.blend " + " ".join(sys.argv[1:]),
    }


if __name__ == "__main__":
    main()
