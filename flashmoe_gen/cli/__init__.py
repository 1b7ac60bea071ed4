"""The command line ``flashmoe-gen``: one file per command, put together here."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from .. import __version__, env
from .. import compile as compile_room
from ..errors import FlashMoEError, SpecError
from . import bench, cache, console, demo, generate, info, interrupt, trace

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
_INTERRUPTED = 130
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}  # what writing to stdout may end with
_LAST_S = 1.0  # for threads to end, before the process leaves without them


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashmoe_gen {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    level = "warning"
    if context.invoked_subcommand != "info":  # that one shows which settings are not valid
        env.validate()
        level = env.log_level()
    logger = logging.getLogger("flashmoe_gen")
    logger.setLevel(level.upper())
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        logger.addHandler(RichHandler(console=Console(stderr=True), show_time=False, show_path=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave with its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Args:
        arguments: words after the program's name; default: those of this process.
    """
    command = _Command(list(sys.argv[1:] if arguments is None else arguments), own_process=arguments is None)
    try:
        with interrupt.answered(command.leave):
            code = command.run()
            command.end(code)
    except KeyboardInterrupt:
        code = command.interrupted()
    sys.exit(code)


class _Command:
    """One run of the command line."""

    def __init__(self, words: list[str], *, own_process: bool) -> None:
        self._words = words
        self._own_process = own_process
        self._reporting = threading.Lock()
        self._others = set(threading.enumerate())
        console.start()

    def run(self) -> int:
        """Its exit code, once all it has to say is said."""
        try:
            _open_streams()
            code = int(app(self._words, prog_name="flashmoe-gen", standalone_mode=False) or 0)
            sys.stdout.flush()
            return self.interrupted() if code == _INTERRUPTED else code  # what typer makes of KeyboardInterrupt
        except FlashMoEError as error:
            return self._fail(str(error), type(error).__name__, 2 if isinstance(error, SpecError) else 1)
        except _USAGE as error:
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            return self._fail(f"{message.rstrip('.')}. See flashmoe-gen --help.", "UsageError", 2) if message else 2
        except (KeyboardInterrupt, typer.Abort):
            return self.interrupted()
        except BrokenPipeError:  # whoever read the output has seen enough
            return _give_up_stdout()
        except MemoryError:
            return self._fail(f"There is no memory left{_while()}.", "MemoryError", 1)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.filename is not None:
                message = f"{error.filename}: {reason}{_while()}."
            else:
                message = f"The output cannot be written: {reason}." if error.errno in _FULL else f"{reason}{_while()}."
            return self._fail(message, type(error).__name__, 1)

    def interrupted(self) -> int:
        """Report Ctrl-C."""
        return self._fail(f"Interrupted{_while()}.", "Interrupted", _INTERRUPTED)

    def end(self, code: int) -> None:
        """After an error or Ctrl-C compilers may still run: stop those that can be, and leave without waiting for the others."""
        if code == 0:
            return
        compile_room.terminate_running()
        ended = interrupt.join_workers(_LAST_S, self._others)
        if not ended or (code == _INTERRUPTED and self._own_process):  # Python's own end would hear another Ctrl-C
            with suppress(OSError, ValueError):
                sys.stderr.flush()
            os._exit(code)

    def leave(self) -> None:
        """Report Ctrl-C and end the process, from another thread than the one that does not."""
        try:
            console.show_cursor()
            self.interrupted()
            compile_room.terminate_running()
        finally:
            os._exit(_INTERRUPTED)

    def _fail(self, message: str, kind: str, code: int) -> int:
        if not self._reporting.acquire(blocking=False):
            return code  # it is being said
        with suppress(OSError, ValueError):
            console.complain(message)
        try:
            if "--json" in self._words:
                console.print_json({"error": {"type": kind, "message": message, "exit_code": code}})
            sys.stdout.flush()
        except OSError:
            _give_up_stdout()
        return code


def _while() -> str:
    what = console.doing()
    return f" while {what}" if what else ""


def _open_streams() -> None:
    """Standard streams that can be written to: a shell may have closed them, and text may hold what they cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _give_up_stdout() -> int:
    """Nothing more can be written there: Python would try again at its end, and complain."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    return 1
