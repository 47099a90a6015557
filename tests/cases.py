"""The rows that the suites iterate over. A format without a row here fails ``test_formats.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.device import Gpu, arch_of, gpu_of_arch
from marlin_cupy.formats.nf4 import TABLE
from marlin_cupy.kernels import Operand, Operation, Plan, Problem
from marlin_cupy.spec import Spec

#: One group per column; every granule (16, 32, 64, 128); below, at, between and above the height of a slab.
GROUP_SIZES = (-1, 16, 32, 48, 64, 80, 96, 128, 192, 256, 384)


@dataclass(frozen=True)
class FormatRow:
    """What a format promises, and what suites iterate for it.

    Attributes:
        levels: the values of its codes when the largest magnitude of a group is 1, which fix how well Gaussian
            weights are quantized (:func:`gaussian_error`).
        packed_sha256: of the packed buffers that ``test_layout.py`` builds by arithmetic alone. Files that users
            saved depend on it: a change here needs a new FILE_VERSION.
        packed_as: (group size, scale dtype) of these three buffers.
        only_groups: the group sizes that it has; empty: -1 and all multiples of 16.
        scale_dtypes: of scales that lie among the codes.
        output_scales: the group sizes whose scales are one float32 per output instead.
        options: (group size, options) that are not the defaults.
        no_codes: codes that stand for no weight.
        clipped: how many scales the largest weight of a group may lie beyond the largest code, in "absmax".
    """

    levels: tuple[float, ...]
    packed_sha256: str
    packed_as: tuple[tuple[int, str], ...] = ((48, "float16"), (128, "bfloat16"), (-1, "float16"))
    only_groups: tuple[int, ...] = ()
    scale_dtypes: tuple[str, ...] = ("float16", "bfloat16")
    output_scales: tuple[int, ...] = ()
    options: tuple[tuple[int, dict[str, str]], ...] = ()
    no_codes: tuple[int, ...] = ()
    clipped: float = 0.0

    def groups(self, *wanted: int) -> tuple[int, ...]:
        """Those of the ``wanted`` group sizes that it has, or what it has where that is none of them."""
        return tuple(size for size in wanted if size in self.only_groups) or self.only_groups or wanted

    def group(self, wanted: int) -> int:
        """``wanted`` or, where it has no such groups, one that it has."""
        return self.groups(wanted)[0]

    def scales(self, group_size: int) -> tuple[str, ...]:
        """The types that scales of groups of that size can have."""
        return ("float32",) if group_size in self.output_scales else self.scale_dtypes

    def scale(self, group_size: int, wanted: str) -> str:
        """``wanted`` or, where such scales cannot have that type, one that they can."""
        found = self.scales(group_size)
        return wanted if wanted in found else found[0]


def ways(*group_sizes: int) -> list[tuple[str, int, str]]:
    """(format, group size, scale dtype): every format with every type of scales, for those of the sizes it has."""
    return [
        (name, group_size, scale)
        for name, row in FORMATS.items()
        for group_size in row.groups(*group_sizes)
        for scale in row.scales(group_size)
    ]


_FLOAT8 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(float)

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
    "int3": FormatRow(
        levels=tuple((code - 4) / 3.5 for code in range(8)),
        packed_sha256="5cd2c621ab79fce2978eeeaeee95c4c81253e86e27865515010c6cfe2fbb312c",
    ),
    "int2": FormatRow(
        levels=tuple((code - 2) / 1.5 for code in range(4)),
        packed_sha256="732ee00ec24e4cc282d7d40e7a877327bd63671145568a23fc3da17155d1c612",
    ),
    "mxfp4": FormatRow(
        # At the widest: scales are powers of two, and the largest magnitude is 4 to 8 of them.
        levels=tuple(sign * value / 4 for sign in (-1, 1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)),
        packed_sha256="bf79f492e084b1f33813341e9de83dd968720c6312f95163f9aaf762451cde51",
        packed_as=((32, "float8_e8m0fnu"),) * 3,
        only_groups=(32,),
        scale_dtypes=("float8_e8m0fnu",),
        clipped=2,
    ),
    "fp8_e4m3": FormatRow(
        levels=tuple(_FLOAT8[np.isfinite(_FLOAT8)] / 448),
        packed_sha256="0e7241a485b97524a05961aeebdaa4a8a456f7dbfcd77fcb7affa42f79fc8ff5",
        packed_as=((48, "float16"), (128, "float32"), (-1, "float32")),
        scale_dtypes=("float16", "bfloat16", "float32"),
        output_scales=(-1,),
        options=((128, {"scale": "block"}),),
        no_codes=(0x7F, 0xFF),
    ),
}

#: Scale and activation types.
HALF = ("float16", "bfloat16")
DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
#: What holds scales: 8-bit ones are bits.
SCALE_DTYPES = DTYPES | {"float8_e8m0fnu": np.dtype(np.uint8)}

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


def quantized(
    weight: Any, name: str, group_size: int, scale_dtype: str | None = None, **more: Any
) -> mc.QuantizedTensor:
    """:func:`marlin_cupy.quantize` with groups and scales like those, where the format has no such ones."""
    size = FORMATS[name].group(group_size)
    scales = None if scale_dtype is None else FORMATS[name].scale(size, scale_dtype)
    return mc.quantize(weight, name, size, scale_dtype=scales, **more)


def gpu_groups(name: str) -> list[tuple[int, str]]:
    """(group size, scale dtype) on a GPU, of those that the format has."""
    row = FORMATS[name]
    sizes = [(row.group(size), scale) for size, scale in GPU_GROUPS]
    found = [(size, row.scale(size, scale)) for size, scale in sizes]
    return list(dict.fromkeys([*found, *([(64, "float32")] if "float32" in row.scale_dtypes else [])]))


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
