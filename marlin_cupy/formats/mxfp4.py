"""mxfp4: 4-bit floats with 1 bit of mantissa, times a power of two per 32 weights."""

from __future__ import annotations

from typing import Any

from marlin_cupy.device import namespace
from marlin_cupy.formats.format import SCALE, Bits, Format, Params, Plane, reciprocal
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import E2M1, E8M0, U4

Array = Any


def _planes() -> tuple[Plane, ...]:
    """Four codes of a word lie where float16 has sign and magnitude; the other four fill what is left::

    byte    7: sign of A   6-4: magnitude of B   3-1: magnitude of A   0: sign of B
    codes   A of bytes 0 to 3: 2, 0, 3, 1       B of bytes 0 to 3: 6, 4, 7, 5
    """
    runs: list[Bits] = []
    for a, b in ((2, 6), (0, 4), (3, 7), (1, 5)):
        runs += [Bits(b, 3, 1), Bits(a, 0, 3), Bits(b, 0, 3), Bits(a, 3, 1)]
    return (tuple(runs),)


class MicroscalingFloat4(Format):
    """weight = value of the 4-bit float (0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives) * 2**(scale bits - 127)."""

    @property
    def zero_code(self) -> int:
        """+0."""
        return 0

    @property
    def shrinks(self) -> tuple[float, ...]:
        """Powers of two are far apart: what the specification says, its double and its half."""
        return 1.0, 2.0, 0.5

    def check_group_size(self, group_size: int) -> None:
        """Blocks of 32, nothing else."""
        if group_size != 32:
            raise ValueError(f"group_size is {group_size}; mxfp4 has one scale per 32 weights.")

    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """OCP MX 1.0, section 6.3: the exponent of the largest magnitude less that of 4, the largest power of two."""
        xp = namespace(weights)
        largest = xp.max(xp.abs(weights), axis=1)
        _, exponent = xp.frexp(largest)
        scale = xp.ldexp(xp.float32(shrink), xp.clip(exponent - 3, -126, 126)).astype(xp.float32)
        return {SCALE: xp.where(largest == 0, xp.float32(0), scale)}

    def encode(self, weights: Array, params: Params) -> Array:
        """Round to nearest, ties to the even code, then clamp to 6."""
        return E2M1.to_bits(weights * reciprocal(params[SCALE])[:, None, :])

    def decode(self, codes: Array, params: Params) -> Array:
        """The float, then the scale, in float32."""
        return E2M1.from_bits(codes) * params[SCALE][:, None, :]


register(
    MicroscalingFloat4(
        name="mxfp4",
        codes=U4,
        planes=_planes(),
        default_group_size=32,
        source="OCP Microscaling Formats (MX) Specification 1.0, section 5",
        largest_value=8,
        scale_dtypes=(E8M0,),
    )
)
