"""What the launch makes of a kernel's needs, without a GPU: the driver's functions are replaced by ones that look."""

from __future__ import annotations

import ctypes
import struct
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import flashmoe_gen as fmg
from flashmoe_gen.args import MOE_ARGS
from flashmoe_gen.launch import choose
from flashmoe_gen.launch.config import LaunchConfig
from flashmoe_gen.launch.cuda import CudaTarget
from flashmoe_gen.launch.host import HostTarget
from flashmoe_gen.launch.target import LaunchShape, Prepared
from flashmoe_gen.launch.tensor_maps import TensorMaps
from flashmoe_gen.programs import TensorBox

driver: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
DOWN = TensorBox("down", "local_experts", rows=48, columns=80, box_rows=16, box_columns=64, size=2)
RING = TensorBox("ring", "ring_slots", rows=128, columns=80, box_rows=64, box_columns=64, size=2)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cuTensorMapEncodeTiled has been given."""
    calls: list[tuple[Any, ...]] = []

    def encode(*given: Any) -> Any:
        calls.append(given)
        return driver.CUresult.CUDA_SUCCESS, driver.CUtensorMap()

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    return calls


def test_tensor_maps_take_strides_in_bytes(encoded: list[tuple[Any, ...]]) -> None:
    args = MOE_ARGS.zeros()
    for name, value in {"down": 4096, "local_experts": 3, "down_row_stride": 192, "down_expert_stride": 9216}.items():
        args[name] = value
    args["ring"], args["ring_slots"] = 8192, 5
    maps = TensorMaps()
    assert maps.encoded(DOWN, args[0]).nbytes == maps.encoded(RING, args[0]).nbytes == 128
    (_, _, pointer, sizes, strides, *_), ring = encoded
    assert (pointer, [*map(int, sizes)], [*map(int, strides)]) == (4096, [80, 48, 3], [192, 9216])
    assert (ring[2], [*map(int, ring[3])], [*map(int, ring[4])]) == (8192, [80, 128, 5], [160, 128 * 160])


def test_a_tensor_map_is_encoded_once_per_address(encoded: list[tuple[Any, ...]]) -> None:
    args = MOE_ARGS.zeros()
    args["down"], args["local_experts"] = 4096, 3
    maps = TensorMaps()
    first = maps.encoded(DOWN, args[0])
    assert maps.encoded(DOWN, args[0]) is first and len(encoded) == 1
    args["down"] = 8192
    assert maps.encoded(DOWN, args[0]) is not first and len(encoded) == 2
    maps.clear()
    maps.encoded(DOWN, args[0])
    assert len(encoded) == 3


def test_the_target_is_what_was_named_else_the_environments_else_the_communicators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["flashmoe_gen.launch.choose"]
    monkeypatch.setattr(module, "CudaTarget", lambda *options, **more: ("cuda", *options, *more.values()))
    monkeypatch.setattr(module, "device_count", lambda: 1)
    monkeypatch.delenv("FLASHMOE_TARGET", raising=False)
    assert choose(None) == choose("cuda") == ("cuda", None, 1, None, 0)
    assert choose("cuda", "host", 8, 2, device=1, reserve_multiprocessors=4) == ("cuda", 8, 2, 1, 4)
    assert choose(None, "host").name == "host"
    monkeypatch.setenv("FLASHMOE_TARGET", "host")
    assert choose(None, "cuda").name == "host"
    assert choose("cuda") == ("cuda", None, 1, None, 0)
    monkeypatch.delenv("FLASHMOE_TARGET")
    monkeypatch.setattr(module, "device_count", lambda: 0)
    assert choose(None).name == "host"
    with pytest.raises(fmg.SpecError, match="max_blocks= is not valid for target='host'"):
        choose("host", max_blocks=4)
    with pytest.raises(fmg.SpecError, match="reserve_multiprocessors= is not valid for target='host'"):
        choose("host", reserve_multiprocessors=4)
    with pytest.raises(fmg.SpecError, match=r"is on GPU 1\. target='host' is not valid there"):
        choose("host", device=1)
    with pytest.raises(fmg.SpecError, match=r"target='gpu' is not valid\. Must be 'host' or 'cuda'"):
        choose("gpu")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cuLaunchKernelEx has been given: function, blocks, stream, and the first words of the first two arguments."""
    calls: list[tuple[Any, ...]] = []

    def launch(config: Any, function: Any, parameters: int, extra: int) -> Any:
        addresses = (ctypes.c_uint64 * 2).from_address(parameters)
        words = [ctypes.c_uint32.from_address(address).value for address in addresses]
        calls.append((int(function), config.gridDimX, int(config.hStream), *words))
        return (driver.CUresult.CUDA_SUCCESS if config.gridDimX < 1000 else driver.CUresult.CUDA_ERROR_INVALID_VALUE,)

    monkeypatch.setattr(driver, "cuLaunchKernelEx", launch)
    return calls


def attributes(config: LaunchConfig) -> dict[str, Any]:
    fields = {"CLUSTER_DIMENSION": "clusterDim", "PRIORITY": "priority", "COOPERATIVE": "cooperative"}
    fields["PROGRAMMATIC_STREAM_SERIALIZATION"] = "programmaticStreamSerializationAllowed"
    names = [attribute.id.name.removeprefix("CU_LAUNCH_ATTRIBUTE_") for attribute in config._config.attrs]
    found = {name: getattr(a.value, fields[name]) for name, a in zip(names, config._config.attrs)}
    assert config._config.numAttrs == len(found)
    return {name: (v.x, v.y, v.z) if name == "CLUSTER_DIMENSION" else v for name, v in found.items()}


def test_a_launch_says_only_what_was_asked_for() -> None:
    plain = LaunchConfig("k", 1, 384, 2000)
    assert attributes(plain) == {}
    assert (plain._config.blockDimX, plain._config.blockDimY, plain._config.sharedMemBytes) == (384, 1, 2000)
    everything = LaunchConfig("k", 1, 384, cluster=2, cooperative=True, programmatic=True, priority=-3)
    assert attributes(everything) == {
        "CLUSTER_DIMENSION": (2, 1, 1), "COOPERATIVE": 1, "PROGRAMMATIC_STREAM_SERIALIZATION": 1, "PRIORITY": -3
    }  # fmt: skip


def test_launches_see_the_struct_as_it_is_then(launched: list[tuple[Any, ...]]) -> None:
    config, args, beside = LaunchConfig("k", 7, 32), np.array([5], np.uint32), np.array([6], np.uint32)
    prepared = Prepared(args, [beside])
    config.launch(prepared.parameters, 3, 0)
    args[0] = 8
    config.launch(prepared.parameters, 3, 99)
    struct.pack_into("I", prepared.bytes, 0, 9)
    config.launch(prepared.parameters, 4, 99)
    assert launched == [(7, 3, 1, 5, 6), (7, 3, 99, 8, 6), (7, 4, 99, 9, 6)]
    with pytest.raises(fmg.FlashMoEError, match=r"k cannot be launched with 1000 blocks: CUDA_ERROR_INVALID_VALUE"):
        config.launch(prepared.parameters, 1000, 99)


def test_ranks_of_one_process_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [HostTarget(ranks).processors(None) for ranks in (1, 2, 16)] == [8, 4, 1]
    assert HostTarget().expected(LaunchShape(0, 0), 4) == (2, 4)


def gpu(number: int = 0, sharing: int = 1, max_blocks: int | None = None, reserved: int = 0) -> CudaTarget:
    """A target of a GPU that is not there, with 132 multiprocessors."""
    target = object.__new__(CudaTarget)
    target.number, target.device, target.multiprocessors = number, f"cuda:{number}", 132
    target.sharing, target.max_blocks, target.reserve_multiprocessors = sharing, max_blocks, reserved
    return target


@pytest.mark.parametrize("ranks, processors", [(1, 65), (2, 32), (8, 7)])
def test_ranks_of_one_process_share_the_blocks_of_a_gpu(ranks: int, processors: int) -> None:
    shape = LaunchShape(384, 0, cluster=2)
    kernel = SimpleNamespace(shape=shape, max_workers=132)
    assert gpu(sharing=ranks).processors(kernel) == processors == gpu().expected(shape, ranks)[0]
    assert gpu().workers(kernel, processors) == 2 * processors + 2
    match = rf"max_blocks=140 is not valid\. {ranks} ranks on cuda:0 can have at most {132 // ranks} resident"
    with pytest.raises(fmg.SpecError, match=match):
        gpu(sharing=ranks, max_blocks=140).processors(kernel)
    assert gpu(sharing=ranks, reserved=33).processors(kernel) == 99 // ranks // 2 - 1
    with pytest.raises(fmg.SpecError, match="with reserve_multiprocessors=131, and need 4"):
        gpu(sharing=ranks, reserved=131).processors(kernel)


def test_reserved_multiprocessors_get_no_block_where_several_fit_one() -> None:
    """Blocks are dealt to all multiprocessors before any gets its second."""
    shape = LaunchShape(160, 0, min_blocks=2)
    kernel = SimpleNamespace(shape=shape, max_workers=264)
    assert gpu().processors(kernel) == 263
    assert gpu(reserved=20).processors(kernel) == 111 == gpu(reserved=20).expected(shape, 1)[0]
    assert gpu(sharing=2, reserved=20).processors(kernel) == 55 == gpu(reserved=20).expected(shape, 2)[0]


def test_targets_say_whose_memory_they_reach() -> None:
    assert HostTarget().reaches(HostTarget(2)) == gpu().reaches(gpu(sharing=2)) == ""
    assert "layers run on cuda:0; this one would run on cpu" in HostTarget().reaches(gpu())
    assert "layers run on cpu; this one would run on cuda:1" in gpu(1).reaches(HostTarget())


@pytest.mark.parametrize("can", [True, False])
def test_gpus_of_one_process_use_each_others_memory(monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    enabled = []

    class RefusedError(Exception):
        pass

    def enable(peer: int) -> None:
        if (device.current, peer) in enabled:
            raise RefusedError("cudaErrorPeerAccessAlreadyEnabled: peer access is already enabled")
        enabled.append((device.current, peer))

    class device:  # noqa: N801
        current = 0

        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            self.before, device.current = device.current, self.number

        def __exit__(self, *_: object) -> None:
            device.current = self.before

    class AsyncPool:
        def malloc(self) -> None:
            pass

    runtime = SimpleNamespace(deviceCanAccessPeer=lambda a, b: can, deviceEnablePeerAccess=enable, CUDARuntimeError=RefusedError)
    cuda = SimpleNamespace(
        runtime=runtime, Device=device, MemoryAsyncPool=AsyncPool, malloc_async=lambda size: None, get_allocator=lambda: print
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    if not can:
        assert "GPU 1 cannot access the memory of GPU 0" in gpu(1).reaches(gpu())
        return
    assert gpu(1).reaches(gpu()) == gpu().reaches(gpu(1)) == gpu(1).reaches(gpu()) == ""
    assert enabled == [(1, 0), (0, 1)]
    for allocator in (AsyncPool().malloc, cuda.malloc_async):
        cuda.get_allocator = lambda allocator=allocator: allocator
        assert "CuPy allocates with cudaMallocAsync" in gpu(1).reaches(gpu())


class FakeCuda:
    """As much of CuPy as a target uses to load, allocate and launch; notes the device on which each thing happens."""

    def __init__(self) -> None:
        self.current, self.seen = 0, []
        fake, self.Function = self, SimpleNamespace(ptr=77)

        class Device:
            def __init__(self, number: int | None = None) -> None:
                self.id = fake.current if number is None else number
                self.attributes, self.compute_capability = {"MultiProcessorCount": 132}, "90"

            def __enter__(self) -> None:
                self.before, fake.current = fake.current, self.id

            def __exit__(self, *_: object) -> None:
                fake.current = self.before

        class RawModule:
            def __init__(self, path: str) -> None:
                fake.note("load")

            def get_function(self, name: str) -> Any:
                return SimpleNamespace(kernel=fake.Function)

        runtime = {"getDeviceCount": 2, "deviceSynchronize": None, "memcpy": None, "memset": None}
        self.RawModule, self.uint8 = RawModule, np.uint8
        self.cuda = SimpleNamespace(
            Device=Device,
            runtime=SimpleNamespace(
                **{name: self.noting(name, value) for name, value in runtime.items()},
                memcpyHostToDevice=1, streamIsCapturing=lambda _: 0,
            ),
            driver=SimpleNamespace(
                CUDADriverError=ValueError, ctxGetCurrent=lambda: 1,
                occupancyMaxActiveBlocksPerMultiprocessor=self.noting("occupancy", 1),
            ),
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
            get_current_stream=lambda device=0: SimpleNamespace(ptr=device, synchronize=self.noting("stream")),
        )  # fmt: skip

    def noting(self, what: str, value: Any = None) -> Any:
        return lambda *_: self.note(what, value)

    def note(self, what: str, value: Any = None) -> Any:
        self.seen.append((what, self.current))
        return value

    def zeros(self, count: int, dtype: Any) -> Any:
        self.note("zeros")
        return SimpleNamespace(data=SimpleNamespace(ptr=4096))


@pytest.mark.parametrize("ranks", [1, 2])
def test_everything_happens_on_the_gpu_of_the_target(
    monkeypatch: pytest.MonkeyPatch, launched: list[tuple[Any, ...]], ranks: int
) -> None:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr("flashmoe_gen.packages.import_cupy", lambda: fake)
    fake.current = 1
    target = CudaTarget(sharing=ranks)
    fake.current = 0
    fake.seen.clear()
    compiled: Any = SimpleNamespace(path="p", name="k", registers=32)
    kernel = target.load(compiled, LaunchShape(384, 0, waiting=True))
    assert attributes(kernel.config) == ({"COOPERATIVE": 1} if ranks == 1 else {})
    assert attributes(target.load(compiled, LaunchShape(384, 0)).config) == {}
    assert (target.device, target.arch, target.processors(kernel)) == ("cuda:1", "sm_90a", 132 // ranks - 1)
    prepared = Prepared(np.array([5], np.uint32), [np.array([6], np.uint32)])
    target.upload(np.arange(3)).fill(0, 3, 0)
    target.launch(kernel, prepared, 9, target.stream(None, None))
    target.synchronize()
    assert launched == [(77, 9, 1, 5, 6)]
    assert {device for _, device in fake.seen} == {1} and fake.current == 0
    assert {what for what, _ in fake.seen} == {"load", "occupancy", "zeros", "stream", "memcpy", "memset", "deviceSynchronize"}
