"""The quick look at an array lets through what the full check lets through, and says what it says of everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import flashmoe_gen as fmg
from flashmoe_gen import arrays
from flashmoe_gen.quick import Matrix

COLUMNS = 8
GOOD = {
    "plain": lambda torch: torch.zeros(4, COLUMNS),
    "one row of many": lambda torch: torch.zeros(4, COLUMNS)[1:2],
    "a row's stride that does not count": lambda torch: torch.zeros(4, 2 * COLUMNS)[:1, :COLUMNS],
}
DOUBTFUL: dict[str, Callable[[Any], Any]] = {
    "no rows": lambda torch: torch.zeros(0, COLUMNS),
    "wrong dtype": lambda torch: torch.zeros(4, COLUMNS, dtype=torch.float64),
    "wrong columns": lambda torch: torch.zeros(4, COLUMNS + 1),
    "one dimension": lambda torch: torch.zeros(COLUMNS),
    "three dimensions": lambda torch: torch.zeros(4, COLUMNS, 1),
    "strided": lambda torch: torch.zeros(4, 2 * COLUMNS)[:, :COLUMNS],
    "transposed": lambda torch: torch.zeros(COLUMNS, 4).T,
    "not aligned": lambda torch: torch.zeros(4 * COLUMNS + 1)[1:].view(4, COLUMNS),
    "requires grad": lambda torch: torch.zeros(4, COLUMNS, requires_grad=True),
    "negation pending": lambda torch: torch._neg_view(torch.zeros(4, COLUMNS)),
    "meta": lambda torch: torch.zeros(4, COLUMNS, device="meta"),
    "sparse": lambda torch: torch.zeros(4, COLUMNS).to_sparse(),
    "nested": lambda torch: torch.nested.nested_tensor([torch.zeros(COLUMNS)] * 4),
    "a zero tensor": lambda torch: torch._efficientzerotensor((4, COLUMNS)),
    "a parameter": lambda torch: torch.nn.Parameter(torch.zeros(4, COLUMNS), requires_grad=False),
    "NumPy": lambda torch: np.zeros((4, COLUMNS), np.float32),
    "read-only NumPy": lambda torch: np.frombuffer(bytes(16 * COLUMNS), np.float32).reshape(4, COLUMNS),
    "no array": lambda torch: "x",
}


def outcome(look: Callable[[], arrays.View]) -> object:
    """Address, shape and type of a view, or the error instead."""
    try:
        found = look()
    except (fmg.SpecError, fmg.UnsupportedError) as error:
        return type(error), str(error)
    return found.pointer, tuple(found.shape), found.dtype, found.device, found.read_only


def matrix() -> Matrix:
    return Matrix(COLUMNS, "float32", "cpu", alignment=16)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("name", [*GOOD, *DOUBTFUL])
@pytest.mark.parametrize("rows", [None, 4, 3])
def test_what_is_found_is_what_the_full_check_finds(torch: Any, name: str, rows: int | None) -> None:
    array = {**GOOD, **DOUBTFUL}[name](torch)
    options: dict[str, Any] = {"dtype": "float32", "device": "cpu", "alignment": 16}
    want = outcome(lambda: arrays.checked(array, "x", (rows, COLUMNS), **options))
    assert outcome(lambda: matrix().checked(array, "x", rows, arrays.unordered)) == want
    if rows is not None:
        want = outcome(lambda: arrays.writable(array, "out", (rows, COLUMNS), **options))
        assert outcome(lambda: matrix().writable(array, "out", rows, arrays.unordered)) == want


def no_full_check(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("checked", "writable"):
        monkeypatch.setattr(arrays, name, lambda *_, **__: pytest.fail("not quick"))


@pytest.mark.parametrize("name", GOOD)
def test_torch_tensors_are_looked_at_quickly(monkeypatch: pytest.MonkeyPatch, torch: Any, name: str) -> None:
    tensor = GOOD[name](torch)
    no_full_check(monkeypatch)
    found = matrix().checked(tensor, "x", None, arrays.unordered)
    assert (found.pointer, found.capsule) == (tensor.data_ptr(), None)
    storage = tensor.untyped_storage().data_ptr()
    tensor.data = torch.ones(4, COLUMNS)
    assert found.owner[1].data_ptr() == storage  # type: ignore[index]  # what was looked at is held


def test_a_mapped_tensor_is_refused(torch: Any) -> None:
    def look(tensor: Any) -> Any:
        with pytest.raises(fmg.SpecError, match=r"^x is a .* whose memory cannot be read"):
            matrix().checked(tensor, "x", None, arrays.unordered)
        return tensor

    torch.func.vmap(look)(torch.zeros(2, 4, COLUMNS))


def device_array(shape: tuple[int, ...], dtype: Any, *, pointer: int = 1 << 20, device: int = 1) -> Any:
    """A CuPy array of memory that is not there."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    memory = cupy.cuda.UnownedMemory(pointer, 1 << 16, None, device)
    return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def test_cupy_arrays_are_looked_at_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    array, look = device_array((4, COLUMNS), BFLOAT16), Matrix(COLUMNS, "bfloat16", "cuda:1", alignment=16)
    want = outcome(lambda: arrays.checked(array, "x", (4, COLUMNS), "bfloat16", device="cuda:1", alignment=16))
    no_full_check(monkeypatch)
    assert outcome(lambda: look.checked(array, "x", 4, arrays.unordered)) == want
    assert outcome(lambda: look.writable(array, "out", 4, arrays.unordered)) == want


@pytest.mark.parametrize(
    "make",
    [
        lambda: device_array((4, COLUMNS), BFLOAT16, device=0),
        lambda: device_array((4, COLUMNS), BFLOAT16, pointer=(1 << 20) + 8),
        lambda: device_array((4, COLUMNS), np.float16),
        lambda: device_array((5, COLUMNS), BFLOAT16),
        lambda: device_array((4, COLUMNS, 1), BFLOAT16),
        lambda: device_array((4, 2 * COLUMNS), BFLOAT16)[:, ::2],
        lambda: device_array((COLUMNS, 4), BFLOAT16).T,
    ],
)
def test_other_cupy_arrays_are_refused_as_before(make: Callable[[], Any]) -> None:
    array, look = make(), Matrix(COLUMNS, "bfloat16", "cuda:1", alignment=16)
    want = outcome(lambda: arrays.checked(array, "x", (4, COLUMNS), "bfloat16", device="cuda:1", alignment=16))
    assert want[0] is fmg.SpecError  # type: ignore[index]
    assert outcome(lambda: look.checked(array, "x", 4, arrays.unordered)) == want


def test_dlpack_is_told_the_stream_only_where_somebody_exports(torch: Any) -> None:
    asked: list[str] = []

    def ordering() -> int:
        asked.append("stream")
        return -1

    matrix().checked(torch.zeros(4, COLUMNS), "x", None, ordering)
    assert not asked
    matrix().checked(np.zeros((4, COLUMNS), np.float32), "x", None, ordering)
    assert asked
