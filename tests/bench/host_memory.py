"""What keeping freed memory saves on a CPU: prefills on a thread of their own, as an engine runs them. Prints JSON.

    python -m tests.bench.host_memory [--context 4096] [--model random:qwen2.5-0.5b]

In turn, a process that keeps it and one whose environment says otherwise; medians, and page faults of a prefill.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch

from ragkv.checkpoint import load_checkpoint
from ragkv.clock import Stopwatch
from ragkv.eval.machine import environment
from ragkv.eval.ttft_bench import Bench, opened
from ragkv.eval.ttft_stores import Place
from tests.bench.store_open import with_rows

METHODS = (("full", 1.0), ("links", 0.15), ("links", 0.1), ("none", 0.0))
PLACE = Place("ram", "raw")
ROUNDS, REPEATS = 2, 5
Row = dict[str, Any]


def measure(model: str, context: int) -> list[Row]:
    rows: list[Row] = []
    thread = threading.Thread(target=lambda: rows.extend(prefills(model, context)))
    thread.start()
    thread.join()
    return rows


def prefills(model: str, context: int) -> list[Row]:
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        checkpoint = load_checkpoint(model, device="cpu", cache_dir=Path(folder))
        sizes: dict[str, Any] = {"chunk_tokens": 512, "question_tokens": 32, "remote": None, "remote_timeout_ms": 1000}
        with opened(checkpoint, [PLACE], [context], folder=Path(folder), **sizes) as bench:
            return [prefill(bench, context, method, ratio) for method, ratio in METHODS]


def prefill(bench: Bench, context: int, method: Any, ratio: float) -> Row:
    requests = bench.requests(context, PLACE.codec)
    bench.settle(PLACE, requests)
    ms, faults = [], []
    for _ in range(REPEATS + 1):
        watch, before = Stopwatch(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bench.first_token(PLACE, requests[0], method, ratio, watch)
        ms.append(watch.total_ms)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return {"method": method, "ratio": ratio, "ttft_ms": ms[1:], "faults": faults[1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--model", default="random:qwen2.5-0.5b")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(measure(options.model, options.context)))
        return
    command = [sys.executable, "-m", "tests.bench.host_memory", "--here", "--model", options.model]
    command += ["--context", str(options.context)]
    runs: dict[bool, list[list[Row]]] = {True: [], False: []}
    for kept in ROUNDS * [True, False]:
        variables = os.environ | ({} if kept else {"GLIBC_TUNABLES": ""})
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True, text=True)
        runs[kept].append(json.loads(done.stdout))
    rows = []
    for turn, (method, ratio) in enumerate(METHODS):
        row: Row = {"method": method, "ratio": ratio}
        for kept, name in ((True, "kept"), (False, "given_back")):
            for what in ("ttft_ms", "faults"):
                values = [value for run in runs[kept] for value in run[turn][what]]
                row[f"{what}_{name}"] = round(statistics.median(values), 1)
        rows.append(row)
    print(
        with_rows({"command": " ".join(["python -m tests.bench.host_memory", *sys.argv[1:]]), **about(options)}, rows)
    )


def about(options: argparse.Namespace) -> Row:
    return {"model": options.model, "context_tokens": options.context, **environment(torch.device("cpu"))}


if __name__ == "__main__":
    main()
