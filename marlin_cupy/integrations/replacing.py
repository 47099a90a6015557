"""Layers of a model that are replaced: which ones, and what became of them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from marlin_cupy.spec import Spec

#: Which layers to quantize: a function of name and layer, or patterns of names as of a shell ("*.mlp.*").
Filter = Callable[[str, Any], bool] | str | Iterable[str]


@dataclass(frozen=True)
class Report:
    """What became of the linear layers of a model.

    Attributes:
        replaced: names of the layers that were quantized, with what they are now. A layer in several places has
            several names.
        kept: names of layers that were left, with the reason.
        bytes_before, bytes_after: of the weights that were quantized.
    """

    replaced: dict[str, Spec]
    kept: dict[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = f"{self.bytes_before / 1e6:.1f} MB are now {self.bytes_after / 1e6:.1f} MB"
        return "\n".join(
            [
                f"{len(self.replaced)} layers quantized: {sizes}",
                *(f"kept {name}: {reason}" for name, reason in self.kept.items()),
            ]
        )


def matches(filter: Filter | None) -> Callable[[str, Any], bool]:
    """``filter`` as a function of name and layer; None takes all."""
    if filter is None:
        return lambda name, layer: True
    if callable(filter):
        return filter
    patterns = [filter] if isinstance(filter, str) else list(filter)
    return lambda name, layer: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
