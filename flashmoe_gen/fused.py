"""The fused kernel of a layer: generated, compiled, loaded, and the numbers that its launches go by."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from .arch import get_arch
from .instrument import Instrument
from .launch.target import Kernel, LaunchShape, Target, loaded
from .layout import HeapNeeds, Region, ScratchLayout, layer_regions
from .plan import KernelPlan, SchedulePlan, plan_schedule, resolve_combine
from .programs import resolve
from .render import generate
from .spec import MoESpec
from .tile import Combine, Schedule, TileConfig


def launch_shape(spec: MoESpec, tile: TileConfig, arch: str) -> LaunchShape:
    """What the kernel of a tile asks of its launches."""
    program = resolve(spec, tile.program, arch)
    plan = program.plan(spec, tile, get_arch(arch))
    return LaunchShape(
        plan.threads,
        plan.shared_bytes,
        cluster=tile.cluster,
        waiting=True,
        boxes=program.tensor_boxes(spec, tile, plan),
        min_blocks=plan.min_blocks,
    )


@dataclass(frozen=True)
class Fused:
    """A loaded kernel of the fused layer.

    Attributes:
        spec, tile, schedule, instrument: what it was made for.
        target: where it runs.
        combine: how rows come back.
        plan: the numbers of its text.
        kernel: what the target launches.
        processors: of a launch.
    """

    spec: MoESpec
    tile: TileConfig
    schedule: Schedule
    instrument: Instrument
    target: Target
    combine: Combine
    plan: KernelPlan
    kernel: Kernel
    processors: int

    @classmethod
    def load(
        cls, spec: MoESpec, tile: TileConfig, schedule: Schedule, instrument: Instrument | None, target: Target
    ) -> Fused:
        """Generate, compile and load; errors as :class:`flashmoe_gen.MoELayer`."""
        program = resolve(spec, tile.program, target.arch)
        combine = resolve_combine(spec, schedule)
        plan = program.plan(spec, tile, get_arch(target.arch))
        kernel = loaded(
            generate(spec, arch=target.arch, tile=tile, instrument=instrument).compile,
            lambda compiled: target.load(compiled, launch_shape(spec, tile, target.arch)),
        )
        target.load_helpers()
        processors = target.processors(kernel)
        return cls(spec, tile, schedule, instrument or Instrument(), target, combine, plan, kernel, processors)

    def with_processors(self, processors: int) -> Fused:
        """The same kernel, launched with another number of processors."""
        return dataclasses.replace(self, processors=processors)

    @functools.cached_property
    def workers(self) -> int:
        """Workers of a launch: threads or blocks."""
        return self.target.workers(self.kernel, self.processors)

    @property
    def heap_needs(self) -> HeapNeeds:
        """What a call needs of the symmetric heap."""
        return HeapNeeds.of(self.spec)

    def order(self, local_experts: int) -> SchedulePlan:
        """The schedule of a launch on a rank with so many experts."""
        return plan_schedule(
            self.spec,
            self.tile,
            self.plan,
            self.schedule,
            combine=self.combine,
            local_experts=local_experts,
            processors=self.processors,
        )

    def scratch(self, order: SchedulePlan, local_experts: int) -> ScratchLayout:
        """What a launch needs of the scratch."""
        return ScratchLayout.of(
            self.spec,
            self.tile,
            self.plan,
            order,
            local_experts=local_experts,
            planners=self.workers - self.target.system_workers,
        )

    def own(self) -> dict[str, Region]:
        """What a layer has for itself."""
        return layer_regions(self.workers * self.plan.tracks, self.instrument.trace_events)
