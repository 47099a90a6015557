"""HOW a tile is computed: the kernels, and which of them serves a problem."""

from __future__ import annotations

from collections.abc import Iterator

from marlin_cupy.device import Gpu
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.kernels import reference, sm80_gemm, sm90_stream
from marlin_cupy.kernels.problem import Kernel, Plan, Problem
from marlin_cupy.tensor import Spec

#: In order of preference.
KERNELS: tuple[Kernel, ...] = (sm90_stream.KERNEL, sm80_gemm.KERNEL, reference.KERNEL)


def refusals(problem: Problem) -> dict[str, str | None]:
    """Per kernel, in order of preference: why it does not serve ``problem``, or None."""
    return {kernel.name: kernel.refuses(problem) for kernel in KERNELS}


def choose(problem: Problem) -> Kernel:
    """The first kernel that serves ``problem``; UnsupportedError with every reason otherwise."""
    for kernel in KERNELS:
        if kernel.refuses(problem) is None:
            return kernel
    reasons = "; ".join(f"{name} {reason}" for name, reason in refusals(problem).items())
    raise UnsupportedError(f"no kernel serves this multiplication: {reasons}.")


def variants(spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
    """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
    for kernel in KERNELS:
        yield from kernel.variants(spec, dtype, gpu)


__all__ = ["KERNELS", "Kernel", "Plan", "Problem", "choose", "refusals", "variants"]
