"""CuPy arrays: GPU memory, CuPy's current stream."""

from __future__ import annotations

from typing import Any

import cupy
import ml_dtypes
import numpy
from cupy.cuda import get_current_stream
from cupy_backends.cuda.api.runtime import getDevice

from marlin_cupy.device import Device, cuda
from marlin_cupy.frameworks.framework import StreamFramework

_DTYPES = {
    "float16": numpy.dtype(numpy.float16),
    "bfloat16": numpy.dtype(ml_dtypes.bfloat16),
    "float32": numpy.dtype(numpy.float32),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CupyFramework(StreamFramework):
    """Native in GPU memory: hand-over is the identity."""

    name = "cupy"

    def device(self, array: Any) -> Device:
        """The GPU that holds the array."""
        return cuda(array.data.device_id)

    def dtype(self, array: Any) -> str:
        """Name of the NumPy or ml_dtypes type."""
        return _NAMES.get(array.dtype) or str(array.dtype.name)

    def to_native(self, array: Any) -> Any:
        """The array itself."""
        return array

    def from_native(self, native: Any) -> Any:
        """A CuPy array itself; a NumPy array is copied to the current GPU."""
        return native if isinstance(native, cupy.ndarray) else cupy.asarray(native)

    def pointer(self, array: Any) -> int:
        """Device address of the first element."""
        return int(array.data.ptr)

    def strides(self, array: Any) -> tuple[int, ...]:
        """Strides in elements."""
        size = array.itemsize
        return tuple([stride // size for stride in array.strides])

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        """From CuPy's memory pool."""
        if getDevice() == device.index:
            return cupy.ndarray(shape, _DTYPES[dtype])
        with cupy.cuda.Device(device.index):
            return cupy.ndarray(shape, _DTYPES[dtype])

    def stream(self, device: Device) -> int:
        """CuPy's current stream on that GPU."""
        return int(get_current_stream(device.index).ptr)

    def rows(self, array: Any) -> Any:
        """Leading axes folded into one."""
        if array.ndim == 2:
            return array
        with array.device:
            return array.reshape(-1, array.shape[-1])


FRAMEWORK = CupyFramework()
