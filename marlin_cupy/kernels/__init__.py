"""HOW a tile is computed: the kernels, and which of them serves a problem."""

from __future__ import annotations

from marlin_cupy.errors import UnsupportedError
from marlin_cupy.kernels import reference, sm80_gemm
from marlin_cupy.kernels.problem import Kernel, Plan, Problem

#: In order of preference.
KERNELS: tuple[Kernel, ...] = (sm80_gemm.KERNEL, reference.KERNEL)


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


__all__ = ["KERNELS", "Kernel", "Plan", "Problem", "choose", "refusals"]
