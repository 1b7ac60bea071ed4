"""An exchange of bytes between the processes of a job over TCP: rank 0 listens, the others connect.

Who does not know the job's key is dropped, and harms nobody.
"""

from __future__ import annotations

import errno
import selectors
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from ..errors import CommError
from . import channel as wire
from .channel import Channel, Claim, Deadline

MAX_VALUE = 1 << 20  # bytes of one rank in one gather

_GREET_S = 5.0  # what a connection has to introduce itself
_BUSY_S = 1.0  # how long a port may be busy: the listener of an exchange before this one may still be closing
_MOST_GUESTS = 256  # connections that have not introduced themselves
_LOOK_S = 0.25
_LIMIT = "FLASHMOE_INIT_TIMEOUT_S sets the limit"


class _Guest(NamedTuple):
    """A connection that has not introduced itself."""

    hello: bytes
    said: bytearray
    until: float


class TcpBootstrap:
    """See :class:`~flashmoe_gen.comm.bootstrap.Bootstrap`.

    Args:
        method: ``"env"`` or ``"slurm"``.
        rank: 0 listens.
        world_size: number of processes.
        host: name or address of the machine of rank 0.
        port: where it listens, on the address of ``host`` alone.
        key: of the job.
        seconds: deadline of each gather; 0: none.

    Raises:
        CommError: rank 0 cannot listen there.
    """

    def __init__(
        self, method: str, rank: int, world_size: int, host: str, port: int, key: bytes, seconds: float
    ) -> None:
        self.method, self.rank, self.world_size = method, rank, world_size
        self._where, self._key, self._seconds = (host, port), key, seconds
        self._end: _Root | _Leaf = (
            _Root(self._where, world_size, key) if rank == 0 else _Leaf(self._where, rank, world_size, key)
        )

    def gather(self, value: bytes, what: str) -> list[bytes]:
        """Collective: every rank's bytes, in rank order.

        Raises:
            CommError: not all ranks came before the deadline, one has ended, or they do not belong together.
        """
        if len(value) > MAX_VALUE:
            raise CommError(f"{what}: {len(value)} bytes of one rank are too many. Must be at most {MAX_VALUE}.")
        return self._end.gather(value, what, Deadline(self._seconds))

    def close(self) -> None:
        """Close all connections; may be called again."""
        self._end.close()


def named(host: str, port: int) -> str:
    """A place as messages name it, with the variables that set it."""
    return f"{host}:{port} (MASTER_ADDR, MASTER_PORT)"


def _addresses(host: str, port: int) -> list[tuple[int, Any]]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise CommError(f"MASTER_ADDR={host!r} is no name or address of a machine: {error}.") from error
    return [(family, address) for family, _, _, _, address in found]


# ---- Rank 0 -----------------------------------------------------------------------------------------------------------


class _Root:
    def __init__(self, where: tuple[str, int], world_size: int, key: bytes) -> None:
        self._where, self._world_size, self._key = where, world_size, key
        self._listener: socket.socket | None = _listen(*where)
        self._guests: dict[socket.socket, _Guest] = {}
        self._members: dict[int, Channel] = {}
        self._strangers = 0

    def gather(self, value: bytes, what: str, deadline: Deadline) -> list[bytes]:
        if self._listener is not None:
            self._admit(what, deadline)
        values = {0: value}
        with selectors.DefaultSelector() as selector:
            for rank, channel in self._members.items():
                selector.register(channel.connection, selectors.EVENT_READ, rank)
            while missing := sorted(set(self._members) - set(values)):
                try:
                    ready = selector.select(deadline.left())
                except TimeoutError:
                    self._fail(_late(missing, what, deadline))
                for event, _ in ready:
                    values[event.data] = self._read(event.data, what, deadline)
                    selector.unregister(event.fileobj)
        answer = wire.pack([values[rank] for rank in range(self._world_size)])
        for rank, channel in self._members.items():
            try:
                channel.send(wire.VALUES, answer, deadline)
            except OSError as error:
                self._fail(f"{what}: rank {rank} has ended ({error}).")
        return [values[rank] for rank in range(self._world_size)]

    def _read(self, rank: int, what: str, deadline: Deadline) -> bytes:
        try:
            kind, payload = self._members[rank].receive(2 * MAX_VALUE, deadline)
        except TimeoutError:
            self._fail(_late([rank], what, deadline))
        except OSError as error:
            self._fail(f"{what}: rank {rank} has ended ({error}).")
        if kind != wire.VALUE:
            self._fail(payload.decode(errors="replace"))
        place, value = wire.unpack(payload)
        if place != what.encode():
            self._fail(f"Rank 0 is in {what}, rank {rank} in {place.decode(errors='replace')}.")
        return value

    def _fail(self, why: str) -> NoReturn:
        for channel in self._members.values():
            channel.fail(why)
        self.close()
        raise CommError(why)

    def close(self) -> None:
        for connection in [*self._guests, *(channel.connection for channel in self._members.values())]:
            connection.close()
        self._guests.clear()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    # Letting them in -------------------------------------------------------------------------------------------------

    def _admit(self, what: str, deadline: Deadline) -> None:
        """Wait until every rank has come; never for what anybody else does."""
        assert self._listener is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            while missing := [rank for rank in range(1, self._world_size) if rank not in self._members]:
                try:
                    ready = selector.select(deadline.within(_LOOK_S))
                except TimeoutError:
                    self._fail(_late(missing, what, deadline) + self._others())
                for event, _ in ready:
                    if event.fileobj is self._listener:
                        self._open(selector)
                    elif event.fileobj in self._guests:
                        self._listen_to(event.fileobj, selector)
                for rank, channel in self._members.items():
                    if channel.ended():
                        self._fail(f"{what}: rank {rank} has ended.")
                for guest in [guest for guest, state in self._guests.items() if state.until < time.monotonic()]:
                    self._drop(guest, selector)
        self._listener.close()
        self._listener = None
        for connection in self._guests:
            connection.close()
        self._guests.clear()

    def _others(self) -> str:
        if not self._strangers:
            return ""
        return (
            f" {self._strangers} connection(s) with another key were refused: is FLASHMOE_SECRET the same everywhere, and is "
            "MASTER_PORT of this job alone?"
        )

    def _open(self, selector: selectors.BaseSelector) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:  # gone already
            return
        hello = wire.hello()
        self._guests[connection] = _Guest(hello, bytearray(), time.monotonic() + _GREET_S)
        connection.setblocking(False)
        selector.register(connection, selectors.EVENT_READ)
        try:
            connection.sendall(hello)
        except OSError:
            self._drop(connection, selector)
        if len(self._guests) > _MOST_GUESTS:
            self._drop(next(iter(self._guests)), selector)

    def _drop(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        del self._guests[connection]
        selector.unregister(connection)
        connection.close()

    def _listen_to(self, connection: socket.socket, selector: selectors.BaseSelector) -> None:
        hello, said, _ = self._guests[connection]
        try:
            part = connection.recv(wire.INTRODUCTION - len(said))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        said += part
        if not part or not said.startswith(wire.GREETING[: len(said)]):
            return self._drop(connection, selector)
        if len(said) < wire.INTRODUCTION:
            return
        introduction = bytes(said)
        claim = wire.proven(self._key, hello, introduction)
        if claim is None:
            self._strangers += 1
            wire.turn_away(connection)
            return self._drop(connection, selector)
        del self._guests[connection]
        selector.unregister(connection)
        self._join(claim, Channel(connection, self._key, hello + introduction, root=True))

    def _join(self, claim: Claim, channel: Channel) -> None:
        rank, world_size = claim
        why = ""
        if world_size != self._world_size:
            why = f"The world has {self._world_size} ranks for rank 0 and {world_size} for rank {rank}."
        elif rank >= world_size:
            why = f"A process says that it is rank {rank} of {world_size}."
        elif rank == 0 or rank in self._members:
            why = f"Two processes are rank {rank} of {world_size}."
        if why:
            why += " Start each rank once, all with one world size."
            channel.fail(why)
            self._fail(why)
        self._members[rank] = channel
        with suppress(OSError):  # it has ended, as is noticed soon
            channel.send(wire.WELCOME, b"", Deadline(_GREET_S))


def _late(missing: Sequence[int], what: str, deadline: Deadline) -> str:
    ranks = f"Rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
    return f"{ranks} did not come to {what} within {deadline.seconds:g} s. {_LIMIT}."


def _listen(host: str, port: int) -> socket.socket:
    """On the addresses of the host alone: loopback stays loopback."""
    until = time.monotonic() + _BUSY_S
    while True:
        for family, address in _addresses(host, port):
            listener = socket.socket(family, socket.SOCK_STREAM)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(_MOST_GUESTS)
                listener.setblocking(False)
                return listener
            except OSError as error:
                listener.close()
                failed = error
                if error.errno == errno.EADDRINUSE:  # the others would find whoever listens there
                    break
        if failed.errno != errno.EADDRINUSE or time.monotonic() > until:
            break
        time.sleep(0.05)
    if failed.errno == errno.EADDRINUSE:
        raise CommError(
            f"Rank 0 cannot listen at {named(host, port)}: the port is in use. Set MASTER_PORT to a free one on all ranks; if "
            "torch.distributed listens there, use method='torch'."
        ) from failed
    raise CommError(
        f"Rank 0 cannot listen at {named(host, port)}: {failed}. Must be an address of the machine of rank 0."
    ) from failed


# ---- The others -------------------------------------------------------------------------------------------------------


class _Leaf:
    def __init__(self, where: tuple[str, int], rank: int, world_size: int, key: bytes) -> None:
        self._where, self._rank, self._world_size, self._key = where, rank, world_size, key
        self._claim = Claim(rank, world_size)
        self._channel: Channel | None = None

    def gather(self, value: bytes, what: str, deadline: Deadline) -> list[bytes]:
        if self._channel is None:
            self._channel = self._connect(what, deadline)
        try:
            self._channel.send(wire.VALUE, wire.pack([what.encode(), value]), deadline)
            kind, payload = self._channel.receive(2 * self._world_size * MAX_VALUE, deadline)
        except TimeoutError:
            self._channel.fail(f"Rank {self._rank} gave up in {what} after {deadline.seconds:g} s. {_LIMIT}.")
            raise CommError(f"Rank 0 did not answer in {what} within {deadline.seconds:g} s. {_LIMIT}.") from None
        except OSError as error:
            self.close()
            raise CommError(f"{what}: rank 0 has ended ({error}).") from error
        if kind != wire.VALUES:
            self.close()
            raise CommError(payload.decode(errors="replace"))
        return wire.unpack(payload)

    def _connect(self, what: str, deadline: Deadline) -> Channel:
        place, pause, seen = named(*self._where), 0.01, "nothing listens there"
        while True:
            try:
                for family, address in _addresses(*self._where):
                    channel, seen = self._try(family, address, deadline)
                    if channel is not None:
                        return channel
                time.sleep(deadline.within(pause))
            except TimeoutError:
                raise CommError(
                    f"Rank {self._rank} did not reach rank 0 at {place} for {what} within {deadline.seconds:g} s: {seen}. "
                    f"Has rank 0 started, and not given up? {_LIMIT}."
                ) from None
            pause = min(2 * pause, 0.5)

    def _try(self, family: int, address: Any, deadline: Deadline) -> tuple[Channel | None, str]:
        """One attempt: a channel, or what was seen instead."""
        limit = Deadline(deadline.within(_GREET_S))
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(limit.left())
            connection.connect(address)
            if connection.getsockname() == connection.getpeername():  # TCP may connect a port to itself
                raise ConnectionRefusedError
        except ConnectionRefusedError:
            connection.close()
            return None, "nothing listens there"
        except OSError as error:
            connection.close()
            return None, str(error) or "it does not answer"
        try:
            hello = wire.receive(connection, wire.HELLO, limit)
            if not hello.startswith(wire.GREETING):
                raise ConnectionError("it speaks something else")
            introduction = wire.introduction(self._key, hello, self._claim)
            connection.sendall(introduction)
            channel = Channel(connection, self._key, hello + introduction, root=False)
            kind, payload = channel.receive(MAX_VALUE, deadline)  # once said, it is not said again
        except OSError as error:
            connection.close()
            return (
                None,
                f"what listens there does not answer as rank 0 of this job does ({error or 'it does not answer'})",
            )
        if kind == wire.WELCOME:
            return channel, ""
        connection.close()
        if kind == wire.STRANGER:
            raise CommError(
                f"What listens at {named(*self._where)} has another key than rank {self._rank}: FLASHMOE_SECRET must be the "
                "same on all ranks, and MASTER_PORT of this job alone."
            )
        raise CommError(payload.decode(errors="replace"))

    def close(self) -> None:
        if self._channel is not None:
            self._channel.connection.close()
