"""fmg.compat: the names of flashmoe-py 0.1.2, their order and defaults; and what is refused without a kernel."""

from __future__ import annotations

import inspect
from enum import IntEnum
from typing import Any

import pytest

import flashmoe_gen as fmg
import flashmoe_gen.compat as flashmoe
from flashmoe_gen.errors import CommError, SpecError, UnsupportedError

# Of flashmoe-py 0.1.2, written down from its package; a number is a default, KEYWORD: from here on by name alone.
KEYWORD = "*"
SIGNATURES: dict[Any, str] = {
    flashmoe.InitArgs: (
        "data_type tokens_per_rank token_dim ffn_size num_experts top_k gpu_arch mlp_type act_type stream_ptr device_id * "
        "ep_world=None num_local_experts=None ep_rank=None my_pe=None expert_map=None rank_map=None expert_peer_capacity=None"
    ),
    flashmoe.ForwardArgs: (
        "mt tokens expert_counts local_expert_up local_bias_up local_expert_down local_bias_down moe_out stream_ptr * "
        "swish_alpha=1.0 swish_beta=1.0 local_expert_up_v=None local_bias_up_v=None"
    ),
    flashmoe.router.RouterForwardArgs: "tokens weights expert_counts stream_ptr * routing=0",
    flashmoe.reference.RefForwardArgs: (
        "expert_up expert_down bias_up bias_down ref_input ref_interim0 ref_interim1 ref_out * expert_up_v bias_up_v"
    ),
    flashmoe.ContextHandle: "mod ctx",
    flashmoe.initialize: "arg",
    flashmoe.forward: "handle args",
    flashmoe.router.initialize: "arg return_logits=False",
    flashmoe.router.forward: "router_handle flash_handle arg",
    flashmoe.reference.initialize: "arg",
    flashmoe.reference.forward: "handle token_ids f_args r_args",
    flashmoe.get_local_rank: "",
    flashmoe.cb.get_local_rank: "",
    flashmoe.cb.initialize: "",
    flashmoe.cb.get_rank: "",
    flashmoe.cb.get_world_size: "",
    flashmoe.cb.sync_all: "stream_ptr",
}
MEMBERS: dict[type[IntEnum], str] = {
    flashmoe.Topology: "NVLINK_ONLY MIXED",
    flashmoe.MLPType: "GATED VANILLA",
    flashmoe.DataType: "BF16 FP16 FP32 FP64",
    flashmoe.ActivationType: "IDENTITY SILU GELU RELU",
}

SIZES = {
    "data_type": flashmoe.DataType.BF16, "tokens_per_rank": 16, "token_dim": 64, "ffn_size": 32, "num_experts": 8, "top_k": 2,
    "gpu_arch": 900, "mlp_type": flashmoe.MLPType.GATED, "act_type": flashmoe.ActivationType.SILU, "stream_ptr": 0,
    "device_id": 0,
}  # fmt: skip
ALONE = {"ep_rank": 0, "my_pe": 0, "ep_world": 1, "num_local_experts": 8, "expert_map": [0] * 8, "rank_map": [0]}
CALL = dict.fromkeys("tokens expert_counts local_expert_up local_bias_up local_expert_down local_bias_down moe_out".split(), 64)


@pytest.fixture(autouse=True)
def on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMOE_TARGET", "host")


@pytest.mark.parametrize(("function", "wanted"), SIGNATURES.items(), ids=lambda value: getattr(value, "__qualname__", ""))
def test_signatures(function: Any, wanted: str) -> None:
    found: list[str] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and KEYWORD not in found:
            found.append(KEYWORD)
        found.append(name if parameter.default is inspect.Parameter.empty else f"{name}={parameter.default!r}")
    assert found == wanted.split()


@pytest.mark.parametrize("module", [flashmoe, flashmoe.router])
def test_finalize_takes_the_stream(module: Any) -> None:
    """Which the README of flashmoe-py leaves out, and its functions ask for."""
    assert list(inspect.signature(module.finalize).parameters) == ["handle", "stream_ptr"]


@pytest.mark.parametrize(("kind", "names"), MEMBERS.items())
def test_enumerations(kind: type[IntEnum], names: str) -> None:
    assert [(member.name, member.value) for member in kind] == [(name, i) for i, name in enumerate(names.split())]


def test_it_is_there_as_an_attribute() -> None:
    assert fmg.compat is flashmoe
    assert set(flashmoe.__all__) <= set(dir(flashmoe))


def test_the_attributes_of_the_arguments() -> None:
    made = flashmoe.InitArgs(**SIZES)
    assert made.topo is flashmoe.Topology.MIXED and made.expert_peer_capacity is None
    made.num_local_experts = 8  # they may be set later
    call = flashmoe.ForwardArgs(flashmoe.MLPType.GATED, **CALL, stream_ptr=5, local_expert_up_v=1, local_bias_up_v=2)
    assert (call.stream_ptr, call.local_expert_up_v, call.swish_alpha) == (5, 1, 1.0)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"token_dim": 100}, "token_dim=100 is not valid for bfloat16"),
        ({"ffn_size": 0}, "ffn_size=0 is not valid"),
        ({"tokens_per_rank": 0}, "tokens_per_rank=0 is not valid"),
        ({"num_experts": 2000}, "num_experts=2000 is not valid"),
        ({"top_k": 9}, "top_k=9 is not valid"),
        ({"expert_peer_capacity": 0}, "expert_peer_capacity=0 is not valid"),
        ({"gpu_arch": 90}, "gpu_arch=90 is not valid. Must be between 700"),
        ({"data_type": 7}, "data_type=7 is not valid. Must be one of DataType.BF16"),
        ({"mlp_type": "gated"}, "mlp_type='gated' is not valid. Must be one of MLPType.GATED, MLPType.VANILLA"),
        ({"act_type": None}, "act_type=None is not valid"),
        ({"ep_rank": 0}, "ep_world=None is not valid with ep_rank=0. Also set ep_world, num_local_experts"),
        (ALONE | {"ep_world": 2}, "ep_world=2 is not valid. Must be between 1 and 1"),
        (ALONE | {"my_pe": 1}, "my_pe=1 is not valid. This process is rank 0"),
        (ALONE | {"rank_map": [0, 0]}, "must name ep_world=1 different"),
        (ALONE | {"expert_map": [0]}, "expert_map has 1 entries. Must have one for each of num_experts=8"),
        (ALONE | {"expert_map": [1] * 8}, "expert_map[0]=1 is not valid"),
        (ALONE | {"num_local_experts": 4}, "num_local_experts=4 is not valid. expert_map gives this rank 8"),
    ],
)
def test_a_wrong_field_is_named(changes: dict[str, Any], wanted: str) -> None:
    with pytest.raises(SpecError) as caught:
        flashmoe.initialize(flashmoe.InitArgs(**(SIZES | changes)))
    assert wanted.lower() in str(caught.value).lower()
    with pytest.raises(CommError, match="ranks are not known yet"):  # nothing is left behind
        flashmoe.cb.get_rank()


def test_what_is_not_supported_is_named() -> None:
    made = flashmoe.InitArgs(**SIZES)
    with pytest.raises(UnsupportedError, match="return_logits=True is not supported"):
        flashmoe.router.initialize(made, return_logits=True)
    with pytest.raises(UnsupportedError, match="routing=64 is not supported"):
        flashmoe.router.RouterForwardArgs(64, 64, 64, 0, routing=64)


@pytest.mark.parametrize("name", ["local_expert_up_v", "local_bias_up_v"])
def test_a_gated_mlp_needs_both_factors(name: str) -> None:
    fields: dict[str, Any] = {"local_expert_up_v": 64, "local_bias_up_v": 64, name: None}
    with pytest.raises(SpecError, match=f"{name}=None is not valid for mt=MLPType.GATED"):
        flashmoe.ForwardArgs(flashmoe.MLPType.GATED, **CALL, stream_ptr=0, **fields)


@pytest.mark.parametrize("fields", [{"swish_alpha": 2.0}, {"swish_beta": 0.5}, {"local_expert_up_v": 64}, {"local_bias_up_v": 64}])
def test_a_vanilla_mlp_has_no_second_factor_and_no_swish(fields: dict[str, Any]) -> None:
    flashmoe.ForwardArgs(flashmoe.MLPType.VANILLA, **CALL, stream_ptr=0)
    flashmoe.ForwardArgs(flashmoe.MLPType.VANILLA, **CALL, stream_ptr=0, local_expert_up_v=0, local_bias_up_v=0)
    ((name, value),) = fields.items()
    with pytest.raises(UnsupportedError, match=f"{name}={value!r} is not supported for mt=MLPType.VANILLA"):
        flashmoe.ForwardArgs(flashmoe.MLPType.VANILLA, **CALL, stream_ptr=0, **fields)


@pytest.mark.parametrize("handle", [None, 5, flashmoe.ContextHandle(None, None)])
def test_a_handle_of_something_else(handle: Any) -> None:
    call = flashmoe.ForwardArgs(flashmoe.MLPType.VANILLA, **CALL, stream_ptr=0)
    with pytest.raises(SpecError, match=r"is not what initialize\(\) returned"):
        flashmoe.forward(handle, call)
    with pytest.raises(SpecError, match=r"is not what initialize\(\) returned"):
        flashmoe.finalize(handle, 0)
    with pytest.raises(SpecError, match=r"is not what router.initialize\(\) returned"):
        flashmoe.router.finalize(handle, 0)


LAUNCHERS = {
    "none": ({}, 0),
    "a world left in a shell": ({"WORLD_SIZE": "4"}, 0),
    "mpirun of MPICH": ({"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"}, 3),
    "mpirun of Open MPI": ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}, 2),
    "srun": ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7"}, 1),
    "torchrun": (
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}, 1
    ),
}  # fmt: skip


@pytest.mark.parametrize(("variables", "rank"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_the_local_rank_is_what_the_launcher_says(variables: dict[str, str], rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {name for known, _ in LAUNCHERS.values() for name in known}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert flashmoe.get_local_rank() == rank
