"""The kernel cache: a folder of compiled kernels, named by everything that decides their bytes.

An entry is the folder ``<arch>/<name>-<key>/`` with the source, the image, ``metadata.json`` and ``build.log``. It is
written beside its place and renamed into it, so that it is there in full or not at all; nothing in it is rewritten. A
lock per entry lets one process build while others wait; it only saves work: without it the rename still decides.
Others may clear the cache at any moment. Nothing is read that others than trusted users could have written (trust.py).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import env, files, locks, trust
from .arch import ARCHS, get_arch
from .compile import Image, compile_text, compiler_identity, file_stem, runs_here
from .errors import CacheError, CompileError

logger = logging.getLogger("flashmoe_gen")

_FORMAT = 1  # of an entry; another number makes other keys, so old entries are not read
_LOCK_S = 900.0  # longest wait for another builder, in seconds
_STALE_S = 600.0  # age at which an unfinished folder is taken for a dead builder's: writing one takes milliseconds
_ENTRY_NAME = re.compile(r"[A-Za-z0-9_.-]+-[0-9a-f]{16}")
_LEFTOVERS = (".building-", ".broken-")
_ATTEMPTS = 1000  # to put an entry into its place while others clear or replace
_OCCUPIED = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel whose image lies in the cache.

    Attributes:
        name: its C symbol.
        arch: what it was compiled for.
        path: the cubin or shared library; the file is never rewritten in place.
        registers: 32-bit registers of one thread; 0 on the host.
        spill_bytes: spill stores plus loads of one thread; 0 on the host.
        shared_bytes: static shared memory of one block; 0 on the host.
        seconds: what compiling took, when it was compiled.
        from_cache: whether this call found it compiled.
        compiler: version and flags of the compiler.
        log: what the compiler printed.
    """

    name: str
    arch: str
    path: Path
    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float
    from_cache: bool
    compiler: str
    log: str

    @property
    def image(self) -> bytes:
        """The bytes of the image; raises :class:`CacheError` when the file is gone."""
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise CacheError(f"The image of {self.name} cannot be read: {error}. Compile it again.") from error


@dataclass(frozen=True)
class Entry:
    """One entry as ``cache list`` shows it.

    Attributes:
        name: C symbol of the kernel.
        arch: what it was compiled for.
        path: the entry's folder.
        digest: digest of the source text, as given to :meth:`Cache.build`.
        compiler: version and flags of the compiler.
        registers: 32-bit registers of one thread.
        spill_bytes: spill stores plus loads of one thread.
        shared_bytes: static shared memory of one block.
        seconds: what compiling took.
        size_bytes: size of the image.
        created: when it was compiled, in seconds since the epoch.
        metadata: what was given to :meth:`Cache.build`.
    """

    name: str
    arch: str
    path: Path
    digest: str
    compiler: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    seconds: float
    size_bytes: int
    created: float
    metadata: dict[str, Any]


class Cache:
    """Compiled kernels in a folder that many processes, and machines with a common file system, may share.

    Args:
        root: the folder; default ``FLASHMOE_CACHE_DIR`` or the user's cache directory. Made when first written to.

    Attributes:
        path: the folder, absolute.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.path = (env.expand("root", root) if root else env.cache_dir()).absolute()

    def build(self, text: str, *, name: str, arch: str, digest: str, metadata: dict[str, Any]) -> CompiledKernel:
        """Return the compiled kernel of a text, compiling it if no intact entry exists.

        Without a compiler on this machine, and with ``FLASHMOE_NO_JIT=1``, an image of the same text that any compiler
        made is taken, if this machine can run it. Another process may remove the entry at any moment.

        Args:
            text: the self-contained source.
            name: C symbol of the kernel.
            arch: a key of :data:`flashmoe_gen.arch.ARCHS`.
            digest: digest of the text.
            metadata: kept with the entry; ``metadata["command"]`` is the command that builds it.

        Raises:
            UnsupportedError: the architecture is unknown to the package or to the compiler.
            CompileError: the compiler is missing or refused the text.
            CacheError: the folder cannot be written; others than ``FLASHMOE_CACHE_TRUST`` says could have written what
                lies in it; or the entry is missing while ``FLASHMOE_NO_JIT=1``.
        """
        folder = self.path / get_arch(arch).name
        text_hash = hashlib.sha256(text.encode()).hexdigest()
        if env.no_jit():
            if kernel := self._any_compilers(folder, file_stem(name), text_hash):
                return kernel
            raise CacheError(
                f"{name} for {arch} is not in the kernel cache {self.path} (or is damaged there), and "
                "FLASHMOE_NO_JIT=1 forbids compiling it here. "
                f"Build it with: {metadata.get('command', 'flashmoe-gen compile')}"
            )
        try:
            compiler = compiler_identity(arch)
        except CompileError:
            if kernel := self._any_compilers(folder, file_stem(name), text_hash):
                return kernel
            raise
        key = hashlib.sha256("\n".join([str(_FORMAT), text_hash, digest, arch, compiler]).encode()).hexdigest()
        entry = folder / f"{file_stem(name)}-{key[:16]}"
        with suppress(_DamagedError):
            return self._read(entry, key)
        self._write(lambda: _make(folder))
        trust.check(folder, root=self.path)
        with locks.held(self.path / "locks" / f"{key[:16]}.lock", wait_s=_LOCK_S, what=name):
            try:
                return self._read(entry, key)  # built while this process waited
            except _DamagedError as damage:
                if os.path.lexists(entry):
                    logger.warning("the cache entry %s is damaged and will be built again: %s", entry, damage)
            image = compile_text(text, name=name, arch=arch, keep_in=self.path / "failed")
            record = {"key": key, "name": name, "arch": arch, "digest": digest, "text_sha256": text_hash}
            record |= _describe(image) | {"metadata": metadata}
            self._write(lambda: self._store(entry, key, text, image, record))
            self._sweep(folder)
        return _kernel(entry, record, image.log, from_cache=False)

    def entries(self) -> list[Entry]:
        """List the readable entries by architecture and name; images are not checked.

        Raises :class:`CacheError` when the folder cannot be read.
        """
        found = []
        for folder in self._folders():
            with suppress(_DamagedError):
                found.append(_entry(folder))
        return found

    def clear(self) -> int:
        """Remove all entries, leftovers and refused sources; return the number of entries that this call removed.

        Kernels that are loaded keep working. Others may build or clear at the same time. Raises :class:`CacheError`
        when something cannot be removed, after removing the rest.
        """
        removed, failure = 0, None
        for folder in self._folders():
            try:
                removed += files.discard(folder)
            except OSError as error:
                failure = failure or error
        for arch in ARCHS:
            self._sweep(self.path / arch)
        for source in self._children(self.path / "failed"):
            if source.suffix in (".cu", ".cpp"):
                try:
                    source.unlink(missing_ok=True)
                except OSError as error:
                    failure = failure or error
        if failure:
            raise self._unwritable(failure) from failure
        return removed

    def _folders(self) -> list[Path]:
        """All entries, damaged ones too; nothing else, whatever folder the user took for a cache."""
        found = (folder for arch in sorted(ARCHS) for folder in self._children(self.path / arch))
        return [folder for folder in found if _ENTRY_NAME.fullmatch(folder.name) and os.path.isdir(folder)]

    def _children(self, folder: Path) -> list[Path]:
        try:
            return [folder / name for name in sorted(os.listdir(folder))]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CacheError(
                f"The kernel cache {self.path} cannot be read: {error}. Set FLASHMOE_CACHE_DIR."
            ) from error

    def _any_compilers(self, folder: Path, stem: str, text_hash: str) -> CompiledKernel | None:
        """An intact image of the text that this machine can run, whatever compiler made it."""
        for entry in self._children(folder):
            if entry.name.startswith(f"{stem}-"):
                with suppress(_DamagedError):
                    record = self._record(entry)
                    if record.get("text_sha256") == text_hash and runs_here(str(record.get("compiler"))):
                        return self._read(entry)
        return None

    def _write(self, step: Callable[[], None]) -> None:
        """Do a step that makes files; do it again when somebody removes the folders meanwhile."""
        try:
            for _ in range(_ATTEMPTS - 1):
                with suppress(FileNotFoundError):
                    return step()
            step()
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> CacheError:
        return CacheError(
            f"The kernel cache {self.path} cannot be written: {error}. "
            "Set FLASHMOE_CACHE_DIR to a writable directory with free space."
        )

    def _store(self, entry: Path, key: str, text: str, image: Image, record: dict[str, Any]) -> None:
        draft = entry.with_name(f".building-{entry.name}-{uuid.uuid4().hex[:8]}")
        try:
            trust.make_folder(draft)
            trust.new_file(draft / f"source{ARCHS[record['arch']].source_suffix}").write_text(text, encoding="utf-8")
            trust.new_file(draft / _image_name(record["arch"])).write_bytes(image.data)
            trust.new_file(draft / "build.log").write_text(image.log, encoding="utf-8")
            described = json.dumps(record, indent=1, default=str)
            trust.new_file(draft / "metadata.json").write_text(described, encoding="utf-8")
            self._publish(draft, entry, key)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    def _publish(self, draft: Path, entry: Path, key: str) -> None:
        """Rename the draft into its place; keep an intact entry that another builder put there, replace a damaged one."""
        for _ in range(_ATTEMPTS):
            try:
                os.rename(draft, entry)
                return
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
            try:
                self._read(entry, key)
                shutil.rmtree(draft, ignore_errors=True)
                return
            except _DamagedError:
                files.discard(entry)
        raise OSError(errno.EBUSY, "the entry is replaced again and again", str(entry))

    def _record(self, entry: Path) -> dict[str, Any]:
        trust.check(entry, root=self.path)
        return _load_record(entry)

    def _read(self, entry: Path, key: str | None = None) -> CompiledKernel:
        """Return the entry's kernel after checking key, size and hash; raise ``_DamagedError`` if it is not intact."""
        record = self._record(entry)
        try:
            if key is not None and record["key"] != key:
                raise _DamagedError("it belongs to another key")
            kernel = _kernel(entry, record, (entry / "build.log").read_text(encoding="utf-8"), from_cache=True)
            data = kernel.path.read_bytes()
            if len(data) != record["image_bytes"] or hashlib.sha256(data).hexdigest() != record["image_sha256"]:
                raise _DamagedError("the image differs from what was written")
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise _DamagedError(f"{type(error).__name__}: {error}") from error
        return kernel

    def _sweep(self, folder: Path) -> None:
        """Remove what dead builders left."""
        oldest = time.time() - _STALE_S
        for leftover in self._children(folder):
            with suppress(OSError):
                if leftover.name.startswith(_LEFTOVERS) and leftover.stat().st_mtime < oldest:
                    files.remove(leftover)


class _DamagedError(Exception):
    """The entry is absent, incomplete, changed, or of another kernel."""


def _make(folder: Path) -> None:
    """Make a folder that can be written to: found out before minutes are spent on compiling."""
    trust.make_folder(folder)
    if not os.access(folder, os.W_OK | os.X_OK) and folder.stat() and not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _image_name(arch: str) -> str:
    return f"kernel{ARCHS[arch].image_suffix}"


def _describe(image: Image) -> dict[str, Any]:
    return {
        "compiler": image.compiler,
        "registers": image.registers,
        "spill_bytes": image.spill_bytes,
        "shared_bytes": image.shared_bytes,
        "seconds": image.seconds,
        "created": time.time(),
        "image_sha256": hashlib.sha256(image.data).hexdigest(),
        "image_bytes": len(image.data),
    }


def _load_record(entry: Path) -> dict[str, Any]:
    try:
        record = json.loads((entry / "metadata.json").read_bytes())
    except (OSError, ValueError) as error:
        raise _DamagedError(str(error)) from error
    if not isinstance(record, dict):
        raise _DamagedError("metadata.json is not an object")
    return record


def _kernel(entry: Path, record: dict[str, Any], log: str, *, from_cache: bool) -> CompiledKernel:
    return CompiledKernel(
        name=record["name"],
        arch=record["arch"],
        path=entry / _image_name(record["arch"]),
        registers=int(record["registers"]),
        spill_bytes=int(record["spill_bytes"]),
        shared_bytes=int(record["shared_bytes"]),
        seconds=float(record["seconds"]),
        from_cache=from_cache,
        compiler=record["compiler"],
        log=log,
    )


def _entry(folder: Path) -> Entry:
    record = _load_record(folder)
    try:
        return Entry(
            name=record["name"],
            arch=record["arch"],
            path=folder,
            digest=record["digest"],
            compiler=record["compiler"],
            registers=int(record["registers"]),
            spill_bytes=int(record["spill_bytes"]),
            shared_bytes=int(record["shared_bytes"]),
            seconds=float(record["seconds"]),
            size_bytes=int(record["image_bytes"]),
            created=float(record["created"]),
            metadata=dict(record["metadata"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise _DamagedError(str(error)) from error
