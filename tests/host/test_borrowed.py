"""Memory that callers lend: held exactly as long as it is used, looked at again at every call, written only where allowed."""

from __future__ import annotations

import copy
import ctypes
import gc
import pickle
import weakref
from typing import Any

import numpy as np
import pytest
from world import BOUNDS, Problem, relative_error, routes

import flashmoe_gen as fmg
from flashmoe_gen import arrays

SPEC = fmg.MoESpec(32, 16, 5, 2, dtype="float32", max_tokens=24, bias=True)


class Lender:
    """Exports a buffer made for the occasion, which goes with its capsule, and is then overwritten."""

    def __init__(self, data: np.ndarray, *, versioned: bool = True, read_only: bool = False) -> None:
        self.data, self.versioned, self.read_only = data, versioned, read_only
        self.lent: list[weakref.ref[np.ndarray]] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **options: Any) -> object:
        if not self.versioned and options:
            raise TypeError("__dlpack__() got an unexpected keyword argument")
        buffer = self.data.copy()
        if self.read_only:
            buffer.flags.writeable = False
        self.lent.append(weakref.ref(buffer))
        return buffer.__dlpack__(**options)

    @property
    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.lent)


class Parameter:
    """One object whose storage may be replaced, as frameworks have it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> object:
        return self.data.__dlpack__(**options)


def case(count: int = 24) -> tuple[Problem, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    problem = Problem(SPEC)
    return problem, (problem.tokens(count, 0), *routes(SPEC, count, "uniform", 0))


def right(y: Any, problem: Problem, inputs: Any) -> None:
    assert relative_error(np.asarray(y), problem.reference(*inputs)) <= BOUNDS["float32"]


@pytest.mark.parametrize("versioned", [True, False])
def test_a_capsule_lives_as_long_as_its_address_is_used(versioned: bool) -> None:
    problem, inputs = case()
    lenders = {name: Lender(w, versioned=versioned) for name, w in problem.weights.items()}
    lent_inputs = [Lender(a, versioned=versioned) for a in inputs]
    count = Lender(np.array([20], np.int32), versioned=versioned)
    out = np.zeros_like(inputs[0])
    with fmg.MoELayer(SPEC, target="host") as layer:
        experts = fmg.Experts(**lenders)
        for _ in range(4):
            out[:] = np.nan
            junk = [np.full_like(w, 1e30) for w in problem.weights.values()]  # what takes the place of freed memory
            layer(*lent_inputs, experts, out=out, num_tokens=count)
            right(out[:20], problem, tuple(a[:20] for a in inputs))
            del junk
        assert all(lender.alive <= 1 for lender in lenders.values())
        layer.close()
        del experts
        assert all(lender.alive == 0 for lender in (*lenders.values(), *lent_inputs, count))


@pytest.mark.parametrize("versioned", [True, False])
def test_everything_the_router_borrows_lives_too(versioned: bool) -> None:
    spec = SPEC.replace(num_experts=64, top_k=4)
    rng = np.random.default_rng(0)
    weight, x = (rng.standard_normal(shape, np.float32) for shape in ((64, 32), (24, 32)))
    logit_bias, selection_bias = (rng.standard_normal(64, np.float32) for _ in range(2))
    lend = [Lender(a, versioned=versioned) for a in (x, weight, logit_bias, selection_bias)]
    want = fmg.reference.route(spec, x, weight, logit_bias=logit_bias, selection_bias=selection_bias)
    with fmg.MoELayer(spec, target="host") as layer:
        for _ in range(20):
            ids, weights = layer.route(lend[0], lend[1], logit_bias=lend[2], selection_bias=lend[3])
            np.testing.assert_array_equal(ids, want[0])
            np.testing.assert_allclose(weights, want[1], rtol=1e-5)
    assert [lender.alive for lender in lend] == [0] * 4


def test_weights_may_change_in_place_and_storages_may_be_replaced() -> None:
    problem, inputs = case()
    other = Problem(SPEC, seed=1)
    for wrap in (Parameter, lambda array: array):
        held = {name: wrap(w.copy()) for name, w in problem.weights.items()}
        with fmg.MoELayer(SPEC, target="host") as layer:
            experts = fmg.Experts(**held)
            right(layer(*inputs, experts), problem, inputs)
            for name, parameter in held.items():
                (parameter.data if wrap is Parameter else parameter)[:] = other.weights[name]
            right(layer(*inputs, experts), other, inputs)
            if wrap is Parameter:
                for name, parameter in held.items():
                    parameter.data = problem.weights[name].copy()
                right(layer(*inputs, experts), problem, inputs)
                held["down"].data = problem.weights["down"][:, :, :8].copy()
                with pytest.raises(fmg.SpecError, match=r"down has shape \(5, 32, 8\). Must be \(5, 32, 16\)"):
                    layer(*inputs, experts)


def test_a_numpy_array_that_is_resized_is_looked_at_again() -> None:
    problem, inputs = case()
    weights = {name: w.copy() for name, w in problem.weights.items()}
    with fmg.MoELayer(SPEC, target="host") as layer:
        experts = fmg.Experts(**weights)
        right(layer(*inputs, experts), problem, inputs)
        weights["up"].resize((50, 16, 32), refcheck=False)
        with pytest.raises(fmg.SpecError, match=r"up has shape \(50, 16, 32\)"):
            layer(*inputs, experts)


def test_close_lets_go_of_the_weights() -> None:
    problem, inputs = case()
    weights = {name: w.copy() for name, w in problem.weights.items()}
    gone = [weakref.ref(w) for w in weights.values()]
    layer = fmg.MoELayer(SPEC, target="host")
    layer(*inputs, fmg.Experts(**weights))
    layer.route(inputs[0], problem.tokens(5, 3))
    layer.close()
    del weights
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert layer.workspace_bytes == 0
    for use in (
        lambda: layer(*inputs, problem.experts(range(5))), layer.stats, layer.check, layer.take_trace,
        lambda: layer.route(inputs[0], problem.tokens(5, 3)), lambda: layer.set_placement(fmg.Placement.default(5, 1)),
        lambda: copy.deepcopy(layer),
    ):  # fmt: skip
        with pytest.raises(fmg.CommError, match="The layer is closed"):
            use()
    layer.close()


OUTPUTS = {
    "read-only NumPy": (lambda y: _read_only(y), "out is read-only."),
    "DLPack 1.0 says read-only": (lambda y: Parameter(_read_only(y)), "out is read-only."),
    "DLPack before 1.0": (lambda y: Lender(y, versioned=False), "out does not say that it may be written"),
    "broadcast": (lambda y: np.broadcast_to(y[:1], y.shape), "out has strides"),
    "big-endian": (lambda y: y.astype(">f4"), "out has dtype float32 in the other byte order. Must be float32."),
}


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view


@pytest.mark.parametrize("name", OUTPUTS)
def test_nothing_is_written_where_its_owner_does_not_allow_it(name: str) -> None:
    make, message = OUTPUTS[name]
    problem, inputs = case()
    memory = np.zeros_like(inputs[0])
    with fmg.MoELayer(SPEC, target="host") as layer:
        with pytest.raises(fmg.SpecError) as caught:
            layer(*inputs, problem.experts(range(5)), out=make(memory))
        assert str(caught.value).startswith(message)
        assert not memory.any()
        right(layer(*inputs, problem.experts(range(5)), out=memory), problem, inputs)


def test_read_only_inputs_are_fine() -> None:
    problem, inputs = case()
    with fmg.MoELayer(SPEC, target="host") as layer:
        weights = fmg.Experts(**{name: Parameter(_read_only(w)) for name, w in problem.weights.items()})
        right(layer(*map(_read_only, inputs), weights), problem, inputs)


def test_out_through_dlpack_is_written() -> None:
    problem, inputs = case()
    out = np.zeros_like(inputs[0])
    with fmg.MoELayer(SPEC, target="host") as layer:
        wrapped = Parameter(out)
        assert layer(*inputs, problem.experts(range(5)), out=wrapped) is wrapped
    right(out, problem, inputs)


OTHER = ">" if np.little_endian else "<"


NAMES = "x topk_ids topk_weights gate down up_bias num_tokens router_weight logit_bias".split()


@pytest.mark.parametrize("name", NAMES)
def test_the_other_byte_order_is_never_taken_for_this_one(name: str) -> None:
    problem, (x, ids, weights) = case()
    call = {"x": x, "topk_ids": ids, "topk_weights": weights, "num_tokens": np.array([24], np.int32)}
    route = {"x": x, "router_weight": x[:5].copy(), "logit_bias": np.zeros(5, np.float32)}
    experts = dict(problem.weights)
    for arguments in (call, route, experts):
        if name in arguments:
            arguments[name] = arguments[name].astype(arguments[name].dtype.newbyteorder(OTHER))
    message = f"{name} has dtype .* in the other byte order"
    with fmg.MoELayer(SPEC, target="host") as layer, pytest.raises(fmg.SpecError, match=message):
        layer(**call, experts=fmg.Experts(**experts))
        layer.route(**route)


class BadCapsule:
    def __init__(self, capsule: Any) -> None:
        self.capsule = capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return (1, 0)

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule


def test_what_is_no_dlpack_capsule_is_refused() -> None:
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    name = b"something else"
    for capsule in (None, 7, new(1, name, None)):
        with pytest.raises(fmg.SpecError, match="returned no DLPack capsule"):
            arrays.view(BadCapsule(capsule), "x")


def test_a_masked_array_is_refused() -> None:
    problem, (x, ids, weights) = case()
    masked = np.ma.masked_array(x, mask=x > 0)
    with fmg.MoELayer(SPEC, target="host") as layer, pytest.raises(fmg.SpecError, match="x is a masked array"):
        layer(masked, ids, weights, problem.experts(range(5)))


def test_experts_and_layers_describe_and_copy_themselves() -> None:
    problem, inputs = case()
    experts = problem.experts(range(5))
    assert repr(experts).startswith("Experts(gate=ndarray[float32 5x16x32], up=ndarray[float32 5x16x32], down=")
    copied = copy.deepcopy(experts)
    assert copied._arrays["up"] is not experts._arrays["up"]
    with fmg.MoELayer(SPEC, target="host") as layer:
        right(layer(*inputs, experts), problem, inputs)
        assert "hidden_size=32" in repr(layer) and "target='host'" in repr(layer) and "rank=0" in repr(layer)
        right(layer(*inputs, copied), problem, inputs)
        right(layer(*inputs, pickle.loads(pickle.dumps(experts))), problem, inputs)
        for twin in (copy.deepcopy({"layer": layer})["layer"], copy.copy(layer)):
            assert twin is not layer and twin.comm is layer.comm and twin.stats().calls == 0
            right(twin(*inputs, copy.deepcopy(experts)), problem, inputs)
        with pytest.raises(fmg.UnsupportedError, match="A MoELayer cannot be pickled"):
            pickle.dumps(layer)
    assert "closed" in repr(layer)
