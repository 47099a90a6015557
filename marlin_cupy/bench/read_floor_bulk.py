"""Launch shapes of the read floor by bulk copies. Twin of cuda_src/kernels/read_floor_bulk.cuh."""

from __future__ import annotations

from typing import NamedTuple

from marlin_cupy.device import Gpu
from marlin_cupy.kernels.cuda import RESERVED_SHARED

_WARP = 32
_BARRIER = 8
_MIN_ARCH = 90


class BulkShape(NamedTuple):
    """Bytes under way on an SM: warps * slots * piece * blocks_per_sm.

    ``alone``: a block takes all shared memory, so that no block of the next kernel starts beside it.
    """

    warps: int
    slots: int
    piece: int
    blocks_per_sm: int
    alone: bool = False

    @property
    def kernel(self) -> str:
        """The file in cuda_src/kernels."""
        return "read_floor_bulk"

    @property
    def threads(self) -> int:
        """Of a block."""
        return _WARP * self.warps

    @property
    def chunk_bytes(self) -> int:
        """What a block reads before it reads on elsewhere."""
        return self.warps * self.piece

    @property
    def constants(self) -> str:
        """The preamble of the kernel."""
        return f"constexpr int THREADS = {self.threads}, SLOTS = {self.slots}, PIECE = {self.piece};"

    def shared_bytes(self, gpu: Gpu) -> int:
        """Dynamic shared memory of a block."""
        return gpu.shared_per_block if self.alone else self.warps * self.slots * (self.piece + _BARRIER)

    def serves(self, gpu: Gpu) -> bool:
        """Whether the GPU has bulk copies, and room."""
        per_sm = self.blocks_per_sm * (self.shared_bytes(gpu) + RESERVED_SHARED)
        return int(gpu.arch.removeprefix("sm_").rstrip("af")) >= _MIN_ARCH and per_sm <= gpu.shared_per_sm

    def __str__(self) -> str:
        copies = f"{self.slots} bulk copies of {self.piece} bytes each"
        room = ", all shared memory taken" if self.alone else ""
        return f"{self.blocks_per_sm} x {self.warps} warps per SM, {copies}{room}"


CANDIDATES = (
    BulkShape(8, 2, 4096, 1),
    BulkShape(8, 2, 4096, 1, alone=True),
    BulkShape(8, 3, 4096, 1),
    BulkShape(8, 3, 4096, 1, alone=True),
    BulkShape(4, 3, 8192, 1),
    BulkShape(4, 2, 4096, 2),
    BulkShape(4, 3, 4096, 2),
    BulkShape(2, 3, 8192, 2),
)
