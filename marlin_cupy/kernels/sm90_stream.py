"""Few rows of x on Hopper: every warp streams weights on its own. Twin of cuda_src/kernels/sm90_stream.cuh."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.formats.integer import AsymmetricInteger, SymmetricInteger
from marlin_cupy.jit import launch
from marlin_cupy.kernels import copy_engine, measured
from marlin_cupy.kernels.arguments import Int, Int64, Struct, TensorMap, pointer
from marlin_cupy.kernels.costs import overlapped_us, read_us
from marlin_cupy.kernels.cuda import Block, CudaConfiguration, CudaPlan, ProductKernel, shared_budget
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.kernels.operands import Launcher, Rows, Stack, Weight
from marlin_cupy.kernels.operation import Candidate
from marlin_cupy.kernels.problem import Problem, refuses_operands
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.numerics import Rounding, subnormal_cut
from marlin_cupy.scalars import F16
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
class RowCosts:
    """The numbers of :func:`predicted_us` up to so many rows of x, and what to choose from.

    Attributes:
        launch_us: of a launch, up to the first slab and from the last one, without what follows.
        warp_us: by which each warp on an SM lengthens the launch.
        slab_us: that a warp needs for a slab, were it alone on its SM.
        crowd_us: by which each warp on an SM lengthens every slab.
        gap_us: between a tile and the next, were nothing under way meanwhile; a slot divides it.
        exchange_us: for the sum over a cluster at the end of a tile.
        shapes: of each cluster, blocks_per_sm and halves, those that fit and come first are offered.
    """

    launch_us: float
    warp_us: float
    slab_us: float
    crowd_us: float
    gap_us: float
    exchange_us: float
    shapes: tuple[Config, ...]


@dataclass(frozen=True)
class Costs:
    """The numbers that the files of kernels/measured hold.

    Attributes:
        half_slab: what half a slab takes of the time of a slab.
        beside_bytes: a dependent launch of a layer with more packed bytes takes all shared memory of its SMs, so that
            blocks of the next kernel start where blocks of this one have ended and not beside them, where they would
            compete for bandwidth. With fewer bytes they start at once.
    """

    half_slab: float
    beside_bytes: int
    up_to_8: RowCosts
    up_to_16: RowCosts

    def of_rows(self, m: int) -> RowCosts:
        """Those for M rows of x."""
        return self.up_to_8 if m <= _FEW else self.up_to_16


_NAME = "sm90_stream"
#: Shapes of a cluster, blocks per SM and halves to choose from: those that fit and come first.
_SHAPES_OFFERED = 3


def configs(m: int, layout: Layout, gpu: Gpu) -> list[Config]:
    """The configurations for M rows that are offered on ``gpu``."""
    offered: dict[tuple[int, int, int], list[Config]] = {}
    for each in fitting_shapes(m, layout, gpu, measured.of(gpu)):
        offered.setdefault((each.cluster, each.blocks_per_sm, each.halves), []).append(each)
    return [each for alike in offered.values() for each in alike[:_SHAPES_OFFERED]]


def fitting_shapes(m: int, layout: Layout, gpu: Gpu, known: Measured) -> list[Config]:
    """The configurations for M rows of ``known`` that fit on ``gpu``."""
    shapes = known.read(Costs, _NAME).of_rows(m).shapes
    return [each for each in shapes if each.shared_bytes(layout) <= shared_budget(gpu, each.blocks_per_sm)]


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


def predicted_us(config: Config, layout: Layout, gpu: Gpu, dtype: str, known: Measured) -> float:
    """The memory's time and that of the busiest warp, overlapped, and a launch.

    A warp waits for its copies, decodes and multiplies a slab at a time, so that its slabs make a chain; more warps on
    an SM hide more of each other's waiting than they take from each other.
    """
    slabs_n, slabs_k, slab_bytes = layout.packed_shape
    costs = known.read(Costs, _NAME)
    of_rows = costs.of_rows(config.tokens)
    slabs = math.ceil(slabs_k / (config.cluster * config.warps_k))
    slab_us = of_rows.slab_us + of_rows.crowd_us * config.warps_k * config.blocks_per_sm
    slab_us *= known.decode_factor(f"{_NAME}.up_to_{config.tokens}", layout, dtype)
    if config.halves == 1:
        slab_us *= costs.half_slab
    tiles_each = rounds(config, layout, gpu)
    busy_us = tiles_each * (slabs * slab_us + (of_rows.exchange_us if config.cluster > 1 else 0.0))
    busy_us += (tiles_each - 1) * of_rows.gap_us / config.slots
    launch_us = of_rows.launch_us + of_rows.warp_us * config.warps_k * config.blocks_per_sm
    return launch_us + overlapped_us(busy_us, read_us(slabs_n * slabs_k * slab_bytes, gpu, known))


def dependent_shared_bytes(config: Config, layout: Layout, gpu: Gpu) -> int:
    """Dynamic shared memory of a block in a dependent launch; see Costs.beside_bytes."""
    alone = math.prod(layout.packed_shape) > measured.of(gpu).read(Costs, _NAME).beside_bytes
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

    name = _NAME
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
        """Every configuration that is offered, with as few clusters as need no more rounds than all that fit."""
        assert problem.gpu is not None
        offered = configs(problem.M, problem.w.layout, problem.gpu)
        return self._rated(problem, measured.of(problem.gpu), offered)

    def rated(self, problem: Problem, known: Measured) -> list[Candidate]:
        """Every configuration that fits, with as many clusters."""
        assert problem.gpu is not None
        return self._rated(problem, known, fitting_shapes(problem.M, problem.w.layout, problem.gpu, known))

    def _rated(self, problem: Problem, known: Measured, configs: list[Config]) -> list[Candidate]:
        assert problem.gpu is not None
        layout, gpu = problem.w.layout, problem.gpu
        found = []
        for config in configs:
            streams = Streams(config, -(-tiles(config, layout) // rounds(config, layout, gpu)))
            found.append(Candidate(self.name, streams, predicted_us(config, layout, gpu, problem.x.dtype, known)))
        return found

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        for m in (_FEW, _MAX_M) if gpu.arch == _ARCH else ():
            for config in configs(m, spec.layout, gpu):
                yield self.source_of(spec, dtype, config)

    def rounding(self, problem: Problem) -> Rounding:
        """Integer codes of 4 bits and less are multiplied in float16 as subnormals."""
        format, dtype = problem.w.layout.format, problem.x.dtype
        are_nibbles = isinstance(format, SymmetricInteger | AsymmetricInteger) and format.bits <= 4
        cut = subnormal_cut(format.bits) if are_nibbles and dtype == F16.name else 0.0
        return Rounding(dtype, table=format.table is not None, cut=cut)


KERNEL = Sm90Stream()
