"""The demo: the same questions answered three ways over the bundled documents, side by side."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ragkv.config import Settings
from ragkv.engine import Engine
from ragkv.retrievers import load_path
from ragkv.types import Answer, ContextPolicy, Method

HERE = Path(__file__).parent
COLLECTION = "demo"
TOP_K = 32


@dataclass(frozen=True)
class Way:
    """One way of answering: ``reuse`` takes chunks encoded alone as they are, ``blend`` is what ragkv does."""

    name: str
    method: Method
    policy: ContextPolicy


WAYS = (
    Way("full", "full", "document"),
    Way("reuse", "none", "alone"),
    Way("blend", "default", "document"),
)


@dataclass(frozen=True)
class Run:
    answer: str
    correct: bool
    ttft_ms: float
    recomputed_share: float
    context_tokens: int
    sources: list[str]


@dataclass(frozen=True)
class Asked:
    question: str
    gold: str
    kind: str
    runs: dict[str, Run]


Say = Callable[[str, int, int], None]


def run_demo(settings: Settings, say: Say) -> dict[str, Any]:
    """Load the model, ingest the sample documents into a temporary folder, ask every question every way.

    ``say(stage, done, total)`` reports progress. Returns what ``ragkv demo --json`` prints.
    """
    questions = [json.loads(line) for line in (HERE / "questions.jsonl").read_text("utf-8").splitlines()]
    with tempfile.TemporaryDirectory(prefix="ragkv-demo-") as folder:
        say("load", 0, 1)
        fresh = settings.model_copy(update={"data_dir": Path(folder)})
        with Engine(fresh) as engine:
            say("load", 1, 1)
            documents = list(load_path(HERE / "documents"))
            for policy in ("document", "alone"):
                engine.ingest(COLLECTION, documents, encode="eager", context_policy=policy, progress=say)
            for way in WAYS:  # first runs touch cold memory and code; nobody's figures should hold that
                _ask(engine, questions[0]["question"], way)
            asked = []
            for done, question in enumerate(questions):
                say("ask", done, len(questions))
                runs = {way.name: _run(_ask(engine, question["question"], way), question["answer"]) for way in WAYS}
                asked.append(Asked(question["question"], question["answer"], question["kind"], runs))
            say("ask", len(questions), len(questions))
            model = engine.health().model
    return {"model": model, "questions": [asdict(one) for one in asked], "summary": summarise(asked)}


def summarise(asked: list[Asked]) -> dict[str, dict[str, float]]:
    return {
        way.name: {
            "accuracy": statistics.fmean(one.runs[way.name].correct for one in asked),
            "median_ttft_ms": statistics.median(one.runs[way.name].ttft_ms for one in asked),
        }
        for way in WAYS
    }


def _ask(engine: Engine, question: str, way: Way) -> Answer:
    return engine.query(
        question, collection=COLLECTION, top_k=TOP_K, method=way.method, context_policy=way.policy, max_tokens=24
    )


def _run(answer: Answer, gold: str) -> Run:
    text = answer.text.strip()
    return Run(
        answer=text,
        correct=text.casefold().rstrip(".") == gold.casefold().rstrip("."),
        ttft_ms=answer.timing.ttft_ms,
        recomputed_share=answer.recomputed_share,
        context_tokens=answer.usage.context_tokens,
        sources=list(dict.fromkeys(source.document_id for source in answer.sources)),
    )
