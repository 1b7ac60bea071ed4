"""Rendering: the same text everywhere, from what it should depend on and from nothing else."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flashmoe_gen as fmg
from flashmoe_gen import programs
from flashmoe_gen.arch import ARCHS
from flashmoe_gen.dtypes import DTYPES
from flashmoe_gen.render import environment, template_dir

BASE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 128, "num_experts": 8, "top_k": 2, "max_tokens": 64}


def spec(**changes: Any) -> fmg.MoESpec:
    return fmg.MoESpec(**{**BASE, **changes})


@pytest.mark.parametrize("kernel", ["moe", "router"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_fresh_process_renders_the_same_bytes(arch: str, kernel: Any) -> None:
    code = (
        "import flashmoe_gen as fmg, sys; "
        f"print(fmg.generate(fmg.MoESpec(**{BASE!r}), arch={arch!r}, kernel={kernel!r}).digest)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fmg.generate(spec(), arch=arch, kernel=kernel).digest


@pytest.mark.parametrize("kernel", ["moe", "router"])
@pytest.mark.parametrize("arch", ["host", "sm_80", "sm_90a"])
def test_launch_arguments_do_not_change_the_text(arch: str, kernel: Any) -> None:
    text = fmg.generate(spec(), arch=arch, kernel=kernel).text
    for change in (
        {"max_tokens": 4096},
        {"world_size": 4},
        {"num_experts": 200},
        {"capacity": 7},
        {"batch_invariant": True},
        {"num_experts": 64, "num_groups": 8, "top_groups": 4},
    ):
        assert fmg.generate(spec(**change), arch=arch, kernel=kernel).text == text, change


CHANGES = {
    "moe": [
        {"hidden_size": 512}, {"intermediate_size": 256}, {"top_k": 3}, {"dtype": "float16"}, {"mlp": "vanilla"},
        {"activation": "relu"}, {"bias": True}, {"swish_alpha": 0.5}, {"swish_beta": 1.5}, {"gate_limit": 7.0},
        {"up_offset": 1.0}, {"weight_on": "input"},
    ],
    "router": [
        {"hidden_size": 512}, {"top_k": 3}, {"dtype": "float16"}, {"scoring": "sigmoid"}, {"renormalize": False},
        {"group_score": "top2_sum"}, {"routed_scale": 2.5},
    ],
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["moe", "router"])
@pytest.mark.parametrize("arch", ["host", "sm_90a"])
def test_every_parameter_changes_name_and_digest(arch: str, kernel: Any) -> None:
    sources = [fmg.generate(spec(**change), arch=arch, kernel=kernel) for change in [{}, *CHANGES[kernel]]]
    assert len({source.name for source in sources}) == len(sources)
    assert len({source.digest for source in sources}) == len(sources)


@pytest.mark.parametrize("arch", ["host", "sm_90a"])
def test_only_whether_there_is_an_instrument_changes_the_text(arch: str) -> None:
    def text(**numbers: int) -> str:
        return fmg.generate(spec(), arch=arch, instrument=fmg.Instrument(**numbers)).text

    assert text() == fmg.generate(spec(), arch=arch).text
    assert text(trace_events=7) == text(trace_events=8)
    assert text(delay_ns=7) == text(delay_ns=8)
    assert len({text(), text(trace_events=1), text(delay_ns=1), text(trace_events=1, delay_ns=1)}) == 4


def test_the_tile_is_part_of_the_kernel() -> None:
    tile = fmg.default_tile(spec(), "host")
    tiles = [tile, tile.replace(block_m=8), tile.replace(block_n=32)]
    assert len({fmg.generate(spec(), arch="host", tile=t).name for t in tiles}) == len(tiles)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", ["moe", "router"])
def test_a_kernel_is_one_readable_text(arch: str, kernel: Any) -> None:
    source = fmg.generate(spec(), arch=arch, kernel=kernel)
    assert re.fullmatch(r"flashmoe_(layer|router)_[a-z0-9_]+_[0-9a-f]{8}", source.name)
    assert source.text.startswith(f"// {source.name}\n")
    assert "// Spec\n" in source.text and "// Reproduce\n" in source.text
    assert not re.search(r"\$\{|/\*%|^\s*//%|#include \"", source.text, re.MULTILINE), "left-over template syntax"
    assert str(template_dir()) not in source.text
    parts = re.findall(r'^#line \d+ "(.+)"$', source.text, re.MULTILINE)
    assert len(parts) == len(set(parts)) and all((template_dir() / part).is_file() for part in parts)
    assert source.text.count(f"{source.name}(") == 1
    widest = max(len(line) for line in source.text.splitlines() if not line.startswith("//   flashmoe-gen"))
    assert widest <= 132


def kernels() -> Iterator[tuple[str, Any]]:
    """Every kind of kernel, block program, arch and dtype."""
    for arch, dtype in itertools.product(ARCHS, DTYPES):
        yield f"router {arch} {dtype}", fmg.generate(spec(dtype=dtype), arch=arch, kernel="router")
        for name in programs.names():
            if programs.get(name).runs(spec(dtype=dtype), ARCHS[arch]):
                maths: tuple[Any, ...] = (None, "ffma") if dtype == "float32" else (None,)
                for math, bias in itertools.product(maths, (False, True)):
                    some = spec(dtype=dtype, bias=bias, mlp="vanilla" if bias else "gated")
                    tile = fmg.default_tile(some, arch, name).replace(math=math)
                    for events in (0, 1):
                        label = f"{name} {arch} {dtype} {math} bias={bias} events={events}"
                        yield label, fmg.generate(some, arch=arch, tile=tile, instrument=fmg.Instrument(trace_events=events))


def test_a_text_holds_the_wrappers_it_names_and_no_other() -> None:
    seen: set[str] = set()
    for label, source in kernels():
        code = re.sub(r"//.*", "", source.text)
        library = re.findall(r'#line \d+ "gpu/ptx/.+"\n((?:(?!#line \d+ ").*\n)*)', source.text)
        defined = Counter(re.findall(r"^DEVICE \w+(?: \w+)?[ *]+?(\w+)\(", re.sub(r"//.*", "", "".join(library)), re.MULTILINE))
        assert bool(defined) == (source.arch != "host")
        for name, count in defined.items():
            assert len(re.findall(rf"\b{name}\b", code)) > count, f"{label}: {name} is not used"
        seen |= set(defined)
    texts = [path.read_text() for path in (template_dir() / "gpu/ptx").iterdir()]
    assert seen == {name for text in texts for name in re.findall(r"^DEVICE \w+(?: \w+)? (\w+)\(", text, re.MULTILINE)}


def test_every_template_is_used() -> None:
    used = {part for arch in ARCHS for part in programs.router_program(arch).parts}
    used |= {part for name in programs.names() for part in programs.get(name).parts}
    used |= {"host/launcher.cpp", "host/explorer.cpp", "gpu/narrow_ids.cu", "gpu/count_ids.cu"}
    there = {str(path.relative_to(template_dir())) for path in template_dir().rglob("*") if path.is_file()}
    assert used == there


def test_an_undefined_name_in_a_template_is_an_error() -> None:
    with pytest.raises(Exception, match="undefined"):
        environment().from_string("${nothing}").render()


def test_write(tmp_path: Path) -> None:
    source = fmg.generate(spec(), arch="sm_90a")
    assert source.write(tmp_path) == tmp_path / f"{source.name}.cu"
    assert source.write(tmp_path / "mine.cu").read_text() == source.text
    assert fmg.generate(spec(), arch="host").write(tmp_path).suffix == ".cpp"


def test_a_copy_of_every_source_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_KEEP_SOURCE", str(tmp_path / "kept"))
    source = fmg.generate(spec(), arch="host", kernel="router")
    source.compile()
    assert (tmp_path / "kept" / f"{source.name}.cpp").read_text() == source.text


def test_a_folder_for_copies_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FLASHMOE_KEEP_SOURCE", str(tmp_path / "file"))
    with pytest.raises(fmg.CacheError, match=r"FLASHMOE_KEEP_SOURCE=.*file cannot be written"):
        fmg.generate(spec(), arch="host", kernel="router").compile()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"arch": "sm_90"}, fmg.UnsupportedError, "arch='sm_90' is not supported.*sm_90a"),
        ({"arch": "sm_70"}, fmg.UnsupportedError, "arch='sm_70' is not supported. Supported: 'host', 'sm_80'"),
        ({"arch": "host", "kernel": "gate"}, fmg.SpecError, "kernel='gate' is not valid. Must be 'moe' or 'router'."),
        ({"arch": "sm_80", "tile": fmg.TileConfig(64, 128, block_k=48, stages=2)}, fmg.SpecError, "block_k=48"),
        ({"arch": "sm_80", "tile": fmg.TileConfig(64, 128, warps_m=2, warps_n=2, stages=1)}, fmg.SpecError, "stages=1"),
        (
            {"arch": "sm_86", "tile": fmg.TileConfig(128, 256, stages=4, warps_m=2, warps_n=4)},
            fmg.UnsupportedError,
            "bytes of shared memory; sm_86 has 101376 per block",
        ),
    ],
)
def test_what_cannot_be_generated_is_refused(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fmg.generate(spec(), **arguments)
