"""Runs of K of a packed weight as dense arrays, for gradients. Twin of cuda_src/kernels/dequantize.cuh.

A dense copy of a whole weight is never made: :func:`runs` cuts K so that each piece is of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import inf
from typing import Annotated, Any

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit import launch
from marlin_cupy.kernels.arguments import Int, Struct, pointer
from marlin_cupy.kernels.cuda import Block, CudaConfiguration, CudaKernel
from marlin_cupy.kernels.operands import Weight
from marlin_cupy.kernels.operation import Asked, Candidate, Configuration
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.numerics import Rounding
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.spec import Spec

#: Bytes of a dense run, where a single slab of K does not take more.
_RUN_BYTES = 64 << 20
_BLOCKS_PER_SM = 8


@dataclass(frozen=True)
class Slabs(Block):
    """A warp for 16 outputs of a slab."""

    threads: int = SLAB_N // 16 * 32

    def shared_bytes(self, layout: Layout) -> int:
        """The format's table, and a dense slab whose rows are 16 bytes apart."""
        return layout.format.table_bytes + SLAB_N * (2 * SLAB_K + 16)


class Args(Struct):
    """What the kernel is launched with."""

    weight: Annotated[int, pointer("const u8"), "packed slabs"]
    dense: Annotated[int, pointer("u16")]
    N: Int
    slabs_k: Annotated[Int, "of the weight"]
    first_slab: Annotated[Int, "of the run, along K"]
    slabs: Annotated[Int, "of the run, along K"]
    output_scales: Annotated[int, pointer("const float"), "of formats that have them"]


_pack, _ARGUMENTS = Args.packer.pack_into, launch.ArgumentBlock(Args.size)


@dataclass(frozen=True)
class Dense(Asked):
    """W^T (N, K) of ``dtype``, float16 or bfloat16, run by run."""

    w: Spec
    dtype: str
    gpu: Gpu | None

    @property
    def identity(self) -> dict[str, Any]:
        """The weight and the dtype."""
        return {**asdict(self.w), "shape": list(self.w.shape), "dtype": self.dtype}


@dataclass(frozen=True)
class AllSlabs(CudaConfiguration):
    """A block that takes slab after slab."""

    config: Slabs = Slabs()

    @property
    def key(self) -> str:
        """That of the block."""
        return self.config.key

    def __str__(self) -> str:
        return f"{self.config.threads} threads for a slab"


class DensePlan:
    """The kernel loaded for a weight; ``str`` tells its configuration."""

    def __init__(self, function: launch.Function, configuration: AllSlabs, problem: Dense, gpu: Gpu) -> None:
        self.function, self.configuration, self.problem = function, configuration, problem
        self._slabs_n, self._slabs_k, _ = problem.w.layout.packed_shape
        self._most_blocks = gpu.sm_count * _BLOCKS_PER_SM

    def __str__(self) -> str:
        return str(self.configuration)

    def dense(self, framework: StreamFramework, w: Weight, run: range) -> Any:
        """W^T (N, K of the slabs in ``run``), enqueued on the framework's current stream.

        Rows are contiguous; where the last slab is padded, they are further apart than they are long.
        """
        K, N = self.problem.w.shape
        array = framework.empty((N, SLAB_K * len(run)), self.problem.dtype, w.device)
        self.enqueue(framework.stream(w.device), w.pointer, w.factors_pointer, framework.pointer(array), run)
        return array[:, : K - SLAB_K * run.start]

    def enqueue(self, stream: int, packed: int, output_scales: int, array: int, run: range) -> None:
        """:meth:`dense` between addresses, padding included: ``array`` has SLAB_K * len(run) columns.

        ``output_scales`` is of no account for formats that have none.
        """
        N = self.problem.w.shape[1]
        _pack(_ARGUMENTS.data, 0, packed, array, N, self._slabs_k, run.start, len(run), output_scales)
        blocks = min(self._slabs_n * len(run), self._most_blocks)
        self.function.launch(blocks, self.configuration.config.threads, stream, _ARGUMENTS)


class Dequantize(CudaKernel[Dense, DensePlan]):
    """Every format, group size and 16-bit dtype, on sm_80 and later."""

    name = entry = "dequantize"
    arguments = Args

    def refuses(self, problem: Dense) -> str | None:
        """Host memory, other dtypes."""
        if problem.gpu is None:
            return "runs on a GPU, and the weight is in host memory"
        if problem.dtype not in HALF_NAMES:
            return f"writes {' or '.join(HALF_NAMES)}, not {problem.dtype}"
        return None

    def candidates(self, problem: Dense) -> list[Candidate]:
        """The one way, of which no time is known."""
        return [Candidate(self.name, AllSlabs(), inf)]

    def source(self, problem: Dense, configuration: Configuration) -> tuple[str, str]:
        """(name, source) for its block."""
        assert isinstance(configuration, AllSlabs)
        return self.source_of(problem.w, problem.dtype, configuration.config)

    def plan(self, problem: Dense, configuration: Configuration) -> DensePlan:
        """Compile and load."""
        assert problem.gpu is not None
        assert isinstance(configuration, AllSlabs)
        code = self.source(problem, configuration)
        function = self.load(code, configuration.config, problem.w.layout, problem.gpu)
        return DensePlan(function, configuration, problem, problem.gpu)

    def rounding(self, problem: Dense) -> Rounding:
        """The values of a table, and each weight."""
        return Rounding(problem.dtype, table=problem.w.layout.format.table is not None)

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) for weights like those of ``spec``, as an array of ``dtype``."""
        yield self.source_of(spec, dtype, Slabs())


KERNEL = Dequantize()


def runs(spec: Spec) -> Iterator[range]:
    """Slabs of K, in runs of at most 64 MB of dense weights or one slab."""
    length = max(1, _RUN_BYTES // (2 * spec.shape[1] * SLAB_K))
    slabs_k = spec.layout.packed_shape[1]
    for start in range(0, slabs_k, length):
        yield range(start, min(start + length, slabs_k))
