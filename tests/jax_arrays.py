"""JAX arrays in host memory, and products checked against NumPy in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from cases import FORMATS, gaussian, rows
from product import Product

import marlin_cupy as mc
from marlin_cupy.numerics import Rounding, sum_of_parts_bound

K, N = 200, 70


@functools.cache
def weight(name: str = "int4", group_size: int = 64, shape: tuple[int, int] = (K, N), seed: int = 1) -> Any:
    """Held by JAX."""
    return mc.quantize(gaussian(*shape, seed=seed), name, FORMATS[name].group(group_size)).to("jax")


def on_host(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def activations(shape: tuple[int, ...], dtype: str = "float16", seed: int = 3) -> jax.Array:
    return on_host(rows(shape, seed=seed, dtype=dtype))


def float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def check(y: Any, x: Any, w: mc.QuantizedTensor, bias: Any = None, case: str = "", shares: int = 1) -> None:
    """``y`` is x @ w + bias, one rounding aside, whatever the order of the sums and the leading axes.

    With several shares of K, each product of which is rounded before they are added up: one rounding of each more.
    """
    assert y.shape == (*x.shape[:-1], w.shape[1]), case
    _check(y, x, float64(w.dequantize("float32")), bias, w.format, case, shares)


def check_gradient(dx: Any, dy: Any, w: mc.QuantizedTensor, case: str = "", shares: int = 1) -> None:
    """``dx`` is dy @ w.T, one rounding aside; with several shares of N as in :func:`check`."""
    assert dx.shape == (*dy.shape[:-1], w.shape[0]), case
    _check(dx, dy, float64(w.dequantize("float32")).T, None, w.format, case, shares)


def _check(y: Any, x: Any, dense: np.ndarray, bias: Any, format: str, case: str, shares: int) -> None:
    assert y.dtype == x.dtype, case
    x, dtype, y = float64(x).reshape(-1, len(dense)), str(y.dtype), float64(y).reshape(-1, dense.shape[1])
    if shares == 1:
        Product(x, dense, None if bias is None else float64(bias)).check(y, Rounding(dtype), case)
    else:
        parts = [x[:, run] @ dense[run] for run in runs(len(dense), shares)]
        check_sum_of_parts(y, sum(parts) + (0 if bias is None else float64(bias)), parts, dtype, case)


def check_sum(dbias: Any, dy: Any) -> None:
    """``dbias`` is the sum of the rows of dy, one rounding aside."""
    columns = float64(dy).reshape(-1, dy.shape[-1])
    Product(np.ones((1, len(columns))), columns).check(float64(dbias)[None], Rounding(str(dbias.dtype)))


def check_sum_of_parts(y: np.ndarray, exact: np.ndarray, parts: list[np.ndarray], dtype: str, case: str = "") -> None:
    """Every part and the sum are rounded once."""
    wrong = ~(abs(y - exact) <= sum_of_parts_bound(exact, parts, dtype))
    assert not wrong.any(), f"{case}: {wrong.sum()} of {wrong.size} are wrong, by up to {abs(y - exact).max():.3g}"


def runs(size: int, number: int) -> list[slice]:
    """Equal ones."""
    return [slice(start, start + size // number) for start in range(0, size, size // number)]
