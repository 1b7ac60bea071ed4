"""A block program from outside the package: a class and a folder of templates, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner
from world import Problem, bits, routes

import flashmoe_gen as fmg
from flashmoe_gen import programs
from flashmoe_gen.cli import app
from flashmoe_gen.programs.host import HostProgram
from flashmoe_gen.render import template_dir

SPEC = fmg.MoESpec(64, 48, 6, 2, max_tokens=40)


@pytest.fixture
def twin(tmp_path: Path) -> Iterator[str]:
    """The host program, copied under another name."""
    shutil.copytree(template_dir() / "host", tmp_path / "twin")

    class Twin(HostProgram):
        name = "twin"
        parts = tuple(part.replace("host/", "twin/") for part in HostProgram.parts)
        templates = tmp_path

    programs.register(Twin())
    yield "twin"
    programs.unregister("twin")


def test_it_is_planned_rendered_and_in_the_tile_space(twin: str) -> None:
    tile = fmg.default_tile(SPEC, "host", twin)
    assert tile.program == twin and fmg.default_tile(SPEC, "host").program == "host"
    assert programs.plan_kernel(SPEC, tile, "host") == programs.plan_kernel(SPEC, tile.replace(program="host"), "host")
    source = fmg.generate(SPEC, arch="host", tile=tile)
    assert '#line 1 "twin/moe_block.h"' in source.text and '"host/' not in source.text
    assert source.metadata["tile"]["program"] == twin
    space = {candidate.tile for candidate in programs.tile_space(SPEC, "host")}
    assert tile.replace(block_m=16) in space and tile.replace(block_m=16, program="host") in space


def test_its_bits_are_those_of_what_it_copies(twin: str) -> None:
    problem = Problem(SPEC)
    x = problem.tokens(33, 1)
    ids, weights = routes(SPEC, 33, "skewed", 1)
    outputs = []
    for program in (twin, "host"):
        with fmg.MoELayer(SPEC, target="host", tile=fmg.default_tile(SPEC, "host", program)) as layer:
            outputs.append(layer(x, ids, weights, problem.experts(range(SPEC.num_experts))))
            assert program in fmg.generate(SPEC, arch="host", tile=layer.tile).text
    assert bits(outputs[0]) == bits(outputs[1])
    assert np.isfinite(outputs[0].astype(np.float32)).all()


def test_the_demo_runs_it(twin: str) -> None:
    results = []
    for program in (twin, "host"):
        words = f"demo --model qwen3-30b-a3b --experts 8 --tokens 5 --set program={program} --json"
        done = CliRunner().invoke(app, words.split())
        assert done.exit_code == 0, done.output
        results.append(json.loads(done.stdout))
    one, other = results
    assert one["passed"] and (one["tile"]["program"], other["tile"]["program"]) == (twin, "host")
    assert [rank["error"] for rank in one["ranks"]] == [rank["error"] for rank in other["ranks"]]
    assert one["kernels"][1]["digest"] != other["kernels"][1]["digest"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (None, "The template part twin/tasks.h is not in"),
        ("${nothing}", "The template part twin/tasks.h is not valid: UndefinedError: 'nothing' is undefined"),
        ("//% if", "The template part twin/tasks.h is not valid: TemplateSyntaxError"),
    ],
)
def test_a_fault_in_its_templates_names_the_part(twin: str, tmp_path: Path, fault: str | None, message: str) -> None:
    part = tmp_path / "twin" / "tasks.h"
    part.write_text(fault) if fault is not None else part.unlink()
    with pytest.raises(fmg.SpecError) as caught:
        fmg.generate(SPEC, arch="host", tile=fmg.default_tile(SPEC, "host", twin))
    assert str(caught.value).startswith(message)
