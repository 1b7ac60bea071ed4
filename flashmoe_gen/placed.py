"""What a layer holds on its rank for one placement of the experts: tables, memory, and the packing of its calls."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from . import trace
from .args import MOE_ARGS
from .call import Packer
from .comm import Communicator
from .counters import LayerStats, read_state
from .errors import SpecError
from .fused import Fused
from .launch.target import Memory
from .layout import Region, total_bytes
from .plan import SchedulePlan
from .scratch import Scratch
from .spec import MoESpec, Placement

_NO_CAPACITY = 2**31 - 1


class Placed:
    """A layer's kernel with everything that its launches use under one placement.

    Attributes:
        placement: which rank holds which expert.
        tag: of the layer and the placement, the same on all ranks that make the same call.
        order: the schedule of its launches.
        tables: where the experts are, for the kernel.
        scratch: what it shares with the communicator's other layers.
        scratch_regions: its places in there.
        memory: what it has for itself.
        regions: the places in there.
        pack: packs the calls.
    """

    def __init__(
        self,
        fused: Fused,
        comm: Communicator,
        placement: Placement,
        tag: int,
        order: SchedulePlan,
        tables: Mapping[str, Memory],
        scratch: Scratch,
        memory: Memory,
    ) -> None:
        self._fused, self._comm = fused, comm
        self.placement, self.tag, self.order, self.tables = placement, tag, order, tables
        self.scratch, self.memory, self.regions = scratch, memory, fused.own()
        self.scratch_regions = fused.scratch(order, self.local_experts).regions(scratch.needs)
        self.pack = self._packer()  # borrows nothing yet
        self._reported = 0  # ids that are not valid

    @classmethod
    def of(cls, fused: Fused, comm: Communicator, placement: Placement, number: int) -> Placed:
        """Upload the tables and allocate, after waiting for calls in flight, which use what there is.

        Args:
            number: of the layer among those of the communicator.

        Raises:
            SpecError: the placement does not fit the spec.
            CommError: no memory.
        """
        require_fitting(fused.spec, placement)
        target = fused.target
        target.synchronize()
        tables = {name: target.upload(table) for name, table in _tables(placement).items()}
        local_experts = len(placement.local_experts(comm.rank))
        order = fused.order(local_experts)
        scratch = comm.scratches.get(fused.scratch(order, local_experts).needs, target)
        tag = (number & 0xFFFF) << 16 | zlib.crc32(repr(placement.slots_per_rank).encode()) & 0xFFFF
        return cls(fused, comm, placement, tag, order, tables, scratch, target.allocate(total_bytes(fused.own())))

    def emptied(self) -> Placed:
        """The same without memory and with nothing borrowed, for a layer that is closed."""
        nothing = self._fused.target.allocate(0)
        tables, unshared = dict.fromkeys(self.tables, nothing), Scratch(self.scratch.needs, nothing)
        return Placed(self._fused, self._comm, self.placement, self.tag, self.order, tables, unshared, nothing)

    @property
    def local_experts(self) -> int:
        """Experts this rank holds."""
        return len(self.placement.local_experts(self._comm.rank))

    def stats(self) -> LayerStats:
        """What was counted, after waiting for the calls in flight."""
        return LayerStats.of(self.state(), self._fused.tile.block_m)

    def state(self) -> Any:
        """The layer's ``State``, after waiting for the calls in flight."""
        return read_state(self.memory, self.regions)

    def new_invalid(self, state: Any) -> int:
        """How many ids of a ``State`` were not valid, those that were reported before left out."""
        invalid = int(state["invalid"]) - self._reported
        self._reported += invalid
        return invalid

    def take_trace(self) -> np.ndarray[Any, Any]:
        """The events since the last time; see :meth:`flashmoe_gen.MoELayer.take_trace`."""
        room = self._fused.instrument.trace_events
        if not room:
            raise SpecError("The layer keeps no trace. Make it with instrument=Instrument(trace_events=...).")
        return trace.take(self.memory, self.regions, room, self._fused.plan.tracks)

    def restart(self) -> None:
        """Start from clean counters; the communicator does the same with what its layers share."""
        for region in self.regions.values():
            if region.persistent:
                self.memory.fill(region.offset, region.bytes, 0)
        self._reported = 0

    def _packer(self) -> Packer:
        fused, spec, comm = self._fused, self._fused.spec, self._comm
        args = MOE_ARGS.zeros()
        places = _places(self.scratch.memory, self.scratch_regions) | _places(self.memory, self.regions)
        narrow_ids = places.pop("narrow_ids")
        values: dict[str, Any] = {
            **places,
            **{name: table.pointer for name, table in self.tables.items()},
            **self.order.arguments(),
            "set_stride": self.scratch.needs.set_words,
            "trace_events": fused.instrument.trace_events,
            "record": comm.record.ctypes.data,
            "delay_ns": fused.instrument.delay_ns,
            "max_tokens": spec.max_tokens,
            "num_experts": spec.num_experts,
            "local_experts": self.local_experts,
            "capacity": _NO_CAPACITY if spec.capacity is None else spec.capacity,
            "rank": comm.rank,
            "world_size": spec.world_size,
            "tag": self.tag,
        }
        for name, value in values.items():
            args[name] = value
        return Packer(spec, fused.target, fused.kernel, comm, self.local_experts, args, narrow_ids)


def require_fitting(spec: MoESpec, placement: Placement) -> None:
    """Raise :class:`~flashmoe_gen.SpecError` if a placement is of another number of ranks or experts than a spec."""
    if placement.world_size != spec.world_size or placement.num_experts != spec.num_experts:
        raise SpecError(
            f"placement has {placement.num_experts} experts on {placement.world_size} ranks. "
            f"Must be {spec.num_experts} on {spec.world_size}."
        )


def _tables(placement: Placement) -> dict[str, np.ndarray[Any, Any]]:
    """Positions number the experts rank by rank, slot by slot."""
    slots = placement.slots_per_rank
    experts = [expert for rank in slots for expert in rank]
    position = np.empty(len(experts), np.int32)
    position[experts] = np.arange(len(experts), dtype=np.int32)
    return {
        "expert_position": position,
        "owner_first": np.cumsum([0, *map(len, slots)], dtype=np.int32),
        "position_owner": np.repeat(np.arange(len(slots), dtype=np.int32), [len(rank) for rank in slots]),
    }


def _places(memory: Memory, regions: Mapping[str, Region]) -> dict[str, int]:
    return {name: memory.pointer + region.offset for name, region in regions.items()}
