"""Where the operands of a product lie, and the memory that it needs besides."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, Protocol

from marlin_cupy.device import Device
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit import launch
from marlin_cupy.kernels.arguments import Int, Struct, pointer
from marlin_cupy.writes import Writes


class Rows(NamedTuple):
    """A matrix of 16-bit elements in device memory whose rows are contiguous.

    Attributes:
        pointer: address of the first row.
        stride: elements from a row to the next, of no account where there is one row.
        number: of rows.
    """

    pointer: int
    stride: int
    number: int

    @staticmethod
    def of(framework: StreamFramework, array: Any, number: int) -> Rows:
        """``array`` (..., columns), of ``number`` > 0 rows in all."""
        rows = framework.rows(array)
        return Rows(framework.pointer(rows), framework.strides(rows)[0], number)

    def is_aligned(self, columns: int) -> bool:
        """Whether x of so many columns that lies so is aligned; see :class:`Operand`."""
        return columns % 8 != 0 or (self.start_at(16) and (self.number == 1 or self.stride >= columns))

    def start_at(self, nbytes: int) -> bool:
        """Whether every row starts at a multiple of so many bytes."""
        return self.pointer % nbytes == 0 and (self.number == 1 or 2 * self.stride % nbytes == 0)


class Stack(Struct, header="layout.cuh"):
    """Which weight of several in one array is multiplied: in the arguments of kernels that are built for it."""

    layer: Annotated[int, pointer("const int"), "its number, read when the kernel runs; null where there is one weight"]
    layers: Annotated[Int, "how many there are"]


class Weight(Protocol):
    """What a launch asks of a packed weight besides its spec, which the plan knows: a QuantizedTensor, for instance."""

    @property
    def pointer(self) -> int:
        """Device address of the packed buffer."""

    @property
    def factors_pointer(self) -> int:
        """Device address of its output scales; of range factors where scales are packed, see Layout.range_factors."""

    @property
    def device(self) -> Device:
        """The GPU that both are on."""

    @property
    def writes(self) -> Writes:
        """The record of that GPU."""

    @property
    def layer_pointer(self) -> int:
        """Device address of the number, int32, of one of several weights; launches with one must be plain. Else 0."""


class PackedWeight(NamedTuple):
    """A :class:`Weight` of which nothing but its addresses is known."""

    pointer: int
    factors_pointer: int
    device: Device
    writes: Writes
    layer_pointer: int = 0


class Launcher(Protocol):
    """Who launches: a StreamFramework, or a compiler that has set memory aside."""

    @property
    def exclusive(self) -> bool:
        """Whether memory from ``empty`` is never lent to two launches that can overlap, on any streams."""

    def stream(self, device: Device) -> int:
        """Handle of the stream to launch on."""

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        """Uninitialised memory for the time of the launch."""

    def pointer(self, array: Any) -> int:
        """Device address of what ``empty`` gave."""


class Exchange(NamedTuple):
    """Memory by which blocks add up tiles that they share.

    Attributes:
        memory: the array that the partial tiles are in: whoever launches keeps it until that is done.
        partials: its address.
        counters: address of a zero per shared tile.
    """

    memory: Any = None
    partials: int = 0
    counters: int = 0

    @staticmethod
    def of(launcher: Launcher, device: Device, stream: int, floats: int, shared_tiles: int) -> Exchange:
        """For a launch on ``stream`` whose partial tiles, some there are, are so many float32."""
        memory = launcher.empty((floats,), "float32", device)
        partials, counters = launcher.pointer(memory), launch.counters(device.index)
        if launcher.exclusive:
            return Exchange(memory, partials, counters.beside(partials, shared_tiles))
        return Exchange(memory, partials, counters.address(stream, shared_tiles))


#: Where blocks share no tile.
NO_EXCHANGE = Exchange()
