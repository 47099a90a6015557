"""How far from the exact product a right result may be, for y = x @ W + bias with W what the codes stand for.

A kernel says in a :class:`Rounding` what it rounds on the way; the bounds follow from these facts:

- **Sums.** Products of 16-bit activations and codes are exact in float32, and so is code times scale; sums are float32.
  A sum of K terms in any order is off by about u * sqrt(K) * (|x| @ |W|) (Higham and Mary 2019,
  doi:10.1137/18M1226312, a probabilistic bound), u = 2**-24 on a CPU. Tensor cores align and truncate addends:
  u = 2**-22 covers both.
- **The result** is rounded once, to nearest: an error of at most roundoff * |y| (or half the smallest subnormal).
  Over many outputs the error is uniform within a rounding interval, so that its root mean square is at most
  roundoff / sqrt(3).
- **Roundings of a weight**: of the values of a format's table, which a GPU kernel holds in the activations' type, and
  of each weight after its scale. Each is at most roundoff * |w|, with a sign that has nothing to do with x: the sum is
  off by about roundoff * sqrt(x**2 @ W**2), and an element by no more than a few times that.
- **Cuts.** Codes that are multiplied in float16 as they are, which are subnormals, lose what lies below 2**-14 of a
  code of 1 times the largest of 16 values of x: the tensor cores cut off each product there, and the sum that it joins
  (formats/nibble.cuh). A code of 1 is at most a part of the largest weight of its output, a seventh for 4 bits. K cuts
  of at most one such step, spread evenly within it, are off by 0.3 * sqrt(K) of them, and an element by no more than a
  few times that.
- Roundings have nothing to do with one another: their root mean squares add up as squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from marlin_cupy.scalars import BF16, F16, F32, by_name

Array = Any  # a NumPy or CuPy array

_SUM = 2.0**-22
_SUBNORMAL_CUT = 2.0**-14
_OF_A_CUT = 0.3  # what a cut, spread evenly within its step, takes off on average: 1 / sqrt(12)
_HALF_SUBNORMAL = {F16.name: 2.0**-25, BF16.name: 2.0**-134}
#: The largest of many normal values is so many root mean squares; of x and of W here.
_NORMAL_PEAK = 5
#: Roundings of a result whose kernel does not say what it rounds: partial sums and weights in 16 bits.
_UNSTATED_ROUNDINGS = 4


@dataclass(frozen=True)
class Rounding:
    """What a kernel rounds for a problem, besides sums in float32.

    Attributes:
        dtype: the result is rounded to it, once.
        table: the values of the format's table are rounded to it.
        weights: every weight is rounded to it so often while it is multiplied by its scale.
        cut: where products with codes are cut off, as a part of the largest weight of an output times the largest x of
            a row; see :func:`subnormal_cut`.
    """

    dtype: str
    table: bool = False
    weights: int = 0
    cut: float = 0.0

    @property
    def of_a_weight(self) -> int:
        """How often a weight is rounded."""
        return self.table + self.weights


def subnormal_cut(bits: int) -> float:
    """``Rounding.cut`` of codes of so many bits that are multiplied as subnormals of float16.

    However a group is quantized, its largest weight is at least 2**(bits - 1) - 1 codes of 1.
    """
    return _SUBNORMAL_CUT / max(1, (1 << (bits - 1)) - 1)


@dataclass(frozen=True)
class Product:
    """The exact product and the sizes that its error grows with, float64 arrays (M, N).

    Attributes:
        K: terms of a sum.
        exact: x @ W + bias.
        absolute: abs(x) @ abs(W) + abs(bias).
        energy: sqrt(x**2 @ W**2).
        peak: sqrt(K) times the largest abs(x) of a row and the largest abs(W) of an output.
    """

    K: int
    exact: Array
    absolute: Array
    energy: Array
    peak: Array

    @classmethod
    def of(cls, x: Array, weights: Array, bias: Array | None = None) -> Product:
        """x (M, K) @ weights (K, N) + bias (N), all float64 of NumPy or of CuPy."""
        exact, absolute = x @ weights, abs(x) @ abs(weights)
        if bias is not None:
            exact, absolute = exact + bias, absolute + abs(bias)
        peak = math.sqrt(x.shape[1]) * abs(x).max(1)[:, None] * abs(weights).max(0)
        return cls(x.shape[1], exact, absolute, (x**2 @ weights**2) ** 0.5, peak)

    def rows(self, M: int) -> Product:
        """The first M rows."""
        return Product(self.K, self.exact[:M], self.absolute[:M], self.energy[:M], self.peak[:M])

    def bound(self, rounding: Rounding, deviations: float = 6) -> Array:
        """How far each element may be off, with errors that are random so many times what they are on average."""
        u = by_name(rounding.dtype).roundoff
        sums = _SUM * math.sqrt(self.K) * self.absolute
        of_weights = deviations * rounding.of_a_weight * u * self.energy
        cuts = deviations * _OF_A_CUT * rounding.cut * self.peak
        return u * abs(self.exact) + sums + of_weights + cuts + _HALF_SUBNORMAL[rounding.dtype]

    def relative_bound(self, rounding: Rounding) -> float:
        """How far many elements together may be off, relative to the product, in the Frobenius norm."""
        return _relative(rounding, self.K, rounding.cut * norm(self.peak) / norm(self.exact))


def norm(array: Array) -> float:
    """In the sense of Frobenius."""
    return math.sqrt(float((array**2).sum()))


def normal_bound(rounding: Rounding, K: int) -> float:
    """:meth:`Product.relative_bound` where x and W are normal values, without computing anything."""
    return _relative(rounding, K, rounding.cut * _NORMAL_PEAK**2)


def _relative(rounding: Rounding, K: int, cuts: float) -> float:
    of_roundings = by_name(rounding.dtype).roundoff * math.sqrt((1 + rounding.of_a_weight) / 3)
    return of_roundings + _SUM * math.sqrt(K) + _OF_A_CUT * cuts


def unstated_bound(dtype: str) -> float:
    """What a kernel of which nothing is known stays below if it is right, relative, in the Frobenius norm."""
    return _UNSTATED_ROUNDINGS * by_name(dtype).roundoff


def apart(rounding: Rounding, K: int) -> float:
    """The largest difference of two right results, over the largest magnitude of a result, where x is random.

    Each rounds y once, u of its largest value at most; roundings of weights cost as much on average where the values
    of x are random, and are taken twice over, since errors of single elements are larger than the average one. (Cuts
    are far less.) A sum is off by less than 2 sqrt(K) u |x| |W| but with small probability, and |x| |W| is below
    sqrt(K) times a typical element.
    """
    roundings = 1 + 2 * rounding.of_a_weight
    return 2 * (roundings * by_name(rounding.dtype).roundoff + 2 * K * F32.roundoff)


def dense_bound(weights: Array, dtype: str) -> Array:
    """How far weights that a GPU decoded as arrays of ``dtype`` may be off, each: their table is in float16."""
    return 1.01 * (by_name(dtype).roundoff + F16.roundoff) * abs(weights) + 2.0**-24


def sum_of_parts_bound(exact: Array, parts: Sequence[Array], dtype: str) -> Array:
    """How far a sum of products over parts of K may be off, each part and the sum rounded once.

    Sums in float32 add less than a thousandth of that.
    """
    return (1 + 2.0**-10) * by_name(dtype).roundoff * (abs(exact) + sum(abs(part) for part in parts)) + 2.0**-20
