"""``info``: what is on this machine, what of it is usable, and why the rest is not."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from .. import __version__, env, packages
from ..arch import ARCHS
from ..compile import compiler_identity, find_host_compiler
from ..errors import FlashMoEError, UnsupportedError
from ..fused import launch_shape
from ..launch.cuda import CudaTarget, device_count
from . import console
from .console import JsonFlag
from .memory import available_bytes
from .options import ConfigOption, ModelOption, Request, SetOption, request
from .problem import RuntimeBytes, planned_bytes

_PACKAGES = (
    "numpy ml_dtypes jinja2 cupy-cuda12x cupy-cuda13x nvidia-cuda-nvrtc-cu12 nvidia-cuda-runtime-cu12 nvidia-cuda-nvrtc "
    "nvidia-cuda-runtime nvshmem4py-cu12 nvidia-nvshmem-cu12 nvshmem4py-cu13 nvidia-nvshmem-cu13 mpi4py torch ziglang"
).split()

_VARIABLES: dict[str, Callable[[], object]] = {**env.VARIABLES, "CXX": lambda: os.environ.get("CXX") or None}
_MULTIPROCESSORS = 132  # of an H100
_UNSET = {"FLASHMOE_KEEP_SOURCE": "nowhere"}  # what a variable without a value means; automatic


def info(
    model: ModelOption = None,
    config: ConfigOption = None,
    set_: SetOption = None,
    arch: Annotated[str, typer.Option("--arch", help="Of the GPU that --model is planned for.")] = "sm_90a",
    json_: JsonFlag = False,
) -> None:
    """Show versions, compilers, devices and settings: what is usable here, and why the rest is not.

    With a model also the memory that its layers take: --model qwen3-30b-a3b --set max_tokens=8192 --set world_size=2.
    """
    layers = None if model is None and config is None else _memory(request(model, config, set_), arch)
    with console.step("looking around"):
        found = collect()
    if layers is not None:
        found["layers"] = {"arch": arch, "multiprocessors": _MULTIPROCESSORS, **dataclasses.asdict(layers)}
    if json_:
        console.print_json(found)
        return
    versions = {"flashmoe_gen": found["version"], "Python": found["python"], **found["packages"]}
    console.pairs("Versions", [(name, version or "not installed") for name, version in versions.items()])
    memory = found["memory_bytes"]
    machine = [("CPU", found["cpu"]), ("cores", found["cores"])]
    console.pairs("\nMachine", [*machine, ("free memory", console.size(memory) if memory else "unknown")])
    console.pairs("\nCan be used for", [(name, _verdict(state)) for name, state in found["usable"].items()])
    if found["gpus"]:
        console.table("\nGPUs", ["device", "arch", "memory"], [_gpu_row(gpu) for gpu in found["gpus"]], left=2)
    if layers is not None:
        parts = {"heap of all layers": layers.heap, "scratch of all layers": layers.scratch, "each layer": layers.layer}
        title = f"\nMemory of a rank, beside the weights ({arch}, {_MULTIPROCESSORS} multiprocessors)"
        console.pairs(title, [(name, console.size(nbytes)) for name, nbytes in parts.items()])
    settings = [(name, f"{s['value']}{'' if s['set'] else '  (default)'}") for name, s in found["environment"].items()]
    console.pairs("\nEnvironment", settings)


def _memory(asked: Request, arch: str) -> RuntimeBytes:
    spec, tile = asked.spec, asked.tile_for(arch)
    shape = launch_shape(spec, tile, arch)
    blocks = max(1, shape.min_blocks) * _MULTIPROCESSORS // shape.cluster * shape.cluster
    return planned_bytes(
        spec, tile, asked.schedule, arch, processors=max(1, blocks // shape.cluster - 1), workers=blocks, system_workers=1
    )


def collect() -> dict[str, Any]:
    """Everything the command prints, as it is printed with ``--json``."""
    return {
        "version": __version__,
        "python": platform.python_version(),
        "packages": {name: packages.version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": available_bytes(),
        "usable": {
            "generating kernels": {"usable": True, "detail": ", ".join(ARCHS)},
            "compiling and running on the host": _try(lambda: find_host_compiler().version),
            "compiling for GPUs": _try(lambda: compiler_identity("sm_90a").split(" -")[0]),
            "running on GPUs": _try(lambda: _target(CudaTarget())),
            "ranks that are processes, on the host": _try(_several_processes),
            "ranks that are processes, on GPUs": _try(packages.check_nvshmem),
        },
        "gpus": _gpus(),
        "environment": {name: _setting(name, read) for name, read in _VARIABLES.items()},
    }


def _try(look: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"usable": True, "detail": look()}
    except FlashMoEError as error:
        return {"usable": False, "detail": str(error)}


def _target(target: CudaTarget) -> str:
    return f"{target.device}, with kernels for {target.arch}"


def _several_processes() -> str:
    if not hasattr(os, "memfd_create"):
        raise UnsupportedError("They need Linux: they share memory through memfd_create.")
    mpi = packages.version("mpi4py")
    return f"srun, torchrun, RANK and WORLD_SIZE, {f'mpirun with mpi4py {mpi}' if mpi else 'no mpirun: mpi4py is not installed'}"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.processor() or 'unknown')} ({platform.machine()})"


def _gpus() -> list[dict[str, Any]]:
    if device_count() == 0:
        return []
    import cupy

    runtime = cupy.cuda.runtime
    found = []
    for index in range(device_count()):
        properties = runtime.getDeviceProperties(index)
        found.append(
            {
                "name": properties["name"].decode(),
                "arch": f"sm_{properties['major']}{properties['minor']}",
                "memory_bytes": int(properties["totalGlobalMem"]),
                "driver": int(runtime.driverGetVersion()),
            }
        )
    return found


def _gpu_row(gpu: dict[str, Any]) -> tuple[str, str, str]:
    return gpu["name"], gpu["arch"], console.size(gpu["memory_bytes"])


def _setting(name: str, read: Callable[[], object]) -> dict[str, Any]:
    try:
        value = read()
        return {
            "set": bool(os.environ.get(name)),
            "value": str(_UNSET.get(name, "automatic") if value is None else value),
        }
    except FlashMoEError as error:
        return {"set": True, "value": f"not valid: {error}"}


def _verdict(state: dict[str, Any]) -> Text:
    word, style = ("yes", "green") if state["usable"] else ("no ", "red")
    return Text.assemble((word, style), "  ", state["detail"])
