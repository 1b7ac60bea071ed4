"""Errors users hit: each says what is wrong, and the next call works."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from world import BOUNDS, Problem, World, on_ranks, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen import arrays, env
from flashmoe_gen.launch.host import lose_word

SPEC = fmg.MoESpec(16, 24, 5, 2, dtype="float32", max_tokens=40)
PROBLEM = Problem(SPEC)


@pytest.fixture(scope="module")
def layer() -> Iterator[fmg.MoELayer]:
    with fmg.MoELayer(SPEC, target="host") as made:
        yield made


def good(count: int = 6) -> dict[str, Any]:
    ids, weights = routes(SPEC, count, "uniform", 0)
    return {"x": PROBLEM.tokens(count, 0), "topk_ids": ids, "topk_weights": weights, "experts": PROBLEM.experts(range(5))}


def assert_works(layer: fmg.MoELayer) -> None:
    case = good()
    y = layer(**case)
    want = PROBLEM.reference(case["x"], case["topk_ids"], case["topk_weights"])
    assert relative_error(y, want) <= BOUNDS["float32"]


def bad_id() -> np.ndarray:
    ids = good()["topk_ids"]
    ids[3, 1] = 5
    return ids


class OnGpu:
    """Looks like a CUDA array to DLPack."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self) -> object:
        raise AssertionError("never asked for")


class NeedsGradient(OnGpu):
    requires_grad = True


read_only = np.zeros((6, 16), np.float32)
read_only.flags.writeable = False

BAD = {
    "dtype of x": ({"x": good()["x"].astype(np.float64)}, "x has dtype float64. Must be float32."),
    "shape of x": ({"x": np.zeros((6, 15), np.float32)}, "x has shape (6, 15). Must be (any, 16)."),
    "rank of x": ({"x": np.zeros(16, np.float32)}, "x has shape (16,)"),
    "stride of x": ({"x": np.zeros((6, 32), np.float32)[:, ::2]}, "x has strides (32, 2) (in elements). Must be contiguous"),
    "alignment of x": (
        {"x": np.zeros(97, np.float32)[1:].reshape(6, 16)},
        "x does not start at a multiple of 16 bytes. Pass a copy.",
    ),
    "too many tokens": (good(41), "x has 41 tokens. Must be at most max_tokens=40."),
    "list for x": ({"x": [[1.0]]}, "x is a list. Must be a NumPy, CuPy or torch array, or an object with __dlpack__"),
    "GPU array": ({"x": OnGpu()}, "x is on 'cuda:0', but this layer runs on 'cpu'."),
    "int64 ids": ({"topk_ids": np.zeros((6, 2), np.int64)}, "topk_ids has dtype int64. Must be int32."),
    "ids of other tokens": ({"topk_ids": np.zeros((5, 2), np.int32)}, "topk_ids has shape (5, 2). Must be (6, 2)."),
    "id out of range": ({"topk_ids": bad_id()}, "topk_ids[3, 1]=5 is not valid. Must be below num_experts=5"),
    "float64 weights": ({"topk_weights": np.zeros((6, 2))}, "topk_weights has dtype float64. Must be float32."),
    "no experts": ({"experts": None}, "experts is a NoneType. Must be a flashmoe_gen.Experts."),
    "wrong number of experts": ({"experts": PROBLEM.experts(range(4))}, "down has shape (4, 16, 24). Must be (5, 16, 24)."),
    "transposed experts": (
        {"experts": fmg.Experts(**{n: w.transpose(0, 2, 1) for n, w in PROBLEM.weights.items()})},
        "down has shape (5, 24, 16). Must be (5, 16, 24).",
    ),
    "strided experts": (
        {"experts": fmg.Experts(**{**PROBLEM.weights, "up": np.zeros((5, 24, 32), np.float32)[:, :, ::2]})},
        "up has strides (768, 32, 2) (in elements). Must be contiguous along its last axis",
    ),
    "missing gate": ({"experts": fmg.Experts(up=PROBLEM.weights["up"], down=PROBLEM.weights["down"])}, "gate= is missing"),
    "unwanted bias": (
        {"experts": fmg.Experts(**PROBLEM.weights, down_bias=np.zeros((5, 16), np.float32))},
        "down_bias= was passed, but the spec says bias=False.",
    ),
    "read-only out": ({"out": read_only}, "out is read-only."),
    "shape of out": ({"out": np.zeros((7, 16), np.float32)}, "out has shape (7, 16). Must be (6, 16)."),
    "num_tokens too large": ({"num_tokens": 7}, "num_tokens=7 is not valid. Must be between 0 and the 6 tokens of x."),
    "dtype of num_tokens": ({"num_tokens": np.zeros(1)}, "num_tokens has dtype float64. Must be int32."),
    "stream": ({"stream": object()}, "stream= is not valid for target='host'."),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_the_next_call_works(layer: fmg.MoELayer, name: str) -> None:
    change, message = BAD[name]
    with pytest.raises(fmg.SpecError, match=re.escape(message)):
        layer(**{**good(), **change})
    assert_works(layer)


def test_gradients_are_refused(layer: fmg.MoELayer) -> None:
    with pytest.raises(fmg.UnsupportedError, match="x requires gradients"):
        layer(**{**good(), "x": NeedsGradient()})


def test_a_closed_layer_says_so() -> None:
    made = fmg.MoELayer(SPEC, target="host")
    made.close()
    with pytest.raises(fmg.CommError, match="The layer is closed"):
        made(**good())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": "gpu"}, fmg.SpecError, "target='gpu' is not valid. Must be 'host' or 'cuda'."),
        ({"stream": object(), "target": "host"}, fmg.SpecError, "stream= is not valid"),
        ({"placement": fmg.Placement([[0, 1]]), "target": "host"}, fmg.SpecError, "placement has 2 experts on 1 ranks"),
        ({"tile": fmg.TileConfig(block_m=8, block_n=8, math="tf32"), "target": "host"}, fmg.UnsupportedError, "math='tf32'"),
    ],
)
def test_a_bad_layer_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fmg.MoELayer(SPEC, **arguments)


def test_several_ranks_need_a_communicator() -> None:
    spec = SPEC.replace(world_size=2)
    with pytest.raises(fmg.CommError, match="world_size=2 needs comm="):
        fmg.MoELayer(spec, target="host")
    with pytest.raises(fmg.CommError, match="comm has world_size=3, but the spec says 2"):
        fmg.MoELayer(spec, target="host", comm=fmg.comm.local_group(3)[0])


def test_cuda_without_cupy_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(fmg.UnsupportedError, match=r"target='cuda' needs CuPy.*pip install .*cupy-cuda1"):
        fmg.MoELayer(SPEC, target="cuda")


@pytest.mark.parametrize(
    ("reason", "message"),
    [("cudaErrorInsufficientDriver: x", "no NVIDIA driver"), ("cudaErrorNoDevice: x", "finds no GPU")],
)
def test_cuda_without_driver_or_gpu(monkeypatch: pytest.MonkeyPatch, reason: str, message: str) -> None:
    class Runtime:
        @staticmethod
        def getDeviceCount() -> int:  # noqa: N802
            raise RuntimeError(reason)

    class FakeCupy:
        class cuda:  # noqa: N801
            runtime = Runtime

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: object())
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy)  # type: ignore[arg-type]
    with pytest.raises(fmg.FlashMoEError, match=message):
        fmg.MoELayer(SPEC, target="cuda")


def failing_world(monkeypatch: pytest.MonkeyPatch, lost: str) -> tuple[World, list[Any]]:
    """Two ranks whose next call loses one signal word of rank 1 to rank 0."""
    world = World(SPEC.replace(world_size=2), tile=fmg.TileConfig(block_m=4, block_n=8))
    inputs = [(PROBLEM.tokens(40, rank), *routes(SPEC, 40, "uniform", rank)) for rank in range(2)]
    world.run(PROBLEM, inputs)
    epoch = 2
    heap, layout = world.comms[0].heap_memory(0), world.comms[0].heap
    stride = {"counts": layout.arguments()["count_stride"], "chunk_signals": layout.arguments()["chunk_stride"]}
    word = 0 if lost == "return_signals" else (8 * (epoch % 2) + 1) * stride[lost]
    if lost == "return_signals":  # the first route of rank 0 that rank 1 owns
        ids = inputs[0][1]
        word = int(np.argwhere(ids.reshape(-1) >= len(world.placement.local_experts(0)))[0, 0])
    lose_word(heap.pointer + layout.regions[lost].offset + 8 * word)
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.5")
    return world, inputs


@pytest.mark.parametrize(
    ("lost", "role", "waiting_for"),
    [
        ("chunk_signals", "subscriber", "token rows of rank 1"),
        ("return_signals", "processor", "an expert row from rank 1"),
    ],
)
def test_a_lost_signal_meets_the_deadline(monkeypatch: pytest.MonkeyPatch, lost: str, role: str, waiting_for: str) -> None:
    world, inputs = failing_world(monkeypatch, lost)
    outs = [np.zeros_like(x) for x, _, _ in inputs]
    errors: list[Any] = [None, None]
    patience = threading.local()  # rank 1 waits for rank 0 in turn: it must not give up first
    monkeypatch.setattr(env, "timeout_s", lambda: getattr(patience, "seconds", 0.5))

    def call(rank: int) -> None:
        patience.seconds = (0.5, 30)[rank]
        experts = PROBLEM.experts(world.placement.local_experts(rank))
        try:  # rank 1 may have ended its call before rank 0 gives up
            world.layers[rank](*inputs[rank], experts, out=outs[rank])
        except fmg.CommError as error:
            errors[rank] = error

    try:
        on_ranks(2, call)
    finally:
        lose_word(None)
    assert np.isnan(outs[0]).all()
    assert isinstance(errors[0], fmg.KernelTimeoutError) and "past the deadline" in str(errors[0])
    assert (errors[0].rank, errors[0].role) == (0, role)
    assert waiting_for in errors[0].waiting_for
    first, second = world.layers
    for use in (first.check, lambda: first(**{**good(), "experts": PROBLEM.experts(world.placement.local_experts(0))})):
        with pytest.raises(fmg.KernelTimeoutError, match="past the deadline"):
            use()
    with pytest.raises(fmg.CommError):  # rank 1 knows too, whether or not it also gave up
        second.check()
    monkeypatch.setattr(env, "timeout_s", lambda: 20.0)
    on_ranks(2, lambda rank: world.comms[rank].reset())
    for _ in range(3):
        for y, (x, ids, weights) in zip(world.run(PROBLEM, inputs), inputs):
            assert relative_error(y, PROBLEM.reference(x, ids, weights)) <= BOUNDS["float32"]
    for layer in world.layers:
        layer.check()


def test_a_rank_that_never_calls_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.3")
    world = World(SPEC.replace(world_size=2))
    experts = PROBLEM.experts(world.placement.local_experts(0))
    for use in (lambda: world.layers[0](**{**good(), "experts": experts}), world.layers[0].check):
        with pytest.raises(fmg.KernelTimeoutError, match="rank 1"):
            use()


def test_a_reset_that_not_all_ranks_join_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.2")
    first, second = fmg.comm.local_group(2)
    with pytest.raises(fmg.CommError, match=r"reset\(\): rank 1 did not come"):
        first.reset()
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "20")
    on_ranks(2, lambda rank: (first, second)[rank].barrier())


def test_a_call_without_threads_is_an_error_and_runs_nothing(
    layer: fmg.MoELayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(layer._target), "launch", refuse_threads)
    out = np.full((6, 16), 3.0, np.float32)
    with pytest.raises(fmg.FlashMoEError, match="refused to start"):
        layer(**good(), out=out)
    monkeypatch.undo()
    assert (out == 3.0).all()
    assert_works(layer)


def refuse_threads(target: Any, kernel: Any, args: Any, threads: int, *_: Any) -> None:
    raise fmg.FlashMoEError(f"{kernel.compiled.name} needs {threads} threads; the system refused to start them.")


def test_layers_share_a_heap_that_can_be_limited() -> None:
    comms = fmg.comm.local_group(2, heap_bytes=1 << 20)
    small = SPEC.replace(world_size=2, max_tokens=4)
    layers = [fmg.MoELayer(small, target="host", comm=comm) for comm in comms]
    with pytest.raises(fmg.CommError, match="heap_bytes=1048576 is too small"):
        fmg.MoELayer(SPEC.replace(world_size=2, max_tokens=100_000), target="host", comm=comms[0])
    assert layers[0].comm.heap.bytes <= 1 << 20


def test_calls_from_many_threads_on_layers_of_their_own() -> None:
    errors = []

    def work() -> None:
        try:
            with fmg.MoELayer(SPEC, target="host") as own:
                for _ in range(5):
                    assert_works(own)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


class Exported:
    """A foreign array library: speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


def test_dlpack_arrays_are_read_without_a_copy(layer: fmg.MoELayer) -> None:
    case = good()
    out = np.zeros_like(case["x"])
    foreign = {name: Exported(case[name]) for name in ("x", "topk_ids", "topk_weights")}
    experts = fmg.Experts(**{name: Exported(weight) for name, weight in PROBLEM.weights.items()})
    assert arrays.view(foreign["x"], "x").pointer == case["x"].ctypes.data
    result = layer(**foreign, experts=experts, out=out)
    assert result is out
    np.testing.assert_array_equal(out, layer(**case))
    assert isinstance(layer(**foreign, experts=experts), np.ndarray)


def test_torch_tensors_give_torch_tensors(layer: fmg.MoELayer) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    case = good()
    tensors = {name: torch.from_numpy(case[name]) for name in ("x", "topk_ids", "topk_weights")}
    y = layer(**tensors, experts=case["experts"])
    assert isinstance(y, torch.Tensor)
    np.testing.assert_array_equal(y.numpy(), layer(**case))
    spec = SPEC.replace(dtype="bfloat16")
    problem = Problem(spec)
    bf16 = {name: torch.from_numpy(w.astype(np.float32)).bfloat16() for name, w in problem.weights.items()}
    x = torch.from_numpy(problem.tokens(6, 0).astype(np.float32)).bfloat16()
    with fmg.MoELayer(spec, target="host") as half:
        y = half(x, tensors["topk_ids"], tensors["topk_weights"], fmg.Experts(**bf16))
        want = half(problem.tokens(6, 0), case["topk_ids"], case["topk_weights"], problem.experts(range(5)))
    assert y.dtype == torch.bfloat16
    np.testing.assert_array_equal(y.float().numpy(), want.astype(np.float32))


