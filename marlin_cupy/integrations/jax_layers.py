"""What layers of JAX's module libraries have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from marlin_cupy import matmul
from marlin_cupy.device import CPU
from marlin_cupy.integrations.jax import abstract, in_jax
from marlin_cupy.integrations.replacing import free_cupy_memory
from marlin_cupy.quantizing import quantize
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.tensor import QuantizedTensor

Array = Any  # a JAX array, traced or not


def quantized(
    weight: Array, format: str, group_size: int | None, *, scale_dtype: str | None, search: str
) -> QuantizedTensor:
    """:func:`marlin_cupy.quantize` into JAX's own memory, which programs may be given for good (donated).

    A jax.ShapeDtypeStruct becomes a weight of ShapeDtypeStructs, for models that are to be filled from a checkpoint.
    """
    if isinstance(weight, jax.ShapeDtypeStruct):
        return abstract(weight, format, group_size, scale_dtype=scale_dtype)
    w = quantize(weight, format, group_size, scale_dtype=scale_dtype, search=search).to("jax")
    own: QuantizedTensor = jax.tree.map(jnp.copy, w)
    device = w.device
    if device != CPU:
        own.packed.block_until_ready()
        del w  # CuPy's memory, for the next layer's dense weight in JAX's
        free_cupy_memory(device)
    return own


def given(w: QuantizedTensor, bias: Any | None) -> QuantizedTensor:
    """``w`` in JAX, one that ``bias`` fits; TypeError or ValueError where it is none."""
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor, from quantize, pack or load.")
    if bias is not None and bias.shape[-1:] != w.whole.shape[1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; this weight needs {w.whole.shape[1:]}.")
    return in_jax(w)


def product(x: Array, w: QuantizedTensor, bias: Array | None, dtype: Any | None) -> Array:
    """x @ W + bias, where x is cast to ``dtype`` if that is not None, and the bias to what x then is."""
    x = jnp.asarray(x, dtype)
    if x.dtype.name not in HALF_NAMES:
        raise ValueError(
            f"x is {x.dtype.name}; use {' or '.join(HALF_NAMES)}, or make the layer with dtype=jnp.bfloat16, "
            "to which it then casts."
        )
    y: Array = matmul(x, w, None if bias is None else bias.astype(x.dtype))
    return y
