"""The calls of one rank beside those of its peers: who has begun or refused what, and why nothing works."""

from __future__ import annotations

from typing import Any

from ..args import AWAITS, OVERLAP, ROLES, TAG
from ..errors import CommError, KernelTimeoutError
from .base import Launch, MovedError, Transport, Words


def require_sound(words: Words) -> None:
    """Raise what keeps calls from being made, but for the abort records."""
    failure = words.failure()
    if words.closed:
        raise CommError(f"The communicator is closed{': ' + failure if failure else '.'}")
    if failure:
        raise _failed(failure)


def _failed(why: str) -> CommError:
    return CommError(f"The communicator has failed: {why} Call reset() on every rank.")


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

    def meet(self, layer: int) -> None:
        """Wait for peers that have not made the layer yet; raise if one has refused the call that this rank begins."""
        if layer >= self._met:
            try:
                self.meeting = True
                self._transport.await_agreement(f"layer {layer}")
            finally:
                self.meeting = False
            self._met = layer + 1
        self._require_peers()

    def begin(self, layer: int, generation: int, launch: Launch | None) -> None:
        """Begin this rank's next call. That all ranks call the same, their kernels find out.

        ``launch`` is what the caller will be in until it has ended; ``None`` where a launch ends by itself.

        Raises:
            MovedError: ``generation`` is over: pack the arguments again.
            CommError: closed, failed, or a peer has refused this call or gone.
        """
        words = self._words
        with words.lock:
            if words.closed or words.failure():
                require_sound(words)
            if generation != words.generation:
                raise MovedError
            words.called = True
            self._mine.begin(layer)  # before it looks at the peers: see Words
            if not self._alone:
                self._require_peers(1)
                if self._mine.refused:
                    self._mine.refused = ""
            if launch is not None:
                words.launches.add(launch)

    def _require_peers(self, joined: int = 0) -> None:
        """Raise if a peer has refused the call that this rank is about to begin, or (``joined=1``) has just begun."""
        words, mine = self._words, self._mine
        if why := words.departed():
            raise CommError(why)
        for standing in words.refusing():
            if standing is not mine:
                with words.lock:
                    if (why := standing.refused) and standing.begun <= mine.begun - joined:
                        self._transport.fail(why)
                        require_sound(words)

    def refuse(self, error: BaseException, begun: int) -> None:
        """Tell the peers of an error; ``begun``: how many calls this rank had begun before what raised."""
        if self._alone:
            return
        words, record = self._words, self._transport.record[0]
        why = _told(record) if record["filled"] else f"Rank {self._rank} raised {reason(error)}"
        with words.lock:
            may_follow = isinstance(error, Exception) and self._mine.begun == begun
            if may_follow and not words.failure():
                self._mine.refused = why  # until it makes the call after all; before it looks at the peers: see Words
            if not may_follow or max(standing.begun for standing in words.standings) > begun:
                self._transport.fail(why)

    def leave(self, layer: int | None, what: str) -> None:
        """Tell peers that are in a call which this rank will not make, because it closes a layer, or all of them (``None``)."""
        if self._alone:
            return
        with self._words.lock:
            for standing in self._words.standings:
                called = standing.called(self._mine.begun)
                if called is not None and layer in (None, called):
                    return self._transport.fail(f"rank {self._rank} has closed {what}.")

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
        if words.failure():
            self._raise_failure()
        for flag in words.filled:
            if flag.value:
                self._raise_failure()

    def _raise_failure(self) -> None:
        words, record = self._words, self._transport.record[0]
        if record["filled"]:
            if record["what"] in (TAG, OVERLAP):
                raise _failed(_told(record))
            ended = self._transport.ended()
            raise KernelTimeoutError(
                rank=int(record["rank"]),
                block=int(record["block"]),
                role=ROLES[record["role"]],
                waiting_for=_waited_for(record),
                expected=int(record["expected"]),
                seen=int(record["seen"]),
                note=f" The process of rank {ended[0]} has ended." if ended else "",
            )
        if not words.failure():
            for other in words.records:
                if other[0]["filled"]:
                    raise _failed(_told(other[0]))
        require_sound(words)


def _waited_for(record: Any) -> str:
    return str(AWAITS[record["what"]].format(detail=int(record["detail"])))


def _told(record: Any) -> str:
    """What a rank's abort record says, in a sentence."""
    rank, peer = int(record["rank"]), int(record["detail"])
    if record["what"] == OVERLAP:
        return f"two launches of rank {rank} ran at the same time (two graphs replayed on two streams?)."
    if record["what"] != TAG:
        return f"a wait of rank {rank} passed its deadline, for {_waited_for(record)}."
    mine, its = int(record["expected"]), int(record["seen"])
    if mine >> 16 == its >> 16:
        return f"rank {rank} and rank {peer} call their layer {mine >> 16} with different placements."
    return f"rank {rank} calls its layer {mine >> 16} where rank {peer} calls its layer {its >> 16}."


def reason(error: BaseException) -> str:
    """An error in one line, which ends with a full stop."""
    text = f"{type(error).__name__}: {error}".splitlines()[0].strip().rstrip(":.")
    return f"{text}."
