"""The product in float64, and how far from it a result may be.

Where the bounds come from, for y = x @ W + bias with W the float32 values that ``dequantize("float32")`` gives:

- Products of 16-bit activations and codes are exact in float32, and so is code times scale; sums are float32.
  A sum of K terms in any order is off by about u * sqrt(K) * (|x| @ |W|) (Higham and Mary 2019, probabilistic
  bound), u = 2**-24 on a CPU. Tensor cores align and truncate addends: u = 2**-22 covers both.
- The result is rounded once, to nearest: an error of at most ROUNDOFF * |y| (or half the smallest subnormal).
  Over many outputs the error is uniform within a rounding interval, so that its root mean square is at most
  ROUNDOFF / sqrt(3).
- A GPU kernel holds the table of a format that has one in the activation's type. Each weight is off by
  at most ROUNDOFF * |w|, with a sign that has nothing to do with x: the sum is off by about
  ROUNDOFF * sqrt(x**2 @ W**2), and an element by no more than 6 times that in these suites.
- sm90_wgmma, and sm80_gemm for more than 32 rows, multiply by the scale in the activation's type, which rounds each
  weight once more. (sm80_gemm does not where that is bfloat16 and the scale float16; it is granted the same.)
- sm90_stream multiplies 4-bit codes in float16 as they are, which are subnormals: the tensor cores cut off each
  product, and the sum that it joins, at 2**-14 of a code of 1 times the largest of 16 values of x
  (formats/nibble.cuh). A code of 1 is at most a seventh of the largest weight of its output in both formats. K cuts
  of at most one such step, spread evenly within it: 0.3 * sqrt(K) of them, and an element by no more than 6 times that.
- Roundings have nothing to do with one another: their root mean squares add up as squares.
"""

from __future__ import annotations

import math
from typing import Any

from marlin_cupy import formats
from marlin_cupy.formats.scalars import ROUNDOFF

Array = Any  # a NumPy or CuPy array

_SUM = 2.0**-22
_HALF_SUBNORMAL = {"float16": 2.0**-25, "bfloat16": 2.0**-134}
_MANY = 1000  # outputs for which a mean is meaningful
#: Kernels that round weights after scaling, and for how many rows at least.
_ROUNDS_WEIGHTS = {"sm90_wgmma": 1, "sm80_gemm": 33}
#: Where products with codes are cut off: kernel, activations and formats; and a cut's size per code of 1.
_CUTS = ("sm90_stream", "float16", ("int4", "uint4"))
_CUT = 2.0**-14
_CODES = 7


class Product:
    """x (M, K) @ weights (K, N) + bias (N), all float64 of NumPy or of CuPy."""

    def __init__(self, x: Array, weights: Array, bias: Array | None = None) -> None:
        self.K = x.shape[1]
        self.exact = x @ weights
        self.absolute = abs(x) @ abs(weights)
        self.energy = (x**2 @ weights**2) ** 0.5
        self.cut = _CUT / _CODES * math.sqrt(self.K) * abs(x).max(1)[:, None] * abs(weights).max(0)
        if bias is not None:
            self.exact = self.exact + bias
            self.absolute = self.absolute + abs(bias)

    def check(
        self, y: Array, dtype: str, format: str = "int4", *, gpu: bool = False, kernel: str = "", case: str = ""
    ) -> None:
        """AssertionError unless ``y``, float64 (M, N), is the product of the first M rows to ``dtype``.

        ``kernel`` is the one that computed it, if on a GPU and known.
        """
        M = y.shape[0]
        exact, absolute, energy = self.exact[:M], self.absolute[:M], self.energy[:M]
        assert y.shape == exact.shape, f"{case}: shape {y.shape}, not {exact.shape}"
        if M == 0:
            return
        of_weights = (gpu and formats.get(format).table is not None) + (_ROUNDS_WEIGHTS.get(kernel, M + 1) <= M)
        cut = self.cut[:M] * ((kernel, dtype) == _CUTS[:2] and format in _CUTS[2])
        error = abs(y - exact)
        bound = (
            ROUNDOFF[dtype] * abs(exact)
            + _SUM * math.sqrt(self.K) * absolute
            + 6 * of_weights * ROUNDOFF[dtype] * energy
            + 6 * 0.3 * cut
        )
        wrong = ~(error <= bound + _HALF_SUBNORMAL[dtype])  # NaN is wrong too
        if bool(wrong.any()):
            row, column = (int(index[0]) for index in wrong.nonzero())
            raise AssertionError(
                f"{case}: {int(wrong.sum())} of {wrong.size} outputs are wrong; the first is y[{row}, {column}] = "
                f"{float(y[row, column])!r}, exactly {float(exact[row, column])!r} "
                f"(allowed error {float(bound[row, column]):.3g})"
            )
        if y.size >= _MANY:
            relative = math.sqrt(float((error**2).sum()) / float((exact**2).sum()))
            of_cuts = 0.3 * math.sqrt(float((cut**2).sum()) / float((exact**2).sum()))
            allowed = ROUNDOFF[dtype] * math.sqrt((1 + of_weights) / 3) + _SUM * math.sqrt(self.K) + of_cuts
            assert relative <= allowed, f"{case}: relative error {relative:.3g}, allowed {allowed:.3g}"
