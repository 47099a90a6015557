"""WHOSE memory and stream: the adapter of an array, found by its type, importing nothing the user has not."""

from __future__ import annotations

import importlib
from typing import Any

from marlin_cupy.frameworks.framework import Framework, StreamFramework

#: Top-level package of an array's type -> module here. JAX's concrete arrays come from jaxlib.
_BY_PACKAGE = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}
_BY_TYPE: dict[type, Framework] = {}
#: What ``to`` accepts.
NAMES = ("numpy", "cupy", "torch", "jax")


def of(array: Any, role: str = "x") -> Framework:
    """The adapter for ``array``; TypeError naming its ``role`` when it is not an array."""
    kind = type(array)
    framework = _BY_TYPE.get(kind)
    if framework is None:
        framework = _BY_TYPE[kind] = _find(kind, role)
    return framework


def by_name(name: str) -> Framework:
    """The adapter of a library named as users name it; imports that library."""
    if name not in NAMES:
        raise ValueError(f"library is {name!r}; known libraries are {', '.join(NAMES)}.")
    return _load(name)


def _find(kind: type, role: str) -> Framework:
    for base in kind.__mro__:  # subclasses of an array type, torch.nn.Parameter among them
        package = base.__module__.partition(".")[0]
        if package in _BY_PACKAGE and (hasattr(kind, "__dlpack__") or hasattr(kind, "aval")):
            return _load(_BY_PACKAGE[package])
    if hasattr(kind, "__dlpack__"):
        return _load("dlpack")
    raise TypeError(
        f"{role} is a {kind.__module__}.{kind.__qualname__}; pass a NumPy, CuPy, JAX or PyTorch array, "
        "or any object with __dlpack__."
    )


def _load(name: str) -> Framework:
    framework: Framework = importlib.import_module(f"{__name__}.{name}").FRAMEWORK
    return framework


__all__ = ["NAMES", "Framework", "StreamFramework", "by_name", "of"]
