"""Launching GPU kernels through CuPy, which is imported only when a GPU is asked for."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import packages
from ..arch import ARCHS
from ..cache import Cache, CompiledKernel
from ..errors import FlashMoEError, SpecError, UnsupportedError
from ..render import render_parts
from . import streams
from .config import LaunchConfig
from .memory import CudaMemory
from .target import LaunchShape, Prepared, Target, loaded
from .tensor_maps import TensorMaps

logger = logging.getLogger("flashmoe_gen")

_MOST_BLOCKS = 1 << 20


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


@dataclass(frozen=True)
class CudaKernel:
    """A loaded GPU kernel.

    Attributes:
        compiled: what the cache says of it.
        function: CuPy's, which keeps the code loaded.
        shape: what its launches need.
        config: how it is launched.
        max_workers: blocks that are resident at the same time on the whole GPU: whole clusters.
    """

    compiled: CompiledKernel
    function: Any
    shape: LaunchShape
    config: LaunchConfig
    max_workers: int


class _Thread(threading.local):
    """Whether the driver has a context in this thread: launches ask for one, CuPy makes one when first used."""

    bound = False


class CudaTarget:
    """The GPU that is the current one when this is made. Calls are asynchronous on the caller's stream.

    Args:
        max_blocks: the most blocks of one launch; default: as many as are resident at the same time.
        ranks_here: ranks of the communicator in this process, which share the GPU evenly.

    Raises:
        UnsupportedError: CuPy is missing, or no kernels exist for this GPU.
        FlashMoEError: no driver, or no GPU.
    """

    name = "cuda"
    synchronous = False
    readable = False
    system_workers = 1  # the block of scheduler and subscriber

    def __init__(self, max_blocks: int | None = None, ranks_here: int = 1) -> None:
        require_device()
        import cupy

        if max_blocks is not None and not (isinstance(max_blocks, (int, np.integer)) and 2 <= max_blocks <= _MOST_BLOCKS):
            raise SpecError(
                f"max_blocks={max_blocks} is not valid. Must be at least 2: one block is the operating system; "
                f"and at most {_MOST_BLOCKS}."
            )
        device = cupy.cuda.Device()
        self.max_blocks, self.ranks_here = max_blocks, ranks_here
        self.number = int(device.id)
        self.device = f"cuda:{self.number}"
        self._runtime, self._current_stream = cupy.cuda.runtime, cupy.cuda.get_current_stream
        self._thread = _Thread()
        self._maps = TensorMaps()
        self._kept: deque[tuple[Any, tuple[Any, ...]]] = deque()  # events, and what must live until they are past
        self._captured: list[tuple[Any, ...]] = []
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])
        self.arch = _arch_of(device.compute_capability)

    def _here(self) -> Any:
        """A context in which the target's GPU is the current one."""
        import cupy

        return cupy.cuda.Device(self.number)

    def load(self, compiled: CompiledKernel, shape: LaunchShape) -> CudaKernel:
        with self._here():
            function = self._function(compiled, shape.shared_bytes)
            resident = self._resident(compiled.name, function.ptr, shape)
        if resident < 1:
            raise UnsupportedError(
                f"{compiled.name} does not fit {self.device}: {shape.threads} threads, {compiled.registers} registers, "
                f"{shape.shared_bytes} bytes of shared memory per block."
            )
        # Cooperative: the driver starts all blocks or none. Not where ranks share a GPU: what the stream of one runs before its
        # launch, such as the clearing after reset(), may find no room beside another's cooperative launch.
        config = LaunchConfig(
            compiled.name,
            function.ptr,
            shape.threads,
            shape.shared_bytes,
            cluster=shape.cluster,
            cooperative=shape.waiting and self.ranks_here == 1,
        )
        return CudaKernel(compiled, function, shape, config, resident)

    def _function(self, compiled: CompiledKernel, shared_bytes: int) -> Any:
        """The kernel on the current GPU: CuPy loads a module on each where it is used."""
        import cupy

        try:
            kernel = cupy.RawModule(path=str(compiled.path)).get_function(compiled.name)
            if shared_bytes:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            return kernel.kernel
        except cupy.cuda.driver.CUDADriverError as error:
            raise FlashMoEError(f"The kernel {compiled.path} cannot be loaded on {self.device}: {error}") from error

    def _resident(self, name: str, function: int, shape: LaunchShape) -> int:
        """Blocks of a kernel that the whole GPU runs at the same time."""
        import cupy

        if shape.cluster == 1:
            occupancy = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor
            return int(occupancy(function, shape.threads, shape.shared_bytes)) * self.multiprocessors
        config = LaunchConfig(name, function, shape.threads, shape.shared_bytes, cluster=shape.cluster)
        return config.active_clusters() * shape.cluster

    def load_helpers(self) -> None:
        _ = self._narrow

    def reaches(self, other: Target) -> str:
        if (self.name, self.device) == (other.name, other.device):
            return ""
        return f"The communicator's layers run on {other.device}; this one would run on {self.device}."

    def processors(self, kernel: Any) -> int:
        # Every block must be resident: they wait for each other.
        cluster, most = kernel.shape.cluster, kernel.max_workers // self.ranks_here
        blocks = most if self.max_blocks is None else self.max_blocks
        if not 2 * cluster <= blocks <= most:
            raise SpecError(
                f"max_blocks={blocks} is not valid. {self.ranks_here} ranks on {self.device} can have at most "
                f"{most} resident blocks each, and need {2 * cluster}."
            )
        return int(blocks // cluster - 1)

    def expected(self, shape: LaunchShape, ranks_here: int) -> tuple[int, int]:
        blocks = max(2, shape.min_blocks * self.multiprocessors // ranks_here)
        return max(1, blocks // shape.cluster - 1), blocks

    def workers(self, kernel: Any, processors: int) -> int:
        return int(kernel.shape.cluster * (processors + 1))

    def router_workers(self, kernel: Any, tokens: int, wanted: int) -> int:
        return max(1, min(wanted, self.multiprocessors))

    def allocate(self, nbytes: int) -> CudaMemory:
        return CudaMemory(nbytes, self.number)

    def upload(self, array: np.ndarray[Any, Any]) -> CudaMemory:
        import cupy

        memory = self.allocate(array.nbytes)
        host = np.ascontiguousarray(array)
        with self._here():
            cupy.cuda.runtime.memcpy(memory.pointer, host.ctypes.data, host.nbytes, cupy.cuda.runtime.memcpyHostToDevice)
        return memory

    def record(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with self._here():
            streams.interrupter(self.device)  # made before any kernel runs, which its allocation may wait for
            return streams.pinned(array)

    def stream(self, given: Any, array: Any) -> Any:
        if given is not None:
            return streams.external(given)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(array, torch.Tensor) and array.is_cuda:
            return streams.of_handle(torch.cuda.current_stream(array.device).cuda_stream)
        return self._current_stream(self.number)

    def dlpack_stream(self, stream: Any) -> int:
        return -1 if streams.is_capturing(stream) else stream.ptr or 1  # 1: the legacy default stream

    def prepare(self, kernel: Any, args: np.ndarray[Any, Any]) -> Prepared:
        if not kernel.shape.boxes:
            return Prepared(args)
        with self._here():
            return Prepared(args, [self._maps.encoded(box, args[0]) for box in kernel.shape.boxes])

    def launch(
        self,
        kernel: Any,
        prepared: Prepared,
        workers: int,
        stream: Any,
        stop: ctypes.c_uint32 | None = None,
    ) -> None:
        self._launch(kernel.config, prepared.parameters, workers, stream)

    def _launch(self, config: LaunchConfig, parameters: int, blocks: int, stream: Any) -> None:
        if self._thread.bound and self._runtime.getDevice() == self.number:
            config.launch(parameters, blocks, stream.ptr)
            return
        with self._here():
            if not self._thread.bound:
                import cupy

                if not cupy.cuda.driver.ctxGetCurrent():
                    cupy.cuda.runtime.memGetInfo()
                self._thread.bound = True
            config.launch(parameters, blocks, stream.ptr)

    def interrupt(self, aborted: Sequence[int]) -> None:
        """A copy engine writes while the kernels have all multiprocessors; nothing is allocated, which might wait for them."""
        import cupy

        copy, kind = cupy.cuda.runtime.memcpyAsync, cupy.cuda.runtime.memcpyHostToDevice
        with self._here():
            source, stream = streams.interrupter(self.device)
            for address in aborted:
                copy(address, source.ctypes.data, 4, kind, stream.ptr)

    def narrow_ids(self, pointer: int, count: int, to: int, experts: int, stream: Any) -> None:
        if count:
            arguments = [np.array([value], kind) for value, kind in ((pointer, "u8"), (to, "u8"), (count, "i8"), (experts, "i4"))]
            prepared = Prepared(arguments[0], arguments[1:])
            self._launch(self._narrow.config, prepared.parameters, min(self.multiprocessors, -(-count // 256)), stream)

    @functools.cached_property
    def _narrow(self) -> CudaKernel:
        return loaded(lambda: build_program("narrow_ids", self.arch), lambda made: self.load(made, LaunchShape(256, 0)))

    def follow(self, stream: Any, before: Any) -> None:
        import cupy

        if before is None or before.ptr == stream.ptr or streams.is_capturing(stream) or streams.is_capturing(before):
            return
        with self._here():
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
        with self._here():
            event = cupy.cuda.Event(disable_timing=True)
            event.record(stream)
        self._kept.append((event, owners))

    def forget(self) -> None:
        self._kept.clear()
        self._captured.clear()
        self._maps.clear()

    def synchronize(self) -> None:
        import cupy

        with self._here():
            cupy.cuda.runtime.deviceSynchronize()


def _arch_of(capability: str) -> str:
    for suffix in ("", "a"):
        name = f"sm_{capability}{suffix}"
        if name in ARCHS:
            return name
    raise UnsupportedError(f"No kernels exist for compute capability {capability}. Supported: {', '.join(map(repr, ARCHS))}.")
