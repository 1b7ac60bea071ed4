"""What the launch makes of a kernel's needs, without a GPU: the driver's functions are replaced by ones that look."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import flashmoe_gen as fmg
from flashmoe_gen.args import MOE_ARGS
from flashmoe_gen.launch import choose
from flashmoe_gen.launch.tensor_maps import TensorMaps
from flashmoe_gen.programs import TensorBox

driver: Any = pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
DOWN = TensorBox("down", "local_experts", rows=48, columns=80, box_rows=16, box_columns=64, size=2)
RING = TensorBox("ring", "ring_slots", rows=128, columns=80, box_rows=64, box_columns=64, size=2)


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What cuTensorMapEncodeTiled has been given."""
    calls: list[tuple[Any, ...]] = []

    def encode(*given: Any) -> Any:
        calls.append(given)
        return driver.CUresult.CUDA_SUCCESS, driver.CUtensorMap()

    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", encode)
    return calls


def test_tensor_maps_take_strides_in_bytes(encoded: list[tuple[Any, ...]]) -> None:
    args = MOE_ARGS.zeros()
    for name, value in {"down": 4096, "local_experts": 3, "down_row_stride": 192, "down_expert_stride": 9216}.items():
        args[name] = value
    args["ring"], args["ring_slots"] = 8192, 5
    maps = TensorMaps()
    assert maps.encoded(DOWN, args[0]).nbytes == maps.encoded(RING, args[0]).nbytes == 128
    (_, _, pointer, sizes, strides, *_), ring = encoded
    assert (pointer, [*map(int, sizes)], [*map(int, strides)]) == (4096, [80, 48, 3], [192, 9216])
    assert (ring[2], [*map(int, ring[3])], [*map(int, ring[4])]) == (8192, [80, 128, 5], [160, 128 * 160])


def test_a_tensor_map_is_encoded_once_per_address(encoded: list[tuple[Any, ...]]) -> None:
    args = MOE_ARGS.zeros()
    args["down"], args["local_experts"] = 4096, 3
    maps = TensorMaps()
    first = maps.encoded(DOWN, args[0])
    assert maps.encoded(DOWN, args[0]) is first and len(encoded) == 1
    args["down"] = 8192
    assert maps.encoded(DOWN, args[0]) is not first and len(encoded) == 2
    maps.clear()
    maps.encoded(DOWN, args[0])
    assert len(encoded) == 3


def test_the_target_is_what_was_named_else_the_environments_else_the_communicators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["flashmoe_gen.launch.choose"]
    monkeypatch.setattr(module, "CudaTarget", lambda max_blocks, ranks_here: ("cuda", max_blocks, ranks_here))
    monkeypatch.setattr(module, "device_count", lambda: 1)
    monkeypatch.delenv("FLASHMOE_TARGET", raising=False)
    assert choose(None) == choose("cuda") == ("cuda", None, 1)
    assert choose("cuda", "host", 8, 2) == ("cuda", 8, 2)
    assert choose(None, "host").name == "host"
    monkeypatch.setenv("FLASHMOE_TARGET", "host")
    assert choose(None, "cuda").name == "host"
    assert choose("cuda") == ("cuda", None, 1)
    monkeypatch.delenv("FLASHMOE_TARGET")
    monkeypatch.setattr(module, "device_count", lambda: 0)
    assert choose(None).name == "host"
    with pytest.raises(fmg.SpecError, match="max_blocks= is not valid for target='host'"):
        choose("host", max_blocks=4)
    with pytest.raises(fmg.SpecError, match=r"target='gpu' is not valid\. Must be 'host' or 'cuda'"):
        choose("gpu")
