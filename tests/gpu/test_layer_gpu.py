"""The layer on a GPU against the float64 reference: dtypes, MLPs, routings, counts, ranks on one GPU, graphs, deadlines."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "host"))
from world import Problem, poison, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen.launch.cuda import CudaTarget

pytestmark = pytest.mark.gpu

# Arithmetic / block program -> relative error allowed.
BOUNDS = {
    "bfloat16/wgmma": 5e-3, "bfloat16/mma": 5e-3, "float16/wgmma": 1e-3, "float16/mma": 1e-3,
    "tf32/mma": 1e-3, "ffma/mma": 1e-5, "float64/mma": 1e-12,
}  # fmt: skip
BF16 = ["bfloat16/wgmma", "bfloat16/mma"]
KINDS = ("uniform", "skewed", "one", "few", "masked", "none")
GPT_OSS = {"bias": True, "gate_limit": 7.0, "up_offset": 1.0, "swish_beta": 1.702, "swish_alpha": 1 / 1.702}
VARIANTS: dict[str, dict[str, Any]] = {
    "gated silu": {"mlp": "gated"},
    "gated gpt-oss": {"mlp": "gated", **GPT_OSS},
    "gated gelu, weight on input": {"mlp": "gated", "activation": "gelu", "weight_on": "input", "bias": True},
    "vanilla relu": {"mlp": "vanilla", "activation": "relu"},
    "vanilla gelu_tanh, bias": {"mlp": "vanilla", "activation": "gelu_tanh", "bias": True},
    "vanilla identity": {"mlp": "vanilla", "activation": "identity"},
}


def make(way: str, *, shape: tuple[int, int, int, int] = (144, 208, 7, 3), **fields: Any) -> tuple[fmg.MoESpec, fmg.TileConfig]:
    math, program = way.split("/")
    dtype = "float32" if math in ("tf32", "ffma") else math
    spec = fmg.MoESpec(*shape, dtype=dtype, **{"max_tokens": 300, **fields})
    arch = CudaTarget().arch
    if program == "wgmma" and arch != "sm_90a":
        pytest.skip(f"wgmma is not on {arch}")
    tile = fmg.default_tile(spec, arch, program)  # type: ignore[arg-type]
    return spec, tile.replace(math=math) if dtype == "float32" else tile


@functools.cache
def device_experts(problem: Problem, ids: tuple[int, ...]) -> fmg.Experts:
    import cupy

    return fmg.Experts(**{name: cupy.asarray(w[list(ids)]) for name, w in problem.weights.items()})


Problem.__hash__ = object.__hash__  # type: ignore[method-assign]


class Ranks:
    """A layer on every rank, all on this GPU, each on a stream of its own."""

    def __init__(self, spec: fmg.MoESpec, tile: fmg.TileConfig, placement: fmg.Placement | None = None) -> None:
        import cupy

        self.spec = spec
        self.comms = fmg.comm.local_group(spec.world_size)
        self.placement = placement or fmg.Placement.default(spec.num_experts, spec.world_size)
        self.streams = [cupy.cuda.Stream(non_blocking=True) for _ in self.comms]
        self.layers = [
            fmg.MoELayer(spec, target="cuda", tile=tile, comm=comm, placement=self.placement) for comm in self.comms
        ]

    def run(self, problem: Problem, inputs: list[Any], *, clean: bool = True, **options: Any) -> list[np.ndarray]:
        import cupy

        if clean:
            for layer in self.layers:
                poison(layer)
        arrays = [tuple(map(cupy.asarray, case)) for case in inputs]
        outs = [cupy.full(x.shape, np.nan, x.dtype) for x, _, _ in arrays]
        experts = [device_experts(problem, self.placement.local_experts(rank)) for rank in range(self.spec.world_size)]
        cupy.cuda.runtime.deviceSynchronize()
        for rank, layer in enumerate(self.layers):
            layer(*arrays[rank], experts[rank], out=outs[rank], stream=self.streams[rank], **options)
        cupy.cuda.runtime.deviceSynchronize()
        for layer in self.layers:
            layer.check()
        return [cupy.asnumpy(y) for y in outs]


def inputs_of(problem: Problem, spec: fmg.MoESpec, counts: list[int], kind: str, seed: int = 0) -> list[Any]:
    return [(problem.tokens(n, seed + r), *routes(spec, n, kind, seed + r)) for r, n in enumerate(counts)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", BOUNDS)
def test_matches_the_reference(way: str, variant: str) -> None:
    spec, tile = make(way, **VARIANTS[variant])
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    worst = 0.0
    for kind in KINDS:
        for count in (0, 1, 2, 17, 64, 130, 300):
            case = inputs_of(problem, spec, [count], kind, seed=count)
            (y,) = ranks.run(problem, case)
            (again,) = ranks.run(problem, case)
            assert y.tobytes() == again.tobytes(), f"{kind}, {count} tokens: other bits in the second run"
            error = relative_error(y, problem.reference(*case[0]))
            worst = max(worst, error)
            assert error <= BOUNDS[way], f"{kind}, {count} tokens: relative error {error}"
    print(f"\n{way}, {variant}: worst relative error {worst:.2e}")


@pytest.mark.parametrize(
    "shape", [(2880, 2880, 8, 4), (2048, 768, 128, 8), (2048, 1408, 60, 4), (704, 96, 1, 1), (64, 2880, 40, 8)]
)
@pytest.mark.parametrize("way", BF16)
def test_real_widths(way: str, shape: tuple[int, int, int, int]) -> None:
    spec, tile = make(way, shape=shape, max_tokens=70)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    for count in (1, 70):
        case = inputs_of(problem, spec, [count], "uniform")
        error = relative_error(ranks.run(problem, case)[0], problem.reference(*case[0]))
        assert error <= BOUNDS["bfloat16/mma"]


@pytest.mark.parametrize("combine", ["route", "rank"])
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("way", BF16)
def test_ranks_on_one_gpu(way: str, world_size: int, combine: str) -> None:
    spec, tile = make(way, world_size=world_size)
    problem = Problem(spec)
    slots = [[3, 1, 0], [6, 2, 4, 5], []][:world_size]
    ranks = Ranks(spec, tile.replace(combine=combine), fmg.Placement(slots))
    single = Ranks(spec.replace(world_size=1), tile)
    rng = np.random.default_rng(0)
    for n in range(40):
        counts = [int(c) for c in rng.choice([0, 1, 16, 33, 150, 300], world_size)]
        case = inputs_of(problem, spec, counts, KINDS[n % len(KINDS)], seed=n)
        outputs = ranks.run(problem, case, clean=n % 2 == 0)
        for y, part in zip(outputs, case):
            assert relative_error(y, problem.reference(*part)) <= BOUNDS["bfloat16/mma"]
            if combine == "route":
                assert y.tobytes() == single.run(problem, [part])[0].tobytes()


@pytest.mark.parametrize("way", BF16)
def test_capacity_drops_the_last_tokens(way: str) -> None:
    spec, tile = make(way, capacity=9, world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [300, 40], "skewed")
    for y, part in zip(ranks.run(problem, case), case):
        assert relative_error(y, fmg.reference.moe(spec, *part, **problem.weights)) <= BOUNDS["bfloat16/mma"]
    dropped = sum(layer.stats().dropped for layer in ranks.layers)
    assert dropped == sum(fmg.reference.drops(spec, ids) for _, ids, _ in case) > 0


@pytest.mark.parametrize("way", BF16)
def test_graph_replay_with_changing_num_tokens(way: str) -> None:
    import cupy

    spec, tile = make(way)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    (layer,), (stream,) = ranks.layers, ranks.streams
    experts = device_experts(problem, ranks.placement.local_experts(0))
    x, ids, weights = (cupy.asarray(a) for a in inputs_of(problem, spec, [300], "uniform")[0])
    out, count = cupy.empty_like(x), cupy.zeros(1, cupy.int32)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        layer(x, ids, weights, experts, out=out, num_tokens=count)
        stream.begin_capture()
        layer(x, ids, weights, experts, out=out, num_tokens=count)
        layer(x, ids, weights, experts, out=out, num_tokens=count)
        graph = stream.end_capture()
    for n in (300, 0, 1, 77, 300, 5):
        case = inputs_of(problem, spec, [300], "uniform", seed=n)
        for to, new in zip((x, ids, weights), case[0]):
            to.set(new)
        count.fill(n)
        out.fill(np.nan)
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        y = cupy.asnumpy(out)
        part = tuple(a[:n] for a in case[0])
        assert np.isnan(y[n:].astype(np.float32)).all()
        eager = ranks.run(problem, [part])[0]
        assert y[:n].tobytes() == eager.tobytes()
    layer.check()


def test_ids_that_are_no_experts_are_reported() -> None:
    spec, tile = make(BF16[0])
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [20], "uniform")
    case[0][1][3, 1] = 7
    with pytest.raises(fmg.SpecError, match="1 ids that are not below num_experts=7"):
        ranks.run(problem, case)
    case = inputs_of(problem, spec, [20], "uniform")
    assert relative_error(ranks.run(problem, case)[0], problem.reference(*case[0])) <= BOUNDS["bfloat16/mma"]


@pytest.mark.parametrize("way", BF16)
def test_a_rank_that_never_calls_meets_the_deadline(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    spec, tile = make(way, world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [200, 100], "uniform")
    ranks.run(problem, case)
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "0.5")
    x, ids, weights = map(cupy.asarray, case[0])
    y = ranks.layers[0](x, ids, weights, device_experts(problem, ranks.placement.local_experts(0)), stream=ranks.streams[0])
    cupy.cuda.runtime.deviceSynchronize()
    assert np.isnan(cupy.asnumpy(y).astype(np.float32)).all()
    with pytest.raises(fmg.KernelTimeoutError, match="of rank 1"):
        ranks.layers[0].check()
    with pytest.raises(fmg.CommError, match="rank 0"):
        ranks.layers[1].check()
    monkeypatch.setenv("FLASHMOE_TIMEOUT_S", "20")
    ranks.comms[0]._group.clear()
    for y, part in zip(ranks.run(problem, case), case):
        assert relative_error(y, problem.reference(*part)) <= BOUNDS["bfloat16/mma"]


def test_torch_tensors_on_torchs_stream() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    spec, tile = make(BF16[0])
    problem = Problem(spec)
    x, ids, weights = inputs_of(problem, spec, [100], "uniform")[0]
    to = {name: torch.from_numpy(w.astype(np.float32)).cuda().bfloat16() for name, w in problem.weights.items()}
    want = Ranks(spec, tile).run(problem, [(x, ids, weights)])[0]
    with fmg.MoELayer(spec, target="cuda", tile=tile) as layer, torch.cuda.stream(torch.cuda.Stream()):
        tokens = torch.from_numpy(x.astype(np.float32)).cuda().bfloat16()
        y = layer(tokens, torch.from_numpy(ids).cuda(), torch.from_numpy(weights).cuda(), fmg.Experts(**to))
        assert y.dtype == torch.bfloat16 and y.is_cuda
        np.testing.assert_array_equal(y.float().cpu().numpy(), want.astype(np.float32))
    with pytest.raises(fmg.SpecError, match="x is on 'cpu', but this layer runs on 'cuda:0'"):
        fmg.MoELayer(spec, target="cuda", tile=tile)(x, ids, weights, fmg.Experts(**to))


@pytest.mark.parametrize("way", BF16)
def test_ten_thousand_calls_with_changing_counts(way: str) -> None:
    import cupy

    spec, tile = make(way, shape=(128, 128, 8, 2), max_tokens=128)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    (layer,), (stream,) = ranks.layers, ranks.streams
    x, ids, weights = (cupy.asarray(a) for a in inputs_of(problem, spec, [128], "uniform")[0])
    want = ranks.run(problem, inputs_of(problem, spec, [128], "uniform"))[0]
    experts = device_experts(problem, ranks.placement.local_experts(0))
    counts = np.random.default_rng(0).integers(0, 129, 10_000)
    out = cupy.empty_like(x)
    with stream:
        for n in counts:
            layer(x, ids, weights, experts, out=out, num_tokens=int(n))
        stream.synchronize()
        out.fill(np.nan)
        layer(x, ids, weights, experts, out=out)
        stream.synchronize()
    layer.check()
    assert cupy.asnumpy(out).tobytes() == want.tobytes()
    assert layer.stats().calls == 10_002


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("tokens", [1, 33, 700])
def test_router(dtype: str, tokens: int) -> None:
    import cupy

    for fields in (
        {},
        {"renormalize": False, "routed_scale": 2.5},
        {"scoring": "sigmoid", "num_groups": 8, "top_groups": 4},
    ):
        spec = fmg.MoESpec(2048, 64, 128, 8, dtype=dtype, max_tokens=700, **fields)
        rng = np.random.default_rng(1)
        element = spec.element.numpy
        x = rng.standard_normal((tokens, 2048)).astype(element)
        w = (rng.standard_normal((128, 2048)) / 45).astype(element)
        bias = rng.standard_normal(128).astype(np.float32) / 8 if fields.get("scoring") else None
        with fmg.MoELayer(spec, target="cuda") as layer:
            selection = None if bias is None else cupy.asarray(bias)
            ids, weights = layer.route(cupy.asarray(x), cupy.asarray(w), selection_bias=selection)
        want_ids, want = fmg.reference.route(spec, x, w, selection_bias=bias)
        same = (cupy.asnumpy(ids) == want_ids).all(1)
        assert same.mean() > 0.99  # near-ties may swap in fp32
        np.testing.assert_allclose(cupy.asnumpy(weights)[same], want[same], rtol=1e-4)
