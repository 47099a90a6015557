"""int4: 16 evenly spaced levels, -8 to 7 times the scale of the group."""

from marlin_cupy.formats.format import whole_codes
from marlin_cupy.formats.integer import PAIRS_FOUR_APART, SymmetricInteger
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import U4

register(
    SymmetricInteger(
        name="int4",
        codes=U4,
        planes=whole_codes(4, PAIRS_FOUR_APART),
        default_group_size=128,
        source="GPTQ (Frantar et al. 2022, arXiv:2210.17323) as MARLIN uses it (Frantar et al. 2024, arXiv:2408.11743)",
        largest_value=8,
    )
)
