"""Who could have written what is loaded: owners, modes, links and folders on the way, under each FLASHMOE_CACHE_TRUST."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from flashmoe_gen import cache as cache_module
from flashmoe_gen import compile as compile_module
from flashmoe_gen import env, trust
from flashmoe_gen.cache import Cache, CompiledKernel
from flashmoe_gen.compile import Image
from flashmoe_gen.errors import CacheError, SpecError

Patch = pytest.MonkeyPatch

ME = os.geteuid()
STRANGER, TEAM = 54321, 54322  # no user and no group of this machine

needs_root = pytest.mark.skipif(ME != 0, reason="only root can give files to others")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: Patch) -> Path:
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("FLASHMOE_CACHE_TRUST", "FLASHMOE_NO_JIT"):
        monkeypatch.delenv(name, raising=False)
    for cached in (trust._is_member, trust._has_no_other_member, trust._unmapped_uid):
        cached.cache_clear()
    image = Image(b"image", "log", f"fake {compile_module._platform()}", 0, 0, 0, 0.1)
    monkeypatch.setattr(cache_module, "compile_text", lambda *args, **kwargs: image)
    monkeypatch.setattr(cache_module, "compiler_identity", lambda arch: image.compiler)
    return tmp_path / "cache"


def build() -> CompiledKernel:
    return Cache().build("text", name="answer", arch="host", digest="d", metadata={})


def others_may(path: Path, bits: int = stat.S_IWOTH) -> None:
    path.chmod(stat.S_IMODE(path.stat().st_mode) | bits)


def give(path: Path, uid: int = STRANGER, gid: int = -1) -> None:
    os.chown(path, uid, gid, follow_symlinks=False)


PLACES: dict[str, Callable[[Path], Path]] = {
    "image": lambda entry: entry / "kernel.so",
    "metadata": lambda entry: entry / "metadata.json",
    "another file": lambda entry: entry / "source.cpp",
    "entry": lambda entry: entry,
    "arch folder": lambda entry: entry.parent,
    "root": lambda entry: entry.parent.parent,
    "folder above": lambda entry: entry.parent.parent.parent,
}


@pytest.mark.parametrize("no_jit", ["0", "1"])
@pytest.mark.parametrize("place", PLACES)
def test_writable_by_everybody(place: str, no_jit: str, root: Path, monkeypatch: Patch) -> None:
    entry = build().path.parent
    monkeypatch.setenv("FLASHMOE_NO_JIT", no_jit)
    assert build().from_cache
    bad = PLACES[place](entry)
    others_may(bad)
    for mode in ("owner", "group"):
        monkeypatch.setenv("FLASHMOE_CACHE_TRUST", mode)
        with pytest.raises(CacheError) as caught:
            build()
        for word in (str(bad), str(ME), stat.filemode(bad.stat().st_mode), "FLASHMOE_CACHE_TRUST=all"):
            assert word in str(caught.value)
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "all")
    assert build().from_cache
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "owner")
    bad.chmod(stat.S_IMODE(bad.stat().st_mode) & ~stat.S_IWOTH)
    assert build().from_cache


@needs_root
@pytest.mark.parametrize("place", PLACES)
def test_of_another_user(place: str, root: Path, monkeypatch: Patch) -> None:
    entry = build().path.parent
    bad = PLACES[place](entry)
    mode = stat.S_IMODE(bad.stat().st_mode)
    give(bad)
    bad.chmod(mode & ~0o222)  # the owner can change the mode: that he cannot write now says nothing
    with pytest.raises(CacheError) as caught:
        build()
    assert f"{bad} (owner {STRANGER}, " in str(caught.value) and "FLASHMOE_CACHE_TRUST=" in str(caught.value)
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "all")
    assert build().from_cache


@needs_root
def test_of_another_user_who_is_this_one(root: Path, monkeypatch: Patch) -> None:
    """Root's and the user's own are right for a user who is not root."""
    entry = build().path.parent
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    assert build().from_cache  # all of it is root's
    for place in ("image", "entry", "arch folder", "root", "folder above"):
        give(PLACES[place](entry))
    assert build().from_cache


@needs_root
def test_sticky_folders_above(root: Path) -> None:
    """/tmp: everybody may write there, nobody can replace what is there. Its owner can."""
    build()
    above = root.parent
    above.chmod(0o1777)
    assert build().from_cache
    root.chmod(0o1777)  # in the cache itself others could put things
    with pytest.raises(CacheError, match="cache "):
        build()
    root.chmod(0o755)
    give(above)
    with pytest.raises(CacheError, match=f"owner {STRANGER}"):
        build()


def test_a_folder_that_is_not_there_yet(root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    tmp_path.chmod(0o1777)
    assert not build().from_cache  # made where others cannot replace it
    loose = tmp_path / "loose"
    loose.mkdir()
    loose.chmod(0o777)
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(loose / "a" / "b"))
    with pytest.raises(CacheError, match="loose "):
        build()
    assert not (loose / "a" / "b" / "host").exists() or not list((loose / "a" / "b" / "host").iterdir())


@needs_root
@pytest.mark.parametrize("what", ["root", "arch folder", "entry", "folder above"])
def test_links(what: str, root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """A link is followed: both ways must be right."""
    entry = build().path.parent
    place = PLACES[what](entry)
    if what == "folder above":
        place = tmp_path / "way"
        place.mkdir()
        (place / "deeper").mkdir()
        monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(place / "deeper" / ".." / "cache"))
        entry = build().path.parent.parent.parent
    elsewhere = tmp_path / "elsewhere"
    place.rename(elsewhere)
    place.symlink_to(elsewhere)
    assert build().from_cache
    others_may(elsewhere)
    with pytest.raises(CacheError, match="elsewhere "):
        build()
    elsewhere.chmod(0o755)
    assert build().from_cache
    give(place)
    with pytest.raises(CacheError, match=f"owner {STRANGER}.*mode l"):
        build()


def test_links_in_a_circle(root: Path) -> None:
    root.symlink_to(root)
    with pytest.raises(CacheError, match="FLASHMOE_CACHE_DIR"):
        build()


GROUP_PLACES = ["entry", "arch folder", "root", "folder above", "image"]


@needs_root
@pytest.mark.parametrize("place", GROUP_PLACES)
def test_group(place: str, root: Path, monkeypatch: Patch) -> None:
    entry = build().path.parent
    for folder in PLACES.values():
        give(folder(entry), -1, TEAM)
    bad = PLACES[place](entry)
    others_may(bad, stat.S_IWGRP)
    with pytest.raises(CacheError, match="FLASHMOE_CACHE_TRUST=all"):  # this user is not in the group
        build()
    monkeypatch.setattr(os, "getgroups", lambda: [TEAM])
    with pytest.raises(CacheError, match=f"group {TEAM}, .*FLASHMOE_CACHE_TRUST=group"):
        build()
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "group")
    assert build().from_cache
    give(bad, STRANGER)  # only members of the group, and root, can make a file of that group
    assert build().from_cache
    give(bad, STRANGER, STRANGER)
    with pytest.raises(CacheError, match="FLASHMOE_CACHE_TRUST=all"):
        build()


@needs_root
def test_group_of_others(root: Path, monkeypatch: Patch) -> None:
    """A file that a member left with his own group, which nobody but he may write to."""
    entry = build().path.parent
    give(root, -1, TEAM)
    monkeypatch.setattr(os, "getgroups", lambda: [TEAM])
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "group")
    give(entry, STRANGER, STRANGER)
    with pytest.raises(CacheError, match=f"owner {STRANGER}"):
        build()
    people = {STRANGER: SimpleNamespace(pw_name="bob", pw_gid=STRANGER)}
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: people[uid])
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, *([TEAM] if name == "bob" else [])])
    trust._is_member.cache_clear()
    assert build().from_cache


@pytest.mark.parametrize(
    "name,members,primary,private",
    [
        ("alice", [], ["alice"], True),
        ("alice", ["alice", "root"], ["alice"], True),
        ("alice", ["bob"], ["alice"], False),
        ("alice", [], ["alice", "bob"], False),
        ("users", [], ["alice"], False),  # a directory need not list the others
    ],
)
def test_private_groups(
    name: str, members: list[str], primary: list[str], private: bool, root: Path, monkeypatch: Patch
) -> None:
    people = [SimpleNamespace(pw_name="root", pw_uid=0, pw_gid=0)]
    people += [SimpleNamespace(pw_name=person, pw_uid=ME if person == "alice" else 99, pw_gid=7) for person in primary]
    monkeypatch.setattr(pwd, "getpwall", lambda: people)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: next(p for p in reversed(people) if p.pw_uid == uid))
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name=name, gr_mem=members))
    trust._has_no_other_member.cache_clear()
    assert trust._has_no_other_member(7, ME) == private
    trust._has_no_other_member.cache_clear()


def test_group_of_root(root: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name="root", gr_mem=[]))
    assert trust._has_no_other_member(0, 4711)
    trust._has_no_other_member.cache_clear()
    monkeypatch.setattr(grp, "getgrgid", lambda gid: SimpleNamespace(gr_name="root", gr_mem=["eve"]))
    assert not trust._has_no_other_member(0, 4711)
    trust._has_no_other_member.cache_clear()


def test_an_access_list_may_name_others(root: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(trust, "_has_no_other_member", lambda gid, uid: True)
    monkeypatch.setattr(os, "getxattr", lambda path, name: b"")
    assert not trust._is_private(tmp_path, 7, ME)
    monkeypatch.undo()


def test_unmapped_owners_above_are_root_in_a_user_namespace(root: Path, monkeypatch: Patch) -> None:
    build()
    states = trust._nodes(root / "host", root)
    above = next(state for _, state, is_above in states if is_above)
    nobody = os.stat_result((above.st_mode & ~0o022, 0, 0, 1, 65534, 65534, 0, 0, 0, 0))
    for uid, is_above, right in ((65534, True, True), (65534, False, False), (None, True, False)):
        monkeypatch.setattr(trust, "_unmapped_uid", lambda uid=uid: uid)
        assert trust._is_trusted(Path("/"), nobody, None, is_above) == right


@pytest.mark.parametrize("mode", ["owner", "group"])
@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077, 0o777])
def test_what_is_made_under_any_umask_is_right(mask: int, mode: str, root: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", mode)
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(root / "a" / "b"))
    os.umask(mask)
    assert not build().from_cache and build().from_cache
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "owner")
    assert build().from_cache
    for path in [root, *root.rglob("*")]:
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) or path.suffix == ".lock", path


@needs_root
@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_group_can_use_and_clear_what_one_made(mask: int, root: Path, monkeypatch: Patch) -> None:
    root.mkdir()
    give(root, -1, TEAM)
    root.chmod(0o2770)
    os.umask(mask)
    monkeypatch.setattr(os, "getgroups", lambda: [TEAM])
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "group")
    build()
    assert build().from_cache
    for path in root.rglob("*"):
        state = path.stat()
        wanted = 0o2070 if path.is_dir() else 0o060 if path.suffix == ".lock" else 0o040
        assert state.st_gid == TEAM and state.st_mode & wanted == wanted and not state.st_mode & 0o002, path


def test_a_refused_source_does_not_open_the_folder(root: Path, monkeypatch: Patch) -> None:
    os.umask(0)
    path = compile_module._keep_source("text", "k.cpp", None)
    assert path and path.is_relative_to(root)
    assert not build().from_cache and build().from_cache


def test_values(root: Path, monkeypatch: Patch) -> None:
    for text, value in (("", "owner"), (" Group ", "group"), ("ALL", "all")):
        monkeypatch.setenv("FLASHMOE_CACHE_TRUST", text)
        assert env.cache_trust() == value
    monkeypatch.setenv("FLASHMOE_CACHE_TRUST", "world")
    with pytest.raises(
        SpecError, match=r"FLASHMOE_CACHE_TRUST='world' is not valid. Must be 'owner', 'group' or 'all'"
    ):
        build()
    assert not root.exists()


def test_check_of_any_path(root: Path, tmp_path: Path) -> None:
    """As other readers of shared folders use it."""
    file = tmp_path / "library.so"
    trust.check(file)  # absent
    file.write_text("x")
    trust.check(file)
    trust.check(tmp_path)
    others_may(file)
    for path in (file, tmp_path):
        with pytest.raises(CacheError, match=r"library\.so"):
            trust.check(path)
