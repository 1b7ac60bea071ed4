"""What ranks that are processes tell each other: words and texts with one writer each, and collective exchanges of values."""

from __future__ import annotations

import os
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import CommError
from .base import Standing, Words
from .shared import Process, SharedMemory, decode, encode, fence

_WORD = 8
_KINDS = 5
_BEGUN, _REFUSED, _FAILED, _CLOSED, _POSTED = range(_KINDS)  # a word of each rank, next to those of the other ranks
_RECENT = 1024  # calls that a standing knows the layers of
_TEXT = 1024  # bytes; 8 more hold the time
_CHUNK = 16 * 1024  # bytes of a value that go at a time
_HEADER = struct.Struct("<Q56s")  # bytes of the whole value, and what it is for
_TIME = struct.Struct("<Q")
_LONGEST_SLEEP_S, _LOOK_S = 1e-3, 0.05

RESET, CLOSE = (
    "reset()",
    "close()",
)  # exchanges that go on when the communicator has failed, or ranks have closed their ends


class _Text:
    """A text with one writer, which stores its length beside a version: who reads sees one of the texts, never parts of two."""

    def __init__(self, words: memoryview, at: int, room: memoryview) -> None:
        self._words, self._at, self._room = words, at, room
        self._version = 0

    def write(self, text: str) -> None:
        """Replace it. ``""`` is none."""
        self._words[self._at] = 0
        fence()
        if text:
            data = text.encode()[:_TEXT]
            _TIME.pack_into(self._room, 0, time.monotonic_ns())
            self._room[_WORD : _WORD + len(data)] = data
            self._version += 1
            fence()
            self._words[self._at] = self._version << 16 | len(data)
            fence()

    def read(self) -> tuple[int, str]:
        """When it was written, on the machine's clock, and the text."""
        while word := self._words[self._at]:
            fence()
            copy = bytes(self._room[: _WORD + (word & 0xFFFF)])
            fence()
            if self._words[self._at] == word:
                return _TIME.unpack_from(copy)[0], copy[_WORD:].decode(errors="ignore")
        return 0, ""


class _SharedStanding:
    """See :class:`~flashmoe_gen.comm.base.Standing`."""

    def __init__(self, words: memoryview, rank: int, world_size: int, recent: memoryview, text: memoryview) -> None:
        self._words, self._recent = words, recent
        self._begun_at = _BEGUN * world_size + rank
        self._refused = _Text(words, _REFUSED * world_size + rank, text)

    @property
    def begun(self) -> int:
        return int(self._words[self._begun_at])

    @property
    def refused(self) -> str:
        return self._refused.read()[1]

    @refused.setter
    def refused(self, why: str) -> None:
        self._refused.write(why)

    def begin(self, layer: int) -> None:
        number = self.begun
        self._recent[number % _RECENT] = (number + 1) << 32 | layer
        fence()
        self._words[self._begun_at] = number + 1
        fence()

    def called(self, number: int) -> int | None:
        if number >= self.begun:
            return None
        fence()
        entry = int(self._recent[number % _RECENT])
        return entry & 0xFFFFFFFF if entry >> 32 == number + 1 else None

    def clear(self) -> None:
        self._words[self._begun_at] = 0
        self.refused = ""


class Board(Words):
    """One rank's end of what the processes of a group tell each other. Of every word and text, one rank is the writer.

    Args:
        memory: :meth:`nbytes` of it, the same in all processes.
        rank: this rank.
        processes: of the ranks.
    """

    def __init__(self, memory: SharedMemory, rank: int, processes: Sequence[Process]) -> None:
        super().__init__(1)
        self._rank, self._world, self._processes = rank, len(processes), processes
        world, start = self._world, 0

        def take(nbytes: int) -> memoryview:
            nonlocal start
            start += nbytes
            return memory.view[start - nbytes : start]

        self._memory = memory
        self._completed = take(_WORD).cast("Q")  # exchanges that are over; its writer has the memory's lock
        self._all = take(_KINDS * world * _WORD).cast("Q")
        self._failed, self._departed = (self._all[kind * world : (kind + 1) * world] for kind in (_FAILED, _CLOSED))
        self._refused, self._posted = (self._all[kind * world : (kind + 1) * world] for kind in (_REFUSED, _POSTED))
        recents = [take(_RECENT * _WORD).cast("Q") for _ in range(world)]
        refusals, failures = ([take(_WORD + _TEXT) for _ in range(world)] for _ in range(2))
        self._boxes = [[take(_HEADER.size + _CHUNK) for _ in range(2)] for _ in range(world)]
        self.standings: Sequence[Standing] = [
            _SharedStanding(self._all, peer, world, recents[peer], refusals[peer]) for peer in range(world)
        ]
        self._failures = [_Text(self._all, _FAILED * world + peer, failures[peer]) for peer in range(world)]
        self._quiet = bytes(world * _WORD)
        self._owner = ""  # in a forked child: why it cannot be used
        self._number = 0  # exchanges that are over
        self._busy = threading.Lock()
        self._busy_thread = 0

    @staticmethod
    def nbytes(world_size: int) -> int:
        """Of the memory it takes."""
        return _WORD + world_size * (_WORD * (_KINDS + _RECENT) + 2 * (_WORD + _TEXT) + 2 * (_HEADER.size + _CHUNK))

    # Words -----------------------------------------------------------------------------------------------------------

    def failure(self) -> str:
        if self._failed.tobytes() == self._quiet and not self._owner:
            return ""
        told = [(when, why) for when, why in (text.read() for text in self._failures) if why]
        return self._owner or (min(told)[1] if told else "")

    def departed(self) -> str:
        if self._departed.tobytes() != self._quiet:
            for peer in range(self._world):
                if self._departed[peer] and peer != self._rank:
                    return _closed(peer)
        return ""

    def refusing(self) -> Iterator[Standing]:
        return iter(()) if self._refused.tobytes() == self._quiet else super().refusing()

    def fail(self, why: str) -> None:
        """Tell all why nothing works; this rank's first reason stays."""
        if not self._failed[self._rank]:
            self._failures[self._rank].write(why)

    def forget(self) -> None:
        """This rank's part in what :meth:`failure` and its standing say."""
        self._failures[self._rank].write("")
        self.standings[self._rank].clear()

    def depart(self) -> None:
        """Tell all that this rank has closed its end."""
        self.closed = True
        if not self.disowned:
            self._departed[self._rank] = 1
            fence()

    @property
    def disowned(self) -> bool:
        """Whether this is a forked child."""
        return bool(self._owner)

    def disown(self) -> None:
        """In a forked child: it has no part in this, and must not change anything."""
        self.lock = threading.RLock()
        self.launches.clear()
        self.closed, self._owner = True, f"it belongs to process {os.getppid()}, which this one was forked from."

    def ended(self, peer: int) -> str:
        """``""`` while the process of a rank goes on, else that it is no more."""
        process = self._processes[peer]
        return f"the process of rank {peer} (pid {process.pid}) has ended." if process.ended() else ""

    # Exchanges -------------------------------------------------------------------------------------------------------

    def exchange(self, value: Any, what: str, seconds: float, sound: Callable[[], None]) -> list[Any]:
        """Collective: every rank's value, in rank order.

        Args:
            value: see :func:`~flashmoe_gen.comm.shared.encode`.
            what: the same words on all ranks.
            seconds: deadline; 0: none.
            sound: raises when there is nothing to wait for any more.

        Raises:
            CommError: a rank has not come in time, has closed its end, is no more, or is in something else.
        """
        if self._busy_thread == threading.get_ident():
            raise CommError(f"{what} inside another collective of the same rank (in a signal handler?).")
        data = encode(value)
        parts = [b""] * self._world
        sent, longest = 0, 1  # before the try: an interrupt may come at any line
        with self._busy:
            try:
                self._busy_thread = threading.get_ident()
                while sent < longest:
                    self._pass(data, sent, what, seconds, sound)
                    for peer in range(self._world):
                        box = self._boxes[peer][self._number % 2]
                        total = _HEADER.unpack_from(box)[0]
                        longest = max(longest, total)
                        parts[peer] += bytes(box[_HEADER.size : _HEADER.size + max(0, min(_CHUNK, total - sent))])
                    sent += _CHUNK
            except BaseException:
                if sent:  # peers have a part of the value: nothing that follows would be understood
                    self.fail(f"rank {self._rank} has left {what} in the middle.")
                    self.depart()
                raise
            finally:
                self._busy_thread = 0
        return [decode(part) for part in parts]

    def _pass(self, data: bytes, sent: int, what: str, seconds: float, sound: Callable[[], None]) -> None:
        """Let everybody have the next chunk. There are two boxes, as a rank can be one chunk ahead, never two."""
        number, before = self._number + 1, self._posted[self._rank]
        word = number << 32 | zlib.crc32(what.encode())
        box, chunk = self._boxes[self._rank][number % 2], data[sent : sent + _CHUNK]
        _HEADER.pack_into(box, 0, len(data), what.encode())
        box[_HEADER.size : _HEADER.size + len(chunk)] = chunk
        fence()
        try:
            self._posted[self._rank] = word
            fence()
            self._await(word, what, seconds, sound)
        except BaseException as error:
            with self._memory.locked():
                complete = self._completed[0] >= number
                if not complete:
                    self._posted[self._rank] = before
            if not complete:
                raise
            self._number = number
            if not isinstance(error, CommError):
                raise
        self._number = number
        fence()

    def _missing(self, word: int, what: str, sound: Callable[[], None]) -> list[int]:
        """Ranks that are not here.

        Raises:
            CommError: one is in something else; but who resets waits until it has learnt of the failure.
        """
        missing = []
        for peer in range(self._world):
            posted = self._posted[peer]
            if posted == word:
                continue
            missing.append(peer)
            if posted >> 32 == word >> 32 and what != RESET:
                fence()
                other = (
                    _HEADER.unpack_from(self._boxes[peer][(word >> 32) % 2])[1].rstrip(b"\0").decode(errors="ignore")
                )
                if self._posted[peer] == posted:
                    sound()  # it may have learnt of a failure before
                    why = f"Rank {self._rank} is in {what} where rank {peer} is in {other}."
                    self.fail(why)
                    raise CommError(f"{why} All ranks do the same in the same order.")
        return missing

    def _is_complete(self, word: int, missing: Sequence[int]) -> bool:
        """Whether the exchange is over. The first that finds all ranks here ends it, unless one of them has just left."""
        number = word >> 32
        if self._completed[0] < number and not missing:
            with self._memory.locked():
                if self._completed[0] < number and all(posted == word for posted in self._posted):
                    self._completed[0] = number
        return self._completed[0] >= number

    def _await(self, word: int, what: str, seconds: float, sound: Callable[[], None]) -> None:
        start, look, pause = time.monotonic(), 0.0, 2e-5
        while not self._is_complete(word, missing := self._missing(word, what, sound)):
            sound()
            now = time.monotonic()
            if now >= look:
                look = now + _LOOK_S
                ended = [(peer, why) for peer in missing if (why := self.ended(peer)) and not self._departed[peer]]
                closed = [peer for peer in missing if self._departed[peer] and what != CLOSE]
                if self._completed[0] >= word >> 32:  # they have gone since
                    continue
                for peer, why in ended:
                    if self._posted[peer] != word:  # coming here was not the last thing it did
                        self.fail(why)
                        raise CommError(f"{what} cannot be: {why}")
                for peer in closed:
                    if self._posted[peer] != word:
                        raise CommError(f"{what} cannot be: {_closed(peer)}")
            if seconds and now - start > seconds:
                ranks = ", ".join(map(str, missing))
                raise CommError(f"{what}: rank{'s' * (len(missing) > 1)} {ranks} did not come within {seconds:g} s.")
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_SLEEP_S)


def _closed(peer: int) -> str:
    return f"rank {peer} has closed its communicator."
