"""What every command prints with: results on stdout (a table, or JSON alone), progress and errors on stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]

_PIPE_WIDTH = 120  # rich assumes 80 columns where there is no terminal
_STILL_S = 10.0  # where there is no terminal to show a clock on: how often a slow step says that it is not over


def _console(stderr: bool, at_least: int = 0) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    console = Console(stderr=stderr, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)
    if console.width < at_least:
        console.width = at_least
    return console


def _print(what: Table | Text | str, at_least: int = 0, **options: Any) -> None:
    _console(stderr=False, at_least=at_least).print(what, **options)
    sys.stdout.flush()  # in order with progress on stderr, into a file too


def say(text: str = "") -> None:
    """Print a line of a report; rich markup is understood."""
    _print(text, soft_wrap=True)


def note(text: str) -> None:
    """Print a line about progress; nobody needs to read it."""
    with suppress(OSError):
        _console(stderr=True).print(text, soft_wrap=True, style="dim", markup=False)


def complain(message: str) -> None:
    """Print an error."""
    console = _console(stderr=True)
    console.print("[bold red]error:[/] ", end="")
    console.print(message, style="red", markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print a value as JSON; paths become strings, and numbers that JSON does not have (NaN, infinity) null."""
    typer.echo(json.dumps(_plain(value), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[object]], *, left: int = 1) -> None:
    """Print a table whose first ``left`` columns are aligned to the left, the others to the right.

    No name or number is ever broken: a terminal that is too narrow gets one cell a line instead.
    """
    if title:
        _print(Text(title, "bold"), soft_wrap=True)
    names, cells = list(columns), [[_text(value) for value in row] for row in rows]
    view = Table(header_style="bold cyan", box=None, pad_edge=False)
    for index, name in enumerate(names):
        view.add_column(name, justify="left" if index < left else "right", no_wrap=True)
    for row in cells:
        view.add_row(*row)
    console = _console(stderr=False)
    width = Measurement.get(console, console.options.update(max_width=10_000), view).maximum
    if width <= console.width or not console.is_terminal:
        _print(view, at_least=width)
        return
    for number, row in enumerate(cells):
        if number:
            say()
        pairs("", [(name, value) for name, value in zip(names, row) if name or value.plain])


def pairs(title: str, rows: Iterable[tuple[str, object]]) -> None:
    """Print names and values, a line each; long values are not broken, so that a path can be copied."""
    listed = list(rows)
    width = max((len(name) for name, _ in listed), default=0)
    if title:
        _print(Text(title, "bold"), soft_wrap=True)
    for name, value in listed:
        _print(Text.assemble((f"{name:<{width}}  ", "cyan"), _text(value)), soft_wrap=True)


def _text(value: object) -> Text:
    """Free of markup: a message may hold brackets."""
    return value if isinstance(value, Text) else Text(str(value))


def _idle() -> str:
    return ""


_doing: Callable[[], str] = _idle


def doing() -> str:
    """What is going on, in words; after an error or Ctrl-C: what it came into. Empty: nothing."""
    return _doing()


def start() -> None:
    """Forget what an earlier command of this process was doing."""
    global _doing
    _doing = _idle


@contextmanager
def _noted(text: Callable[[], str]) -> Iterator[None]:
    """Remember what is going on. An exception leaves it as it is: whoever reports it asks :func:`doing`."""
    global _doing
    before, _doing = _doing, text
    yield
    _doing = before


@contextmanager
def step(text: str) -> Iterator[None]:
    """Show what is going on: a spinner and a clock on a terminal; a plain line elsewhere, and more if it takes long."""
    with _noted(lambda: text), _bar(SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()) as bar:
        if bar is not None:
            bar.add_task(text, total=None)
            yield
        else:
            note(f"{text} ...")
            with _repeated(lambda: text):
                yield


class Tally:
    """Things that are done several at a time, by name; :func:`progress` makes it.

    Attributes:
        done: call it with a line to print whenever one of them is done.
        hint: why it may take long.
    """

    hint = ""

    def __init__(self, verb: str, done: Callable[[str], None]) -> None:
        self.done = done
        self._verb = verb
        self._running: list[str] = []

    @contextmanager
    def working_on(self, name: str) -> Iterator[None]:
        """Say that this one is being done, from any thread."""
        self._running.append(name)
        try:
            yield
        finally:
            self._running.remove(name)

    def __str__(self) -> str:
        return f"{self._verb} {', '.join(self._running)}".strip()


@contextmanager
def progress(verb: str, total: int) -> Iterator[Tally]:
    """Count ``total`` things: a bar on a terminal; elsewhere a line for each, and more if one takes long."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _bar(*columns) as bar:
        if bar is None:
            tally = Tally(verb, note)
            note(f"{verb} ...")
            with _noted(lambda: str(tally)), _repeated(lambda: str(tally), lambda: tally.hint):
                yield tally
            return
        task = bar.add_task(verb, total=total)

        def done(line: str) -> None:
            bar.console.print(line, style="dim", markup=False, soft_wrap=True)
            bar.advance(task)

        tally = Tally(verb, done)
        with _noted(lambda: str(tally)):
            yield tally


@contextmanager
def _bar(*columns: Any) -> Iterator[Progress | None]:
    """A live display, where there is a terminal that can show one."""
    console = _console(stderr=True)
    if not console.is_terminal or console.is_dumb_terminal:
        yield None
        return
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar


@contextmanager
def _repeated(text: Callable[[], str], hint: Callable[[], str] = _idle) -> Iterator[None]:
    """Say now and then that this is still going on, and for how long."""
    over, begin = threading.Event(), time.monotonic()

    def tick() -> None:
        while not over.wait(_STILL_S):
            note(f"still {text()}, {time.monotonic() - begin:.0f} s{f' ({hint()})' if hint() else ''}")

    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def show_cursor() -> None:
    """Give a terminal its cursor back, which a live display hides: for those who leave without ending it."""
    console = _console(stderr=True)
    if console.is_terminal:
        console.show_cursor(True)


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
