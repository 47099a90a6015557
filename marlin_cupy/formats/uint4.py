"""uint4: 16 evenly spaced levels from a minimum to a maximum per group, with an integer zero point."""

from marlin_cupy.formats.format import whole_codes
from marlin_cupy.formats.integer import PAIRS_FOUR_APART, AsymmetricInteger
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import U4

register(
    AsymmetricInteger(
        name="uint4",
        codes=U4,
        planes=whole_codes(4, PAIRS_FOUR_APART),
        default_group_size=128,
        source="AWQ (Lin et al. 2023, arXiv:2306.00978)",
        largest_value=16,
    )
)
