"""Compiling what a layer needs: several kernels at a time, with progress, and without waiting for the rest when told to stop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from ..arch import get_arch
from ..cache import CompiledKernel
from ..compile import find_host_compiler, slow_first_use
from ..errors import FlashMoEError
from ..instrument import Instrument
from ..launch import cuda, host
from ..programs import default_tile, plan_kernel
from ..render import KernelSource, generate
from ..spec import MoESpec
from ..tile import TileConfig
from . import console

T = TypeVar("T")
R = TypeVar("R")

KINDS = ("router", "moe")  # of kernels
AT_A_TIME = 2


@dataclass(frozen=True)
class Job:
    """One thing to compile.

    Attributes:
        arch: for what.
        kind: ``"moe"``, ``"router"`` or ``"program"``: what starts the kernels, or prepares their arguments.
        source: the kernel's text; a program has none.
        build: compiles it, or finds it in the cache.
        shared_bytes: dynamic shared memory of a block, which it takes at launch.
    """

    arch: str
    kind: str
    source: KernelSource | None
    build: Callable[[], CompiledKernel]
    shared_bytes: int = 0

    def __str__(self) -> str:
        return f"the {'layer' if self.kind == 'moe' else self.kind} for {self.arch}"


def programs(arch: str) -> list[Job]:
    """The small programs that layers need beside their kernels."""
    if get_arch(arch).compiler == "c++":
        return [Job(arch, "program", None, lambda: host.build_program("launcher"))]
    return [Job(arch, "program", None, partial(cuda.build_program, name, arch)) for name in ("narrow_ids", "count_ids")]


def kernel(
    spec: MoESpec, arch: str, kind: str, tile: TileConfig | None = None, instrument: Instrument | None = None
) -> Job:
    """One of a layer's kernels; the router takes neither a tile nor instruments."""
    if kind == "router":
        source = generate(spec, arch=arch, kernel="router")
        return Job(arch, kind, source, source.compile)
    tile = tile or default_tile(spec, arch)
    source = generate(spec, arch=arch, kernel="moe", tile=tile, instrument=instrument)
    return Job(arch, kind, source, source.compile, plan_kernel(spec, tile, arch).shared_bytes)


def layer(spec: MoESpec, arch: str, tile: TileConfig, instrument: Instrument | None = None) -> list[Job]:
    """All that one layer needs: then making and calling it compiles nothing."""
    return [*(kernel(spec, arch, kind, tile, instrument) for kind in KINDS), *programs(arch)]


def build(jobs: list[Job]) -> list[CompiledKernel]:
    """Compile all of them, in their order; a step of its own.

    Raises:
        CompileError, CacheError: of the first one that fails.
    """
    with compiling(jobs) as tally:

        def work(job: Job) -> CompiledKernel:
            with tally.working_on(str(job)):
                return job.build()

        return run_all(work, jobs, AT_A_TIME)


@contextmanager
def compiling(jobs: list[Job]) -> Iterator[console.Tally]:
    """Show that they are compiled, and why that may take long."""
    with console.progress("compiling", len(jobs)) as tally:
        if any(get_arch(job.arch).compiler == "c++" for job in jobs):
            with suppress(FlashMoEError):  # without a compiler there may still be a cache
                tally.hint = slow_first_use(find_host_compiler().command) or ""
        yield tally


@contextmanager
def _pool(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool that is left at once: what has not started is dropped, and nobody waits for what has."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run_all(
    work: Callable[[T], R], items: Iterable[T], threads: int, finished: Callable[[R], None] = lambda result: None
) -> list[R]:
    """``work`` on every item, in threads; calls ``finished`` as results come, and returns them in the order of the items.

    Raises:
        What ``work`` raises first, or KeyboardInterrupt, at once.
    """
    with _pool(threads) as pool:
        futures = [pool.submit(work, item) for item in items]
        for future in as_completed(futures):
            finished(future.result())
        return [future.result() for future in futures]
