"""The two 16-bit floating-point types, as values (float32) and as stored bits (uint16).

CuPy's support for bfloat16 is partial, so scales travel as float32 whose values are exactly
representable, and become bits with integer arithmetic alone. Works on NumPy and CuPy arrays.
"""

from __future__ import annotations

from typing import Any

from marlin_cupy.device import namespace

Array = Any  # a NumPy or CuPy array

FLOAT16 = "float16"
BFLOAT16 = "bfloat16"
FLOAT32 = "float32"
#: The types that activations, scales and biases can have.
HALF_DTYPES = (FLOAT16, BFLOAT16)
#: Largest finite values.
MAX = {FLOAT16: 65504.0, BFLOAT16: 3.3895313892515355e38}
#: Unit roundoff: the largest relative error of rounding to nearest.
ROUNDOFF = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8, FLOAT32: 2.0**-24}


def to_bits(values: Array, dtype: str) -> Array:
    """uint16 bits of float32 ``values`` rounded to nearest even in ``dtype`` (finite values)."""
    xp = namespace(values)
    if dtype == FLOAT16:
        return values.astype(xp.float16).view(xp.uint16)
    bits = values.astype(xp.float32).view(xp.uint32)
    bits = bits + (((bits >> 16) & 1) + 0x7FFF).astype(xp.uint32)
    return (bits >> 16).astype(xp.uint16)


def from_bits(bits: Array, dtype: str) -> Array:
    """float32 values of uint16 ``bits`` in ``dtype``; the inverse of :func:`to_bits`."""
    xp = namespace(bits)
    if dtype == FLOAT16:
        return bits.view(xp.float16).astype(xp.float32)
    return (bits.astype(xp.uint32) << 16).view(xp.float32)


def round_to(values: Array, dtype: str) -> Array:
    """float32 ``values`` rounded to nearest even in ``dtype``, as float32."""
    return from_bits(to_bits(values, dtype), dtype)
