"""matmul inside jax.jit, and what vmap, grad and partitioning make of it.

Each layer here gives the product one transformation more::

    matmul          checks, jax.jit for calls from outside a program
    _product        grad: dX from the same packed weight
    _folded         vmap: a batch of x becomes more rows
    _rows           (M, K): split among devices by partitioning
    _share          on one device: on a GPU a call of launching, elsewhere plain jax.numpy
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from marlin_cupy.compilers.jax import launching
from marlin_cupy.compilers.jax.partitioning import Multiply, manual_axes, on_automatic_axes, partitioned, varying_alike
from marlin_cupy.device import CPU
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.packing import decoded
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

Array = Any  # a JAX array, traced or not


@dataclass(frozen=True)
class _Static:
    """What a program is compiled for."""

    spec: Spec
    batch_invariant: bool


def matmul(x: Array, w: QuantizedTensor, bias: Array | None, batch_invariant: bool, dependent: bool) -> Array:
    """:func:`marlin_cupy.matmul` for arrays that have been checked. Launches are plain, whatever ``dependent`` is."""
    packed, factors, layer = _in_jax(w).parts
    shape = tuple(packed.shape) if layer is None else tuple(packed.shape[1:])
    if shape != w.layout.packed_shape:
        w.whole.of_part(shape)  # says what is wrong with a share
        raise ValueError(
            f"packed has shape {shape}, a stack of weights; index it, w[i], or let jax.lax.scan take it apart."
        )
    if layer is not None:
        layer = _checked_layer(layer, packed.shape[0])
    return _compiled(_Static(w.spec, batch_invariant), x, packed, factors, layer, bias)


def _checked_layer(layer: Any, layers: int) -> Array:
    """int32; as in JAX, a traced number counts from the end where it is negative, and beyond that as the nearest."""
    if getattr(layer, "shape", ()) != () or not jnp.issubdtype(jnp.result_type(layer), jnp.integer):
        raise TypeError(f"a stack of weights was indexed with {layer!r}; use an integer.")
    if not isinstance(layer, jax.core.Tracer):
        layer = int(layer)
        if not -layers <= layer < layers:
            raise IndexError(f"weight {layer} was asked for, of a stack of {layers}.")
        layer %= layers
    return jnp.asarray(layer, jnp.int32)


def _in_jax(w: QuantizedTensor) -> QuantizedTensor:
    """``w`` with arrays that a program can hold: NumPy's are constants of it, others are handed over."""
    if isinstance(w.packed, jax.Array) or w.device == CPU:
        return w
    return w.to("jax")


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _compiled(
    static: _Static, x: Array, packed: Array, factors: Array | None, layer: Array | None, bias: Array | None
) -> Array:
    return on_automatic_axes(functools.partial(_product, static), *varying_alike(x, packed, factors, layer, bias))


# ---- grad: each of the two is the derivative of the other


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(
    static: _Static, x: Array, packed: Array, factors: Array | None, layer: Array | None, bias: Array | None
) -> Array:
    return _folded(static)(x, packed, factors, layer, bias)


def _forward(static: _Static, x: Any, packed: Any, factors: Any, layer: Any, bias: Any) -> tuple[Array, Any]:
    """The product, and what the gradient needs: the weight."""
    weight = _constants(packed, factors, layer)
    # Itself, which has derivatives again; but JAX has no nested ones with symbolic zeros inside jax.shard_map.
    product = _folded(static) if manual_axes() else functools.partial(_product, static)
    return product(x.value, *weight, None if bias is None else bias.value), (*weight, bias is not None)


def _backward(static: _Static, kept: Any, dy: Any) -> tuple[Any, ...]:
    *weight, has_bias = kept
    dy = _array(dy)
    rows = tuple(range(dy.ndim - 1))
    dbias = dy.sum(rows, dtype=jnp.float32).astype(dy.dtype) if has_bias else None
    dx = _transposed(static)(dy, weight[0], weight[2]) if manual_axes() else _gradient(static, dy, *weight)
    return dx, None, None, None, dbias


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(static: _Static, dy: Array, packed: Array, factors: Array | None, layer: Array | None) -> Array:
    """dy @ W.T."""
    return _transposed(static)(dy, packed, layer)


def _gradient_forward(static: _Static, dy: Any, packed: Any, factors: Any, layer: Any) -> tuple[Array, Any]:
    weight = _constants(packed, factors, layer)
    return _gradient(static, dy.value, *weight), weight


def _gradient_backward(static: _Static, weight: Any, dx: Any) -> tuple[Any, ...]:
    return _product(static, _array(dx), *weight, None), None, None, None


def _constants(*parts: Any) -> tuple[Any, ...]:
    """The arrays of a weight; UnsupportedError where a gradient with respect to them was asked for."""
    if any(part is not None and part.perturbed for part in parts):
        raise UnsupportedError(
            "a gradient with respect to a quantized weight was asked for, whose codes are integers; differentiate with "
            "respect to x and bias, and keep the weight out of argnums (or behind jax.lax.stop_gradient)."
        )
    return tuple(None if part is None else part.value for part in parts)


def _array(cotangent: Any) -> Array:
    if isinstance(cotangent, jax.custom_derivatives.SymbolicZero):
        return jnp.zeros(cotangent.shape, cotangent.dtype)
    return cotangent


_product.defvjp(_forward, _backward, symbolic_zeros=True)
_gradient.defvjp(_gradient_forward, _gradient_backward, symbolic_zeros=True)


# ---- vmap


@functools.cache
def _folded(static: _Static) -> Any:
    """x (..., K), packed, factors, layer, bias -> (..., N), whose batches of x are rows."""

    @custom_vmap
    def product(x: Array, packed: Array, factors: Any, layer: Any, bias: Any) -> Array:
        y = _rows(static, x.reshape(-1, x.shape[-1]) if x.ndim != 2 else x, packed, factors, layer, bias)
        return y.reshape(*x.shape[:-1], y.shape[-1]) if x.ndim != 2 else y

    product.def_vmap(functools.partial(_batched, product))
    return product


@functools.cache
def _transposed(static: _Static) -> Any:
    """dy (..., N), packed, layer -> dy @ W.T (..., K), whose batches of dy are rows."""

    @custom_vmap
    def product(dy: Array, packed: Array, layer: Any) -> Array:
        rows = dy.reshape(-1, dy.shape[-1]) if dy.ndim != 2 else dy
        if rows.shape[0] == 0:
            return jnp.zeros((*dy.shape[:-1], static.spec.shape[0]), dy.dtype)
        x = partitioned(_share_transposed(), static.spec, rows, packed, layer=layer, transposed=True)
        return x.reshape(*dy.shape[:-1], x.shape[-1]) if dy.ndim != 2 else x

    product.def_vmap(functools.partial(_batched, product))
    return product


def _batched(product: Any, axis_size: int, batched: Any, *arguments: Any) -> tuple[Array, bool]:
    """A batch of nothing but the first argument is more rows of it; others are taken one after the other."""
    others = batched[1:]
    if not any(jax.tree.leaves(others)):
        return product(*arguments), True

    def one(index: Array) -> Array:
        return product(
            *(
                jax.lax.dynamic_index_in_dim(each, index, keepdims=False) if is_batched is True else each
                for each, is_batched in zip(arguments, batched, strict=True)
            )
        )

    return jax.lax.map(one, jnp.arange(axis_size)), True


# ---- (M, K) @ (K, N)


def _rows(
    static: _Static, x: Array, packed: Array, factors: Array | None, layer: Array | None, bias: Array | None
) -> Array:
    if x.shape[0] == 0:
        return jnp.zeros((0, static.spec.shape[1]), x.dtype)
    return partitioned(_share(static.batch_invariant), static.spec, x, packed, factors, layer, bias)


@functools.cache
def _share(batch_invariant: bool) -> Multiply:
    """The product on one device: on a GPU by our kernels, elsewhere in float32 on the dequantized weight."""

    def multiply(spec: Spec, x: Array, packed: Array, factors: Any, layer: Any, bias: Any) -> Array:
        layout = spec.layout

        def on_gpu(x: Array, packed: Array, factors: Any, layer: Any, bias: Any) -> Array:
            if factors is None:  # of a weight in host memory, which has none
                factors = layout.range_factors(packed)
            return launching.gemm(spec, batch_invariant, x, packed, factors, layer, bias)

        def reference(x: Array, packed: Array, factors: Any, layer: Any, bias: Any) -> Array:
            weight = decoded(layout, _layer_of(packed, layer), spec.shape[1])
            y = _dot(x.astype(jnp.float32), weight)
            return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)

        return jax.lax.platform_dependent(x, packed, factors, layer, bias, cuda=on_gpu, default=reference)

    return multiply


@functools.cache
def _share_transposed() -> Multiply:
    """dy @ W.T on one device: on a GPU with dense weights of the type of dy, elsewhere in float32."""

    def multiply(spec: Spec, dy: Array, packed: Array, factors: Any, layer: Any, bias: Any) -> Array:
        layout, N = spec.layout, spec.shape[1]

        def on_gpu(dy: Array, packed: Array) -> Array:
            return launching.transposed(spec, dy, packed)

        def reference(dy: Array, packed: Array) -> Array:
            return _dot(dy.astype(jnp.float32), decoded(layout, packed, N).T).astype(dy.dtype)

        return jax.lax.platform_dependent(dy, _layer_of(packed, layer), cuda=on_gpu, default=reference)

    return multiply


def _layer_of(packed: Array, layer: Array | None) -> Array:
    """One weight of a stack, copied."""
    return packed if layer is None else jax.lax.dynamic_index_in_dim(packed, layer, keepdims=False)


def _dot(x: Array, weight: Array) -> Array:
    return jnp.matmul(x, weight, precision=jax.lax.Precision.HIGHEST)
