"""Runs of K of a packed weight as dense arrays, for gradients. Twin of cuda_src/kernels/dequantize.cuh.

A dense copy of a whole weight is never made: :func:`runs` cuts K so that each piece is of bounded size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from marlin_cupy.device import Gpu, gpu
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.arguments import Int, Struct, pointer
from marlin_cupy.kernels.cuda import Block, preamble
from marlin_cupy.kernels.operands import Weight
from marlin_cupy.layout import SLAB_K, SLAB_N, Layout
from marlin_cupy.spec import Spec

#: Bytes of a dense run, where a single slab of K does not take more.
_RUN_BYTES = 64 << 20
_BLOCKS_PER_SM = 8
_NAME = "dequantize"


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


_CONFIG = Slabs()
_ARGUMENTS = launch.ArgumentBlock(Args.size)


def runs(spec: Spec) -> Iterator[range]:
    """Slabs of K, in runs of at most 64 MB of dense weights or one slab."""
    length = max(1, _RUN_BYTES // (2 * spec.shape[1] * SLAB_K))
    slabs_k = spec.layout.packed_shape[1]
    for start in range(0, slabs_k, length):
        yield range(start, min(start + length, slabs_k))


def variant(spec: Spec, dtype: str) -> tuple[str, str]:
    """(name, source) for weights like those of ``spec``, as an array of ``dtype``."""
    name = f"{_NAME}-{spec.format}-g{spec.layout.granule}-{dtype}"
    return name, source.specialized(_NAME, *preamble(spec, dtype, _CONFIG, Args))


@functools.cache
def load(spec: Spec, dtype: str, on: Gpu) -> launch.Function:
    """Compiled and loaded."""
    return launch.load(*variant(spec, dtype), on.arch, on.index, _NAME, _CONFIG.shared_bytes(spec.layout))


def dense(framework: StreamFramework, w: Weight, spec: Spec, dtype: str, run: range) -> Any:
    """W^T (N, K of the slabs in ``run``) of ``dtype``, float16 or bfloat16, enqueued on the framework's current stream.

    Rows are contiguous; where the last slab is padded, they are further apart than they are long.
    """
    array = framework.empty((spec.shape[1], SLAB_K * len(run)), dtype, w.device)
    enqueue(framework.stream(w.device), w.pointer, framework.pointer(array), spec, dtype, run, gpu(w.device.index))
    return array[:, : spec.shape[0] - SLAB_K * run.start]


def enqueue(stream: int, packed: int, array: int, spec: Spec, dtype: str, run: range, on: Gpu) -> None:
    """:func:`dense` between two addresses, padding included: ``array`` has SLAB_K * len(run) columns."""
    slabs_n, slabs_k, _ = spec.layout.packed_shape
    Args.packer.pack_into(_ARGUMENTS.data, 0, packed, array, spec.shape[1], slabs_k, run.start, len(run))
    blocks = min(slabs_n * len(run), on.sm_count * _BLOCKS_PER_SM)
    load(spec, dtype, on).launch(blocks, _CONFIG.threads, stream, _ARGUMENTS)
