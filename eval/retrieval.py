"""How well retrieval finds a question's own passages: recall@k of BM25, dense and fused."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ragkv.checkpoint import BUNDLED_DIR
from ragkv.eval.questions import QuestionFile
from ragkv.retrievers import Catalog, Collection, Mode, Splitter
from ragkv.tokenizer import Tokenizer

MODES: tuple[Mode, ...] = ("bm25", "dense", "fused")


def measure_retrieval(
    file: QuestionFile, *, k: int, chunk_tokens: int, embedder: str, say: Callable[[str, int, int], None]
) -> list[dict[str, Any]]:
    """One row per mode: mean share of a question's passages found among the best ``k`` passages.

    Chunks are ranked; a passage takes the rank of its best chunk, and the best ``k`` distinct passages count.
    """
    tokenizer = Tokenizer.load(BUNDLED_DIR)
    splitter = Splitter(
        tokenizer.count, chunk_tokens, count_batch=tokenizer.count_many, tokenizer=tokenizer.fingerprint
    )
    with tempfile.TemporaryDirectory(prefix="ragkv-eval-") as folder, Catalog(Path(folder), splitter) as catalog:
        collection = catalog.create("eval", embedder=embedder)
        collection.add(file.passages, progress=lambda done: say("split", done, len(file.passages)))
        rows = []
        for number, mode in enumerate(MODES):
            recalls = [_recall(collection, q.question, set(q.passages), k, mode) for q in file.questions]
            rows.append(
                {
                    "mode": mode,
                    "embedder": embedder,
                    "k": k,
                    "recall": statistics.fmean(recalls),
                    "questions": len(recalls),
                    "passages": len(file.passages),
                    "chunks": collection.stats().chunks,
                }
            )
            say("ask", number + 1, len(MODES))
    return rows


def _recall(collection: Collection, question: str, wanted: set[str], k: int, mode: Mode) -> float:
    # Enough chunks that k distinct passages are among them even where a passage's chunks crowd the top.
    hits = collection.retrieve(question, 20 * k, mode=mode)
    found = list(dict.fromkeys(hit.chunk.document_id for hit in hits))[:k]
    return len(wanted.intersection(found)) / len(wanted)
