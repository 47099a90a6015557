"""int4: 16 evenly spaced levels, -8 to 7 times the scale of the group."""

from marlin_cupy.formats.integer import SymmetricInteger
from marlin_cupy.formats.registry import register

#: Nibbles p and p + 4 hold the two codes of register p, so that one mask lifts a pair
#: into the two 16-bit halves of a register, for fp16 and bf16 alike.
PAIRS_FOUR_APART = (0, 2, 4, 6, 1, 3, 5, 7)

register(
    SymmetricInteger(
        name="int4",
        bits=4,
        default_group_size=128,
        order=PAIRS_FOUR_APART,
        source="GPTQ (Frantar et al. 2022, arXiv:2210.17323) as MARLIN uses it (Frantar et al. 2024, arXiv:2408.11743)",
    )
)
