"""Few rows of x on Hopper: every warp streams weights on its own. Twin of cuda_src/kernels/sm90_stream.cuh."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.formats.scalars import HALF_DTYPES
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.costs import decode_factor, read_us
from marlin_cupy.kernels.operands import Rows, output
from marlin_cupy.kernels.problem import Candidate, Configuration, Kernel, Plan, Problem
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.tensor import QuantizedTensor, Spec

#: struct Args of the twin: four pointers, two strides, nine ints.
_ARGS = struct.Struct("=4Q2q9i4x")
_ARGUMENTS = launch.ArgumentBlock(_ARGS.size)
_ARCH = "sm_90a"
_MAX_M = 16
_FEW = 8  # rows of one token tile
_WARP = 32
_RESERVED_SHARED = 1024  # the driver's share of each block


@dataclass(frozen=True)
class Config:
    """The shape of a block; printed as the C++ struct that the kernel takes.

    ``warps_k`` warps each keep ``slots`` slabs, with the x that belongs to them, under way; ``cluster`` blocks share
    the K of a tile of 64 outputs and ``token_tiles`` x 8 tokens; ``blocks_per_sm`` of them are resident.
    """

    token_tiles: int
    warps_k: int
    slots: int
    cluster: int
    blocks_per_sm: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return _WARP * self.warps_k

    @property
    def tokens(self) -> int:
        """Rows of x (M) of a tile."""
        return 8 * self.token_tiles

    def shared_bytes(self, layout: Layout) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same number."""
        slot = 2 * layout.half_bytes + self.tokens * SLAB_K * 2 + 8
        exchange = self.warps_k * 8 * (SLAB_N + 4) * 4
        shares = 2 * self.tokens * SLAB_N * 4 if self.cluster > 1 else 0
        return layout.format.table_bytes + self.warps_k * self.slots * slot + exchange + shares

    def cpp(self) -> str:
        """The C++ struct."""
        fields = ", ".join(f"{name} = {value}" for name, value in dataclasses.asdict(self).items())
        return f"struct Config {{ static constexpr int {fields}; }};"

    def __str__(self) -> str:
        return f"{self.warps_k} warps with {self.slots} slabs under way each, clusters of {self.cluster} along K"


@dataclass(frozen=True)
class Costs:
    """Microseconds on an H200, int4 with group_size=128 and float16; see :func:`predicted_us`.

    Attributes:
        launch: of a launch, up to the first slab and from the last one.
        warp: by which each warp on the SM lengthens that.
        slab: that a warp needs for a slab, were it alone on its SM.
        crowd: by which each warp on the SM lengthens that.
        tile: for the sum over the warps at the end of a tile.
        exchange: for the sum over a cluster there.
    """

    launch: float
    warp: float
    slab: float
    crowd: float
    tile: float
    exchange: float


#: A dependent launch of a layer with more packed bytes takes all shared memory of its SMs, so that blocks of the next
#: kernel start where blocks of this one have ended and not beside them, where they would compete for bandwidth. With
#: fewer bytes they start at once. From a laboratory version of this kernel; not measured for this one.
_BESIDE_BYTES = 15 << 20


# Fitted to times of the shapes that are offered for int4 with group_size=128 on an H200, on the eight layers of
# bench.shapes.LLAMA, M = 1, 8 and 16, plain launches, cold weights, by a script that is not in the tree. Of those, what
# is predicted to be best takes longer than the best by 0.3 % on average and 3 % at worst up to M = 8, by 0.9 % and 7 %
# at M = 16; up to M = 8 by 0.9 % and 3 % than the best of all 12 shapes measured. Its time is predicted within 10 %.
#: By the largest M that they hold for.
COSTS = {
    8: Costs(launch=1.42, warp=0.055, slab=0.41, crowd=0.0726, tile=0.61, exchange=1.4),
    16: Costs(launch=1.0, warp=0.04, slab=0.413, crowd=0.1127, tile=1.23, exchange=1.52),
}
#: Per (largest M, cluster, blocks per SM): the (warps_k, slots) that are offered, so far as they fit.
_SHAPES = {
    (8, 1, 1): ((12, 2), (8, 3), (8, 2), (4, 3), (4, 2)),
    (8, 1, 2): ((6, 2), (4, 3), (4, 2), (2, 3), (2, 2)),
    (8, 2, 1): ((8, 3), (8, 2), (4, 3), (4, 2)),
    (16, 1, 1): ((12, 2), (8, 3), (8, 2), (4, 3), (4, 2)),
    (16, 1, 2): ((6, 2), (4, 3), (4, 2), (2, 3), (2, 2)),
    (16, 2, 1): ((8, 3), (8, 2), (4, 3), (4, 2)),
}
#: How many of them: those that fit and come first.
_SHAPES_OFFERED = 2


def _largest_m(m: int) -> int:
    return _FEW if m <= _FEW else _MAX_M


def configs(m: int, layout: Layout, gpu: Gpu) -> list[Config]:
    """The configurations for M rows that fit on ``gpu``."""
    found = []
    for (largest_m, cluster, blocks), shapes in _SHAPES.items():
        if largest_m == _largest_m(m):
            budget = min(gpu.shared_per_block, gpu.shared_per_sm // blocks - _RESERVED_SHARED)
            all_shapes = [Config(largest_m // 8, warps_k, slots, cluster, blocks) for warps_k, slots in shapes]
            found += [each for each in all_shapes if each.shared_bytes(layout) <= budget][:_SHAPES_OFFERED]
    return found


@dataclass(frozen=True)
class Streams(Configuration):
    """A block, and how many clusters of them share the tiles, all resident at once."""

    dependent: ClassVar[bool] = True

    config: Config
    clusters: int

    @property
    def key(self) -> str:
        """The numbers of the block, then the clusters."""
        return f"{'-'.join(map(str, dataclasses.astuple(self.config)))}/{self.clusters}"

    def __str__(self) -> str:
        exchange = "partial tiles are added in rank order" if self.config.cluster > 1 else "no tile is cut"
        return f"{self.config}; {self.clusters * self.config.cluster} blocks, {exchange}; dependent launch"


def rounds(config: Config, layout: Layout, gpu: Gpu) -> int:
    """Tiles that the busiest cluster computes one after the other."""
    return -(-layout.packed_shape[0] // (gpu.sm_count * config.blocks_per_sm // config.cluster))


def predicted_us(config: Config, layout: Layout, gpu: Gpu) -> float:
    """The memory's time or that of the busiest warp, whichever is longer, and a launch.

    A warp waits for its copies, decodes and multiplies a slab at a time, so that its slabs make a chain; more warps on
    an SM hide more of each other's waiting than they take from each other.
    """
    slabs_n, slabs_k, slab_bytes = layout.packed_shape
    costs = COSTS[config.tokens]
    slabs = math.ceil(slabs_k / (config.cluster * config.warps_k))
    slab = (costs.slab + costs.crowd * config.warps_k * config.blocks_per_sm) * decode_factor(layout)
    tile = slabs * slab + costs.tile + (costs.exchange if config.cluster > 1 else 0.0)
    launch_us = costs.launch + costs.warp * config.warps_k * config.blocks_per_sm
    return launch_us + max(rounds(config, layout, gpu) * tile, read_us(slabs_n * slabs_k * slab_bytes, gpu))


def all_shared_bytes(config: Config, gpu: Gpu) -> int:
    """Dynamic shared memory with which ``blocks_per_sm`` blocks leave none on an SM."""
    return min(gpu.shared_per_block, gpu.shared_per_sm // config.blocks_per_sm - _RESERVED_SHARED) // 128 * 128


def dependent_shared_bytes(config: Config, layout: Layout, gpu: Gpu) -> int:
    """Dynamic shared memory of a block in a dependent launch; see _BESIDE_BYTES."""
    alone = math.prod(layout.packed_shape) > _BESIDE_BYTES
    return all_shared_bytes(config, gpu) if alone else config.shared_bytes(layout)


@dataclass(frozen=True)
class StreamPlan(Plan):
    """Everything about a launch that does not depend on pointers."""

    function: launch.Function
    config: Config
    clusters: int
    m: int
    dependent_shared_bytes: int

    @staticmethod
    def make(streams: Streams, problem: Problem) -> StreamPlan:
        """Compile and load a configuration for ``problem``."""
        assert problem.gpu is not None
        function = launch.load(
            kernel_name(problem.spec, problem.dtype),
            kernel_source(problem.spec, problem.dtype, streams.config),
            problem.gpu.arch,
            problem.gpu.index,
            "gemm",
            streams.config.shared_bytes(problem.spec.layout),
            all_shared_bytes(streams.config, problem.gpu),
        )
        shared_bytes = dependent_shared_bytes(streams.config, problem.spec.layout, problem.gpu)
        return StreamPlan(function, streams.config, streams.clusters, problem.M, shared_bytes)

    def __str__(self) -> str:
        return str(Streams(self.config, self.clusters))

    def multiply(
        self, framework: Framework, x: Any, w: QuantizedTensor, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """Enqueue on the current stream of ``framework``."""
        assert isinstance(framework, StreamFramework)
        K, N = w.shape
        y = output(framework, x, w, out)
        if self.m == 0:
            return y
        x_rows, y_rows = Rows.of(framework, x, self.m), Rows.of(framework, y, self.m)
        slabs_n, slabs_k, _ = w.layout.packed_shape
        _ARGS.pack_into(
            _ARGUMENTS.data,
            0,
            w.pointer,
            x_rows.pointer,
            0 if bias is None else framework.pointer(bias),
            y_rows.pointer,
            x_rows.stride,
            y_rows.stride,
            self.m,
            N,
            K,
            slabs_n,
            slabs_k,
            -(-slabs_n // self.clusters),
            x_rows.start_at(16),
            y_rows.start_at(8),
            dependent,
        )
        blocks = self.clusters * self.config.cluster
        stream = framework.stream(w.device)
        if dependent:
            self.function.launch_dependent(
                w.writes, blocks, self.config.threads, stream, _ARGUMENTS, self.dependent_shared_bytes
            )
        else:
            self.function.launch(blocks, self.config.threads, stream, _ARGUMENTS)
        return y


def kernel_source(spec: Spec, dtype: str, config: Config) -> str:
    """The complete CUDA source for a format, its granule, an activation dtype and a configuration."""
    return source.specialized("sm90_stream", spec, dtype, config.cpp(), config.shared_bytes(spec.layout))


def kernel_name(spec: Spec, dtype: str) -> str:
    """A readable file name for a compiled variant; the cache adds a hash."""
    return f"sm90_stream-{spec.format}-g{spec.layout.granule}-{dtype}"


class Sm90Stream(Kernel):
    """Up to 16 rows on Hopper, every format and group size."""

    name = "sm90_stream"

    def refuses(self, problem: Problem) -> str | None:
        """Other GPUs, more rows."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if problem.gpu.arch != _ARCH:
            return f"is made for {_ARCH}, and {problem.gpu.name} is {problem.gpu.arch}"
        if problem.dtype not in HALF_DTYPES:
            return f"takes {' or '.join(HALF_DTYPES)} activations, not {problem.dtype}"
        if problem.M > _MAX_M:
            return f"takes up to {_MAX_M} rows, not {problem.M}"
        if problem.batch_invariant:
            return "adds up in an order that depends on M, and batch_invariant was asked for"
        if not configs(problem.M, problem.spec.layout, problem.gpu):
            return f"needs more shared memory than the {problem.gpu.shared_per_block} bytes of {problem.gpu.name}"
        return None

    def candidates(self, problem: Problem) -> list[Candidate]:
        """Every configuration that fits, with as few clusters as need no more rounds than all that can be resident."""
        assert problem.gpu is not None
        layout, gpu = problem.spec.layout, problem.gpu
        found = []
        for config in configs(problem.M, layout, gpu):
            clusters = -(-layout.packed_shape[0] // rounds(config, layout, gpu))
            found.append(Candidate(self.name, Streams(config, clusters), predicted_us(config, layout, gpu)))
        return found

    def source(self, problem: Problem, candidate: Candidate) -> tuple[str, str]:
        """(name, source) for its block."""
        assert isinstance(candidate.configuration, Streams)
        spec, dtype = problem.spec, problem.dtype
        return kernel_name(spec, dtype), kernel_source(spec, dtype, candidate.configuration.config)

    def plan(self, problem: Problem, candidate: Candidate) -> Plan:
        """Compile and load its block."""
        assert isinstance(candidate.configuration, Streams)
        return StreamPlan.make(candidate.configuration, problem)

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        for m in (_FEW, _MAX_M) if gpu.arch == _ARCH else ():
            for config in configs(m, spec.layout, gpu):
                yield kernel_name(spec, dtype), kernel_source(spec, dtype, config)


KERNEL = Sm90Stream()
