"""WHOSE memory and stream: the adapter of an array, found by its type, importing nothing the user has not."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from marlin_cupy.errors import MissingDependencyError
from marlin_cupy.frameworks import dlpack
from marlin_cupy.frameworks.framework import Framework, StreamFramework

#: Top-level package of an array's type -> module here. JAX's concrete arrays come from jaxlib.
_BY_PACKAGE = {"numpy": "numpy", "cupy": "cupy", "torch": "torch", "jax": "jax", "jaxlib": "jax"}
_BY_TYPE: dict[type, Framework] = {}
#: What ``to`` accepts.
NAMES = ("numpy", "cupy", "torch", "jax")


def resolve(array: Any, role: str = "x") -> tuple[Framework, Any]:
    """The adapter for ``array``, and ``array`` or, where only DLPack is known of it, a native array over its memory.

    Raises:
        TypeError: it is no array; the message names its ``role``.
    """
    kind = type(array)
    framework = _BY_TYPE.get(kind)
    if framework is None:
        name = _find(kind)
        if name is None:
            if not hasattr(kind, "__dlpack__"):
                raise TypeError(
                    f"{role} is a {kind.__module__}.{kind.__qualname__}; pass a NumPy, CuPy, JAX or PyTorch array, "
                    "or any object with __dlpack__."
                )
            array = dlpack.to_native(array, role)
            return of(array), array
        framework = _BY_TYPE[kind] = _load(name)
    return framework, array


def of(array: Any) -> Framework:
    """The adapter for an array of a library that has one."""
    return resolve(array)[0]


def is_of(array: Any, framework: Framework) -> bool:
    """Whether ``array`` is of a type that was found to be of this library."""
    return _BY_TYPE.get(type(array)) is framework


def by_name(name: str) -> Framework:
    """The adapter of a library named as users name it; imports that library.

    Raises:
        ValueError: no such library. MissingDependencyError: it is not installed.
    """
    if name not in NAMES:
        raise ValueError(f"library is {name!r}; known libraries are {', '.join(NAMES)}.")
    try:
        return _load(name)
    except ImportError as error:
        extra = "cuda13" if name == "cupy" else name
        raise MissingDependencyError(
            f"arrays of {name} need {name}, which is not importable here ({error}); pip install 'marlin_cupy[{extra}]'."
        ) from error


def meet(kind: type) -> None:
    """Show a class whose objects hold arrays to the libraries that the user has imported; see Framework.meet."""
    for name in NAMES:
        if sys.modules.get(name) is not None:
            _load(name).meet(kind)


def _find(kind: type) -> str | None:
    """The module here for a type: its own library's or, for a subclass, that of a base."""
    for base in kind.__mro__:
        package = base.__module__.partition(".")[0]
        if package in _BY_PACKAGE and (hasattr(kind, "__dlpack__") or hasattr(kind, "aval")):
            return _BY_PACKAGE[package]
    return None


def _load(name: str) -> Framework:
    framework: Framework = importlib.import_module(f"{__name__}.{name}").FRAMEWORK
    return framework


__all__ = ["NAMES", "Framework", "StreamFramework", "by_name", "is_of", "meet", "of", "resolve"]
