"""The rows that the suites iterate over. A format without a row here fails ``test_formats.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from marlin_cupy import kernels
from marlin_cupy.device import Gpu, arch_of, gpu_of_arch
from marlin_cupy.formats.nf4 import TABLE
from marlin_cupy.kernels import Operand, Operation, Plan, Problem
from marlin_cupy.spec import Spec


@dataclass(frozen=True)
class FormatRow:
    """What a format promises.

    Attributes:
        levels: the values of its codes when the largest magnitude of a group is 1, which fix how well Gaussian
            weights are quantized (:func:`gaussian_error`).
        packed_sha256: of the packed buffer that ``test_layout.py`` builds by arithmetic alone. Files that users
            saved depend on it: a change here needs a new FILE_VERSION.
    """

    levels: tuple[float, ...]
    packed_sha256: str


FORMATS: dict[str, FormatRow] = {
    "int4": FormatRow(
        levels=tuple((code - 8) / 7.5 for code in range(16)),
        packed_sha256="793c4c696ab399dd3ffab7f7b537b1edbbac874272c0add21c3d9c0325c9cafc",
    ),
    "uint4": FormatRow(
        levels=tuple((code - 7.5) / 7.5 for code in range(16)),  # at the widest: from -absmax to absmax
        packed_sha256="e93cb514a149f2c6411ec5a651d0c9917d8d07efae0a7822e5e3487551f72392",
    ),
    "int8": FormatRow(
        levels=tuple((code - 128) / 127.5 for code in range(256)),
        packed_sha256="0cc8be1995f90ab1b077397bd25e8fc042b60c46abd38c675b3e5fee164fc265",
    ),
    "nf4": FormatRow(
        levels=TABLE,
        packed_sha256="237a6f5d9ab74222269016ab52418dba09aff551b1ec979a6022bd94f8de587b",
    ),
}

#: One group per column; every granule (16, 32, 64, 128); below, at, between and above the height of a slab.
GROUP_SIZES = (-1, 16, 32, 48, 64, 80, 96, 128, 192, 256, 384)

#: Scale and activation types.
HALF = ("float16", "bfloat16")
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}

#: (K, N): one weight, primes, odd, below a slab in either direction, whole slabs, just above them.
SHAPES = ((1, 1), (2, 3), (127, 61), (131, 67), (100, 63), (333, 65), (128, 64), (256, 192), (129, 64), (128, 129))
#: Rows of x on the CPU, and on a GPU.
ROWS = (0, 1, 2, 7, 16, 33)
GPU_ROWS = (0, 1, 2, 7, 16, 33, 64, 100, 129, 256, 1000)
#: (K, N) on a GPU: odd N, K not a multiple of 8 (no 16-byte rows), less than a tile, whole tiles, cut tiles.
GPU_SHAPES = ((1000, 300), (4160, 513), (333, 65), (128, 64), (2048, 1024))
#: (group size, scale dtype) on a GPU: every granule, and both scale types.
GPU_GROUPS = (
    (-1, "bfloat16"),
    (16, "float16"),
    (32, "bfloat16"),
    (48, "float16"),
    (64, "float16"),
    (128, "float16"),
    (128, "bfloat16"),
)

#: A typical GPU of every architecture that kernels are built for.
GPUS = {
    arch: gpu_of_arch(arch)
    for arch in (arch_of(*capability) for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)))
}


def product_of(M: int, dtype: str, w: Spec, on: Gpu | None, batch_invariant: bool = False, **more: Any) -> Problem:
    """M rows of ``dtype`` times a weight."""
    return Problem(M, Operand(dtype), w, dtype, on, batch_invariant, **more)


def fresh_gemm(*without: str) -> Operation[Problem, Plan]:
    """The operation with no plan made ready, of all kernels but some."""
    kept = tuple(each for each in kernels.GEMM.kernels if each.name not in without)
    return Operation(kernels.GEMM.name, kernels.GEMM.noun, kept)


def gaussian(K: int, N: int, seed: int, dtype: str = "float32") -> np.ndarray:
    """Gaussian weights with what real ones have too: an outlier, and a stretch of zeros longer than a small group."""
    weights = np.random.default_rng(seed).standard_normal((K, N), dtype=np.float32)
    weights[K // 3 : K // 3 + 33, N // 2] = 0
    weights[K // 2, N // 3] *= 8
    return weights.astype(DTYPES[dtype])


def rows(shape: tuple[int, ...], seed: int, dtype: str) -> np.ndarray:
    """Gaussian activations."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(DTYPES[dtype])


def gaussian_error(levels: tuple[float, ...], group_size: int) -> float:
    """Bound of the relative error (Frobenius norm) of rounding Gaussian weights to levels that span each group.

    The largest of n Gaussians is at most sqrt(2 ln 2n) on average. With levels stretched to that, the error
    is the distance to the nearest level: the root mean square of it under the density, plus a tenth for a
    sample's scatter and the rounding of the scale.
    """
    largest = np.sqrt(2 * np.log(2 * group_size))
    values = np.linspace(-largest, largest, 4001)
    density = np.exp(-(values**2) / 2)
    distance = np.abs(values[:, None] - largest * np.asarray(levels)).min(axis=1)
    return float(1.1 * np.sqrt(np.sum(density * distance**2) / np.sum(density)))
