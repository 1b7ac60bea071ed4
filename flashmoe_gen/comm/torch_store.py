"""Processes that meet at the store of torch.distributed, whatever the backend of its group is."""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import re
import sys
import time
from contextlib import suppress
from typing import Any

from ..errors import CommError, SpecError, UnsupportedError
from .channel import Deadline

_MASTER = ("MASTER_ADDR", "MASTER_PORT")
_READ_S = 5.0  # what a rank has to read what all others have said


def initialised() -> Any:
    """torch.distributed, if the user has initialised it."""
    distributed = sys.modules.get("torch.distributed")
    ready = distributed is not None and distributed.is_available() and distributed.is_initialized()
    return distributed if ready else None


def port_number(text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text.strip()) or not 0 < int(text) < 1 << 16:
        raise SpecError(f"MASTER_PORT={text!r} is not valid. Must be between 1 and 65535.")
    return int(text)


class TorchBootstrap:
    """See :class:`Bootstrap`: keys of torch.distributed's store, whatever the backend is.

    An initialised default group lends its store. Otherwise the store of its ``env://`` is opened, and the group is left to the user
    to initialise.
    """

    method = "torch"
    _made = itertools.count()  # alike on all ranks, as communicators are made in one order

    def __init__(self, rank: int, world_size: int, seconds: float) -> None:
        self.rank, self.world_size, self._seconds = rank, world_size, seconds
        self._store = self._default_store() if initialised() else self._own_store()
        self._prefix, self._gathers = f"flashmoe_gen/{next(self._made)}", itertools.count()

    @staticmethod
    def _default_store() -> Any:
        from torch.distributed import distributed_c10d

        store = distributed_c10d._get_default_store()
        if store is None:
            raise UnsupportedError("This torch.distributed has no store (backend 'mpi'). Use method='mpi'.")
        return store

    def _own_store(self) -> Any:
        try:
            return _env_store(self.rank, self.world_size, self._seconds or 1e9)
        except ImportError as error:
            raise UnsupportedError(f"method='torch' needs torch ({error}). Use method='env' without it.") from error
        except (RuntimeError, ValueError, OSError) as error:
            raise CommError(
                f"Rank {self.rank} did not reach torch.distributed's store at {os.environ.get('MASTER_ADDR')}:"
                f"{os.environ.get('MASTER_PORT')} (MASTER_ADDR, MASTER_PORT) within {self._seconds:g} s: {error}"
            ) from error

    def gather(self, value: bytes, what: str) -> list[bytes]:
        deadline, number = Deadline(self._seconds), next(self._gathers)
        keys = [f"{self._prefix}/{number}/{rank}" for rank in range(self.world_size)]
        waiting = 0
        try:
            self._store.set(keys[self.rank], value)
            while missing := [rank for rank, key in enumerate(keys) if not self._store.check([key])]:
                time.sleep(deadline.within(min(0.001 * 1.5**waiting, 0.1)))
                waiting += 1
            values = [bytes(self._store.get(key)) for key in keys]
            self._await_readers(f"{self._prefix}/{number}/read")
            return values
        except TimeoutError:
            ranks = f"Rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            raise CommError(
                f"{ranks} did not come to {what} within {deadline.seconds:g} s. FLASHMOE_INIT_TIMEOUT_S sets the limit."
            ) from None
        except RuntimeError as error:
            raise CommError(f"{what}: the store of torch.distributed failed on rank {self.rank}: {error}") from error

    def _await_readers(self, key: str) -> None:
        """Rank 0 may serve the store: it must not end before the others have read. Who has ended instead is not waited for long."""
        with suppress(RuntimeError, TimeoutError):  # the last one may find that rank 0 is content, and gone
            read, deadline = self._store.add(key, 1), Deadline(_READ_S)
            while self.rank == 0 and read < self.world_size:
                time.sleep(deadline.within(0.001))
                read = self._store.add(key, 0)

    def close(self) -> None:
        pass


@functools.lru_cache(maxsize=1)  # rank 0 may serve it: it stays until the process ends
def _env_store(rank: int, world_size: int, seconds: float) -> Any:
    """What ``env://`` opens, with the server that init_process_group takes later; but it waits for no other rank, so that
    :meth:`TorchBootstrap.gather` can name those that are missing."""
    from torch import distributed

    torch: Any = distributed  # it does not say what it exports

    host, port = (os.environ[name].strip() for name in _MASTER)
    store = torch.TCPStore(
        host,
        port_number(port),
        world_size,
        rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",  # else torchrun serves it
        datetime.timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return torch.PrefixStore("flashmoe_gen", store)


# ---- Plain variables, and SLURM's -------------------------------------------------------------------------------------
