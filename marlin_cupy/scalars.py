"""The types of numbers that weights, parameters and activations are stored in: as values, as bits, in C++.

CuPy knows no floats of 8 bits and fewer, and little of bfloat16. So numbers travel as float32 whose values are exact
in their type, and become bits by integer arithmetic alone. All of it works on NumPy, CuPy and JAX arrays.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes  # noqa: F401  # NumPy then knows its types by name
import numpy

from marlin_cupy.device import namespace

Array = Any  # an array of NumPy, CuPy or JAX


@dataclass(frozen=True)
class Scalar:
    """An unsigned integer of ``bits`` bits.

    Attributes:
        name: as NumPy and ml_dtypes spell it.
        bits: in memory.
        cpp: the type in cuda_src/ptx/types.cuh; empty where kernels have none.
    """

    name: str
    bits: int
    cpp: str = ""

    @property
    def dtype(self) -> numpy.dtype[Any]:
        """The NumPy type of the values; TypeError where there is none."""
        return numpy.dtype(self.name)

    @property
    def stored_as(self) -> str:
        """The NumPy type that holds the bits."""
        return f"uint{max(8, self.bits)}"

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float((1 << self.bits) - 1)

    @property
    def least(self) -> float:
        """The value of bits that are all 0, which padding has."""
        return 0.0

    @property
    def digits(self) -> int:
        """Significant bits."""
        return self.bits

    @property
    def roundoff(self) -> float:
        """The largest relative error of rounding to nearest, of normal numbers."""
        return float(2.0**-self.digits)

    def to_bits(self, values: Array) -> Array:
        """The bits of float32 ``values``, finite ones, rounded to nearest even and clipped to what there is."""
        xp = namespace(values)
        return xp.clip(xp.rint(values), 0, self.max).astype(self.stored_as)

    def from_bits(self, bits: Array) -> Array:
        """The float32 values of ``bits``: the inverse of :meth:`to_bits`."""
        return bits.astype(namespace(bits).float32)

    def round(self, values: Array) -> Array:
        """float32 ``values`` as this type holds them, in float32."""
        return self.from_bits(self.to_bits(values))


@dataclass(frozen=True)
class Float(Scalar):
    """An IEEE-like floating-point type with subnormals: a sign, an exponent, a mantissa.

    Attributes:
        exponent_bits: of the exponent.
        largest: its largest finite value, where the all-ones exponent is in use; 0: it is not.
    """

    exponent_bits: int = 0
    largest: float = 0.0

    @property
    def digits(self) -> int:
        """Significant bits, the first of which is not stored."""
        return self.bits - self.exponent_bits

    @property
    def max(self) -> float:
        """The largest finite value."""
        top = float(2.0 ** (self._bias + 1) * (1 - 2.0**-self.digits))
        return self.largest or top

    @property
    def _bias(self) -> int:
        return int(2 ** (self.exponent_bits - 1) - 1)

    def to_bits(self, values: Array) -> Array:
        """The bits of float32 ``values``, finite ones, rounded to nearest even. Types of 8 bits and fewer clip."""
        xp = namespace(values)
        if self.bits == 32:
            return values.astype(xp.float32).view(xp.uint32)
        if self == F16:
            return values.astype(xp.float16).view(xp.uint16)
        if self == BF16:
            bits = values.astype(xp.float32).view(xp.uint32)
            return ((bits + (((bits >> 16) & 1) + 0x7FFF).astype(xp.uint32)) >> 16).astype(xp.uint16)
        mantissa = self.digits - 1
        magnitude = xp.minimum(xp.abs(values), xp.float32(self.max))
        # Fraction * 2**exponent, fraction from 1/2 to 1; subnormal numbers have the exponent of the least normal one.
        _, exponent = xp.frexp(xp.maximum(magnitude, xp.float32(2.0 ** (1 - self._bias))))
        steps = xp.rint(xp.ldexp(magnitude, mantissa + 1 - exponent)).astype(xp.int32)
        code = ((exponent - 2 + self._bias) << mantissa) + steps  # a carry is the next exponent
        return (code | (xp.signbit(values).astype(xp.int32) << (self.bits - 1))).astype(xp.uint8)

    def from_bits(self, bits: Array) -> Array:
        """The float32 values of ``bits``, which are no NaN: the inverse of :meth:`to_bits`."""
        xp = namespace(bits)
        if self.bits == 32:
            return bits.view(xp.float32)
        if self == F16:
            return bits.view(xp.float16).astype(xp.float32)
        if self == BF16:
            return (bits.astype(xp.uint32) << 16).view(xp.float32)
        wide = bits.astype(xp.uint16)  # a float16 with fewer bits; where the exponent has fewer, its bias is less
        sign, magnitude = wide >> (self.bits - 1), wide & ((1 << (self.bits - 1)) - 1)
        half = (sign << 15) | (magnitude << (F16.digits - self.digits))
        return half.view(xp.float16).astype(xp.float32) * xp.float32(2.0 ** (F16._bias - self._bias))


@dataclass(frozen=True)
class PowerOfTwo(Scalar):
    """A biased exponent and nothing else (OCP Microscaling Formats 1.0, section 5.4.1): 2**(bits - 127)."""

    @property
    def least(self) -> float:
        """2**-127: there is no 0."""
        return float(2.0**-127)

    @property
    def digits(self) -> int:
        """The one that is not stored."""
        return 1

    @property
    def max(self) -> float:
        """2**127; bits of 255 are NaN."""
        return float(2.0**127)

    def to_bits(self, values: Array) -> Array:
        """The power of two nearest to float32 ``values`` >= 0, of two equally near the larger; for 0 2**-127."""
        xp = namespace(values)
        bits = values.astype(xp.float32).view(xp.uint32)
        nearest = xp.where(bits < 0x600000, 0, (bits + 0x400000) >> 23)  # 0x600000: between 2**-127 and 2**-126
        return xp.minimum(nearest, 254).astype(xp.uint8)

    def from_bits(self, bits: Array) -> Array:
        """The float32 values of ``bits``; 2**-127 is subnormal there, and exact."""
        xp = namespace(bits)
        return xp.maximum(bits.astype(xp.uint32) << 23, xp.uint32(0x400000)).view(xp.float32)


F16 = Float("float16", 16, "Float16", 5)
BF16 = Float("bfloat16", 16, "BFloat16", 8)
F32 = Float("float32", 32, "Float32", 8)
E4M3 = Float("float8_e4m3fn", 8, "", 4, 448.0)
E5M2 = Float("float8_e5m2", 8, "", 5)
E2M1 = Float("float4_e2m1fn", 4, "", 2, 6.0)
E8M0 = PowerOfTwo("float8_e8m0fnu", 8, "PowerOfTwo")
U2, U3, U4, U8 = (Scalar(f"uint{bits}", bits) for bits in (2, 3, 4, 8))

#: The types that activations, biases and most scales can have.
HALVES = (F16, BF16)
HALF_NAMES = tuple(each.name for each in HALVES)
_BY_NAME = {each.name: each for each in (F16, BF16, F32, E4M3, E5M2, E2M1, E8M0, U2, U3, U4, U8)}


def by_name(name: str) -> Scalar:
    """The type of that name; ValueError that lists the names otherwise."""
    if name not in _BY_NAME:
        raise ValueError(f"unknown type {name!r}; known types are {', '.join(_BY_NAME)}.")
    return _BY_NAME[name]
