"""Setting keys in a configuration file without touching what else people wrote into it."""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tomlkit

from ragkv.errors import ConfigError


def check_editable(path: Path) -> None:
    """Make sure that ``path`` can be edited, or created, before anything takes its time.

    Raises:
        ConfigError: it is no TOML, or it or its folder cannot be written.
    """
    target = path.resolve()
    _read(target)
    if not target.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {target.parent}; make it", path=str(path))
    if not os.access(target.parent, os.W_OK) or (target.exists() and not os.access(target, os.W_OK)):
        raise ConfigError(f"{path} may not be written; name another file with --out", path=str(path))


def edit(path: Path, values: Mapping[str, Any]) -> None:
    """Set top-level keys of the TOML file ``path``, tables included; comments, order and other keys stay as they are.

    The file is replaced at once or not at all, and keeps its mode; a link stays one.

    Raises:
        ConfigError: see ``check_editable``.
    """
    check_editable(path)
    target = path.resolve()
    text = _read(target)
    document = tomlkit.parse(text)
    for key, value in values.items():
        document[key] = value
    edited = tomlkit.dumps(document)
    if tomllib.loads(edited) != {**tomllib.loads(text), **tomllib.loads(tomlkit.dumps(values))}:
        raise ConfigError(f"{path} could not be edited; set {tomlkit.dumps(values)!r} in it by hand", path=str(path))
    _replace(target, edited)


def _read(target: Path) -> str:
    try:
        text = target.read_bytes().decode("utf-8") if target.exists() else ""
        tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {target}: {error.strerror}; name another file", path=str(target)) from error
    except ValueError as error:
        raise ConfigError(f"{target} is not valid TOML: {error}; correct it first", path=str(target)) from error
    return text


def _replace(target: Path, text: str) -> None:
    temporary: str | None = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
        os.replace(temporary, target)
    except OSError as error:
        raise ConfigError(f"cannot write {target}: {error.strerror}; name another file", path=str(target)) from error
    finally:
        if temporary:
            with suppress(FileNotFoundError):
                os.unlink(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
