"""What the commands share: options, how lists in them are read, and where results go."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ragkv.errors import ConfigError, InputError

out = Console()
err = Console(stderr=True)

Ratio = Annotated[
    str,
    typer.Option(help="Ratios, comma-separated, for every method but `full`, `none` and `default`, which has its own."),
]
File = Annotated[Path, typer.Argument(help="Questions in the MuSiQue style: a JSON list of question, answers, ctxs.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
AnyModel = Annotated[
    str | None, typer.Option(help="`bundled`, a folder, a hub id, or random:<preset>: shapes without weights.")
]


def refuse_options(ctx: typer.Context, names: Sequence[str], why: str) -> None:
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(f"--{name.replace('_', '-')} does not go with {why}; leave it out")


def check_save(path: Path | None) -> None:
    """Before anything takes its time."""
    if path and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise InputError(f"{path} cannot be written: name a file in a folder that exists", path=str(path))


def save_result(path: Path, result: dict[str, Any]) -> None:
    path.write_text(json.dumps({"command": " ".join(["ragkv", *sys.argv[1:]]), **result}, indent=1) + "\n", "utf-8")


def saving(path: Path | None) -> Callable[[dict[str, Any]], None]:
    """Writes what there is so far."""
    return partial(save_result, path) if path else lambda result: None


def names(given: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in given.split(",") if name.strip())


def choices(given: str, known: Sequence[str], option: str) -> list[Any]:
    chosen = list(names(given))
    for name in chosen:
        if name not in known:
            raise ConfigError(f"{option}: {name!r} is not one of {', '.join(known)}")
    return chosen


def choice(given: str, known: Sequence[str], option: str) -> Any:
    """The one choice; several, or none, are as wrong as an unknown one."""
    if given not in known:
        raise ConfigError(f"{option}: {given!r} is not one of {', '.join(known)}")
    return given


def numbers(given: str, option: str, least: float, most: float) -> list[float]:
    try:
        numbers = [float(part) for part in given.split(",") if part.strip()]
    except ValueError:
        numbers = [math.nan]
    if not all(least < number <= most for number in numbers):
        raise ConfigError(f"{option} wants numbers above {least}, up to {most}, got {given!r}")
    return numbers


def ratios(given: str) -> list[float]:
    try:
        ratios = [float(part) for part in given.split(",")]
    except ValueError as error:
        raise ConfigError(f"--ratio wants numbers from 0 to 1, got {given!r}") from error
    if not all(0 <= ratio <= 1 for ratio in ratios):
        raise ConfigError(f"--ratio wants numbers from 0 to 1, got {given!r}")
    return ratios


def show_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    flat = [_flat(row) for row in rows]
    table = Table(*flat[0], box=None, header_style="dim")
    for row in flat:
        table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()))
    out.print(table)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row with its inner tables spread out into columns."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat
