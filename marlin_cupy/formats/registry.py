"""The formats by name."""

from __future__ import annotations

import itertools
from collections import Counter

from marlin_cupy.formats.format import Format

_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make ``format`` available under its name; ValueError if the name is taken or its planes are not its codes."""
    if format.name in _FORMATS:
        raise ValueError(f"a format named {format.name!r} is registered already.")
    held: Counter[tuple[int, int]] = Counter()  # (code, bit) of the codes that a lane has of a slab
    for plane in format.planes:
        size, codes = sum(run.width for run in plane), len({run.value for run in plane})
        if size not in (32, 64) or codes % 8:
            raise ValueError(
                f"a plane of format {format.name!r} has {size} bits of {codes} codes; "
                "use 32 or 64 bits of a multiple of 8 codes."
            )
        for unit, run in itertools.product(range(0, 64, codes), plane):
            held.update((unit + run.value, bit) for bit in range(run.first, run.first + run.width))
    if held != Counter(itertools.product(range(64), range(format.bits))):
        raise ValueError(f"the planes of format {format.name!r} do not hold each bit of its codes exactly once.")
    _FORMATS[format.name] = format


def get(name: str) -> Format:
    """The format of that name; ValueError that lists the names otherwise."""
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats are {', '.join(names())}.")
    return _FORMATS[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_FORMATS)
