"""Settings: flags > RAGKV_* environment > ragkv.toml > defaults. Unknown keys are errors."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ragkv.calibrated import Calibration
from ragkv.errors import ConfigError
from ragkv.methods import CHECK_LAYER
from ragkv.types import ContextPolicy, Method, RetrievalMode

ENV_PREFIX = "RAGKV_"
CONFIG_FILE_VARIABLE = "RAGKV_CONFIG"
_SECRET = ("api_key", "remote_url", "store_salt", "tenants")  # and whatever is in them
DEFAULT_SYSTEM_PROMPT = "Answer the question from the documents. Reply with the answer only."


class Tenant(BaseModel):
    """Somebody who shares the server: recognised by ``key``, served in proportion to ``weight``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: SecretStr = Field(min_length=8)
    weight: float = Field(1.0, gt=0.0, le=1000.0)
    priority: int = Field(0, ge=-1000, le=1000)


class Settings(BaseSettings):
    """Every setting of ragkv. Build it with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        extra="forbid",
        frozen=True,
        env_ignore_empty=True,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may be a secret
    )

    model: str = Field(
        "bundled",
        description="`bundled`, a folder with a Hugging Face checkpoint, a hub id, or `random:<preset>` (for speed)",
    )
    device: str = Field("auto", description="`auto`, `cpu`, `cuda` or `cuda:N`")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="computing and KV type; `auto`: bfloat16 where the hardware multiplies it fast"
    )
    threads: int = Field(0, ge=0, description="CPU threads of the model; 0 leaves it to torch")
    data_dir: Path = Field(
        Path("~/.ragkv"), description="holds the chunk store, the collections and idle conversations"
    )

    chunk_tokens: int = Field(128, ge=16, le=8192, description="token budget of a chunk when splitting")
    context_policy: ContextPolicy = Field(
        "document", description="encode a chunk behind its document's preceding chunks, or `alone`"
    )
    context_tokens: int = Field(1024, ge=0, description="most tokens of document context a chunk is encoded behind")
    encode: Literal["eager", "lazy"] = Field("eager", description="compute KV at ingest, or at first use")
    kv_codec: Literal["raw", "int8", "fp8"] = Field(
        "raw", description="how chunk KV is stored; `int8` and `fp8` halve its bytes, at a small error"
    )
    embedder: str = Field("svd", description="`svd` (fitted per collection), a local path, or a hub id")
    max_document_bytes: int = Field(16 * 2**20, ge=1, description="larger documents are refused")

    store_bytes: int = Field(20 * 2**30, ge=2**20, description="most bytes the chunk store takes on disk")
    store_policy: Literal["cost", "s3-fifo", "lru"] = Field(
        "cost", description="which chunks make room on disk: `cost`, `s3-fifo` or `lru`"
    )
    store_salt: SecretStr | None = Field(
        None, min_length=8, description="a secret, part of every chunk key: who has another one shares no stored KV"
    )
    ram_bytes: int = Field(1 * 2**30, ge=0, description="most bytes of chunk KV kept in RAM")
    device_bytes: int | None = Field(
        None,
        ge=0,
        description="most bytes of chunk KV kept on the accelerator; 0: none. Unset: a tenth of the memory that the "
        "model leaves free on a GPU, none on a CPU",
    )
    remote_url: SecretStr | None = Field(
        None, description="a Redis or Valkey server that keeps chunk KV for several machines: `redis://host:6379/0`"
    )
    remote_timeout_ms: int = Field(
        50, ge=1, le=60_000, description="most time a request waits for an answer of it; ten times that for a layer"
    )

    retrieval: RetrievalMode = Field("fused", description="`bm25`, `dense`, or `fused` by reciprocal rank")
    top_k: int = Field(10, ge=1, le=1000, description="chunks to retrieve")
    method: Method = Field("default", description="how stored KV is repaired; `full` prefills everything")
    ratio: float = Field(0.1, ge=0.0, le=1.0, description="share of the repairable context tokens to recompute")
    check_layer: int = Field(
        CHECK_LAYER, ge=1, description="layer at which `hkvd` compares values, the last one at most"
    )
    calibration: Calibration | None = Field(
        None, description="what `ragkv calibrate` measured, for which model and setting: a table that it writes"
    )
    controller: Literal["on", "off"] = Field(
        "on", description="compute what would take longer to load; a request that names a method gets just that"
    )
    system_prompt: str = Field(DEFAULT_SYSTEM_PROMPT, description="system text in front of every prompt")
    max_tokens: int = Field(64, ge=1, description="most tokens to generate when a request names no limit")

    host: str = Field("127.0.0.1", description="address the server binds")
    port: int = Field(8377, ge=0, le=65535, description="port the server binds; 0 picks a free one")
    api_key: SecretStr | None = Field(None, min_length=8, description="bearer key clients must send")
    tenants: dict[str, Tenant] = Field(
        default_factory=dict,
        description="who shares the server: tables `[tenants.<name>]` with a bearer `key`, a `weight` and a `priority`",
    )

    scheduler: Literal["fcfs", "priority", "vtc"] = Field(
        "vtc", description="who is next: `fcfs`, `priority`, or `vtc` (fair shares of computed tokens among tenants)"
    )
    max_running: int = Field(64, ge=1, description="requests generating at the same time")
    max_queued: int = Field(256, ge=1, description="requests waiting before new ones are answered 429")
    max_queued_tokens: int = Field(
        4_000_000, ge=1, description="prompt tokens waiting before new ones are answered 429"
    )
    max_preemptions: int = Field(8, ge=0, description="how often one request may lose its place to others")
    aging_s: float = Field(10.0, gt=0, description="seconds of waiting that count as one class of priority")
    stall_ms: float = Field(50.0, gt=0, description="most time that others' prefills may put between two tokens")
    pool_bytes: int | None = Field(
        None,
        ge=2**20,
        description="bytes of conversations' KV on the device. Unset: half of what the model leaves free on a GPU, "
        "a sixteenth of the memory on a CPU",
    )
    swap_bytes: int | None = Field(
        None,
        ge=0,
        description="bytes of RAM for KV of preempted and idle conversations. Unset: an eighth of the memory, 16 GiB "
        "at most",
    )
    preemption: Literal["recompute", "blockwise", "groups", "async", "reuse"] = Field(
        "reuse",
        description="how a request makes room: thrown away and computed again, or moved to RAM in ever better ways; "
        "all but `reuse` are there to compare with",
    )
    session_bytes: int = Field(
        4 * 2**30,
        ge=0,
        description="most bytes on disk, in `sessions/` of the data folder, for the KV of idle conversations, and of "
        "exact beginnings that prompts may share; 0: none",
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        toml = TomlConfigSettingsSource(settings_cls, config_file())
        return init_settings, env_settings, toml

    @property
    def store_dir(self) -> Path:
        return self.data_dir.expanduser() / "store"

    @property
    def sessions_dir(self) -> Path:
        return self.data_dir.expanduser() / "sessions"

    @property
    def bearer_key(self) -> str | None:
        """The ``api_key`` itself, which is in nothing that shows settings."""
        return self.api_key.get_secret_value() if self.api_key else None

    @property
    def collections_dir(self) -> Path:
        return self.data_dir.expanduser() / "collections"


_TABLES: dict[str, type[BaseModel]] = {"tenants": Tenant, "calibration": Calibration}


def load_settings(**flags: Any) -> Settings:
    """Settings from flags (``None`` means not given), environment, ``ragkv.toml`` and defaults.

    Raises:
        ConfigError: an unknown key or a value out of range, naming the key, where it is from, the value unless it may
            hold a secret, and the choices.
    """
    _refuse_unknown_environment()
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(e, given) for e in error.errors())) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{config_file()} is not valid TOML: {error}", path=str(config_file())) from error
    except ValueError as error:  # pydantic-settings' own, about a variable
        raise ConfigError(f"a {ENV_PREFIX}* variable must hold JSON: {error}") from error
    except OSError as error:
        raise ConfigError(f"cannot read {config_file()}: {error.strerror}", path=str(config_file())) from error


def config_file() -> Path:
    """Where the configuration is, or would be. Raises ConfigError where one is named that is not there, or it is no
    file."""
    named = os.environ.get(CONFIG_FILE_VARIABLE)
    path = Path(named or "ragkv.toml").expanduser()
    if not path.is_file() and (named or path.exists()):
        what = f"{CONFIG_FILE_VARIABLE} names {path}, which" if named else f"{path.absolute()}"
        raise ConfigError(f"{what} is not a file; settings are read from one", path=str(path))
    return path


def _refuse_unknown_environment() -> None:
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | {CONFIG_FILE_VARIABLE}
    for variable in os.environ:
        if variable.upper().startswith(ENV_PREFIX) and variable.upper() not in known:
            raise ConfigError(
                f"unknown environment variable {variable}{_suggest(variable.upper(), known)}",
                variable=variable,
            )


def _explain(error: Any, flags: Mapping[str, Any]) -> str:
    root, *inner = (str(part) for part in error["loc"])
    key, source = ".".join((root, *inner)), _source(root, flags)
    if error["type"] == "extra_forbidden":
        known = _TABLES[root] if inner else Settings
        return f"unknown setting {key!r}{source}{_suggest([root, *inner][-1], set(known.model_fields))}"
    message = error["msg"]
    if root in _SECRET or error["type"] == "missing":
        if error["type"] == "too_short":  # the message would tell the secret's length
            message = f"it needs at least {error['ctx']['min_length']} characters"
    else:
        message += f", got {error['input']!r}"
    return f"setting {key!r}{source}: {message}"


def _source(root: str, flags: Mapping[str, Any]) -> str:
    """Where the setting is from, unless it is the caller's own: the same order as theirs."""
    if root in flags:
        return ""
    variables = (name for name, value in os.environ.items() if value and name.upper() == ENV_PREFIX + root.upper())
    return f" in {next(variables, config_file())}"


def _suggest(key: str, known: set[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
