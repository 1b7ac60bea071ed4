"""The command line: exit codes, JSON alone on stdout, errors that name the fix, and commands that reproduce a kernel."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import TINY, Runner

import flashmoe_gen as fmg
from flashmoe_gen import bench as bench_room
from flashmoe_gen.cli import bench, checks, demo, problem, trace
from flashmoe_gen.launch.cuda import CudaTarget

TINY_DEMO = f"demo {TINY} --experts 8 --tokens 5 --ranks 3"


def test_help_and_version(run: Runner) -> None:
    for line in ("--help", "-h", "demo --help", "generate --help", "compile --help", "cache --help", "info --help"):
        assert "Usage: flashmoe-gen" in run(line)[0]
    assert run("--version")[0] == f"flashmoe_gen {fmg.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "flashmoe_gen", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"flashmoe_gen {fmg.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "No such command"),
        ("generate --nonsense", "No such option"),
        ("generate", "hidden_size, intermediate_size, top_k missing"),
        ("generate --kernel router", "hidden_size, top_k missing"),
        ("generate --kernel both --model olmoe-1b-7b", "Must be moe or router"),
        ("generate --model olmoe", "Did you mean 'olmoe-1b-7b'?"),
        ("generate --model olmoe-1b-7b --config x", "not valid together"),
        ("generate --config /no/such/file", "cannot be read"),
        ("generate --set hidden_size", "Must be field=value"),
        ("generate --set hiden_size=64", "Did you mean hidden_size?"),
        ("generate --model olmoe-1b-7b --set hidden_size=63", "multiple of 16 bytes"),
        ("generate --model olmoe-1b-7b --set bias=perhaps", "Must be True or False"),
        ("generate --model olmoe-1b-7b --set block_n=7", "block_n=7 is not valid"),
        ("compile --model olmoe-1b-7b --arch sm_80 --set stages=1", "stages=1 is not valid on sm_80"),
        ("demo --ranks 9", "--ranks"),
        ("demo --experts 4", "top_k=8 is not valid"),
        ("demo --target tpu", "--target tpu is not valid. Must be host or cuda."),
        ("demo --target cuda --experts 4", "top_k=8 is not valid"),
        ("demo --set max_tokens=9", "--set max_tokens=9 and --tokens 64 are not valid together. Use --tokens."),
        ("demo --ranks 2 --set world_size=3", "--set world_size=3 and --ranks 2 are not valid together"),
        ("demo --experts 16 --set num_experts=32", "--set num_experts=32 and --experts 16 are not valid together"),
        ("demo --tokens 9000000 --ranks 2", "--tokens 9000000 is not valid with 2 ranks. All together must be at most"),
        ("demo --set delay_ns=9", "--set delay_ns is not valid for demo"),
        ("trace --tokens 4 --set max_tokens=9", "--set max_tokens=9 and --tokens 4 are not valid together"),
        ("trace --events 4 --set trace_events=9", "--set trace_events=9 and --events 4 are not valid together"),
        ("generate --model olmoe-1b-7b --set top_k=2 --set top_k=4", "--set top_k=2 and --set top_k=4 are not valid together"),
        ("generate --model olmoe-1b-7b --kernel router --set block_n=64", "--set block_n is not valid with --kernel router"),
        ("compile --model olmoe-1b-7b --kernel router --set delay_ns=9", "--set delay_ns is not valid with --kernel router"),
        ("compile --kernel router", "hidden_size, top_k missing"),
        ("generate --model olmoe-1b-7b --arch sm_99", "--arch sm_99 is not valid. Must be one of host, sm_80"),
        ("compile --model olmoe-1b-7b --arch all --arch sm_90", "Did you mean sm_90a?"),
        ("generate --model olmoe-1b-7b --arch all", "--arch all is not valid for generate"),
    ],
)
def test_wrong_usage(run: Runner, line: str, message: str) -> None:
    out, err = run(line, 2)
    assert out == "" and message in err and "Traceback" not in err
    error = run.json(line, 2)["error"]
    assert message in error["message"] and error["exit_code"] == 2


@pytest.mark.parametrize(
    "line", ["generate --model olmoe-1b-7b --arch sm_70", "compile --model olmoe-1b-7b --arch sm_70"]
)
def test_failure(run: Runner, line: str) -> None:
    out, err = run(line, 1)
    assert out == "" and "'sm_70' is not supported. Supported: 'host', 'sm_80'" in err
    assert run.json(line, 1)["error"]["type"] == "UnsupportedError"


@pytest.mark.parametrize("variable", ["FLASHMOE_LOG", "FLASHMOE_TIMEOUT_S", "FLASHMOE_TARGET", "FLASHMOE_NO_JIT"])
def test_an_environment_variable_that_is_not_valid(run: Runner, variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "HostTarget", None)  # what begins the work
    monkeypatch.setenv(variable, "loud")
    for line in ("cache list", "demo", f"generate {TINY}"):
        assert f"{variable}='loud' is not valid" in run(line, 2)[1]


def test_where_the_demo_runs(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option, else the variable, else the host."""

    def chosen() -> None:
        raise fmg.UnsupportedError("a GPU was asked for")

    monkeypatch.setattr(demo, "CudaTarget", chosen)
    monkeypatch.setenv("FLASHMOE_TARGET", "cuda")
    assert "a GPU was asked for" in run(TINY_DEMO, 1)[1]
    assert run.json(f"{TINY_DEMO} --target host")["target"] == "host"
    monkeypatch.setenv("FLASHMOE_TARGET", "host")
    assert "a GPU was asked for" in run(f"{TINY_DEMO} --target cuda", 1)[1]
    assert run.json(TINY_DEMO)["target"] == "host"


def test_fields_that_change_nothing_are_named(run: Runner, own_cache: Path) -> None:
    """They are checked, but a kernel takes them at launch."""
    plain, silent = run(f"generate {TINY}")
    out, err = run(f"generate {TINY} --set max_tokens=9 --set lag=2")
    assert out == plain and not silent and "--set max_tokens, lag: no part of the text" in err
    assert "changes nothing" not in run(f"generate {TINY} --set block_n=32 --set delay_ns=5 --set dtype=float16")[1]
    assert "--set scoring: " in run(f"generate {TINY} --set scoring=sigmoid")[1], "a field of the router"
    assert "changes nothing" not in run(f"compile {TINY} --set scoring=sigmoid")[1]


def test_generate(run: Runner, tmp_path: Path) -> None:
    text = run(f"generate {TINY}")[0]
    source = fmg.generate(fmg.MoESpec(64, 32, 9, 2, max_tokens=7), arch="host")
    assert text == source.text
    found = run.json(f"generate {TINY}")
    assert (found["text"], found["digest"], found["name"]) == (source.text, source.digest, source.name)
    path = tmp_path / "new" / "kernel.cpp"
    assert run.json(f"generate {TINY} -o {path}")["path"] == str(path) and path.read_text() == source.text
    assert source.name in run(f"generate {TINY} -o {tmp_path}")[0]
    assert (tmp_path / f"{source.name}.cpp").read_text() == source.text
    assert "cannot be written" in run(f"generate {TINY} -o {path}/below.cpp", 1)[1]


def test_generate_from_a_config(run: Runner, tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    for line in ("generate --arch sm_90a", "generate --kernel router"):
        of_config = run.json(f"{line} --config {tmp_path}")
        assert of_config["digest"] == run.json(f"{line} --model qwen3-30b-a3b")["digest"]


SPECS = {
    **{
        name: fmg.MoESpec.preset(name, max_tokens=3)
        for name in ("qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3", "llama4-scout")
    },
    "vanilla": fmg.MoESpec(64, 48, 6, 3, max_tokens=9, mlp="vanilla", activation="gelu_tanh", dtype="float16"),
    "float32": fmg.MoESpec(64, 48, 6, 3, max_tokens=9, dtype="float32", swish_beta=1 / 3, capacity=2),
}


@pytest.mark.parametrize("arch", ["host", "sm_90a"])
@pytest.mark.parametrize("kernel", ["moe", "router"])
@pytest.mark.parametrize("name", SPECS)
def test_the_recorded_command_makes_the_same_text(run: Runner, name: str, kernel: Any, arch: str) -> None:
    spec = SPECS[name]
    tiles = [None, fmg.default_tile(spec, arch).replace(stages=4)] if kernel == "moe" else [None]
    for tile in tiles:
        source = fmg.generate(spec, arch=arch, kernel=kernel, tile=tile)
        command = source.metadata["command"]
        assert f"//   {command}\n" in source.text
        program, verb, *words = shlex.split(command)
        assert (program, verb) == ("flashmoe-gen", "compile")
        assert run.json(f"generate {shlex.join(words)}")["text"] == source.text


def test_info(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "soon")
    found = run.json("info")
    assert found["version"] == fmg.__version__ and found["usable"]["generating kernels"]["usable"]
    assert "is not valid" in found["environment"]["FLASHMOE_TIMEOUT_S"]["value"]
    assert found["environment"]["FLASHMOE_CACHE_DIR"]["set"]
    assert "Can be used for" in run("info")[0]


def test_demo(run: Runner) -> None:
    found = run.json(TINY_DEMO)
    assert (found["target"], found["device"]) == ("host", "cpu") and len(found["gpu_kernels"]) == 7
    assert found["passed"] and all(check["passed"] for check in found["checks"]) and len(found["checks"]) == 5
    assert [rank["tokens"] for rank in found["ranks"]] == [5, 5, 5]
    assert sum(rank["rows"] for rank in found["ranks"]) == sum(rank["routes"] for rank in found["ranks"]) == 3 * 5 * 2
    assert all(0 < rank["error"] < 5e-3 for rank in found["ranks"])
    out, err = run(TINY_DEMO)
    assert out.count("PASS") == 6 and "FAIL" not in out and "(5, 2, 0 tokens)" in out
    assert "making" in err and "\x1b" not in out + err
    command = out.partition("without a GPU: flashmoe-gen compile ")[2].partition("--arch all")[0]
    for kernel in found["gpu_kernels"]:
        assert run.json(f"generate {command} --arch {kernel['arch']}")["digest"] == kernel["digest"]


@pytest.mark.parametrize("options", ["--ranks 1", "--set capacity=1", "--set combine=rank --ranks 2", "--seed 7"])
def test_demo_variants(run: Runner, options: str) -> None:
    assert run.json(f"{TINY_DEMO} {options} --set dtype=float32")["passed"]


def test_demo_that_fails(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.BOUNDS, "bfloat16", 1e-9)
    out, _ = run(TINY_DEMO, 1)
    assert "FAIL  1 of 5 checks failed" in out
    found = run.json(TINY_DEMO, 1)
    assert not found["passed"] and [check["passed"] for check in found["checks"]] == [True, False, True, True, True]


def test_demo_on_a_gpu_without_cupy(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    out, err = run("demo --target cuda", 1)
    assert out == "" and re.search(r"needs CuPy.*`pip install ", err) and "Traceback" not in err
    assert run.json("demo --target cuda", 1)["error"]["type"] == "UnsupportedError"


@pytest.mark.parametrize(
    ("reason", "message"),
    [("cudaErrorInsufficientDriver: x", "no NVIDIA driver"), ("cudaErrorNoDevice: x", "finds no GPU")],
)
def test_demo_on_a_gpu_without_driver_or_gpu(
    run: Runner, monkeypatch: pytest.MonkeyPatch, reason: str, message: str
) -> None:
    def count() -> int:
        raise RuntimeError(reason)

    runtime = SimpleNamespace(getDeviceCount=count)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object())
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    out, err = run("demo --target cuda", 1)
    assert out == "" and message in err and "Traceback" not in err
    assert run.json("demo --target cuda", 1)["error"]["type"] == "FlashMoEError"


class Gpu:
    """What the demo asks a GPU's target before it runs anything there."""

    name, arch, device, multiprocessors, system_workers = "cuda", "sm_90a", "cuda:0", 132, 1
    reserve_multiprocessors = 0
    expected, _room = CudaTarget.expected, CudaTarget._room


def test_demo_without_gpu_memory(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "CudaTarget", Gpu)
    monkeypatch.setattr(demo, "device_name", lambda: "a GPU")
    monkeypatch.setattr(problem, "available_bytes", lambda: 64 << 30)
    weights = problem.weight_bytes(fmg.MoESpec.preset("qwen3-30b-a3b", max_tokens=64))
    monkeypatch.setattr(problem, "free_gpu_bytes", lambda: (256 << 20) + weights)  # heaps and workspaces are missing
    out, err = run("demo --target cuda", 1)
    assert out == "" and re.search(r"This needs 1\.\d+ GiB of GPU memory, .* 1\.38 GiB are free\. Try --experts", err)
    monkeypatch.setattr(problem, "available_bytes", lambda: 1 << 30)
    assert "of memory, of which" in run("demo --target cuda", 1)[1]


def test_bounds_of_float32() -> None:
    spec = fmg.MoESpec(64, 32, 8, 2, max_tokens=1, dtype="float32")
    host, gpu = fmg.default_tile(spec, "host"), fmg.default_tile(spec, "sm_90a")
    assert (
        checks.output_bound(spec, host, gpu=False)
        == checks.output_bound(spec, gpu.replace(math="ffma"), gpu=True)
        == 1e-5
    )
    assert checks.output_bound(spec, gpu, gpu=True) == 1e-3


def test_trace_writes_a_file_that_says_what_it_is_of(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    line = f"trace {TINY} --model qwen3-30b-a3b --experts 8 --tokens 5 --ranks 2 --target host -o {path}"
    result = run.json(line)
    content = json.loads(gzip.decompress(path.read_bytes()))
    assert content["otherData"] == {name: value for name, value in result.items() if name != "path"}
    assert result["target"] == "host" and len(result["summaries"]) == 2
    assert sum(event["ph"] == "X" for event in content["traceEvents"]) > 50
    out, _ = run(f"{line} --output {tmp_path / 'plain.json'}")
    assert "from the last GEMM2 tile to the end" in out and "rank 1" in out
    assert json.loads((tmp_path / "plain.json").read_text())["traceEvents"]


def test_trace_makes_room_for_its_events(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"trace {TINY} --experts 8 --tokens 5 --target host -o {tmp_path / 't.json'}"
    monkeypatch.setattr(trace, "_FIRST_ROOM", 1)
    (summary,) = run.json(line)["summaries"]
    assert summary["tiles"] > 0 and summary["first_task"] is None, "what is not recorded is null"
    out, err = run(line)
    assert re.search(r"^first task is known +-$", out, re.MULTILINE) and "with room for 1 events a thread" in err
    monkeypatch.setattr(trace, "MOST_EVENTS", 1)
    assert "--events 1 is not enough" in run(line, 2)[1]


def test_trace_errors(run: Runner, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    small = f"trace {TINY} --experts 8 --tokens 5 -o {path}"
    assert "Must be host or cuda" in run(f"{small} --target tpu", 2)[1]
    assert re.search(r"--events 1 is not enough\. These calls need \d+ a thread", run(f"{small} --target host --events 1", 2)[1])
    assert "Use --events" in run(f"{small} --set trace_events=9", 2)[1]
    assert not path.exists(), "a run that fails leaves no file"


def test_a_traced_kernel_is_reproduced_by_its_command(run: Runner) -> None:
    source = fmg.generate(fmg.MoESpec(64, 32, 2, 2, max_tokens=1), arch="host", instrument=fmg.Instrument(5, 5))
    command = source.metadata["command"].removeprefix("flashmoe-gen compile")
    assert run(f"generate {command}")[0] == source.text


def test_bench_keeps_the_models_that_are_done(run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring is replaced: what is tested is the file of a run that fails at its second model."""

    def bench_layer(name: str, spec: fmg.MoESpec, tokens: list[int], *_: Any, **__: Any) -> Iterator[bench_room.Timing]:
        if name == "mixtral-8x7b":
            raise fmg.CommError("a processor waits")
        for count in tokens:
            yield bench_room.Timing(name, count, 2.0, 1.0, 3.0, 1.0, 50.0, 7.0, 0)

    monkeypatch.setattr(bench, "CudaTarget", lambda: SimpleNamespace(arch="sm_90a"))
    monkeypatch.setattr(bench_room, "measure_ceilings", lambda: bench_room.Ceilings("a GPU", "1.0", 700.0, 3000.0))
    monkeypatch.setattr(bench_room, "bench_host", lambda spec: 41.0)
    monkeypatch.setattr(bench_room, "bench_layer", bench_layer)
    result = tmp_path / "result.json"
    line = f"bench -m qwen3-30b-a3b -m mixtral-8x7b -t 1,32 --no-router --commit abc -o {result}"
    assert "a processor waits" in run(line, 1)[1]
    written = json.loads(result.read_text())
    assert [(cell["model"], cell["tokens"]) for cell in written["layer"]] == [
        ("qwen3-30b-a3b", 1),
        ("qwen3-30b-a3b", 32),
    ]
    assert (written["commit"], written["host_us_per_call"], written["ceilings"]["device"]) == ("abc", 41.0, "a GPU")
    assert "qwen3-30b-a3b" in run(line.replace("-m mixtral-8x7b ", ""))[0]
    assert "Must be one of 'host', 'wgmma', 'mma'" in run(f"{line} --program simt", 2)[1]


def test_info_plans_the_memory_of_layers(run: Runner) -> None:
    options = "info --model qwen3-30b-a3b --set max_tokens=8192 --set world_size=2"
    layers = run.json(options)["layers"]
    assert layers["arch"] == "sm_90a"
    assert 8192 * 9 * 4096 < layers["heap"] < 8e8 and 0 < layers["layer"] < 65536 < layers["scratch"] < 1e8
    text = run(options)[0]
    assert "heap of all layers" in text and "scratch of all layers" in text and "each layer" in text
    assert "layers" not in run.json("info")
