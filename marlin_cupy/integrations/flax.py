"""Flax NNX: Linear over a packed weight, and whole models quantized in place.

print(quantize_model_(model, "int4", filter="*.mlp.*", dtype=jnp.bfloat16))    # every nnx.Linear there

The arrays of a packed weight are variables of a type of their own, so that nnx.grad and optimizers, which take
nnx.Param, leave them alone, and a state holds nothing but arrays. A model of shapes (nnx.eval_shape) becomes one of
the shapes that the quantized model has: what a checkpoint is restored into.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from marlin_cupy.integrations import jax_layers
from marlin_cupy.integrations.replacing import Filter, Report, matches
from marlin_cupy.progress import bar
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
        output_scales: variable, float32 per output, made from ``packed``. (A variable for each of Spec.parts.)
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


class _Place(NamedTuple):
    """Where a layer is: in this attribute of ``owner``, or in a list, tuple or dict there."""

    name: str
    owner: Any
    attribute: str


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
    wanted = matches(filter)
    layers, places, owners = _found(model)
    kept: dict[str, str] = {}
    chosen: list[nnx.Linear] = []
    for layer in layers:
        names = [place.name for place in places[id(layer)]]
        reason = None
        if type(layer) is not nnx.Linear:
            reason = f"it is a {type(layer).__name__}, a subclass"
        elif layer.dot_general is not jax.lax.dot_general:
            reason = "it has a dot_general of its own"
        elif not any(wanted(name, layer) for name in names):
            reason = "the filter left it out"
        elif len(owners[id(layer.kernel)]) > 1:
            reason = "its kernel is shared with another module"
        if reason is None:
            chosen.append(layer)
        else:
            kept |= dict.fromkeys(names, reason)
    del layers

    replaced: dict[str, Spec] = {}
    before = after = 0
    with bar("quantizing", len(chosen), progress) as begin:
        while chosen:
            layer = chosen.pop(0)
            here = places.pop(id(layer))
            begin(here[0].name)
            try:
                new = Linear.from_linear(layer, format, group_size, scale_dtype=scale_dtype, search=search, dtype=dtype)
            except ValueError as error:
                raise type(error)(f"{here[0].name}: {error}") from error
            before += layer.kernel.size * layer.kernel.dtype.itemsize
            after += new.packed.size
            for place in here:
                _put(place, layer, new)
                replaced[place.name] = new.spec
            del layer  # its memory is to be free before the next one is quantized
    return Report(replaced, kept, before, after)


def _found(model: nnx.Module) -> tuple[list[nnx.Linear], dict[int, list[_Place]], dict[int, set[int]]]:
    """The nnx.Linear layers; by the id of each where it is; by the id of each variable the ids of its modules."""
    layers: list[nnx.Linear] = []
    places: dict[int, list[_Place]] = {}
    owners: dict[int, set[int]] = {}
    for place, child in _children(model, "", set()):
        if isinstance(child, nnx.Variable):
            owners.setdefault(id(child), set()).add(id(place.owner))
        elif isinstance(child, nnx.Linear):
            if id(child) not in places:
                layers.append(child)
            places.setdefault(id(child), []).append(place)
    return layers, places, owners


def _children(node: Any, name: str, seen: set[int]) -> Iterator[tuple[_Place, Any]]:
    """Modules and variables below ``node``, with every place that they have."""
    if id(node) in seen:
        return
    seen.add(id(node))
    for attribute, value in list(vars(node).items()):
        for path, child in jax.tree_util.tree_flatten_with_path(value, is_leaf=_is_object)[0]:
            if _is_object(child):
                full = ".".join(filter(None, (name, attribute, jax.tree_util.keystr(path, simple=True, separator="."))))
                place = _Place(full, node, attribute)
                yield place, child
                if isinstance(child, nnx.Pytree):
                    yield from _children(child, place.name, seen)


def _is_object(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _put(place: _Place, old: nnx.Linear, new: Linear) -> None:
    value = getattr(place.owner, place.attribute)
    setattr(
        place.owner, place.attribute, jax.tree.map(lambda each: new if each is old else each, value, is_leaf=_is_object)
    )
