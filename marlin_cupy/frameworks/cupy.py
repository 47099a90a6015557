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


class CupyFramework(StreamFramework):
    """Native in GPU memory: hand-over is the identity."""

    name = "cupy"

    def device(self, array: Any) -> Device:
        """The GPU that holds the array."""
        return cuda(array.data.device_id)

    def to_native(self, array: Any) -> Any:
        """The array itself."""
        return array

    def from_native(self, native: Any) -> Any:
        """A CuPy array itself; a NumPy array is copied to the current GPU."""
        return native if isinstance(native, cupy.ndarray) else cupy.asarray(native)

    def index(self, array: Any) -> int:
        """The number of the GPU that holds the array."""
        return array.data.device_id  # type: ignore[no-any-return]

    def is_contiguous(self, array: Any) -> bool:
        """As its flags say, which take ten times as long to ask."""
        return array._c_contiguous  # type: ignore[no-any-return]

    def pointer(self, array: Any) -> int:
        """Device address of the first element."""
        return array.data.ptr  # type: ignore[no-any-return]

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

    def empty_like(self, array: Any, shape: tuple[int, ...]) -> Any:
        """From CuPy's memory pool; of the array's GPU, where that is not the current one."""
        made = cupy.ndarray(shape, array.dtype)
        if made.data.device_id != array.data.device_id:
            with array.device:
                made = cupy.ndarray(shape, array.dtype)
        return made

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
