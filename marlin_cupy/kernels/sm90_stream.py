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
from marlin_cupy.kernels.problem import Kernel, Plan, Problem
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.tensor import QuantizedTensor, Spec

#: struct Args of the twin: four pointers, two strides, seven ints.
_ARGS = struct.Struct("=4Q2q7i4x")
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
        shares = 2 * self.tokens * SLAB_N * 4
        return layout.format.table_bytes + self.warps_k * self.slots * slot + exchange + shares

    def cpp(self) -> str:
        """The C++ struct."""
        fields = ", ".join(f"{name} = {value}" for name, value in dataclasses.asdict(self).items())
        return f"struct Config {{ static constexpr int {fields}; }};"

    def __str__(self) -> str:
        return f"{self.warps_k} warps with {self.slots} slabs under way each, clusters of {self.cluster} along K"


#: (warps_k, slots) to try, best first, for one block on an SM, for two, and for clusters of two. Like
#: _CLUSTER_GAIN and the choice between them, picked by hand from times of the eight layers of bench.shapes on one H200
#: (int4, group_size=128, float16); other layers and formats were not tuned.
_ALONE = ((12, 2), (8, 3), (8, 2), (4, 3), (4, 2))
_IN_PAIRS = ((4, 3), (4, 2), (2, 3), (2, 2))
_CLUSTERED = ((8, 3), (8, 2), (4, 3), (4, 2))
#: A dependent launch of a layer with more packed bytes takes all shared memory of its SMs, so that blocks of the next
#: kernel start where blocks of this one have ended and not beside them, where they would compete for bandwidth. With
#: fewer bytes they start at once. From a laboratory version of this kernel; not measured for this one.
_BESIDE_BYTES = 15 << 20
#: A cluster of two has to use the SMs better by this much to make up for its exchange.
_CLUSTER_GAIN = 0.15


def configs(m: int, layout: Layout, gpu: Gpu) -> dict[tuple[int, int], Config]:
    """Per (cluster, blocks per SM): the first configuration for M rows that fits."""
    found = {}
    choices = {(1, 1): _ALONE, (2, 1): _CLUSTERED}
    if m <= _FEW:
        choices[1, 2] = _IN_PAIRS
    for (cluster, blocks), shapes in choices.items():
        budget = min(gpu.shared_per_block, gpu.shared_per_sm // blocks - _RESERVED_SHARED)
        for warps_k, slots in shapes:
            config = Config(1 if m <= _FEW else 2, warps_k, slots, cluster, blocks)
            if config.shared_bytes(layout) <= budget:
                found[cluster, blocks] = config
                break
    return found


def choose(m: int, layout: Layout, gpu: Gpu) -> tuple[Config, int]:
    """The configuration for M rows and the number of clusters, all resident at once with equal numbers of tiles."""
    tiles = layout.packed_shape[0]
    fitting = configs(m, layout, gpu)

    def share(cluster: int, blocks: int) -> tuple[float, int]:
        """How much of the GPU works on average, and the clusters that it takes."""
        most = gpu.sm_count * blocks // cluster
        rounds = -(-tiles // most)
        return tiles / (rounds * most), -(-tiles // rounds)

    best = 1, 1
    if (2, 1) in fitting and share(2, 1)[0] > share(1, 1)[0] + _CLUSTER_GAIN:
        best = 2, 1
    elif (1, 2) in fitting and tiles > gpu.sm_count and share(1, 1)[0] < 0.9 <= share(1, 2)[0] + 0.1:
        best = 1, 2
    return fitting[best], share(*best)[1]


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

    dependent: ClassVar[bool] = True

    function: launch.Function
    config: Config
    clusters: int
    m: int
    dependent_shared_bytes: int

    @staticmethod
    def make(config: Config, clusters: int, problem: Problem) -> StreamPlan:
        """Compile and load ``config`` for ``problem``."""
        assert problem.gpu is not None
        function = launch.load(
            kernel_name(problem.spec, problem.dtype),
            kernel_source(problem.spec, problem.dtype, config),
            problem.gpu.arch,
            problem.gpu.index,
            "gemm",
            config.shared_bytes(problem.spec.layout),
            all_shared_bytes(config, problem.gpu),
        )
        shared_bytes = dependent_shared_bytes(config, problem.spec.layout, problem.gpu)
        return StreamPlan(function, config, clusters, problem.M, shared_bytes)

    def __str__(self) -> str:
        exchange = "partial tiles are added in rank order" if self.config.cluster > 1 else "no tile is cut"
        return (
            f"{self.config}; {self.clusters * self.config.cluster} blocks, {exchange}; "
            f"dependent launch with {self.dependent_shared_bytes} bytes of shared memory a block"
        )

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
        slabs_n, slabs_k, _ = w.layout.packed_shape
        _ARGS.pack_into(
            _ARGUMENTS.data,
            0,
            w.pointer,
            x_pointer,
            0 if bias is None else framework.pointer(bias),
            y_pointer,
            x_stride,
            y_stride,
            self.m,
            N,
            K,
            slabs_n,
            slabs_k,
            x_pointer % 16 == 0 and (self.m == 1 or x_stride % 8 == 0),
            y_pointer % 8 == 0 and (self.m == 1 or y_stride % 4 == 0),
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
        """Other GPUs, more rows, layers where the portable kernel is as fast."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if problem.gpu.arch != _ARCH:
            return f"is made for {_ARCH}, and {problem.gpu.name} is {problem.gpu.arch}"
        if problem.dtype not in HALF_DTYPES:
            return f"takes {' or '.join(HALF_DTYPES)} activations, not {problem.dtype}"
        if problem.M > _MAX_M:
            return f"takes up to {_MAX_M} rows, not {problem.M}"
        if problem.M > _FEW and problem.spec.layout.packed_shape[0] > problem.gpu.sm_count:
            return f"is not faster for more than {_FEW} rows when there are more than one 64-column block per SM"
        if (1, 1) not in configs(problem.M, problem.spec.layout, problem.gpu):
            return f"needs more shared memory than the {problem.gpu.shared_per_block} bytes of {problem.gpu.name}"
        return None

    def plan(self, problem: Problem) -> Plan:
        """By the number of 64-column blocks; see choose."""
        assert problem.gpu is not None
        return StreamPlan.make(*choose(problem.M, problem.spec.layout, problem.gpu), problem)

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every kernel that ``spec`` can need on ``gpu``."""
        for m in (_FEW, _MAX_M) if gpu.arch == _ARCH else ():
            for config in configs(m, spec.layout, gpu).values():
                yield kernel_name(spec, dtype), kernel_source(spec, dtype, config)


KERNEL = Sm90Stream()
