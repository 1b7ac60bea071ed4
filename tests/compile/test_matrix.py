"""Every GPU kernel this package can generate by default compiles, without a spilled register."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from flashmoe_gen.arch import ARCHS, GPU_ARCHS
from flashmoe_gen.cache import CompiledKernel
from flashmoe_gen.cubin import usage
from flashmoe_gen.dtypes import get_dtype
from flashmoe_gen.errors import SpecError, UnsupportedError
from flashmoe_gen.nvrtc import load as load_nvrtc
from flashmoe_gen.programs import default_tile, plan_kernel, plan_router
from flashmoe_gen.programs.wgmma import WgmmaPlan
from flashmoe_gen.render import generate
from flashmoe_gen.spec import MoESpec
from flashmoe_gen.tile import TileConfig

# Asked without the package, so that a fault of the package is a failure and not a skip.
try:
    nvrtc = importlib.import_module("cupy.cuda").nvrtc
    nvrtc.getVersion()
except (ImportError, OSError, RuntimeError) as error:
    pytest.skip(f"CuPy or NVRTC cannot be loaded: {error}", allow_module_level=True)

# Spills depend on the compiler: with these there are none, with others they are reported.
PINNED = ("NVRTC 12.9.86", "NVRTC 13.0.88")

BASE = MoESpec(2048, 768, 128, 8, max_tokens=256)
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "identity")
# dtype, math of float32
MATHS = [("bfloat16", None), ("float16", None), ("float32", "tf32"), ("float32", "ffma"), ("float64", None)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile."""

    label: str
    spec: MoESpec
    arch: str
    kernel: str = "moe"
    tile: TileConfig | None = None


def _matrix() -> Iterator[Case]:
    for arch in GPU_ARCHS:
        for dtype, math in MATHS:
            for mlp in ("gated", "vanilla"):
                spec = BASE.replace(dtype=dtype, mlp=mlp)
                tile = default_tile(spec, arch)
                label = "-".join([arch, math or dtype, mlp])
                yield Case(label, spec, arch, tile=tile.replace(math=math) if math else tile)
        if arch == "sm_90a":  # the program of the other archs must run on Hopper too
            for dtype in ("bfloat16", "float16"):
                for mlp in ("gated", "vanilla"):
                    spec = BASE.replace(dtype=dtype, mlp=mlp)
                    yield Case(f"{arch}-{dtype}-{mlp}-mma", spec, arch, tile=default_tile(spec, arch, "mma"))
        for dtype in ("bfloat16", "float16", "float32", "float64"):
            yield Case(f"{arch}-router-{dtype}", BASE.replace(dtype=dtype), arch, kernel="router")


# Every program, dtype, MLP and activation, on Hopper.
def _activations() -> Iterator[Case]:
    for (dtype, math), mlp, activation in itertools.product(MATHS, ("gated", "vanilla"), ACTIVATIONS):
        spec = BASE.replace(dtype=dtype, mlp=mlp, activation=activation)
        for program in ("mma", "wgmma") if get_dtype(dtype).size == 2 else ("mma",):
            tile = default_tile(spec, "sm_90a", program)
            label = f"{program}, {math or dtype}, {mlp} {activation}"
            yield Case(label, spec, "sm_90a", tile=tile.replace(math=math) if math else tile)


# What the matrix does not reach: other functions, shapes that end within a stage or a tile, and other tiles.
def _corners() -> Iterator[Case]:
    arch = "sm_90a"
    gpt_oss = BASE.replace(
        hidden_size=2880, intermediate_size=2880, bias=True, gate_limit=7.0, up_offset=1.0, swish_beta=1.702
    )
    yield Case("gpt-oss", gpt_oss, arch)
    yield Case("gpt-oss-20b", MoESpec.preset("gpt-oss-20b", max_tokens=256), arch)
    for dtype in ("bfloat16", "float16"):
        for mlp in ("gated", "vanilla"):
            for activation in ("silu", "gelu"):
                biased = BASE.replace(dtype=dtype, mlp=mlp, activation=activation, bias=True)
                yield Case(f"biased {activation}, {dtype}, {mlp}", biased, arch)
        yield Case(f"rows that end within a stage, {dtype}", BASE.replace(hidden_size=2056, dtype=dtype), arch)
    for dtype in ("float32", "float64"):
        for mlp in ("gated", "vanilla"):
            yield Case(f"gelu, {dtype}, {mlp}", BASE.replace(dtype=dtype, mlp=mlp, activation="gelu"), "sm_80")
    yield Case("one chunk", BASE.replace(hidden_size=8, intermediate_size=8), "sm_80")
    for dtype, activation in (("float32", "gelu"), ("float16", "gelu_tanh"), ("float64", "gelu"), ("bfloat16", "relu")):
        odd = BASE.replace(
            hidden_size=2056, intermediate_size=776, dtype=dtype, activation=activation, bias=True, weight_on="input"
        )
        yield Case(f"{dtype}-{activation}", odd, arch)
        if dtype in ("bfloat16", "float16"):
            yield Case(f"{dtype}-{activation}-mma", odd, arch, tile=default_tile(odd, arch, "mma"))
    vanilla = BASE.replace(mlp="vanilla", activation="gelu", bias=True, weight_on="input")
    yield Case("vanilla gelu", vanilla, arch)
    yield Case("one wgmma step", BASE.replace(hidden_size=8, intermediate_size=8), arch)
    for cluster in (1, 2):
        yield Case(f"narrow wgmma, {cluster}", BASE, arch, tile=TileConfig(128, 128, 64, 6, 8, 1, cluster=cluster))
    yield Case("vanilla wgmma of 192", vanilla, arch, tile=TileConfig(128, 192, 64, 5, 8, 1, cluster=2))
    yield Case("one row of warps", BASE, arch, tile=TileConfig(16, 64, 64, 4, 1, 4, program="mma"))
    yield Case("rows of 64 bytes", BASE, arch, tile=TileConfig(64, 128, 32, 4, 2, 4, program="mma"))
    yield Case("three blocks", BASE, arch, tile=TileConfig(64, 64, 64, 3, 2, 2, program="mma"))
    for dtype in ("bfloat16", "float32", "float64"):
        grouped = BASE.replace(hidden_size=7168, num_groups=8, top_groups=4, scoring="sigmoid", dtype=dtype)
        yield Case(f"router of groups, {dtype}", grouped, arch, kernel="router")
        many = BASE.replace(hidden_size=8, top_k=32, group_score="top2_sum", dtype=dtype)
        yield Case(f"router of many routes, {dtype}", many, arch, kernel="router")


Futures = dict[str, "Future[tuple[CompiledKernel, float]]"]
USUAL, MORE = [*_matrix(), *_corners()], list(_activations())
CASES = {case.label: case for case in USUAL + MORE}
assert len(CASES) == len(USUAL + MORE), "labels must differ"
LABELS = [*(case.label for case in USUAL), *(pytest.param(case.label, marks=pytest.mark.full) for case in MORE)]


def _compile(case: Case) -> tuple[CompiledKernel, float]:
    """The kernel and the processor time it took: unlike wall-clock time, that of a busy machine too."""
    source = generate(case.spec, arch=case.arch, kernel=case.kernel, tile=case.tile)  # type: ignore[arg-type]
    start = time.thread_time()
    return source.compile(), time.thread_time() - start


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[Futures]:
    """The selected cases, compiling in two threads: NVRTC releases the GIL."""
    tests = [item for item in request.session.items if getattr(item, "originalname", "") == "test_compiles"]
    wanted = {item.callspec.params["label"] for item in tests}  # type: ignore[attr-defined]
    with ThreadPoolExecutor(2) as pool:
        yield {label: pool.submit(_compile, case) for label, case in CASES.items() if label in wanted}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("label", LABELS)
def test_compiles(label: str, compiled: Futures) -> None:
    case = CASES[label]
    try:
        kernel, _ = compiled[label].result()
    except UnsupportedError as error:
        pytest.skip(str(error))  # this NVRTC is too old or too new for the arch
    resources = usage(kernel.image)
    assert len(resources) == 1
    (used,) = resources.values()
    compiler = load_nvrtc().version
    if kernel.spill_bytes and compiler not in PINNED:
        warnings.warn(f"{label}: {kernel.spill_bytes} bytes spilled with {compiler}", stacklevel=1)
    else:
        assert kernel.spill_bytes == 0
    assert used.frame_bytes <= kernel.spill_bytes, "an array of a thread lives in local memory"
    assert "warning" not in kernel.log
    assert kernel.shared_bytes == 0, "all shared memory is dynamic: the plan counts it"
    if case.kernel == "router":
        assert plan_router(case.arch).shared_bytes <= ARCHS[case.arch].shared_bytes
    else:
        plan = plan_kernel(case.spec, case.tile or default_tile(case.spec, case.arch), case.arch)
        if isinstance(plan, WgmmaPlan):  # setmaxnreg shares out what the launch took
            assert kernel.registers == ARCHS[case.arch].registers // plan.threads // 8 * 8
            assert "C75" not in kernel.log, "ptxas put the wgmma instructions in series, or ignored setmaxnreg"
        warps_of_partition = -(-plan.min_blocks * plan.threads // 128)
        assert kernel.registers <= min(255, ARCHS[case.arch].registers // 128 // warps_of_partition)


@pytest.mark.parametrize("arch", GPU_ARCHS)
@pytest.mark.parametrize(
    "change",
    [{"max_tokens": 8192}, {"world_size": 8}, {"num_experts": 1024}, {"capacity": 4}],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("kernel", ["moe", "router"])
def test_launch_arguments_do_not_change_the_kernel(kernel: str, change: dict[str, int], arch: str) -> None:
    usual = generate(BASE, arch=arch, kernel=kernel)  # type: ignore[arg-type]
    other = generate(BASE.replace(**change), arch=arch, kernel=kernel)  # type: ignore[arg-type]
    assert (usual.digest, usual.text, usual.name) == (other.digest, other.text, other.name)


@pytest.mark.parametrize("arch", GPU_ARCHS)
@pytest.mark.parametrize("dtype,math", MATHS)
def test_default_tiles_fill_a_multiprocessor(dtype: str, math: str | None, arch: str) -> None:
    spec = BASE.replace(dtype=dtype)
    plan = plan_kernel(spec, default_tile(spec, arch), arch)
    mma_warps = plan.min_blocks * (plan.threads // 32 - 1)
    assert mma_warps >= 8
    assert plan.min_blocks * (plan.shared_bytes + 1024) <= ARCHS[arch].shared_bytes + 1024


@pytest.mark.parametrize(
    "tile",
    [
        TileConfig(64, 128, 48, 3, 2, 2, program="mma"),  # a row of 96 bytes
        TileConfig(64, 128, 64, 1, 2, 2, program="mma"),  # no second stage
        TileConfig(40, 128, 64, 3, 2, 2, program="mma"),
        TileConfig(64, 72, 64, 3, 2, 2, program="mma"),
        TileConfig(64, 128, 64, 3, 2, 1, program="mma"),  # two warps
        TileConfig(64, 128, 64, 3, 2, 2, program="mma", cluster=2),
        TileConfig(64, 256, 64, 4, 4, 1),  # one consumer warpgroup
        TileConfig(128, 256, 64, 4, 4, 2),
        TileConfig(128, 64, 64, 4, 8, 1),  # 32 columns of gate and up
        TileConfig(128, 256, 32, 4, 8, 1),  # rows of 64 bytes
        TileConfig(128, 256, 64, 2, 8, 1),
    ],
)
def test_refuses_impossible_tiles(tile: TileConfig) -> None:
    with pytest.raises(SpecError):
        plan_kernel(BASE, tile, "sm_90a")


@pytest.mark.parametrize(
    "mlp,block_n,cluster,rows",
    [("gated", 256, 2, 64), ("gated", 256, 1, 0), ("gated", 128, 2, 0), ("vanilla", 128, 2, 64), ("vanilla", 192, 2, 0)],
)
def test_tiles_are_split_where_their_parts_fit_the_epilogue(mlp: str, block_n: int, cluster: int, rows: int) -> None:
    tile = TileConfig(128, block_n, 64, 4, 8, 1, cluster=cluster)
    assert plan_kernel(BASE.replace(mlp=mlp), tile, "sm_90a").split_rows == rows


@pytest.mark.parametrize("arch,dtype", [("sm_90a", "float32"), ("sm_100", "bfloat16"), ("host", "bfloat16")])
def test_wgmma_is_for_hopper_and_16_bits(arch: str, dtype: str) -> None:
    spec = BASE.replace(dtype=dtype)
    with pytest.raises(UnsupportedError, match="program='wgmma'"):
        plan_kernel(spec, default_tile(spec, arch).replace(program="wgmma"), arch)
    assert default_tile(spec, arch).program == ("host" if arch == "host" else "mma")


def test_the_program_of_a_tile_is_resolved_before_the_text() -> None:
    tile = default_tile(BASE, "sm_90a")
    assert tile.program == "wgmma"
    texts = {generate(BASE, arch="sm_90a", tile=tile.replace(program=program)).text for program in ("wgmma", None)}
    assert len(texts) == 1


def test_refuses_tiles_over_the_shared_memory() -> None:
    tile = TileConfig(128, 128, 64, 4, 2, 4, program="mma")
    assert plan_kernel(BASE, tile, "sm_90a").shared_bytes > 99 * 1024
    with pytest.raises(UnsupportedError, match="shared memory"):
        plan_kernel(BASE, tile, "sm_120")
