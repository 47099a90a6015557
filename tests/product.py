"""A product in float64, and whether a result is near enough to it; :mod:`marlin_cupy.numerics` says how near."""

from __future__ import annotations

from typing import Any

from marlin_cupy import numerics
from marlin_cupy.numerics import Rounding

Array = Any  # a NumPy or CuPy array

_MANY = 1000  # outputs for which a mean is meaningful


class Product:
    """x (M, K) @ weights (K, N) + bias (N), all float64 of NumPy or of CuPy."""

    def __init__(self, x: Array, weights: Array, bias: Array | None = None) -> None:
        self._product = numerics.Product.of(x, weights, bias)
        self.exact = self._product.exact

    def check(self, y: Array, rounding: Rounding, case: str = "") -> None:
        """AssertionError unless ``y``, float64 (M, N), is the product of the first M rows, rounded like that."""
        M = y.shape[0]
        product = self._product.rows(M)
        assert y.shape == product.exact.shape, f"{case}: shape {y.shape}, not {product.exact.shape}"
        if M == 0:
            return
        error, bound = y - product.exact, product.bound(rounding)
        wrong = ~(abs(error) <= bound)  # NaN is wrong too
        if bool(wrong.any()):
            row, column = (int(index[0]) for index in wrong.nonzero())
            raise AssertionError(
                f"{case}: {int(wrong.sum())} of {wrong.size} outputs are wrong; the first is y[{row}, {column}] = "
                f"{float(y[row, column])!r}, exactly {float(product.exact[row, column])!r} "
                f"(allowed error {float(bound[row, column]):.3g})"
            )
        if y.size >= _MANY:
            relative = numerics.norm(error) / numerics.norm(product.exact)
            allowed = product.relative_bound(rounding)
            assert relative <= allowed, f"{case}: relative error {relative:.3g}, allowed {allowed:.3g}"
