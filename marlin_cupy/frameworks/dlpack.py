"""Any other array that speaks DLPack: seen through NumPy (host memory) or CuPy (GPU memory), which results are in."""

from __future__ import annotations

from typing import Any

import numpy

from marlin_cupy.device import import_cupy
from marlin_cupy.errors import DeviceError

# DLDeviceType of the DLPack specification
_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


def to_native(array: Any, role: str) -> Any:
    """A NumPy or CuPy array over the memory of ``array``.

    Raises:
        DeviceError: memory that is neither host nor CUDA. TypeError: a dtype that the hand-over does not know.
    """
    kind = int(array.__dlpack_device__()[0])
    name = type(array).__name__
    try:
        if kind in _HOST:
            return numpy.from_dlpack(array)
        if kind in _CUDA:
            return import_cupy(f"a {name} on a GPU").from_dlpack(array)
    except (BufferError, RuntimeError, TypeError) as error:
        reason = str(error).rstrip(".")
        raise TypeError(
            f"{role} is a {name} that cannot be handed over through DLPack ({reason}); "
            "pass a NumPy, CuPy, JAX or PyTorch array."
        ) from error
    raise DeviceError(f"{role} is a {name} on DLPack device {kind}; host and CUDA memory can be used.")
