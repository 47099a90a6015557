"""What every kernel's model of time has in common: reading a weight, limits that overlap.

The numbers are in :mod:`marlin_cupy.kernels.measured`; the rest of a kernel's model is in its own file.
"""

from __future__ import annotations

import math

from marlin_cupy import formats, scalars
from marlin_cupy.device import Gpu
from marlin_cupy.kernels import measured
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.kernels.problem import Problem
from marlin_cupy.scalars import F16
from marlin_cupy.spec import Spec

#: How sharply the longest of times that overlap decides: the exponent of the norm that adds them up.
_OVERLAP = 4.0


def read_us(nbytes: int, gpu: Gpu, known: Measured) -> float:
    """Microseconds in which kernels are taken to read so much with all SMs of ``gpu``, without any launch."""
    return nbytes / (gpu.memory_gbs * known.memory.read_share * 1e3)


def overlapped_us(*limits: float) -> float:
    """The time of what goes on at once: about the longest, somewhat more where several are close."""
    return float(sum(us**_OVERLAP for us in limits) ** (1 / _OVERLAP))


def can_scale(spec: Spec, dtype: str) -> bool:
    """Whether weights may be multiplied by their scale in the activations' ``dtype``: see :func:`scaling_roundings`.

    Not where bfloat16 would round a float16 or float32 scale, the same way for a whole group. float16 holds the digits
    of a bfloat16 scale, nearly those of a float32 one, and factors per output bring it into range.
    """
    if formats.get(spec.format).has_output_scales(spec.group_size):
        return True  # which multiply sums
    return dtype == F16.name or _digits(spec.scale_dtype) <= _digits(dtype)


def scaling_roundings(spec: Spec, dtype: str) -> int:
    """How often a weight is rounded where it is multiplied by its scale in ``dtype``: its scale, and the product.

    Scales of outputs multiply sums, and a power of two changes no digits.
    """
    of_scale = _digits(spec.scale_dtype)
    if formats.get(spec.format).has_output_scales(spec.group_size) or of_scale == 1:
        return 0
    return 2 if of_scale > _digits(dtype) else 1


def _digits(dtype: str) -> int:
    return scalars.by_name(dtype).digits


def floor_us(problem: Problem) -> float | None:
    """An estimate of the least time of ``problem`` on its GPU: its packed weight read once, and a launch.

    None on the CPU. The memory's rate comes from the driver, or is a typical one of the architecture where the driver
    does not tell, and a GPU whose L2 cache holds the weight can be faster: ``python -m marlin_cupy bench`` measures.
    """
    if problem.gpu is None:
        return None
    memory = measured.of(problem.gpu).memory
    nbytes = math.prod(problem.w.layout.packed_shape)
    return memory.floor_launch_us + nbytes / (problem.gpu.memory_gbs * memory.floor_share * 1e3)
