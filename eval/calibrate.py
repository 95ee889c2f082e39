"""``ragkv calibrate``: the cheapest setting that answers a user's questions as full prefill does, on his own model."""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch

from ragkv.calibrated import Calibration
from ragkv.checkpoint import Checkpoint, load_checkpoint
from ragkv.config import Settings
from ragkv.errors import ConfigError, InputError, ModelError
from ragkv.eval.check_layer import best_check_layer
from ragkv.eval.choice import PILOT, RAW, Finding, Search, Tally, grid, questions_needed
from ragkv.eval.compared import Compared, Scribe
from ragkv.eval.corpus import Corpus, Say
from ragkv.eval.probes import Probe, continuations, written
from ragkv.kv import KvShape
from ragkv.methods import parameters
from ragkv.prefill import FULL
from ragkv.retrievers import Document
from ragkv.selection import STRATEGIES
from ragkv.selfcheck import find_fault
from ragkv.store import CODECS

RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
Asked = Literal["given", "written", "continued"]
Row = dict[str, Any]
_WRITING = 48


@dataclass(frozen=True)
class Wish:
    """What to calibrate for.

    Attributes:
        loss: share of answers that may differ from full prefill's, 0 to 1.
        limit: most questions.
        room: most tokens of an answer that are compared.
        probes: the user's questions; None lets the model write some, or cuts sentences.
    """

    loss: float = 0.01
    limit: int = 100
    room: int = 16
    probes: Sequence[Probe] | None = None


class Result(NamedTuple):
    """``rows`` are all settings that were measured, JSON-able; ``asked`` says where the questions are from."""

    calibration: Calibration
    asked: Asked
    rows: list[Row]
    warnings: list[str]
    full_right: float | None

    @property
    def values(self) -> dict[str, Any]:
        """The settings that were chosen."""
        chosen = self.calibration
        names = ["method", "check_layer", *({"ratio"} & {*parameters(chosen.method)})]
        names += [] if chosen.method == FULL else ["kv_codec"]
        return {name: getattr(chosen, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        return {
            "settings": self.values,
            "calibration": self.calibration.model_dump(mode="json"),
            "asked": self.asked,
            "full_right": self.full_right,
            "warnings": self.warnings,
            "rows": self.rows,
        }


def calibrate(settings: Settings, documents: Sequence[Document], wish: Wish, *, say: Say) -> Result:
    """Measure settings on ``documents`` in a temporary folder under ``data_dir``; nothing is left behind.

    Raises:
        ModelError: the model cannot be used, or its KV not be reused.
        InputError: no document or question can be used.
        ConfigError: ``data_dir`` cannot be written.
        StoreFullError: the chunks of one prompt are more than ``store_bytes``.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    say("load", 0, 1)
    cache = settings.data_dir.expanduser()
    checkpoint = load_checkpoint(settings.model, device=settings.device, dtype=settings.dtype, cache_dir=cache)
    if fault := find_fault(checkpoint.runner):
        raise ModelError(f"nothing to calibrate, every prompt of this model is prefilled in full: {fault}")
    say("load", 1, 1)
    with _folder(cache) as folder, Corpus(settings, checkpoint, folder, room=wish.room) as corpus:
        corpus.add(documents, say)
        probes, asked = _probes(corpus, checkpoint, wish, say)
        usable = _usable(corpus, probes, wish.limit)
        compared = Compared(corpus, checkpoint, usable, room=wish.room)
        say("encode", 0, 1)
        with torch.inference_mode():
            corpus.encode((corpus.plan(probe, RAW) for probe in usable), RAW, say)
        pilot = random.Random(0).sample(range(len(usable)), min(PILOT, len(usable)))
        checkpoint.runner.check_layer = best_check_layer([compared.deviations(number) for number in pilot], RATIOS)
        sizes = _bytes_shares(checkpoint.runner.shape, settings.chunk_tokens)
        search = Search(compared.mark, len(usable), wish.loss, bytes_share=sizes, say=say)
        finding = search.run(grid(tuple(STRATEGIES), RATIOS))
        answered = [number for number, probe in enumerate(usable) if probe.answers]
        full_right = sum(map(compared.right, answered)) / len(answered) if answered else None
    calibration = _record(settings, checkpoint, wish, finding, len(usable), asked)
    skipped = len(probes[: wish.limit]) - len(usable) if asked == "given" else 0
    warnings = [*_doubts(wish, finding, len(usable), asked, skipped), *_codec_note(settings, calibration)]
    return Result(calibration, asked, [_row(one, finding) for one in finding.tallies], warnings, full_right)


@contextmanager
def _folder(data_dir: Path) -> Iterator[Path]:
    """On the disk that is meant for KV, of which there may be a lot."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix="calibrate-", dir=data_dir, ignore_cleanup_errors=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {data_dir}: {error.strerror}; choose another data_dir") from error
    with folder as name:
        yield Path(name)


def _probes(corpus: Corpus, checkpoint: Checkpoint, wish: Wish, say: Say) -> tuple[list[Probe], Asked]:
    if wish.probes is not None:
        return list(wish.probes), "given"
    chunks = corpus.chunks()
    random.Random(0).shuffle(chunks)
    if checkpoint.tokenizer.has_template:
        scribe = Scribe(checkpoint, corpus.store, room=_WRITING)
        if probes := written(chunks, scribe, wish.limit, lambda done: say("write", done, wish.limit)):
            return probes, "written"
    return list(islice(continuations(chunks, checkpoint.tokenizer, wish.room), 4 * wish.limit)), "continued"


def _usable(corpus: Corpus, probes: Sequence[Probe], limit: int) -> list[Probe]:
    """Those that find documents; of sentences to be continued those that find their own."""
    usable: list[Probe] = []
    for probe in probes:
        try:
            found = {span.chunk.chunk.id for span in corpus.plan(probe, RAW).spans}
        except InputError:
            continue
        if found and (not probe.rest or probe.source in found):
            usable.append(probe)
        if len(usable) == limit:
            break
    if not usable:
        raise InputError("none of the questions finds any of the documents; give questions about them with --questions")
    return usable


def _bytes_shares(shape: KvShape, tokens: int) -> dict[str, float]:
    return {codec: shape.entry_bytes(tokens, codec) / shape.entry_bytes(tokens, RAW) for codec in CODECS}


def _record(
    settings: Settings, checkpoint: Checkpoint, wish: Wish, finding: Finding, questions: int, asked: Asked
) -> Calibration:
    chosen = finding.chosen
    candidate = chosen.candidate if chosen else None
    return Calibration(
        model=checkpoint.name,
        fingerprint=checkpoint.model_fingerprint,
        date=datetime.now(UTC).date(),
        method=cast(Any, candidate.method if candidate else FULL),
        ratio=candidate.ratio if candidate and "ratio" in parameters(candidate.method) else settings.ratio,
        check_layer=checkpoint.runner.check_layer,
        kv_codec=cast(Any, candidate.codec if candidate else settings.kv_codec),
        context_policy=settings.context_policy,
        chunk_tokens=settings.chunk_tokens,
        recomputed_share=round(chosen.mean("share"), 4) if chosen else 1.0,
        wanted_loss=wish.loss,
        loss=round(chosen.loss, 4) if chosen else 0.0,
        loss_interval=(round(chosen.interval[0], 4), round(chosen.interval[1], 4)) if chosen else (0.0, 0.0),
        proven=finding.proven,
        questions=questions,
        asked=asked,
    )


def _row(tally: Tally, finding: Finding) -> Row:
    kl, pilot_kl = tally.mean("kl"), tally.mean("kl", pilot=True)
    right = [mark.right for mark in tally.sample if mark.right is not None]
    return {
        **tally.candidate._asdict(),
        "recomputed_share": tally.mean("share"),
        "bytes_share": tally.bytes_share,
        "questions": len(tally.marks),
        "complete": tally.complete,
        "loss": tally.loss,
        "loss_interval": tally.interval,
        "first_token_kl": kl if math.isfinite(kl) else None,
        "pilot_kl": pilot_kl if math.isfinite(pilot_kl) else None,
        "token_agreement": tally.mean("tokens"),
        "right": sum(right) / len(right) if right else None,
        "chosen": tally is finding.chosen,
    }


def _doubts(wish: Wish, finding: Finding, questions: int, asked: Asked, skipped: int) -> Iterator[str]:
    if skipped:
        yield f"{skipped} questions were left out: they find no document, or are too long"
    if asked == "continued":
        yield (
            "no --questions were given, and the model writes none: measured on sentences of the documents that it "
            "continues; questions such as you will ask say more"
        )
    needed = questions_needed(wish.loss)
    if finding.chosen is None:
        yield f"no setting stays within a loss of {wish.loss:.1%}: method `full` prefills every prompt"
    elif not finding.proven and needed and questions < needed:
        yield (
            f"{questions} questions are too few to be sure of a loss within {wish.loss:.1%}, which takes {needed}; "
            "chosen by the estimate"
        )
    elif not finding.proven:
        yield f"no setting is certain to stay within a loss of {wish.loss:.1%}; chosen by the estimate"


def _codec_note(settings: Settings, chosen: Calibration) -> Iterator[str]:
    if chosen.kv_codec != settings.kv_codec:
        yield (
            f"kv_codec changes from {settings.kv_codec} to {chosen.kv_codec}: stored KV is not used any more, and is "
            "computed again when documents are ingested or first used"
        )
