"""``generate`` and ``compile``: one kernel as text, or all that a layer needs compiled into the cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from ..arch import ARCHS
from ..cache import CompiledKernel
from ..errors import FlashMoEError, SpecError
from ..render import KernelSource
from . import build, console
from .build import Job
from .console import JsonFlag
from .options import (
    ConfigOption,
    KernelOption,
    ModelOption,
    Request,
    SetOption,
    checked_archs,
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
    checked_archs([arch])
    if arch == "all":
        raise SpecError(f"--arch all is not valid for generate. Must be one of {', '.join(ARCHS)}.")
    asked = request(model, config, set_, kernel=kind)
    source = _job(asked, arch, kind).source
    assert source is not None
    _note_unused(asked, [source])
    path = source.write(output) if output is not None else None
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
    kernel: Annotated[
        str | None,
        typer.Option("--kernel", "-k", metavar="[moe|router]", help="Only this one.", show_default="both, and what starts them"),
    ] = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Compile all that a layer needs into the cache, for one or more architectures. Needs no GPU.

    That is its kernel, its router, and the small program that starts kernels (host) or prepares their arguments (GPU); without
    a model only the latter.
    """
    kinds = build.KINDS if kernel is None else (checked_kernel(kernel),)
    archs = checked_archs(arch or ["host"])
    jobs: list[Job] = []
    if model is not None or config is not None or set_ or kernel is not None:
        asked = request(model, config, set_, kernel=kernel)
        jobs += _jobs(asked, archs, kinds)
        _note_unused(asked, [job.source for job in jobs if job.source is not None])
    jobs += [job for name in archs for job in build.programs(name)]
    results = _compile_all(jobs)
    failed = [result for result in results if "error" in result]
    if json_:
        console.print_json(results)
    else:
        _show(results)
    if failed:
        for message in dict.fromkeys(result["error"]["message"] for result in failed):
            which = dict.fromkeys(result["arch"] for result in failed if result["error"]["message"] == message)
            console.complain(f"{', '.join(which)}: {message}")
        raise typer.Exit(1)


def _job(asked: Request, arch: str, kind: str) -> Job:
    tile = None if kind == "router" else asked.tile_for(arch)
    return build.kernel(asked.spec, arch, kind, tile, asked.instrument)


def _jobs(asked: Request, archs: list[str], kinds: Sequence[str]) -> Iterator[Job]:
    """The kernels for every architecture; one that cannot have them fails in its turn."""
    for arch in archs:
        for kind in kinds:
            try:
                yield _job(asked, arch, kind)
            except SpecError:
                raise
            except FlashMoEError as error:
                yield Job(arch, kind, None, functools.partial(_fail, error))


def _fail(error: FlashMoEError) -> NoReturn:
    raise error


def _note_unused(asked: Request, sources: list[KernelSource]) -> None:
    """Say which fields change nothing here: they are checked, and then passed to a kernel when it is launched."""
    used = {name for source in sources for part in ("spec", "tile") for name in source.metadata[part]}
    used |= {field.name for field in dataclasses.fields(asked.instrument)}
    if unused := [name for name in asked.chosen if name not in used]:
        console.note(f"--set {', '.join(unused)}: no part of the text, the kernel takes it at launch; it changes nothing here")


def _compile_all(jobs: list[Job]) -> list[dict[str, Any]]:
    """Compile them; failures are results too."""
    with build.compiling(jobs) as tally:

        def work(job: Job) -> dict[str, Any]:
            with tally.working_on(str(job)):
                try:
                    return _describe(job, job.build())
                except SpecError:
                    raise
                except FlashMoEError as error:
                    described = {"type": type(error).__name__, "message": str(error), "exit_code": 1}
                    return {"arch": job.arch, "kind": job.kind, "error": described}

        def finished(result: dict[str, Any]) -> None:
            state = (
                "failed" if "error" in result else "cached" if result["from_cache"] else f"{result['seconds']:.1f} s"
            )
            tally.done(f"{result['arch']} {result.get('name', result['kind'])} {state}")

        return build.run_all(work, jobs, build.AT_A_TIME, finished)


def _describe(job: Job, compiled: CompiledKernel) -> dict[str, Any]:
    names = ("name", "arch", "registers", "spill_bytes", "shared_bytes", "seconds", "from_cache", "compiler", "path")
    described = {"kind": job.kind, **{name: getattr(compiled, name) for name in names}}
    described["shared_bytes"] += job.shared_bytes
    if job.source is not None:
        described["digest"] = job.source.digest
    return described


def _show(results: list[dict[str, Any]]) -> None:
    built = [result for result in results if "error" not in result]
    if not built:
        return
    rows = [
        (
            result["arch"], result["kind"], result.get("digest", "-")[:12], result["registers"] or "-", result["spill_bytes"],
            console.size(result["shared_bytes"]), f"{result['seconds']:.1f} s",
            "from the cache" if result["from_cache"] else "compiled now",
        )
        for result in built
    ]  # fmt: skip
    columns = "arch,kernel,digest,registers,spill bytes,shared memory,compiled in,state".split(",")
    console.table("", columns, rows, left=3)
    console.say()
    console.pairs("", [(result["name"], result["path"]) for result in built])
