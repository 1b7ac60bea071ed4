"""The ranks of the job: joined once in a process, shared by all that it initialises, left when the last of that is finalised."""

from __future__ import annotations

import threading

from .. import comm
from ..comm import Communicator
from ..errors import CommError, SpecError, UnsupportedError
from ..spec import Placement
from ..values import integer
from . import memory
from .arguments import InitArgs, Topology

_DEPENDENT = ("ep_world", "num_local_experts", "my_pe", "expert_map", "rank_map")

_lock = threading.RLock()
_world: Communicator | None = None
_groups: dict[tuple[int, ...], Communicator] = {}  # by the numbers of their ranks in the job, those of some of its ranks alone
_users = 0  # handles that are not finalised


def current() -> Communicator | None:
    """The communicator of all ranks of the job, if this process has joined it."""
    return _world


def joined() -> Communicator:
    """The communicator of all ranks of the job.

    Raises:
        CommError: this process has not joined it yet.
    """
    if _world is None:
        raise CommError("The ranks are not known yet. Call initialize() (or cb.initialize()) first.")
    return _world


def join(device_id: int) -> Communicator:
    """The communicator of all ranks of the job, made when this is the first time; collective then.

    ``device_id`` is this rank's GPU; without meaning for the host target.

    Raises:
        What :func:`flashmoe_gen.comm.init` raises.
    """
    global _world
    with _lock:
        if _world is None:
            on_gpu = memory.target_name() == "cuda"
            _world = comm.init("auto", target="cuda" if on_gpu else "host", device=device_id if on_gpu else None)
        return _world


def enter(device_id: int) -> Communicator:
    """:func:`join` for something that will :func:`leave`."""
    global _users
    with _lock:
        world = join(device_id)
        _users += 1
        return world


def leave() -> None:
    """What entered is finalised: with the last one the communicators are closed."""
    global _world, _users
    with _lock:
        _users -= 1
        if _users:
            return
        for group in _groups.values():
            group.close()
        _groups.clear()
        world, _world = _world, None
        if world is not None:
            world.close()


def group_of(args: InitArgs, world: Communicator) -> tuple[Communicator, Placement]:
    """The ranks that share the experts, and which of them holds which; fills in what ``args`` leaves open.

    Collective among all ranks of the job when only some of them share the experts.

    Raises:
        SpecError: fields that are missing or contradict each other.
        UnsupportedError: a ``rank_map`` that is not ascending.
    """
    args.topo = Topology.NVLINK_ONLY
    if args.ep_rank is None:
        placement = Placement.default(args.num_experts, world.world_size)
        args.ep_rank = args.my_pe = world.rank
        args.ep_world = world.world_size
        args.num_local_experts = len(placement.local_experts(world.rank))
        args.expert_map = [placement.owner(expert) for expert in range(args.num_experts)]
        args.rank_map = list(range(world.world_size))
        return world, placement
    missing = [name for name in _DEPENDENT if getattr(args, name) is None]
    if missing:
        raise SpecError(f"{missing[0]}=None is not valid with ep_rank={args.ep_rank!r}. Also set {', '.join(_DEPENDENT)}.")
    ranks, placement = _checked(args, world)
    if ranks == tuple(range(world.world_size)):
        return world, placement
    with _lock:
        if ranks not in _groups:
            _groups[ranks] = world.split(ranks[0])
        return _groups[ranks], placement


def _checked(args: InitArgs, world: Communicator) -> tuple[tuple[int, ...], Placement]:
    """The ranks of the job that share the experts, and the placement, of fields that are all there."""
    count = integer("ep_world", args.ep_world, 1, world.world_size)
    rank = integer("ep_rank", args.ep_rank, 0, count - 1)
    if args.my_pe != world.rank:
        raise SpecError(f"my_pe={args.my_pe!r} is not valid. This process is rank {world.rank} of the job.")
    ranks = tuple(integer(f"rank_map[{i}]", one, 0, world.world_size - 1) for i, one in enumerate(args.rank_map or ()))
    if len(ranks) != count or len(set(ranks)) != count:
        raise SpecError(f"rank_map={args.rank_map!r} is not valid. Must name ep_world={count} different ranks.")
    if ranks[rank] != world.rank:
        raise SpecError(f"rank_map[ep_rank]={ranks[rank]} is not valid. Must be my_pe={world.rank}.")
    if list(ranks) != sorted(ranks):
        raise UnsupportedError(f"rank_map={args.rank_map!r} is not supported. Must be ascending.")
    owners = [integer(f"expert_map[{i}]", one, 0, count - 1) for i, one in enumerate(args.expert_map or ())]
    if len(owners) != args.num_experts:
        raise SpecError(f"expert_map has {len(owners)} entries. Must have one for each of num_experts={args.num_experts}.")
    placement = Placement([[e for e, owner in enumerate(owners) if owner == r] for r in range(count)])
    if args.num_local_experts != (held := owners.count(rank)):
        raise SpecError(f"num_local_experts={args.num_local_experts!r} is not valid. expert_map gives this rank {held}.")
    return ranks, placement
