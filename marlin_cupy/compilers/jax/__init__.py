"""matmul inside jax.jit, and what vmap, grad and partitioning make of it.

Each room gives the product one transformation more::

    here              checks, jax.jit for calls from outside a program
    product.py        grad: dX from the same packed weight; vmap: a batch of x becomes more rows
    partitioning.py   (M, K): split among devices
    share.py          on one device: launching.py on a GPU, reference.py elsewhere
"""

from __future__ import annotations

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from marlin_cupy import ready
from marlin_cupy.compilers.jax.partitioning import on_automatic_axes, varying_alike
from marlin_cupy.compilers.jax.product import Static, product
from marlin_cupy.device import CPU, Device
from marlin_cupy.errors import DeviceError
from marlin_cupy.frameworks.jax import FRAMEWORK
from marlin_cupy.spec import Spec

Array = Any  # a JAX array, traced or not


class Weight(Protocol):
    """A QuantizedTensor, whatever its arrays are."""

    whole: Spec
    spec: Spec
    parts: dict[str, Any]
    layer: Any

    @property
    def device(self) -> Device:
        """Where arrays that hold values are."""

    def in_hands_of(self, library: str) -> Weight:
        """Handed over to another library."""


def matmul(x: Array, w: Weight, bias: Array | None, batch_invariant: bool, dependent: bool) -> Array:
    """:func:`marlin_cupy.matmul`. Launches are plain, whatever ``dependent`` is."""
    spec, layer = w.spec, w.layer
    if x.shape[-1:] != spec.shape[:1]:
        w.whole.of_part(tuple(w.parts["packed"].shape))  # says what is wrong with a share
    ready.check_x(FRAMEWORK.dtype(x), x.shape, spec)
    if bias is not None:
        ready.matching(FRAMEWORK, bias, "bias", spec.shape[1:], FRAMEWORK.dtype(x))
    parts = tuple(_in_jax(x, w).parts.values())
    packed = parts[0]
    shape = tuple(packed.shape if layer is None else packed.shape[1:])
    if shape != spec.parts["packed"].shape:
        w.whole.of_part(shape)
        raise ValueError(
            f"packed has shape {shape}, a stack of weights; index it, w[i], or let jax.lax.scan take it apart."
        )
    if layer is not None:
        layer = _checked_layer(layer, packed.shape[0])
    return _program(spec, batch_invariant)(x, parts, layer, bias)


def _in_jax(x: Array, w: Weight) -> Weight:
    """``w`` with arrays that a program can hold: NumPy's are constants of it, others are handed over."""
    if isinstance(w.parts["packed"], jax.Array):
        return w
    if not isinstance(x, jax.core.Tracer) and FRAMEWORK.device(x) != w.device:
        where = FRAMEWORK.device(x)
        raise DeviceError(f"x is on {where} and the weight on {w.device}; move one, for instance w.to({str(where)!r}).")
    return w if w.device == CPU else w.in_hands_of("jax")


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


@functools.cache
def _program(spec: Spec, batch_invariant: bool) -> Any:
    """x, parts, layer, bias -> y, compiled for calls from outside a program, part of the program inside one."""
    static = Static(spec, batch_invariant)

    def matmul(x: Array, parts: Any, layer: Array | None, bias: Array | None) -> Array:
        return on_automatic_axes(functools.partial(product, static), *varying_alike(x, parts, layer, bias))

    return jax.jit(matmul, inline=True)
