"""int8: 256 evenly spaced levels, -128 to 127 times the scale of the group."""

from marlin_cupy.formats.format import whole_codes
from marlin_cupy.formats.integer import SymmetricInteger
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import U8

register(
    SymmetricInteger(
        name="int8",
        codes=U8,
        planes=whole_codes(8, (0, 2, 1, 3, 4, 6, 5, 7)),  # bytes p and p + 2 of each 32-bit half are a pair
        default_group_size=128,
        source="LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339), weights only, scales per group",
        largest_value=128,
    )
)
