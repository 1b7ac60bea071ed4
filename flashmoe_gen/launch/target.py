"""What a target offers to the layer, the router and the communicators: memory, loaded kernels, launches."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from ..cache import CompiledKernel
from ..errors import CacheError, FlashMoEError
from ..programs import TensorBox

T = TypeVar("T")
_TRIES = 5  # of building what another process removes again before it is loaded


def loaded(build: Callable[[], CompiledKernel], load: Callable[[CompiledKernel], T]) -> T:
    """Build and load; once more when somebody has cleared the cache between the two.

    Raises:
        CacheError: it was cleared again and again.
    """
    for _ in range(_TRIES):
        compiled = build()
        try:
            return load(compiled)
        except FlashMoEError:
            if os.path.lexists(compiled.path):
                raise
    raise CacheError(f"{compiled.path} was removed {_TRIES} times before it could be loaded: another process clears the cache.")


@dataclass(frozen=True)
class LaunchShape:
    """What a kernel asks of its launches on a GPU; one of the host asks for nothing.

    Attributes:
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        cluster: blocks of a processor.
        waiting: its blocks wait for each other, so all of a launch must be resident.
        boxes: the tensor maps it takes after its argument struct.
        min_blocks: blocks of a multiprocessor that its registers are planned for.
    """

    threads: int
    shared_bytes: int
    cluster: int = 1
    waiting: bool = False
    boxes: tuple[TensorBox, ...] = ()
    min_blocks: int = 1


class Prepared:
    """The arguments of launches: a struct, changed in place between two launches, which copy it, and tensor maps beside it.

    Attributes:
        args: the struct.
        bytes: the same memory, for whom NumPy takes too long.
        pointer: its address.
        parameters: address of the array of all their addresses, as ``cuLaunchKernelEx`` takes it.
    """

    __slots__ = ("_addresses", "_beside", "args", "bytes", "parameters", "pointer")

    def __init__(self, args: np.ndarray[Any, Any], beside: Sequence[np.ndarray[Any, Any]] = ()) -> None:
        self.args, self._beside = args, tuple(beside)
        self.bytes = args.view(np.uint8).data
        self._addresses = np.array([array.ctypes.data for array in (args, *self._beside)], np.uint64)
        self.pointer, self.parameters = int(self._addresses[0]), self._addresses.ctypes.data


class Memory(Protocol):
    """Zeroed memory at a 256-byte boundary that a kernel of the target can use."""

    pointer: int
    nbytes: int

    def fill(self, offset: int, nbytes: int, value: int) -> None:
        """Set bytes, after everything launched before and before anything launched from now on."""

    def read(self, offset: int, nbytes: int) -> np.ndarray[Any, Any]:
        """A copy of some bytes as uint8, after everything launched before."""


class Kernel(Protocol):
    """A loaded kernel.

    Attributes:
        compiled: what the cache says of it.
        max_workers: the most workers (threads of the host, blocks of a GPU) that run at the same time for all ranks of this
            process; 0: no limit.
    """

    @property
    def compiled(self) -> CompiledKernel: ...

    @property
    def max_workers(self) -> int: ...


class Target(Protocol):
    """Where kernels run.

    Attributes:
        name: ``"host"`` or ``"cuda"``.
        arch: what kernels are generated for.
        device: where arrays must be: ``"cpu"`` or ``"cuda:N"``.
        synchronous: whether a launch has ended when it returns.
        readable: whether this process can read the arrays of a call, and so check them in advance.
        system_workers: workers of a MoE launch that run its operating system alone.
        sharing: ranks of the communicator that share what the target is.
    """

    name: Literal["host", "cuda"]
    arch: str
    device: str
    synchronous: bool
    readable: bool
    system_workers: int
    sharing: int

    def current(self) -> AbstractContextManager[object]:
        """Inside, its device is what other libraries, and new targets, take for the current one."""

    def load(self, compiled: CompiledKernel, shape: LaunchShape) -> Kernel:
        """Load a compiled kernel."""

    def load_helpers(self) -> None:
        """Build and load the small programs beside the kernels, so that no call has to."""

    def processors(self, kernel: Kernel) -> int:
        """Processors of one rank's MoE launch: threads (host), clusters of blocks (GPU)."""

    def expected(self, shape: LaunchShape, sharing: int) -> tuple[int, int]:
        """Processors and workers of a MoE launch of a kernel that is not loaded yet, one of so many ranks of this process."""

    def workers(self, kernel: Kernel, processors: int) -> int:
        """Workers of a MoE launch with so many processors: threads or blocks; ``system_workers`` of them make no plans."""

    def router_workers(self, kernel: Kernel, tokens: int, wanted: int) -> int:
        """Workers of a router launch for which ``wanted`` would have work."""

    def allocate(self, nbytes: int) -> Memory:
        """Zeroed memory; raises :class:`~flashmoe_gen.CommError` when there is none."""

    def upload(self, array: np.ndarray[Any, Any]) -> Memory:
        """A copy of an array in the target's memory."""

    def record(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A zeroed array like ``array`` that kernels can write and this process can read at any time."""

    def stream(self, given: Any, array: Any) -> Any:
        """The stream of a call: the one given, else the current one of the library ``array`` belongs to."""

    def dlpack_stream(self, stream: Any) -> int:
        """The stream as DLPack names it, which exporters let wait for their memory; -1: they must not."""

    def prepare(self, kernel: Kernel, args: np.ndarray[Any, Any]) -> Prepared:
        """The arguments of launches with this struct, good as long as the addresses of weights and workspace in it are."""

    def launch(
        self,
        kernel: Kernel,
        prepared: Prepared,
        workers: int,
        stream: Any,
        stop: ctypes.c_uint32 | None = None,
    ) -> None:
        """Launch with the struct as it is now. A synchronous target ends the launch early when ``stop`` is set."""

    def interrupt(self, aborted: Sequence[int]) -> None:
        """Set the words at these addresses, in memory of the target, while kernels that look at them run."""

    def narrow_ids(self, pointer: int, count: int, to: int, experts: int, stream: Any) -> None:
        """Copy int64 ids as int32, in the order of ``stream``: negative ones become -1, those of no expert ``experts``."""

    def follow(self, stream: Any, before: Any) -> None:
        """Let ``stream`` wait for what ``before`` (a stream, or ``None``) has been given so far."""

    def keep(self, stream: Any, owners: tuple[Any, ...]) -> None:
        """Keep objects alive until what ``stream`` has been given so far is done; in a captured graph, until :meth:`forget`."""

    def forget(self) -> None:
        """Let go of everything that :meth:`keep` and :meth:`prepare` hold; nothing may run any more."""

    def reaches(self, other: Target) -> str:
        """``""`` when kernels of this target can use the other target's memory, else the reason."""

    def synchronize(self) -> None:
        """Wait until nothing launched before still runs."""
