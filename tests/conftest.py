"""What all tests share: a kernel cache of their own, and the reasons to skip what needs a GPU."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_folder: str | None = None


def pytest_configure() -> None:
    """Give the whole run one temporary cache: nothing is compiled twice, and the user's cache is neither used nor filled."""
    global _folder
    for name in [name for name in os.environ if name.startswith("FLASHMOE_")]:
        del os.environ[name]
    _folder = tempfile.mkdtemp(prefix="flashmoe_gen-tests-")
    os.environ["FLASHMOE_CACHE_DIR"] = _folder


def pytest_unconfigure() -> None:
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needs = {"gpu": 1, "multigpu": 2}
    marked = [(item, count) for item in items for name, count in needs.items() if item.get_closest_marker(name)]
    if not marked:
        return
    from flashmoe_gen.launch.cuda import device_count

    found = device_count()
    for item, count in marked:
        if found < count:
            item.add_marker(pytest.mark.skip(reason=f"needs {count} CUDA device(s), found {found}"))
