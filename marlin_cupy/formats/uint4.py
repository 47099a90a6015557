"""uint4: 16 evenly spaced levels from a minimum to a maximum per group, with an integer zero point."""

from marlin_cupy.formats.integer import AsymmetricInteger
from marlin_cupy.formats.registry import register

register(
    AsymmetricInteger(
        name="uint4",
        bits=4,
        default_group_size=128,
        order=(0, 2, 4, 6, 1, 3, 5, 7),  # as int4: one mask lifts a pair
        source="AWQ (Lin et al. 2023, arXiv:2306.00978)",
    )
)
