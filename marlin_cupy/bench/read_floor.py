"""The read floor: how long the GPU takes to do no more than read a weight. Twin of cuda_src/kernels/read_floor.cuh."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from marlin_cupy.device import Gpu
from marlin_cupy.jit import launch, source
from marlin_cupy.timing import CupyRun, Sampling, Timer, interleave, prepare

#: struct Args of the twin: two pointers, a count.
_ARGS = struct.Struct("=2Qq")
_ARGUMENTS = launch.ArgumentBlock(_ARGS.size)
_WORD = 16
#: Enough to rank launch shapes.
_TRIAL = Sampling(sample_ms=2.0, samples=5, warmup_rounds=1)


class LaunchShape(NamedTuple):
    """Bytes under way on an SM: 16 * loads * threads * blocks_per_sm. Small buffers want few, large ones many."""

    threads: int
    loads: int
    blocks_per_sm: int

    def __str__(self) -> str:
        return f"{self.blocks_per_sm} x {self.threads} threads per SM, {self.loads} loads each"


CANDIDATES = (
    LaunchShape(256, 4, 4),
    LaunchShape(256, 4, 8),
    LaunchShape(256, 8, 4),
    LaunchShape(512, 4, 4),
    LaunchShape(512, 8, 2),
    LaunchShape(1024, 4, 1),
    LaunchShape(1024, 4, 2),
)


def kernel_source(shape: LaunchShape) -> str:
    """The complete CUDA source."""
    constants = f"constexpr int THREADS = {shape.threads}, LOADS = {shape.loads};"
    return source.inline(f'{constants}\n#include "kernels/read_floor.cuh"')


class Reader:
    """Enqueues the read of a CuPy buffer in one launch shape."""

    def __init__(self, gpu: Gpu, shape: LaunchShape) -> None:
        self.shape = shape
        self._function = launch.load("read_floor", kernel_source(shape), gpu.arch, gpu.index, "read_floor", 0)
        blocks_per_sm = min(shape.blocks_per_sm, self._function.blocks_per_sm(shape.threads))
        self._blocks = gpu.sm_count * blocks_per_sm

    def read(self, buffer: Any, stream: int) -> None:
        """Read all of ``buffer``, whose size is a multiple of 16 bytes."""
        assert buffer.nbytes % _WORD == 0
        chunks = -(-buffer.nbytes // (_WORD * self.shape.threads * self.shape.loads))
        _ARGS.pack_into(_ARGUMENTS.data, 0, buffer.data.ptr, 0, buffer.nbytes // _WORD)
        self._function.launch(min(self._blocks, chunks), self.shape.threads, stream, _ARGUMENTS)

    def run(self, buffers: Sequence[Any], stream: Any) -> CupyRun:
        """A Run over copies of a buffer."""
        return CupyRun(stream, [functools.partial(self.read, buffer, int(stream.ptr)) for buffer in buffers], None)


def fastest(gpu: Gpu, buffers: Sequence[Any], stream: Any, time: Timer) -> Reader:
    """The launch shape that reads copies of this buffer in the least time."""
    readers = {str(shape): Reader(gpu, shape) for shape in CANDIDATES}
    graphs = {name: prepare(reader.run(buffers, stream), time, _TRIAL) for name, reader in readers.items()}
    times = interleave(graphs, time, _TRIAL)
    return readers[min(times, key=lambda name: times[name].median)]
