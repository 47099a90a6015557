"""int3: 8 evenly spaced levels, -4 to 3 times the scale of the group."""

from marlin_cupy.formats.integer import SymmetricInteger, nibble_planes
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import U3

register(
    SymmetricInteger(
        name="int3",
        codes=U3,
        planes=nibble_planes(2, 1),
        default_group_size=128,
        source="GPTQ (Frantar et al. 2022, arXiv:2210.17323), whose 3-bit results are symmetric too",
        largest_value=4,
    )
)
