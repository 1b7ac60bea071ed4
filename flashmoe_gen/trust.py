"""Who could have written a file: a kernel that somebody else puts into a shared folder would run with this user's rights.

``FLASHMOE_CACHE_TRUST`` says who may: ``owner`` is this user and root, ``group`` also the members of the cache folder's
group, if this user is one of them, ``all`` is everybody.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from . import env
from .errors import CacheError

_MAX_LINKS = 40
_FIRST_USER = 1000  # system accounts below it are root's


def check(path: Path, *, root: Path | None = None) -> None:
    """Return if only trusted users could have written a file, or a folder and its files, and the folders on the way.

    A folder above ``root`` may be writable by everybody if it is sticky, as ``/tmp`` is: what lies in it cannot be
    replaced by others. What does not exist is not checked.

    Args:
        path: the file or folder; of a folder its files are checked too, not what lies deeper.
        root: the shared folder that ``path`` lies in; its group is the one that ``group`` trusts. Default: the folder.

    Raises:
        CacheError: somebody else could have; names path, owner, mode and the setting that allows it.
    """
    trust = env.cache_trust()
    if trust == "all":
        return
    root = root or (path if os.path.isdir(path) else path.parent)
    group = _shared_group(root)
    trusted_group = group if trust == "group" else None
    for node, state, is_above in _nodes(path, root):
        if _is_trusted(node, state, trusted_group, is_above):
            continue
        wider = "group" if trust == "owner" and _is_trusted(node, state, group, is_above) else "all"
        raise CacheError(
            f"{node} (owner {_user(state.st_uid)}, group {_group(state.st_gid)}, mode {stat.filemode(state.st_mode)}) could "
            f"have been written by others than root and {'this user' if trust == 'owner' else 'the members of the group'}, "
            f"so nothing is loaded from {path}. Change its owner or its mode (chmod go-w), set FLASHMOE_CACHE_DIR to a "
            f"folder of your own, or trust them with FLASHMOE_CACHE_TRUST={wider}."
        )


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are missing, so that :func:`check` accepts them whatever the umask."""
    if os.path.isdir(path):
        return
    make_folder(path.parent)
    try:
        path.mkdir(mode=0o755)
    except FileExistsError:
        if not stat.S_ISDIR(path.stat().st_mode):  # FileNotFoundError: it was removed meanwhile
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    else:
        settle(path)


def new_file(path: Path) -> Path:
    """Make an empty file that nobody else could write to, not even between now and :func:`settle`; return its path."""
    path.touch(mode=0o644, exist_ok=False)
    settle(path)
    return path


def settle(path: Path) -> None:
    """Give what this process made the mode that :func:`check` accepts; with ``group``, what its folder gives the group."""
    trust = env.cache_trust()
    if trust == "all":
        return
    state, above = path.stat(), path.parent.stat()
    is_folder = stat.S_ISDIR(state.st_mode)
    mode = stat.S_IMODE(state.st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH) | (stat.S_IRWXU if is_folder else 0o600)
    if trust == "group" and state.st_gid == above.st_gid:
        mode |= above.st_mode & (stat.S_IRWXG | stat.S_ISGID if is_folder else stat.S_IRGRP)
    if mode != stat.S_IMODE(state.st_mode):
        path.chmod(mode)


def _nodes(path: Path, root: Path) -> list[tuple[Path, os.stat_result, bool]]:
    """What decides the content of a path, and whether it lies above the root; ends early where something is missing."""
    real_root = Path(os.path.realpath(root))
    way: list[tuple[Path, os.stat_result]] = []
    files: list[tuple[Path, os.stat_result]] = []
    try:
        for step in _way(path):
            way.append(step)
        files = [way.pop()]  # the path itself
        if os.path.isdir(path):
            files += [(Path(file.path), file.stat(follow_symlinks=False)) for file in os.scandir(path)]
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever reads it finds out
    except OSError as error:
        raise CacheError(f"{path} cannot be looked at: {error}. Set FLASHMOE_CACHE_DIR to another folder.") from error
    nodes = [(node, state, node != real_root and real_root not in node.parents) for node, state in way]
    return nodes + [(node, state, False) for node, state in files]


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that decides where a path leads, itself last."""
    here = Path("/")
    yield here, here.lstat()
    words = list(reversed(path.absolute().parts[1:]))
    links = 0
    while words:
        word = words.pop()
        if word == "..":  # here holds no link
            here = here.parent
            continue
        there = here / word
        state = there.lstat()
        if words and not (stat.S_ISDIR(state.st_mode) or stat.S_ISLNK(state.st_mode)):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
        yield there, state
        if not stat.S_ISLNK(state.st_mode):
            here = there
            continue
        if (links := links + 1) > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(there))
        here = Path("/") if target.is_absolute() else here
        words += reversed(target.parts[1:] if target.is_absolute() else target.parts)


def _is_trusted(node: Path, state: os.stat_result, group: int | None, is_above: bool) -> bool:
    """Whether only this user, root and the members of the group could have written a file, folder or link."""
    user = os.geteuid()
    owner_is_trusted = (
        state.st_uid in (0, user)
        or (group is not None and (state.st_gid == group or _is_member(state.st_uid, group)))
        or (is_above and state.st_uid == _unmapped_uid())
    )
    if not owner_is_trusted or stat.S_ISLNK(state.st_mode):  # a link has no mode
        return owner_is_trusted
    if is_above and state.st_mode & stat.S_ISVTX:
        return True
    if state.st_mode & stat.S_IWOTH:
        return False
    return not state.st_mode & stat.S_IWGRP or state.st_gid == group or _is_private(node, state.st_gid, user)


def _shared_group(root: Path) -> int | None:
    """The group of the shared folder, or of where it will be made, if this process is in it."""
    for folder in (root, *root.absolute().parents):
        with suppress(OSError):
            group = folder.stat().st_gid
            return group if group in (os.getegid(), *os.getgroups()) else None
    return None


@lru_cache(maxsize=64)
def _is_member(uid: int, group: int) -> bool:
    try:
        user = pwd.getpwuid(uid)
        return group in os.getgrouplist(user.pw_name, user.pw_gid)
    except (KeyError, OSError):
        return False


def _is_private(node: Path, gid: int, uid: int) -> bool:
    """Whether a group that may write is nobody but this user and root. An access list may name others."""
    if not _has_no_other_member(gid, uid):
        return False
    try:
        os.getxattr(node, "system.posix_acl_access")
    except (OSError, AttributeError):
        return True
    return False


@lru_cache(maxsize=64)
def _has_no_other_member(gid: int, uid: int) -> bool:
    """Whether it is root's group or the user's private one. Its name counts too: directories need not list members."""
    try:
        group = grp.getgrgid(gid)
        names = set(group.gr_mem)
        if gid == 0:
            names |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == 0 and user.pw_uid >= _FIRST_USER}
            return names <= {"root", *(user.pw_name for user in pwd.getpwall() if user.pw_uid == uid)}
        own = pwd.getpwuid(uid)
    except KeyError:
        return False
    names |= {user.pw_name for user in pwd.getpwall() if user.pw_gid == gid}
    return own.pw_gid == gid and own.pw_name == group.gr_name and names <= {"root", own.pw_name}


@lru_cache(maxsize=1)
def _unmapped_uid() -> int | None:
    """Whom a user namespace shows as owner of root's files outside it (rootless containers); ``None`` in no such one."""
    try:
        if Path("/proc/self/uid_map").read_text().split() == ["0", "0", "4294967295"]:
            return None
        return int(Path("/proc/sys/kernel/overflowuid").read_text())
    except (OSError, ValueError):
        return None


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} ({uid})"
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    try:
        return f"{grp.getgrgid(gid).gr_name} ({gid})"
    except KeyError:
        return str(gid)
