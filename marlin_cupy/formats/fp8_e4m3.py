"""fp8_e4m3: 8-bit floats with 3 bits of mantissa, times a scale per output, per group, or per block of 128 x 128."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from marlin_cupy.device import namespace
from marlin_cupy.formats.format import SCALE, Format, Params, reciprocal, whole_codes
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import E4M3, F32, HALVES, U8

Array = Any

_BLOCK = 128  # K and outputs of a block


class Float8(Format):
    """weight = value of the 8-bit float * scale.

    With one group for all of K the scale is a float32 per output, which multiplies sums. Else it lies among the codes.
    """

    codes_as: ClassVar[str] = E4M3.name
    #: Whether a group has a scale of its own, or 128 outputs share theirs.
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {"scale": ("group", "block")}

    @property
    def zero_code(self) -> int:
        """+0."""
        return 0

    def has_output_scales(self, group_size: int) -> bool:
        """Where one group is all of K."""
        return group_size == -1

    def check_options(self, group_size: int, options: Mapping[str, str]) -> None:
        """Blocks are as high as they are wide."""
        if options.get("scale") == "block" and group_size != _BLOCK:
            raise ValueError(f"group_size is {group_size}; blocks of {_BLOCK} x {_BLOCK} need group_size={_BLOCK}.")

    def check_codes(self, codes: Array) -> None:
        """NaN is none."""
        if bool(((codes & 0x7F) == 0x7F).any()):
            raise ValueError(f"codes contain NaN (0x7F or 0xFF), which is no weight of {self.name}.")

    def share(self, values: Array, reduce: str, options: Mapping[str, str]) -> Array:
        """Of 128 outputs each, where the scale is that of a block."""
        if options.get("scale") != "block":
            return values
        xp = namespace(values)
        groups, columns = values.shape
        padded = xp.zeros((groups, -(-columns // _BLOCK) * _BLOCK), dtype=values.dtype)
        padded[:, :columns] = values
        blocks = padded.reshape(groups, -1, _BLOCK)
        of_block = blocks.max(axis=2) if reduce == "max" else blocks.sum(axis=2)
        return xp.repeat(of_block, _BLOCK, axis=1)[:, :columns]

    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """The largest magnitude becomes the largest code, 448."""
        xp = namespace(weights)
        return {SCALE: xp.max(xp.abs(weights), axis=1) * xp.float32(shrink / E4M3.max)}

    def encode(self, weights: Array, params: Params) -> Array:
        """Round to nearest even, then clamp to 448."""
        return E4M3.to_bits(weights * reciprocal(params[SCALE])[:, None, :])

    def decode(self, codes: Array, params: Params) -> Array:
        """The float, then the scale, in float32."""
        return E4M3.from_bits(codes) * params[SCALE][:, None, :]


register(
    Float8(
        name="fp8_e4m3",
        codes=U8,
        planes=whole_codes(8, range(8)),  # bytes 2 p and 2 p + 1 are the pair of register p: hardware converts them
        default_group_size=-1,
        source="FP8 formats for deep learning (Micikevicius et al. 2022, arXiv:2209.05433); blocks: DeepSeek-V3, "
        "arXiv:2412.19437, section 3.3",
        largest_value=512,
        scale_dtypes=(*HALVES, F32),
    )
)
