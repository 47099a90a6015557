"""Flax NNX: Linear over a packed weight, and whole models quantized in place.

print(quantize_model_(model, "int4", filter="*.mlp.*", dtype=jnp.bfloat16))    # every nnx.Linear there

The arrays of a packed weight are variables of a type of their own, so that nnx.grad and optimizers, which take
nnx.Param, leave them alone, and a state holds nothing but arrays. A model of shapes (nnx.eval_shape) becomes one of
the shapes that the quantized model has: what a checkpoint is restored into.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from flax import nnx

from marlin_cupy.integrations import jax_layers, replacing
from marlin_cupy.integrations.replacing import Filter, Place, Report, replace
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

L = TypeVar("L", bound="Linear")


class Packed(nnx.Variable[Any]):
    """An array of a packed weight. It is not trained."""


class Linear(nnx.Module):
    """y = x @ W + bias with a packed W, in place of nnx.Linear. Gradients flow to x and bias.

    Args:
        w: the weight, in JAX; :meth:`from_quantized` takes those of other libraries.
        bias: array or variable [N], or None.
        dtype: as of nnx.Linear, float16 or bfloat16: x and bias are cast to it, and the result has it. If None,
            x has to be one of these, and the bias is cast to what x is.

    Attributes:
        packed: variable, uint8 (ceil(N / 64), ceil(K / 128), slab_bytes).
        output_scales: variable, float32 per output, see Spec.parts, each of which has a variable.
        bias: nnx.Param [N] or None.
        spec: what ``packed`` holds.
        dtype: as given.
    """

    packed: Packed

    def __init__(self, w: QuantizedTensor, bias: Any | None = None, *, dtype: Any | None = None) -> None:
        for name, part in w.parts.items():
            setattr(self, name, Packed(part))
        self.bias = bias if bias is None or isinstance(bias, nnx.Variable) else nnx.Param(bias)
        self.spec: Spec = w.whole
        self.in_features, self.out_features = w.whole.shape
        self.dtype = dtype

    @classmethod
    def from_quantized(cls: type[L], w: QuantizedTensor, bias: Any | None = None, *, dtype: Any | None = None) -> L:
        """With the weight ``w`` of any library, handed to JAX, and of ``bias``, an array or variable [N].

        Raises:
            TypeError, ValueError: not that.
        """
        return cls(jax_layers.given(w, bias), bias, dtype=dtype)

    @classmethod
    def from_linear(
        cls: type[L],
        linear: nnx.Linear,
        format: str = "int4",
        group_size: int | None = None,
        *,
        scale_dtype: str | None = None,
        search: str = "absmax",
        dtype: Any | None = None,
    ) -> L:
        """``linear``, quantized by rounding to nearest; see :func:`marlin_cupy.quantize` for arguments and errors.

        The bias is shared. ``dtype`` is that of ``linear`` if None.
        """
        kernel = linear.kernel.get_value()
        w = jax_layers.quantized(kernel, format, group_size, scale_dtype=scale_dtype, search=search)
        return cls(w, linear.bias, dtype=dtype or linear.dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight, of the same arrays."""
        return QuantizedTensor.of_parts(self.spec, {name: getattr(self, name).get_value() for name in self.spec.parts})

    def __call__(self, x: Any) -> Any:
        """x: [..., K], cast to ``dtype``; returns [..., N]. ValueError: another dtype or shape."""
        return jax_layers.product(x, self.quantized, None if self.bias is None else self.bias.get_value(), self.dtype)


# ---- models


def quantize_model_(
    model: nnx.Module,
    format: str = "int4",
    group_size: int | None = None,
    *,
    filter: Filter | None = None,
    scale_dtype: str | None = None,
    search: str = "absmax",
    dtype: Any | None = None,
    progress: bool = False,
) -> Report:
    """Replace the nnx.Linear layers of ``model`` by :class:`Linear`, in place, one after the other.

    No more than one layer is held both ways. Kept are subclasses of nnx.Linear, layers with a dot_general of their own,
    and those that share their kernel with another module.

    Args:
        model: any module that has such layers in it, with arrays, or with shapes as nnx.eval_shape makes it.
        format, group_size, scale_dtype, search: as in :func:`marlin_cupy.quantize`.
        filter: which layers: a function of name and layer, or a pattern of names or several ("*.mlp.*"); all if None.
        dtype: what the layers compute in, float16 or bfloat16; if None what each was made with, see :class:`Linear`.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: ``model`` is no module. ValueError: as :func:`marlin_cupy.quantize`, with the name of the layer; the
            layers ahead of it have been replaced. Or ``model`` is itself an nnx.Linear, which has no place to be
            replaced in.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}; pass an nnx.Module.")
    if isinstance(model, nnx.Linear):
        raise ValueError("model is itself an nnx.Linear; use Linear.from_linear.")

    def packed(name: str, layer: nnx.Linear) -> QuantizedTensor:
        kernel = layer.kernel.get_value()
        return jax_layers.quantized(kernel, format, group_size, scale_dtype=scale_dtype, search=search)

    return replace(_Model(model, dtype), packed, filter=filter, progress=progress)


class _Model(replacing.Model):
    """An NNX module."""

    linear = nnx.Linear

    def __init__(self, model: nnx.Module, dtype: Any | None) -> None:
        self._model, self._dtype = model, dtype
        self._owners: dict[int, set[int]] = {}  # modules of a variable, all by their ids
        for _, child, owner, _ in _children(model, "", set()):
            if isinstance(child, nnx.Variable):
                self._owners.setdefault(id(child), set()).add(id(owner))

    def places(self) -> Iterator[Place]:
        """In attributes of modules, and in lists, tuples and dicts there."""
        for name, child, _, put in _children(self._model, "", set()):
            if isinstance(child, nnx.Linear):
                yield Place(name, child, id(child), put)

    def weight(self, layer: nnx.Linear) -> Any:
        """(K, N)."""
        return layer.kernel.get_value()

    def layer(self, old: nnx.Linear, w: QuantizedTensor) -> Linear:
        """With the same bias."""
        return Linear(w, old.bias, dtype=self._dtype or old.dtype)

    def unsuited(self, layer: nnx.Linear) -> str | None:
        """With another product."""
        return None if layer.dot_general is jax.lax.dot_general else "it has a dot_general of its own"

    def tied(self, layer: nnx.Linear) -> str | None:
        """To another module."""
        return "its kernel is shared with another module" if len(self._owners[id(layer.kernel)]) > 1 else None


def _children(node: Any, name: str, seen: set[int]) -> Iterator[tuple[str, Any, Any, Callable[[Any], None]]]:
    """Modules and variables below ``node``, at every place that they have: name, child, its module, and what puts
    another one there.
    """
    if id(node) in seen:
        return
    seen.add(id(node))
    for attribute, value in list(vars(node).items()):
        for leaf, (path, child) in enumerate(jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_object)[0]):
            if _is_object(child):
                full = ".".join(filter(None, (name, attribute, jax.tree_util.keystr(path, simple=True, separator="."))))
                yield full, child, node, functools.partial(_put, node, attribute, leaf)
                if isinstance(child, nnx.Pytree):
                    yield from _children(child, full, seen)


def _is_object(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _put(owner: Any, attribute: str, leaf: int, new: Linear) -> None:
    """Into ``owner.attribute``, in the place of the leaf of that number."""
    leaves, tree = jax.tree.flatten(getattr(owner, attribute), is_leaf=_is_object)
    leaves[leaf] = new
    setattr(owner, attribute, jax.tree.unflatten(tree, leaves))
