"""fmg.compat on the host target, with one rank: programs of flashmoe-py, reduced, against the float64 reference."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flashmoe_program import METADATA, Program, finish_all, relative_error

import flashmoe_gen.compat as flashmoe
from flashmoe_gen.errors import CommError, SpecError, UnsupportedError

BOUNDS = {"BF16": 5e-3, "FP16": 1e-3, "FP32": 1e-5, "FP64": 1e-12}
KINDS = [("BF16", mlp, act) for mlp in ("GATED", "VANILLA") for act in ("IDENTITY", "SILU", "GELU", "RELU")]
KINDS += [(dtype, mlp, "SILU") for dtype in ("FP16", "FP32", "FP64") for mlp in ("GATED", "VANILLA")]
VANILLA = flashmoe.MLPType.VANILLA


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHMOE_TARGET", "host")
    yield
    finish_all()
    with pytest.raises(CommError, match="ranks are not known yet"):
        flashmoe.cb.get_rank()


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.mark.parametrize(("dtype", "mlp", "act"), KINDS)
def test_the_quickstart(dtype: str, mlp: str, act: str) -> None:
    program = Program(dtype, mlp, act)
    args = program.run()
    y, counts = program.wanted()
    assert relative_error(program.moe_out, y) < BOUNDS[dtype]
    assert relative_error(program.judged(args), y) < BOUNDS[dtype]
    assert (program.expert_counts == counts).all() and counts.sum() == 48


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_weights_of_a_token_sum_to_one(top_k: int) -> None:
    program = Program("FP32", top_k=top_k)
    program.run()
    assert program.error() < BOUNDS["FP32"]
    assert np.allclose(program.flash_handle.mod.weights.sum(axis=1), 1.0, atol=1e-6)


def skewed(program: Program) -> None:
    """Every token prefers the first two experts."""
    program.router_weights[:] = 0
    program.router_weights[:2] = 1
    program.tokens[:] = np.abs(program.tokens)


def test_no_token_is_dropped_unless_a_capacity_is_given() -> None:
    program, limited = Program("FP32"), Program("FP32", expert_peer_capacity=5)
    for one in (program, limited):
        skewed(one)
        one.run()
        _, counts = one.wanted()
        assert one.error() < BOUNDS["FP32"]
        assert list(one.expert_counts) == list(counts) == [24, 24, 0, 0, 0, 0, 0, 0], "counted before any is dropped"
    assert np.all(np.any(program.moe_out, axis=1))
    assert np.any(limited.moe_out[:5]) and not np.any(limited.moe_out[5:])


def test_the_routing_stays_and_the_memory_may_change(program: Program) -> None:
    program.run()
    first = program.moe_out.copy()
    other, again = np.zeros_like(first), np.zeros_like(first)
    flashmoe.forward(program.flash_handle, program.args(moe_out=other.ctypes.data))
    flashmoe.forward(program.flash_handle, program.args(moe_out=again.ctypes.data))
    assert (other == first).all() and (again == first).all()
    program.local["local_expert_down"][:] = 0  # in place
    program.local["local_bias_down"][:] = 0
    flashmoe.forward(program.flash_handle, program.args())
    assert not np.any(program.moe_out)


def test_swish_is_an_argument_of_the_call(program: Program) -> None:
    for alpha, beta in ((0.5, 1.702), (1.0, 1.0), (0.5, 1.702)):
        args = program.run(swish_alpha=alpha, swish_beta=beta)
        y, _ = program.wanted(swish_alpha=alpha, swish_beta=beta)
        assert relative_error(program.moe_out, y) < BOUNDS["BF16"]
        assert relative_error(program.judged(args), y) < BOUNDS["BF16"]


def test_calls_compile_and_allocate_nothing(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program.run()
    args, target = program.args(), type(program.flash_handle.mod.target)

    def refuse(*_: Any) -> None:
        raise AssertionError("a call allocates")

    with monkeypatch.context() as patch:
        patch.setattr(target, "allocate", refuse)
        patch.setenv("FLASHMOE_NO_JIT", "1")
        patch.setenv("FLASHMOE_CACHE_DIR", "/nowhere")
        for _ in range(3):
            program.route()
            flashmoe.forward(program.flash_handle, args)


def test_several_layers_share_the_ranks() -> None:
    layers = [Program(), Program("FP16", "VANILLA", "RELU", top_k=1), Program(num_experts=4)]
    communicator = flashmoe.cb.world.joined()
    for program in (*layers, *layers):
        program.run()
        assert program.error() < BOUNDS[program.dtype.name]
    for program in layers:
        assert flashmoe.cb.world.joined() is communicator
        program.finish()
    with pytest.raises(CommError, match="closed"):
        communicator.check()
    Program().run()  # and a new start


def test_all_metadata_given(program: Program) -> None:
    second = Program(metadata={name: getattr(program.init_args, name) for name in METADATA})
    second.run()
    assert second.error() < BOUNDS["BF16"]


def test_the_arguments_are_filled_in(program: Program) -> None:
    made = program.init_args
    assert (made.ep_rank, made.ep_world, made.my_pe, made.num_local_experts) == (0, 1, 0, 8)
    assert (made.expert_map, made.rank_map, made.topo) == ([0] * 8, [0], flashmoe.Topology.NVLINK_ONLY)
    assert (flashmoe.cb.get_rank(), flashmoe.cb.get_world_size(), flashmoe.get_local_rank()) == (0, 1, 0)


def test_the_router_may_come_first_and_outlive_a_layer(program: Program) -> None:
    flashmoe.finalize(program.flash_handle, 0)
    assert flashmoe.cb.get_rank() == 0, "the router is still there"
    program.flash_handle = flashmoe.initialize(program.init_args)
    program.run()
    assert program.error() < BOUNDS["BF16"]


def test_finalize_twice_and_use_afterwards(program: Program) -> None:
    args = program.run()
    program.finish()
    program.finish()
    with pytest.raises(CommError, match="The handle has been finalised"):
        flashmoe.forward(program.flash_handle, args)
    with pytest.raises(CommError, match="The handle of the router has been finalised"):
        program.route()
    with pytest.raises(CommError, match="The handle has been finalised"):
        program.judged(args)
    with pytest.raises(CommError, match="not known yet"):
        flashmoe.cb.sync_all(0)


Refusal = tuple[Callable[[Program], object], type[Exception], str]
REFUSALS: dict[str, Refusal] = {
    "nothing routed": (lambda p: flashmoe.forward(p.flash_handle, p.args()), SpecError, "before router.forward"),
    "no address": (lambda p: p.run(tokens=0), SpecError, r"tokens=0 is not valid. Must be the address of \[24, 64\] of bfloat16"),
    "None": (lambda p: p.run(local_bias_down=None), SpecError, "local_bias_down=None is not valid"),
    "an array": (lambda p: p.run(moe_out=p.moe_out), SpecError, "moe_out=<ndarray> is not valid. Must be the address"),
    "odd": (lambda p: p.run(local_bias_up=p.tokens.ctypes.data + 1), SpecError, "local_bias_up=.* Must be a multiple of 2"),
    "not aligned": (lambda p: p.run(tokens=p.tokens.ctypes.data + 2), SpecError, "tokens=.* Must be a multiple of 16"),
    "stream": (lambda p: p.run(stream_ptr=7), UnsupportedError, "stream_ptr=7 is not supported: the host target has no streams"),
    "other MLP": (
        lambda p: p.run(mt=VANILLA, local_expert_up_v=0, local_bias_up_v=0), SpecError, "mt=.*VANILLA.* mlp_type=.*GATED"
    ),
    "swish": (lambda p: p.run(swish_alpha=float("nan")), SpecError, "swish_alpha=nan is not valid"),
    "token ids": (
        lambda p: flashmoe.reference.forward(p.ref_handle, 12345, p.args(), None),  # type: ignore[arg-type]
        SpecError, "token_ids=12345 is not valid",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("act", "kind", "wanted"), REFUSALS.values(), ids=REFUSALS)
def test_a_wrong_call_is_refused(program: Program, act: Callable[[Program], object], kind: type[Exception], wanted: str) -> None:
    with pytest.raises(kind, match=wanted):
        act(program)
    program.run()  # and nothing is lost
    assert program.error() < BOUNDS["BF16"]


def test_router_and_layer_must_fit(program: Program) -> None:
    other = Program(tokens_per_rank=16)
    flashmoe.router.finalize(other.router_handle)
    other.router_handle = program.router_handle
    with pytest.raises(SpecError, match="initialised with tokens_per_rank=24 and tokens_per_rank=16"):
        other.route()


@pytest.mark.parametrize("initialize", [flashmoe.initialize, flashmoe.router.initialize])
def test_a_failed_initialize_leaves_nothing_behind(initialize: Callable[[flashmoe.InitArgs], object]) -> None:
    program = Program()
    program.init_args.stream_ptr = 3
    with pytest.raises(UnsupportedError, match="stream_ptr=3 is not supported"):
        initialize(program.init_args)


def test_the_memory_of_the_caller_is_used_as_it_is(program: Program) -> None:
    """No array object behind an address: memory of C."""
    raw = (ctypes.c_char * (program.moe_out.nbytes + 64))()
    at = -(-ctypes.addressof(raw) // 64) * 64
    program.run(moe_out=at)
    gc.collect()
    got = np.frombuffer(ctypes.string_at(at, program.moe_out.nbytes), program.moe_out.dtype)
    assert relative_error(got.reshape(program.moe_out.shape), program.wanted()[0]) < BOUNDS["BF16"]
