"""What runs where there is no kernel: float32 products on the dequantized weight, in plain jax.numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from marlin_cupy.compilers.jax.partitioning import Parts
from marlin_cupy.packing import decoded
from marlin_cupy.spec import Spec

Array = Any  # a JAX array, traced or not


def product(spec: Spec, x: Array, parts: Parts, layer: Array | None, bias: Array | None) -> Array:
    """x @ W + bias, rounded once."""
    y = _dot(x.astype(jnp.float32), _dense(spec, one_of(parts, layer)))
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def transposed(spec: Spec, dy: Array, parts: Parts) -> Array:
    """dy @ W.T, rounded once."""
    return _dot(dy.astype(jnp.float32), _dense(spec, parts).T).astype(dy.dtype)


def one_of(parts: Parts, layer: Array | None) -> Parts:
    """One weight of a stack, copied."""
    if layer is None:
        return parts
    taken: Parts = jax.tree.map(lambda part: jax.lax.dynamic_index_in_dim(part, layer, keepdims=False), parts)
    return taken


def _dense(spec: Spec, parts: Parts) -> Array:
    return decoded(spec.layout, n=spec.shape[1], **dict(zip(spec.parts, parts, strict=True)))


def _dot(x: Array, weight: Array) -> Array:
    return jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
