"""Files and folders that are written in full or not at all, and removed in one step."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from .errors import FlashMoEError


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8; as :func:`write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there; the folder is made if it is missing.

    Raises:
        FlashMoEError: it cannot be written (read-only, full); what was there before is still there.
    """
    try:
        place = _place(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        mode = place.stat().st_mode if place.exists() else None
        if _is_stream(place, mode):
            place.write_bytes(data)
            return
        draft = place.with_name(f".{place.name[:50]}.{uuid.uuid4().hex[:8]}")
        try:
            draft.write_bytes(data)
            if mode is not None:
                draft.chmod(stat.S_IMODE(mode))
            os.replace(draft, place)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise _refusal(path, error) from error


def require_writable(path: Path) -> None:
    """Tell before the work that a file cannot be written after it; nothing is written, and nothing is made.

    Raises:
        FlashMoEError: the path is a folder, its folder does not exist, or one of them is not writable.
    """
    try:
        place = _place(path)
        with suppress(FileNotFoundError):
            place.lstat()  # a name that is too long
        if not place.parent.is_dir():
            raise _error(errno.ENOTDIR if place.parent.exists() else errno.ENOENT)
        if not place.exists() and not os.access(place.parent, os.W_OK | os.X_OK):
            raise _error(errno.EACCES)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise _refusal(path, error) from error


def _place(path: Path) -> Path:
    place = Path(os.path.realpath(path))  # a link stays a link
    if os.path.exists(path) and not place.exists():  # /dev/stdout is a link to what has no name
        place = path.absolute()
    if place.is_dir():
        raise _error(errno.EISDIR)
    if place.exists() and not os.access(place, os.W_OK):
        raise _error(errno.EACCES)
    return place


def _is_stream(place: Path, mode: int | None) -> bool:
    """A device, a pipe, /dev/stdout: written as it is, there is nothing to replace."""
    return place.parts[1:2] == ("dev",) or (mode is not None and not stat.S_ISREG(mode))


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def _refusal(path: Path, error: OSError | ValueError) -> FlashMoEError:
    return FlashMoEError(f"{path} cannot be written: {getattr(error, 'strerror', None) or error}.")


def discard(folder: Path) -> bool:
    """Take a folder out of its place in one step, then remove it: nobody sees half of it. False if it is gone already."""
    grave = folder.with_name(f".broken-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        os.rename(folder, grave)
    except FileNotFoundError:
        return False
    remove(grave)
    return True


def remove(path: Path) -> None:
    """Remove a file, or a folder and all in it, as far as that can be done."""
    if os.path.isdir(path) and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
