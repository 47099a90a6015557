"""What a GPU takes for what every kernel does: reading a weight, decoding it.

The rest of a kernel's costs is at the top of its own file, with what it was fitted to. All of them are those of an
H200, and elsewhere an SM is taken to be as fast as there; only the number of SMs and the memory are those of the GPU at
hand. Predictions rank candidates; times to rely on come from :func:`marlin_cupy.tune`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from marlin_cupy.device import Gpu
from marlin_cupy.formats.scalars import FLOAT16, HALF_DTYPES
from marlin_cupy.kernels.problem import Problem
from marlin_cupy.layout import Layout
from marlin_cupy.spec import Spec

#: The part of the memory's nominal rate that a kernel with nothing but bulk copies reaches, and what its launch adds to
#: that in a CUDA graph: a line through the read floors in examples/results/h200.json.
_FLOOR_SHARE, _FLOOR_LAUNCH_US = 0.942, 1.53
#: The part that a kernel with loads alone reached when the kernels' costs were fitted, which go with it.
_READ_SHARE = 0.885
#: How sharply the longest of times that overlap decides: the exponent of the norm that adds them up.
_OVERLAP = 4.0
#: Granules that are so small take longer.
_FINE_GRANULE = 32


@dataclass(frozen=True)
class DecodeFactors:
    """How much longer a kernel takes for a slab than for one of int4 with float16 and granules of 64 or 128.

    Attributes:
        formats: by format, with float16 and with bfloat16 activations; as long where a format is not listed.
        fine: where granules are 32 or less.
    """

    formats: dict[str, tuple[float, float]]
    fine: float

    def __call__(self, layout: Layout, dtype: str) -> float:
        """The factor for slabs of ``layout``."""
        factor = self.formats.get(layout.format.name, (1.0, 1.0))[HALF_DTYPES.index(dtype)]
        return factor * self.fine if layout.granule <= _FINE_GRANULE else factor


def read_us(nbytes: int, gpu: Gpu) -> float:
    """Microseconds in which kernels are taken to read so much with all SMs of ``gpu``, without any launch."""
    return nbytes / (gpu.memory_gbs * _READ_SHARE * 1e3)


def overlapped_us(*limits: float) -> float:
    """The time of what goes on at once: about the longest, somewhat more where several are close."""
    return float(sum(us**_OVERLAP for us in limits) ** (1 / _OVERLAP))


def can_scale(spec: Spec, dtype: str) -> bool:
    """Whether weights may be multiplied by their scale in the activations' ``dtype``, which rounds each once more.

    Not where bfloat16 would round a float16 scale, the same way for a whole group. float16 holds the digits of a
    bfloat16 scale, and factors per output bring it into range.
    """
    return dtype in (FLOAT16, spec.scale_dtype)


def floor_us(problem: Problem) -> float | None:
    """An estimate of the least time of ``problem`` on its GPU: its packed weight read once, and a launch.

    None on the CPU. The memory's rate comes from the driver, or is a typical one of the architecture where the driver
    does not tell, and a GPU whose L2 cache holds the weight can be faster: ``python -m marlin_cupy bench`` measures.
    """
    if problem.gpu is None:
        return None
    nbytes = math.prod(problem.w.layout.packed_shape)
    return _FLOOR_LAUNCH_US + nbytes / (problem.gpu.memory_gbs * _FLOOR_SHARE * 1e3)
