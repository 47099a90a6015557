"""Cubins on disk: content-addressed, written atomically, verified when read, movable between machines.

An entry is a cubin followed by the SHA-256 of it, so that a truncated or damaged file is noticed and rebuilt, and
tools that read cubins still can. Its name holds a hash of everything the cubin depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

CACHE_VARIABLE = "MARLIN_CUPY_CACHE_DIR"
BUNDLE_VARIABLE = "MARLIN_CUPY_BUNDLE_DIR"
_DIGEST_BYTES = 32


def cache_dir() -> Path:
    """``MARLIN_CUPY_CACHE_DIR``, or ``marlin_cupy`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "marlin_cupy"


def bundle_dir() -> Path | None:
    """``MARLIN_CUPY_BUNDLE_DIR``: cubins compiled elsewhere, looked at first and never written."""
    named = os.environ.get(BUNDLE_VARIABLE)
    return Path(named) if named else None


def key(*parts: str) -> str:
    """A hash over ``parts``, unambiguous about where one ends."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:32]


def read(folder: Path, name: str) -> bytes | None:
    """The cubin of that entry; None where it is missing, unreadable or damaged."""
    try:
        data = (folder / name).read_bytes()
    except OSError:
        return None
    cubin, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def write(folder: Path, name: str, cubin: bytes) -> bool:
    """Store an entry so that a reader sees it whole or not at all; False where the folder cannot be written."""
    return replace(folder, name, cubin + hashlib.sha256(cubin).digest())


def replace(folder: Path, name: str, data: bytes) -> bool:
    """Write any file of that folder, whole or not at all; False where the folder cannot be written."""
    temporary = folder / f".{name}.{os.getpid()}-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, folder / name)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        return False
    return True


def size(folder: Path) -> tuple[int, int]:
    """(number of entries, bytes) in a folder; (0, 0) where it does not exist."""
    entries = list(folder.glob("*.cubin")) if folder.is_dir() else []
    return len(entries), sum(entry.stat().st_size for entry in entries)
