"""The layers' benchmark runs anywhere: on a CPU the plain loop only."""

from __future__ import annotations

import json

import torch

from tests.bench import layers


def test_it_times_the_plain_loop_on_a_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(layers, "SECONDS", 0.001)
    monkeypatch.setattr("sys.argv", ["layers", "--tiny", "--device", "cpu", "--out", str(tmp_path / "layers.json")])
    layers.main()
    assert "plain only: the fused layer loop needs CUDA" in capsys.readouterr().out
    facts = json.loads((tmp_path / "layers.json").read_text())
    assert (facts["device"], facts["torch"]) == ("cpu", torch.__version__)
    loops = [(record["what"], record["loop"]) for record in facts["records"] if "loop" in record]
    together = [f"48 rows of {prompts} prompts" for prompts in (2, 4)]
    assert loops == [(what, "plain") for what in ("1 rows", "33 rows", "60 rows", *together, "prefill of 128")]
    assert all(record["ms"] > 0 and record["launch ms"] > 0 for record in facts["records"] if "loop" in record)
