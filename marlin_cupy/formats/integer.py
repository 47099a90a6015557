"""Integer codes: one scale per group, with the zero point in the middle or stored per group."""

from __future__ import annotations

from typing import Any, ClassVar

from marlin_cupy.device import namespace
from marlin_cupy.formats.format import SCALE, ZERO_POINT, Bits, Format, Params, Plane, reciprocal

Array = Any

#: Nibbles p and p + 4 of a word hold the two codes of register p, so that one mask lifts a pair
#: into the two 16-bit halves of a register, for fp16 and bf16 alike.
PAIRS_FOUR_APART = (0, 2, 4, 6, 1, 3, 5, 7)


def nibble_planes(*widths: int) -> tuple[Plane, ...]:
    """Planes of 1 or 2 bits of a code, the lowest bits first, for codes of fewer than 4 bits.

    A word of a plane holds its bits of several atoms, interleaved: shifted and masked, they lie where a word of 4-bit
    codes has them, in nibbles as PAIRS_FOUR_APART orders them. So one decoder serves all of these formats::

        plane of 2 bits, of two atoms      a nibble: [ atom 1 ][ atom 0 ]
        plane of 1 bit, of four atoms      a nibble: [ atom 3 ][ atom 2 ][ atom 1 ][ atom 0 ]
    """
    first, planes = 0, []
    for width in widths:
        planes.append(
            tuple(Bits(8 * atom + value, first, width) for value in PAIRS_FOUR_APART for atom in range(4 // width))
        )
        first += width
    return tuple(planes)


class SymmetricInteger(Format):
    """weight = (code - 2**(bits - 1)) * scale."""

    @property
    def zero_code(self) -> int:
        """The middle code."""
        return int(2 ** (self.bits - 1))

    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """Absmax over half of the code range: no value is off by more than half a step."""
        xp = namespace(weights)
        return {SCALE: xp.max(xp.abs(weights), axis=1) * xp.float32(2 * shrink / self.max_code)}

    def encode(self, weights: Array, params: Params) -> Array:
        """Round to nearest even, then clamp to the code range."""
        xp = namespace(weights)
        steps = xp.rint(weights * reciprocal(params[SCALE])[:, None, :])
        return xp.clip(steps + self.zero_code, 0, self.max_code).astype(xp.uint8)

    def decode(self, codes: Array, params: Params) -> Array:
        """(code - middle) * scale in float32."""
        xp = namespace(codes)
        return (codes.astype(xp.float32) - xp.float32(self.zero_code)) * params[SCALE][:, None, :]


class AsymmetricInteger(Format):
    """weight = (code - zero_point) * scale, the zero point an integer code of its own per group."""

    params: ClassVar[tuple[str, ...]] = (SCALE, ZERO_POINT)

    @property
    def zero_code(self) -> int:
        """Padding has zero point 0."""
        return 0

    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """The range of the group, stretched to contain 0 so that the zero point is a code."""
        xp = namespace(weights)
        low = xp.minimum(xp.min(weights, axis=1), xp.float32(0)) * xp.float32(shrink)
        high = xp.maximum(xp.max(weights, axis=1), xp.float32(0)) * xp.float32(shrink)
        scale = high / xp.float32(self.max_code) - low / xp.float32(self.max_code)  # high - low may overflow
        zero_point = xp.clip(xp.rint(-low * reciprocal(scale)), 0, self.max_code)
        return {SCALE: scale, ZERO_POINT: zero_point}

    def encode(self, weights: Array, params: Params) -> Array:
        """Round to nearest even, then clamp to the code range."""
        xp = namespace(weights)
        steps = xp.rint(weights * reciprocal(params[SCALE])[:, None, :])
        return xp.clip(steps + params[ZERO_POINT][:, None, :], 0, self.max_code).astype(xp.uint8)

    def decode(self, codes: Array, params: Params) -> Array:
        """(code - zero_point) * scale in float32."""
        xp = namespace(codes)
        return (codes.astype(xp.float32) - params[ZERO_POINT][:, None, :]) * params[SCALE][:, None, :]
