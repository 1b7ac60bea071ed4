"""Running the command line in this process."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from flashmoe_gen.cli import main

TINY = "--set hidden_size=64 --set intermediate_size=32 --set top_k=2"


class Runner:
    """Runs the command line in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, line: str, expect: int = 0) -> tuple[str, str]:
        """Run a line and require its exit code; return stdout and stderr."""
        self.capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(shlex.split(line))
        out, err = self.capture.readouterr()
        assert (caught.value.code or 0) == expect, err
        return out, err

    def json(self, line: str, expect: int = 0) -> Any:
        return json.loads(self(f"{line} --json", expect)[0])
