"""nf4: 16 levels at the quantiles of a normal distribution, times the largest magnitude of the group."""

from __future__ import annotations

import itertools
from typing import Any

from marlin_cupy.device import namespace
from marlin_cupy.formats.format import SCALE, Format, Params, reciprocal, whole_codes
from marlin_cupy.formats.registry import register
from marlin_cupy.scalars import U4

Array = Any

#: QLoRA, appendix E: the code is the index.
TABLE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


class NormalFloat(Format):
    """weight = TABLE[code] * scale."""

    @property
    def zero_code(self) -> int:
        """The index of 0.0."""
        return TABLE.index(0.0)

    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """The largest magnitude of the group."""
        xp = namespace(weights)
        return {SCALE: xp.max(xp.abs(weights), axis=1) * xp.float32(shrink)}

    def encode(self, weights: Array, params: Params) -> Array:
        """The nearest level: the number of midpoints below."""
        xp = namespace(weights)
        middles = xp.asarray([(a + b) / 2 for a, b in itertools.pairwise(TABLE)], dtype=xp.float32)
        return xp.searchsorted(middles, weights * reciprocal(params[SCALE])[:, None, :]).astype(xp.uint8)

    def decode(self, codes: Array, params: Params) -> Array:
        """Table look-up, then scale, in float32."""
        xp = namespace(codes)
        # Level by level: an array of them would be a constant in a JAX program, which cannot be split among devices.
        table = xp.stack([xp.full((), level, dtype=xp.float32) for level in TABLE])
        return table[codes] * params[SCALE][:, None, :]


register(
    NormalFloat(
        name="nf4",
        codes=U4,
        planes=whole_codes(4, range(8)),  # byte p is the pair of register p: the index of a table of pairs
        default_group_size=64,
        source="QLoRA (Dettmers et al. 2023, arXiv:2305.14314), appendix E",
        largest_value=1,
        table=TABLE,
        table_bytes=256 * 32 * 4,  # all pairs of codes, a copy per lane
    )
)
