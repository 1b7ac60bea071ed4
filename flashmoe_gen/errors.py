"""Every exception the package raises on purpose; all derive from :class:`FlashMoEError`."""

from __future__ import annotations

from pathlib import Path


class FlashMoEError(Exception):
    """Base class of every error raised by flashmoe_gen."""


class SpecError(FlashMoEError, ValueError):
    """A value is not valid whatever the machine: wrong shape, dtype, stride, range or combination."""


class TraceRoomError(SpecError):
    """A trace had no room for all events.

    Attributes:
        needed: the room for which the calls would have fitted.
    """

    def __init__(self, room: int, needed: int) -> None:
        super().__init__(f"trace_events={room} is not valid. These calls need {needed}.")
        self.needed = needed


class UnsupportedError(FlashMoEError):
    """The request is meaningful, but this version, target or model description does not provide it."""


class CompileError(FlashMoEError):
    """A compiler is missing, refused a kernel, or ignored a part of it.

    Attributes:
        log: what the compiler printed (empty when it could not be started).
        source_path: where the refused source was kept, or ``None``.
    """

    def __init__(self, message: str, *, log: str = "", source_path: Path | None = None) -> None:
        parts = [message]
        if source_path is not None:
            parts.append(f"The source is kept at {source_path}")
        if log:
            parts.append(log.strip())
        super().__init__("\n".join(parts))
        self.log = log
        self.source_path = source_path


class CacheError(FlashMoEError):
    """The kernel cache cannot be used: unwritable, written by others, or a miss while ``FLASHMOE_NO_JIT=1``."""


class CommError(FlashMoEError):
    """The ranks cannot work together: wrong world size, heap too small, failed or closed communicator."""


class KernelTimeoutError(CommError):
    """A wait inside a kernel passed its deadline.

    Attributes:
        rank: the rank that gave up.
        role: ``"planner"``, ``"scheduler"``, ``"subscriber"`` or ``"processor"``.
        waiting_for: what it waited for, in words.
        expected: the value it waited for.
        seen: the value it last saw.
    """

    def __init__(
        self, *, rank: int, block: int, role: str, waiting_for: str, expected: int, seen: int, note: str = ""
    ) -> None:
        super().__init__(
            f"rank {rank}, block {block}: the {role} waited past the deadline for {waiting_for} "
            f"(expected {expected}, last saw {seen}).{note} The output of that call is NaN. "
            "Call reset() on the communicator (collective) before the next call; "
            "FLASHMOE_TIMEOUT_S sets the deadline."
        )
        self.rank = rank
        self.block = block
        self.role = role
        self.waiting_for = waiting_for
        self.expected = expected
        self.seen = seen
