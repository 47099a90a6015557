"""The portable GEMM: mma.sync and cp.async on every GPU from Ampere on. Twin of cuda_src/kernels/sm80_gemm.cuh."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from marlin_cupy.device import Gpu
from marlin_cupy.jit import launch
from marlin_cupy.kernels import measured
from marlin_cupy.kernels.arguments import Int, Int64, Struct, pointer
from marlin_cupy.kernels.costs import can_scale, read_us, scaling_roundings
from marlin_cupy.kernels.cuda import Block, CudaConfiguration, CudaPlan, ProductKernel, shared_budget
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.kernels.operands import NO_EXCHANGE, Exchange, Launcher, Rows, Stack, Weight
from marlin_cupy.kernels.operation import Candidate
from marlin_cupy.kernels.problem import Problem, refuses_operands
from marlin_cupy.layout import HALF_N, SLAB_K, SLAB_N, Layout
from marlin_cupy.numerics import Rounding
from marlin_cupy.spec import Spec

_MIN_ARCH = 80
_WARP = 32


class Args(Struct):
    """What the kernel is launched with."""

    weight: Annotated[int, pointer("const u8"), "packed slabs"]
    factors: Annotated[int, pointer("const float"), "of each output, see formats/codec.cuh"]
    x: Annotated[int, pointer("const u16")]
    bias: Annotated[int, pointer("const u16"), "or null"]
    y: Annotated[int, pointer("u16")]
    partials: Annotated[int, pointer("float"), "two tiles per block where stripes cut tiles"]
    counters: Annotated[int, pointer("u32"), "one per tile, 0 before and after"]
    x_stride: Annotated[Int64, "elements between tokens"]
    y_stride: Annotated[Int64, "elements between tokens"]
    M: Int
    N: Int
    K: Int
    slabs_n: Int
    slabs_k: Int
    tiles_m: Annotated[Int, "token tiles; row tiles follow from the grid"]
    tiles: Annotated[Int, "all output tiles"]
    x_vector: Annotated[Int, "token rows start at multiples of 16 bytes"]
    y_vector: Annotated[Int, "token rows start at multiples of 8 bytes"]
    stack: Stack


_pack, _ARGUMENTS = Args.packer.pack_into, launch.ArgumentBlock(Args.size)


@dataclass(frozen=True)
class Config(Block):
    """The tile of a block.

    A block of ``warps_n * warps_m * warps_k`` warps computes ``rows`` outputs x ``tokens``; a warp owns
    ``row_atoms`` x 16 rows, ``token_tiles`` x 8 tokens and ``k_atoms`` x 16 of each K step. With ``scale_weights`` a
    weight is multiplied by its scale while it is decoded, which rounds it once more and takes fewer registers.
    """

    row_atoms: int
    token_tiles: int
    warps_n: int
    warps_m: int
    warps_k: int
    k_atoms: int
    stages: int
    blocks_per_sm: int
    scale_weights: bool = False

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return _WARP * self.warps_n * self.warps_m * self.warps_k

    @property
    def rows(self) -> int:
        """Output columns (N) of a tile."""
        return 16 * self.row_atoms * self.warps_n

    @property
    def tokens(self) -> int:
        """Rows of x (M) of a tile."""
        return 8 * self.token_tiles * self.warps_m

    @property
    def k(self) -> int:
        """K of a step."""
        return 16 * self.k_atoms * self.warps_k

    def shared_bytes(self, layout: Layout) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same number."""
        weights = self.rows // HALF_N * (self.k // SLAB_K) * layout.half_bytes
        exchange = self.warps_k * 8 * self.warps_m * (self.rows + 4) * 4
        return layout.format.table_bytes + self.stages * (weights + self.tokens * self.k * 2) + exchange

    def __str__(self) -> str:
        rounds = ", weights are rounded to 16 bits after scaling" if self.scale_weights else ""
        return (
            f"{self.rows} x {self.tokens} tile, K step {self.k}, {self.stages} stages, {self.threads} threads{rounds}"
        )


@dataclass(frozen=True)
class RatedConfig:
    """A tile and its speed where it has all the work it wants: nanoseconds that one SM takes per slab."""

    config: Config
    slab_ns: float


@dataclass(frozen=True)
class Tiles:
    """What to choose from for up to ``up_to`` rows of x; the last serves more rows too, in several token tiles."""

    up_to: int
    tiles: tuple[RatedConfig, ...]


@dataclass(frozen=True)
class Costs:
    """The numbers of :func:`grids`, which the files of kernels/measured explain."""

    launch_us: float
    read_excess: float
    exchange_us: float
    share_us: float
    exchange_bytes_per_us: float
    stripe_steps: float
    wave_us: float
    enough_slots: float
    sizes: tuple[Tiles, ...]


_NAME = "sm80_gemm"
#: Fragments of 16 x 8 sums that a warp has registers for twice.
_MOST_EXACT = 16
#: A block should have a few steps to fill its pipeline with.
_MIN_STEPS = 2
#: Grids per tile to choose from and to tune.
_GRIDS_OFFERED = 2


def fitted(config: Config, layout: Layout, gpu: Gpu) -> Config | None:
    """``config`` with as many resident blocks and stages as shared memory holds; None if two stages do not fit."""
    for blocks in range(config.blocks_per_sm, 0, -1):
        for stages in range(config.stages, 1, -1):
            smaller = dataclasses.replace(config, blocks_per_sm=blocks, stages=stages)
            if smaller.shared_bytes(layout) <= shared_budget(gpu, blocks):
                return smaller
    return None


def configs(m: int, spec: Spec, dtype: str, gpu: Gpu) -> list[RatedConfig]:
    """The tiles for M rows of ``dtype`` that fit on ``gpu``."""
    return fitting_tiles(m, spec, dtype, gpu, measured.of(gpu))


def fitting_tiles(m: int, spec: Spec, dtype: str, gpu: Gpu, known: Measured) -> list[RatedConfig]:
    """Those of ``known``.

    Where weights must not be scaled, sums are: by the same tiles, as far as a second set of sums fits in registers,
    and with the same times, which are not measured for them.
    """
    sizes = known.read(Costs, _NAME).sizes
    rated = next((size for size in sizes if m <= size.up_to), sizes[-1]).tiles
    if not can_scale(spec, dtype):
        exact = [RatedConfig(dataclasses.replace(each.config, scale_weights=False), each.slab_ns) for each in rated]
        rated = tuple(each for each in exact if each.config.row_atoms * each.config.token_tiles <= _MOST_EXACT)
    all_fitted = [(fitted(each.config, spec.layout, gpu), each.slab_ns) for each in rated]
    return [RatedConfig(config, slab_ns) for config, slab_ns in all_fitted if config is not None]


@dataclass(frozen=True)
class Grid:
    """How many blocks share how many tiles of how many K steps."""

    blocks: int
    tiles: int
    tiles_m: int
    steps: int

    @property
    def is_cut(self) -> bool:
        """Whether some tile is computed by several blocks."""
        return self.tiles % self.blocks != 0


@dataclass(frozen=True)
class Tiling(CudaConfiguration):
    """A tile, and the blocks that share the tiles."""

    config: Config
    grid: Grid

    @property
    def exchange_floats(self) -> int:
        """Two tiles of each block, where some tile is shared."""
        return 2 * self.grid.blocks * self.config.rows * self.config.tokens if self.grid.is_cut else 0

    @property
    def key(self) -> str:
        """The numbers of the tile, then the blocks."""
        return f"{self.config.key}/{self.grid.blocks}"

    def __str__(self) -> str:
        exchange = "partial tiles are added in block order" if self.grid.is_cut else "no tile is cut"
        return f"{self.config}; {self.grid.blocks} blocks over {self.grid.tiles} tiles, {exchange}"


def grids(
    rated: RatedConfig, m: int, layout: Layout, gpu: Gpu, dtype: str, known: Measured
) -> list[tuple[float, Grid]]:
    """(predicted microseconds, grid), the best first: a block per tile, shares of a tile, or stripes over all slots."""
    config, costs = rated.config, known.read(Costs, _NAME)
    slabs_n, slabs_k, slab_bytes = layout.packed_shape
    tiles_m = -(-m // config.tokens)
    tiles = tiles_m * -(-slabs_n * SLAB_N // config.rows)
    steps = -(-slabs_k * SLAB_K // config.k)
    slots = gpu.sm_count * config.blocks_per_sm
    step_us = config.rows * config.k / (SLAB_N * SLAB_K) * rated.slab_ns / 1000
    step_us *= known.decode_factor(_NAME, layout, dtype)
    least_us = costs.read_excess * read_us(slabs_n * slabs_k * slab_bytes, gpu, known)

    def predicted_us(blocks: int) -> float:
        """The memory's time or that of the busiest SM, whichever is longer, and what launch and exchange cost."""
        steps_of_block = tiles * steps / blocks
        if blocks % tiles and tiles % blocks:
            steps_of_block += costs.stripe_steps
        if blocks <= slots:
            resident = -(-blocks // gpu.sm_count)
            busy_us = resident * steps_of_block * step_us
            busy_us /= min(1.0, resident / (costs.enough_slots * config.blocks_per_sm))
        else:
            waves = -(-blocks // slots)
            busy_us = waves * config.blocks_per_sm * steps_of_block * step_us + (waves - 1) * costs.wave_us
        exchange_us = 0.0
        if tiles % blocks:
            shares = max(2, -(-blocks // tiles))
            part_bytes = config.rows * min(m, config.tokens) * 4
            exchange_us = costs.exchange_us + shares * (costs.share_us + part_bytes / costs.exchange_bytes_per_us)
        return costs.launch_us + max(busy_us, least_us) + exchange_us

    options = [tiles]
    if tiles <= launch.MAX_COUNTERS:
        most = min(slots // tiles, steps // _MIN_STEPS)
        options += [tiles * share for share in range(2, most + 1)]
        options += [slots] if tiles * steps >= _MIN_STEPS * slots else []
    found = [(predicted_us(blocks), Grid(blocks, tiles, tiles_m, steps)) for blocks in dict.fromkeys(options)]
    return sorted(found, key=lambda option: option[0])


class Sm80Plan(CudaPlan[Tiling]):
    """Plain launches only."""

    def __init__(self, function: launch.Function, configuration: Tiling, problem: Problem) -> None:
        super().__init__(function, configuration, problem)
        grid, (slabs_n, slabs_k, _) = configuration.grid, self.layout.packed_shape
        self._blocks, self._shared_tiles = grid.blocks, grid.tiles if grid.is_cut else 0
        self._floats = configuration.exchange_floats
        self._sizes = problem.M, self.layout.N, self.layout.K, slabs_n, slabs_k, grid.tiles_m, grid.tiles

    def enqueue(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch."""
        stream, exchange = launcher.stream(w.device), NO_EXCHANGE
        if self._shared_tiles:
            exchange = Exchange.of(launcher, w.device, stream, self._floats, self._shared_tiles)
        _pack(
            _ARGUMENTS.data,
            0,
            w.pointer,
            w.factors_pointer,
            x.pointer,
            bias,
            y.pointer,
            exchange.partials,
            exchange.counters,
            x.stride,
            y.stride,
            *self._sizes,
            x.start_at(16),
            y.start_at(8),
            w.layer_pointer,
            self.layers,
        )
        self.function.launch(self._blocks, self.threads, stream, _ARGUMENTS)


class Sm80Gemm(ProductKernel):
    """Every shape, format, group size and 16-bit dtype, on sm_80 and later."""

    name = _NAME
    arguments = Args
    plan_type = Sm80Plan

    def refuses(self, problem: Problem) -> str | None:
        """Host memory, older or smaller GPUs, other activation dtypes."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if int(problem.gpu.arch.removeprefix("sm_").rstrip("af")) < _MIN_ARCH:
            return f"needs mma.sync and cp.async of sm_{_MIN_ARCH}, and {problem.gpu.name} is {problem.gpu.arch}"
        if (reason := refuses_operands(problem)) is not None:
            return reason
        if problem.batch_invariant:
            return "adds up in an order that depends on M, and batch_invariant was asked for"
        if not configs(problem.M, problem.w, problem.x.dtype, problem.gpu):
            return f"needs more shared memory than the {problem.gpu.shared_per_block} bytes of {problem.gpu.name}"
        return None

    def candidates(self, problem: Problem) -> list[Candidate]:
        """Every tile that fits, with its best grids."""
        assert problem.gpu is not None
        return self._rated(problem, measured.of(problem.gpu), _GRIDS_OFFERED)

    def rated(self, problem: Problem, known: Measured) -> list[Candidate]:
        """Every tile that fits, with all grids."""
        return self._rated(problem, known, None)

    def _rated(self, problem: Problem, known: Measured, grids_each: int | None) -> list[Candidate]:
        assert problem.gpu is not None
        m, layout, dtype, gpu = max(problem.M, 1), problem.w.layout, problem.x.dtype, problem.gpu
        return [
            Candidate(self.name, Tiling(rated.config, grid), predicted_us)
            for rated in fitting_tiles(m, problem.w, dtype, gpu, known)
            for predicted_us, grid in grids(rated, m, layout, gpu, dtype, known)[:grids_each]
        ]

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        for size in measured.of(gpu).read(Costs, _NAME).sizes:
            for rated in configs(size.up_to, spec, dtype, gpu):
                yield self.source_of(spec, dtype, rated.config)

    def rounding(self, problem: Problem) -> Rounding:
        """Weights too where some tile for so many rows scales them."""
        assert problem.gpu is not None
        w, dtype = problem.w, problem.x.dtype
        scales = any(rated.config.scale_weights for rated in configs(problem.M, w, dtype, problem.gpu))
        return Rounding(dtype, w.layout.format.table is not None, scaling_roundings(w, dtype) if scales else 0)


KERNEL = Sm80Gemm()
