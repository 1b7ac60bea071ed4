"""Arrays of torch and JAX on the host: what they may be, and what is refused by name instead of read from nowhere."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from world import BOUNDS, Problem, relative_error, routes

import flashmoe_gen as fmg

SPEC = fmg.MoESpec(32, 16, 5, 2, dtype="float32", max_tokens=24)
PROBLEM = Problem(SPEC)
X, (IDS, WEIGHTS) = PROBLEM.tokens(24, 0), routes(SPEC, 24, "uniform", 0)
WANT = PROBLEM.reference(X, IDS, WEIGHTS)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.fixture
def jax() -> Any:
    return pytest.importorskip("jax", reason="JAX is not installed")


def right(y: Any) -> None:
    assert relative_error(np.asarray(y), WANT) <= BOUNDS["float32"]


def tensors(torch: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(a.copy()) for name, a in (("x", X), ("topk_ids", IDS), ("topk_weights", WEIGHTS))}


def experts(torch: Any) -> fmg.Experts:
    return fmg.Experts(**{name: torch.from_numpy(w) for name, w in PROBLEM.weights.items()})


def fake(torch: Any, t: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(t)



def wrapper(torch: Any, t: Any) -> Any:
    class Wrapper(torch.Tensor):  # type: ignore[misc]
        @staticmethod
        def __new__(cls: Any, inner: Any) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    return Wrapper(t)


BAD_TENSORS = {
    "fake": fake,
    "wrapper subclass": wrapper,
    "meta": lambda torch, t: t.to("meta"),
    "sparse COO": lambda torch, t: t.to_sparse(),
    "sparse CSR": lambda torch, t: t.to_sparse_csr(),
    "mkldnn": lambda torch, t: t.to_mkldnn(),
    "nested": lambda torch, t: torch.nested.nested_tensor([t, t]),
    "pending negation": lambda torch, t: torch._neg_view(t),
    "requires gradients": lambda torch, t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
@pytest.mark.parametrize("where", ["x", "out", "down"])
def test_a_tensor_without_plain_memory_is_refused_by_name(torch: Any, kind: str, where: str) -> None:
    case, weights = tensors(torch), {name: torch.from_numpy(w) for name, w in PROBLEM.weights.items()}
    plain = weights["down"] if where == "down" else case["x"]
    if where == "down" and kind == "sparse CSR":
        plain = plain[0]
    bad = BAD_TENSORS[kind](torch, plain)
    (weights if where == "down" else case)[where] = bad
    with fmg.MoELayer(SPEC, target="host") as layer:
        with pytest.raises((fmg.SpecError, fmg.UnsupportedError), match=rf"^{where} ") as raised:
            layer(**case, experts=fmg.Experts(**weights))
        if kind != "wrapper subclass":  # torch itself says what it cannot do
            assert "cannot be read" not in str(raised.value), "said once"
        right(layer(**tensors(torch), experts=experts(torch)))


def test_vmap_and_grad_transforms_are_refused(torch: Any) -> None:
    case = tensors(torch)
    with fmg.MoELayer(SPEC, target="host") as layer:

        def call(x: Any) -> Any:
            return layer(x, case["topk_ids"], case["topk_weights"], experts(torch))

        with pytest.raises(fmg.SpecError, match=r"^x "):
            torch.vmap(call)(case["x"][None])
        with pytest.raises((fmg.SpecError, fmg.UnsupportedError), match=r"^x "):
            torch.func.grad(lambda x: call(x).sum())(case["x"])


def test_parameters_are_read_where_gradients_are_off(torch: Any) -> None:
    case = tensors(torch)
    parameters = {name: torch.nn.Parameter(torch.from_numpy(w.copy())) for name, w in PROBLEM.weights.items()}
    with fmg.MoELayer(SPEC, target="host") as layer:
        held = fmg.Experts(**parameters)
        with pytest.raises(fmg.UnsupportedError, match=r"down requires gradients.*torch\.no_grad\(\)"):
            layer(**case, experts=held)
        for off in (torch.no_grad(), torch.inference_mode()):
            with off:
                right(layer(**case, experts=held))
        with pytest.raises(fmg.UnsupportedError, match="requires gradients"):
            layer(**case, experts=held)
        with torch.no_grad():
            for parameter in parameters.values():  # what weight syncs do
                parameter.data = torch.zeros_like(parameter)
            assert not layer(**case, experts=held).any()
            parameters["down"].data = parameters["down"].data.double()
            with pytest.raises(fmg.SpecError, match="down has dtype float64"):
                layer(**case, experts=held)


def test_int64_ids_of_torch_are_narrowed_without_wrapping(torch: Any) -> None:
    case = tensors(torch)
    wide = case["topk_ids"].long()
    with fmg.MoELayer(SPEC, target="host") as layer:
        right(layer(**{**case, "topk_ids": wide}, experts=experts(torch)))
        for id_, masked in ((-1, True), (-(2**40), True), (-(2**63), True), (5, False), (2**32, False), (2**63 - 1, False)):
            ids = wide.clone()
            ids[3, 1] = id_
            if not masked:
                with pytest.raises(fmg.SpecError, match=rf"topk_ids\[3, 1\]={id_} is not valid"):
                    layer(**{**case, "topk_ids": ids}, experts=experts(torch))
                continue
            narrow = IDS.copy()
            narrow[3, 1] = -1
            y = layer(**{**case, "topk_ids": ids}, experts=experts(torch)).numpy()
            assert relative_error(y, PROBLEM.reference(X, narrow, WEIGHTS)) <= BOUNDS["float32"]
        chosen = torch.topk(torch.randn(24, 5), 2)
        layer(case["x"], chosen.indices, chosen.values.softmax(-1), experts(torch))
        with pytest.raises(fmg.SpecError, match=r"topk_ids has dtype int64. Must be int32."):  # NumPy has a choice
            layer(X, IDS.astype(np.int64), WEIGHTS, PROBLEM.experts(range(5)))


def test_a_module_that_holds_a_layer_can_be_copied(torch: Any) -> None:
    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            for name, w in PROBLEM.weights.items():
                setattr(self, name, torch.nn.Parameter(torch.from_numpy(w.copy()), requires_grad=False))
            self.experts = fmg.Experts(gate=self.gate, up=self.up, down=self.down)
            self.layer = fmg.MoELayer(SPEC, target="host")

        def forward(self, **case: Any) -> Any:
            return self.layer(**case, experts=self.experts)

    block = Block()
    right(block(**tensors(torch)))
    twin = copy.deepcopy(block)
    assert twin.experts._arrays["down"] is twin.down and twin.down is not block.down and twin.layer is not block.layer
    twin.down.zero_()
    right(block(**tensors(torch)))
    assert not twin(**tensors(torch)).any()


def test_jax_arrays_are_read_and_never_written(jax: Any) -> None:
    case = {"x": jax.numpy.asarray(X), "topk_ids": jax.numpy.asarray(IDS), "topk_weights": jax.numpy.asarray(WEIGHTS)}
    held = fmg.Experts(**{name: jax.numpy.asarray(w) for name, w in PROBLEM.weights.items()})
    with fmg.MoELayer(SPEC, target="host") as layer:
        y = layer(**case, experts=held)
        assert isinstance(y, jax.Array)
        right(y)
        zeros = jax.numpy.zeros_like(case["x"])
        twin = zeros + 0
        with pytest.raises(fmg.SpecError, match="out is a JAX array, which is immutable"):
            layer(**case, experts=held, out=zeros)
        assert not np.asarray(zeros).any() and not np.asarray(twin).any()
        with pytest.raises(fmg.SpecError, match=r"^x "):
            jax.jit(lambda x: layer(x, case["topk_ids"], case["topk_weights"], held))(case["x"])
        deleted = jax.numpy.asarray(X) + 0
        deleted.delete()
        with pytest.raises(fmg.SpecError, match="x cannot be read through DLPack"):
            layer(**{**case, "x": deleted}, experts=held)


def test_torch_output_of_numpy_memory_that_is_read_only(torch: Any) -> None:
    """torch knows no read-only memory; NumPy does."""
    out = np.zeros_like(X)
    out.flags.writeable = False
    with fmg.MoELayer(SPEC, target="host") as layer, pytest.raises(fmg.SpecError, match="out is read-only"):
        layer(**tensors(torch), experts=experts(torch), out=out)
