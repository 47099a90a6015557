"""NumPy arrays: host memory, no stream."""

from __future__ import annotations

from typing import Any

import numpy

from marlin_cupy.device import CPU, Device
from marlin_cupy.frameworks.framework import Framework


class NumpyFramework(Framework):
    """Native in host memory: hand-over is the identity."""

    name = "numpy"

    def device(self, array: Any) -> Device:
        """Always the CPU."""
        return CPU

    def refuse_writing(self, array: Any, role: str) -> None:
        """Read-only arrays."""
        if not array.flags.writeable:
            raise ValueError(f"{role} is a read-only NumPy array; pass one that can be written.")

    def to_native(self, array: Any) -> Any:
        """The array itself, without what a subclass adds."""
        return numpy.asarray(array)

    def from_native(self, native: Any) -> Any:
        """A NumPy array itself; a CuPy array is copied to host memory."""
        if isinstance(native, numpy.ndarray):
            return native
        with native.device:
            return native.get()


FRAMEWORK = NumpyFramework()
