"""Block programs by name, their tile spaces, and that nobody else asks which architecture it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashmoe_gen as fmg
from flashmoe_gen import programs
from flashmoe_gen.arch import ARCHS, Arch
from flashmoe_gen.programs.host import HostProgram

SPEC = fmg.MoESpec(256, 128, 16, 4, max_tokens=64)
ROOT = Path(fmg.__file__).parent


@pytest.mark.parametrize(
    ("arch", "dtype", "program"),
    [
        ("host", "bfloat16", "host"),
        ("sm_90a", "bfloat16", "wgmma"),
        ("sm_90a", "float32", "mma"),
        ("sm_80", "bfloat16", "mma"),
    ],
)
def test_the_first_that_runs_is_the_default(arch: str, dtype: str, program: str) -> None:
    spec = SPEC.replace(dtype=dtype)
    assert programs.resolve(spec, None, arch).name == fmg.default_tile(spec, arch).program == program


def test_names_that_are_not_there() -> None:
    with pytest.raises(fmg.SpecError, match=r"program='simt' is not valid\. Must be one of 'host', 'wgmma', 'mma'"):
        fmg.generate(SPEC, arch="host", tile=fmg.TileConfig(8, 16, program="simt"))
    with pytest.raises(fmg.UnsupportedError, match=r"'wgmma' is not supported for bfloat16 on 'sm_80'\. Supported there: 'mma' or"):
        fmg.default_tile(SPEC, "sm_80", "wgmma")
    with pytest.raises(fmg.SpecError, match="registered already"):
        programs.register(programs.get("mma"))
    with pytest.raises(fmg.SpecError, match=r"program=\['mma'\] is not valid"):
        fmg.default_tile(SPEC, "sm_80", ["mma"])  # type: ignore[arg-type]
    with pytest.raises(fmg.SpecError, match="Must be one that register"):
        programs.unregister("mma")


class Mine(HostProgram):
    name = "mine"


class Nowhere(programs.BlockProgram):
    name = "nowhere"

    def default_tile(self, spec: fmg.MoESpec, arch: Arch) -> fmg.TileConfig:
        return fmg.TileConfig(8, 32)

    plan = HostProgram.plan
    tiles = HostProgram.tiles


def _named(name: Any) -> HostProgram:
    return type("Named", (HostProgram,), {"name": name})()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (Mine, "Must be an instance of a subclass of BlockProgram"),
        ("host", "Must be an instance of a subclass of BlockProgram"),
        (Nowhere(), r"Nowhere\.archs is missing"),
        *((_named(name), "Must be a word of letters, digits and underscores") for name in ("", 7, "a b", "a\nb", "None")),
    ],
)
def test_what_is_no_program_is_not_registered(program: Any, message: str) -> None:
    with pytest.raises(fmg.SpecError, match=message):
        programs.register(program)
    assert programs.names() == ["host", "wgmma", "mma"]


def test_a_program_need_not_name_itself_in_its_tiles() -> None:
    class Modest(Mine):
        def default_tile(self, spec: fmg.MoESpec, arch: Arch) -> fmg.TileConfig:
            return fmg.TileConfig(8, 32)

        def tiles(self, spec: fmg.MoESpec, arch: Arch) -> Iterator[fmg.TileConfig]:
            yield fmg.TileConfig(8, 32)

    programs.register(Modest())
    try:
        tile = fmg.default_tile(SPEC, "host", "mine")
        assert tile == fmg.TileConfig(8, 32, program="mine")
        assert [candidate.tile for candidate in programs.tile_space(SPEC, "host", "mine")] == [tile]
    finally:
        programs.unregister("mine")


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_the_tile_space_has_plans_or_reasons(arch: str, dtype: str) -> None:
    spec = SPEC.replace(dtype=dtype)
    space = programs.tile_space(spec, arch)
    tiles = [candidate.tile for candidate in space]
    assert len(tiles) == len(set(tiles)), "no tile twice"
    assert any(candidate.tile.text_fields() == fmg.default_tile(spec, arch).text_fields() for candidate in space)
    for candidate in space:
        assert (candidate.plan is None) == bool(candidate.reason)
        if candidate.plan is not None:
            assert fmg.generate(spec, arch=arch, tile=candidate.tile).arch == arch
            break
    for candidate in space:
        try:
            plan = programs.plan_kernel(spec, candidate.tile, arch)
        except fmg.FlashMoEError as error:
            assert candidate.reason == str(error)
        else:
            assert candidate.plan == plan and plan.shared_bytes <= ARCHS[arch].shared_bytes
    assert {tile.program for tile in tiles} == {
        name for name in programs.names() if programs.get(name).runs(spec, ARCHS[arch])
    }


def test_one_programs_space() -> None:
    space = programs.tile_space(SPEC, "sm_90a", "wgmma")
    assert space and {candidate.tile.program for candidate in space} == {"wgmma"}
    assert any("bytes of shared memory" in candidate.reason for candidate in space)


def test_nobody_else_asks_which_architecture_it_is() -> None:
    """An arch's properties decide; its name is for programs, which say where they run, and for launch, which meets devices."""
    found = []
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        if room in ("programs", "launch", "arch.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Compare):
                continue
            sides = [node.left, *node.comparators]
            names = {part.value for side in sides for part in ast.walk(side) if isinstance(part, ast.Constant)} & set(ARCHS)
            if names and any("arch" in ast.unparse(side) for side in sides):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert not found
    assert "is_host" not in " ".join(path.read_text() for path in ROOT.rglob("*.py"))
