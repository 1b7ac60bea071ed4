"""The calls and layers of one rank beside those of its peers: who has begun, made or refused what, and why nothing works."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .. import env
from ..args import AWAITS, ROLES
from ..errors import CommError, KernelTimeoutError
from .base import Called, Launch, MovedError, Transport, Words


def require_sound(words: Words) -> None:
    """Raise what keeps calls from being made, but for the abort records."""
    if words.closed:
        raise CommError(f"The communicator is closed{': ' + words.failure if words.failure else '.'}")
    if words.failure:
        raise CommError(f"The communicator has failed: {words.failure} Call reset() on every rank.")


class Calls:
    """Keeps one rank's words and compares them with those of its peers.

    Attributes:
        meeting: whether a call waits for peers that have not made its layer yet.
    """

    def __init__(self, transport: Transport) -> None:
        self.meeting = False
        self._transport, self._words = transport, transport.words
        self._rank, self._alone = transport.rank, transport.world_size == 1
        self._mine = transport.words.standings[transport.rank]
        self._met = 0  # layers that all ranks are known to have made

    @property
    def begun(self) -> int:
        """Calls this rank has begun since the signals started from zero."""
        return self._mine.begun

    # Layers ----------------------------------------------------------------------------------------------------------

    def attempt(self) -> None:
        """This rank begins to make its next layer."""
        with self._words.lock:
            self._mine.attempts += 1

    def made(self, description: Mapping[str, Any]) -> int:
        """This rank has made its next layer; its number."""
        with self._words.lock:
            self._mine.made.append(description)
            self._mine.unmade = 0, ""
            self._transport.tell()
            return len(self._mine.made) - 1

    def unmade(self, error: BaseException) -> None:
        """This rank has not made its next layer."""
        with self._words.lock:
            self._mine.unmade = self._mine.attempts, _reason(error)
            self._transport.tell()

    def meet(self, layer: int) -> None:
        """Wait for peers that have not made the layer yet; raise if one has refused the call that this rank begins."""
        if layer >= self._met:
            try:
                self.meeting = True
                self._await_layer(layer)
            finally:
                self.meeting = False
            self._met = layer + 1
        self._require_peers()

    def _await_layer(self, layer: int) -> None:
        """Wait until every rank has made its n-th layer, and made it alike."""
        timeout = env.timeout_s()
        deadline = time.monotonic() + timeout
        standings, mine = self._words.standings, self._mine
        with self._words.lock:
            while missing := [peer for peer, standing in enumerate(standings) if len(standing.made) <= layer]:
                require_sound(self._words)
                for peer in missing:
                    attempt, why = standings[peer].unmade
                    if why and attempt >= mine.attempts:  # an earlier one has failed here too
                        raise CommError(f"Rank {peer} has not made its layer {layer}: {why}")
                left = deadline - time.monotonic() if timeout else None
                if left is not None and left <= 0:
                    counts = ", ".join(f"rank {peer}: {len(standing.made)}" for peer, standing in enumerate(standings))
                    raise CommError(
                        f"Rank {missing[0]} has not made its layer {layer} within {timeout} s (layers made by {counts}). Every "
                        "rank makes the same layers in the same order, each with its own communicator."
                    )
                self._transport.wait(left)
            for peer, standing in enumerate(standings):
                for name, value in mine.made[layer].items():
                    if standing.made[layer][name] != value:
                        raise CommError(
                            f"Rank {peer} has made its layer {layer} with {name}={standing.made[layer][name]!r}, rank "
                            f"{self._rank} with {name}={value!r}. Every rank makes the same layers in the same order."
                        )

    # Calls -----------------------------------------------------------------------------------------------------------

    def begin(self, called: Called, generation: int, launch: Launch | None) -> None:
        """Begin this rank's next call, in which every rank must call the same.

        ``launch`` is what the caller will be in until it has ended; ``None`` where a launch ends by itself.

        Raises:
            MovedError: ``generation`` is over: pack the arguments again.
            CommError: closed, failed, a peer has refused this call, or calls something else.
        """
        words = self._words
        with words.lock:
            if words.closed or words.failure:
                require_sound(words)
            if generation != words.generation:
                raise MovedError
            self._mine.begun += 1  # before it looks at the peers: see Words
            if not self._alone:
                self._join(called)
            if launch is not None:
                words.launches.add(launch)

    def _join(self, called: Called) -> None:
        self._require_peers(1)
        first, expected = self._transport.first_call(self._mine.begun - 1, called)
        if expected != called:
            self._transport.fail(
                f"rank {self._rank} calls its layer {called[0]} where rank {first} calls its layer {expected[0]}."
                if expected[0] != called[0]
                else f"rank {self._rank} and rank {first} call their layer {called[0]} with different placements."
            )
            require_sound(self._words)
        self._mine.refused = ""

    def _require_peers(self, joined: int = 0) -> None:
        """Raise if a peer has refused the call that this rank is about to begin, or (``joined=1``) has just begun."""
        mine = self._mine
        for standing in self._words.standings:
            if standing.refused and standing is not mine:
                with self._words.lock:
                    if (why := standing.refused) and standing.begun <= mine.begun - joined:
                        self._transport.fail(why)
                        require_sound(self._words)

    def refuse(self, error: BaseException, begun: int) -> None:
        """Tell the peers of an error; ``begun``: how many calls this rank had begun before what raised."""
        if self._alone:
            return
        words, why = self._words, f"Rank {self._rank} raised {_reason(error)}"
        with words.lock:
            may_follow = isinstance(error, Exception) and self._mine.begun == begun
            if may_follow and not words.failure:
                self._mine.refused = why  # until it makes the call after all; before it looks at the peers: see Words
            if not may_follow or max(standing.begun for standing in words.standings) > begun:
                self._transport.fail(why)

    def leave(self, layer: int | None, what: str) -> None:
        """Tell peers that are in a call which this rank will not make, because it closes a layer, or all of them (``None``)."""
        with self._words.lock:
            called = self._transport.begun_call(self._mine.begun)
            if called is not None and layer in (None, called[0]):
                self._transport.fail(f"rank {self._rank} has closed {what}.")

    # What past calls left behind -------------------------------------------------------------------------------------

    def launch(self) -> Launch:
        """A launch that no peer waits for. Raises :class:`CommError` when the communicator has failed."""
        with self._words.lock:
            require_sound(self._words)
            made = Launch()
            self._words.launches.add(made)
            return made

    def check(self) -> None:
        """Raise what a past call of any rank left behind, or that the communicator is closed."""
        self.require_open()
        self.require_success()

    def require_open(self) -> None:
        """Raise if the communicator is closed."""
        if self._words.closed:
            require_sound(self._words)

    def require_success(self) -> None:
        """Raise what a past call of any rank left behind."""
        words = self._words  # every call comes by here
        if words.failure:
            self._raise_failure()
        for flag in words.filled:
            if flag.value:
                self._raise_failure()

    def _raise_failure(self) -> None:
        words, record = self._words, self._transport.record[0]
        if record["filled"]:
            raise KernelTimeoutError(
                rank=int(record["rank"]),
                block=int(record["block"]),
                role=ROLES[record["role"]],
                waiting_for=AWAITS[record["what"]].format(detail=int(record["detail"])),
                expected=int(record["expected"]),
                seen=int(record["seen"]),
            )
        late = [f"a wait of rank {rank} passed its deadline." for rank, flag in enumerate(words.filled) if flag.value]
        if late and not words.failure:
            raise CommError(f"The communicator has failed: {late[0]} Call reset() on every rank.")
        require_sound(words)


def _reason(error: BaseException) -> str:
    """An error in one line, which ends with a full stop."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":.")
    return f"{text}."
