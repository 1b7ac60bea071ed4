"""``generate`` and ``compile``: one kernel as text, or compiled into the cache for one or more architectures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import typer

from ..arch import ARCHS, get_arch
from ..cache import CompiledKernel
from ..errors import FlashMoEError, SpecError
from ..launch.host import build_program
from ..plan import plan_kernel
from ..render import KernelSource, generate
from . import console
from .console import JsonFlag
from .options import (
    ConfigOption,
    Kernel,
    KernelOption,
    ModelOption,
    Request,
    SetOption,
    checked_kernel,
    request,
)


def generate_command(
    model: ModelOption = None,
    config: ConfigOption = None,
    arch: Annotated[str, typer.Option("--arch", "-a", help=f"One of {', '.join(ARCHS)}.")] = "host",
    kernel: KernelOption = "moe",
    set_: SetOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A file or a folder; default: stdout.", show_default=False)
    ] = None,
    json_: JsonFlag = False,
) -> None:
    """Write the source text of one kernel."""
    kind = checked_kernel(kernel)
    get_arch(arch)
    source = _generate(request(model, config, set_, kernel=kind), arch, kind)
    path = None
    if output is not None:
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            path = source.write(output)
        except OSError as error:
            raise FlashMoEError(f"{output} cannot be written: {error.strerror or error}.") from error
    if json_:
        text = {"text": source.text} if path is None else {"path": path}
        described = {"name": source.name, "arch": source.arch, "digest": source.digest, "bytes": len(source.text)}
        console.print_json({**described, **source.metadata, **text})
    elif path is None:
        typer.echo(source.text, nl=False)
    else:
        console.pairs("", [("name", source.name), ("digest", source.digest), ("path", path)])


def compile_command(
    model: ModelOption = None,
    config: ConfigOption = None,
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", "-a", help=f"One of {', '.join(ARCHS)}, or all; may be repeated.", show_default="host"),
    ] = None,
    kernel: KernelOption = "moe",
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Compile one kernel into the cache, for one or more architectures. Needs no GPU.

    For the host this also builds the program that starts kernels; with [cyan]--arch host[/] alone, only that.
    """
    kind = checked_kernel(kernel)
    archs = list(ARCHS) if arch and "all" in arch else list(dict.fromkeys(arch or ["host"]))
    for name in archs:
        get_arch(name)
    asked = None
    if model is not None or config is not None or set_ or archs != ["host"]:
        asked = request(model, config, set_, kernel=kind)
    results = _compile_all(asked, archs, kind)
    failed = [result for result in results if "error" in result]
    if json_:
        console.print_json(results)
    else:
        _show(results)
    if failed:
        for result in failed:
            console.complain(f"{result['arch']}: {result['error']['message']}")
        raise typer.Exit(1)


def _generate(asked: Request, arch: str, kind: Kernel) -> KernelSource:
    return generate(asked.spec, arch=arch, kernel=kind, tile=asked.tile_for(arch), instrument=asked.instrument)


def _compile_all(asked: Request | None, archs: list[str], kind: Kernel) -> list[dict[str, Any]]:
    """Compile in two threads (compilers release the lock of Python); failures are results too."""
    jobs = [(arch, True) for arch in archs if asked is not None]
    jobs += [("host", False)] if "host" in archs else []  # the launcher

    def work(job: tuple[str, bool]) -> dict[str, Any]:
        arch, is_kernel = job
        try:
            if not is_kernel or asked is None:
                return _describe(build_program("launcher"))
            return _compile(asked, arch, kind)
        except SpecError:
            raise
        except FlashMoEError as error:
            return {"arch": arch, "error": {"type": type(error).__name__, "message": str(error), "exit_code": 1}}

    with console.progress("compiling", len(jobs)) as done, ThreadPoolExecutor(2) as pool:
        futures = {pool.submit(work, job): index for index, job in enumerate(jobs)}
        results: dict[int, dict[str, Any]] = {}
        for future in as_completed(futures):
            result = future.result()
            results[futures[future]] = result
            state = (
                "failed" if "error" in result else "cached" if result["from_cache"] else f"{result['seconds']:.1f} s"
            )
            done(f"{result['arch']} {result.get('name', '')} {state}")
    return [results[index] for index in sorted(results)]


def _compile(asked: Request, arch: str, kind: Kernel) -> dict[str, Any]:
    source = _generate(asked, arch, kind)
    described = {"digest": source.digest, **_describe(source.compile())}
    if kind == "moe":  # the router takes none at launch
        described["shared_bytes"] += plan_kernel(asked.spec, asked.tile_for(arch), arch).shared_bytes
    return described


def _describe(compiled: CompiledKernel) -> dict[str, Any]:
    names = ("name", "arch", "registers", "spill_bytes", "shared_bytes", "seconds", "from_cache", "compiler", "path")
    return {name: getattr(compiled, name) for name in names}


def _show(results: list[dict[str, Any]]) -> None:
    built = [result for result in results if "error" not in result]
    if not built:
        return
    rows = [
        (
            result["arch"], result.get("digest", "launcher")[:12], result["registers"] or "-", result["spill_bytes"],
            console.size(result["shared_bytes"]), f"{result['seconds']:.1f} s",
            "from the cache" if result["from_cache"] else "compiled now",
        )
        for result in built
    ]  # fmt: skip
    console.table("", "arch,digest,registers,spill bytes,shared memory,compiled in,".split(","), rows, left=2)
    console.say()
    console.pairs("", [(result["name"], result["path"]) for result in built])
