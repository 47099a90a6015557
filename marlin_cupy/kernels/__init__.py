"""HOW a tile is computed: the kernels, and which of them serves a problem."""

from __future__ import annotations

from collections.abc import Iterator

from marlin_cupy.device import Gpu
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.kernels import dequantize, reference, sm80_gemm, sm90_stream, sm90_wgmma, tuned
from marlin_cupy.kernels.costs import floor_us
from marlin_cupy.kernels.problem import Candidate, Configuration, Kernel, Plan, Problem
from marlin_cupy.numerics import Rounding
from marlin_cupy.spec import Spec

#: In no order.
KERNELS: tuple[Kernel, ...] = (sm90_stream.KERNEL, sm90_wgmma.KERNEL, sm80_gemm.KERNEL, reference.KERNEL)


def refusals(problem: Problem) -> dict[str, str | None]:
    """Per kernel: why it does not serve ``problem``, or None."""
    return {kernel.name: kernel.refuses(problem) for kernel in KERNELS}


def candidates(problem: Problem) -> list[Candidate]:
    """What all kernels offer for ``problem``; empty where every kernel refuses.

    The least predicted time first, of kernels made for the GPU and then of others. Their costs were not fitted
    together, and in no cell of examples/results/h200_portable.json is sm80_gemm within 7 % of what h200.json has.
    """
    serving = [kernel for kernel in KERNELS if kernel.refuses(problem) is None]
    found = [(kernel.made_for is None, each) for kernel in serving for each in kernel.candidates(problem)]
    return [each for _, each in sorted(found, key=lambda one: (one[0], one[1].predicted_us))]


def choose(problem: Problem) -> Candidate:
    """The candidate with the least time measured where ``problem`` was tuned, else the first of :func:`candidates`.

    UnsupportedError with every kernel's reason where there is none.
    """
    found = candidates(problem)
    if not found:
        reasons = "; ".join(f"{name} {reason}" for name, reason in refusals(problem).items())
        raise UnsupportedError(f"no kernel serves this multiplication: {reasons}.")
    us = tuned.times(problem)
    return min((each for each in found if each.key in us), key=lambda each: us[each.key], default=found[0])


def plan(problem: Problem, candidate: Candidate) -> Plan:
    """A candidate for ``problem``, compiled and loaded."""
    return _kernel(candidate).plan(problem, candidate.configuration)


def rounding(problem: Problem, candidate: Candidate) -> Rounding:
    """What the kernel of a candidate for ``problem`` rounds at most."""
    return _kernel(candidate).rounding(problem)


def source(problem: Problem, candidate: Candidate) -> tuple[str, str] | None:
    """(name, CUDA source) that a candidate for ``problem`` needs; None on the CPU."""
    return _kernel(candidate).source(problem, candidate.configuration)


def _kernel(candidate: Candidate) -> Kernel:
    return next(kernel for kernel in KERNELS if kernel.name == candidate.kernel)


def variants(spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
    """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
    for kernel in KERNELS:
        yield from kernel.variants(spec, dtype, gpu)
    yield dequantize.variant(spec, dtype)


__all__ = [
    "KERNELS",
    "Candidate",
    "Configuration",
    "Kernel",
    "Plan",
    "Problem",
    "candidates",
    "choose",
    "floor_us",
    "plan",
    "refusals",
    "rounding",
    "source",
    "variants",
]
