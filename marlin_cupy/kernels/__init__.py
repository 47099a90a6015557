"""HOW a tile is computed: the operations, and the kernels of each."""

from __future__ import annotations

from collections.abc import Iterator

from marlin_cupy.device import Gpu
from marlin_cupy.kernels import dequantize, reference, sm80_gemm, sm90_stream, sm90_wgmma
from marlin_cupy.kernels.costs import floor_us
from marlin_cupy.kernels.dequantize import Dense, DensePlan
from marlin_cupy.kernels.operation import Candidate, Configuration, Kernel, Operation
from marlin_cupy.kernels.problem import ONE, Grouped, Operand, Plan, Problem, Scales, Stacked
from marlin_cupy.spec import Spec

#: y = x @ W + bias.
GEMM: Operation[Problem, Plan] = Operation(
    "gemm", "multiplication", (sm90_stream.KERNEL, sm90_wgmma.KERNEL, sm80_gemm.KERNEL, reference.KERNEL)
)
#: W^T as dense arrays.
DEQUANTIZE: Operation[Dense, DensePlan] = Operation("dequantize", "dequantization", (dequantize.KERNEL,))


def variants(spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
    """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
    yield from GEMM.variants(spec, dtype, gpu)
    yield from DEQUANTIZE.variants(spec, dtype, gpu)


__all__ = [
    "DEQUANTIZE",
    "GEMM",
    "ONE",
    "Candidate",
    "Configuration",
    "Dense",
    "DensePlan",
    "Grouped",
    "Kernel",
    "Operand",
    "Operation",
    "Plan",
    "Problem",
    "Scales",
    "Stacked",
    "floor_us",
    "variants",
]
