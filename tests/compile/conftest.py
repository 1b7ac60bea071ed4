"""Registers, spills and what ptxas accepts are those of one compiler: the summary names it."""

from __future__ import annotations

import pytest

from flashmoe_gen import nvrtc
from flashmoe_gen.errors import CompileError


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    try:
        found = nvrtc.load()
    except CompileError as error:
        terminalreporter.write_line(f"nothing was compiled for GPUs: {error}")
    else:
        terminalreporter.write_line(f"compiled for GPUs with {found.version} ({found.build})")
