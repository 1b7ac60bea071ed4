"""``compile`` and ``cache``: all that a layer needs, one failure at a time, and what is there afterwards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import TINY, Runner

import flashmoe_gen as fmg
from flashmoe_gen import compile as compile_module
from flashmoe_gen.cli import build, console


def test_compile_and_cache(run: Runner, own_cache: Path) -> None:
    out, err = run(f"compile {TINY}")
    assert "flashmoe_layer_bf16_gated_silu_h64_i32_k2_host" in out and "flashmoe_launcher" in out
    assert "\x1b" not in out + err
    router, kernel, launcher = run.json(f"compile {TINY}")
    assert router["from_cache"] and kernel["from_cache"] and launcher["from_cache"] and kernel["path"] in out
    assert [built["kind"] for built in (router, kernel, launcher)] == ["router", "moe", "program"]
    assert kernel["digest"] == fmg.generate(fmg.MoESpec(64, 32, 2, 2, max_tokens=1), arch="host").digest

    assert run("cache path")[0] == f"{own_cache}\n" and run.json("cache path") == {"path": str(own_cache)}
    entries = run.json("cache list")
    assert {entry["name"] for entry in entries} == {router["name"], kernel["name"], "flashmoe_launcher"}
    assert kernel["name"] in run("cache list")[0]
    assert run.json("cache clear") == {"removed": 3, "path": str(own_cache)}
    assert "0 kernels" in run("cache list")[0] and "0 kernels removed" in run("cache clear")[0]


def use(layer: fmg.MoELayer) -> None:
    """Look up all that a layer needs."""
    spec = layer.spec
    random = np.random.default_rng(0).standard_normal

    def array(*shape: int) -> Any:
        return random(shape).astype(spec.element.numpy)

    experts, hidden, inner = spec.num_experts, spec.hidden_size, spec.intermediate_size
    x = array(3, hidden)
    ids, weights = layer.route(x, array(experts, hidden))
    matrices = {"gate": array(experts, inner, hidden), "up": array(experts, inner, hidden), "down": array(experts, hidden, inner)}
    assert np.isfinite(layer(x, ids, weights, fmg.Experts(**matrices)).astype(np.float32)).all()


def test_compile_builds_all_that_a_layer_needs(run: Runner, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(f"compile {TINY}")
    monkeypatch.setenv("FLASHMOE_NO_JIT", "1")
    with fmg.MoELayer(fmg.MoESpec(64, 32, 4, 2, max_tokens=3), target="host") as layer:
        use(layer)


def test_one_architecture_fails_alone(run: Runner, own_cache: Path) -> None:
    """The others are compiled."""
    line = f"compile {TINY} --set program=wgmma --arch host --arch sm_80"
    out, err = run(line, 1)
    assert err.count("error: host: program='wgmma' is not supported for bfloat16 on 'host'") == 1
    assert "flashmoe_launcher" in out and "flashmoe_router" in out
    failed = [(built["arch"], built["kind"]) for built in run.json(line, 1) if "error" in built and built["kind"] == "moe"]
    assert failed == [("host", "moe"), ("sm_80", "moe")]
    assert "Must be" in run(f"compile {TINY} --arch all --set stages=1", 2)[1], "wrong whatever the machine"


def test_kernel_restricts_what_compile_builds(run: Runner, own_cache: Path) -> None:
    for kind in ("router", "moe"):
        assert [built["kind"] for built in run.json(f"compile {TINY} --kernel {kind}")] == [kind, "program"]
    assert [built["name"] for built in run.json("compile")] == ["flashmoe_launcher"]


def test_the_commands_that_no_jit_names_build_what_is_missing(
    run: Runner, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fmg.MoESpec(64, 32, 4, 2, max_tokens=3)
    for _ in range(5):
        monkeypatch.setenv("FLASHMOE_NO_JIT", "1")
        try:
            with fmg.MoELayer(spec, target="host") as layer:
                use(layer)
            break
        except fmg.CacheError as error:
            command = str(error).partition("Build it with: ")[2]
        monkeypatch.delenv("FLASHMOE_NO_JIT")
        run(command.removeprefix("flashmoe-gen "))
    else:
        pytest.fail("the commands do not build what the layer needs")


def test_compile_without_a_compiler(run: Runner, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compile_module.importlib.util, "find_spec", lambda name: None)
    assert run(f"compile {TINY}", 1)[1].count("No C++ compiler found") == 1, "each error once, with all it is about"
    results = run.json(f"compile {TINY}", 1)
    assert [result["error"]["type"] for result in results] == ["CompileError"] * 3


def test_a_compiler_that_is_slow_at_first_use(run: Runner, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "slow_first_use", lambda command: "it builds its own libraries")
    monkeypatch.setattr(console, "_STILL_S", 0.01)
    assert re.search(r"still compiling the .* for host.*, 0 s \(it builds its own libraries\)", run(f"compile {TINY}")[1])
