"""What a layer on a GPU takes: layouts of weights, kinds of arrays, numbers of tokens; and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ranks import BF16, BOUNDS, GPT_OSS, Problem, Ranks, assert_close, device_experts, inputs_of, make

import flashmoe_gen as fmg

pytestmark = pytest.mark.gpu


def joined(problem: Problem, layout: str) -> fmg.Experts:
    """Gate and up in one array: "concat" or "interleaved"."""
    import cupy

    def join(gate: np.ndarray, up: np.ndarray) -> Any:
        both = np.concatenate([gate, up], 1) if layout == "concat" else np.stack([gate, up], 2)
        return cupy.asarray(both.reshape(len(gate), -1, *gate.shape[2:]))

    w = problem.weights
    return fmg.Experts(
        gate_up=join(w["gate"], w["up"]),
        gate_up_bias=join(w["gate_bias"], w["up_bias"]),
        gate_up_layout=layout,  # type: ignore[arg-type]
        down=cupy.asarray(w["down"]),
        down_bias=cupy.asarray(w["down_bias"]),
    )


def every_other_expert(w: np.ndarray) -> Any:
    import cupy

    wide = np.full((2 * len(w), *w.shape[1:]), np.nan, w.dtype)
    wide[::2] = w
    return cupy.asarray(wide)[::2]


def padded_rows(w: np.ndarray) -> Any:
    import cupy

    wide = np.full((*w.shape[:-1], w.shape[-1] + 16), np.nan, w.dtype)
    wide[..., :-16] = w
    return cupy.asarray(wide)[..., :-16]


def experts_inside_rows(w: np.ndarray) -> Any:
    import cupy

    if w.ndim == 2:
        return cupy.asarray(w)  # the last axis must be contiguous
    return cupy.asarray(np.ascontiguousarray(w.swapaxes(0, 1))).swapaxes(0, 1)


LAYOUTS: dict[str, Callable[[Problem], fmg.Experts]] = {
    "gate and up, concat": lambda problem: joined(problem, "concat"),
    "gate and up, interleaved": lambda problem: joined(problem, "interleaved"),
    **{
        lay.__name__: lambda problem, lay=lay: fmg.Experts(**{name: lay(w) for name, w in problem.weights.items()})
        for lay in (every_other_expert, padded_rows, experts_inside_rows)
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", [*BF16, "tf32/mma"])
def test_weights_in_any_layout_give_the_same_bits(way: str, layout: str) -> None:
    import cupy

    spec, tile = make(way, mlp="gated", **GPT_OSS)
    problem = Problem(spec)
    (case,) = inputs_of(problem, spec, [130], "uniform")
    want = Ranks(spec, tile).run(problem, [case])[0]
    assert_close(problem, case, want, BOUNDS[way])
    arrays, experts = [cupy.asarray(part) for part in case], LAYOUTS[layout](problem)
    with fmg.MoELayer(spec, target="cuda", tile=tile) as layer:
        y = layer(*arrays, experts)
        assert cupy.asnumpy(y).tobytes() == want.tobytes()


class OneLayer:
    """A bfloat16 layer with 40 tokens on the GPU."""

    def __init__(self) -> None:
        import cupy

        self.spec, tile = make("bfloat16/mma", max_tokens=60)
        self.problem = Problem(self.spec)
        (self.case,) = inputs_of(self.problem, self.spec, [40], "uniform")
        self.want = Ranks(self.spec, tile).run(self.problem, [self.case])[0]
        self.layer = fmg.MoELayer(self.spec, target="cuda", tile=tile)
        x, ids, weights = map(cupy.asarray, self.case)
        experts = device_experts(self.problem, tuple(range(7)))
        self.good: dict[str, Any] = {"x": x, "topk_ids": ids, "topk_weights": weights, "experts": experts}

    def assert_right(self, y: Any) -> None:
        import cupy

        assert cupy.asnumpy(y).tobytes() == self.want.tobytes()


@pytest.fixture(scope="module")
def one() -> OneLayer:
    return OneLayer()


# Name -> what to change in a good call (`a` is CuPy), and the message.
BAD: dict[str, tuple[Callable[[Any, OneLayer], dict[str, Any]], str]] = {
    "dtype of x": (lambda a, one: {"x": a.zeros((40, 144), "float32")}, "x has dtype float32. Must be bfloat16."),
    "x on the CPU": (lambda a, one: {"x": one.case[0]}, "x is on 'cpu', but this layer runs on 'cuda:0'."),
    "rows of x apart": (
        lambda a, one: {"x": a.asarray(np.repeat(one.case[0], 2, 1))[:, :144]},
        "x has strides (288, 1) (in elements). Must be contiguous",
    ),
    "alignment of x": (
        lambda a, one: {"x": a.asarray(np.zeros(40 * 144 + 1, one.spec.element.numpy))[1:].reshape(40, 144)},
        "x does not start at a multiple of 16 bytes. Pass a copy.",
    ),
    "too many tokens": (
        lambda a, one: {"x": a.asarray(one.problem.tokens(61, 0))},
        "x has 61 tokens. Must be at most max_tokens=60.",
    ),
    "int64 ids": (lambda a, one: {"topk_ids": a.zeros((40, 3), "int64")}, "topk_ids has dtype int64. Must be int32."),
    "ids on the CPU": (lambda a, one: {"topk_ids": one.case[1]}, "topk_ids is on 'cpu'"),
    "shape of weights": (
        lambda a, one: {"topk_weights": a.zeros((40, 2), "float32")},
        "topk_weights has shape (40, 2).",
    ),
    "experts on the CPU": (lambda a, one: {"experts": one.problem.experts(range(7))}, "down is on 'cpu'"),
    "wrong number of experts": (
        lambda a, one: {"experts": device_experts(one.problem, (0, 1))},
        "down has shape (2, 144, 208). Must be (7, 144, 208).",
    ),
    "out on the CPU": (lambda a, one: {"out": np.zeros_like(one.case[0])}, "out is on 'cpu'"),
    "shape of out": (
        lambda a, one: {"out": a.asarray(one.case[0][:39])},
        "out has shape (39, 144). Must be (40, 144).",
    ),
    "num_tokens too large": (
        lambda a, one: {"num_tokens": 41},
        "num_tokens=41 is not valid. Must be between 0 and the 40",
    ),
    "num_tokens on the CPU": (lambda a, one: {"num_tokens": np.zeros(1, np.int32)}, "num_tokens is on 'cpu'"),
    "dtype of num_tokens": (lambda a, one: {"num_tokens": a.zeros(1, "int64")}, "num_tokens has dtype int64."),
    "stream": (lambda a, one: {"stream": "x"}, "stream is a str. Must be a CUDA stream"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_is_named_and_the_next_call_works(one: OneLayer, name: str) -> None:
    import cupy

    change, message = BAD[name]
    with pytest.raises(fmg.SpecError, match=re.escape(message)):
        one.layer(**{**one.good, **change(cupy, one)})
    one.assert_right(one.layer(**one.good))
    one.layer.check()


class Exported:
    """A foreign array library on the GPU: speaks DLPack and nothing else."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


def test_dlpack_arrays_are_used_where_they_are(one: OneLayer) -> None:
    import cupy

    foreign = {name: Exported(one.good[name]) for name in ("x", "topk_ids", "topk_weights")}
    out = cupy.zeros_like(one.good["x"])
    wrapped = Exported(out)
    assert one.layer(**{**one.good, **foreign}, out=wrapped) is wrapped
    one.assert_right(out)
    made = one.layer(**{**one.good, **foreign})
    assert isinstance(made, cupy.ndarray)
    one.assert_right(made)


def test_the_output_is_of_the_kind_of_x_or_out_itself(one: OneLayer) -> None:
    import cupy

    assert isinstance(one.layer(**one.good), cupy.ndarray)
    out = cupy.zeros_like(one.good["x"])
    assert one.layer(**one.good, out=out) is out
    one.assert_right(out)
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.zeros(40, 144, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    assert one.layer(**one.good, out=tensor) is tensor
    cupy.cuda.get_current_stream().synchronize()
    np.testing.assert_array_equal(tensor.float().cpu().numpy(), one.want.astype(np.float32))


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


@pytest.mark.parametrize("on_device", [False, True], ids=["int", "device counter"])
@pytest.mark.parametrize("way", BF16)
def test_num_tokens_leaves_the_other_rows_alone(way: str, on_device: bool) -> None:
    import cupy

    spec, tile = make(way, world_size=2)
    problem = Problem(spec)
    ranks = Ranks(spec, tile)
    case = inputs_of(problem, spec, [40, 40], "uniform")
    for _, ids, _ in case:
        ids[12:] = 99  # never looked at, so never reported
    for count in (0, 1, 12):
        limit = cupy.full(1, count, cupy.int32) if on_device else count
        for y, part in zip(ranks.run(problem, case, num_tokens=limit), case):
            assert np.isnan(y[count:].astype(np.float32)).all()
            assert_close(problem, tuple(a[:count] for a in part), y[:count], BOUNDS[way])  # type: ignore[arg-type]


def test_a_device_counter_out_of_range_is_clamped(one: OneLayer) -> None:
    import cupy

    out = cupy.asarray(np.full_like(one.case[0], 3.0))
    one.layer(**one.good, out=out, num_tokens=cupy.full(1, -3, cupy.int32))
    assert (cupy.asnumpy(out).astype(np.float32) == 3.0).all()
    one.layer(**one.good, out=out, num_tokens=cupy.full(1, 1000, cupy.int32))
    one.assert_right(out)


def test_a_closed_layer_says_so(one: OneLayer) -> None:
    layer = fmg.MoELayer(one.spec, target="cuda", tile=one.layer.tile)
    layer.close()
    with pytest.raises(fmg.CommError, match="The layer is closed"):
        layer(**one.good)
