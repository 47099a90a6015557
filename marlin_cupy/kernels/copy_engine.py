"""What kernels have in common whose x the copy engine reads, in boxes of 64 K (cuda_src/ptx/tensor_copy.cuh).

It wants rows that start at multiples of 16 bytes and do not overlap. Other views of x are multiplied by sm80_gemm,
which takes any address; see :func:`marlin_cupy.matmul`.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from typing import TypeVar

from marlin_cupy.jit import tensor_map
from marlin_cupy.kernels import sm80_gemm
from marlin_cupy.kernels.cuda import CudaConfiguration, CudaPlan
from marlin_cupy.kernels.operands import Launcher, Rows, Weight
from marlin_cupy.kernels.problem import Problem

_BYTES = 16  # what addresses are multiples of
_BOX_K = 64  # K of a row of x in shared memory: 128 bytes, its swizzle's width

C = TypeVar("C", bound=CudaConfiguration)


def refuses(problem: Problem) -> str | None:
    """Rows of x that it cannot step through."""
    K = problem.spec.shape[0]
    if K * 2 % _BYTES:
        return f"copies x in rows that start at multiples of {_BYTES} bytes, and K={K} is no multiple of 8"
    return None


def map_of(problem: Problem, x: Rows, tokens: int) -> bytes:
    """The map of ``x`` for boxes of so many rows, as it stands in the kernel's arguments."""
    box = (tokens, _BOX_K)
    return tensor_map.of_matrix(x.pointer, problem.dtype, (x.number, problem.spec.shape[0]), x.stride, box)


class CopyEnginePlan(CudaPlan[C]):
    """A plan for x that the copy engine can read, and sm80_gemm's for other x."""

    @functools.cached_property
    def portable(self) -> CudaPlan[sm80_gemm.Tiling]:
        """What sm80_gemm would do; made when the first x comes that needs it."""
        found = sm80_gemm.KERNEL.candidates(self.problem)
        best = min(found, key=lambda candidate: candidate.predicted_us)
        return sm80_gemm.KERNEL.plan(self.problem, best.configuration)

    def enqueue(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch. ValueError for x that the copy engine cannot read, where batch_invariant rules sm80_gemm out."""
        if x.start_at(_BYTES) and (x.number == 1 or x.stride >= self.problem.spec.shape[0]):
            self.launch(launcher, x, w, bias, y, dependent)
        elif self.problem.batch_invariant:
            raise ValueError(
                f"x is at address {x.pointer:#x} with a stride of {x.stride} elements between rows; "
                f"batch_invariant needs rows that start at multiples of {_BYTES} bytes and do not overlap, "
                "pass a contiguous copy."
            )
        else:
            self.portable.enqueue(launcher, x, w, bias, y, dependent)

    @abstractmethod
    def launch(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch for an x that the copy engine can read."""
