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
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import packages
from ..arch import ARCHS
from ..cache import Cache, CompiledKernel
from ..errors import FlashMoEError, SpecError, UnsupportedError
from ..render import render_parts
from . import streams
from .config import LaunchConfig
from .memory import CudaMemory, peer_access
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
    """A GPU. Calls are asynchronous on the caller's stream.

    Args:
        max_blocks: the most blocks of one launch; default: as many as are resident at the same time.
        sharing: ranks of the communicator that share the GPU, evenly.
        device: its number; default: the one that is current when this is made.
        reserve_multiprocessors: multiprocessors that launches leave to other kernels.

    Raises:
        UnsupportedError: CuPy is missing, or no kernels exist for this GPU.
        FlashMoEError: no driver, or no GPU.
    """

    name: Literal["host", "cuda"] = "cuda"
    synchronous = False
    readable = False
    system_workers = 1  # the block of scheduler and subscriber

    def __init__(
        self,
        max_blocks: int | None = None,
        sharing: int = 1,
        *,
        device: int | None = None,
        reserve_multiprocessors: int = 0,
    ) -> None:
        require_device()
        import cupy

        if max_blocks is not None and not (
            isinstance(max_blocks, (int, np.integer)) and 2 <= max_blocks <= _MOST_BLOCKS
        ):
            raise SpecError(
                f"max_blocks={max_blocks} is not valid. Must be at least 2: one block is the operating system; "
                f"and at most {_MOST_BLOCKS}."
            )
        count = int(cupy.cuda.runtime.getDeviceCount())
        if device is not None and not 0 <= device < count:
            raise SpecError(f"device={device} is not valid. This process sees {count} GPUs: 0 to {count - 1}.")
        gpu = cupy.cuda.Device(device)
        self.multiprocessors = int(gpu.attributes["MultiProcessorCount"])
        if not (
            isinstance(reserve_multiprocessors, (int, np.integer))
            and 0 <= reserve_multiprocessors < self.multiprocessors
        ):
            raise SpecError(
                f"reserve_multiprocessors={reserve_multiprocessors} is not valid. Must be at least 0 and below the "
                f"{self.multiprocessors} of the GPU."
            )
        self.max_blocks, self.sharing, self.reserve_multiprocessors = max_blocks, sharing, int(reserve_multiprocessors)
        self.number = int(gpu.id)
        self.device = f"cuda:{self.number}"
        self._runtime, self._current_stream = cupy.cuda.runtime, cupy.cuda.get_current_stream
        self._thread = _Thread()
        self._maps = TensorMaps()
        self._kept: deque[tuple[Any, tuple[Any, ...]]] = deque()  # events, and what must live until they are past
        self._captured: list[tuple[Any, ...]] = []
        self.arch = _arch_of(gpu.compute_capability)

    def current(self) -> AbstractContextManager[object]:
        import cupy

        device: AbstractContextManager[object] = cupy.cuda.Device(self.number)
        return device

    def load(self, compiled: CompiledKernel, shape: LaunchShape) -> CudaKernel:
        with self.current():
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
            cooperative=shape.waiting and self.sharing == 1,
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
        if not isinstance(other, CudaTarget):
            return f"The communicator's layers run on {other.device}; this one would run on {self.device}."
        return "" if self.number == other.number else peer_access(self.number, other.number)

    def _room(self, resident: int, sharing: int) -> int:
        """Of so many resident blocks, those that one rank may have."""
        everywhere, reserved = self.multiprocessors, self.reserve_multiprocessors
        if reserved:  # where several fit a multiprocessor, the second ones come after all have one: none would be left free
            resident = min(resident, everywhere) * (everywhere - reserved) // everywhere
        return resident // sharing

    def processors(self, kernel: Any) -> int:
        # Every block must be resident: they wait for each other.
        cluster, most = kernel.shape.cluster, self._room(kernel.max_workers, self.sharing)
        blocks = most if self.max_blocks is None else self.max_blocks
        if not 2 * cluster <= blocks <= most:
            raise SpecError(
                f"max_blocks={blocks} is not valid. {self.sharing} ranks on {self.device} can have at most "
                f"{most} resident blocks each with reserve_multiprocessors={self.reserve_multiprocessors}, and need {2 * cluster}."
            )
        return int(blocks // cluster - 1)

    def expected(self, shape: LaunchShape, sharing: int) -> tuple[int, int]:
        blocks = max(2, self._room(shape.min_blocks * self.multiprocessors, sharing))
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
        with self.current():
            cupy.cuda.runtime.memcpy(
                memory.pointer, host.ctypes.data, host.nbytes, cupy.cuda.runtime.memcpyHostToDevice
            )
        return memory

    def record(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        with self.current():
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
        with self.current():
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
        with self.current():
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
        with self.current():
            source, stream = streams.interrupter(self.device)
            for address in aborted:
                copy(address, source.ctypes.data, 4, kind, stream.ptr)

    def narrow_ids(self, pointer: int, count: int, to: int, experts: int, stream: Any) -> None:
        if count:
            kernel, prepared, parameters = self._narrow
            for parameter, value in zip(parameters, (pointer, to, count, experts)):
                parameter[0] = value
            self._launch(kernel.config, prepared.parameters, min(self.multiprocessors, -(-count // 256)), stream)

    @functools.cached_property
    def _narrow(self) -> tuple[CudaKernel, Prepared, list[np.ndarray[Any, Any]]]:
        kernel = loaded(
            lambda: build_program("narrow_ids", self.arch), lambda made: self.load(made, LaunchShape(256, 0))
        )
        parameters: list[np.ndarray[Any, Any]] = [np.zeros(1, kind) for kind in ("u8", "u8", "i8", "i4")]
        return kernel, Prepared(parameters[0], parameters[1:]), parameters

    def follow(self, stream: Any, before: Any) -> None:
        import cupy

        if before is None or before.ptr == stream.ptr or streams.is_capturing(stream) or streams.is_capturing(before):
            return
        with self.current():
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
        with self.current():
            event = cupy.cuda.Event(disable_timing=True)
            event.record(stream)
        self._kept.append((event, owners))

    def forget(self) -> None:
        self._kept.clear()
        self._captured.clear()
        self._maps.clear()

    def synchronize(self) -> None:
        import cupy

        with self.current():
            cupy.cuda.runtime.deviceSynchronize()


def _arch_of(capability: str) -> str:
    for suffix in ("", "a"):
        name = f"sm_{capability}{suffix}"
        if name in ARCHS:
            return name
    raise UnsupportedError(
        f"No kernels exist for compute capability {capability}. Supported: {', '.join(map(repr, ARCHS))}."
    )
