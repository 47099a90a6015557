"""The product on one device, of a share of rows and of a weight: kernels on a GPU, plain jax.numpy elsewhere."""

from __future__ import annotations

import functools
from typing import Any

import jax

from marlin_cupy.compilers.jax import launching, reference
from marlin_cupy.compilers.jax.partitioning import Multiply, Parts
from marlin_cupy.packing import derived
from marlin_cupy.spec import Spec

Array = Any  # a JAX array, traced or not


@functools.cache
def product(batch_invariant: bool) -> Multiply:
    """(spec, x, parts, layer, bias) -> x @ W + bias."""

    def multiply(spec: Spec, x: Array, parts: Parts, layer: Any, bias: Any) -> Array:
        def on_gpu(x: Array, parts: Parts, layer: Any, bias: Any) -> Array:
            return launching.gemm(spec, batch_invariant, x, _complete(spec, parts), layer, bias)

        elsewhere = functools.partial(reference.product, spec)
        return jax.lax.platform_dependent(x, parts, layer, bias, cuda=on_gpu, default=elsewhere)

    return multiply


def transposed(spec: Spec, dy: Array, parts: Parts, layer: Any, bias: Any) -> Array:
    """dy @ W.T: on a GPU with dense weights of the type of dy."""

    def on_gpu(dy: Array, parts: Parts) -> Array:
        return launching.transposed(spec, dy, parts)

    elsewhere = functools.partial(reference.transposed, spec)
    return jax.lax.platform_dependent(dy, reference.one_of(parts, layer), cuda=on_gpu, default=elsewhere)


def _complete(spec: Spec, parts: Parts) -> Parts:
    """With those that follow from packed, which a weight in host memory does not have."""
    if all(part is not None for part in parts):
        return parts
    made = derived(spec, parts[0])
    return tuple(made[name] if part is None else part for name, part in zip(spec.parts, parts, strict=True))
