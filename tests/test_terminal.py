"""Progress: bars where they can move, lines where they cannot."""

from __future__ import annotations

import io

from rich.console import Console

from ragkv import terminal


def test_a_log_gets_a_line_when_a_stage_begins_and_ends(monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    log = io.StringIO()
    with terminal.progress(Console(file=log, width=20)) as say:
        say("load", 0, 1)
        say("load", 1, 1)
        for done in range(4):
            say(f"512 tokens: [turn {done}]", done, 4)
            now += 3.0
        say("512 tokens", 4, 4)
        say("512 tokens", 4, 4)
        say("load", 0, 1)
    assert log.getvalue().splitlines() == [
        "0/1 after 0 s, loading the model",
        "1/1 after 0 s, loading the model",
        "0/4 after 0 s, 512 tokens: [turn 0]",
        "2/4 after 6 s, 512 tokens: [turn 2]",
        "4/4 after 12 s, 512 tokens",
        "0/1 after 12 s, loading the model",
    ]


def test_a_terminal_gets_one_bar_per_stage_whatever_it_does():
    shown = io.StringIO()
    with terminal.progress(Console(file=shown, width=100, force_terminal=True)) as say:
        say("512 tokens: first", 0, 2)
        say("512 tokens: second", 1, 2)
    last = shown.getvalue().split("\r")[-1]
    assert "512 tokens: second" in last
    assert "first" not in last


def test_who_wants_quiet_has_it():
    log = io.StringIO()
    with terminal.progress(Console(file=log), quiet=True) as say:
        say("load", 0, 1)
    assert log.getvalue() == ""
