"""More than a few rows of x on Hopper: wgmma on weights decoded in registers.

Twin of cuda_src/kernels/sm90_wgmma.cuh."""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.jit import launch, source, tensor_map
from marlin_cupy.kernels.problem import Plan, Problem
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.tensor import QuantizedTensor, Spec

#: struct Args of the twin: a tensor map, five pointers, a stride, eight ints.
_ARGS = struct.Struct("=128s5Qq8i56x")
_ARGUMENTS = launch.ArgumentBlock(_ARGS.size)
_ARCH = "sm_90a"
_WARPGROUP = 128
_RESERVED_SHARED = 1024  # the driver's share of each block
_REGISTERS = 65536  # of an SM
_PRODUCER_REGISTERS = 40  # per thread of the copying warpgroup
_BOX_K = 64  # K of a row of x in shared memory: 128 bytes, its swizzle's width


@dataclass(frozen=True)
class Config:
    """The tile of a block; printed as the C++ struct that the kernel takes.

    ``wgs_n`` warpgroups of ``row_blocks`` x 64 outputs each, ``wgs_k`` times over to split K, by ``tokens`` rows of x;
    ``stages`` slabs of K under way; ``cluster`` blocks share the K of a tile; ``blocks_per_sm`` are resident.
    """

    wgs_n: int
    wgs_k: int
    row_blocks: int
    tokens: int
    stages: int
    cluster: int
    blocks_per_sm: int = 1
    atoms: int = 1
    sets: int = 2

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply."""
        return self.wgs_n * self.wgs_k

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return _WARPGROUP * (self.consumers + 1)

    @property
    def rows(self) -> int:
        """Output columns (N) of a tile."""
        return SLAB_N * self.wgs_n * self.row_blocks

    @property
    def consumer_registers(self) -> int:
        """Registers per thread of the others: what the copying warpgroup leaves of those that the launch gets.

        More would wait for ever: a block trades registers within its own.
        """
        at_launch = min(_REGISTERS // (self.threads * self.blocks_per_sm) // 8 * 8, 248)
        left = at_launch * (self.consumers + 1) - _PRODUCER_REGISTERS
        return min(240, left // self.consumers // 8 * 8)

    def shared_bytes(self, layout: Layout) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same number."""
        stage = self.tokens * SLAB_K * 2 + self.rows // SLAB_N * 2 * layout.half_bytes
        shares = (self.wgs_k - 1 + self.cluster - 1) * self.rows * self.tokens * 4
        turn = self.consumers * 4 * 512
        return layout.format.table_bytes + self.stages * (stage + 16) + shares + turn + 16

    def cpp(self) -> str:
        """The C++ struct."""
        values = dataclasses.asdict(self)
        values |= {"producer_registers": _PRODUCER_REGISTERS, "consumer_registers": self.consumer_registers}
        fields = ", ".join(f"{name} = {value}" for name, value in values.items())
        return f"struct Config {{ static constexpr int {fields}; }};"

    def __str__(self) -> str:
        split = f", K in {self.wgs_k} in a block" if self.wgs_k > 1 else ""
        split += f" and {self.cluster} in a cluster" if self.cluster > 1 else ""
        return f"{self.rows} x {self.tokens} tile, {self.stages} stages, {self.consumers} warpgroups{split}"


@dataclass(frozen=True)
class Grid:
    """How many blocks (clusters) there are and how many tiles each computes alone before they share the rest."""

    blocks: int
    tiles: int
    tiles_m: int
    whole: int

    @property
    def shared_tiles(self) -> int:
        """Tiles that are put together from parts."""
        return max(0, self.tiles - self.whole * self.blocks)


def grid_of(config: Config, m: int, layout: Layout, gpu: Gpu, stripes: bool) -> Grid:
    """``stripes``: all SMs work, and share the last tiles; else every tile is computed by one block or cluster."""
    tiles_m = -(-m // config.tokens)
    tiles = tiles_m * -(-layout.packed_shape[0] * SLAB_N // config.rows)
    slots = gpu.sm_count * config.blocks_per_sm // config.cluster
    if config.cluster > 1:
        return Grid(tiles, tiles, tiles_m, 1)
    if not stripes:
        return Grid(min(tiles, slots), tiles, tiles_m, -(-tiles // slots))
    slots = min(slots, tiles * layout.packed_shape[1])
    return Grid(slots, tiles, tiles_m, tiles // slots)


@dataclass(frozen=True)
class WgmmaPlan(Plan):
    """Everything about a launch that does not depend on pointers."""

    function: launch.Function
    config: Config
    grid: Grid
    m: int
    dtype: str

    @staticmethod
    def make(config: Config, grid: Grid, problem: Problem) -> WgmmaPlan:
        """Compile and load ``config`` for ``problem``."""
        assert problem.gpu is not None
        function = launch.load(
            kernel_name(problem.spec, problem.dtype),
            kernel_source(problem.spec, problem.dtype, config),
            problem.gpu.arch,
            problem.gpu.index,
            "gemm",
            config.shared_bytes(problem.spec.layout),
        )
        return WgmmaPlan(function, config, grid, problem.M, problem.dtype)

    def __str__(self) -> str:
        return f"{self.config}; {self.grid.blocks * self.config.cluster} blocks over {self.grid.tiles} tiles"

    def multiply(
        self, framework: Framework, x: Any, w: QuantizedTensor, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """Enqueue on the current stream of ``framework``."""
        assert isinstance(framework, StreamFramework)
        K, N = w.shape
        y = framework.empty((*x.shape[:-1], N), framework.dtype(x), w.device) if out is None else out
        if self.m == 0:
            return y
        x_rows, y_rows = framework.rows(x), framework.rows(y)
        x_pointer, y_pointer = framework.pointer(x_rows), framework.pointer(y_rows)
        x_stride, y_stride = framework.strides(x_rows)[0], framework.strides(y_rows)[0]
        stream = framework.stream(w.device)
        partials, counters = 0, 0
        if self.grid.shared_tiles:
            floats = 2 * self.grid.blocks * self.config.rows * self.config.tokens
            scratch = framework.empty((floats,), "float32", w.device)
            partials = framework.pointer(scratch)
            counters = launch.counters(w.device.index).address(stream, self.grid.shared_tiles)
        slabs_n, slabs_k, _ = w.layout.packed_shape
        _ARGS.pack_into(
            _ARGUMENTS.data,
            0,
            tensor_map.of_matrix(x_pointer, self.dtype, (self.m, K), x_stride, (self.config.tokens, _BOX_K)),
            w.pointer,
            0 if bias is None else framework.pointer(bias),
            y_pointer,
            partials,
            counters,
            y_stride,
            self.m,
            N,
            slabs_n,
            slabs_k,
            self.grid.tiles_m,
            self.grid.tiles,
            self.grid.whole,
            y_pointer % 16 == 0 and (self.m == 1 or y_stride % 8 == 0),
        )
        self.function.launch(self.grid.blocks * self.config.cluster, self.config.threads, stream, _ARGUMENTS)
        return y


def kernel_source(spec: Spec, dtype: str, config: Config) -> str:
    """The complete CUDA source for a format, its granule, an activation dtype and a configuration."""
    return source.specialized("sm90_wgmma", spec, dtype, config.cpp(), config.shared_bytes(spec.layout))


def kernel_name(spec: Spec, dtype: str) -> str:
    """A readable file name for a compiled variant; the cache adds a hash."""
    return f"sm90_wgmma-{spec.format}-g{spec.layout.granule}-{dtype}"
