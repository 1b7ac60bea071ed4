"""What a layer holds on its rank for one placement of the experts: tables, workspace, and the packing of its calls."""

from __future__ import annotations

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
from .layout import WorkspaceLayout
from .plan import SchedulePlan, return_slots
from .spec import Placement

_NO_CAPACITY = 2**31 - 1


class Placed:
    """A layer's kernel with everything that its launches use under one placement.

    Attributes:
        placement: which rank holds which expert.
        tag: the same on all ranks that use the same placement.
        layout: of the workspace.
        order: the schedule of its launches.
        tables: where the experts are, for the kernel.
        workspace: this rank's memory, beside the symmetric heap.
        pack: packs the calls.
    """

    def __init__(
        self,
        fused: Fused,
        comm: Communicator,
        placement: Placement,
        layout: WorkspaceLayout,
        order: SchedulePlan,
        tables: tuple[Memory, Memory],
        workspace: Memory,
    ) -> None:
        self._fused, self._comm = fused, comm
        self.placement, self.tag = placement, hash(placement.slots_per_rank)
        self.layout, self.order, self.tables, self.workspace = layout, order, tables, workspace
        self.pack = self._packer()  # borrows nothing yet
        self._reported = 0  # ids that are not valid

    @classmethod
    def of(cls, fused: Fused, comm: Communicator, placement: Placement) -> Placed:
        """Upload the tables and allocate the workspace, after waiting for calls in flight, which use those there are.

        Raises:
            SpecError: the placement does not fit the spec.
            CommError: no memory.
        """
        spec, target = fused.spec, fused.target
        if placement.world_size != spec.world_size or placement.num_experts != spec.num_experts:
            raise SpecError(
                f"placement has {placement.num_experts} experts on {placement.world_size} ranks. "
                f"Must be {spec.num_experts} on {spec.world_size}."
            )
        experts = [expert for rank in placement.slots_per_rank for expert in rank]
        position = np.empty(spec.num_experts, np.int32)
        position[experts] = np.arange(spec.num_experts, dtype=np.int32)
        target.synchronize()
        first = np.cumsum([0, *map(len, placement.slots_per_rank)], dtype=np.int32)
        tables = target.upload(position), target.upload(first)
        local_experts = len(placement.local_experts(comm.rank))
        order = fused.order(local_experts)
        layout = fused.workspace(order, local_experts)
        return cls(fused, comm, placement, layout, order, tables, target.allocate(layout.bytes))

    def emptied(self) -> Placed:
        """The same without a workspace and with nothing borrowed, for a layer that is closed."""
        nothing = self._fused.target.allocate(0)
        return Placed(self._fused, self._comm, self.placement, self.layout, self.order, self.tables, nothing)

    @property
    def local_experts(self) -> int:
        """Experts this rank holds."""
        return len(self.placement.local_experts(self._comm.rank))

    def stats(self) -> LayerStats:
        """What was counted, after waiting for the calls in flight."""
        return LayerStats.of(self.state(), self._fused.tile.block_m)

    def state(self) -> Any:
        """The layer's ``State``, after waiting for the calls in flight."""
        return read_state(self.workspace, self.layout)

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
        return trace.take(self.workspace, self.layout, room, self._fused.plan.tracks)

    def restart(self) -> None:
        """Start from clean counters."""
        for region in self.layout.regions.values():
            if region.persistent:
                self.workspace.fill(region.offset, region.bytes, 0)
        self._reported = 0

    def _packer(self) -> Packer:
        fused, spec, comm = self._fused, self._fused.spec, self._comm
        args = MOE_ARGS.zeros()
        places = {name: self.workspace.pointer + region.offset for name, region in self.layout.regions.items()}
        narrow_ids = places.pop("narrow_ids")
        values: dict[str, Any] = {
            **places,
            **self.order.arguments(),
            "trace_events": fused.instrument.trace_events,
            "expert_position": self.tables[0].pointer,
            "owner_first": self.tables[1].pointer,
            "record": comm.record.ctypes.data,
            "delay_ns": fused.instrument.delay_ns,
            "max_tokens": spec.max_tokens,
            "num_experts": spec.num_experts,
            "local_experts": self.local_experts,
            "capacity": _NO_CAPACITY if spec.capacity is None else spec.capacity,
            "rank": comm.rank,
            "world_size": spec.world_size,
            "return_slots": return_slots(spec, fused.combine),
        }
        for name, value in values.items():
            args[name] = value
        return Packer(spec, fused.target, fused.kernel, comm, self.local_experts, args, narrow_ids)
