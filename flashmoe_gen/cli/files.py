"""Files that commands write at their end: the path is looked at before the work, and the file is there in full or not at all."""

from __future__ import annotations

import errno
import os
import stat
import uuid
from contextlib import suppress
from pathlib import Path

from ..errors import FlashMoEError


def require_writable(path: Path | None) -> None:
    """Raise now what :func:`write` would raise after the work; nothing is left behind, and ``path`` stays as it is.

    Raises:
        FlashMoEError: the path is a folder, in none that exists, or not writable.
    """
    if path is None:
        return
    try:
        target = _target(path)
        if _is_special(target):
            if not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        else:
            draft = _draft(target)
            draft.touch(exist_ok=False)
            draft.unlink()
    except OSError as error:
        raise _refusal(path, error) from error


def write(path: Path, data: bytes) -> None:
    """Write a file in one step: beside its place first, and then renamed.

    Raises:
        FlashMoEError: it cannot be written; what was there before stays.
    """
    try:
        target = _target(path)
        if _is_special(target):
            target.write_bytes(data)
            return
        draft = _draft(target)
        try:
            with open(draft, "xb") as file:
                file.write(data)
            if target.exists():
                os.chmod(draft, stat.S_IMODE(target.stat().st_mode))
            os.replace(draft, target)
        except BaseException:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _refusal(path, error) from error


def _target(path: Path) -> Path:
    target = Path(os.path.realpath(path))  # the file that a link names, so that the link stays
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return target


def _is_special(target: Path) -> bool:
    """A device or a pipe: written as it is, there is nothing to replace."""
    return target.exists() and not target.is_file()


def _draft(target: Path) -> Path:
    if len(os.fsencode(target.name)) > 255:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    return target.with_name(f".flashmoe-{uuid.uuid4().hex[:12]}.part")


def _refusal(path: Path, error: OSError) -> FlashMoEError:
    return FlashMoEError(f"{path} cannot be written: {error.strerror or error}.")
