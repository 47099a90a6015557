"""The read floor: how long the GPU takes to do no more than read a weight. Twin of cuda_src/kernels/read_floor.cuh.

There are two ways to read, loads and bulk copies (``read_floor_bulk``); which is faster depends on the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from marlin_cupy.bench import read_floor_bulk
from marlin_cupy.bench.read_floor_bulk import BulkShape
from marlin_cupy.device import Gpu
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.arguments import Int64, Struct, pointer
from marlin_cupy.timing import CupyRun, Sampling, Timer, interleave, prepare


class Args(Struct):
    """What both kernels are launched with."""

    data: Annotated[int, pointer("const u8")]
    sink: Annotated[int, pointer("u32"), "always null: the compiler does not know, so it has to keep the loads"]
    count: Annotated[Int64, "of 16-byte words"]


_ARGUMENTS = launch.ArgumentBlock(Args.size)
_WORD = 16
#: Enough to rank launch shapes.
_TRIAL = Sampling(sample_ms=2.0, samples=5, warmup_rounds=1)


class LoadShape(NamedTuple):
    """Bytes under way on an SM: 16 * loads * threads * blocks_per_sm. Small buffers want few, large ones many."""

    threads: int
    loads: int
    blocks_per_sm: int

    @property
    def kernel(self) -> str:
        """The file in cuda_src/kernels."""
        return "read_floor"

    @property
    def chunk_bytes(self) -> int:
        """What a block reads before it reads on elsewhere."""
        return _WORD * self.threads * self.loads

    @property
    def constants(self) -> str:
        """The preamble of the kernel."""
        return f"constexpr int THREADS = {self.threads}, LOADS = {self.loads};"

    def shared_bytes(self, gpu: Gpu) -> int:
        """Dynamic shared memory of a block."""
        return 0

    def serves(self, gpu: Gpu) -> bool:
        """All GPUs have loads."""
        return True

    def __str__(self) -> str:
        return f"{self.blocks_per_sm} x {self.threads} threads per SM, {self.loads} loads each"


Shape = LoadShape | BulkShape

CANDIDATES: tuple[Shape, ...] = (
    LoadShape(256, 4, 4),
    LoadShape(256, 4, 8),
    LoadShape(256, 8, 4),
    LoadShape(512, 4, 4),
    LoadShape(512, 8, 2),
    LoadShape(1024, 4, 1),
    LoadShape(1024, 4, 2),
    *read_floor_bulk.CANDIDATES,
)


def kernel_source(shape: Shape) -> str:
    """The complete CUDA source."""
    return source.specialized(shape.kernel, shape.constants, *Args.cpp())


class Reader:
    """Enqueues the read of a CuPy buffer in one launch shape, as plain or as dependent launches."""

    def __init__(self, gpu: Gpu, shape: Shape, dependent: bool) -> None:
        self.shape = shape
        self._dependent = dependent
        self._function = launch.load(
            shape.kernel, kernel_source(shape), gpu.arch, gpu.index, "read_floor", shape.shared_bytes(gpu)
        )
        blocks_per_sm = min(shape.blocks_per_sm, self._function.blocks_per_sm(shape.threads))
        self._blocks = gpu.sm_count * blocks_per_sm

    def read(self, buffer: Any, stream: int) -> None:
        """Read all of ``buffer``, whose size is a multiple of 16 bytes."""
        assert buffer.nbytes % _WORD == 0
        chunks = -(-buffer.nbytes // self.shape.chunk_bytes)
        Args.packer.pack_into(_ARGUMENTS.data, 0, buffer.data.ptr, 0, buffer.nbytes // _WORD)
        blocks = min(self._blocks, chunks)
        self._function.launch(blocks, self.shape.threads, stream, _ARGUMENTS, self._dependent)

    def run(self, buffers: Sequence[Any], stream: Any) -> CupyRun:
        """A Run over copies of a buffer."""
        return CupyRun(stream, [functools.partial(self.read, buffer, int(stream.ptr)) for buffer in buffers], None)


def fastest(gpu: Gpu, buffers: Sequence[Any], stream: Any, time: Timer, dependent: bool) -> Reader:
    """The launch shape, of both kernels, that reads copies of this buffer in the least time."""
    readers = {str(shape): Reader(gpu, shape, dependent) for shape in CANDIDATES if shape.serves(gpu)}
    graphs = {name: prepare(reader.run(buffers, stream), time, _TRIAL) for name, reader in readers.items()}
    times = interleave(graphs, time, _TRIAL)
    return readers[min(times, key=lambda name: times[name].median)]
