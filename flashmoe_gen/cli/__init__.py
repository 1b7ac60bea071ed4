"""The command line ``flashmoe-gen``: one file per command, put together here."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from .. import __version__, env
from ..errors import FlashMoEError, SpecError
from . import bench, cache, demo, generate, info, trace
from .console import complain, print_json

app = typer.Typer(
    name="flashmoe-gen",
    help="Generate, compile and run fused Mixture-of-Experts layers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo.demo)
app.command("generate")(generate.generate_command)
app.command("compile")(generate.compile_command)
app.command()(bench.bench)
app.command()(trace.trace)
app.add_typer(cache.app, name="cache")
app.command()(info.info)

_USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # UsageError: typer does not export it


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashmoe_gen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    logger = logging.getLogger("flashmoe_gen")
    logger.setLevel(env.log_level().upper())
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        logger.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0 done, 1 failed, 2 wrong usage.

    Args:
        arguments: words after the program's name; default: those of this process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        sys.exit(app(words, prog_name="flashmoe-gen", standalone_mode=False))
    except FlashMoEError as error:
        sys.exit(_fail(words, str(error), type(error).__name__, 2 if isinstance(error, SpecError) else 1))
    except _USAGE as error:
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        sys.exit(_fail(words, f"{message.rstrip('.')}. See flashmoe-gen --help.", "UsageError", 2) if message else 2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail(words, "Interrupted.", "Interrupted", 130))


def _fail(words: list[str], message: str, kind: str, code: int) -> int:
    if "--json" in words:
        print_json({"error": {"type": kind, "message": message, "exit_code": code}})
    complain(message)
    return code
