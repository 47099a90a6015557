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

import safetensors

from marlin_cupy.errors import FileFormatError
from marlin_cupy.spec import Spec

#: Of a safetensors file's metadata, where a description stands as JSON.
METADATA_KEY = "marlin_cupy"


def check_packed(fields: Any, spec: Spec, packed: Any, where: object) -> None:
    """FileFormatError unless the NumPy array ``packed`` is what ``fields``, as :func:`described` made them, say."""
    check_shape(spec, packed.shape, packed.dtype, where)
    if fields != described(spec, packed):
        raise FileFormatError(
            f"{where} does not hold what it says: the checksum does not match the contents; save it again."
        )


def check_shape(spec: Spec, shape: tuple[int, ...], dtype: object, where: object) -> None:
    """FileFormatError unless an array of that shape and dtype, a name of NumPy or safetensors, can hold ``spec``."""
    if shape != spec.layout.packed_shape or str(dtype) not in ("uint8", "U8"):
        raise FileFormatError(
            f"{where} does not hold what it says: packed is {dtype}{shape} for a weight of shape {spec.shape}; "
            "save it again."
        )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """FileFormatError where safetensors cannot read ``path``."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file ({error}); save it again.") from error


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
