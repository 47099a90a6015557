"""More than a few rows of x on Hopper: wgmma on weights that are decoded into registers.

Twin of cuda_src/kernels/sm90_wgmma.cuh.
"""

from __future__ import annotations

import dataclasses
import functools
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.formats.scalars import FLOAT16, HALF_DTYPES
from marlin_cupy.jit import launch
from marlin_cupy.kernels import copy_engine
from marlin_cupy.kernels.copy_engine import CopyEnginePlan
from marlin_cupy.kernels.costs import DecodeFactors, can_scale, overlapped_us, read_us
from marlin_cupy.kernels.cuda import Block, CudaConfiguration, CudaKernel, shared_budget
from marlin_cupy.kernels.operands import Exchange, Launcher, Rows, Weight
from marlin_cupy.kernels.problem import Candidate, Problem
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.spec import Spec

#: struct Args of the twin: a tensor map, six pointers, a stride, twelve ints, a stack; its size is a multiple of 64.
_ARGS = struct.Struct("=128s6Qq12iQi12x")
_ARGUMENTS = launch.ArgumentBlock(_ARGS.size)
_ARCH = "sm_90a"
_WARPGROUP = 128
_REGISTERS = 65536  # of an SM
_PRODUCER_REGISTERS = 40  # per thread of the copying warpgroup
_LENT_BYTES = 16384  # what a cluster's blocks leave for the first one goes where its stages were if it is more


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
    """A tile and its speed: the time in which every block on an SM is through with a slab of K.

    Nanoseconds on an H200, int4 with group_size=128 and float16, decoding and multiplying; see :func:`predicted_us`.
    """

    config: Config
    slab_ns: float


# The times and costs below were fitted together to times of these tiles on an H200: 11 layers, the eight of
# bench.shapes.LLAMA and (K, N) = (2048, 5632), (5120, 13824) and (7168, 18432), M = 12 to 4096, plain launches, cold
# weights, the candidates of a cell in turns, by a script that is not in the tree. Of the candidates measured (up to
# fourteen that an earlier fit put first), what is predicted to be best takes longer than the best by 0.2 % on average
# and 7 % at worst up to M = 128, by 0.5 % and 7 % above, where the clock depends on the power drawn. Of some 80 tiles
# these are left; without any of them some cell would lose about a per cent or more.
#: The tiles to choose from, for any M.
CONFIGS = (
    RatedConfig(Config(1, 2, 1, 16, 8, 2), 155),
    RatedConfig(Config(1, 4, 1, 16, 12, 1), 156),
    RatedConfig(Config(2, 2, 1, 16, 12, 2), 286),
    RatedConfig(Config(3, 1, 1, 16, 9, 2), 394),
    RatedConfig(Config(4, 1, 1, 16, 5, 1), 528),
    RatedConfig(Config(1, 2, 1, 32, 8, 2), 177),
    RatedConfig(Config(1, 3, 1, 32, 12, 1), 182),
    RatedConfig(Config(2, 2, 1, 32, 12, 1), 347),
    RatedConfig(Config(2, 2, 1, 32, 10, 2), 355),
    RatedConfig(Config(2, 1, 2, 32, 4, 1), 633),
    RatedConfig(Config(1, 2, 1, 48, 8, 1), 219),
    RatedConfig(Config(1, 2, 1, 48, 8, 2), 201),
    RatedConfig(Config(2, 2, 1, 48, 8, 1), 414),
    RatedConfig(Config(2, 1, 2, 48, 4, 1), 776),
    RatedConfig(Config(1, 2, 1, 64, 8, 2), 225),
    RatedConfig(Config(1, 3, 1, 64, 9, 1), 235),
    RatedConfig(Config(2, 2, 1, 64, 6, 1), 483),
    RatedConfig(Config(3, 1, 1, 64, 4, 2), 717),
    RatedConfig(Config(2, 1, 2, 64, 4, 1), 974),
    RatedConfig(Config(1, 2, 1, 80, 6, 2), 288),
    RatedConfig(Config(2, 1, 1, 80, 4, 1), 593),
    RatedConfig(Config(2, 1, 1, 80, 4, 2), 565),
    RatedConfig(Config(3, 1, 1, 80, 4, 1), 808),
    RatedConfig(Config(3, 1, 1, 80, 4, 2), 805),
    RatedConfig(Config(2, 1, 2, 80, 4, 1), 1103),
    RatedConfig(Config(1, 2, 1, 96, 6, 1), 313),
    RatedConfig(Config(1, 2, 1, 96, 6, 2), 310),
    RatedConfig(Config(2, 1, 1, 96, 4, 1), 670),
    RatedConfig(Config(3, 1, 1, 96, 4, 2), 921),
    RatedConfig(Config(2, 1, 2, 96, 4, 1), 1195),
    RatedConfig(Config(1, 2, 1, 112, 6, 2), 337),
    RatedConfig(Config(2, 1, 1, 112, 4, 1), 732),
    RatedConfig(Config(2, 1, 1, 112, 4, 2), 716),
    RatedConfig(Config(3, 1, 1, 112, 4, 1), 1004),
    RatedConfig(Config(3, 1, 1, 112, 4, 2), 1010),
    RatedConfig(Config(2, 1, 2, 112, 4, 1), 1362),
    RatedConfig(Config(1, 2, 1, 128, 4, 1), 429),
    RatedConfig(Config(2, 1, 1, 128, 4, 1), 777),
    RatedConfig(Config(2, 1, 1, 128, 4, 2), 798),
    RatedConfig(Config(3, 1, 1, 128, 4, 1), 1139),
    RatedConfig(Config(3, 1, 1, 128, 4, 2), 1209),
    RatedConfig(Config(2, 1, 2, 128, 4, 1), 1547),
    RatedConfig(Config(2, 1, 1, 144, 3, 1), 862),
    RatedConfig(Config(2, 1, 1, 144, 3, 2), 862),
    RatedConfig(Config(2, 1, 1, 160, 3, 1), 962),
    RatedConfig(Config(2, 1, 1, 160, 3, 2), 1037),
    RatedConfig(Config(3, 1, 1, 160, 3, 1), 1449),
    RatedConfig(Config(2, 1, 1, 176, 3, 1), 1051),
    RatedConfig(Config(3, 1, 1, 192, 3, 1), 1696),
    RatedConfig(Config(2, 1, 1, 208, 3, 1), 1247),
    RatedConfig(Config(2, 1, 1, 208, 3, 2), 1330),
    RatedConfig(Config(2, 1, 1, 256, 3, 1), 1535),
)
#: What every launch pays, and every tile of a block at its end. The launch was set before the fit.
_LAUNCH_US, _TILE_US = 2.3, 0.23
#: What a cluster pays for its exchange, and per 64 KB of a tile's sums.
_CLUSTER_US, _CLUSTER_SHARE_US = 0.63, 1.24
#: What stripes pay: once, per 64 KB of a share, slabs that a block loses, and how much longer everything takes.
_STRIPE_US, _SHARE_US, _STRIPE_SLABS, _STRIPE_EXCESS = 1.72, 0.66, 5.2, 1.033
_SHARE_BYTES = 64 << 10
#: Nanoseconds that all SMs together need for a slab of a tile with 64 KB of sums, and bytes per nanosecond that they
#: get of x and of weights from wherever these are.
_ALL_NS, _ALL_BYTES_PER_NS = 3.9, 11.9e3
#: SMs of the GPU that these are of.
_SMS = 132
#: Nanoseconds of decoding 64 outputs of a slab, which other formats lengthen. The factors were fitted with this to six
#: of these layers, M = 16, 64 and 256, before the times of the tiles above, and rounded; int4's for bfloat16 and int8's
#: were set later, and choose what is within 3 % of the best on two of them from M = 32 on.
_DECODE_NS = 155
_DECODE = DecodeFactors({"int4": (1.0, 1.0), "uint4": (1.08, 1.08), "nf4": (1.4, 1.36), "int8": (1.1, 1.1)}, fine=1.1)
#: What each further wave of blocks pays to start, where more blocks are launched than fit.
_WAVE_US = 2.6
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
    all_fitted = [(fitted(each.config, layout, gpu), each.slab_ns) for each in CONFIGS]
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


def predicted_us(rated: RatedConfig, grid: Grid, layout: Layout, gpu: Gpu, dtype: str) -> float:
    """Launch, and the longest of what holds a launch up, somewhat more where they are close.

    What the busiest block does: as long for each slab, whether the tensor cores, decoding or the memory hold it up,
    something at the end of each tile, and an exchange for tiles that are put together. Reading the weight from memory.
    What all SMs together can multiply and read, where all of them work: less than an SM alone times their number.
    """
    config = rated.config
    slabs_n, slabs_k, slab_bytes = layout.packed_shape
    slab_us = (rated.slab_ns + (_DECODE(layout, dtype) - 1) * _DECODE_NS * config.rows / SLAB_N) / 1000
    share = config.rows * config.tokens * 4 / _SHARE_BYTES
    waves = -(-(grid.tiles - grid.shared_tiles) // min(grid.blocks, slots(config, gpu)))
    busy_us = waves * (slabs_k / config.cluster * slab_us + _TILE_US)
    if grid.blocks > slots(config, gpu):
        busy_us += (waves - 1) * _WAVE_US
    if config.cluster > 1:
        busy_us += _CLUSTER_US + _CLUSTER_SHARE_US * share
    all_us = grid.tiles * slabs_k * share * _ALL_NS / 1000 * (_SMS / gpu.sm_count)
    if grid.shared_tiles:
        stretch = grid.shared_tiles * slabs_k / grid.blocks + _STRIPE_SLABS
        shares = max(2, -(-grid.blocks // grid.shared_tiles))
        busy_us += stretch * slab_us + _TILE_US + _STRIPE_US + shares * _SHARE_US * share
        busy_us *= _STRIPE_EXCESS
        all_us *= _STRIPE_EXCESS
    moved = config.tokens * SLAB_K * 2 + config.rows // SLAB_N * slab_bytes
    moved_us = grid.tiles * slabs_k * moved / _ALL_BYTES_PER_NS / 1000 * (_SMS / gpu.sm_count)
    memory_us = read_us(slabs_n * slabs_k * slab_bytes, gpu)
    return _LAUNCH_US + overlapped_us(busy_us, memory_us, all_us, moved_us)


def options(m: int, layout: Layout, gpu: Gpu, dtype: str) -> list[tuple[float, Tiling]]:
    """(predicted microseconds, tile and grid) of all tiles, whole and with stripes; the best first."""
    found = []
    for rated in configs(layout, gpu):
        for grid in dict.fromkeys(grid_of(rated.config, m, layout, gpu, stripes) for stripes in (False, True)):
            found.append((predicted_us(rated, grid, layout, gpu, dtype), Tiling(rated.config, grid)))
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
            found.append((predicted_us(rated, grid, layout, gpu, dtype), Tiling(rated.config, grid)))
    return sorted(found, key=lambda option: option[0])


@functools.lru_cache(maxsize=1024)
def invariant_split(layout: Layout, gpu: Gpu) -> tuple[int, int]:
    """(K groups, cluster) for a layer at any M and dtype: the least product of the times for few, some, many rows."""

    def cost(split: tuple[int, int]) -> float:
        product = 1.0
        for m in _INVARIANT_MS:
            product *= invariant_options(m, layout, gpu, FLOAT16, split)[0][0]
        return product

    return min(dict.fromkeys((each.config.wgs_k, each.config.cluster) for each in configs(layout, gpu)), key=cost)


class WgmmaPlan(CopyEnginePlan[Tiling]):
    """Plain and dependent launches."""

    def launch(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch."""
        config, grid = self.configuration.config, self.configuration.grid
        stream = launcher.stream(w.device)
        floats = self.configuration.exchange_floats
        exchange = Exchange.of(launcher, w.device, stream, floats, grid.shared_tiles)
        slabs_n, slabs_k, _ = self.layout.packed_shape
        _ARGS.pack_into(
            _ARGUMENTS.data,
            0,
            copy_engine.map_of(self.problem, x, config.tokens),
            w.pointer,
            w.factors_pointer,
            bias,
            y.pointer,
            exchange.partials,
            exchange.counters,
            y.stride,
            x.number,
            self.layout.N,
            slabs_n,
            grid.tiles_m,
            grid.tiles // grid.tiles_m,
            y.start_at(16),
            grid.tiles,
            slabs_k,
            grid.blocks,
            grid.whole,
            *divmod(grid.shared_tiles * slabs_k, grid.blocks),
            *w.stack,
        )
        blocks = grid.blocks * config.cluster
        if dependent:
            self.function.launch_dependent(w.writes, blocks, config.threads, stream, _ARGUMENTS)
        else:
            self.function.launch(blocks, config.threads, stream, _ARGUMENTS)


def _refuses_any_shape(spec: Spec, dtype: str, gpu: Gpu) -> str | None:
    if gpu.arch != _ARCH:
        return f"is made for {_ARCH}, and {gpu.name} is {gpu.arch}"
    if dtype not in HALF_DTYPES:
        return f"takes {' or '.join(HALF_DTYPES)} activations, not {dtype}"
    if not can_scale(spec, dtype):
        return (
            f"multiplies weights by their scale in the activations' type, and {dtype} would round {spec.scale_dtype} "
            f"scales too much"
        )
    if not configs(spec.layout, gpu):
        return f"needs more shared memory than the {gpu.shared_per_block} bytes of {gpu.name}"
    return None


class Sm90Wgmma(CudaKernel):
    """Any number of rows on Hopper, every format and group size; the only one on a GPU that can be batch invariant."""

    name = "sm90_wgmma"
    made_for = _ARCH
    plan_type = WgmmaPlan

    def refuses(self, problem: Problem) -> str | None:
        """Other GPUs, bfloat16 x with float16 scales, rows of x that the copy engine cannot step through."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        return copy_engine.refuses(problem) or _refuses_any_shape(problem.spec, problem.dtype, problem.gpu)

    def candidates(self, problem: Problem) -> list[Candidate]:
        """The tiles and grids with the least predicted times; with batch_invariant those of one split of K."""
        assert problem.gpu is not None
        m, layout, gpu = max(problem.M, 1), problem.spec.layout, problem.gpu
        if problem.batch_invariant:
            found = invariant_options(m, layout, gpu, problem.dtype, invariant_split(layout, gpu))
        else:
            found = options(m, layout, gpu, problem.dtype)
        return [Candidate(self.name, tiling, us) for us, tiling in found[:_OFFERED]]

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        if _refuses_any_shape(spec, dtype, gpu) is None:
            for rated in configs(spec.layout, gpu):
                yield self.source_of(spec, dtype, rated.config)


KERNEL = Sm90Wgmma()
