"""What places and panels are called."""

from __future__ import annotations

from ragkv.eval.palette import METRIC_NAMES
from ragkv.eval.report.rows import Panel, Place

_POLICIES = {"document": "chunks encoded behind their document", "alone": "chunks encoded alone"}
_CONDITIONS = {
    "shuffled": "documents shuffled",
    "ordered": "documents in their own order",
    "neighbour-missing": "a needed chunk's neighbour not retrieved",
}
_TIERS = {"ram": "RAM", "ssd": "SSD", "remote": "the remote tier", "device": "the device"}


def machine(place: Place) -> str:
    """Model and device."""
    return f"{place.model} on {place.device}"


def load(place: Place) -> str:
    """How much was asked for at once."""
    together = f", {place.batch} requests at once" if place.batch > 1 else ""
    return f"{place.context_tokens:,} context tokens{together}"


def tier(place: Place) -> str:
    return f"chunks from {_TIERS.get(place.tier, place.tier)}, {place.codec}"


def metric(panel: Panel) -> str:
    return METRIC_NAMES.get(panel.metric, panel.metric)


def data(panel: Panel) -> str:
    return f"{panel.model} on {'invented worlds' if panel.suite == 'worlds' else panel.suite}"


def sentence(text: str) -> str:
    """``text`` with a capital in front."""
    return text[:1].upper() + text[1:]


def conditions(panel: Panel) -> str:
    parts = [_POLICIES.get(panel.policy, panel.policy), _CONDITIONS.get(panel.condition, panel.condition)]
    return ", ".join(filter(None, parts))
