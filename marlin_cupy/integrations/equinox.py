"""Equinox: Linear over a packed weight, and models with their layers quantized.

model, report = quantize_model(model, "int4", filter="*.mlp.*", dtype=jnp.bfloat16)    # every eqx.nn.Linear there

No array of a packed weight is inexact, so that eqx.filter_grad and what else asks eqx.is_inexact_array see the bias
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp

from marlin_cupy.integrations import jax_layers, replacing
from marlin_cupy.integrations.replacing import Filter, Place, Report, replace
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

L = TypeVar("L", bound="Linear")


class Linear(eqx.Module):
    """y = x @ W + bias with a packed W, in place of eqx.nn.Linear. Gradients flow to x and bias.

    Under jax.vmap a batch becomes rows of one product.

    Args:
        w: the weight, in JAX; :meth:`from_quantized` takes those of other libraries.
        bias: array [N] or None.
        dtype: float16 or bfloat16: x and bias are cast to it, and the result has it. If None, x has to be one of these,
            and the bias is cast to what x is.

    Attributes:
        packed: uint8 (ceil(N / 64), ceil(K / 128), slab_bytes).
        factor_bits: uint32 per output, the bits of the weight's output scales: these are no parameters.
        bias: [N] or None.
        spec: what ``packed`` holds.
        dtype: as given.
    """

    packed: jax.Array
    factor_bits: jax.Array
    bias: jax.Array | None
    spec: Spec = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __init__(self, w: QuantizedTensor, bias: jax.Array | None = None, *, dtype: Any | None = None) -> None:
        assert w.output_scales is not None  # of every weight in JAX
        self.packed = w.packed
        self.factor_bits = _made(lambda scales: scales.view(jnp.uint32), w.output_scales)
        self.bias = bias
        self.spec = w.whole
        self.dtype = None if dtype is None else jnp.dtype(dtype)

    @classmethod
    def from_quantized(
        cls: type[L], w: QuantizedTensor, bias: jax.Array | None = None, *, dtype: Any | None = None
    ) -> L:
        """With the weight ``w`` of any library, handed to JAX, and ``bias``, an array [N].

        Raises:
            TypeError, ValueError: not that.
        """
        return cls(jax_layers.given(w, bias), bias, dtype=dtype)

    @classmethod
    def from_linear(
        cls: type[L],
        linear: eqx.nn.Linear,
        format: str = "int4",
        group_size: int | None = None,
        *,
        scale_dtype: str | None = None,
        search: str = "absmax",
        dtype: Any | None = None,
    ) -> L:
        """``linear``, quantized by rounding to nearest; see :func:`marlin_cupy.quantize` for arguments and errors.

        The bias is shared. ValueError too where ``linear`` takes or returns scalars.
        """
        if "scalar" in (linear.in_features, linear.out_features):
            raise ValueError('linear takes or returns a "scalar"; a layer of vectors can be quantized.')
        w = _quantized(linear, format, group_size, scale_dtype=scale_dtype, search=search)
        return cls(w, linear.bias, dtype=dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight."""
        output_scales = _made(lambda bits: bits.view(jnp.float32), self.factor_bits)
        return QuantizedTensor.of_parts(self.spec, {"packed": self.packed, "output_scales": output_scales})

    def __call__(self, x: jax.Array, *, key: Any | None = None) -> jax.Array:
        """x: [K], or [..., K], cast to ``dtype``; returns [..., N]. ``key`` is ignored, as eqx.nn.Linear does.

        ValueError: another dtype or shape.
        """
        y: jax.Array = jax_layers.product(x, self.quantized, self.bias, self.dtype)
        return y


def _made(function: Callable[[Any], Any], array: Any) -> Any:
    """``function(array)``, a shape for a shape."""
    return jax.eval_shape(function, array) if isinstance(array, jax.ShapeDtypeStruct) else function(array)


def _quantized(
    linear: eqx.nn.Linear, format: str, group_size: int | None, *, scale_dtype: str | None, search: str
) -> QuantizedTensor:
    """The weight of ``linear``."""
    weight = _made(jnp.transpose, linear.weight)
    return jax_layers.quantized(weight, format, group_size, scale_dtype=scale_dtype, search=search)


def quantize_model(
    model: Any,
    format: str = "int4",
    group_size: int | None = None,
    *,
    filter: Filter | None = None,
    scale_dtype: str | None = None,
    search: str = "absmax",
    dtype: Any | None = None,
    progress: bool = False,
) -> tuple[Any, Report]:
    """``model`` with its eqx.nn.Linear layers replaced by :class:`Linear`, and what became of them.

    Kept are subclasses of eqx.nn.Linear and layers of scalars. What is kept is shared with ``model``.

    Args:
        model: any pytree that has such layers in it, with arrays, or with shapes as eqx.filter_eval_shape makes it:
            what eqx.tree_deserialise_leaves then fills.
        format, group_size, scale_dtype, search: as in :func:`marlin_cupy.quantize`.
        filter: which layers: a function of name and layer, or a pattern of names or several ("*.mlp.*"); all if None.
        dtype: what the layers compute in, float16 or bfloat16; if None what x is, see :class:`Linear`.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: as :func:`marlin_cupy.quantize`, with the name of the layer.
    """

    def packed(name: str, layer: eqx.nn.Linear) -> QuantizedTensor:
        return _quantized(layer, format, group_size, scale_dtype=scale_dtype, search=search)

    tree = _Model(model, dtype)
    report = replace(tree, packed, filter=filter, progress=progress)
    return tree.whole(), report


class _Model(replacing.Model):
    """A pytree. Every place in it is a layer of its own."""

    linear = eqx.nn.Linear

    def __init__(self, model: Any, dtype: Any | None) -> None:
        found, self._tree = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_linear)
        self._paths, self._leaves = [path for path, _ in found], [leaf for _, leaf in found]
        self._dtype = dtype

    def whole(self) -> Any:
        """The model with what has been put into it."""
        return jax.tree.unflatten(self._tree, self._leaves)

    def places(self) -> Iterator[Place]:
        """By their paths."""
        for position, (path, leaf) in enumerate(zip(self._paths, self._leaves, strict=True)):
            if _is_linear(leaf):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                yield Place(name, leaf, position, functools.partial(self._leaves.__setitem__, position))

    def weight(self, layer: eqx.nn.Linear) -> Any:
        """(N, K)."""
        return layer.weight

    def layer(self, old: eqx.nn.Linear, w: QuantizedTensor) -> Linear:
        """With the same bias."""
        return Linear(w, old.bias, dtype=self._dtype)

    def unsuited(self, layer: eqx.nn.Linear) -> str | None:
        """A layer of scalars."""
        return "it takes or returns a scalar" if "scalar" in (layer.in_features, layer.out_features) else None


def _is_linear(node: Any) -> bool:
    return isinstance(node, eqx.nn.Linear)
