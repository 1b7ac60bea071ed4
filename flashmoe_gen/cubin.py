"""Read the resources of every kernel in a cubin, from the ELF and from what ptxas printed; needs no GPU, no CUDA tool.

The layout of ``.nv.info`` is not documented by NVIDIA. What is used here holds for the cubins of NVRTC 12 and 13;
``tests/compile`` compares it with the ``-v`` log of ptxas for every architecture.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from .errors import CompileError

_EM_CUDA = 190
_ENTRY_SYMBOL = 0x10  # st_other bit of a __global__ function; device functions lack it
_SIZED = 0x04  # format of an attribute that carries a payload; all others are 4 bytes in total
_FRAME, _STACK, _REGISTERS, _ANNOTATIONS = 0x11, 0x12, 0x2F, 0x55
_SPILL = 1  # kind of an annotation: one instruction that stores a spilled register or loads it again
_RESERVED_SHARED = 1024  # bytes of each block that the driver takes since sm_90; the section counts them

_LOGGED_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class KernelUsage:
    """Resources of one kernel.

    Attributes:
        registers: 32-bit registers of one thread.
        frame_bytes: local memory of the kernel's own frame for one thread: spills and indexed arrays.
        stack_bytes: local memory of the kernel and the functions it calls, for one thread.
        shared_bytes: static shared memory of one block, without what the driver reserves.
        spill_instructions: instructions that store a spilled register to local memory or load it again. Each moves
            4 bytes, seldom more; :func:`logged_spill_bytes` has the exact bytes. 0 from old compilers (NVRTC 12.4),
            which do not mark them.
    """

    registers: int
    frame_bytes: int
    stack_bytes: int
    shared_bytes: int
    spill_instructions: int


def usage(cubin: bytes) -> dict[str, KernelUsage]:
    """Return the resources of each ``__global__`` function of a cubin, by symbol.

    Raises:
        CompileError: the bytes are not a cubin, or the file is truncated or damaged.
    """
    try:
        return _usage(cubin)
    except (struct.error, LookupError, ValueError, OverflowError) as error:
        raise CompileError(f"The cubin ({len(cubin)} bytes) cannot be read: {error}.") from error


def logged_spill_bytes(log: str) -> int:
    """Sum the spill stores and loads, in bytes, that ptxas reported with ``-v``: all functions of the program."""
    return sum(int(stores) + int(loads) for stores, loads in _LOGGED_SPILLS.findall(log))


@dataclass(frozen=True)
class _Section:
    offset: int
    size: int


def _usage(cubin: bytes) -> dict[str, KernelUsage]:
    if cubin[:5] != b"\x7fELF\x02" or struct.unpack_from("<H", cubin, 18) != (_EM_CUDA,):
        raise ValueError("not a 64-bit CUDA ELF file")
    sections = _sections(cubin)
    symbols = _symbols(cubin, sections)
    totals: dict[int, dict[int, int]] = {_REGISTERS: {}, _FRAME: {}, _STACK: {}}
    for attribute, payload in _attributes(cubin, sections[".nv.info"]):
        if attribute in totals:
            index, value = struct.unpack_from("<II", payload)
            totals[attribute][index] = value
    reserved = _RESERVED_SHARED if _compute_capability(cubin) >= 90 else 0
    result = {}
    for index, registers in totals[_REGISTERS].items():
        name, is_kernel = symbols[index]
        if not is_kernel:
            continue
        shared = sections.get(f".nv.shared.{name}")
        result[name] = KernelUsage(
            registers=registers,
            frame_bytes=totals[_FRAME].get(index, 0),
            stack_bytes=totals[_STACK].get(index, 0),
            shared_bytes=max(shared.size - reserved, 0) if shared else 0,
            spill_instructions=_spills(cubin, sections.get(f".nv.info.{name}")),
        )
    return result


def _compute_capability(cubin: bytes) -> int:
    old_abi = cubin[8] < 8  # the flags of the ELF header begin with the architecture; newer ones have it a byte later
    return cubin[48] if old_abi else cubin[49]


def _sections(cubin: bytes) -> dict[str, _Section]:
    (table,) = struct.unpack_from("<Q", cubin, 40)
    stride, count, names = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * stride) for i in range(count)]
    strings = headers[names][4]
    return {_text(cubin, strings + header[0]): _Section(header[4], header[5]) for header in headers}


def _symbols(cubin: bytes, sections: dict[str, _Section]) -> list[tuple[str, bool]]:
    table, strings = sections[".symtab"], sections[".strtab"]
    symbols = []
    for offset in range(table.offset, table.offset + table.size - 23, 24):
        name, _, other = struct.unpack_from("<IBB", cubin, offset)
        symbols.append((_text(cubin, strings.offset + name), bool(other & _ENTRY_SYMBOL)))
    return symbols


def _attributes(cubin: bytes, section: _Section) -> Iterator[tuple[int, bytes]]:
    data = cubin[section.offset : section.offset + section.size]
    if len(data) != section.size:
        raise ValueError("a section lies past the end of the file")
    position = 0
    while position < len(data):
        layout, attribute, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if layout == _SIZED:
            yield attribute, data[position : position + size]
            position += size


def _spills(cubin: bytes, section: _Section | None) -> int:
    if section is None:
        return 0
    kinds: Counter[int] = Counter()
    for attribute, payload in _attributes(cubin, section):
        if attribute == _ANNOTATIONS:
            whole = len(payload) // 8 * 8
            kinds.update(kind for kind, _ in struct.iter_unpack("<II", payload[:whole]))
    return kinds[_SPILL]


def _text(cubin: bytes, offset: int) -> str:
    return cubin[offset : cubin.index(b"\0", offset)].decode()
