"""A user's own questions as cases of a quality run, and the measure that suits their answers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ragkv.errors import ConfigError
from ragkv.eval.cases import Case, CaseDocument, CaseQuestion
from ragkv.eval.questions import AskedQuestion, QuestionFile
from ragkv.retrievers import Splitter

Metric = Literal["exact_match", "f1", "rouge_l", "token_agreement"]
METRICS: dict[str, Metric] = {
    "em": "exact_match",
    "f1": "f1",
    "rouge-l": "rouge_l",
    "agreement": "token_agreement",
}
# Longer answers are summaries, which are written in many ways: ROUGE-L.
SHORT_ANSWER_WORDS = 12
_ANSWER_TOKENS: dict[Metric, int] = {"exact_match": 32, "f1": 32, "rouge_l": 128, "token_agreement": 32}


@dataclass(frozen=True)
class Data:
    """A file's questions, and how their answers are judged.

    Attributes:
        name: of the file, for whoever reads the rows.
        metric: a key of ``METRICS``, or ``auto`` for :func:`suited`.
        limit: only so many questions, from the file's beginning.
        answer_tokens: most tokens of an answer; None for what suits the metric.
    """

    file: QuestionFile
    name: str
    metric: str = "auto"
    limit: int | None = None
    answer_tokens: int | None = None

    @property
    def questions(self) -> Sequence[AskedQuestion]:
        return self.file.questions[: self.limit]

    def judged_by(self) -> Metric:
        """The metric.

        Raises:
            ConfigError: it needs accepted answers, and no question has one.
        """
        metric = suited(self.questions) if self.metric == "auto" else METRICS[self.metric]
        if metric != "token_agreement" and not any(question.answers for question in self.questions):
            raise ConfigError(
                f"--metric {self.metric} compares with accepted answers, and none of the questions has any; use "
                "--metric agreement, which compares with full prefill",
                metric=self.metric,
            )
        return metric

    def room(self) -> int:
        """Most tokens of an answer."""
        return self.answer_tokens or _ANSWER_TOKENS[self.judged_by()]


def suited(questions: Sequence[AskedQuestion]) -> Metric:
    """Agreement with full prefill where there are no accepted answers, ROUGE-L where they are long, else F1."""
    words = [min(len(answer.split()) for answer in q.answers) for q in questions if q.answers]
    if not words:
        return "token_agreement"
    return "rouge_l" if statistics.median(words) > SHORT_ANSWER_WORDS else "f1"


def data_cases(data: Data, splitter: Splitter) -> list[Case]:
    """A case for every distinct context, with all questions that are asked over it."""
    passages = {document.id: document for document in data.file.passages}
    by_context: dict[tuple[str, ...], list[CaseQuestion]] = {}
    for question in data.questions:
        asked = CaseQuestion(question.question, question.kind, question.answers)
        by_context.setdefault(question.passages, []).append(asked)
    used = dict.fromkeys(passage for context in by_context for passage in context)
    split = {id_: CaseDocument(id_, tuple(splitter.split(passages[id_].full_text))) for id_ in used}
    return [
        Case(number, tuple(split[passage] for passage in context), tuple(questions))
        for number, (context, questions) in enumerate(by_context.items())
    ]
