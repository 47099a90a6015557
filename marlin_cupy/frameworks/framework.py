"""What the rest of the library asks of an array library: whose memory, which stream, how to hand over."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from marlin_cupy.device import Device

Array = Any  # an array of any library
Native = Any  # a NumPy array in host memory or a CuPy array in GPU memory


@functools.cache
def _name_of(dtype: Any) -> str:
    """NumPy makes it anew whenever it is asked."""
    return str(dtype.name)


class Framework(ABC):
    """One array library. Hand-over shares memory unless a method says otherwise."""

    #: The name users know it by.
    name: str
    #: Whether it takes objects apart into arrays, which then have to be its own.
    takes_apart: ClassVar[bool] = False

    def meet(self, kind: type) -> None:
        """Objects of a class with ``whole``, ``tree`` and ``of_tree`` hold arrays; called again and again."""
        return None

    @abstractmethod
    def device(self, array: Array) -> Device:
        """Where the memory of ``array`` is."""

    def dtype(self, array: Array) -> str:
        """Name of the element type, see :meth:`name_of`."""
        return self.name_of(array.dtype)

    def name_of(self, dtype: Any) -> str:
        """A dtype as NumPy and ml_dtypes spell it: "float16", "bfloat16", ..."""
        return _name_of(dtype)

    def refuse_writing(self, array: Array, role: str) -> None:
        """TypeError or ValueError if ``array`` cannot be written in place."""
        return None

    def follows(self, x: Array, packed: Array, bias: Array | None) -> bool:
        """Whether a compiler traces any of these, or automatic differentiation follows it.

        Their product then has to be an operation that both know: see ``compilers``.
        """
        return False

    @abstractmethod
    def to_native(self, array: Array) -> Native:
        """The same memory as a NumPy or CuPy array, ordered after pending work on it."""

    def settle(self, native: Native) -> None:
        """Before memory that :meth:`to_native` showed may be used again by its library: what reads it has finished."""
        return None

    @abstractmethod
    def from_native(self, native: Native) -> Array:
        """A NumPy or CuPy array as an array of this library, ordered after pending work on it."""


class StreamFramework(Framework):
    """A library whose GPU arrays are used by raw pointer, on its own current stream."""

    #: Whether memory from ``empty`` is never lent to two launches that can overlap, whichever streams they are on.
    exclusive: ClassVar[bool] = False

    @abstractmethod
    def index(self, array: Array) -> int:
        """The number of the GPU that holds the array; -1 where none does."""

    @abstractmethod
    def is_contiguous(self, array: Array) -> bool:
        """Whether elements follow one another in row-major order."""

    @abstractmethod
    def pointer(self, array: Array) -> int:
        """Device address of the first element."""

    @abstractmethod
    def strides(self, array: Array) -> tuple[int, ...]:
        """Strides in elements."""

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Array:
        """Uninitialised array from the library's own allocator, safe while it captures a CUDA graph."""

    @abstractmethod
    def empty_like(self, array: Array, shape: tuple[int, ...]) -> Array:
        """As :meth:`empty`, with the dtype and the device of ``array``."""

    @abstractmethod
    def stream(self, device: Device) -> int:
        """Handle of the library's current stream on ``device``."""

    @abstractmethod
    def rows(self, array: Array) -> Array:
        """``array`` of shape (..., K) as (M, K), a view where strides allow it."""
