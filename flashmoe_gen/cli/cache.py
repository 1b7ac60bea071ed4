"""``cache list``, ``cache clear`` and ``cache path``: the compiled kernels on this machine."""

from __future__ import annotations

import dataclasses
import time

import typer

from ..cache import Cache
from . import console
from .console import JsonFlag

app = typer.Typer(help="Look at the compiled kernels on this machine, or remove them.", no_args_is_help=True)


@app.command("list")
def list_command(json_: JsonFlag = False) -> None:
    """List the compiled kernels."""
    cache = Cache()
    entries = cache.entries()
    if json_:
        console.print_json([dataclasses.asdict(entry) for entry in entries])
        return
    total = sum(entry.size_bytes for entry in entries)
    rows = [
        (entry.name, entry.arch, console.size(entry.size_bytes), f"{entry.seconds:.1f} s", _age(entry.created))
        for entry in entries
    ]
    if rows:
        console.table("", ["kernel", "arch", "image", "compiled in", "age"], rows, left=2)
    console.say(f"{len(entries)} kernels, {console.size(total)} in {cache.path}")


@app.command("clear")
def clear_command(json_: JsonFlag = False) -> None:
    """Remove all compiled kernels; what is loaded keeps working."""
    cache = Cache()
    removed = cache.clear()
    if json_:
        console.print_json({"removed": removed, "path": cache.path})
    else:
        console.say(f"{removed} kernels removed from {cache.path}")


@app.command("path")
def path_command(json_: JsonFlag = False) -> None:
    """Print the folder of the cache (FLASHMOE_CACHE_DIR)."""
    path = Cache().path
    if json_:
        console.print_json({"path": path})
    else:
        typer.echo(path)


def _age(created: float) -> str:
    seconds = max(0.0, time.time() - created)
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
