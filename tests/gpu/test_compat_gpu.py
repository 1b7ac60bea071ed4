"""fmg.compat on one GPU: addresses of CuPy's memory, streams by their handles, and captured graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from flashmoe_program import Device, Program, finish_all, relative_error

import flashmoe_gen.compat as flashmoe
from flashmoe_gen.errors import CommError, SpecError, UnsupportedError

pytestmark = pytest.mark.gpu

BOUNDS = {"BF16": 5e-3, "FP16": 1e-3, "FP32": 1e-3, "FP64": 1e-12}


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FLASHMOE_TARGET", "cuda")
    yield
    finish_all()
    with pytest.raises(CommError, match="ranks are not known yet"):
        flashmoe.cb.get_rank()


def make(*kind: str, **fields: Any) -> Program:
    return Program(*kind, place=Device(0), **fields)


def assert_right(program: Program) -> None:
    y, counts = program.wanted(routed=True)
    assert relative_error(program.place.get(program.moe_out), y) < BOUNDS[program.dtype.name]
    assert (program.place.get(program.expert_counts) == counts).all()
    chosen, _ = program.wanted()
    assert relative_error(y, chosen) < 0.3, "routes agree with the float64 router, but for a tie or two"


@pytest.mark.parametrize("mlp", ["GATED", "VANILLA"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_the_quickstart(dtype: str, mlp: str) -> None:
    program = make(dtype, mlp, tokens_per_rank=200, token_dim=256, ffn_size=128, num_experts=16, top_k=4)
    args = program.run()
    assert_right(program)
    assert relative_error(program.judged(args), program.wanted(routed=True)[0]) < BOUNDS[dtype]
    assert program.place.get(program.expert_counts).sum() == 800


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (1024, 8)])
def test_the_counts_of_few_and_of_many_experts(experts: int, top_k: int) -> None:
    program = make(tokens_per_rank=700, token_dim=64, ffn_size=16, num_experts=experts, top_k=top_k)
    for _ in range(2):  # nothing has to be cleared in between
        program.run()
        ids, _ = program.routing()
        assert (program.place.get(program.expert_counts) == np.bincount(ids.reshape(-1), minlength=experts)).all()


def test_a_captured_graph() -> None:
    program = make()
    program.run()
    want, args, place = program.place.get(program.moe_out), program.args(), program.place
    with place.stream:
        place.stream.begin_capture()
        program.route()
        for _ in range(16):
            flashmoe.forward(program.flash_handle, args)
        with pytest.raises(UnsupportedError, match=r"swish_alpha=2\.0, swish_beta=1\.0 are new to this handle"):
            flashmoe.forward(program.flash_handle, program.args(swish_alpha=2.0))
        graph = place.stream.end_capture()
    for _ in range(4):
        place.spoil(program.moe_out)
        place.wait()
        graph.launch(place.stream)
        assert (place.get(program.moe_out).view(np.uint8) == want.view(np.uint8)).all()


def test_swish_and_two_layers_on_two_streams() -> None:
    first, second = make(), make("FP16", "VANILLA", "RELU", top_k=1)
    for alpha in (0.5, 1.0, 0.5):
        first.run(swish_alpha=alpha, swish_beta=1.702)
        second.run()
        y, _ = first.wanted(routed=True, swish_alpha=alpha, swish_beta=1.702)
        assert relative_error(first.place.get(first.moe_out), y) < BOUNDS["BF16"]
        assert_right(second)


def test_what_is_refused() -> None:
    program = make()
    with pytest.raises(SpecError, match=r"before router\.forward"):
        flashmoe.forward(program.flash_handle, program.args())
    plain = np.zeros((24, 64), np.float32)
    with pytest.raises(SpecError, match=r"tokens=0x\w+ is not valid. Must be an address in the memory of cuda:0"):
        program.run(tokens=-(-plain.ctypes.data // 16) * 16)
    with pytest.raises(SpecError, match="stream_ptr=-1 is not valid"):
        program.run(stream_ptr=-1)
    made = program.init_args
    for name, value, kind in (("gpu_arch", 700, UnsupportedError), ("device_id", 99, SpecError)):
        kept = getattr(made, name)
        setattr(made, name, value)
        with pytest.raises(kind, match=f"{name}={value} is not"):
            flashmoe.initialize(made)
        setattr(made, name, kept)
    program.run()
    assert_right(program)
