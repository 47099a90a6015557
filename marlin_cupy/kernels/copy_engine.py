"""What kernels have in common whose x the copy engine reads, in boxes of 64 K (cuda_src/ptx/tensor_copy.cuh)."""

from __future__ import annotations

import functools
from collections.abc import Callable

from marlin_cupy.jit import tensor_map
from marlin_cupy.kernels.problem import Problem

_BYTES = 16  # what addresses are multiples of
_BOX_K = 64  # K of a row of x in shared memory: 128 bytes, its swizzle's width
_MAPS = 512  # that are kept per plan: an x has a place of its own in each layer of a model


def refuses(problem: Problem) -> str | None:
    """Rows of x that it cannot step through."""
    K = problem.w.shape[0]
    if K * 2 % _BYTES:
        return f"copies x in rows that start at multiples of {_BYTES} bytes, and K={K} is no multiple of 8"
    if not problem.x.aligned:
        return (
            f"needs rows of x that start at multiples of {_BYTES} bytes and do not overlap, and these do not; "
            "pass a contiguous copy"
        )
    return None


def maps(problem: Problem, tokens: int) -> Callable[[int, int], bytes]:
    """(address, stride) of x -> its map for boxes of so many rows, as it stands in the kernel's arguments."""
    shape, box = (problem.M, problem.w.shape[0]), (tokens, _BOX_K)

    @functools.lru_cache(_MAPS)
    def map_of(pointer: int, stride: int) -> bytes:
        return tensor_map.of_matrix(pointer, problem.x.dtype, shape, stride, box)

    return map_of
