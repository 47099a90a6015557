"""JAX arrays in host memory, and products checked against NumPy in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from cases import gaussian, rows
from product import Product

import marlin_cupy as mc

K, N = 200, 70


@functools.cache
def weight(name: str = "int4", group_size: int = 64, shape: tuple[int, int] = (K, N), seed: int = 1) -> Any:
    """Held by JAX."""
    return mc.quantize(gaussian(*shape, seed=seed), name, group_size).to("jax")


def on_host(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def activations(shape: tuple[int, ...], dtype: str = "float16", seed: int = 3) -> jax.Array:
    return on_host(rows(shape, seed=seed, dtype=dtype))


def float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def check(y: Any, x: Any, w: mc.QuantizedTensor, bias: Any = None, case: str = "") -> None:
    """``y`` is x @ w + bias, one rounding aside, whatever the order of the sums and the leading axes."""
    dense = float64(w.dequantize("float32"))
    assert y.dtype == x.dtype, case
    assert y.shape == (*x.shape[:-1], w.shape[1]), case
    product = Product(float64(x).reshape(-1, w.shape[0]), dense, None if bias is None else float64(bias))
    product.check(float64(y).reshape(-1, w.shape[1]), str(y.dtype), w.format, case=case)


def check_gradient(dx: Any, dy: Any, w: mc.QuantizedTensor, case: str = "") -> None:
    """``dx`` is dy @ w.T, one rounding aside."""
    assert dx.dtype == dy.dtype, case
    product = Product(float64(dy).reshape(-1, w.shape[1]), float64(w.dequantize("float32")).T)
    product.check(float64(dx).reshape(-1, w.shape[0]), str(dx.dtype), w.format, case=case)


def check_sum(dbias: Any, dy: Any) -> None:
    """``dbias`` is the sum of the rows of dy, one rounding aside."""
    columns = float64(dy).reshape(-1, dy.shape[-1])
    Product(np.ones((1, len(columns))), columns).check(float64(dbias)[None], str(dbias.dtype))
