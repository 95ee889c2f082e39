"""The record that ``ragkv calibrate`` leaves in the configuration: for which model and setting it measured what."""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ragkv.methods import CHECK_LAYER, parameters
from ragkv.types import ContextPolicy, Method

# What must be as it was measured, besides the method's own parameters.
_MEASURED = ("method", "kv_codec", "context_policy", "chunk_tokens")
UNCALIBRATED = "no calibration in the configuration; `ragkv calibrate` makes one"


class Calibration(BaseModel):
    """What was chosen, for which model, and how sure that is. Losses are shares of the questions, 0 to 1.

    ``fingerprint`` is the checkpoint's, ``loss_interval`` the 95% interval of ``loss``; ``proven`` says that its upper
    end, too, was within ``wanted_loss``; ``asked`` whose the questions were: the user's, the model's own, or sentences
    of the documents to be continued.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: str
    fingerprint: str
    date: date
    method: Method
    ratio: float = Field(ge=0, le=1)
    check_layer: int = Field(CHECK_LAYER, ge=1)
    kv_codec: Literal["raw", "int8", "fp8"]
    context_policy: ContextPolicy
    chunk_tokens: int
    recomputed_share: float
    wanted_loss: float
    loss: float
    loss_interval: tuple[float, float]
    proven: bool
    questions: int
    asked: Literal["given", "written", "continued"]

    def doubt(self, fingerprint: str, settings: Any) -> str | None:
        """Why this says nothing of a model with ``fingerprint`` under ``settings``; None where it does."""
        if fingerprint != self.fingerprint:
            return (
                f"the calibration in the configuration is of another model ({self.model}, {self.date}): method, ratio "
                "and kv_codec may not suit this one; run `ragkv calibrate` again"
            )
        changed = [
            f"{name} is {getattr(settings, name)!r}, was {getattr(self, name)!r}"
            for name in (*_MEASURED, *parameters(self.method))
            if getattr(settings, name) != getattr(self, name)
        ]
        return f"changed since the calibration of {self.date}: {'; '.join(changed)}" if changed else None

    def __str__(self) -> str:
        low, high = self.loss_interval
        unsure = "" if self.proven else "; not certain"
        return (
            f"{self.date}, {self.questions} questions ({self.asked}): loss against full prefill {self.loss:.1%} "
            f"[{low:.1%}, {high:.1%}], wanted {self.wanted_loss:.1%}{unsure}"
        )
