"""Builds the race-test executable and the bundle of calls it runs (ThreadSanitizer cannot watch a library inside Python)."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from scenarios import Scenario
from world import poison

from flashmoe_gen.args import MOE_ARGS
from flashmoe_gen.render import KernelSource, render_parts, template_dir

_POINTERS = [field for field in MOE_ARGS.fields if field.is_pointer]


def build(source: KernelSource, folder: Path, compiler: str = "g++") -> Path:
    """Compile kernel, launcher and driver with ``-fsanitize=thread``."""
    kernel = source.write(folder)
    launcher = folder / "launcher.cpp"
    launcher.write_text(render_parts(["host/runtime.h", "host/launcher.cpp"], {}))
    program = folder / "race"
    include, main = template_dir() / "host", Path(__file__).with_name("race_main.cpp")
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-fsanitize=thread", "-ffp-contract=off"]
    command = [compiler, *flags, f"-I{include}", f"-DKERNEL={source.name}", str(main), str(launcher), str(kernel)]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True, text=True)
    return program


class Bundle:
    """The memory of a scenario, with every pointer of its arguments as (buffer, offset)."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.buffers: list[np.ndarray[Any, Any]] = []
        self._keep: list[Any] = []
        (world, _), *others = scenario.worlds
        assert not others, "one kernel per executable"
        for layer in world.layers:
            poison(layer)
            memories = [layer._placed.scratch.memory, layer._placed.memory, *layer._placed.tables.values()]
            self.buffers += [memory.array for memory in memories]
            self.buffers.append(layer.comm.record)
            self.buffers.append(layer.comm.heap_memory(layer.comm.rank).array)
        self.packed = [[self._pack(call) for call in per_rank] for per_rank in scenario.calls]

    def _pack(self, call: Any) -> np.ndarray[Any, Any]:
        call.y[:] = np.nan
        packed = call.layer._placed.pack(*call.inputs, call.experts, call.y, None)
        self._keep.append(packed)
        self.buffers += [*call.inputs, call.y]
        self.buffers += [array for array in call.experts._arrays.values() if array is not None]
        return packed.prepared.args.copy()

    def _place(self, pointer: int) -> tuple[int, int]:
        for number, buffer in enumerate(self.buffers):
            offset = pointer - buffer.ctypes.data
            if 0 <= offset <= buffer.nbytes:
                return number, offset
        raise AssertionError(f"pointer {pointer:#x} belongs to no buffer")

    def write(self, path: Path) -> None:
        scenario = self.scenario
        parts = [struct.pack("<I", len(self.buffers))]
        for buffer in self.buffers:
            parts += [struct.pack("<Q", buffer.nbytes), buffer.tobytes()]
        calls = len(self.packed[0])
        parts.append(struct.pack("<4I", scenario.world_size, calls, scenario.threads, MOE_ARGS.size))
        assert MOE_ARGS.dtype.fields is not None
        for args in (args for per_rank in self.packed for args in per_rank):
            moved = []
            for field in _POINTERS:
                offset = MOE_ARGS.dtype.fields[field.name][1]
                for i, pointer in enumerate(np.atleast_1d(args[field.name][0])):
                    if pointer:
                        moved.append(struct.pack("<IIQ", offset + 8 * i, *self._place(int(pointer))))
            parts += [args.tobytes(), struct.pack("<I", len(moved)), *moved]
        path.write_bytes(b"".join(parts))

    def read_back(self, path: Path) -> None:
        """Take over what the program left in every buffer."""
        data, at = path.read_bytes(), 0
        for buffer in self.buffers:
            if buffer.nbytes and buffer.flags.writeable and buffer.flags.c_contiguous:
                buffer.reshape(-1).view(np.uint8)[:] = np.frombuffer(data, np.uint8, buffer.nbytes, at)
            at += buffer.nbytes
