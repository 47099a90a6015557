"""The product with its derivatives (grad), and over batches (vmap)."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from marlin_cupy.compilers.jax import share
from marlin_cupy.compilers.jax.partitioning import Parts, manual_axes, partitioned
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.spec import Spec

Array = Any  # a JAX array, traced or not


class Static(NamedTuple):
    """What a program is compiled for."""

    spec: Spec
    batch_invariant: bool


# ---- grad: each of the two is the derivative of the other


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(static: Static, x: Array, parts: Parts, layer: Array | None, bias: Array | None) -> Array:
    """x (..., K) @ W + bias for the weight that ``parts`` are, or that one of a stack of them."""
    return _folded(static)(x, parts, layer, bias)


def _forward(static: Static, x: Any, parts: Any, layer: Any, bias: Any) -> tuple[Array, Any]:
    """The product, and what the gradient needs: the weight."""
    weight = _constants(parts, layer)
    # Itself, which has derivatives again; but JAX has no nested ones with symbolic zeros inside jax.shard_map.
    forward = _folded(static) if manual_axes() else functools.partial(product, static)
    return forward(x.value, *weight, None if bias is None else bias.value), (*weight, bias is not None)


def _backward(static: Static, kept: Any, dy: Any) -> tuple[Any, ...]:
    *weight, has_bias = kept
    dy = _array(dy)
    rows = tuple(range(dy.ndim - 1))
    dbias = dy.sum(rows, dtype=jnp.float32).astype(dy.dtype) if has_bias else None
    dx = _transposed(static)(dy, *weight) if manual_axes() else _gradient(static, dy, *weight)
    return dx, None, None, dbias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(static: Static, dy: Array, parts: Parts, layer: Array | None) -> Array:
    """dy @ W.T."""
    return _transposed(static)(dy, parts, layer)


def _gradient_forward(static: Static, dy: Any, parts: Any, layer: Any) -> tuple[Array, Any]:
    weight = _constants(parts, layer)
    return _gradient(static, dy.value, *weight), weight


def _gradient_backward(static: Static, weight: Any, dx: Any) -> tuple[Any, ...]:
    return product(static, _array(dx), *weight, None), None, None


def _constants(*weight: Any) -> Any:
    """The arrays of a weight; UnsupportedError where a gradient with respect to them was asked for."""
    if any(each.perturbed for each in jax.tree.leaves(weight)):
        raise UnsupportedError(
            "a gradient with respect to a quantized weight was asked for, whose codes are integers; differentiate with "
            "respect to x and bias, and keep the weight out of argnums (or behind jax.lax.stop_gradient)."
        )
    return jax.tree.map(lambda each: each.value, weight)


def _array(cotangent: Any) -> Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


product.defvjp(_forward, _backward, symbolic_zeros=True)
_gradient.defvjp(_gradient_forward, _gradient_backward, symbolic_zeros=True)


# ---- vmap


@functools.cache
def _folded(static: Static) -> Any:
    """x (..., K), parts, layer, bias -> (..., N), whose batches of x are rows."""

    @custom_vmap
    def product(x: Array, parts: Parts, layer: Any, bias: Any) -> Array:
        rows = x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x
        if rows.shape[0] == 0:
            return jnp.zeros((*x.shape[:-1], static.spec.shape[1]), x.dtype)
        y = partitioned(share.product(static.batch_invariant), static.spec, rows, parts, layer, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1]) if x.ndim != 2 else y

    product.def_vmap(functools.partial(_batched, product))
    return product


@functools.cache
def _transposed(static: Static) -> Any:
    """dy (..., N), parts, layer -> dy @ W.T (..., K), whose batches of dy are rows."""

    @custom_vmap
    def product(dy: Array, parts: Parts, layer: Any) -> Array:
        rows = dy.reshape(-1, dy.shape[-1]) if dy.ndim != 2 else dy
        if rows.shape[0] == 0:
            return jnp.zeros((*dy.shape[:-1], static.spec.shape[0]), dy.dtype)
        x = partitioned(share.transposed, static.spec, rows, parts, layer, transposed=True)
        return x.reshape(*dy.shape[:-1], x.shape[-1]) if dy.ndim != 2 else x

    product.def_vmap(functools.partial(_batched, product))
    return product


def _batched(product: Any, axis_size: int, batched: Any, *arguments: Any) -> tuple[Array, bool]:
    """A batch of nothing but the first argument is more rows of it; others are taken one after the other."""
    others = batched[1:]
    if not any(jax.tree.leaves(others)):
        return product(*arguments), True

    def one(index: Array) -> Array:
        def of_batch(each: Array, is_batched: bool) -> Array:
            return jax.lax.dynamic_index_in_dim(each, index, keepdims=False) if is_batched else each

        return product(*jax.tree.map(of_batch, arguments, tuple(batched)))

    return jax.lax.map(one, jnp.arange(axis_size)), True
