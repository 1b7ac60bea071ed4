"""A program as users of flashmoe-py write one: addresses alone, and the names of its quickstart, in the quickstart's order."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

import flashmoe_gen as fmg
import flashmoe_gen.compat as flashmoe
from flashmoe_gen.dtypes import get_dtype

Array = Any  # NumPy's or CuPy's

DTYPES = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32", "FP64": "float64"}
METADATA = "ep_world num_local_experts ep_rank my_pe expert_map rank_map".split()
SIZES = {"tokens_per_rank": 24, "token_dim": 64, "ffn_size": 48, "num_experts": 8, "top_k": 2}


class Place:
    """Where a program has its memory: of this process."""

    arch, device_id, stream_ptr = 900, 0, 0

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        return array

    def get(self, array: Array) -> np.ndarray[Any, Any]:
        return np.asarray(array)

    def address(self, array: Array) -> int:
        return int(array.ctypes.data)

    def spoil(self, array: Array) -> None:
        """Fill it with what nothing computes."""
        array.view(np.uint8)[:] = 0x42

    def wait(self) -> None:
        pass


class Device(Place):
    """On a GPU, with a stream of its own."""

    def __init__(self, device_id: int) -> None:
        import cupy

        self.cupy, self.device_id = cupy, device_id
        cupy.cuda.Device(device_id).use()
        self.arch = 10 * int(cupy.cuda.Device(device_id).compute_capability)
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream_ptr = int(self.stream.ptr)

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        return self.cupy.asarray(array)

    def get(self, array: Array) -> np.ndarray[Any, Any]:
        self.wait()
        return array.get()

    def address(self, array: Array) -> int:
        return int(array.data.ptr)

    def spoil(self, array: Array) -> None:
        self.cupy.cuda.runtime.memset(array.data.ptr, 0x42, array.nbytes)

    def wait(self) -> None:
        self.cupy.cuda.Device(self.device_id).synchronize()


class Program:
    """One rank: its memory, and the calls of the quickstart. Every rank draws the weights of all experts, and passes its own.

    Args:
        dtype, mlp, act: members of the enumerations.
        place: where its memory is.
        metadata: the fields of ``METADATA``, or none.
        sizes: ``SIZES`` that differ, and ``expert_peer_capacity``.
    """

    alive: ClassVar[list[Program]] = []

    def __init__(
        self,
        dtype: str = "BF16",
        mlp: str = "GATED",
        act: str = "SILU",
        *,
        place: Place | None = None,
        metadata: dict[str, Any] | None = None,
        **sizes: Any,
    ) -> None:
        self.place = place or Place()
        self.dtype, self.mlp = flashmoe.DataType[dtype], flashmoe.MLPType[mlp]
        self.init_args = flashmoe.InitArgs(
            data_type=self.dtype, mlp_type=self.mlp, act_type=flashmoe.ActivationType[act], gpu_arch=self.place.arch,
            stream_ptr=self.place.stream_ptr, device_id=self.place.device_id, **(SIZES | sizes), **(metadata or {}),
        )  # fmt: skip
        self.flash_handle = flashmoe.initialize(self.init_args)
        self.router_handle = flashmoe.router.initialize(self.init_args)
        self.ref_handle = flashmoe.reference.initialize(self.init_args)
        self.alive.append(self)
        flashmoe.cb.sync_all(self.place.stream_ptr)
        self._fill()
        self.place.wait()

    def _fill(self) -> None:
        made, put = self.init_args, self.place.put
        tokens, hidden, inner, experts = made.tokens_per_rank, made.token_dim, made.ffn_size, made.num_experts
        element = get_dtype(DTYPES[self.dtype.name]).numpy
        own, shared = np.random.default_rng(1000 + flashmoe.cb.get_rank()), np.random.default_rng(7)

        def draw(random: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray[Any, Any]:
            return (random.standard_normal(shape) * scale / shape[-1] ** 0.5).astype(element)

        self.tokens = put(draw(own, tokens, hidden, scale=8.0))
        self.router_weights = put(draw(shared, experts, hidden))
        self.all = {
            "up": draw(shared, experts, inner, hidden), "up_v": draw(shared, experts, inner, hidden),
            "bias_up": draw(shared, experts, inner), "bias_up_v": draw(shared, experts, inner),
            "down": draw(shared, experts, hidden, inner), "bias_down": draw(shared, experts, hidden),
        }  # fmt: skip
        mine = [expert for expert, owner in enumerate(made.expert_map or ()) if owner == made.ep_rank]
        assert len(mine) == made.num_local_experts
        names = {"up": "expert_up", "up_v": "expert_up_v", "down": "expert_down"}
        self.local = {
            f"local_{names.get(name, name)}": put(np.ascontiguousarray(array[mine])) for name, array in self.all.items()
        }
        self.expert_counts = put(np.full(experts, -1, np.int32))
        self.moe_out = put(np.zeros((tokens, hidden), element))

    def args(self, **changes: Any) -> flashmoe.ForwardArgs:
        """The arguments of a call."""
        address = self.place.address
        weights = {name: address(array) for name, array in self.local.items()}
        if self.mlp is flashmoe.MLPType.VANILLA:
            weights |= {"local_expert_up_v": 0, "local_bias_up_v": 0}
        fields = {
            "mt": self.mlp, "tokens": address(self.tokens), "expert_counts": address(self.expert_counts),
            "moe_out": address(self.moe_out), "stream_ptr": self.place.stream_ptr, **weights,
        }  # fmt: skip
        return flashmoe.ForwardArgs(**(fields | changes))

    def route(self) -> None:
        """Call the router."""
        address = self.place.address
        arguments = flashmoe.router.RouterForwardArgs(
            tokens=address(self.tokens), weights=address(self.router_weights), expert_counts=address(self.expert_counts),
            stream_ptr=self.place.stream_ptr,
        )  # fmt: skip
        flashmoe.router.forward(self.router_handle, self.flash_handle, arguments)

    def run(self, **changes: Any) -> flashmoe.ForwardArgs:
        """Call router and layer."""
        args = self.args(**changes)
        self.place.spoil(self.moe_out)
        self.place.wait()
        self.route()
        flashmoe.forward(self.flash_handle, args)
        return args

    def judged(self, args: flashmoe.ForwardArgs) -> np.ndarray[Any, Any]:
        """What the API's own reference says of a call."""
        place, made = self.place, self.init_args
        held = {name: place.put(array) for name, array in self.all.items()}
        out = place.put(np.zeros((made.tokens_per_rank, made.token_dim), get_dtype(DTYPES[self.dtype.name]).numpy))
        names = {"up": "expert_up", "up_v": "expert_up_v", "down": "expert_down"}
        given = flashmoe.reference.RefForwardArgs(
            ref_input=0, ref_interim0=0, ref_interim1=0, ref_out=place.address(out),
            **{names.get(name, name): place.address(array) for name, array in held.items()},
        )  # fmt: skip
        token_ids = self.flash_handle.mod.get_tIdx(self.flash_handle.context)
        flashmoe.reference.forward(self.ref_handle, token_ids, args, given)
        return place.get(out)

    def routing(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ids and weights that the router has chosen."""
        moe = self.flash_handle.mod
        return self.place.get(moe.ids), self.place.get(moe.weights)

    def wanted(self, *, routed: bool = False, **changes: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """What this package's reference makes of the same arrays: y, and the routes of each expert.

        From the router on; with ``routed`` from what the router has chosen on, which on GPUs may swap experts that nearly tie.
        """
        made, weights = self.init_args, self.all
        spec = fmg.MoESpec(
            made.token_dim, made.ffn_size, made.num_experts, made.top_k, dtype=DTYPES[self.dtype.name],
            mlp=self.mlp.name.lower(),  # type: ignore[arg-type]
            activation=made.act_type.name.lower(),  # type: ignore[arg-type]
            bias=True, capacity=made.expert_peer_capacity, max_tokens=made.tokens_per_rank, **changes,
        )  # fmt: skip
        tokens = self.place.get(self.tokens)
        ids, scores = self.routing() if routed else fmg.reference.route(spec, tokens, self.place.get(self.router_weights))
        if spec.mlp == "gated":
            up = {"gate": weights["up"], "gate_bias": weights["bias_up"], "up": weights["up_v"], "up_bias": weights["bias_up_v"]}
        else:
            up = {"up": weights["up"], "up_bias": weights["bias_up"]}
        down = {"down": weights["down"], "down_bias": weights["bias_down"]}
        y = fmg.reference.moe(spec, tokens, ids, scores.astype(np.float32), **up, **down)
        return y, np.bincount(ids.reshape(-1), minlength=spec.num_experts)

    def error(self, **changes: Any) -> float:
        """Relative L2 error of the last call."""
        return relative_error(self.place.get(self.moe_out), self.wanted(**changes)[0])

    def finish(self) -> None:
        """As the quickstart ends; a second time nothing happens."""
        flashmoe.finalize(self.flash_handle, self.place.stream_ptr)
        flashmoe.router.finalize(self.router_handle, self.place.stream_ptr)


def finish_all() -> None:
    """Finish every program that was made."""
    while Program.alive:
        Program.alive.pop().finish()


def relative_error(got: np.ndarray[Any, Any], want: np.ndarray[Any, Any]) -> float:
    """Relative L2 error."""
    return float(np.linalg.norm(got.astype(np.float64) - want) / np.linalg.norm(want))
