"""Few rows of x on Hopper: every warp streams weights on its own. Twin of cuda_src/kernels/sm90_stream.cuh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.jit import launch
from marlin_cupy.kernels import copy_engine
from marlin_cupy.kernels.arguments import Int, Int64, Struct, TensorMap, pointer
from marlin_cupy.kernels.costs import DecodeFactors, overlapped_us, read_us
from marlin_cupy.kernels.cuda import Block, CudaConfiguration, CudaPlan, ProductKernel, shared_budget
from marlin_cupy.kernels.operands import Launcher, Rows, Stack, Weight
from marlin_cupy.kernels.operation import Candidate
from marlin_cupy.kernels.problem import Problem, refuses_operands
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.spec import Spec

_ARCH = "sm_90a"
_MAX_M = 16
_FEW = 8  # rows of one token tile
_WARP = 32


class Args(Struct):
    """What the kernel is launched with."""

    x: Annotated[TensorMap, "boxes of 64 K x M"]
    weight: Annotated[int, pointer("const u8"), "packed slabs"]
    bias: Annotated[int, pointer("const u16"), "or null"]
    y: Annotated[int, pointer("u16")]
    y_stride: Annotated[Int64, "elements between tokens"]
    M: Int
    N: Int
    tiles_n: Int
    slabs_k: Int
    rounds: Annotated[Int, "tiles of the busiest cluster"]
    y_vector: Annotated[Int, "token rows of y start at multiples of 8 bytes"]
    dependent: Annotated[Int, "a kernel ahead may still run"]
    stack: Stack
    output_scales: Annotated[int, pointer("const float"), "of formats that have them"]


_pack, _ARGUMENTS = Args.packer.pack_into, launch.ArgumentBlock(Args.size)


@dataclass(frozen=True)
class Config(Block):
    """The shape of a block.

    ``warps_k`` warps each keep ``slots`` slabs, with the x that belongs to them, under way; ``cluster`` blocks share
    the K of a tile of ``halves`` x 32 outputs and ``token_tiles`` x 8 tokens; ``blocks_per_sm`` of them are resident.
    """

    token_tiles: int
    warps_k: int
    slots: int
    cluster: int
    blocks_per_sm: int
    halves: int = 2

    @property
    def rows(self) -> int:
        """Output columns (N) of a tile."""
        return SLAB_N // 2 * self.halves

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
        slot = self.halves * layout.half_bytes + self.tokens * SLAB_K * 2 + 8
        exchange = self.warps_k * 8 * (self.rows + 4) * 4
        shares = 2 * self.tokens * self.rows * 4 if self.cluster > 1 else 0
        return layout.format.table_bytes + self.warps_k * self.slots * slot + exchange + shares

    def most_shared_bytes(self, gpu: Gpu) -> int:
        """What ``blocks_per_sm`` blocks take that leave none on an SM."""
        return shared_budget(gpu, self.blocks_per_sm) // 128 * 128

    def __str__(self) -> str:
        slabs = "slabs" if self.halves == 2 else "half slabs"
        return f"{self.warps_k} warps with {self.slots} {slabs} under way each, clusters of {self.cluster} along K"


@dataclass(frozen=True)
class Costs:
    """Microseconds on an H200, int4 with group_size=128 and float16; see :func:`predicted_us`.

    Attributes:
        launch: of a launch, up to the first slab and from the last one, without what follows.
        warp: by which each warp on an SM lengthens the launch.
        slab: that a warp needs for a slab, were it alone on its SM.
        crowd: by which each warp on an SM lengthens every slab.
        gap: between a tile and the next, were nothing under way meanwhile; a slot divides it.
        exchange: for the sum over a cluster at the end of a tile.
    """

    launch: float
    warp: float
    slab: float
    crowd: float
    gap: float
    exchange: float


#: A dependent launch of a layer with more packed bytes takes all shared memory of its SMs, so that blocks of the next
#: kernel start where blocks of this one have ended and not beside them, where they would compete for bandwidth. With
#: fewer bytes they start at once. From a laboratory version of this kernel; not measured for this one.
_BESIDE_BYTES = 15 << 20


# Fitted to times of the shapes that are offered, and of more, for int4 with group_size=128 on an H200: ten layers, the
# eight of bench.shapes.LLAMA and (K, N) = (5120, 13824) and (7168, 18432), M = 1, 2, 4, 8, 12 and 16, plain launches,
# cold weights, the shapes of a cell in turns, by a script that is not in the tree. Of those that are offered, what is
# predicted to be best takes longer than the best by 0.6 % on average and 3.4 % at worst up to M = 8, by 0.3 % and 2 %
# at M = 12 and 16. Its time is predicted within 7 %.
#: By the largest M that they hold for.
COSTS = {
    8: Costs(launch=2.59, warp=0.0192, slab=0.2237, crowd=0.0521, gap=1.36, exchange=1.05),
    16: Costs(launch=2.55, warp=0.037, slab=0.274, crowd=0.0946, gap=1.81, exchange=0.75),
}
#: By the largest M too; fitted to six of these layers, M = 1, 8 and 16; int8's for bfloat16 at 16 to two of them.
_DECODE = {
    8: DecodeFactors({"int4": (1.0, 1.24), "uint4": (1.0, 1.24), "nf4": (1.8, 1.8), "int8": (1.16, 1.16)}, fine=1.24),
    16: DecodeFactors({"int4": (1.0, 1.1), "uint4": (1.0, 1.1), "nf4": (1.35, 1.35), "int8": (1.08, 1.24)}, fine=1.32),
}
#: What half a slab takes of the time of a slab.
_HALF = 0.59
#: Per (largest M, cluster, blocks per SM, halves): the (warps_k, slots) that are offered, so far as they fit.
_SHAPES = {
    (8, 1, 1, 2): ((8, 2), (8, 3), (12, 2), (4, 3), (4, 2)),
    (8, 1, 2, 2): ((4, 2), (6, 2), (4, 3), (2, 3), (2, 2)),
    (8, 2, 1, 2): ((8, 2), (8, 3), (4, 3), (4, 2)),
    (8, 1, 1, 1): ((8, 2), (12, 3), (16, 2), (4, 3), (4, 2)),
    (8, 2, 1, 1): ((8, 2), (8, 3)),
    (16, 1, 1, 2): ((8, 2), (12, 2), (8, 3), (4, 3), (4, 2)),
    (16, 1, 2, 2): ((4, 2), (6, 2), (4, 3), (2, 3), (2, 2)),
    (16, 2, 1, 2): ((8, 2), (8, 3), (4, 3), (4, 2)),
    (16, 1, 1, 1): ((8, 2), (12, 2), (8, 3), (4, 3), (4, 2)),
    (16, 2, 1, 1): ((8, 2), (8, 3)),
}
#: How many of them: those that fit and come first.
_SHAPES_OFFERED = 3


def _largest_m(m: int) -> int:
    return _FEW if m <= _FEW else _MAX_M


def configs(m: int, layout: Layout, gpu: Gpu) -> list[Config]:
    """The configurations for M rows that fit on ``gpu``."""
    found = []
    for (largest_m, cluster, blocks, halves), shapes in _SHAPES.items():
        if largest_m == _largest_m(m):
            all_shapes = [Config(largest_m // 8, warps_k, slots, cluster, blocks, halves) for warps_k, slots in shapes]
            found += [each for each in all_shapes if each.shared_bytes(layout) <= shared_budget(gpu, blocks)][
                :_SHAPES_OFFERED
            ]
    return found


@dataclass(frozen=True)
class Streams(CudaConfiguration):
    """A block, and how many clusters of them share the tiles, all resident at once."""

    dependent: ClassVar[bool] = True

    config: Config
    clusters: int

    @property
    def key(self) -> str:
        """The numbers of the block, then the clusters."""
        return f"{self.config.key}/{self.clusters}"

    def __str__(self) -> str:
        exchange = "partial tiles are added in rank order" if self.config.cluster > 1 else "no tile is cut"
        return f"{self.config}; {self.clusters * self.config.cluster} blocks, {exchange}; dependent launch"


def tiles(config: Config, layout: Layout) -> int:
    """Tiles of a launch."""
    return layout.packed_shape[0] * 2 // config.halves


def rounds(config: Config, layout: Layout, gpu: Gpu) -> int:
    """Tiles that the busiest cluster computes one after the other."""
    return -(-tiles(config, layout) // (gpu.sm_count * config.blocks_per_sm // config.cluster))


def predicted_us(config: Config, layout: Layout, gpu: Gpu, dtype: str) -> float:
    """The memory's time and that of the busiest warp, overlapped, and a launch.

    A warp waits for its copies, decodes and multiplies a slab at a time, so that its slabs make a chain; more warps on
    an SM hide more of each other's waiting than they take from each other.
    """
    slabs_n, slabs_k, slab_bytes = layout.packed_shape
    costs = COSTS[config.tokens]
    slabs = math.ceil(slabs_k / (config.cluster * config.warps_k))
    slab = (costs.slab + costs.crowd * config.warps_k * config.blocks_per_sm) * _DECODE[config.tokens](layout, dtype)
    if config.halves == 1:
        slab *= _HALF
    tiles_each = rounds(config, layout, gpu)
    busy_us = tiles_each * (slabs * slab + (costs.exchange if config.cluster > 1 else 0.0))
    busy_us += (tiles_each - 1) * costs.gap / config.slots
    launch_us = costs.launch + costs.warp * config.warps_k * config.blocks_per_sm
    return launch_us + overlapped_us(busy_us, read_us(slabs_n * slabs_k * slab_bytes, gpu))


def dependent_shared_bytes(config: Config, layout: Layout, gpu: Gpu) -> int:
    """Dynamic shared memory of a block in a dependent launch; see _BESIDE_BYTES."""
    alone = math.prod(layout.packed_shape) > _BESIDE_BYTES
    return config.most_shared_bytes(gpu) if alone else config.shared_bytes(layout)


class StreamPlan(CudaPlan[Streams]):
    """Plain and dependent launches."""

    def __init__(self, function: launch.Function, configuration: Streams, problem: Problem) -> None:
        assert problem.gpu is not None
        super().__init__(function, configuration, problem)
        config, clusters = configuration.config, configuration.clusters
        all_tiles = tiles(config, self.layout)
        self._blocks = clusters * config.cluster
        self._dependent_bytes = dependent_shared_bytes(config, self.layout, problem.gpu)
        self._map_of = copy_engine.maps(problem, problem.M)
        self._sizes = problem.M, self.layout.N, all_tiles, self.layout.packed_shape[1], -(-all_tiles // clusters)

    def enqueue(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch."""
        _pack(
            _ARGUMENTS.data,
            0,
            self._map_of(x.pointer, x.stride),
            w.pointer,
            bias,
            y.pointer,
            y.stride,
            *self._sizes,
            y.start_at(8),
            dependent,
            w.layer_pointer,
            self.layers,
            w.factors_pointer,
        )
        stream = launcher.stream(w.device)
        if dependent:
            self.function.launch_dependent(
                w.writes, self._blocks, self.threads, stream, _ARGUMENTS, self._dependent_bytes
            )
        else:
            self.function.launch(self._blocks, self.threads, stream, _ARGUMENTS)


class Sm90Stream(ProductKernel):
    """Up to 16 rows on Hopper, every format and group size."""

    name = "sm90_stream"
    made_for = _ARCH
    arguments = Args
    plan_type = StreamPlan

    def refuses(self, problem: Problem) -> str | None:
        """Other GPUs, more rows, rows of x that the copy engine cannot step through."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if problem.gpu.arch != _ARCH:
            return f"is made for {_ARCH}, and {problem.gpu.name} is {problem.gpu.arch}"
        if (reason := refuses_operands(problem)) is not None:
            return reason
        if problem.M > _MAX_M:
            return f"takes up to {_MAX_M} rows, not {problem.M}"
        if problem.batch_invariant:
            return "adds up in an order that depends on M, and batch_invariant was asked for"
        if not configs(problem.M, problem.w.layout, problem.gpu):
            return f"needs more shared memory than the {problem.gpu.shared_per_block} bytes of {problem.gpu.name}"
        return copy_engine.refuses(problem)

    def candidates(self, problem: Problem) -> list[Candidate]:
        """Every configuration that fits, with as few clusters as need no more rounds than all that can be resident."""
        assert problem.gpu is not None
        layout, gpu = problem.w.layout, problem.gpu
        found = []
        for config in configs(problem.M, layout, gpu):
            clusters = -(-tiles(config, layout) // rounds(config, layout, gpu))
            found.append(
                Candidate(self.name, Streams(config, clusters), predicted_us(config, layout, gpu, problem.x.dtype))
            )
        return found

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        for m in (_FEW, _MAX_M) if gpu.arch == _ARCH else ():
            for config in configs(m, spec.layout, gpu):
                yield self.source_of(spec, dtype, config)


KERNEL = Sm90Stream()
