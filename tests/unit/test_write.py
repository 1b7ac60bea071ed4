"""KernelSource.write and FLASHMOE_KEEP_SOURCE: files, folders that are made, links, and disks that are full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

import flashmoe_gen as fmg
from flashmoe_gen.errors import CacheError, FlashMoEError

Patch = pytest.MonkeyPatch

SPEC = fmg.MoESpec(64, 32, 8, 2, max_tokens=4)
SOURCE = fmg.generate(SPEC, arch="host")
OTHER = fmg.generate(SPEC, arch="sm_80")


@pytest.mark.parametrize("place", ["kernels", "a/b/kernels", "kernels/", "v1.2/", ".hidden"])
def test_a_path_without_suffix_is_a_folder(place: str, tmp_path: Path) -> None:
    for source in (SOURCE, OTHER, SOURCE):
        path = source.write(f"{tmp_path}/{place}")
        assert path.name == f"{source.name}{source.suffix}" and path.read_text() == source.text
    assert len(list((tmp_path / place).iterdir())) == 2


@pytest.mark.parametrize("place", ["k.cu", "a/b/k.cu", "k.anything"])
def test_a_path_with_suffix_is_a_file(place: str, tmp_path: Path) -> None:
    assert SOURCE.write(tmp_path / place) == tmp_path / place
    assert OTHER.write(tmp_path / place).read_text() == OTHER.text


def test_what_is_there_decides(tmp_path: Path) -> None:
    (tmp_path / "folder.d").mkdir()
    assert SOURCE.write(tmp_path / "folder.d").parent == tmp_path / "folder.d"
    (tmp_path / "file").write_text("x")
    assert SOURCE.write(tmp_path / "file").read_text() == SOURCE.text
    (tmp_path / "link.cpp").symlink_to(tmp_path / "file")
    assert OTHER.write(tmp_path / "link.cpp") == tmp_path / "link.cpp"
    assert (tmp_path / "link.cpp").is_symlink() and (tmp_path / "file").read_text() == OTHER.text
    assert SOURCE.write(os.devnull) == Path(os.devnull)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("step", ["write", "rename"])
def test_a_full_disk(step: str, number: int, tmp_path: Path, monkeypatch: Patch) -> None:
    path = SOURCE.write(tmp_path / "k.cpp")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        if step == "write":
            patch.setattr(Path, "write_bytes", fail)
        else:
            patch.setattr(os, "replace", fail)
        for place in (path, tmp_path / "new" / "deep"):
            with pytest.raises(FlashMoEError, match=os.strerror(number)) as caught:
                OTHER.write(place)
            assert str(place) in str(caught.value) and "Traceback" not in str(caught.value)
        patch.setenv("FLASHMOE_KEEP_SOURCE", str(tmp_path / "kept"))
        with pytest.raises(CacheError, match=r"FLASHMOE_KEEP_SOURCE=.*kept"):
            SOURCE.compile()
    assert path.read_text() == SOURCE.text
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    "place", ["/dev/null/k.cu", "/proc/absent/k.cu", "/dev/null/kernels", "x" * 300 + ".cu", "a\0b.cu"]
)
def test_places_that_cannot_be(place: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FlashMoEError, match="cannot be written"):
        SOURCE.write(place)
    assert not list(tmp_path.iterdir())


def test_keep_source_makes_its_folder_whatever_its_name(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("FLASHMOE_KEEP_SOURCE", str(tmp_path / "a" / "sources.d"))
    monkeypatch.setenv("FLASHMOE_NO_JIT", "1")
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(CacheError, match="FLASHMOE_NO_JIT=1"):
        SOURCE.compile()
    assert (tmp_path / "a" / "sources.d" / f"{SOURCE.name}.cpp").read_text() == SOURCE.text
