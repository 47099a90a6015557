"""Packed weights in safetensors files: what is written beside the bytes, and how it is checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy

from marlin_cupy.errors import FileFormatError
from marlin_cupy.spec import Spec

#: Of a safetensors file's metadata, where a description stands as JSON.
METADATA_KEY = "marlin_cupy"


def check_packed(fields: Any, spec: Spec, packed: Any, where: object) -> None:
    """FileFormatError unless the NumPy array ``packed`` is what ``fields``, as :func:`described` made them, say."""
    wrong = None
    if packed.shape != spec.layout.packed_shape or packed.dtype != numpy.uint8:
        wrong = f"packed is {packed.dtype}{packed.shape} for a weight of shape {spec.shape}"
    elif fields != described(spec, packed):
        wrong = "the checksum does not match the contents"
    if wrong:
        raise FileFormatError(f"{where} does not hold what it says: {wrong}; save it again.")


def described(spec: Spec, packed: Any) -> dict[str, Any]:
    """The metadata of a weight in a file: the spec and a checksum over it and the packed bytes, a NumPy array."""
    digest = hashlib.sha256(json.dumps(spec.fields, sort_keys=True).encode())
    digest.update(packed.data)
    return spec.fields | {"sha256": digest.hexdigest()}


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to: what is written there appears at ``path``, whole, or not at all if an error comes first."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"cannot save to {path}: the folder {path.parent} does not exist.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
