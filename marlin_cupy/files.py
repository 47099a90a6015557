"""Packed weights in safetensors files: what is written beside the bytes, and how it is checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors

from marlin_cupy.errors import FileFormatError
from marlin_cupy.spec import Spec

#: Of a safetensors file's metadata, where a description stands as JSON.
METADATA_KEY = "marlin_cupy"
_SAFETENSORS_NAMES = {"uint8": "U8", "float32": "F32"}


def check_parts(fields: Any, spec: Spec, parts: Mapping[str, Any], where: object) -> None:
    """FileFormatError unless the NumPy arrays ``parts`` are what ``fields``, as :func:`described` made them, say."""
    for name, part in parts.items():
        check_shape(name, spec, part.shape, part.dtype, where)
    if fields != described(spec, parts):
        raise FileFormatError(
            f"{where} does not hold what it says: the checksum does not match the contents; save it again."
        )


def check_shape(name: str, spec: Spec, shape: tuple[int, ...], dtype: object, where: object) -> None:
    """FileFormatError unless an array of that shape and dtype, a name of NumPy or safetensors, can be part ``name``."""
    part = spec.parts[name]
    if shape != part.shape or str(dtype) not in (part.dtype, _SAFETENSORS_NAMES[part.dtype]):
        raise FileFormatError(
            f"{where} does not hold what it says: {name} is {dtype}{shape} for a weight of shape {spec.shape}; "
            "save it again."
        )


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """FileFormatError where safetensors cannot read ``path``."""
    try:
        yield
    except (safetensors.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} is not a readable safetensors file ({error}); save it again.") from error


def kept(spec: Spec) -> list[str]:
    """The names of the parts that a file has: those that do not follow from others."""
    return [name for name, part in spec.parts.items() if not part.derived]


def described(spec: Spec, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a weight in a file: the spec and a checksum over it and the bytes of kept NumPy arrays."""
    digest = hashlib.sha256(json.dumps(spec.fields, sort_keys=True).encode())
    for name in kept(spec):
        digest.update(parts[name].data)
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
