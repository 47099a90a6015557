"""WHO calls: the product as an operation that a compiler or automatic differentiation knows, a module per library.

Each module here has ``matmul(x, w, bias, batch_invariant, dependent)`` for arrays whose shapes and dtypes have been
checked. It is imported when the first array comes that needs it.
"""

from __future__ import annotations

import importlib
from typing import Any

from marlin_cupy.frameworks import Framework


def of(framework: Framework) -> Any:
    """The module for a library whose ``follows`` says that it is needed."""
    return importlib.import_module(f"{__name__}.{framework.name}")
