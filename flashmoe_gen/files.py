"""Files for the user: written in full or not at all."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from .errors import FlashMoEError


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8 beside its place and move it there; the folder is made if it is missing.

    Raises:
        FlashMoEError: it cannot be written (read-only, full); what was there before is still there.
    """
    place = Path(os.path.realpath(path))  # a link stays a link
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.exists() and not place.is_file():  # /dev/stdout, a pipe
            place.write_text(text, encoding="utf-8")
            return
        draft = place.with_name(f".{place.name[:200]}.{uuid.uuid4().hex[:8]}")
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, place)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
    except OSError as error:
        raise FlashMoEError(f"{path} cannot be written: {error.strerror or error}.") from error
