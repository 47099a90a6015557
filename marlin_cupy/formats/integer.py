"""Integer codes: one scale per group, with the zero point in the middle or stored per group."""

from __future__ import annotations

from typing import Any, ClassVar

from marlin_cupy.device import namespace
from marlin_cupy.formats.format import SCALE, ZERO_POINT, Format, Params, reciprocal

Array = Any


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
