"""The formats by name."""

from __future__ import annotations

from marlin_cupy.formats.format import Format

_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make ``format`` available under its name; ValueError if the name is taken or its planes are not its codes."""
    if format.name in _FORMATS:
        raise ValueError(f"a format named {format.name!r} is registered already.")
    held: dict[int, int] = {}  # code of a unit -> mask of its bits
    for plane in format.planes:
        size = sum(run.width for run in plane)
        values = {run.value for run in plane}
        if size not in (32, 64) or len(values) % 8 or values != set(range(len(values))):
            raise ValueError(f"a plane of format {format.name!r} has {size} bits of {len(values)} codes; use 32 or 64.")
        for atoms in range(0, 64, len(values)):
            for run in plane:
                held[atoms + run.value] = held.get(atoms + run.value, 0) + (((1 << run.width) - 1) << run.first)
    if set(held.values()) != {format.max_code}:
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
