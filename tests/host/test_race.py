"""ThreadSanitizer watches the whole protocol with real threads: several ranks, both combine modes, changing counts."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from race import Bundle, build
from scenarios import Scenario

from flashmoe_gen import KernelSource, generate

COUNTS = [[7, 0, 33, 1, 16, 40], [0, 20, 1, 17, 5, 40], [40, 0, 0, 9, 2, 40]]


def scenario(combine: str) -> Scenario:
    return Scenario(3, combine=combine, counts=COUNTS, slots=[[3, 1], [], [4, 2, 0]], processors=3, ring=3)


def source_of(case: Scenario) -> KernelSource:
    world, _ = case.worlds[0]
    return generate(world.spec, arch="host", tile=world.layers[0].tile)


def thread_sanitizer_works(folder: Path) -> bool:
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}\n")
    try:
        subprocess.run(["g++", "-fsanitize=thread", str(probe), "-o", str(folder / "probe")], check=True, capture_output=True)
        subprocess.run([str(folder / "probe")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("race")
    if not thread_sanitizer_works(made):
        pytest.skip("g++ with a working ThreadSanitizer is not on this machine")
    return made


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    return build(source_of(scenario("route")), folder)


def run(program: Path, bundle: Bundle, folder: Path, repeats: int) -> subprocess.CompletedProcess[str]:
    bundle.write(folder / "bundle")
    arguments = [str(program), str(folder / "bundle"), str(folder / "result"), str(repeats)]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("combine", ["route", "rank"])
def test_no_data_race(program: Path, folder: Path, combine: str) -> None:
    case = scenario(combine)
    bundle = Bundle(case)
    done = run(program, bundle, folder, repeats=30)
    assert "ThreadSanitizer" not in done.stderr, done.stderr[:6000]
    assert done.returncode == 0, done.stderr
    bundle.read_back(folder / "result")
    assert case.wrong() is None


def test_a_planted_race_is_reported(folder: Path) -> None:
    case = scenario("route")
    source = source_of(case)
    old = "std::atomic_ref<u32>(*word).fetch_or(bits, std::memory_order_release);"  # publishes a GEMM1 tile
    assert source.text.count(old) == 1
    text = source.text.replace(old, old.replace("release", "relaxed"))
    where = folder / "planted"
    where.mkdir()
    planted = KernelSource(text, source.name, source.arch, "planted", source.kind, {})
    done = run(build(planted, where), Bundle(case), folder, repeats=30)
    assert "WARNING: ThreadSanitizer: data race" in done.stderr
