"""Heaps from NVSHMEM: what is asked of it, in which order, and what is said when it cannot; with a stand-in for the library."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flashmoe_gen as fmg
from flashmoe_gen.comm.nvshmem import NvshmemSource


class Library:
    """NVSHMEM of one process, and as much of CuPy and cuda.core as is needed to use it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.seen: list[tuple[Any, ...]] = []
        self.status, self.next, self.reachable = 0, 1 << 20, True
        self.copied: list[int] = []
        unique = lambda empty=False: SimpleNamespace(_data=np.full(1, 0 if empty else 7, np.int32))  # noqa: E731
        core = ModuleType("nvshmem.core")
        vars(core).update(
            get_unique_id=unique, get_version=lambda: "3.4.5", init_status=lambda: self.status, init=self.init,
            my_pe=lambda: self.rank, n_pes=lambda: self.world_size, finalize=lambda: self.seen.append(("finalize",)),
        )  # fmt: skip
        bindings = ModuleType("nvshmem.bindings")
        vars(bindings).update(
            malloc=self.malloc, ptr=self.ptr, free=lambda base: self.seen.append(("free", base))
        )
        package = ModuleType("nvshmem")
        package.core, package.bindings = core, bindings  # type: ignore[attr-defined]
        cuda_core = ModuleType("cuda.core")
        cuda_core.Device = lambda number: SimpleNamespace(set_current=lambda: None, number=number)  # type: ignore[attr-defined]
        for name, module in (
            ("nvshmem", package), ("nvshmem.core", core), ("nvshmem.bindings", bindings), ("cuda.core", cuda_core),
        ):  # fmt: skip
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "cupy", self.cupy())
        monkeypatch.setattr("flashmoe_gen.packages.check_nvshmem", lambda: "a pair")
        word = SimpleNamespace(ctypes=SimpleNamespace(data=5))
        monkeypatch.setattr("flashmoe_gen.comm.nvshmem.streams.interrupter", lambda device: (word, SimpleNamespace(ptr=0)))

    def cupy(self) -> Any:
        class Device:
            def __init__(self, number: int) -> None:
                pass

            def use(self) -> None:
                pass

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: object) -> None:
                pass

        runtime = SimpleNamespace(
            deviceSynchronize=lambda: None, memset=lambda at, value, count: self.seen.append(("memset", at, value, count)),
            memcpyAsync=lambda to, *_: self.copied.append(to), CUDARuntimeError=OSError,
        )  # fmt: skip
        cuda = SimpleNamespace(
            Device=Device, runtime=runtime, UnownedMemory=lambda *_: None, MemoryPointer=lambda *_: None
        )
        return SimpleNamespace(cuda=cuda, ndarray=lambda *_: None, uint8=np.uint8)

    def init(self, **options: Any) -> None:
        self.seen.append(("init", int(options["uid"]._data[0]), options["rank"], options["nranks"]))
        self.status = 2

    def malloc(self, nbytes: int) -> int:
        if nbytes > 1 << 40:
            return 0
        self.next += 1 << 20
        self.seen.append(("malloc", nbytes))
        return self.next

    def ptr(self, base: int, pe: int) -> int:
        return base + (pe - self.rank) * (1 << 30) if self.reachable or pe == self.rank else 0


def both(told: dict[int, Any]) -> Any:
    """An exchange of two ranks of which the other one says the same, or what ``told`` has."""
    calls = iter(range(100))

    def exchange(value: Any) -> list[Any]:
        other = told.get(next(calls), value)
        return [value, other]

    return exchange


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch, 0, 2)


def joined(library: Library, heap_bytes: int | None = None) -> NvshmemSource:
    return NvshmemSource.join(library.rank, 2, 0, both({}), heap_bytes)


def test_heaps_are_symmetric_zeroed_and_given_back_in_order(library: Library) -> None:
    source = joined(library)
    assert library.seen == [("init", 7, 0, 2)] and source.collective
    first, second = source.allocate(4096), source.allocate(8192)
    assert first.pointers[1] - first.pointers[0] == 1 << 30 and first.mine.nbytes == 4096
    assert ("memset", first.pointers[0], 0, 4096) in library.seen
    bases = [heaps.pointers[0] for heaps in (first, second)]
    first.interrupt(8)
    assert library.copied == [bases[0] + 8, bases[0] + (1 << 30) + 8]
    source.close(abort=False)
    source.close(abort=False)
    assert library.seen[-3:] == [("free", bases[0]), ("free", bases[1]), ("finalize",)]


def test_an_abort_waits_for_nobody(library: Library) -> None:
    source = joined(library)
    heaps = source.allocate(4096)
    before = list(library.seen)
    heaps.release(abort=True)
    source.close(abort=True)
    assert library.seen == before


def test_one_that_is_initialised_is_adopted_and_left_alone(library: Library) -> None:
    library.status = 2
    joined(library).close(abort=False)
    assert library.seen == []
    library.rank = 1  # by its own numbering
    with pytest.raises(fmg.CommError, match=r"number 1 of 2; it is rank 0 of 2\. Must be the same"):
        NvshmemSource.join(0, 2, 0, both({}), None)


def test_all_are_told_why_one_cannot(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fmg.CommError, match="Rank 1 cannot use NVSHMEM: no library"):
        NvshmemSource.join(0, 2, 0, both({0: ("", "no library", False)}), None)
    with pytest.raises(fmg.CommError, match="already initialised by ranks 1 alone"):
        NvshmemSource.join(0, 2, 0, both({0: ("", "", True)}), None)
    library.seen.clear()

    def missing() -> str:
        raise fmg.UnsupportedError("NVSHMEM is not installed: pip install it.")

    monkeypatch.setattr("flashmoe_gen.packages.check_nvshmem", missing)
    with pytest.raises(fmg.CommError, match="Rank 0 cannot use NVSHMEM: NVSHMEM is not installed"):
        joined(library)
    assert library.seen == []


def test_no_memory_and_no_way_to_a_peer(library: Library) -> None:
    source = joined(library)
    with pytest.raises(fmg.CommError, match=f"no {1 << 41} bytes of symmetric memory.*NVSHMEM_MAX_MEMORY_PER_GPU"):
        source.allocate(1 << 41)
    library.reachable = False
    with pytest.raises(fmg.CommError, match="cannot address the memory of rank 1"):
        source.allocate(4096)


def test_sub_groups_have_their_part(library: Library) -> None:
    with pytest.raises(fmg.SpecError, match="heap_bytes="):
        joined(library).part([0], both({}))
    library.status = 0
    source = joined(library, heap_bytes=1 << 16)
    part = source.part([1, 0], both({}))
    heaps = part.allocate(1 << 16)
    assert heaps.pointers[0] - heaps.pointers[1] == 1 << 30, "in the order of the group"
    with pytest.raises(fmg.CommError, match="heap_bytes=65536 is too small"):
        part.allocate(1 << 17)
    with pytest.raises(fmg.UnsupportedError, match="split"):
        part.part([0], both({}))
    assert not part.collective
    heaps.release(abort=False)
    part.close(abort=False)
    assert not any(what[0] == "free" for what in library.seen), "it goes with the group of all"
    source.close(abort=False)
    assert [what[0] for what in library.seen[-2:]] == ["free", "finalize"]
