"""Arrays of CuPy, torch, JAX and unknown libraries on a GPU: held while kernels use them, ordered, written only where allowed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ranks import BF16, BOUNDS, Case, Problem, assert_close, device_experts, held_back, inputs_of, make
from test_launch_gpu import captured, node_types

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu


class One:
    """A bfloat16 layer of one rank, a call, and the bits it must give."""

    def __init__(self, way: str) -> None:
        import cupy

        self.spec, tile = make(way)
        self.problem = Problem(self.spec)
        self.case: Case = inputs_of(self.problem, self.spec, [100], "uniform")[0]
        self.layer = fmg.MoELayer(self.spec, target="cuda", tile=tile)
        self.experts = device_experts(self.problem, tuple(range(self.spec.num_experts)))
        self.arrays = tuple(map(cupy.asarray, self.case))
        self.want = cupy.asnumpy(self.layer(*self.arrays, self.experts))
        assert_close(self.problem, self.case, self.want, BOUNDS[way])

    def assert_right(self, y: Any) -> None:
        import cupy

        self.layer.check()
        assert cupy.asnumpy(cupy.asarray(y)).tobytes() == self.want.tobytes()


@pytest.fixture(params=BF16)
def one(request: pytest.FixtureRequest) -> Iterator[One]:
    made = One(request.param)
    yield made
    made.layer.close()


class Lender:
    """Exports a buffer that lives as long as its capsule, and notes the streams it was asked for."""

    def __init__(self, array: Any, *, versioned: bool) -> None:
        self.array, self.versioned = array, versioned
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> object:
        if options and not self.versioned:
            raise TypeError("unexpected keyword argument")
        self.streams.append(stream)
        return self.array.copy().__dlpack__(stream=-1, **options)


@pytest.mark.parametrize("versioned", [True, False])
def test_lent_memory_is_held_until_the_kernel_has_run(one: One, versioned: bool) -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    lent = [Lender(a, versioned=versioned) for a in one.arrays]
    weights = {name: Lender(cupy.asarray(w), versioned=versioned) for name, w in one.problem.weights.items()}
    count = Lender(cupy.full(1, 100, cupy.int32), versioned=versioned)
    outs = [cupy.full_like(one.arrays[0], np.nan) for _ in range(4)]

    def work() -> list[Any]:
        for out in outs:
            one.layer(*lent, fmg.Experts(**weights), out=out, num_tokens=count, stream=stream)
        junk = [cupy.full(w.array.shape, 77, w.array.dtype) for w in (*lent, *weights.values(), count) for _ in range(8)]
        cupy.cuda.get_current_stream().synchronize()
        return junk

    work()  # loads CuPy's own kernels, which waits for every stream
    stream.synchronize()
    for out in outs:
        out.fill(np.nan)
    cupy.cuda.runtime.deviceSynchronize()
    with held_back(stream):
        junk = work()
    stream.synchronize()
    for out in outs:
        one.assert_right(out)
    assert all(lender.streams == [stream.ptr] * 8 for lender in (*lent, *weights.values(), count))
    del junk


def test_a_replaced_storage_is_seen(one: One) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    weights = {name: torch.from_numpy(w.astype(np.float32)).cuda().bfloat16() for name, w in one.problem.weights.items()}
    parameters = {name: torch.nn.Parameter(torch.zeros_like(w)) for name, w in weights.items()}
    x, ids, route_weights = one.arrays
    tokens = torch.from_dlpack(x)
    held = fmg.Experts(**parameters)
    call = (tokens, torch.from_dlpack(ids), torch.from_dlpack(route_weights), held)
    with pytest.raises(fmg.UnsupportedError, match="requires gradients"):
        one.layer(*call)
    with torch.no_grad():
        assert not one.layer(*call).any()
        for name, parameter in parameters.items():
            parameter.data = weights[name]
        y = one.layer(*call)
        assert y.dtype == torch.bfloat16 and y.is_cuda
        one.layer.check()
        assert y.view(torch.int16).cpu().numpy().tobytes() == one.want.tobytes()


def test_int64_ids_of_torch_are_narrowed_on_the_stream(one: One) -> None:
    import cupy

    torch = pytest.importorskip("torch", reason="torch is not installed")
    x, ids, weights = map(torch.from_dlpack, one.arrays)
    wide, out = ids.long(), torch.zeros_like(x)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    call = {"x": x, "topk_weights": weights, "experts": one.experts, "out": out, "stream": stream}
    graph = captured(stream, lambda: one.layer(topk_ids=wide, **call))
    assert node_types(graph) == ["kernel", "kernel"]
    for _ in range(3):
        out.zero_()
        torch.cuda.synchronize()
        graph.launch(stream)
        stream.synchronize()
        one.layer.check()
        assert out.view(torch.int16).cpu().numpy().tobytes() == one.want.tobytes()
    wide[3, 1], wide[4, 0], wide[5, 2] = 2**32, -(2**40), one.spec.num_experts  # each would wrap around to an expert, or is none
    torch.cuda.synchronize()
    y = one.layer(x, wide, weights, one.experts)
    with pytest.raises(fmg.SpecError, match="topk_ids held 2 ids that are not below"):
        one.layer.check()
    left = one.case[1].copy()
    left[3, 1] = left[4, 0] = left[5, 2] = -1
    got = y.view(torch.int16).cpu().numpy().view(one.want.dtype)
    assert_close(one.problem, (one.case[0], left, one.case[2]), got, 5e-3)


def test_jax_arrays_are_waited_for_and_never_written(one: One) -> None:
    import cupy

    jax = pytest.importorskip("jax", reason="JAX is not installed")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    case = [jax.device_put(a) for a in one.case]
    held = fmg.Experts(**{name: jax.device_put(w) for name, w in one.problem.weights.items()})
    late = jax.jit(lambda x, a: x + (a @ a)[0, 0].astype(x.dtype) * 0)
    big = jax.numpy.zeros((8192, 8192))
    late(case[0], big).block_until_ready()
    for _ in range(3):
        y = one.layer(late(case[0], big), *case[1:], held)
        assert isinstance(y, jax.Array)
        one.layer.check()
        assert np.asarray(y).tobytes() == one.want.tobytes()
    ids, weights = one.layer.route(case[0], jax.device_put(one.problem.tokens(one.spec.num_experts, 1)))
    assert isinstance(ids, jax.Array) and ids.shape == (100, one.spec.top_k) and weights.dtype == np.float32
    zeros = jax.numpy.zeros_like(case[0])
    with pytest.raises(fmg.SpecError, match="out is a JAX array, which is immutable"):
        one.layer(*case, held, out=zeros)
    out = cupy.full_like(one.arrays[0], np.nan)
    one.layer(*case, held, out=out)
    one.assert_right(out)


def test_memory_that_is_not_said_to_be_writable_is_refused(one: One) -> None:
    import cupy

    out = cupy.zeros_like(one.arrays[0])
    with pytest.raises(fmg.SpecError, match="out does not say that it may be written"):
        one.layer(*one.arrays, one.experts, out=Lender(out, versioned=False))
    one.layer(*one.arrays, one.experts, out=out)
    one.assert_right(out)


def test_torch_tensors_without_memory_are_refused(one: One) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, ids, weights = map(torch.from_dlpack, one.arrays)
    for bad in (FakeTensorMode().from_tensor(x), torch._neg_view(x), x.float().to_sparse().bfloat16()):
        with pytest.raises(fmg.SpecError, match=r"^x "):
            one.layer(bad, ids, weights, one.experts)
