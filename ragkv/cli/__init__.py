"""The command line. The one part of ``ragkv`` that reaches up to server and eval, and only when asked to."""

from __future__ import annotations

import json
import logging
import sys
from typing import Annotated, NoReturn

import typer

from ragkv.cli import cache, collections
from ragkv.cli.ask import chat, query
from ragkv.cli.calibrate import calibrate
from ragkv.cli.ingest import ingest
from ragkv.cli.options import err
from ragkv.cli.run import demo, serve
from ragkv.errors import RagkvError, StoreReadOnlyError
from ragkv.version import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Answer questions from documents, reusing the KV caches of their chunks.",
)
for _command in (demo, ingest, query, chat, calibrate, serve):
    app.command()(_command)
app.add_typer(collections.app, name="collections")
app.add_typer(cache.app, name="cache")


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


def _add_eval() -> None:
    """``ragkv eval``, loaded with its own imports only when it is what was asked for."""
    if len(sys.argv) > 1 and sys.argv[1] == "eval":
        from ragkv.eval.cli import app as eval_app

        app.add_typer(eval_app, name="eval")
    else:
        app.add_typer(
            typer.Typer(help="Measure retrieval and answer quality; replay questions through a server."), name="eval"
        )
