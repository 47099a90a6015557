"""The formats by name."""

from __future__ import annotations

from marlin_cupy.formats.format import Format

_FORMATS: dict[str, Format] = {}


def register(format: Format) -> None:
    """Make ``format`` available under its name; ValueError if the name is taken or the order is no permutation."""
    if format.name in _FORMATS:
        raise ValueError(f"a format named {format.name!r} is registered already.")
    if sorted(format.order) != list(range(8)) or format.bits not in (4, 8):
        raise ValueError(f"format {format.name!r} needs 4 or 8 bits and an order that is a permutation of 0 to 7.")
    _FORMATS[format.name] = format


def get(name: str) -> Format:
    """The format of that name; ValueError that lists the names otherwise."""
    if name not in _FORMATS:
        raise ValueError(f"unknown format {name!r}; known formats are {', '.join(names())}.")
    return _FORMATS[name]


def names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_FORMATS)
