"""The command line. The one module of ``ragkv`` that reaches up to server and eval, and only when asked to."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from ragkv import terminal
from ragkv.config import Settings, config_file, load_settings
from ragkv.errors import ConfigError, InputError, RagkvError, StoreReadOnlyError
from ragkv.types import Answer, DoneEvent, Message, RejectedDocument, Request, TokenEvent, make_request
from ragkv.version import __version__

if TYPE_CHECKING:
    from ragkv.engine import Engine
    from ragkv.retrievers import Document
    from ragkv.store import ChunkStore

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answer questions from documents, reusing the KV caches of their chunks.",
)
cache_app = typer.Typer(no_args_is_help=True, help="Look after the chunk store.")
app.add_typer(cache_app, name="cache")
_ON_DISK = ("path", "policy", "entries", "bytes", "capacity_bytes", "session_bytes", "entries_by_model")
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


def main() -> None:
    """Run the command line; expected errors end in one line on stderr and exit status 1."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        _add_eval()
        app()
    except StoreReadOnlyError as error:  # the store's own advice is for programs
        path = error.context.get("path")
        message = f"{path} cannot be written; make it writable, or choose another folder with --data-dir"
        _fail(StoreReadOnlyError(message, **error.context))
    except RagkvError as error:
        _fail(error)
    except BrokenPipeError:
        sys.stderr.close()
        raise SystemExit(1) from None


def _fail(error: RagkvError) -> NoReturn:
    if "--json" in sys.argv:
        print(
            json.dumps({"error": {"code": error.code, "message": error.message, "context": error.context}}, default=str)
        )
    else:
        err.print(f"[bold red]error[/] ({error.code}): ", end="")
        err.print(error.message, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return


@app.command()
def demo(model: Model = None, device: Device = None, sets: Sets = None, json_: Json = False) -> None:
    """Ask the bundled model questions over bundled documents: full prefill, plain reuse and blend, side by side."""
    from ragkv.demo.run import run_demo

    settings = _settings(sets, model=model, device=device)
    with terminal.progress(err, quiet=json_) as say:
        result = run_demo(settings, say)
    _print_json(result) if json_ else terminal.show_demo(out, result)


@app.command()
def ingest(
    paths: Annotated[list[Path], typer.Argument(help="Files or folders: .txt, .md, .html, .jsonl.")],
    collection: Collection = "default",
    lazy: Annotated[bool, typer.Option("--lazy", help="Compute KV when a query first needs it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take.")] = False,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Add documents to a collection and compute their chunks' KV."""
    from ragkv.retrievers.catalog import check_name

    settings = _settings(sets, model=model, device=device, data_dir=data_dir)
    check_name(collection)
    documents, rejected = _load(paths, settings)
    with _resumable() as watched, _engine(settings) as engine:
        estimate = engine.estimate(documents)
        if not json_:
            terminal.show_estimate(err, estimate)
        if dry_run:
            if json_:
                _print_json({"estimate": estimate.model_dump(), "rejected": _dumped(rejected)})
            else:
                terminal.show_rejected(out, rejected)
            return
        with terminal.progress(err, quiet=json_) as say:
            report = engine.ingest(collection, documents, encode="lazy" if lazy else None, progress=watched(say))
    if json_:
        _print_json(
            {
                **report.model_dump(),
                "rejected": _dumped([*rejected, *report.rejected]),
                "estimate": estimate.model_dump(),
            }
        )
    else:
        terminal.show_ingest(out, report, rejected)


@app.command()
def query(
    question: Annotated[str, typer.Argument(help="The question.")],
    collection: Collection = "default",
    filters: Filters = None,
    top_k: TopK = None,
    method: MethodOption = None,
    ratio: Ratio = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens to generate.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    url: Url = None,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Ask one question and see the answer, its sources and where the time went."""
    fields = {
        "collection": collection,
        "filters": _filters(filters),
        "top_k": top_k,
        "method": method,
        "ratio": ratio,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    request = _request(question, fields)
    with _door(url, sets, quiet=json_, model=model, device=device, data_dir=data_dir) as door:
        answer = _ask(door, request, quiet=json_)
        _print_json(answer.model_dump()) if json_ else terminal.show_answer(out, answer)


@app.command()
def chat(
    collection: Annotated[str | None, typer.Option("--collection", "-c", help="Answer from this collection.")] = None,
    filters: Filters = None,
    top_k: TopK = None,
    method: MethodOption = None,
    url: Url = None,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Ask question after question; earlier turns stay in the prompt. Ends with /exit or end of input."""
    history: list[Message] = []
    fields = {"collection": collection, "filters": _filters(filters), "top_k": top_k, "method": method}
    _request("?", fields)
    with _door(url, sets, quiet=json_, model=model, device=device, data_dir=data_dir) as door:
        for line in _lines():
            try:
                answer = _ask(door, _request(line, {**fields, "history": history}), quiet=json_)
            except InputError as error:
                err.print(f"[red]{error.code}[/]: ", end="")
                err.print(error.message, markup=False)
                continue
            history += [Message(role="user", content=line), Message(role="assistant", content=answer.text)]
            _print_json(answer.model_dump()) if json_ else terminal.show_footer(out, answer)


@app.command()
def calibrate(
    documents: Annotated[
        list[Path], typer.Option("--documents", "-d", help="Files or folders, as for ingest; may be repeated.")
    ],
    questions: Annotated[
        Path | None,
        typer.Option(help="One a line, or .jsonl with question and, if known, answers. Else the model writes some."),
    ] = None,
    loss: Annotated[
        float, typer.Option(min=0, max=0.99, help="Share of answers that may differ from full prefill's.")
    ] = 0.01,
    limit: Annotated[int, typer.Option(min=1, help="Most questions to ask.")] = 100,
    tokens: Annotated[int, typer.Option(min=1, max=1024, help="Most tokens of an answer to compare.")] = 16,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Configuration to write the setting to. Default: ragkv.toml.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw loss against recomputed share: .png, .svg, .pdf.")] = None,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Find the cheapest setting that answers as full prefill does, on your model and documents, and configure it."""
    from ragkv.eval import calibrate as calibration
    from ragkv.eval.cache_policy_plot import check
    from ragkv.eval.calibrate_show import plot as draw
    from ragkv.eval.calibrate_show import show
    from ragkv.eval.config_edit import check_editable, edit
    from ragkv.eval.probes import read_probes

    settings, target = _settings(sets, model=model, device=device, data_dir=data_dir), out_file or config_file()
    check_editable(target)
    if plot:
        check(plot)
    wish = calibration.Wish(loss, limit, tokens, read_probes(questions) if questions else None)
    loaded, rejected = _load(documents, settings)
    with terminal.progress(err, quiet=json_) as say:
        result = calibration.calibrate(settings, loaded, wish, say=say)
    if plot:
        draw(result, plot)
    edit(target, {**result.values, "calibration": result.calibration.model_dump()})
    if json_:
        _print_json({**result.to_json(), "rejected": _dumped(rejected), "written": str(target)})
    else:
        show(out, result)
        terminal.show_rejected(out, rejected)
        out.print(f"written to {target}", highlight=False)


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to bind.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind; 0 picks a free one.")] = None,
    model: Model = None,
    device: Device = None,
    data_dir: DataDir = None,
    sets: Sets = None,
) -> None:
    """Serve the REST API."""
    from ragkv.server import bind
    from ragkv.server import serve as run_server

    settings = _settings(sets, host=host, port=port, model=model, device=device, data_dir=data_dir)
    logging.getLogger("ragkv").setLevel(logging.INFO)
    sock = bind(settings)  # before the model is loaded, so that a port in use is told at once
    with sock, _engine(settings) as engine:
        run_server(sock, engine)


@cache_app.command()
def stats(
    url: Annotated[str | None, typer.Option(help="Ask a running server: its hits, RAM and remote tier, too.")] = None,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """What is stored on disk. Hits, RAM and remote tier are a running server's: ask it with --url."""
    if url is not None:
        from ragkv.client import Client

        with Client(url, api_key=_settings(sets).bearer_key) as client:
            info = client.cache_stats().model_dump()
    else:
        from ragkv.upkeep import store_info

        with _stores(sets, data_dir, read_only=True) as (store, sessions):
            info = store_info(store, sessions).model_dump(include=set(_ON_DISK))
    _print_json(info) if json_ else terminal.show_fields(out, info)


@cache_app.command()
def check(
    fix: Annotated[bool, typer.Option("--fix", help="Repair what is found.")] = False,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Compare index and files, verify every checksum. Exit status 1 when something is wrong."""
    from ragkv.upkeep import store_check

    with _stores(sets, data_dir, read_only=not fix) as (store, _):
        report = store_check(store, fix=fix)
    _print_json(report.model_dump()) if json_ else terminal.show_fields(out, report.model_dump())
    if not report.ok:
        raise typer.Exit(1)


@cache_app.command()
def clear(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    data_dir: DataDir = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Remove all KV on disk that is not in use, of chunks and of idle conversations. Collections stay; KV is computed
    again when needed."""
    if not yes and not typer.confirm("Remove all stored KV?", err=True):
        raise typer.Exit(1)
    with _stores(sets, data_dir) as stores:
        removed = sum(store.clear() for store in stores if store)
    _print_json({"removed": removed}) if json_ else out.print(f"removed {removed} entries")


def _settings(sets: list[str] | None, **flags: Any) -> Settings:
    extra = dict(_pair(text, "--set") for text in sets or [])
    return load_settings(**{**extra, **{key: value for key, value in flags.items() if value is not None}})


def _pair(text: str, option: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{option} wants KEY=VALUE, got {text!r}")
    return key.strip(), value


def _filters(given: list[str] | None) -> dict[str, Any] | None:
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


def _load(paths: Iterable[Path], settings: Settings) -> tuple[list[Document], list[RejectedDocument]]:
    from ragkv.documents import distinct
    from ragkv.retrievers import load_path

    rejected: list[RejectedDocument] = []

    def note(error: RagkvError) -> None:
        name = str(error.context.get("document_id", error.context.get("path", "")))
        rejected.append(RejectedDocument(document_id=name, error=error.code, message=error.message))

    found = (load_path(path, max_bytes=settings.max_document_bytes, on_error=note) for path in paths)
    documents = list(distinct(chain.from_iterable(found), note))
    if not documents and rejected:
        raise InputError("; ".join(one.message for one in rejected[:3]), rejected=len(rejected))
    if not documents:
        raise InputError("no documents found: give .txt, .md, .html or .jsonl files, or folders of them")
    return documents, rejected


@contextmanager
def _resumable() -> Iterator[Callable[[terminal.Say], terminal.Say]]:
    """Ctrl-C in an ingest ends in a line that says how much of it is stored, by the progress that is watched."""
    stored, wanted = 0, 0

    def watched(say: terminal.Say) -> terminal.Say:
        def note(stage: str, done: int, total: int) -> None:
            nonlocal stored, wanted
            if stage == "encode":
                stored, wanted = max(stored, done), total  # several threads tell
            say(stage, done, total)

        return note

    try:
        yield watched
    except KeyboardInterrupt:
        how_far = f"the KV of {stored} of {wanted} chunks is stored" if wanted else "no more KV is stored"
        message = f"interrupted: {how_far}; the same command again goes on from there"
        err.print(message, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    with err.status(f"loading {settings.model}"):
        from ragkv.engine import Engine

        engine = Engine(settings)
    with engine:
        yield engine


@contextmanager
def _door(url: str | None, sets: list[str] | None, *, quiet: bool, **flags: Any) -> Iterator[Any]:
    """A client of a running server, or an engine of our own, which stores what was missing; both have ``stream``."""
    settings = _settings(sets, **flags)
    if url is None:
        with _engine(settings) as engine:
            yield engine
            _drain(engine, quiet)
        return
    from ragkv.client import Client

    with Client(url, api_key=settings.bearer_key) as client:
        yield client


def _drain(engine: Engine, quiet: bool) -> None:
    if not engine.health().encoding:
        return
    with suppress(KeyboardInterrupt), terminal.progress(err, quiet=quiet) as say:
        engine.drain(progress=say)


@contextmanager
def _stores(
    sets: list[str] | None, data_dir: Path | None, *, read_only: bool = False
) -> Iterator[tuple[ChunkStore, ChunkStore | None]]:
    """The chunk store, and the one of idle conversations where there is one."""
    from ragkv.store import ChunkStore

    settings = _settings(sets, data_dir=data_dir)
    with ExitStack() as stack:

        def opened(folder: Path, capacity_bytes: int, policy: str) -> ChunkStore:
            # Only looking needs no right to write; but there must be something to look at.
            look = read_only and folder.is_dir()
            store = ChunkStore(folder, capacity_bytes=capacity_bytes, policy=policy, ram_bytes=0, read_only=look)
            return stack.enter_context(store)

        there = settings.sessions_dir.is_dir()
        yield (
            opened(settings.store_dir, settings.store_bytes, settings.store_policy),
            opened(settings.sessions_dir, sys.maxsize, "lru") if there else None,  # nothing is put there from here
        )


def _request(question: str, fields: dict[str, Any]) -> Request:
    """What is asked. Raises InputError naming a bad value: before the model is loaded, which takes its time."""
    from ragkv.retrievers.catalog import check_name

    request = make_request(question, {key: value for key, value in fields.items() if value is not None})
    if request.collection is not None:
        check_name(request.collection)
    return request


def _ask(door: Any, request: Request, *, quiet: bool) -> Answer:
    for event in door.stream(request):
        if isinstance(event, TokenEvent) and not quiet:
            out.print(event.text, end="", markup=False, highlight=False, style="bold", soft_wrap=True)
        if isinstance(event, DoneEvent):
            if not quiet:
                out.print()
            return event.answer
    raise RagkvError("the answer broke off; see the server's log")


def _lines() -> Iterator[str]:
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


def _dumped(rejected: Iterable[RejectedDocument]) -> list[dict[str, str]]:
    return [one.model_dump() for one in rejected]


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str), flush=True)


def _add_eval() -> None:
    """``ragkv eval``, loaded with its own imports only when it is what was asked for."""
    if len(sys.argv) > 1 and sys.argv[1] == "eval":
        from ragkv.eval.cli import app as eval_app

        app.add_typer(eval_app, name="eval")
    else:
        app.add_typer(
            typer.Typer(help="Measure retrieval and answer quality; replay questions through a server."), name="eval"
        )
