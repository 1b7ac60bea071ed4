"""What ``compile`` builds for this GPU is all that a layer needs there."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flashmoe_gen as fmg
from flashmoe_gen.cli import main
from flashmoe_gen.launch.cuda import CudaTarget

pytestmark = pytest.mark.gpu

SETS = "--set hidden_size=256 --set intermediate_size=128 --set top_k=2"


def as_torch(array: Any) -> Any:
    return pytest.importorskip("torch", reason="torch is not installed").from_dlpack(array)


@pytest.mark.parametrize("wide", [False, True], ids=["int32 ids", "int64 ids of torch"])
def test_nothing_is_compiled_after_it(wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        main(shlex.split(f"compile {SETS} --arch {CudaTarget().arch}"))
    assert not caught.value.code
    monkeypatch.setenv("FLASHMOE_NO_JIT", "1")
    spec = fmg.MoESpec(256, 128, 8, 2, max_tokens=40)
    rng = np.random.default_rng(0)

    def random(*shape: int) -> Any:
        return cupy.asarray((rng.standard_normal(shape) / shape[-1] ** 0.5).astype(spec.element.numpy))

    weights = {"gate": random(8, 128, 256), "up": random(8, 128, 256), "down": random(8, 256, 128)}
    x = random(40, 256)
    with fmg.MoELayer(spec, target="cuda") as layer:
        ids, route_weights = layer.route(x, random(8, 256))
        y = layer(x, as_torch(ids).long() if wide else ids, route_weights, fmg.Experts(**weights))
        layer.check()
    arrays = {name: cupy.asnumpy(array) for name, array in weights.items()}
    want = fmg.reference.moe(spec, *map(cupy.asnumpy, (x, ids, route_weights)), **arrays)
    assert np.linalg.norm(cupy.asnumpy(y).astype(np.float64) - want) <= 5e-3 * np.linalg.norm(want)
