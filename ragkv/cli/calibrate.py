"""``ragkv calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ragkv import terminal
from ragkv.cli.doors import load_documents
from ragkv.cli.options import DataDir, Device, Json, Model, Sets, dumped, err, out, print_json, read_settings
from ragkv.config import config_file


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

    settings, target = read_settings(sets, model=model, device=device, data_dir=data_dir), out_file or config_file()
    check_editable(target)
    if plot:
        check(plot)
    wish = calibration.Wish(loss, limit, tokens, read_probes(questions) if questions else None)
    loaded, rejected = load_documents(documents, settings)
    with terminal.progress(err, quiet=json_) as say:
        result = calibration.calibrate(settings, loaded, wish, say=say)
    if plot:
        draw(result, plot)
    edit(target, {**result.values, "calibration": result.calibration.model_dump()})
    if json_:
        print_json({**result.to_json(), "rejected": dumped(rejected), "written": str(target)})
    else:
        show(out, result)
        terminal.show_rejected(out, rejected)
        out.print(f"written to {target}", highlight=False)
