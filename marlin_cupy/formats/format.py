"""What a weight format is: the contract that every file in this package fulfils."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from marlin_cupy import scalars
from marlin_cupy.device import namespace
from marlin_cupy.scalars import HALVES, Scalar

Array = Any  # a NumPy or CuPy array
Params = Mapping[str, Array]  # parameter name -> float32 (groups, columns)

CODES = "codes"
SCALE = "scale"
ZERO_POINT = "zero_point"


@dataclass(frozen=True)
class Bits:
    """A run of bits in a unit of packed codes: ``width`` bits of code ``value``, from its bit ``first`` up.

    The codes of a unit are numbered 8 * atom + 2 * register + half, as a lane holds them in A fragments of 16 x 16.
    """

    value: int
    first: int
    width: int


#: A unit of a plane, from its lowest bit: one or two words of 32 bits that hold the same bits of 8 codes or more.
Plane = tuple[Bits, ...]


def whole_codes(bits: int, order: Sequence[int]) -> tuple[Plane, ...]:
    """One plane of 8 codes, each in one piece; position p, from the lowest bits, holds code ``order[p]``."""
    return (tuple(Bits(value, 0, bits) for value in order),)


@dataclass(frozen=True)
class Field:
    """What a weight stores per element or per group.

    Attributes:
        name: CODES, SCALE or ZERO_POINT.
        scalar: the type of one of them.
        per: K per stored value: 1 for codes, the group size for parameters (-1: one for all of K).
        planes: of codes: where their bits lie.
    """

    name: str
    scalar: Scalar
    per: int
    planes: tuple[Plane, ...] = ()


@dataclass(frozen=True)
class Format(ABC):
    """How codes and per-group parameters stand for weights. Knows nothing of where codes are stored.

    A group is ``group_size`` consecutive K of one output column. Arrays here are grouped:
    weights float32 and codes uint8 of shape (groups, group_size, columns), each parameter
    float32 of shape (groups, columns).

    Attributes:
        name: the public name, also that of ``cuda_src/formats/<name>.cuh``.
        codes: the type of a code.
        planes: how the bits of codes make words.
        default_group_size: used when the caller names none.
        source: the publication or specification that the format follows.
        largest_value: a power of two that no value of a code exceeds in magnitude, before the scale. Kernels for
            float16 keep scaled weights in range with it.
        scale_dtypes: the types that its scales can have.
        table: values of the codes where kernels look them up. They hold them rounded to the activation dtype, which a
            tolerance has to know.
        table_bytes: shared memory that the kernel's decoder wants for its own form of the table.
    """

    name: str
    codes: Scalar
    planes: tuple[Plane, ...]
    default_group_size: int
    source: str
    largest_value: int
    scale_dtypes: tuple[Scalar, ...] = HALVES
    table: tuple[float, ...] | None = None
    table_bytes: int = 0

    #: Names of the per-group parameters, in the order in which a slab stores them.
    params: ClassVar[tuple[str, ...]] = (SCALE,)
    #: The type of number that codes are the bits of, as NumPy and ml_dtypes spell it; "uint8": integers.
    codes_as: ClassVar[str] = "uint8"
    #: What else can be chosen, by name: the values that an option can have, the default first.
    options: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.codes.bits

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    @abstractmethod
    def zero_code(self) -> int:
        """The code that fills padding; its value times a scale of 0 is 0."""

    def has_output_scales(self, group_size: int) -> bool:
        """Whether its scales are one float32 per output, beside the packed codes and not among them."""
        return False

    def fields(self, group_size: int, scale: Scalar) -> tuple[Field, ...]:
        """What lies in a slab, in this order: parameters, then codes."""
        stored = () if self.has_output_scales(group_size) else self.params
        return (
            *(Field(name, scale, group_size) for name in stored),
            Field(CODES, self.codes, 1, self.planes),
        )

    def checked_scale_dtype(self, asked: str | None, like: str, group_size: int) -> str:
        """``asked``, or for None ``like`` if it has 16 bits and scales can have it, or else what the format uses.

        ValueError where scales cannot be of type ``asked``.
        """
        allowed = [each.name for each in self.scale_dtypes]
        if self.has_output_scales(group_size):
            allowed = [scalars.F32.name]
        if asked is None:
            return like if like in allowed and like in scalars.HALF_NAMES else allowed[0]
        if asked not in allowed:
            raise ValueError(f"scale_dtype is {asked!r}; scales of {self.name} are {' or '.join(allowed)}.")
        return asked

    def check_group_size(self, group_size: int) -> None:
        """ValueError where the format has no groups of that size, a multiple of 16 or -1."""
        return None

    def check_options(self, group_size: int, options: Mapping[str, str]) -> None:
        """ValueError where ``options``, which are not the defaults, do not go with groups of that size."""
        return None

    def check_codes(self, codes: Array) -> None:
        """ValueError where ``codes`` (K, columns) are none of this format."""
        largest = int(codes.max())
        if largest > self.max_code:
            raise ValueError(f"the largest code is {largest}; {self.name} has {self.bits} bits.")

    def share(self, values: Array, reduce: str, options: Mapping[str, str]) -> Array:
        """``values`` (groups, columns), "max" or "sum" of those of outputs that share parameters: none do here."""
        return values

    @abstractmethod
    def fit(self, weights: Array, shrink: float) -> dict[str, Array]:
        """Parameters from the extremes of each group, which ``shrink`` (0 to 1] pulls in, before rounding."""

    @abstractmethod
    def encode(self, weights: Array, params: Params) -> Array:
        """The codes nearest to ``weights`` under ``params``."""

    @abstractmethod
    def decode(self, codes: Array, params: Params) -> Array:
        """The float32 weights that ``codes`` stand for: the definition of the format."""

    @property
    def shrinks(self) -> tuple[float, ...]:
        """What a search tries: 1 (plain absmax) first, then a third of a code less at a time."""
        return tuple(1.0 - step * 0.32 / 2**self.bits for step in range(SEARCH_STEPS))

    def quantize(
        self, weights: Array, scale: Scalar, search: str, options: Mapping[str, str]
    ) -> tuple[Array, dict[str, Array]]:
        """Codes and parameters for grouped float32 ``weights``.

        Parameters are rounded to ``scale`` before codes are chosen, so that each code is the nearest
        under the scale that is stored. ``search`` is "absmax", or "mse": per group, the one of
        :attr:`shrinks` with the least squared error.
        """

        def attempt(shrink: float) -> tuple[Array, dict[str, Array]]:
            fitted = self.fit(weights, shrink).items()
            params = {name: scale.round(self.share(value, "max", options)) for name, value in fitted}
            return self.encode(weights, params), params

        first, *others = self.shrinks
        codes, params = attempt(first)
        if search == "absmax":
            return codes, params
        xp = namespace(weights)

        def squared_error(codes: Array, params: Params) -> Array:
            difference = self.decode(codes, params) - weights
            return self.share(xp.sum(difference * difference, axis=1), "sum", options)

        error = squared_error(codes, params)
        for shrink in others:
            other_codes, other_params = attempt(shrink)
            other_error = squared_error(other_codes, other_params)
            better = other_error < error
            error = xp.where(better, other_error, error)
            codes = xp.where(better[:, None, :], other_codes, codes)
            params = {name: xp.where(better, other_params[name], params[name]) for name in params}
        return codes, params


#: Factors that the squared-error search tries.
SEARCH_STEPS = 26


def reciprocal(scale: Array) -> Array:
    """1 / scale, and 0 where the scale is 0 (a group of zeros) or so small that 1 / scale is infinite."""
    xp = namespace(scale)
    zero = xp.abs(scale) < xp.float32(2.0**-126)
    return xp.where(zero, xp.float32(0), 1 / xp.where(zero, xp.float32(1), scale))
