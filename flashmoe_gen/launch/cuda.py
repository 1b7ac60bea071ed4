"""Launching GPU kernels through CuPy, which is imported only when a GPU is asked for."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import packages
from ..arch import ARCHS
from ..cache import Cache, CompiledKernel
from ..errors import CommError, FlashMoEError, SpecError, UnsupportedError
from ..programs import TensorBox
from ..render import render_parts
from . import streams, tensor_maps
from .target import Target, loaded

logger = logging.getLogger("flashmoe_gen")

_MOST_BLOCKS = 1 << 20
_MOST_MAPS = 64  # tensor maps kept; weights that move at every call make new ones


def device_count() -> int:
    """GPUs this process can use; 0 without CuPy, driver or GPU."""
    try:
        return int(packages.import_cupy().cuda.runtime.getDeviceCount())
    except Exception as error:
        logger.debug("no usable GPU: %s", error)
        return 0


def require_device() -> None:
    """Return if a GPU is usable.

    Raises:
        UnsupportedError: CuPy is not installed; names the command that installs it.
        FlashMoEError: CuPy cannot be imported, no driver, or no GPU.
    """
    try:
        cupy = packages.import_cupy()
    except UnsupportedError as error:
        raise UnsupportedError(f"target='cuda' needs CuPy. {error}") from error
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except Exception as error:
        text = str(error)
        if "InsufficientDriver" in text:
            raise FlashMoEError(f"target='cuda': no NVIDIA driver, or one too old for this CuPy ({text}).") from error
        if "NoDevice" in text:
            raise FlashMoEError(f"target='cuda': the NVIDIA driver finds no GPU ({text}).") from error
        raise FlashMoEError(f"target='cuda': CUDA cannot be used here ({text}).") from error
    if count == 0:
        raise FlashMoEError("target='cuda': the NVIDIA driver finds no GPU.")


def device_name() -> str:
    """The name of the current GPU."""
    import cupy

    return str(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode())


def driver_version() -> str:
    """The driver's version and the newest CUDA it runs."""
    import cupy

    cuda = cupy.cuda.runtime.driverGetVersion()
    try:
        module = Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()
        kernel = next(word for word in module if word[0].isdigit())
    except (OSError, IndexError, StopIteration):
        kernel = "unknown"
    return f"{kernel} (CUDA {cuda // 1000}.{cuda % 1000 // 10})"


def build_program(name: str, arch: str) -> CompiledKernel:
    """Compile one of the small programs beside the kernels: ``"narrow_ids"`` (cached)."""
    text = render_parts([f"gpu/{name}.cu"], {})
    digest = hashlib.sha256(text.encode()).hexdigest()
    command = f"flashmoe-gen compile --arch {arch}"
    return Cache().build(text, name=f"flashmoe_{name}", arch=arch, digest=digest, metadata={"command": command})


class CudaMemory:
    """Zeroed memory of the current GPU; CuPy's pool aligns to 512 bytes."""

    def __init__(self, nbytes: int) -> None:
        import cupy

        try:
            self._array = cupy.zeros(max(nbytes, 1), cupy.uint8)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise CommError(f"The GPU has no {nbytes} bytes of memory left: {error}") from None
        cupy.cuda.get_current_stream().synchronize()  # zero before a launch on any other stream
        self.pointer = int(self._array.data.ptr)
        self.nbytes = nbytes

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        cupy.cuda.runtime.memset(self.pointer + offset, value, nbytes)
        cupy.cuda.runtime.deviceSynchronize()

    def read(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        return np.asarray(cupy.asnumpy(self._array[offset : offset + nbytes]))


@dataclass(frozen=True)
class CudaKernel:
    """A loaded GPU kernel.

    Attributes:
        compiled: what the cache says of it.
        function: CuPy's function, which takes a stream.
        threads: threads of a block.
        shared_bytes: dynamic shared memory of a block.
        max_workers: blocks that are resident at the same time on the whole GPU: whole clusters.
        cluster: blocks of a processor.
        boxes: the tensor maps it takes after its argument struct.
        cooperative: its blocks wait for each other: the driver starts all of them or none.
    """

    compiled: CompiledKernel
    function: Any
    threads: int
    shared_bytes: int
    max_workers: int
    cluster: int
    boxes: tuple[TensorBox, ...]
    cooperative: bool


class CudaTarget:
    """The current GPU. Calls are asynchronous on the caller's stream.

    Args:
        max_blocks: the most blocks of one launch; default: as many as are resident at the same time.

    Raises:
        UnsupportedError: CuPy is missing, or no kernels exist for this GPU.
        FlashMoEError: no driver, or no GPU.
    """

    name = "cuda"
    synchronous = False
    system_workers = 1  # the block of scheduler and subscriber

    def __init__(self, max_blocks: int | None = None) -> None:
        require_device()
        import cupy

        if max_blocks is not None and not (isinstance(max_blocks, (int, np.integer)) and 2 <= max_blocks <= _MOST_BLOCKS):
            raise SpecError(
                f"max_blocks={max_blocks} is not valid. Must be at least 2: one block is the operating system; "
                f"and at most {_MOST_BLOCKS}."
            )
        device = cupy.cuda.Device()
        self.max_blocks = max_blocks
        self.device = f"cuda:{device.id}"
        self._maps: dict[Any, np.ndarray[Any, Any]] = {}
        self._kept: deque[tuple[Any, tuple[Any, ...]]] = deque()  # events, and what must live until they are past
        self._captured: list[tuple[Any, ...]] = []
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])
        self.arch = _arch_of(device.compute_capability)

    def load(
        self,
        compiled: CompiledKernel,
        *,
        threads: int,
        shared_bytes: int,
        boxes: Sequence[TensorBox] = (),
        cooperative: bool = False,
        cluster: int = 1,
    ) -> CudaKernel:
        function = self._function(compiled)
        if shared_bytes:
            function.max_dynamic_shared_size_bytes = shared_bytes
        resident = self._resident(function.kernel.ptr, threads, shared_bytes, cluster)
        if resident < 1:
            raise UnsupportedError(
                f"{compiled.name} does not fit {self.device}: {threads} threads, {compiled.registers} registers, "
                f"{shared_bytes} bytes of shared memory per block."
            )
        return CudaKernel(
            compiled, function.kernel, threads, shared_bytes, resident, cluster, tuple(boxes), cooperative
        )

    def _function(self, compiled: CompiledKernel) -> Any:
        import cupy

        try:
            return cupy.RawModule(path=str(compiled.path)).get_function(compiled.name)
        except cupy.cuda.driver.CUDADriverError as error:
            raise FlashMoEError(f"The kernel {compiled.path} cannot be loaded on {self.device}: {error}") from error

    def _resident(self, function: int, threads: int, shared_bytes: int, cluster: int) -> int:
        """Blocks of a kernel that the whole GPU runs at the same time."""
        if cluster == 1:
            import cupy

            occupancy = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
            return int(occupancy(function, threads, shared_bytes)) * self.multiprocessors
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = cluster, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared_bytes
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = cluster, 1, 1
        config.attrs, config.numAttrs = [attribute], 1
        status, clusters = driver.cuOccupancyMaxActiveClusters(driver.CUfunction(function), config)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise FlashMoEError(f"The clusters that fit {self.device} cannot be counted: {status.name}.")
        return int(clusters) * cluster

    def load_helpers(self) -> None:
        _ = self._narrow

    def processors(self, kernel: Any, world_size: int) -> int:
        # Every block must be resident: they wait for each other. Ranks of this process share the GPU.
        cluster, most = kernel.cluster, kernel.max_workers // world_size
        blocks = most if self.max_blocks is None else self.max_blocks
        if not 2 * cluster <= blocks <= most:
            raise SpecError(
                f"max_blocks={blocks} is not valid. {world_size} ranks on {self.device} can have at most "
                f"{most} resident blocks each, and need {2 * cluster}."
            )
        return int(blocks // cluster - 1)

    def workers(self, kernel: Any, processors: int) -> int:
        return int(kernel.cluster * (processors + 1))

    def router_workers(self, kernel: Any, tokens: int, wanted: int) -> int:
        return max(1, min(wanted, self.multiprocessors))

    def allocate(self, nbytes: int) -> CudaMemory:
        return CudaMemory(nbytes)

    def upload(self, array: np.ndarray[Any, Any]) -> CudaMemory:
        import cupy

        memory = CudaMemory(array.nbytes)
        host = np.ascontiguousarray(array)
        cupy.cuda.runtime.memcpy(memory.pointer, host.ctypes.data, host.nbytes, cupy.cuda.runtime.memcpyHostToDevice)
        return memory

    def record(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        streams.interrupter(self.device)  # made before any kernel runs, which its allocation may wait for
        return streams.pinned(array)

    def stream(self, given: Any, array: Any) -> Any:
        import cupy

        if given is not None:
            return streams.external(given)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor) and array.is_cuda:
            return streams.external(torch.cuda.current_stream(array.device).cuda_stream)
        return cupy.cuda.get_current_stream()

    def dlpack_stream(self, stream: Any) -> int:
        return -1 if streams.is_capturing(stream) else stream.ptr or 1  # 1: the legacy default stream

    def prepare(self, kernel: Any, args: np.ndarray[Any, Any]) -> tuple[Any, ...]:
        return tuple(self._tensor_map(box, args[0]) for box in kernel.boxes)

    def launch(
        self,
        kernel: Any,
        args: np.ndarray[Any, Any],
        workers: int,
        stream: Any,
        prepared: tuple[Any, ...] = (),
        stop: ctypes.c_uint32 | None = None,
    ) -> None:
        kernel.function((workers,), (kernel.threads,), (args[0], *prepared), kernel.shared_bytes, stream, kernel.cooperative)

    def interrupt(self, aborted: Sequence[int]) -> None:
        """A copy engine writes while the kernels have all multiprocessors; nothing is allocated, which might wait for them."""
        import cupy

        source, stream = streams.interrupter(self.device)
        for address in aborted:
            cupy.cuda.runtime.memcpyAsync(address, source.ctypes.data, 4, cupy.cuda.runtime.memcpyHostToDevice, stream.ptr)

    def narrow_ids(self, pointer: int, count: int, to: int, experts: int, stream: Any) -> None:
        blocks = min(self.multiprocessors, -(-count // 256))
        arguments = (np.uint64(pointer), np.uint64(to), np.int64(count), np.int32(experts))
        if count:
            self._narrow.kernel((blocks,), (256,), arguments, 0, stream)

    @functools.cached_property
    def _narrow(self) -> Any:
        return loaded(lambda: build_program("narrow_ids", self.arch), self._function)

    def follow(self, stream: Any, before: Any) -> None:
        import cupy

        if before is None or before.ptr == stream.ptr or streams.is_capturing(stream) or streams.is_capturing(before):
            return
        try:
            event = cupy.cuda.Event(disable_timing=True)
            event.record(before)
            stream.wait_event(event)
        except cupy.cuda.runtime.CUDARuntimeError:  # its owner has destroyed it
            cupy.cuda.runtime.deviceSynchronize()

    def keep(self, stream: Any, owners: tuple[Any, ...]) -> None:
        import cupy

        if streams.is_capturing(stream):
            self._captured.append(owners)
            return
        while self._kept and self._kept[0][0].done:
            self._kept.popleft()
        event = cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        self._kept.append((event, owners))

    def forget(self) -> None:
        self._kept.clear()
        self._captured.clear()
        self._maps.clear()

    def _tensor_map(self, box: TensorBox, args: Any) -> np.ndarray[Any, Any]:
        """The 128-byte tensor map of a box, encoded once per address."""
        given = [f"{box.name}_expert_stride", f"{box.name}_row_stride"]
        strides = [int(args[name]) if name in args.dtype.names else 0 for name in given]
        strides = [stride or follows for stride, follows in zip(strides, (box.rows * box.columns, box.columns))]
        # A rank without experts has no weights and never loads them, but a map must have an address.
        pointer, count = int(args[box.name]) or int(args["ring"]), max(1, int(args[box.count]))
        key = box, pointer, count, *strides
        if key not in self._maps:
            if len(self._maps) >= _MOST_MAPS:
                self._maps.clear()
            self._maps[key] = tensor_maps.encode(box, pointer, count, *strides)
        return self._maps[key]

    def reaches(self, other: Target) -> str:
        if (self.name, self.device) == (other.name, other.device):
            return ""
        return f"The communicator's layers run on {other.device}; this one would run on {self.device}."

    def synchronize(self) -> None:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()


def _arch_of(capability: str) -> str:
    for suffix in ("", "a"):
        name = f"sm_{capability}{suffix}"
        if name in ARCHS:
            return name
    raise UnsupportedError(f"No kernels exist for compute capability {capability}. Supported: {', '.join(map(repr, ARCHS))}.")
