"""NVRTC for every architecture: the image, and its resources as the ELF and ptxas tell them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from flashmoe_gen import nvrtc as nvrtc_module
from flashmoe_gen import packages
from flashmoe_gen.arch import GPU_ARCHS
from flashmoe_gen.cache import Cache
from flashmoe_gen.compile import Image, compile_text, compiler_identity, runs_here
from flashmoe_gen.cubin import logged_spill_bytes, usage
from flashmoe_gen.errors import CompileError, SpecError, UnsupportedError

# Asked without the package, so that a fault of the package is a failure and not a skip.
try:
    nvrtc = importlib.import_module("cupy.cuda").nvrtc
    nvrtc.getVersion()
except (ImportError, OSError, RuntimeError) as error:
    pytest.skip(f"CuPy or NVRTC cannot be loaded: {error}", allow_module_level=True)


TINY = 'extern "C" __global__ void scale(float* x) { x[threadIdx.x] *= 2; }\n'

# helper is a function of its own and no kernel; spill keeps 80 values alive in 32 registers
MANY = r"""
__device__ __noinline__ float helper(const float* x, int n) {
  float a[64];
  for (int i = 0; i < 64; i++) a[i] = x[i * n];
  float s = 0;
  for (int i = 0; i < n; i++) s += a[(i * 7) & 63];
  return s;
}
extern "C" __global__ void calls(float* x, int n) { x[0] = helper(x, n); }
extern "C" __global__ void shares(float* x) {
  __shared__ float s[300];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = s[299 - threadIdx.x] * 2;
}
extern "C" __global__ void __launch_bounds__(1024, 1) spill(const float* x, float* y) {
  float a[80];
#pragma unroll
  for (int i = 0; i < 80; i++) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 3; r++)
#pragma unroll
    for (int i = 0; i < 80; i++) a[i] = a[i] * a[(i + r + 1) % 80] + a[(i + 17) % 80];
#pragma unroll
  for (int i = 0; i < 80; i++) y[i * 1024 + threadIdx.x] = a[i];
}
"""


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))


def compiled(text: str, arch: str, *options: str) -> Image:
    try:
        return compile_text(text, name="test", arch=arch, options=options)
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("arch", GPU_ARCHS)
def test_tiny_kernel(arch: str) -> None:
    image = compiled(TINY, arch)
    assert image.compiler == compiler_identity(arch) and image.compiler.startswith("NVRTC 1")
    assert runs_here(image.compiler)
    assert 4 <= image.registers <= 32
    assert (image.spill_bytes, image.shared_bytes) == (0, 0)
    assert list(usage(image.data)) == ["scale"]


@pytest.mark.parametrize("arch", GPU_ARCHS)
def test_elf_and_ptxas_agree(arch: str) -> None:
    image = compiled(MANY, arch)
    kernels = usage(image.data)
    assert set(kernels) == {"calls", "shares", "spill"}
    for name, kernel in kernels.items():
        report = re.search(rf"Compiling entry function '{name}'.*?Used[^\n]*", image.log, re.S)
        assert report, image.log
        said = report[0]
        assert f"Used {kernel.registers} registers" in said
        assert f"{kernel.frame_bytes} bytes stack frame" in said
        if kernel.spill_instructions:  # old compilers do not mark them
            assert 4 * kernel.spill_instructions <= logged_spill_bytes(said) <= 8 * kernel.spill_instructions
        smem = re.search(r"(\d+) bytes smem", said)
        assert kernel.shared_bytes == (int(smem[1]) if smem else 0)
    assert kernels["shares"].shared_bytes == image.shared_bytes == 1200
    assert kernels["calls"].stack_bytes >= 256 and kernels["calls"].spill_instructions == 0
    assert kernels["spill"].spill_instructions > 0 or nvrtc.getVersion() < (12, 9)
    assert image.spill_bytes == logged_spill_bytes(image.log) > 0
    assert image.registers == max(kernel.registers for kernel in kernels.values())


def test_the_version_is_that_of_the_package() -> None:
    """nvrtcVersion() says 13.2 for 13.2.78 and for 13.2.86, whose cubins differ."""
    major, minor = nvrtc.getVersion()
    package = "nvidia-cuda-nvrtc-cu12" if major == 12 else "nvidia-cuda-nvrtc"
    found = nvrtc_module.load()
    assert found.version.startswith(f"NVRTC {major}.{minor}.") and found.build
    if "site-packages" in Path("/proc/self/maps").read_text().partition("libnvrtc.so")[0].rpartition("\n")[2]:
        assert found.version == f"NVRTC {packages.version(package)}"
    assert compiler_identity("sm_90a") == compiler_identity("sm_80") == found.identity


# setmaxnreg, which ptxas ignores unless it knows how many registers the launch takes, and says so in a log of success.
WARPGROUPS = """
extern "C" __global__ void {bounds} k(float* x) {{
  if (threadIdx.x < 128) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
  else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  x[threadIdx.x] *= 2;
}}
"""


@pytest.mark.parametrize("bounds", ["", "__launch_bounds__(384)"])
def test_ignored_setmaxnreg_is_an_error(bounds: str) -> None:
    good = WARPGROUPS.format(bounds="__launch_bounds__(384, 1)")
    assert compiled(good, "sm_90a").registers > 100
    text = WARPGROUPS.format(bounds=bounds)
    with pytest.raises(CompileError, match=r"ptxas of NVRTC .* did not do what the text asks for .*C75\d\d") as caught:
        compile_text(text, name="test", arch="sm_90a")
    assert "setmaxnreg" in caught.value.log and caught.value.source_path
    assert caught.value.source_path.read_text() == text
    with pytest.raises(CompileError, match="C75"):
        compile_text(good, name="test", arch="sm_90a", options=("-G",))


@pytest.mark.parametrize(
    "words", [("-arch=sm_80",), ("-arch", "sm_80"), (" --gpu-architecture", "sm_80"), ("-rdc=true",)]
)
def test_options_that_nvrtc_takes_and_that_contradict_ours(words: tuple[str, ...]) -> None:
    program = nvrtc.createProgram(TINY, "x.cu", (), ())
    nvrtc.compileProgram(program, ("-std=c++17", *words))  # it does take them
    nvrtc.destroyProgram(program)
    with pytest.raises(SpecError, match="is not valid for arch='sm_90a'"):
        compile_text(TINY, name="test", arch="sm_90a", options=words)
    assert compiled(TINY, "sm_80", "-arch=sm_80", "-rdc=false").data


def test_register_cap_forces_spills() -> None:
    text = MANY.replace("__launch_bounds__(1024, 1)", "")
    assert compiled(text, "sm_90a").spill_bytes == 0
    capped = compiled(text, "sm_90a", "-maxrregcount=32")
    assert capped.registers <= 40 and capped.spill_bytes > 0


def test_image_is_reproducible() -> None:
    assert compiled(TINY, "sm_90a").data == compiled(TINY, "sm_90a").data


def test_refused_source_and_the_next_call() -> None:
    bad = '#line 7 "part.cu"\nextern "C" __global__ void k() { absent(); }\n'
    for text in (bad, 'extern "C" __global__ void k() { asm("no such instruction;"); }'):
        with pytest.raises(CompileError, match=r"NVRTC \d+\.\d+\.\d+ refused test for sm_90a") as caught:
            compile_text(text, name="test", arch="sm_90a")
        assert caught.value.log
        assert caught.value.source_path is not None and caught.value.source_path.read_text() == text
        assert compiled(TINY, "sm_90a").data
    with pytest.raises(CompileError, match=r"part\.cu\(7\)"):
        compile_text(bad, name="test", arch="sm_90a")


def test_damaged_cubin_never_raises_anything_else() -> None:
    data = compiled(MANY, "sm_90a").data
    variants = [data[:size] for size in range(0, len(data), 97)]
    variants += [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(0, len(data), 53)]
    variants += [data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :] for i in range(64)]
    readable = 0
    for variant in variants:
        try:
            usage(variant)
            readable += 1
        except CompileError:
            pass
    assert readable < len(variants)  # truncation is always found


def test_through_the_cache(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "kernels")
    first, second = (
        cache.build(MANY, name="many", arch="sm_90a", digest="d", metadata={"command": "x"}) for _ in range(2)
    )
    assert (first.from_cache, second.from_cache) == (False, True)
    assert first.path == second.path and first.path.name == "kernel.cubin" and first.image == second.image
    assert (first.path.parent / "source.cu").read_text() == MANY
    assert second.spill_bytes == first.spill_bytes > 0 and second.registers == first.registers > 0
    assert second.shared_bytes == 1200 and second.log == first.log
