"""Commands that fill a model look at the memory first: all that they take, all limits there are, and again before they take it."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import flashmoe_gen as fmg
from flashmoe_gen.cli import main, memory, problem
from flashmoe_gen.launch.host import HostTarget

GIB = 1 << 30


def require(spec: fmg.MoESpec, trace_events: int = 0, held: int = 0) -> None:
    tile = fmg.default_tile(spec, "host")
    problem.require_memory(spec, tile, fmg.Schedule(), HostTarget(), trace_events=trace_events, held=held)  # type: ignore[arg-type]


def free(monkeypatch: pytest.MonkeyPatch, *amounts: int) -> None:
    """What is free: the first amount at the first look, and the last one from then on."""
    left = list(amounts)
    monkeypatch.setattr(problem, "available_bytes", lambda: left.pop(0) if len(left) > 1 else left[0])


DEMO = """
import re, shlex, sys
from flashmoe_gen.cli import main, problem
asked, look = [], problem._require
def spy(spec, needed, available, what):
    asked.append(needed + needed // problem._SPARE_PART + problem._SPARE_BYTES)
    look(spec, needed, available, what)
problem._require = spy
try:
    main(shlex.split(sys.argv[1]))
finally:
    peak = re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]  # ru_maxrss would begin with the parent's
    print(asked[0], 1024 * int(peak), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "options", ["--experts 16 --tokens 100", "--experts 8 --tokens 300 --ranks 4", "--experts 64 --tokens 1"]
)
def test_the_demo_asks_for_what_it_takes(options: str) -> None:
    line = f"demo --set hidden_size=1024 --set intermediate_size=512 {options} --json"
    done = subprocess.run([sys.executable, "-c", DEMO, line], capture_output=True, text=True, check=True)
    asked, taken = map(int, done.stderr.split()[-2:])
    assert taken <= asked


def test_a_model_that_just_fits_is_refused() -> None:
    """The weights alone fit in what is free, and so do 512 MiB beside them."""
    spec = fmg.MoESpec.preset("deepseek-v3", max_tokens=64, world_size=2)
    weights = problem.weight_bytes(spec)
    with pytest.MonkeyPatch.context() as patch:
        free(patch, weights + (512 << 20))
        with pytest.raises(
            fmg.FlashMoEError, match=r"This needs 2\d\.\d\d GiB of memory, of which 21\.00 .* Try --experts \d+"
        ):
            require(spec)
        free(patch, weights + weights // 8)
        require(spec)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "qwen3-30b-a3b", "llama4-scout"])
@pytest.mark.parametrize("amount", [20 * GIB, 7 * GIB, 3 * GIB])
def test_the_advice_fits(name: str, amount: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many experts as it names are a model (whole groups of them), and there is memory for it."""
    spec = fmg.MoESpec.preset(name, max_tokens=64)
    if problem.weight_bytes(spec) < amount:
        spec = fmg.MoESpec.preset(name, max_tokens=64, intermediate_size=spec.intermediate_size * 64)
    free(monkeypatch, amount)
    with pytest.raises(fmg.FlashMoEError) as caught:
        require(spec)
    advice = re.search(r"Try --experts (\d+)\.", str(caught.value))
    assert advice or "Try a smaller model." in str(caught.value)
    if advice:
        require(spec.replace(num_experts=int(advice[1])))


def test_what_else_may_be_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = fmg.MoESpec(64, 64, 8, 2, max_tokens=4)
    free(monkeypatch, GIB)
    require(spec, trace_events=2000)
    with pytest.raises(fmg.FlashMoEError, match=r"Try fewer --tokens\."):
        require(spec.replace(max_tokens=1 << 23))
    with pytest.raises(fmg.FlashMoEError, match="This needs"):
        require(spec, trace_events=1 << 24)
    free(monkeypatch, 1 << 20)
    with pytest.raises(fmg.FlashMoEError, match="This needs"):
        require(spec)
    require(spec, held=GIB)


@pytest.mark.parametrize("command", ["demo", "trace --target host"])
@pytest.mark.parametrize("looks", [(GIB,), (64 * GIB, GIB)])
def test_commands_look_before_they_take(
    command: str,
    looks: tuple[int, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    free(monkeypatch, *looks)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(problem, "run_all", lambda *_: pytest.fail("weights are made"))
    with pytest.raises(SystemExit) as caught:
        main(
            f"{command} --set hidden_size=256 --set intermediate_size=65536 --set top_k=2 --experts 16 --tokens 2".split()
        )
    err = capsys.readouterr().err
    assert caught.value.code == 1 and re.search(r"1\.00 GiB are free\. Try --experts \d\.", err)
    assert ("compiling" in err) == (len(looks) > 1) and not list(tmp_path.iterdir())


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def version_2(root: Path, group: Path, limit: object, used: int, cache: int) -> None:
    write(root / "proc/self/cgroup", f"0::/{group}")
    write(root / "cgroup" / group / "memory.max", limit)
    write(root / "cgroup" / group / "memory.current", used)
    write(root / "cgroup" / group / "memory.stat", f"anon 7\ninactive_file {cache}")


def version_1(root: Path, group: Path, limit: object, used: int, cache: int) -> None:
    write(root / "proc/self/cgroup", f"5:cpu:/other\n4:memory:/{group}\n0::/")
    write(root / "cgroup/memory" / group / "memory.limit_in_bytes", limit)
    write(root / "cgroup/memory" / group / "memory.usage_in_bytes", used)
    write(root / "cgroup/memory" / group / "memory.stat", f"inactive_file 5\ntotal_inactive_file {cache}")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One with 100 GiB to give."""
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path / "cgroup")
    write(tmp_path / "proc/meminfo", f"MemTotal: {200 << 20} kB\nMemAvailable: {100 << 20} kB")
    return tmp_path


@pytest.mark.parametrize("version", [version_1, version_2])
@pytest.mark.parametrize("group", ["", "a", "a/b/c"])
def test_the_limit_of_a_control_group(version: Callable[..., None], group: str, machine: Path) -> None:
    version(machine, Path(group), 10 * GIB, 4 * GIB, GIB)
    assert memory.available_bytes() == 7 * GIB
    version(machine, Path(group), "max" if version is version_2 else 2**63 - 4096, 4 * GIB, GIB)
    assert memory.available_bytes() == 100 * GIB


@pytest.mark.parametrize("version", [version_1, version_2])
def test_the_limit_of_a_group_around_it(version: Callable[..., None], machine: Path) -> None:
    version(machine, Path("a"), 8 * GIB, 5 * GIB, 0)
    version(machine, Path("a/b"), 50 * GIB, 1 * GIB, 0)
    assert memory.available_bytes() == 3 * GIB


def test_the_limit_of_the_shell(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(machine / "proc/self/statm", f"{2 * GIB // resource.getpagesize()} 1 1")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (5 * GIB, 5 * GIB))
    assert memory.available_bytes() == 3 * GIB


def test_where_nothing_tells(machine: Path) -> None:
    assert memory.available_bytes() == 100 * GIB
    (machine / "proc/meminfo").unlink()
    assert memory.available_bytes() is None
