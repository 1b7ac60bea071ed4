"""What every command prints with: results on stdout (a table, or JSON alone), progress and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]

_PIPE_WIDTH = 120  # rich assumes 80 columns where there is no terminal, which cuts kernel names


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)


def _print(what: Table | Text | str, **options: Any) -> None:
    _console(stderr=False).print(what, **options)
    sys.stdout.flush()  # in order with progress on stderr, into a file too


def say(text: str = "") -> None:
    """Print a line of a report; rich markup is understood."""
    _print(text, soft_wrap=True)


def note(text: str) -> None:
    """Print a line about progress."""
    _console(stderr=True).print(text, soft_wrap=True, style="dim", markup=False)


def complain(message: str) -> None:
    """Print an error."""
    console = _console(stderr=True)
    console.print("[bold red]error:[/] ", end="")
    console.print(message, style="red", markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON; paths become strings."""
    typer.echo(json.dumps(value, indent=2, default=_jsonable))


def _jsonable(value: object) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, left: int = 1) -> None:
    """Print a table whose first ``left`` columns are aligned to the left, the others to the right."""
    if title:
        _print(Text(title, "bold"))
    view = Table(header_style="bold cyan", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        view.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        view.add_row(*map(_text, row))
    _print(view)


def pairs(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, a line each; long values are not broken, so that a path can be copied."""
    listed = list(rows)
    width = max(len(name) for name, _ in listed)
    if title:
        _print(Text(title, "bold"), soft_wrap=True)
    for name, value in listed:
        _print(Text.assemble((f"{name:<{width}}  ", "cyan"), _text(value)), soft_wrap=True)


def _text(value: object) -> Text:
    """Free of markup: a message may hold brackets."""
    return value if isinstance(value, Text) else Text(str(value))


@contextmanager
def step(text: str) -> Iterator[None]:
    """Show what is going on: a spinner on a terminal, a plain line elsewhere."""
    console = _console(stderr=True)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        note(f"{text} ...")
        yield


@contextmanager
def progress(text: str, total: int) -> Iterator[Callable[[str], None]]:
    """Count ``total`` things: a bar on a terminal, a line for each elsewhere. Yields what to call when one is done."""
    console = _console(stderr=True)
    if not console.is_terminal:
        yield note
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(text, total=total)

        def done(what: str) -> None:
            bar.console.print(what, style="dim", markup=False)
            bar.advance(task)

        yield done


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
