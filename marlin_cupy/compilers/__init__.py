"""WHO calls: the product as an operation that a compiler or automatic differentiation knows, a module per library.

Each module here has ``matmul(x, w, bias, batch_invariant, dependent)`` for arrays whose shapes and dtypes have been
checked. It is imported when the first array comes that needs it.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from marlin_cupy.frameworks import NAMES, Framework


def of(framework: Framework) -> Any:
    """The module for a library whose ``follows`` says that it is needed."""
    return getattr(sys.modules[__name__], framework.name)


def __getattr__(name: str) -> Any:
    """A module of this package, imported. (A compiler that traces ``of`` follows no import, but does look up names.)"""
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.{name}")
