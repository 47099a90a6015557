"""Any other array that speaks DLPack. Results come back as NumPy (host) or CuPy (GPU) arrays."""

from __future__ import annotations

from typing import Any

import numpy

from marlin_cupy.device import CPU, Device, cuda, import_cupy
from marlin_cupy.errors import DeviceError
from marlin_cupy.frameworks.framework import Framework

# DLDeviceType of the DLPack specification
_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class DlpackFramework(Framework):
    """Known only by ``__dlpack__`` and ``__dlpack_device__``."""

    name = "dlpack"

    def device(self, array: Any) -> Device:
        """From ``__dlpack_device__``; DeviceError when it is neither host nor CUDA memory."""
        kind, index = array.__dlpack_device__()
        if int(kind) in _HOST:
            return CPU
        if int(kind) in _CUDA:
            return cuda(int(index))
        raise DeviceError(
            f"a {type(array).__name__} is on DLPack device {int(kind)}; host and CUDA memory can be used."
        )

    def dtype(self, array: Any) -> str:
        """That of the native array."""
        return str(self.to_native(array).dtype.name)

    def to_native(self, array: Any) -> Any:
        """A NumPy or CuPy array over the same memory."""
        if self.device(array) == CPU:
            return numpy.from_dlpack(array)
        return import_cupy(f"a {type(array).__name__} on a GPU").from_dlpack(array)

    def from_native(self, native: Any) -> Any:
        """Native arrays are the result: the source library is not known."""
        return native


FRAMEWORK = DlpackFramework()
