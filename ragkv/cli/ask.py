"""``ragkv query`` and ``ragkv chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ragkv import terminal
from ragkv.cli.doors import open_door
from ragkv.cli.options import (
    Collection,
    DataDir,
    Device,
    Filters,
    Json,
    MethodOption,
    Model,
    Ratio,
    Sets,
    TopK,
    Url,
    err,
    out,
    print_json,
    read_filters,
)
from ragkv.errors import InputError, RagkvError
from ragkv.types import Answer, DoneEvent, Message, Request, TokenEvent, make_request


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
        "filters": read_filters(filters),
        "top_k": top_k,
        "method": method,
        "ratio": ratio,
        "max_tokens": max_tokens,
        "temperature": temperature,
    }
    request = _request(question, fields)
    with open_door(url, sets, quiet=json_, model=model, device=device, data_dir=data_dir) as door:
        answer = _ask(door, request, quiet=json_)
        print_json(answer.model_dump()) if json_ else terminal.show_answer(out, answer)


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
    fields = {"collection": collection, "filters": read_filters(filters), "top_k": top_k, "method": method}
    _request("?", fields)
    with open_door(url, sets, quiet=json_, model=model, device=device, data_dir=data_dir) as door:
        for line in _lines():
            try:
                answer = _ask(door, _request(line, {**fields, "history": history}), quiet=json_)
            except InputError as error:
                err.print(f"[red]{error.code}[/]: ", end="")
                err.print(error.message, markup=False)
                continue
            history += [Message(role="user", content=line), Message(role="assistant", content=answer.text)]
            print_json(answer.model_dump()) if json_ else terminal.show_footer(out, answer)


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
