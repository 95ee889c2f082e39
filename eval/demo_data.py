"""Write the demo's sample documents and questions: one test world, taken by its seed.

    python -m ragkv.eval.demo_data --out ragkv/demo

Documents are plain text, the title on the first line, paragraphs (the world's chunks) between blank lines.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from ragkv.eval.worlds import KINDS, WorldDocument, make_world


def write(out: Path, seed: int, chunks: int, per_kind: int) -> None:
    """Replace ``documents/*.txt`` and ``questions.jsonl`` under ``out``."""
    world = make_world(seed, "test", chunks, per_kind)
    folder = out / "documents"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.txt"):
        old.unlink()
    for document in world.documents:
        text = "\n\n".join(document.chunks) + "\n"
        (folder / f"{_file_name(document)}.txt").write_text(text, encoding="utf-8")
    lines = [
        json.dumps({"question": q.text, "answer": q.answer, "kind": q.kind})
        for kind in KINDS
        for q in world.questions
        if q.kind == kind
    ]
    (out / "questions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _file_name(document: WorldDocument) -> str:
    return re.sub(r"[^a-z0-9]+", "-", document.title.lower()).strip("-")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo's documents and questions.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=30)
    parser.add_argument("--per-kind", type=int, default=2)
    args = parser.parse_args()
    write(args.out, args.seed, args.chunks, args.per_kind)


if __name__ == "__main__":
    main()
