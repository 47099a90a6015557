"""The portable GEMM: mma.sync and cp.async on every GPU from Ampere on. Twin of cuda_src/kernels/sm80_gemm.cuh."""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any

from marlin_cupy.device import Gpu
from marlin_cupy.formats.scalars import HALF_DTYPES
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.problem import Kernel, Plan, Problem
from marlin_cupy.layout import HALF_N, SLAB_K, SLAB_N, Layout
from marlin_cupy.tensor import QuantizedTensor, Spec

_CPP_TYPES = {"float16": "Float16", "bfloat16": "BFloat16"}
_MIN_ARCH = 80
#: struct Args of the twin: six pointers, two strides, nine ints.
_ARGS = struct.Struct("=6Q2q9i4x")
_ARGUMENTS = launch.ArgumentBlock(_ARGS.size)
_WARP = 32


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


#: Per largest M served: configurations from most to least shared memory.
CONFIGS: dict[int, tuple[Config, ...]] = {
    8: (Config(4, 1, 1, 1, 8, 4, 4, 2), Config(4, 1, 1, 1, 8, 4, 2, 1)),
    16: (Config(4, 2, 1, 1, 8, 4, 3, 2), Config(4, 2, 1, 1, 8, 4, 2, 1)),
    32: (Config(2, 4, 4, 1, 2, 4, 4, 2), Config(2, 4, 4, 1, 2, 4, 2, 1)),
    64: (Config(2, 8, 4, 1, 2, 4, 4, 1), Config(2, 8, 4, 1, 2, 4, 2, 1)),
}


def kernel_source(spec: Spec, dtype: str, config: Config) -> str:
    """The complete CUDA source for a format, its granule, an activation dtype and a configuration."""
    layout = spec.layout
    lines = [
        '#include "ptx/types.cuh"',
        config.cpp(),
        f"using Activation = {_CPP_TYPES[dtype]};",
        f"using Scale = {_CPP_TYPES[spec.scale_dtype]};",
        f"constexpr int GRANULE = {layout.granule};",
        f"constexpr int SHARED_BYTES = {config.shared_bytes(layout)};",
    ]
    if layout.format.table is not None:
        values = ", ".join(f"{value!r}f" for value in layout.format.table)
        lines.append(f"__constant__ float FORMAT_TABLE[] = {{{values}}};")
    lines += [f'#include "formats/{spec.format}.cuh"', '#include "kernels/sm80_gemm.cuh"']
    return source.inline("\n".join(lines))


def kernel_name(spec: Spec, dtype: str) -> str:
    """A readable file name for a compiled variant; the cache adds a hash."""
    return f"sm80_gemm-{spec.format}-g{spec.layout.granule}-{dtype}"


def choose_config(problem_m: int, layout: Layout, gpu: Gpu) -> Config:
    """The configuration for M rows: by the smallest token tile that covers M, then what shared memory allows."""
    largest_m = next((m for m in CONFIGS if problem_m <= m), max(CONFIGS))
    for config in CONFIGS[largest_m]:
        if config.shared_bytes(layout) <= gpu.shared_per_block:
            return config
    raise ValueError(f"no configuration fits {gpu.shared_per_block} bytes of shared memory on {gpu.name}.")


def choose_blocks(tiles: int, steps: int, slots: int) -> int:
    """How many blocks share ``tiles`` of ``steps``: whole shares of a tile where they fill the GPU, stripes else."""
    total = tiles * steps
    if total <= slots or tiles > launch.MAX_COUNTERS:
        return min(total, slots) if tiles <= launch.MAX_COUNTERS else tiles
    if tiles <= slots:
        split = min(slots // tiles, steps)
        if split * tiles >= 0.85 * slots:
            return split * tiles
    return slots


@dataclass(frozen=True)
class Sm80Plan(Plan):
    """Everything about a launch that does not depend on pointers."""

    function: launch.Function
    config: Config
    m: int
    blocks: int
    tiles: int
    tiles_m: int
    partial_floats: int  # 0: no tile is cut, no exchange

    @staticmethod
    def make(config: Config, problem: Problem) -> Sm80Plan:
        """Compile and load ``config`` for ``problem``, and share its tiles out."""
        assert problem.gpu is not None
        spec, layout = problem.spec, problem.spec.layout
        function = launch.load(
            kernel_name(spec, problem.dtype),
            kernel_source(spec, problem.dtype, config),
            problem.gpu.arch,
            problem.gpu.index,
            "gemm",
            config.shared_bytes(layout),
        )
        slabs_n, slabs_k, _ = layout.packed_shape
        tiles_m = -(-problem.M // config.tokens)
        tiles = tiles_m * -(-slabs_n * SLAB_N // config.rows)
        steps = -(-slabs_k * SLAB_K // config.k)
        blocks = choose_blocks(tiles, steps, problem.gpu.sm_count * function.blocks_per_sm(config.threads))
        whole = tiles % blocks == 0
        partials = 0 if whole else 2 * blocks * config.rows * config.tokens
        return Sm80Plan(function, config, problem.M, blocks, tiles, tiles_m, partials)

    def __str__(self) -> str:
        exchange = "partial tiles are added in block order" if self.partial_floats else "no tile is cut"
        return f"{self.config}; {self.blocks} blocks over {self.tiles} tiles, {exchange}"

    def multiply(self, framework: Framework, x: Any, w: QuantizedTensor, bias: Any | None, out: Any | None) -> Any:
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
        if self.partial_floats:
            scratch = framework.empty((self.partial_floats,), "float32", w.device)
            partials = framework.pointer(scratch)
            counters = launch.counters(w.device.index).address(stream, self.tiles)
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
            self.tiles_m,
            self.tiles,
            x_pointer % 16 == 0 and x_stride % 8 == 0,
            y_pointer % 8 == 0 and y_stride % 4 == 0,
        )
        self.function.launch(self.blocks, self.config.threads, stream, _ARGUMENTS)
        return y


class Sm80Gemm(Kernel):
    """Every shape, format, group size and 16-bit dtype, on sm_80 and later."""

    name = "sm80_gemm"

    def refuses(self, problem: Problem) -> str | None:
        """Host memory, older GPUs, other activation dtypes."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if int(problem.gpu.arch.removeprefix("sm_").rstrip("af")) < _MIN_ARCH:
            return f"needs mma.sync and cp.async of sm_{_MIN_ARCH}, and {problem.gpu.name} is {problem.gpu.arch}"
        if problem.dtype not in HALF_DTYPES:
            return f"takes {' or '.join(HALF_DTYPES)} activations, not {problem.dtype}"
        return None

    def plan(self, problem: Problem) -> Plan:
        """By the number of rows; see choose_config."""
        assert problem.gpu is not None
        return Sm80Plan.make(choose_config(problem.M, problem.spec.layout, problem.gpu), problem)


KERNEL = Sm80Gemm()
