"""WHAT a code means. Every module of this package that registers a format is found here by itself."""

import importlib
import pkgutil

from marlin_cupy.formats.format import SCALE, ZERO_POINT, Format
from marlin_cupy.formats.registry import get, names, register

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SCALE", "ZERO_POINT", "Format", "get", "names", "register"]
