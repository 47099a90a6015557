"""int2: 4 evenly spaced levels, -2 to 1 times the scale of the group."""

from marlin_cupy.formats.integer import SymmetricInteger, nibble_planes
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import U2

register(
    SymmetricInteger(
        name="int2",
        codes=U2,
        planes=nibble_planes(2),
        default_group_size=64,
        source="GPTQ (Frantar et al. 2022, arXiv:2210.17323), section 4, extreme quantization",
        largest_value=2,
    )
)
