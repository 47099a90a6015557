"""What :func:`marlin_cupy.tune` measured on this machine: a JSON file beside the cubins, read when first asked for.

A row holds the times of the candidates of one problem on one model of GPU, by their keys. It counts for exactly that
problem, the number of rows of x included: what is fastest for 16 rows says little about 17. It ceases to count when
the package changes, since the same key may then stand for another kernel.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import threading
import warnings
from pathlib import Path
from typing import Any

from marlin_cupy.jit import cache, source
from marlin_cupy.kernels.problem import Problem

FILE = "tuned.json"
_VERSION = 1

#: Changes whenever what is known changes: plans made before are not used after.
generation = 0

Row = dict[str, Any]
_lock = threading.Lock()


def path() -> Path:
    """Where the file is, whether it exists or not."""
    return cache.cache_dir() / FILE


def times(problem: Problem) -> dict[str, float]:
    """Microseconds by :attr:`Candidate.key` that were measured for ``problem``; empty where it was not tuned."""
    if problem.gpu is None:
        return {}
    rows = _known(path())
    row = rows.get(_name(_identity(problem))) if rows else None
    if row is None or row["fingerprint"] != fingerprint():
        return {}
    return dict(row["us"])


def remember(problem: Problem, us: dict[str, float]) -> bool:
    """Use these times from now on, and keep them for later processes; False where the file cannot be written."""
    global generation
    identity = _identity(problem)
    row = {**identity, "us": us, "fingerprint": fingerprint()}
    with _lock:
        rows = {**_known(path()), **_read(path()), _name(identity): row}  # others may have written since
        text = json.dumps({"version": _VERSION, "rows": list(rows.values())}, indent=1)
        written = cache.replace(path().parent, FILE, text.encode())
        _known(path()).update(rows)
        generation += 1
    return written


def forget() -> None:
    """Read the file again when next asked: for other processes' results."""
    global generation
    with _lock:
        _known.cache_clear()
        generation += 1


@functools.cache
def fingerprint() -> str:
    """A hash over the CUDA sources, their host twins and the version of the package."""
    package = Path(__file__).parents[1]
    files = [*source.source_root().rglob("*.cuh"), *Path(__file__).parent.glob("*.py"), package / "__init__.py"]
    parts = sorted((each.name, each.read_text(encoding="utf-8")) for each in files)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _identity(problem: Problem) -> Row:
    """All that a time depends on."""
    assert problem.gpu is not None
    spec = problem.spec
    return {
        "gpu": problem.gpu.name,
        "arch": problem.gpu.arch,
        "sm_count": problem.gpu.sm_count,
        "format": spec.format,
        "granule": spec.layout.granule,
        "group_size": spec.group_size,
        "K": spec.shape[0],
        "N": spec.shape[1],
        "scale_dtype": spec.scale_dtype,
        "dtype": problem.dtype,
        "batch_invariant": problem.batch_invariant,
        "M": problem.M,
    }


def _name(identity: Row) -> str:
    return json.dumps(identity, sort_keys=True)


@functools.cache
def _known(path: Path) -> dict[str, Row]:
    """The rows of a file by their identity, kept for the life of the process."""
    return _read(path)


def _read(path: Path) -> dict[str, Row]:
    """The rows of a file; none, and a warning, where it is damaged or something else."""
    try:
        text = path.read_bytes()
    except OSError:
        return {}
    try:
        content = json.loads(text)
        if content["version"] != _VERSION:
            raise ValueError(f"its version is {content['version']}")
        return {
            _name({key: row[key] for key in row if key not in ("us", "fingerprint")}): _checked(row)
            for row in content["rows"]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(f"{path} is no file of tuned times ({error!r}); it is ignored, and replaced by the next mc.tune.")
        return {}


def _checked(row: Row) -> Row:
    """``row`` if it is one; ValueError otherwise."""
    if not isinstance(row["fingerprint"], str) or not row["us"]:
        raise ValueError(f"a row has no times: {row}")
    for us in row["us"].values():
        if isinstance(us, bool) or not isinstance(us, int | float) or not (0 < us < math.inf):
            raise ValueError(f"a time is {us!r}")
    return row


@functools.cache
def _warn(message: str) -> None:
    """Once per process."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)
