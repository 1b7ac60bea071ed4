"""Connections between processes that know a key: how they prove it, and the frames that they exchange.

Both ends prove that they know the key, by HMAC-SHA256 over fresh challenges, before anything else is looked at; then every frame
carries a code over the connection, the direction, its number, its kind and its bytes. Lengths have limits, and nothing is
unpickled. Nothing is encrypted either: what is exchanged is no secret.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

WELCOME, VALUE, VALUES, FAILED, STRANGER = b"W", b"V", b"S", b"F", b"N"  # kinds of frames

GREETING = b"flashmoe1\n"
_CHALLENGE, _CODE = 32, 32  # bytes
_CLAIM = struct.Struct("<II")  # rank, world_size
HELLO = len(GREETING) + _CHALLENGE
INTRODUCTION = HELLO + _CLAIM.size + _CODE
_FRAME = struct.Struct("<cQ")  # kind, bytes
_LENGTH = struct.Struct("<Q")


class Deadline:
    """A moment after which nobody waits any more; 0 seconds: never."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds if seconds else None

    def left(self) -> float | None:
        """Seconds until then; ``None``: without end. Raises ``TimeoutError`` afterwards."""
        if self._end is None:
            return None
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def within(self, seconds: float) -> float:
        """As many seconds, or those that are left."""
        left = self.left()
        return seconds if left is None else min(seconds, left)


def _code(key: bytes, *parts: bytes) -> bytes:
    return hmac.new(key, b"".join(parts), hashlib.sha256).digest()


def receive(connection: socket.socket, count: int, deadline: Deadline) -> bytes:
    """As many bytes; ``ConnectionError`` when there will be fewer, ``TimeoutError`` when they come late."""
    data = bytearray()
    while len(data) < count:
        connection.settimeout(deadline.left())
        if not (part := connection.recv(min(count - len(data), 1 << 16))):
            raise ConnectionError("the connection was closed")
        data += part
    return bytes(data)


class Channel:
    """A connection between two ends that know a key.

    Args:
        connection: it.
        key: of the job.
        transcript: the challenges and the claim of this connection.
        root: this is rank 0's end.
    """

    def __init__(self, connection: socket.socket, key: bytes, transcript: bytes, *, root: bool) -> None:
        self.connection = connection
        self._key = _code(key, b"session", transcript)
        self._names = (b"root", b"leaf") if root else (b"leaf", b"root")
        self._sent = self._received = 0

    def send(self, kind: bytes, payload: bytes, deadline: Deadline) -> None:
        """One frame."""
        head = _FRAME.pack(kind, len(payload))
        code = _code(self._key, self._names[0], _LENGTH.pack(self._sent), head, payload)
        self._sent += 1
        self.connection.settimeout(deadline.left())
        self.connection.sendall(head + payload + code)

    def receive(self, most: int, deadline: Deadline) -> tuple[bytes, bytes]:
        """Kind and bytes of the next frame; a code that is not right is a ``ConnectionError``."""
        head = receive(self.connection, _FRAME.size, deadline)
        kind, length = _FRAME.unpack(head)
        if kind == STRANGER and not self._received:
            return kind, b""
        if length > most:
            raise ConnectionError(f"a frame of {length} bytes")
        payload = receive(self.connection, length, deadline)
        code = _code(self._key, self._names[1], _LENGTH.pack(self._received), head, payload)
        if not hmac.compare_digest(code, receive(self.connection, _CODE, deadline)):
            raise ConnectionError("a frame that another process has made")
        self._received += 1
        return kind, payload

    def ended(self) -> bool:
        """Whether the other end is gone, and has left nothing to read."""
        try:
            return not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def fail(self, why: str) -> None:
        """Say why there will be no more, and close."""
        with suppress(OSError):
            self.send(FAILED, why.encode(), Deadline(1.0))
        self.connection.close()


def pack(parts: Sequence[bytes]) -> bytes:
    """Several values as one."""
    return b"".join(_LENGTH.pack(len(part)) + part for part in parts)


def unpack(data: bytes) -> list[bytes]:
    """What :func:`pack` was given."""
    parts, at = [], 0
    while at < len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        parts.append(data[at : at + length])
        at += length
    return parts


# ---- Proving it -------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    """What a process says of itself."""

    rank: int
    world_size: int


def hello() -> bytes:
    """What rank 0 says first: a challenge."""
    return GREETING + os.urandom(_CHALLENGE)


def introduction(key: bytes, hello: bytes, claim: Claim) -> bytes:
    """What the other end answers: a challenge of its own, its claim, and the proof that it knows the key."""
    said = GREETING + os.urandom(_CHALLENGE) + _CLAIM.pack(*claim)
    return said + _code(key, b"leaf", hello, said)


def proven(key: bytes, hello: bytes, introduction: bytes) -> Claim | None:
    """The claim of an introduction; ``None``: who made it has another key."""
    said, code = introduction[:-_CODE], introduction[-_CODE:]
    if not hmac.compare_digest(code, _code(key, b"leaf", hello, said)):
        return None
    return Claim(*_CLAIM.unpack(said[HELLO:]))


def turn_away(connection: socket.socket) -> None:
    """Tell whoever has another key, without waiting."""
    with suppress(OSError):
        connection.send(_FRAME.pack(STRANGER, 0))
