"""JAX arrays, eagerly: handed over through DLPack, which orders both sides' streams."""

from __future__ import annotations

from typing import Any

import jax
import numpy

from marlin_cupy.device import CPU, Device, cuda, import_cupy
from marlin_cupy.errors import DeviceError, UnsupportedError
from marlin_cupy.frameworks.framework import Framework


class JaxFramework(Framework):
    """Immutable arrays on one device."""

    name = "jax"

    def device(self, array: Any) -> Device:
        """CPU or the CUDA GPU; UnsupportedError for traced arrays, DeviceError for sharded and other ones."""
        if isinstance(array, jax.core.Tracer):
            raise UnsupportedError(
                "a JAX array is traced by jax.jit, grad or vmap, and marlin_cupy works on concrete arrays only so far; "
                "call it outside the transformed function."
            )
        devices = list(array.devices())
        if len(devices) != 1:
            raise DeviceError(f"a JAX array is spread over {len(devices)} devices; arrays on one device can be used.")
        device = devices[0]
        if device.platform == "cpu":
            return CPU
        if device.platform != "gpu":
            raise DeviceError(f"a JAX array is on platform {device.platform}; arrays on cpu and gpu can be used.")
        return cuda(device.local_hardware_id)

    def dtype(self, array: Any) -> str:
        """Name of the NumPy or ml_dtypes type."""
        return str(array.dtype.name)

    def refuse_writing(self, array: Any, role: str) -> None:
        """Always."""
        raise TypeError(f"{role} is a jax array, and those are immutable; use what the function returns instead.")

    def to_native(self, array: Any) -> Any:
        """A NumPy or CuPy array over the array's memory, read-only by JAX's contract."""
        if self.device(array) == CPU:
            return numpy.asarray(array)
        return import_cupy("a JAX array on a GPU").from_dlpack(array)

    def from_native(self, native: Any) -> Any:
        """A JAX array over a CuPy array's memory; a NumPy array is copied to JAX's CPU device."""
        if isinstance(native, numpy.ndarray):
            return jax.device_put(native, jax.local_devices(backend="cpu")[0])
        return jax.dlpack.from_dlpack(native)


FRAMEWORK = JaxFramework()
