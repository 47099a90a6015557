"""What a weight format is: the contract that every file in this package fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from marlin_cupy.device import namespace
from marlin_cupy.formats.scalars import round_to

Array = Any  # a NumPy or CuPy array
Params = Mapping[str, Array]  # parameter name -> float32 (groups, columns)

SCALE = "scale"
ZERO_POINT = "zero_point"

#: The squared-error search tries this many shrink factors, from 1 (plain absmax) down, a third of a code apart.
SEARCH_STEPS = 26


@dataclass(frozen=True)
class Format(ABC):
    """How codes and per-group parameters stand for weights. Knows nothing of where codes are stored.

    A group is ``group_size`` consecutive K of one output column. Arrays here are grouped:
    weights float32 and codes uint8 of shape (groups, group_size, columns), each parameter
    float32 of shape (groups, columns).

    Attributes:
        name: the public name, also that of ``cuda_src/formats/<name>.cuh``.
        bits: width of a code, 4 or 8.
        default_group_size: used when the caller names none.
        order: how 8 codes make a word. The 8 codes of one MMA fragment are numbered 2 * register + half;
            position p of the word, counted from its lowest bits, holds code ``order[p]``.
        source: the publication or specification that the format follows.
        table: values of the codes where they are not integers. The kernel holds them rounded to the
            activation dtype, which a tolerance has to know.
        table_bytes: shared memory that the kernel's decoder wants for its own form of the table.
    """

    name: str
    bits: int
    default_group_size: int
    order: tuple[int, ...]
    source: str
    table: tuple[float, ...] | None = None
    table_bytes: int = 0

    #: Names of the per-group parameters, in the order in which a slab stores them.
    params: ClassVar[tuple[str, ...]] = (SCALE,)

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    @abstractmethod
    def zero_code(self) -> int:
        """The code that fills padding; its value times a scale of 0 is 0."""

    @abstractmethod
    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """Parameters from the extremes of each group, which ``shrink`` (0 to 1] pulls in, before rounding."""

    @abstractmethod
    def encode(self, weights: Array, params: Params) -> Array:
        """The codes nearest to ``weights`` under ``params``."""

    @abstractmethod
    def decode(self, codes: Array, params: Params) -> Array:
        """The float32 weights that ``codes`` stand for: the definition of the format."""

    def quantize(self, weights: Array, scale_dtype: str, search: str) -> tuple[Array, dict[str, Array]]:
        """Codes and parameters for grouped float32 ``weights``.

        Scales are rounded to ``scale_dtype`` before codes are chosen, so that each code is the nearest
        under the scale that is stored. ``search`` is "absmax", or "mse": per group, the shrink
        factor with the least squared error among SEARCH_STEPS.
        """

        def attempt(shrink: float) -> tuple[Array, dict[str, Array]]:
            params = {name: round_to(value, scale_dtype) for name, value in self.fit(weights, shrink).items()}
            return self.encode(weights, params), params

        codes, params = attempt(1.0)
        if search == "absmax":
            return codes, params
        xp = namespace(weights)

        def squared_error(codes: Array, params: Params) -> Array:
            difference = self.decode(codes, params) - weights
            return xp.sum(difference * difference, axis=1)

        error = squared_error(codes, params)
        for step in range(1, SEARCH_STEPS):
            other_codes, other_params = attempt(1.0 - step * 0.32 / 2**self.bits)
            other_error = squared_error(other_codes, other_params)
            better = other_error < error
            error = xp.where(better, other_error, error)
            codes = xp.where(better[:, None, :], other_codes, codes)
            params = {name: xp.where(better, other_params[name], params[name]) for name in params}
        return codes, params


def reciprocal(scale: Array) -> Array:
    """1 / scale, and 0 where the scale is 0 (a group of zeros) or so small that 1 / scale is infinite."""
    xp = namespace(scale)
    zero = xp.abs(scale) < xp.float32(2.0**-126)
    return xp.where(zero, xp.float32(0), 1 / xp.where(zero, xp.float32(1), scale))
