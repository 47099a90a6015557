"""More than a few rows of x on Hopper: wgmma on weights that are decoded into registers.

Twin of cuda_src/kernels/sm90_wgmma.cuh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.jit import launch
from marlin_cupy.kernels import copy_engine, measured
from marlin_cupy.kernels.arguments import Int, Int64, Struct, TensorMap, pointer
from marlin_cupy.kernels.costs import can_scale, overlapped_us, read_us, scaling_roundings
from marlin_cupy.kernels.cuda import Block, CudaConfiguration, CudaPlan, ProductKernel, shared_budget
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.kernels.operands import NO_EXCHANGE, Exchange, Launcher, Rows, Stack, Weight
from marlin_cupy.kernels.operation import Candidate
from marlin_cupy.kernels.problem import Problem, refuses_operands
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.numerics import Rounding
from marlin_cupy.scalars import F16
from marlin_cupy.spec import Spec

_ARCH = "sm_90a"
_WARPGROUP = 128
_REGISTERS = 65536  # of an SM
_PRODUCER_REGISTERS = 40  # per thread of the copying warpgroup
_LENT_BYTES = 16384  # what a cluster's blocks leave for the first one goes where its stages were if it is more


class Schedule(Struct, header="schedule/segments.cuh"):
    """Which block computes what: divided here, for divisions are slow and nothing can be copied before the first."""

    tiles: Int
    steps: Annotated[Int, "of K per tile"]
    blocks: Annotated[Int, "or clusters"]
    whole: Annotated[Int, "tiles that each block computes alone"]
    stretch: Annotated[Int, "steps of the line of shared tiles per block"]
    longer: Annotated[Int, "how many blocks have one more"]


class Args(Struct):
    """What the kernel is launched with."""

    x: Annotated[TensorMap, "boxes of 64 K x tokens"]
    weight: Annotated[int, pointer("const u8"), "packed slabs"]
    factors: Annotated[int, pointer("const float"), "of each output, see formats/codec.cuh"]
    bias: Annotated[int, pointer("const u16"), "or null"]
    y: Annotated[int, pointer("u16")]
    partials: Annotated[int, pointer("float"), "two tiles per block where blocks share tiles"]
    counters: Annotated[int, pointer("u32"), "one per shared tile, 0 before and after"]
    y_stride: Annotated[Int64, "elements between tokens"]
    M: Int
    N: Int
    slabs_n: Int
    tiles_m: Int
    tiles_n: Int
    y_vector: Annotated[Int, "rows of y start at multiples of 16 bytes"]
    schedule: Schedule
    stack: Stack


_pack, _ARGUMENTS = Args.packer.pack_into, launch.ArgumentBlock(Args.size)


@dataclass(frozen=True)
class Config(Block):
    """The tile of a block.

    ``wgs_n`` warpgroups of ``row_blocks`` x 64 outputs each, ``wgs_k`` times over to split K, by ``tokens`` rows of x;
    ``stages`` slabs of K under way; ``cluster`` blocks share the K of a tile.
    """

    wgs_n: int
    wgs_k: int
    row_blocks: int
    tokens: int
    stages: int
    cluster: int

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
    def launch_registers(self) -> int:
        """Registers per thread that the compiler gives a launch of so many threads."""
        return min(_REGISTERS // self.threads // 8 * 8, 248)

    @property
    def consumer_registers(self) -> int:
        """Registers per thread of the others: what the copying warpgroup leaves of those that the launch gets.

        More would wait for ever: a block trades registers within its own.
        """
        left = self.launch_registers * (self.consumers + 1) - _PRODUCER_REGISTERS
        return min(240, left // self.consumers // 8 * 8)

    def shared_bytes(self, layout: Layout) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same number."""
        stage = self.tokens * SLAB_K * 2 + self.rows // SLAB_N * 2 * layout.half_bytes
        share = self.rows * self.tokens * 4
        others = (self.cluster - 1) * share
        shares = (self.wgs_k - 1) * share + (others if others <= _LENT_BYTES else 0)
        turn = self.wgs_n * 2 * 16 * SLAB_N * 2
        return layout.format.table_bytes + self.stages * (stage + 16) + shares + turn + 16

    @property
    def constants(self) -> dict[str, int]:
        """The numbers and the registers that warpgroups trade."""
        registers = {"producer_registers": _PRODUCER_REGISTERS, "consumer_registers": self.consumer_registers}
        return self.numbers | registers | {"trades_registers": True}

    def __str__(self) -> str:
        split = [f"{self.wgs_k} groups of warps" if self.wgs_k > 1 else "", "2 blocks" if self.cluster > 1 else ""]
        shared = " and ".join(part for part in split if part)
        return (
            f"{self.rows} x {self.tokens} tile, {self.stages} slabs under way, {self.consumers} warpgroups decode"
            + (f", {shared} share its K" if shared else "")
            + ", weights are rounded to 16 bits after scaling"
        )


@dataclass(frozen=True)
class Untraded(Config):
    """The same tile in a block of which no warpgroup trades registers, and two warps copy: for tools, not for speed.

    compute-sanitizer gives a launch more registers per thread. Trading counts on those that the compiler gave: a
    warpgroup that asks for its share would wait for ever.
    """

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return _WARPGROUP * self.consumers + _WARPGROUP // 2

    @property
    def constants(self) -> dict[str, int]:
        """The numbers; the compiler divides the registers evenly."""
        return super().constants | {"trades_registers": False}


@dataclass(frozen=True)
class RatedConfig:
    """A tile and its speed: nanoseconds in which every block on an SM is through with a slab of K."""

    config: Config
    slab_ns: float


@dataclass(frozen=True)
class Costs:
    """The numbers of :func:`predicted_us`, which the files of kernels/measured explain, and the tiles."""

    launch_us: float
    tile_us: float
    cluster_us: float
    cluster_share_us: float
    stripe_us: float
    share_us: float
    stripe_slabs: float
    stripe_excess: float
    all_ns: float
    all_bytes_per_ns: float
    decode_ns: float
    wave_us: float
    tiles: tuple[RatedConfig, ...]


_NAME = "sm90_wgmma"
#: The sums of a tile that costs of sharing are of.
_SHARE_BYTES = 64 << 10
#: Candidates to choose from and to tune.
_OFFERED = 12
#: Rows of x that count alike when the split of K is chosen for batch_invariant: a few, some and many.
_INVARIANT_MS = (8, 64, 1024)


def fitted(config: Config, layout: Layout, gpu: Gpu) -> Config | None:
    """``config`` with as many stages as shared memory holds; None if a K group would have less than two."""
    for stages in range(config.stages // config.wgs_k * config.wgs_k, 2 * config.wgs_k - 1, -config.wgs_k):
        smaller = dataclasses.replace(config, stages=stages)
        if smaller.shared_bytes(layout) <= shared_budget(gpu):
            return smaller
    return None


def configs(layout: Layout, gpu: Gpu) -> list[RatedConfig]:
    """The tiles that fit on ``gpu``."""
    return fitting_tiles(layout, gpu, measured.of(gpu))


def fitting_tiles(layout: Layout, gpu: Gpu, known: Measured) -> list[RatedConfig]:
    """The tiles of ``known`` that fit on ``gpu``."""
    all_fitted = [(fitted(each.config, layout, gpu), each.slab_ns) for each in known.read(Costs, _NAME).tiles]
    return [RatedConfig(config, slab_ns) for config, slab_ns in all_fitted if config is not None]


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


@dataclass(frozen=True)
class Tiling(CudaConfiguration):
    """A tile, and the blocks that share the tiles."""

    dependent: ClassVar[bool] = True

    config: Config
    grid: Grid

    @property
    def exchange_floats(self) -> int:
        """Two tiles of each block, where some tile is shared."""
        return 2 * self.grid.blocks * self.config.rows * self.config.tokens if self.grid.shared_tiles else 0

    @property
    def key(self) -> str:
        """The numbers of the tile, then the blocks and the tiles that each computes alone."""
        return f"{self.config.key}/{self.grid.blocks}x{self.grid.whole}"

    def __str__(self) -> str:
        blocks = f"{self.grid.blocks * self.config.cluster} blocks over {self.grid.tiles} tiles"
        if self.grid.shared_tiles:
            blocks += f", partial tiles of {self.grid.shared_tiles} are added in block order"
        elif self.config.cluster > 1:
            blocks += ", partial tiles are added in rank order"
        else:
            blocks += ", no tile is cut"
        return f"{self.config}; {blocks}; dependent launch"


def slots(config: Config, gpu: Gpu) -> int:
    """Blocks (clusters) that are resident at once."""
    return gpu.sm_count // config.cluster


def grid_of(config: Config, m: int, layout: Layout, gpu: Gpu, stripes: bool) -> Grid:
    """``stripes``: all SMs work, and share the last tiles; else every tile is computed by one block or cluster.

    Blocks that share tiles get a slab or more each: where few tiles are left over, a round of whole ones is shared too.
    """
    tiles_m = -(-m // config.tokens)
    tiles = tiles_m * -(-layout.packed_shape[0] * SLAB_N // config.rows)
    if config.cluster > 1:
        return Grid(tiles, tiles, tiles_m, 1)
    most = slots(config, gpu)
    if not stripes:
        return Grid(min(tiles, most), tiles, tiles_m, -(-tiles // most))
    slabs_k = layout.packed_shape[1]
    most = min(most, tiles * slabs_k)
    whole = tiles // most
    if 0 < (tiles - whole * most) * slabs_k < most:
        whole -= 1  # too little is left for all: a round of tiles more
    return Grid(most, tiles, tiles_m, whole)


def invariant_grid(config: Config, m: int, layout: Layout, gpu: Gpu) -> Grid:
    """Whole tiles; and where the K groups of a block take turns, a block for each, whose turns start at slab 0."""
    whole = grid_of(config, m, layout, gpu, stripes=False)
    return whole if config.wgs_k == 1 else Grid(whole.tiles, whole.tiles, whole.tiles_m, 1)


def predicted_us(rated: RatedConfig, grid: Grid, layout: Layout, gpu: Gpu, dtype: str, known: Measured) -> float:
    """Launch, and the longest of what holds a launch up, somewhat more where they are close.

    What the busiest block does: as long for each slab, whether the tensor cores, decoding or the memory hold it up,
    something at the end of each tile, and an exchange for tiles that are put together. Reading the weight from memory.
    What all SMs together can multiply and read, where all of them work: less than an SM alone times their number.
    """
    config, costs = rated.config, known.read(Costs, _NAME)
    slabs_n, slabs_k, slab_bytes = layout.packed_shape
    longer = known.decode_factor(_NAME, layout, dtype) - 1
    slab_us = (rated.slab_ns + longer * costs.decode_ns * config.rows / SLAB_N) / 1000
    share = config.rows * config.tokens * 4 / _SHARE_BYTES
    waves = -(-(grid.tiles - grid.shared_tiles) // min(grid.blocks, slots(config, gpu)))
    busy_us = waves * (slabs_k / config.cluster * slab_us + costs.tile_us)
    if grid.blocks > slots(config, gpu):
        busy_us += (waves - 1) * costs.wave_us
    if config.cluster > 1:
        busy_us += costs.cluster_us + costs.cluster_share_us * share
    all_us = grid.tiles * slabs_k * share * costs.all_ns / 1000 * (known.gpu.sm_count / gpu.sm_count)
    if grid.shared_tiles:
        stretch = grid.shared_tiles * slabs_k / grid.blocks + costs.stripe_slabs
        shares = max(2, -(-grid.blocks // grid.shared_tiles))
        busy_us += stretch * slab_us + costs.tile_us + costs.stripe_us + shares * costs.share_us * share
        busy_us *= costs.stripe_excess
        all_us *= costs.stripe_excess
    moved = config.tokens * SLAB_K * 2 + config.rows // SLAB_N * slab_bytes
    moved_us = grid.tiles * slabs_k * moved / costs.all_bytes_per_ns / 1000 * (known.gpu.sm_count / gpu.sm_count)
    memory_us = read_us(slabs_n * slabs_k * slab_bytes, gpu, known)
    return costs.launch_us + overlapped_us(busy_us, memory_us, all_us, moved_us)


def options(m: int, layout: Layout, gpu: Gpu, dtype: str, known: Measured) -> list[tuple[float, Tiling]]:
    """(predicted microseconds, tile and grid) of all tiles, whole and with stripes; the best first."""
    found = []
    for rated in fitting_tiles(layout, gpu, known):
        for grid in dict.fromkeys(grid_of(rated.config, m, layout, gpu, stripes) for stripes in (False, True)):
            found.append((predicted_us(rated, grid, layout, gpu, dtype, known), Tiling(rated.config, grid)))
    return sorted(found, key=lambda option: option[0])


def invariant_options(
    m: int, layout: Layout, gpu: Gpu, dtype: str, split: tuple[int, int]
) -> list[tuple[float, Tiling]]:
    """As :func:`options`, of those whose rows have the bits that (K groups, cluster) ``split`` gives at any M.

    No tile is cut, the parts of K are added in the same order, and in each of them slab after slab. That the number of
    tokens in a tile, or the place of a row in it, does not change how wgmma adds is assumed; the GPU tests compare.
    """
    found = []
    for rated in configs(layout, gpu):
        if (rated.config.wgs_k, rated.config.cluster) == split:
            grid = invariant_grid(rated.config, m, layout, gpu)
            found.append((predicted_us(rated, grid, layout, gpu, dtype, measured.of(gpu)), Tiling(rated.config, grid)))
    return sorted(found, key=lambda option: option[0])


@functools.lru_cache(maxsize=1024)
def invariant_split(layout: Layout, gpu: Gpu) -> tuple[int, int]:
    """(K groups, cluster) for a layer at any M and dtype: the least product of the times for few, some, many rows."""

    def cost(split: tuple[int, int]) -> float:
        product = 1.0
        for m in _INVARIANT_MS:
            product *= invariant_options(m, layout, gpu, F16.name, split)[0][0]
        return product

    return min(dict.fromkeys((each.config.wgs_k, each.config.cluster) for each in configs(layout, gpu)), key=cost)


class WgmmaPlan(CudaPlan[Tiling]):
    """Plain and dependent launches."""

    def __init__(self, function: launch.Function, configuration: Tiling, problem: Problem) -> None:
        super().__init__(function, configuration, problem)
        grid, (slabs_n, slabs_k, _) = configuration.grid, self.layout.packed_shape
        self._blocks, self._shared_tiles = grid.blocks * configuration.config.cluster, grid.shared_tiles
        self._floats = configuration.exchange_floats
        self._map_of = copy_engine.maps(problem, configuration.config.tokens)
        self._sizes = problem.M, self.layout.N, slabs_n, grid.tiles_m, grid.tiles // grid.tiles_m
        shared_steps = divmod(grid.shared_tiles * slabs_k, grid.blocks)
        self._schedule = grid.tiles, slabs_k, grid.blocks, grid.whole, *shared_steps

    def enqueue(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch."""
        stream, exchange = launcher.stream(w.device), NO_EXCHANGE
        if self._shared_tiles:
            exchange = Exchange.of(launcher, w.device, stream, self._floats, self._shared_tiles)
        _pack(
            _ARGUMENTS.data,
            0,
            self._map_of(x.pointer, x.stride),
            w.pointer,
            w.factors_pointer,
            bias,
            y.pointer,
            exchange.partials,
            exchange.counters,
            y.stride,
            *self._sizes,
            y.start_at(16),
            *self._schedule,
            w.layer_pointer,
            self.layers,
        )
        if dependent:
            self.function.launch_dependent(w.writes, self._blocks, self.threads, stream, _ARGUMENTS)
        else:
            self.function.launch(self._blocks, self.threads, stream, _ARGUMENTS)


def _refuses_any_shape(spec: Spec, dtype: str, gpu: Gpu) -> str | None:
    if gpu.arch != _ARCH:
        return f"is made for {_ARCH}, and {gpu.name} is {gpu.arch}"
    if not can_scale(spec, dtype):
        return (
            f"multiplies weights by their scale in the activations' type, and {dtype} would round {spec.scale_dtype} "
            f"scales too much"
        )
    if not configs(spec.layout, gpu):
        return f"needs more shared memory than the {gpu.shared_per_block} bytes of {gpu.name}"
    return None


class Sm90Wgmma(ProductKernel):
    """Any number of rows on Hopper, every format and group size; the only one on a GPU that can be batch invariant."""

    name = _NAME
    made_for = _ARCH
    arguments = Args
    plan_type = WgmmaPlan

    def refuses(self, problem: Problem) -> str | None:
        """Other GPUs, bfloat16 x with float16 scales, rows of x that the copy engine cannot step through."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        return (
            refuses_operands(problem)
            or _refuses_any_shape(problem.w, problem.x.dtype, problem.gpu)
            or copy_engine.refuses(problem)
        )

    def candidates(self, problem: Problem) -> list[Candidate]:
        """The tiles and grids with the least predicted times; with batch_invariant those of one split of K."""
        assert problem.gpu is not None
        m, layout, gpu = max(problem.M, 1), problem.w.layout, problem.gpu
        if problem.batch_invariant:
            found = invariant_options(m, layout, gpu, problem.x.dtype, invariant_split(layout, gpu))
        else:
            found = options(m, layout, gpu, problem.x.dtype, measured.of(gpu))
        return [Candidate(self.name, tiling, us) for us, tiling in found[:_OFFERED]]

    def rated(self, problem: Problem, known: Measured) -> list[Candidate]:
        """All tiles that fit, whole and with stripes."""
        assert problem.gpu is not None
        found = options(max(problem.M, 1), problem.w.layout, problem.gpu, problem.x.dtype, known)
        return [Candidate(self.name, tiling, us) for us, tiling in found]

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        if _refuses_any_shape(spec, dtype, gpu) is None:
            for rated in configs(spec.layout, gpu):
                yield self.source_of(spec, dtype, rated.config)

    def rounding(self, problem: Problem) -> Rounding:
        """Weights are rounded after scaling."""
        w, dtype = problem.w, problem.x.dtype
        return Rounding(dtype, w.layout.format.table is not None, scaling_roundings(w, dtype))


KERNEL = Sm90Wgmma()
