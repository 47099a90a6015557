"""WHAT a code means. Every module of this package that registers a format is found here by itself."""

import importlib
import pkgutil

from marlin_cupy.formats.format import CODES, SCALE, ZERO_POINT, Bits, Field, Format, Plane
from marlin_cupy.formats.registry import get, names, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "CODES",
    "SCALE",
    "ZERO_POINT",
    "Bits",
    "Field",
    "Format",
    "Plane",
    "get",
    "names",
    "register",
]
