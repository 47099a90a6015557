"""The portable GEMM: mma.sync and cp.async on every GPU from Ampere on. Twin of cuda_src/kernels/sm80_gemm.cuh."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from marlin_cupy.device import Gpu
from marlin_cupy.formats.scalars import HALF_DTYPES
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.problem import Kernel, Plan, Problem
from marlin_cupy.layout import HALF_N, SLAB_K, SLAB_N, Layout
from marlin_cupy.tensor import QuantizedTensor, Spec

_MIN_ARCH = 80
#: struct Args of the twin: six pointers, two strides, nine ints.
_ARGS = struct.Struct("=6Q2q9i4x")
_ARGUMENTS = launch.ArgumentBlock(_ARGS.size)
_WARP = 32
_RESERVED_SHARED = 1024  # the driver's share of each block


@dataclass(frozen=True)
class Config:
    """The tile of a block; printed as the C++ struct that the kernel takes.

    A block of ``warps_n * warps_m * warps_k`` warps computes ``rows`` outputs x ``tokens``; a warp owns
    ``row_atoms`` x 16 rows, ``token_tiles`` x 8 tokens and ``k_atoms`` x 16 of each K step.
    """

    row_atoms: int
    token_tiles: int
    warps_n: int
    warps_m: int
    warps_k: int
    k_atoms: int
    stages: int
    blocks_per_sm: int

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

    def cpp(self) -> str:
        """The C++ struct."""
        fields = ", ".join(f"{name} = {value}" for name, value in dataclasses.asdict(self).items())
        return f"struct Config {{ static constexpr int {fields}; }};"

    def __str__(self) -> str:
        return f"{self.rows} x {self.tokens} tile, K step {self.k}, {self.stages} stages, {self.threads} threads"


@dataclass(frozen=True)
class Candidate:
    """A configuration and its measured speed where it has all the work it wants.

    ``slab_ns`` is the time one SM takes per slab (64 x 128 weights) of a large layer: K=8192, N=57344, int4,
    group_size=128, float16, on an H200 (``python -m marlin_cupy.bench.configs``).
    """

    config: Config
    slab_ns: float


#: Per largest M served (the last serves every larger M, in several token tiles): what to choose from.
CANDIDATES: dict[int, tuple[Candidate, ...]] = {
    8: (
        Candidate(Config(4, 1, 2, 1, 2, 8, 4, 2), 167),
        Candidate(Config(4, 1, 1, 1, 4, 8, 4, 2), 178),
        Candidate(Config(2, 1, 1, 1, 8, 8, 3, 2), 210),
    ),
    16: (
        Candidate(Config(4, 2, 2, 1, 2, 8, 4, 2), 209),
        Candidate(Config(4, 2, 1, 1, 4, 8, 3, 2), 221),
        Candidate(Config(2, 2, 1, 1, 8, 8, 2, 2), 265),
    ),
    32: (
        Candidate(Config(4, 4, 2, 1, 2, 8, 3, 2), 281),
        Candidate(Config(2, 4, 4, 1, 1, 8, 4, 3), 312),
        Candidate(Config(2, 4, 2, 1, 4, 8, 2, 1), 377),
    ),
    64: (
        Candidate(Config(2, 8, 4, 1, 1, 8, 4, 2), 481),
        Candidate(Config(2, 8, 4, 1, 2, 8, 3, 1), 501),
        Candidate(Config(2, 8, 8, 1, 1, 8, 4, 1), 504),
        Candidate(Config(2, 8, 2, 1, 4, 4, 3, 1), 667),
    ),
}

# The costs below were chosen so that the grids picked for the eight layers of bench.shapes at M = 1 to 128 came close
# to the best of those tried on one H200. No other layers were timed, and _WAVE_US is a guess.
#: What a launch pays when blocks share tiles: partial tiles written, counted and added up by one block.
_EXCHANGE_US = 2.5
_SHARE_US = 0.7
_EXCHANGE_BYTES_PER_US = 80e3
#: What each further wave of blocks pays to fill its pipeline.
_WAVE_US = 1.5
#: The share of the GPU's block slots that is enough to keep its memory busy.
_ENOUGH_SLOTS = 0.85
#: A block should have a few steps to fill its pipeline with.
_MIN_STEPS = 2


def kernel_source(spec: Spec, dtype: str, config: Config) -> str:
    """The complete CUDA source for a format, its granule, an activation dtype and a configuration."""
    return source.specialized("sm80_gemm", spec, dtype, config.cpp(), config.shared_bytes(spec.layout))


def kernel_name(spec: Spec, dtype: str) -> str:
    """A readable file name for a compiled variant; the cache adds a hash."""
    return f"sm80_gemm-{spec.format}-g{spec.layout.granule}-{dtype}"


def fitted(config: Config, layout: Layout, gpu: Gpu) -> Config | None:
    """``config`` with as many resident blocks and stages as shared memory holds; None if two stages do not fit."""
    for blocks in range(config.blocks_per_sm, 0, -1):
        budget = min(gpu.shared_per_block, gpu.shared_per_sm // blocks - _RESERVED_SHARED)
        for stages in range(config.stages, 1, -1):
            smaller = dataclasses.replace(config, blocks_per_sm=blocks, stages=stages)
            if smaller.shared_bytes(layout) <= budget:
                return smaller
    return None


def candidates(m: int, layout: Layout, gpu: Gpu) -> list[Candidate]:
    """The configurations for M rows that fit on ``gpu``."""
    largest_m = next((size for size in CANDIDATES if m <= size), max(CANDIDATES))
    all_fitted = [(fitted(each.config, layout, gpu), each.slab_ns) for each in CANDIDATES[largest_m]]
    return [Candidate(config, slab_ns) for config, slab_ns in all_fitted if config is not None]


@dataclass(frozen=True)
class Grid:
    """How many blocks share how many tiles of how many K steps, and the time that is expected of it."""

    blocks: int
    tiles: int
    tiles_m: int
    steps: int
    predicted_us: float

    @property
    def is_cut(self) -> bool:
        """Whether some tile is computed by several blocks."""
        return self.tiles % self.blocks != 0


def choose_grid(candidate: Candidate, m: int, layout: Layout, gpu: Gpu) -> Grid:
    """The best number of blocks: one per tile, whole shares of a tile, or stripes over all block slots."""
    config = candidate.config
    slabs_n, slabs_k, _ = layout.packed_shape
    tiles_m = -(-m // config.tokens)
    tiles = tiles_m * -(-slabs_n * SLAB_N // config.rows)
    steps = -(-slabs_k * SLAB_K // config.k)
    slots = gpu.sm_count * config.blocks_per_sm
    busy_us = tiles_m * slabs_n * slabs_k * candidate.slab_ns / gpu.sm_count / 1000

    def grid(blocks: int) -> Grid:
        waves = -(-blocks // slots)
        fill = min(1.0, blocks / (slots * _ENOUGH_SLOTS)) if waves == 1 else blocks / (waves * slots)
        predicted_us = busy_us / fill + (waves - 1) * _WAVE_US
        if tiles % blocks:
            shares = max(2, -(-blocks // tiles))
            part_bytes = config.rows * min(m, config.tokens) * 4
            predicted_us += _EXCHANGE_US + shares * (_SHARE_US + part_bytes / _EXCHANGE_BYTES_PER_US)
        return Grid(blocks, tiles, tiles_m, steps, predicted_us)

    options = [grid(tiles)]
    if tiles <= launch.MAX_COUNTERS:
        most = min(slots // tiles, steps // _MIN_STEPS)
        options += [grid(tiles * share) for share in range(2, most + 1)]
        options += [grid(slots)] if tiles * steps >= _MIN_STEPS * slots else []
    return min(options, key=lambda option: option.predicted_us)


@dataclass(frozen=True)
class Sm80Plan(Plan):
    """Everything about a launch that does not depend on pointers."""

    function: launch.Function
    config: Config
    grid: Grid
    m: int

    @staticmethod
    def make(candidate: Candidate, problem: Problem) -> Sm80Plan:
        """Compile and load a candidate for ``problem``, and share its tiles out."""
        assert problem.gpu is not None
        spec, config = problem.spec, candidate.config
        function = launch.load(
            kernel_name(spec, problem.dtype),
            kernel_source(spec, problem.dtype, config),
            problem.gpu.arch,
            problem.gpu.index,
            "gemm",
            config.shared_bytes(spec.layout),
        )
        return Sm80Plan(
            function, config, choose_grid(candidate, max(problem.M, 1), spec.layout, problem.gpu), problem.M
        )

    def __str__(self) -> str:
        exchange = "partial tiles are added in block order" if self.grid.is_cut else "no tile is cut"
        return f"{self.config}; {self.grid.blocks} blocks over {self.grid.tiles} tiles, {exchange}"

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
        if self.grid.is_cut:
            floats = 2 * self.grid.blocks * self.config.rows * self.config.tokens
            scratch = framework.empty((floats,), "float32", w.device)
            partials = framework.pointer(scratch)
            counters = launch.counters(w.device.index).address(stream, self.grid.tiles)
        slabs_n, slabs_k, _ = w.layout.packed_shape
        _ARGS.pack_into(
            _ARGUMENTS.data,
            0,
            w.pointer,
            x_pointer,
            0 if bias is None else framework.pointer(bias),
            y_pointer,
            partials,
            counters,
            x_stride,
            y_stride,
            self.m,
            N,
            K,
            slabs_n,
            slabs_k,
            self.grid.tiles_m,
            self.grid.tiles,
            x_pointer % 16 == 0 and (self.m == 1 or x_stride % 8 == 0),
            y_pointer % 8 == 0 and (self.m == 1 or y_stride % 4 == 0),
        )
        self.function.launch(self.grid.blocks, self.config.threads, stream, _ARGUMENTS)
        return y


class Sm80Gemm(Kernel):
    """Every shape, format, group size and 16-bit dtype, on sm_80 and later."""

    name = "sm80_gemm"

    def refuses(self, problem: Problem) -> str | None:
        """Host memory, older or smaller GPUs, other activation dtypes."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if int(problem.gpu.arch.removeprefix("sm_").rstrip("af")) < _MIN_ARCH:
            return f"needs mma.sync and cp.async of sm_{_MIN_ARCH}, and {problem.gpu.name} is {problem.gpu.arch}"
        if problem.dtype not in HALF_DTYPES:
            return f"takes {' or '.join(HALF_DTYPES)} activations, not {problem.dtype}"
        if not candidates(problem.M, problem.spec.layout, problem.gpu):
            return f"needs more shared memory than the {problem.gpu.shared_per_block} bytes of {problem.gpu.name}"
        return None

    def plan(self, problem: Problem) -> Plan:
        """The candidate with the least predicted time."""
        assert problem.gpu is not None
        m, layout, gpu = max(problem.M, 1), problem.spec.layout, problem.gpu
        best = min(
            candidates(m, layout, gpu), key=lambda candidate: choose_grid(candidate, m, layout, gpu).predicted_us
        )
        return Sm80Plan.make(best, problem)

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        for m in CANDIDATES:
            for candidate in candidates(m, spec.layout, gpu):
                yield kernel_name(spec, dtype), kernel_source(spec, dtype, candidate.config)


KERNEL = Sm80Gemm()
