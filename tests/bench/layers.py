"""What a decoder layer costs in the plain and in the fused loop, and what each kernel makes of the chip.

    python -m tests.bench.layers [--out layers.json]            on CUDA: the shapes of Llama 3.1 8B
    python -m tests.bench.layers --tiny                         anywhere: does it run (on a CPU: the plain loop only)

Times are medians of CUDA events, per layer; ``launch`` is the time the host needs to launch a layer's kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ragkv import attention
from ragkv.attention import AttentionStep
from ragkv.kv import RequestKV
from ragkv.presets import find_preset
from ragkv.rows import Joined, Rows
from ragkv.runner import ModelRunner

QUESTION = 33
SECONDS = 0.15  # spent on a measurement
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}

Record = dict[str, Any]


def main() -> None:
    options = _options()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bench = Bench(options, device)
    records: list[Record] = []
    with torch.inference_mode():
        for record in bench.run():
            records.append(record)
            print("  ".join(f"{name} {_shown(value)}" for name, value in record.items()), flush=True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {**vars(options), "device": name, "torch": torch.__version__}
    if options.out:
        Path(options.out).write_text(json.dumps({**facts, "records": records}, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:llama-3.1-8b", help="a preset; only its shapes are used")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--keys", type=int, default=8224)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, QUESTION, 450, 1300])
    parser.add_argument("--prefill", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument(
        "--together", type=int, nargs="*", default=[64, 128, 256], help="rows of each of 2 and 4 prompts"
    )
    parser.add_argument("--device", help="by default cuda where there is one")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--out", help="write the figures to this JSON file")
    options = parser.parse_args()
    if options.tiny:
        options.layers, options.keys, options.rows, options.prefill = 2, 300, [1, QUESTION, 60], [128]
        options.together = [48]
    return options


class Bench:
    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        self.options, self.device, self.cuda = options, device, device.type == "cuda"
        dtype = torch.bfloat16 if self.cuda else torch.float32
        model = _model(options, device, dtype)
        self.loops = {"plain": ModelRunner(model, fused=False)}
        fused = ModelRunner(model)  # on the same weights
        if fused.plain_because is None:
            self.loops["fused"] = fused
        else:
            print(f"plain only: {fused.plain_because}")
        self.runner, config = fused, model.config
        self.heads, self.shape = int(config.num_attention_heads), fused.shape
        hidden, inner = int(config.hidden_size), int(config.intermediate_size)
        self.width = (self.heads + 2 * self.shape.kv_heads) * self.shape.head_dim
        self.matrices = hidden * (self.width + self.heads * self.shape.head_dim + 3 * inner)
        self.hidden, self.inner, self.dtype = hidden, inner, dtype
        self.rate = 0.0

    def run(self) -> Iterator[Record]:
        yield self.matrix_rate()
        for rows in self.options.rows:
            yield from self.layers(rows)
        for count, prompts, loop in product(self.options.together, (2, 4), self.loops):
            yield self.together(loop, count, prompts)
        for length in self.options.prefill:
            yield from self.prefill(length)
        if "fused" in self.loops:
            for rows in self.options.rows:
                yield from self.parts(rows)
                yield from self.attend(rows)
            if self.options.prefill:
                yield from self.full_attention(max(self.options.prefill))

    def matrix_rate(self) -> Record:
        n = 8192 if self.cuda and not self.options.tiny else 256
        a, b = (torch.randn((n, n), device=self.device, dtype=self.dtype) for _ in range(2))
        self.rate = 2 * n**3 / self.time(lambda: a @ b) / 1e9
        return {"what": "matrix product", "tflops": self.rate}

    def layers(self, count: int) -> Iterator[Record]:
        """Rows spread over the keys, the question's last."""
        slots = self.slots(count)
        kv = self.kv(self.options.keys)
        ids = torch.randint(256, (count,), device=self.device)
        flops = 2 * self.matrices * count + self.attention_flops(slots)
        for loop, runner in self.loops.items():
            rows = runner.rows(ids, AttentionStep(kv, slots, self.options.keys, contiguous=False))
            yield self.loop(f"{count} rows", loop, runner, rows, flops)

    def prefill(self, length: int) -> Iterator[Record]:
        kv = self.kv(length)
        ids = torch.randint(256, (length,), device=self.device)
        flops = 2 * self.matrices * length + self.attention_flops(torch.arange(length))
        for loop, runner in self.loops.items():
            positions = torch.arange(length, device=self.device)
            rows = runner.rows(ids, AttentionStep(kv, positions, length, contiguous=True))
            yield self.loop(f"prefill of {length}", loop, runner, rows, flops)

    def loop(self, what: str, loop: str, runner: ModelRunner, rows: Rows, flops: float) -> Record:
        start = rows.hidden.clone()

        def once() -> None:
            rows.hidden.copy_(start)
            for layer in range(runner.shape.layers):
                runner.run_layer(layer, rows)

        ms = self.time(once, ahead=False) / runner.shape.layers
        launch = self.launch(once) / runner.shape.layers
        return {"what": what, "loop": loop, "launch ms": launch, **self.speed(ms, flops)}

    def together(self, loop: str, count: int, prompts: int) -> Record:
        """``count`` rows of each of several prompts, the first in the workspace: one after the other, and as one."""
        slots, keys, runner = self.slots(count), self.options.keys, self.loops[loop]
        room = [self.filled(runner.workspace(keys)), *(self.kv(keys) for _ in range(prompts - 1))]
        ids = torch.randint(256, (count,), device=self.device)
        steps = [AttentionStep(kv, slots, keys, contiguous=False, last_only=True) for kv in room]
        several = [runner.rows(ids, step) for step in steps]
        start, layers = several[0].hidden.clone(), range(runner.shape.layers)

        def apart() -> None:
            for rows in several:
                rows.hidden.copy_(start)
                for layer in layers:
                    runner.run_layer(layer, rows)

        one_by_one = self.time(apart, ahead=False) / len(layers)
        joined = Joined(several)

        def as_one() -> None:
            joined.hidden.copy_(start.repeat(1, prompts, 1))
            for layer in layers:
                runner.run_together(layer, joined)

        ms = self.time(as_one, ahead=False) / len(layers)
        return {
            "what": f"{count} rows of {prompts} prompts", "loop": loop, "ms": ms, "apart ms": one_by_one,
            "faster": one_by_one / ms, "launch ms": self.launch(as_one) / len(layers),
        }  # fmt: skip

    def parts(self, count: int) -> Iterator[Record]:
        """The nine launches of a layer, each alone."""
        from ragkv.kernels.attend import AttendRoom, attend
        from ragkv.kernels.pointwise import rms_norm, silu_mul
        from ragkv.kernels.rotate import rope_write
        from ragkv.kernels.scores import score_keys

        slots, keys = self.slots(count), self.options.keys
        k, v = self.kv(keys).read(0, keys)
        hidden, normed = self.random(count, self.hidden), self.random(count, self.hidden)
        q, qkv = self.random(count, self.heads, self.shape.head_dim), self.random(count, self.width)
        gate_up, active = self.random(count, 2 * self.inner), self.random(count, self.inner)
        scores, last = torch.zeros(keys, device=self.device), min(count, QUESTION)
        weights = {
            name: self.random(*shape).t()
            for name, shape in (
                ("qkv", (self.width, self.hidden)),
                ("output", (self.hidden, q[0].numel())),
                ("gate and up", (2 * self.inner, self.hidden)),
                ("down", (self.hidden, self.inner)),
            )
        }
        angle = torch.ones((count, self.shape.head_dim), device=self.device, dtype=self.dtype)
        room = AttendRoom(q, self.shape.kv_heads, keys)
        scale = self.shape.head_dim**-0.5
        _, lse = attend(q, k, v, slots, scale=scale, room=room)
        parts: dict[str, Callable[[], object]] = {
            "norm": lambda: rms_norm(hidden, hidden[0], 1e-5, normed),
            "qkv": lambda: torch.mm(normed, weights["qkv"], out=qkv),
            "rope and write": lambda: rope_write(qkv, (angle, angle), None, slots, q, k, v),
            "attend": lambda: attend(q, k, v, slots, scale=scale, room=room),
            "output": lambda: hidden.addmm_(q.view(count, -1), weights["output"], beta=0.5),
            "gate and up": lambda: torch.mm(normed, weights["gate and up"], out=gate_up),
            "activation": lambda: silu_mul(gate_up),
            "down": lambda: hidden.addmm_(active, weights["down"], beta=0.5),
            "scores of the question": lambda: score_keys(q, lse, k, slots, scores, last=last, scale=scale),
        }
        for name, part in parts.items():
            yield {"what": f"{count} rows", "part": name, "ms": self.time(part), "launch ms": self.launch(part)}

    def attend(self, count: int) -> Iterator[Record]:
        """Attention alone, in the tiles it takes and others."""
        from ragkv.kernels.attend import AttendRoom, Tile, attend, choose_tile

        slots, keys = self.slots(count), self.options.keys
        k, v = self.kv(keys).read(0, keys)
        q = self.random(count, self.heads, self.shape.head_dim)
        packed = count * self.heads // self.shape.kv_heads
        default = AttendRoom(q, self.shape.kv_heads, keys)
        tiles = [None, choose_tile(packed, self.shape.head_dim, self.dtype)]
        if packed > 64 and not self.options.tiny:
            tiles += [Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(128, 128, 8, 2)]
        flops, scale = self.attention_flops(slots), self.shape.head_dim**-0.5
        for tile in dict.fromkeys(tiles):
            for splits in dict.fromkeys((default.splits, 1, 2, 4)):
                room = AttendRoom(q, self.shape.kv_heads, keys, tile=tile, splits=splits)
                if tile is None and room.hopper is None:
                    continue
                ms = self.time(lambda room=room: attend(q, k, v, slots, scale=scale, room=room))
                yield {
                    "what": f"attend {count} rows", "kernel": "hopper" if room.hopper else "any",
                    "tile": list(room.tile), "splits": splits,
                    "chosen": (room.hopper, room.tile, splits) == (default.hopper, default.tile, default.splits),
                    **self.speed(ms, flops),
                }  # fmt: skip

    def full_attention(self, length: int) -> Iterator[Record]:
        """Torch's backends and the kernel on a full prefill; ``first ms``: at a length not seen before."""
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        from ragkv.kernels.attend import AttendRoom, attend, choose_tile

        k, v = self.kv(length).read(0, length)
        q = self.random(length, self.heads, self.shape.head_dim)
        slots = torch.arange(length, device=self.device)
        kv_heads, scale = self.shape.kv_heads, self.shape.head_dim**-0.5
        any_device = choose_tile(length * self.heads // kv_heads, self.shape.head_dim, self.dtype)

        def backend(kind: SDPBackend, n: int) -> None:
            parts = [part[:n].transpose(0, 1)[None] for part in (q, k, v)]
            with sdpa_kernel(kind):
                sdpa(*parts, is_causal=True, scale=scale, enable_gqa=True)

        def ours(n: int, tile: Any) -> None:
            room = AttendRoom(q[:n], kv_heads, n, tile=tile)
            attend(q[:n], k[:n], v[:n], slots[:n], scale=scale, room=room)

        runs: dict[str, Callable[[int], object]] = {
            "cudnn": lambda n: backend(SDPBackend.CUDNN_ATTENTION, n),
            "flash": lambda n: backend(SDPBackend.FLASH_ATTENTION, n),
            "ragkv": lambda n: ours(n, None),
            "ragkv, any device": lambda n: ours(n, any_device),
        }
        for name, run in runs.items():
            try:
                ms = self.time(lambda run=run: run(length))
                first = [self.once(lambda run=run, n=n: run(n)) for n in (length - 40, length - 56, length - 72)]
            except RuntimeError as error:
                yield {"what": f"full attention of {length}", "by": name, "error": str(error).splitlines()[0]}
                continue
            yield {
                "what": f"full attention of {length}", "by": name, **self.speed(ms, self.attention_flops(slots)),
                "first ms": statistics.median(first),
            }  # fmt: skip

    def speed(self, ms: float, flops: float) -> Record:
        rate = flops / ms / 1e9
        return {"ms": ms, "tflops": rate, "of matrix rate": rate / self.rate}

    def slots(self, count: int) -> torch.Tensor:
        keys, question = self.options.keys, min(QUESTION, count)
        spread = torch.linspace(0, keys - question - 1, count - question).long()
        return torch.cat((spread, torch.arange(keys - question, keys))).to(self.device)

    def attention_flops(self, slots: torch.Tensor) -> float:
        return 4.0 * self.heads * self.shape.head_dim * float((slots + 1).sum())

    def kv(self, length: int) -> RequestKV:
        return self.filled(self.runner.new_kv(length))

    def filled(self, kv: RequestKV) -> RequestKV:
        for layer in range(self.shape.layers):
            for part in kv.read(layer, kv.capacity):
                part.normal_()
        return kv

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)

    def time(self, run: Callable[[], object], *, ahead: bool = True) -> float:
        """Median milliseconds."""
        estimate = statistics.median(self.once(run, ahead=ahead) for _ in range(3))
        count = max(5, min(50, int(1000 * SECONDS / max(estimate, 0.01))))
        return statistics.median(self.once(run, ahead=ahead) for _ in range(count))

    def once(self, run: Callable[[], object], *, ahead: bool = False) -> float:
        """Milliseconds of the device. ``ahead``: launch while it is still busy, so that launching does not count."""
        if not self.cuda:
            start = time.perf_counter()
            run()
            return 1000 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(400_000)
        before.record()
        run()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)

    def launch(self, run: Callable[[], object]) -> float:
        """Median milliseconds until the host could go on."""
        times = []
        for _ in range(10):
            self.runner.synchronize()
            start = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start))
        return statistics.median(times)


def _model(options: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Any:
    preset = find_preset(options.model)
    small = TINY if options.tiny else {}
    changes = {"num_hidden_layers": options.layers, "vocab_size": 1024, **small}
    config = preset._replace(options={**preset.options, **changes}).config
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME).eval()


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
