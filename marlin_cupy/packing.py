"""Dense arrays into packed ones and back: NumPy or CuPy, a run of columns at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy

from marlin_cupy import formats, frameworks
from marlin_cupy.device import CPU, Device, gpu, gpu_count, import_cupy, namespace, on
from marlin_cupy.frameworks import Framework
from marlin_cupy.layout import SLAB_N, Layout
from marlin_cupy.scalars import BF16, F16, F32, HALF_NAMES
from marlin_cupy.spec import Spec

Array = Any  # an array of any library

_SEARCHES = ("absmax", "mse")
#: Weights handled at once while quantizing and dequantizing: bounds scratch to a few times 4 bytes each.
_BLOCK_WEIGHTS = {"cpu": 4 << 20, "cuda": 8 << 20}
#: A run has a multiple of so many columns: whole slabs, and whole blocks of outputs that share a scale.
_COLUMNS = 2 * SLAB_N
#: Below this float16 is subnormal with fewer significant bits than bfloat16.
_COARSE_FLOAT16 = 2.0**-16
#: What dense weights can be.
DENSE_NAMES = (*HALF_NAMES, F32.name)


def encode(weight: Any, spec: Spec, search: str, packed: Any, output_scales: Any | None = None) -> None:
    """Quantize a checked native ``weight`` into the memory of its parts, a run of columns at a time.

    ``output_scales`` is written where the format has such scales.
    """
    format, layout = formats.get(spec.format), spec.layout
    with on(device_of(packed)):
        for columns in column_blocks(spec.shape, device_of(packed)):
            grouped = _grouped(_as_float32(weight[:, columns]), layout, 0)
            codes, params = format.quantize(grouped, layout.scale, search, dict(spec.options))
            codes = codes.reshape(-1, codes.shape[-1])[: spec.shape[0]]
            packed[columns.start // SLAB_N : -(-columns.stop // SLAB_N)] = layout.pack(codes, params)
            if format.has_output_scales(spec.group_size):
                assert output_scales is not None
                output_scales[columns] = params[formats.SCALE][0]


def decoded(layout: Layout, packed: Any, n: int, output_scales: Any | None = None) -> Any:
    """The float32 matrix (K, n) that a run of whole 64-column blocks stands for; NumPy, CuPy or JAX arrays.

    Args:
        layout: of the weight that the blocks are from.
        packed: uint8 (slabs_n, slabs_k, slab_bytes).
        n: logical number of columns in them.
        output_scales: float32 of these columns or more, for formats that have such scales; others ignore it.
    """
    codes, bits = layout.unpack(packed, n)
    params = {name: layout.scale.from_bits(value) for name, value in bits.items()}
    if layout.format.has_output_scales(layout.group_size):
        assert output_scales is not None
        params[formats.SCALE] = output_scales[None, :n]
    values = layout.format.decode(_grouped(codes, layout, layout.format.zero_code), params)
    return values.reshape(-1, n)[: layout.K]


def derived(spec: Spec, packed: Any) -> dict[str, Any]:
    """The parts of a weight that follow from ``packed``, by name; NumPy, CuPy or JAX arrays."""
    made = {"output_scales": spec.layout.range_factors}
    return {name: made[name](packed) for name, part in spec.parts.items() if part.derived}


def _grouped(columns: Any, layout: Layout, fill: int) -> Any:
    """(K, n) -> (groups, group_size, n), the last group filled up."""
    xp = namespace(columns)
    size = layout.K if layout.groups == 1 else layout.group_size
    missing = layout.groups * size - layout.K
    if missing:
        tail = xp.full((missing, columns.shape[1]), fill, dtype=columns.dtype)
        columns = xp.concatenate([columns, tail])
    return columns.reshape(layout.groups, size, columns.shape[1])


def column_blocks(shape: tuple[int, int], device: Device) -> Iterator[slice]:
    """Runs of whole 128-column blocks that bound the scratch memory of a conversion."""
    step = max(1, _BLOCK_WEIGHTS[device.kind] // (shape[0] * _COLUMNS)) * _COLUMNS
    for start in range(0, shape[1], step):
        yield slice(start, min(start + step, shape[1]))


def _as_float32(values: Any) -> Any:
    """fp16, bf16 or fp32 as float32, without asking CuPy for bfloat16 arithmetic."""
    xp = namespace(values)
    if values.dtype.name == BF16.name:
        return BF16.from_bits(xp.ascontiguousarray(values).view(xp.uint16))
    return values.astype(xp.float32)


def checked_weight(weight: Array, search: str) -> tuple[Framework, Any, str, float]:
    """The library of a weight, its native form, dtype and largest magnitude, or why it cannot be quantized."""
    if search not in _SEARCHES:
        raise ValueError(f"search is {search!r}; use one of {', '.join(_SEARCHES)}.")
    framework, weight = frameworks.resolve(weight, "weight")
    dtype = framework.dtype(weight)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; pass (K, N), not empty.")
    if dtype not in DENSE_NAMES:
        raise ValueError(f"weight is {dtype}; use float16, bfloat16 or float32.")
    native = framework.to_native(weight)
    device = device_of(native)
    with on(device):
        xp = namespace(native)
        largest = 0.0
        for columns in column_blocks(tuple(native.shape), device):
            block_largest = float(xp.max(xp.abs(_as_float32(native[:, columns]))))
            if not math.isfinite(block_largest):
                raise ValueError(
                    f"weight has NaN or infinity in columns {columns.start} to {columns.stop - 1}; "
                    "quantization needs finite weights."
                )
            largest = max(largest, block_largest)
    return framework, native, dtype, largest


def check_range(spec: Spec, largest: float) -> None:
    """ValueError if the scale dtype cannot hold, or hardly holds, the scales of weights up to ``largest``."""
    extremes = numpy.asarray([[[largest], [-largest]]], dtype=numpy.float32)
    needed = float(formats.get(spec.format).fit(extremes, 1.0)[formats.SCALE].max())
    if needed > spec.layout.scale.max:
        raise ValueError(
            f"weights up to {largest:.3g} need scales up to {needed:.3g}, beyond {spec.scale_dtype}; "
            'use scale_dtype="bfloat16" or rescale the weight.'
        )
    if spec.scale_dtype == F16.name and 0 < needed < _COARSE_FLOAT16:
        raise ValueError(
            f"weights up to {largest:.3g} need scales of {needed:.3g} at most, which float16 holds coarsely or not at "
            'all; use scale_dtype="bfloat16" or rescale the weight.'
        )


def device_of(native: Any) -> Device:
    """Where a native array is."""
    return frameworks.of(native).device(native)


def moved(native: Any, device: Device) -> Any:
    """A copy of a native array on ``device``."""
    source = device_of(native)
    if device == CPU:
        with on(source):
            return native.get()
    if device.index >= gpu_count():
        gpu(device.index)  # raises with the reason
    cupy = import_cupy("moving a weight to a GPU")
    if source != CPU:  # streams of two GPUs wait for nothing of one another
        cupy.cuda.Device(source.index).synchronize()
    with on(device):
        moved = cupy.asarray(native)
        if source != CPU:
            cupy.cuda.get_current_stream().synchronize()
    return moved
