"""CuPy arrays for the GPU suite: there without rounding, back as float64, poisoned, compared bit by bit."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import cupy
import numpy as np
from cases import DTYPES, gaussian, quantized, rows

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.api import problem_of
from marlin_cupy.numerics import Rounding
from marlin_cupy.scalars import by_name

#: A NaN in fp16 and in bf16.
_POISON = 0x7FFF
_GUARD = 512


def to_gpu(array: np.ndarray) -> cupy.ndarray:
    """Bit for bit, bfloat16 included."""
    array = np.ascontiguousarray(array)
    if array.dtype == DTYPES["bfloat16"]:
        return cupy.asarray(array.view(np.uint16)).view(array.dtype)
    return cupy.asarray(array)


def to_host(array: cupy.ndarray) -> np.ndarray:
    """Bit for bit, bfloat16 included."""
    if array.dtype == DTYPES["bfloat16"]:
        return array.view(cupy.uint16).get().view(array.dtype)
    return array.get()


def to_jax(jax: ModuleType, array: cupy.ndarray) -> Any:
    """On JAX's first GPU."""
    return jax.device_put(to_host(array), jax.devices("gpu")[0])


def bits(array: Any) -> np.ndarray:
    """Of 16-bit values in CuPy or JAX."""
    host = to_host(array) if isinstance(array, cupy.ndarray) else np.asarray(array)
    return host.view(np.uint16)


def float64(array: cupy.ndarray) -> cupy.ndarray:
    if array.dtype == DTYPES["bfloat16"]:
        return by_name("bfloat16").from_bits(cupy.ascontiguousarray(array.view(cupy.uint16))).astype(cupy.float64)
    return array.astype(cupy.float64)


@functools.cache
def activations(M: int, K: int, dtype: str) -> cupy.ndarray:
    return to_gpu(rows((M, K), seed=K, dtype=dtype))


@functools.cache
def weights(K: int, N: int, dtype: str = "float32") -> cupy.ndarray:
    return to_gpu(gaussian(K, N, seed=K + N, dtype=dtype))


def poisoned(shape: tuple[int, ...], dtype: str) -> cupy.ndarray:
    """All NaN."""
    return cupy.full(shape, _POISON, dtype=cupy.uint16).view(DTYPES[dtype])


def poisoned_with_guard(M: int, N: int, dtype: str) -> tuple[cupy.ndarray, cupy.ndarray]:
    """A contiguous output, and the memory that follows it, which nothing may write."""
    memory = poisoned((M * N + _GUARD,), dtype)
    return memory[: M * N].reshape(M, N), memory[M * N :]


def is_poison(array: cupy.ndarray) -> bool:
    return bool((array.view(cupy.uint16) == _POISON).all())


def poison_pool() -> None:
    """Leave NaN in the memory that CuPy hands out next, so that reading scratch before writing it shows."""
    blocks = [cupy.full(1 << size, cupy.nan, dtype=cupy.float32) for size in range(8, 24)]
    del blocks


def differences(a: cupy.ndarray, b: cupy.ndarray) -> cupy.ndarray:
    """How many 16-bit elements differ, as a device scalar, so that nothing waits."""
    return (a.view(cupy.uint16) != b.view(cupy.uint16)).sum()


def assert_same_bits(a: cupy.ndarray, b: cupy.ndarray, case: str = "") -> None:
    assert a.shape == b.shape, case
    assert a.dtype == b.dtype, case
    count = int(differences(a, b))
    assert count == 0, f"{case}: {count} of {a.size} elements differ"


def kernel_of(M: int, dtype: Any, w: mc.QuantizedTensor) -> str:
    """Name of the kernel that multiplies M aligned rows."""
    return mc.explain((M, w.shape[0]), dtype, w).kernel


def rounding_of(M: int, dtype: str, w: mc.QuantizedTensor) -> Rounding:
    """What the kernel that multiplies M aligned rows rounds."""
    problem = problem_of(w, M, dtype)
    return kernels.GEMM.rounding(problem, kernels.GEMM.choose(problem))


def is_cut(M: int, dtype: Any, w: mc.QuantizedTensor) -> bool:
    """Whether several blocks share an output tile and exchange partial sums."""
    config = mc.explain((M, w.shape[0]), dtype, w).config
    assert ("partial tiles" in config) != ("no tile is cut" in config), config
    return "partial tiles" in config


def cut_and_whole(dtype: str, M: int, name: str = "int4") -> list[mc.QuantizedTensor]:
    """A weight whose tiles are shared by blocks for M rows, and one whose tiles are not."""
    found: dict[bool, mc.QuantizedTensor] = {}
    for K, N in ((8192, 513), (128, 64), (8192, 65), (256, 8200), (14336, 512), (128, 33000), (1030, 3000)):
        w = quantized(weights(K, N), name, 64)
        found.setdefault(is_cut(M, dtype, w), w)
        if len(found) == 2:
            return [found[True], found[False]]
    raise AssertionError(f"of these shapes all have tiles that are cut for M={M}, or none has; add others")
