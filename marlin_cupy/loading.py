"""Read a packed weight, or a part of it, from a file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors

from marlin_cupy.device import Device
from marlin_cupy.errors import FileFormatError
from marlin_cupy.files import METADATA_KEY, check_parts, check_shape, kept, readable
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor


def load(
    path: str | os.PathLike[str],
    device: str | Device = "cpu",
    *,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> QuantizedTensor:
    """Read a file that :meth:`QuantizedTensor.save` wrote, checking every byte of it, or a part W[rows, columns].

    Of a part nothing else is read, so that its bytes are not checked: the checksum is of all.

    Args:
        path: the file.
        device: "cpu" (a NumPy array) or "cuda[:N]" (a CuPy array).
        rows, columns: where :meth:`QuantizedTensor.rows` and :meth:`QuantizedTensor.columns` can cut.

    Raises:
        FileNotFoundError: no such file. FileFormatError: not such a file, truncated, edited, of an unknown format
            or of a future version. ValueError: no such part. DeviceError: no such device. MissingDependencyError: a GPU
            was asked for and CuPy is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}.")
    with readable(path), safetensors.safe_open(path, framework="numpy") as file:
        metadata, names = file.metadata() or {}, list(file.keys())
        stored = {name: file.get_slice(name) for name in names}
    if METADATA_KEY not in metadata or "packed" not in stored:
        raise FileFormatError(f"{path} holds no marlin_cupy weight; QuantizedTensor.save writes such files.")
    try:
        found = json.loads(metadata[METADATA_KEY])
    except ValueError as error:
        raise FileFormatError(f"{path} has damaged metadata ({error!r}); save it again.") from error
    spec = Spec.of_fields(found, path)
    for name in kept(spec):
        if name not in stored:
            raise FileFormatError(f"{path} does not hold what it says: {name} is missing; save it again.")
        check_shape(name, spec, tuple(stored[name].get_shape()), stored[name].get_dtype(), path)
    part, runs = spec.cut(rows, columns)
    with readable(path):
        parts = {name: stored[name][runs[name]] for name in kept(spec)}
    if part == spec:
        check_parts(found, spec, parts, path)
    return QuantizedTensor(part, **parts).to(Device.parse(device))
