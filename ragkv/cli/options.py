"""What the commands share: options, how they are read, and where results go."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ragkv.config import Settings, load_settings
from ragkv.errors import ConfigError
from ragkv.types import RejectedDocument

out = Console()
err = Console(stderr=True)

Model = Annotated[str | None, typer.Option(help="`bundled`, a folder with a Hugging Face checkpoint, or a hub id.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
DataDir = Annotated[Path | None, typer.Option(help="Holds the chunk store and the collections.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other setting; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Collection = Annotated[str, typer.Option("--collection", "-c", help="Name of the collection.")]
MethodOption = Annotated[
    str | None, typer.Option("--method", help="default, none, hkvd, epic, question, echo, links, random or full.")
]
Ratio = Annotated[float | None, typer.Option(help="Share of context tokens a repair recomputes.")]
TopK = Annotated[int | None, typer.Option(help="Chunks to retrieve.")]
Filters = Annotated[
    list[str] | None, typer.Option("--filter", metavar="FIELD=VALUE", help="Only documents with this metadata.")
]
Url = Annotated[str | None, typer.Option(help="Ask a running server instead of loading the model here.")]


def read_settings(sets: list[str] | None, **flags: Any) -> Settings:
    extra = dict(_pair(text, "--set") for text in sets or [])
    return load_settings(**{**extra, **{key: value for key, value in flags.items() if value is not None}})


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option} wants KEY=VALUE, got {text!r}")
    return key.strip(), value


def read_filters(given: list[str] | None) -> dict[str, Any] | None:
    """FIELD=VALUE pairs; a value that is JSON counts as such (numbers, true, operators in braces)."""
    if not given:
        return None
    filters: dict[str, Any] = {}
    for text in given:
        key, value = _pair(text, "--filter")
        try:
            filters[key] = json.loads(value)
        except ValueError:
            filters[key] = value
    return filters


def dumped(rejected: Iterable[RejectedDocument]) -> list[dict[str, str]]:
    return [one.model_dump() for one in rejected]


def print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)
