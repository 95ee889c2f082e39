"""Train the bundled model on invented worlds, in runs of a few minutes.

    python -m ragkv.eval.train_demo --tokenizer ragkv/demo/model --out run --minutes 9 --total-minutes 9
    torchrun --nproc-per-node 2 -m ragkv.eval.train_demo ...        # one process a GPU
    python -m ragkv.eval.train_demo --resume run ...                # goes on with weights and schedule

Muon for the matrices, AdamW for the rest, a curriculum from worlds of three chunks to worlds of 190. The
schedule follows the clock (``--total-minutes``), so that a run can be cut into pieces: a piece starts again
from the bf16 weights and ``progress.json``; the optimisers' momentum is rebuilt in a short warm-up.
``curve.jsonl`` holds the curves. Without CUDA everything runs on a plain mask, for tests.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shutil
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from ragkv.eval.muon import Muon
from ragkv.eval.train_data import LEVELS, ROW, Row, SampleMaker, Workers, scoring_rows
from ragkv.eval.train_model import DemoModel, Rows, Shape, load, save
from ragkv.eval.worlds import KINDS
from ragkv.eval.worlds_names import SPLITS, Split

# Chunks a world, worlds, questions a kind and world: about 0.6k, 0.9k, 2k, 4k, 8k and 15k tokens of context.
SCORED = ((9, 80, 5), (12, 60, 4), (30, 30, 5), (60, 30, 5), (120, 30, 5), (222, 30, 5))
WATCHED = ((12, 24, 3), (30, 12, 5))
# Of the loss that asks middle layers for hints, beside the answers' mean.
HINT_WEIGHT = 1.0


@dataclass
class Progress:
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows on the device, and their losses flattened: (n,) each, and (m,) or (m, 2) of the hints. ``answer`` is
    unique over the batch."""

    rows: Rows
    at: Tensor
    target: Tensor
    kind: Tensor
    answer: Tensor
    weight: Tensor
    hints: Tensor
    told: Tensor
    late: Tensor


def to_batch(rows: list[Row], device: torch.device) -> Batch:
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows], 1))
    losses = np.stack([row.losses for row in rows], 1).astype(np.int64)
    offset = np.arange(len(rows))[:, None]
    losses[0] += offset * tokens.shape[2]
    losses[3] += offset * 4096
    weight = torch.from_numpy(np.concatenate([row.weights for row in rows]))
    hints = np.stack([row.hints for row in rows], 1).astype(np.int64)
    hints[0] += offset * tokens.shape[2]
    if device.type == "cuda":
        tokens, weight = tokens.pin_memory(), weight.pin_memory()
    moved = tokens.to(device, non_blocking=True)
    at, target, kind, answer = torch.from_numpy(losses).flatten(1).to(device, non_blocking=True)
    where, first, second, late = torch.from_numpy(hints).flatten(1).to(device, non_blocking=True)
    told = torch.stack((first, second), 1)
    weight = weight.to(device, non_blocking=True)
    return Batch(Rows(*moved), at, target, kind, answer, weight, where, told, late.eq(1))


class Trainer:
    def __init__(self, args: argparse.Namespace, shape: Shape) -> None:
        self.rank, self.ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.args = args
        self.device = torch.device("cuda", self.rank) if torch.cuda.is_available() else torch.device("cpu")
        if self.ranks > 1:
            torch.cuda.set_device(self.device)
            dist.init_process_group("cpu:gloo,cuda:nccl")
        torch.manual_seed(args.seed)
        self.model = DemoModel(shape).to(self.device)
        self.progress = Progress()
        if args.resume:
            load(args.resume, self.model)
            self.progress = Progress(**json.loads((args.resume / "progress.json").read_text()))
        self.optimizers = self._optimizers()
        self.losses = self._losses
        if self.device.type == "cuda":
            self.losses = torch.compile(self._losses, dynamic=False)
            for layer in self.model.model.layers:
                layer.compile(dynamic=False)
        self.tokenizer = args.tokenizer / "tokenizer.json"
        self.first_step, self.recent = self.progress.step, 9.0
        self.last_climb = self.progress.step

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        muon = Muon(matrices, lr=self.args.lr, weight_decay=0.05)
        adam = torch.optim.AdamW(others, lr=self.args.lr, betas=(0.9, 0.95), weight_decay=0.0)
        return [muon, adam]

    def _losses(self, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy and whether the greedy token is right, both (n,)."""
        logits = self.model.head(hidden).float()
        return functional.cross_entropy(logits, target, reduction="none"), logits.argmax(-1) == target

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Cross entropy and whether the greedy token is right, both (n,); mean losses (2,) of links and of steps."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            hidden, recalled = self.model(batch.rows, batch.at, batch.hints, batch.late)
            entropy, right = self.losses(hidden, batch.target)
            told = batch.told.flatten()
            missed = self.losses(recalled.flatten(0, 1), told.clamp(min=0))[0]
            late = batch.late.repeat_interleave(2)
            groups = [told.ge(0) & ~late, told.ge(0) & late]
            means = [(missed * group).sum() / group.sum().clamp(min=1) for group in groups]
        return entropy, right, torch.stack(means)

    # The run ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        workers = Workers(
            self.tokenizer, self.args.seed * 64 + self.rank + self.first_step * 2, self.args.workers, self.args.row
        )
        workers.level.value = self.progress.level
        batches = self._prefetch(workers)
        watched = self._scoring("dev", WATCHED) if self.rank == 0 else {}
        start = self._barrier_clock()
        before, next_score = self.progress.seconds, self.args.score_every
        while self._tick(start, before):
            self._schedule()
            self._step(batches.get(timeout=180))
            workers.level.value = self.progress.level
            if self.rank == 0 and self.progress.seconds - before > next_score:
                next_score += self.args.score_every
                self._log(scores=self.score(watched))
        if self.rank == 0:
            self.finish()
        workers.close()
        if self.ranks > 1:
            dist.destroy_process_group()

    def _barrier_clock(self) -> float:
        if self.ranks > 1:
            dist.barrier()
        return time.monotonic()

    def _tick(self, start: float, before: float) -> bool:
        """Advance the clock, rank 0's for all; false when this piece or the whole run is over."""
        now = torch.tensor([time.monotonic() - start, self.progress.level], dtype=torch.float64)
        if self.ranks > 1:
            dist.broadcast(now, 0)
        self.progress.seconds, self.progress.level = before + float(now[0]), int(now[1])
        over = self.progress.seconds >= self.args.total_minutes * 60
        return not (over or float(now[0]) >= self.args.minutes * 60)

    def _schedule(self) -> None:
        done = self.progress.seconds / (self.args.total_minutes * 60)
        rate = min(1.0, (1 - done) / self.args.decay) * min(1.0, (self.progress.step - self.first_step + 1) / 60)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * max(rate, 0.01)
        # The curriculum climbs when answers are mostly right, and by the clock so that it never gets stuck.
        due = min(len(LEVELS) - 1, int(len(LEVELS) * done / 0.4))
        ready = self.recent < self.args.climb and self.progress.step - self.last_climb >= 40
        if due > self.progress.level or (ready and self.progress.level < len(LEVELS) - 1):
            self.progress.level = max(due, self.progress.level + 1)
            self.last_climb, self.recent = self.progress.step, 9.0

    def _step(self, batch: Batch) -> None:
        marks = [self._mark()]
        entropy, right, missed = self.forward(batch)
        loss = (entropy * batch.weight).sum() / batch.weight.sum() + self.args.hint_weight * missed.sum()
        marks.append(self._mark())
        torch.autograd.backward(loss)
        marks.append(self._mark())
        self._average_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        marks.append(self._mark())
        if self.rank == 0 and self.progress.step % 1000 == 200:
            self._log(seconds_of=dict(zip(("forward", "backward", "update"), np.diff(marks).tolist(), strict=True)))
        self.progress.step += 1
        self.progress.tokens += batch.rows.ids.numel() * self.ranks
        if self.progress.step % 10 == 0 and self.rank == 0:
            self._note(batch, entropy.detach(), right, missed.detach())

    def _note(self, batch: Batch, entropy: Tensor, right: Tensor, missed: Tensor) -> None:
        used = batch.weight.gt(0)
        answers = batch.kind.ge(0) & used
        self.recent = float(entropy[answers].mean())
        if self.progress.step % 50 == 0 or self.progress.step < 50:
            by_kind = {kind: float(entropy[answers & (batch.kind == k)].mean()) for k, kind in enumerate(KINDS)}
            context = float(entropy[batch.kind.lt(0) & used].mean())
            hits = float(right[answers].float().mean())
            links, steps = missed.tolist()
            self._log(
                answer_loss=self.recent,
                right=hits,
                context_loss=context,
                link_loss=links,
                step_loss=steps,
                by_kind=by_kind,
            )

    def _mark(self) -> float:
        """The time, of every thousandth step on the device's clock: where do the milliseconds go?"""
        if self.progress.step % 1000 == 200 and self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def _average_gradients(self) -> None:
        if self.ranks == 1:
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, op=dist.ReduceOp.AVG)
        for gradient, mean in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _prefetch(self, workers: Workers) -> queue.Queue[Batch]:
        batches: queue.Queue[Batch] = queue.Queue(maxsize=4)

        def fill() -> None:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            while True:
                batches.put(to_batch(workers.rows(self.args.rows), self.device))

        threading.Thread(target=fill, daemon=True).start()
        return batches

    # Scores and files ------------------------------------------------------------------------------------

    def _scoring(self, split: Split, plan: tuple[tuple[int, int, int], ...]) -> dict[str, list[Batch]]:
        maker, out = SampleMaker(self.tokenizer), {}
        for size, worlds, per_kind in plan:
            rows = scoring_rows(maker, split, size, worlds, per_kind, self.args.row)
            if not rows:
                continue
            spare = replace(rows[-1], weights=np.zeros_like(rows[-1].weights))
            rows += [spare] * (-len(rows) % self.args.rows)  # to the compiled shape
            parts = [rows[i : i + self.args.rows] for i in range(0, len(rows), self.args.rows)]
            out[str(size)] = [to_batch(part, self.device) for part in parts]
        return out

    def score(self, plan: dict[str, list[Batch]]) -> dict[str, dict[str, float]]:
        """Exact match by world size and kind: the greedy answer is right if every token of it is."""
        return {size: self._score(batches) for size, batches in plan.items()}

    def _score(self, batches: list[Batch]) -> dict[str, float]:
        right_of: list[list[float]] = [[] for _ in KINDS]
        for batch in batches:
            right = self.forward(batch)[1]
            answers = batch.kind.ge(0) & batch.weight.gt(0)
            numbers, index = torch.unique(batch.answer[answers], return_inverse=True)
            exact = torch.ones(len(numbers), device=self.device)
            exact = exact.scatter_reduce(0, index, right[answers].float(), "amin")
            kind = torch.zeros_like(numbers).scatter(0, index, batch.kind[answers])
            for k in range(len(KINDS)):
                right_of[k] += exact[kind == k].tolist()
        scores = {kind: round(float(np.mean(of)), 4) for kind, of in zip(KINDS, right_of, strict=True) if of}
        counts = {f"n_{kind}": float(len(of)) for kind, of in zip(KINDS, right_of, strict=True)}
        return {"all": round(float(np.mean(list(scores.values()))), 4), **scores, **counts}

    def finish(self) -> None:
        """Write the checkpoint, then score it on the full plan."""
        out = self.args.out
        save(self.model, out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if (self.args.tokenizer / name).resolve() != (out / name).resolve():
                shutil.copy(self.args.tokenizer / name, out / name)
        (out / "progress.json").write_text(json.dumps(asdict(self.progress)) + "\n")
        plan = SCORED if self.args.full_scores else WATCHED
        for split in SPLITS[1:]:
            self._log(split=split, final=self.score(self._scoring(split, plan)))

    def _log(self, **values: object) -> None:
        self.args.out.mkdir(parents=True, exist_ok=True)
        rate = self.optimizers[0].param_groups[0]["lr"]
        line = json.dumps({**asdict(self.progress), "lr": round(rate, 6), **values})
        with (self.args.out / "curve.jsonl").open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the bundled model on invented worlds.")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", type=Path, help="folder of an earlier piece of the same run")
    parser.add_argument("--minutes", type=float, default=9.0, help="length of this piece")
    parser.add_argument("--total-minutes", type=float, default=9.0, help="length of the whole run")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="rows a step and GPU")
    parser.add_argument("--row", type=int, default=ROW, help="tokens a row")
    parser.add_argument("--workers", type=int, default=14, help="processes a GPU that make training rows")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--decay", type=float, default=0.45, help="share of the run in which the rate falls to zero")
    parser.add_argument("--hint-weight", type=float, default=HINT_WEIGHT, help="of the loss on middle layers")
    parser.add_argument("--climb", type=float, default=0.2, help="answer loss below which the curriculum climbs")
    parser.add_argument("--score-every", type=float, default=60.0, help="seconds")
    parser.add_argument("--full-scores", action="store_true", help="score all lengths at the end")
    parser.add_argument("--layers", type=int, default=Shape.num_hidden_layers)
    parser.add_argument("--width", type=int, default=Shape.hidden_size)
    args = parser.parse_args()
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    shape = Shape(num_hidden_layers=args.layers, hidden_size=args.width)
    Trainer(args, shape).run()


if __name__ == "__main__":
    main()
