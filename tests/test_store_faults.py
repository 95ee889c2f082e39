"""A few of the faults of ``tests/stress``; all of them: ``make faults``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def test_a_few_of_every_fault_break_no_promise(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.stress.store_faults", "--small"]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["violations"] == []
    counts = report["counts"]
    assert counts["kill -9"]["kills"] >= 20
    assert sum(counts["flipped"].values()) + sum(counts["truncated"].values()) >= 100
    if shutil.which("cc") or shutil.which("gcc"):
        assert counts["failing call"]["injected"] > 0


@pytest.mark.slow
def test_a_short_soak_is_right_to_the_byte(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.stress.store_soak", "--minutes", "0.5", "--plot", str(tmp_path / "x.svg")]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
