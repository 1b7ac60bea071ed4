"""What a kernel may tell about itself, and how tests may disturb it: both compiled in only when asked for."""

from __future__ import annotations

from dataclasses import dataclass

from .values import integer


@dataclass(frozen=True)
class Instrument:
    """Extra code in a kernel, for people who look into one. Without it the text compiles to the same instructions as ever.

    Attributes:
        trace_events: time stamps that each warp (GPU) or thread (host) has room for, until
            :meth:`flashmoe_gen.MoELayer.take_trace` collects them; 0: no tracing.
        delay_ns: longest random delay before the kernel publishes something, in nanoseconds; 0: none. Ranks may differ.

    Raises:
        SpecError: a value is out of range.
    """

    trace_events: int = 0
    delay_ns: int = 0

    def __post_init__(self) -> None:
        for name, high in (("trace_events", 1 << 20), ("delay_ns", 10**9)):
            object.__setattr__(self, name, integer(name, getattr(self, name), 0, high, words="an integer"))

    @property
    def code(self) -> dict[str, int]:
        """What the text depends on: only whether there is any, as 1."""
        return {name: 1 for name, value in vars(self).items() if value}
