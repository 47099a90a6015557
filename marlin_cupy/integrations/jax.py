"""Weights for JAX programs: stacks for jax.lax.scan, shares for meshes of devices, their shapes, exported programs."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marlin_cupy import frameworks
from marlin_cupy.compilers.jax import launching
from marlin_cupy.files import kept
from marlin_cupy.layout import SLAB_K, SLAB_N
from marlin_cupy.packing import derived
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

# Of these JAX's annotations say too little.
_PartitionSpec: Any = PartitionSpec
_Shape: Any = jax.ShapeDtypeStruct

frameworks.meet(QuantizedTensor)  # weights that were made before JAX was imported are trees too
jax.export.register_pytree_node_serialization(
    QuantizedTensor,
    serialized_name="marlin_cupy.QuantizedTensor",
    serialize_auxdata=lambda whole: json.dumps(whole.fields).encode(),
    deserialize_auxdata=lambda text: Spec.of_fields(json.loads(text), "an exported program"),
)

#: The ``disabled_checks`` of jax.export.export for GPUs: JAX lets no calls into a file whose meaning it does not know.
#: What ours mean stands in their text, and another version of marlin_cupy refuses what it cannot launch any more.
export_checks = [jax.export.DisabledSafetyCheck.custom_call(target) for target in launching.TARGETS]


def stack(ws: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Weights of one shape and format in one array, for layers that jax.lax.scan runs through.

    ``stacked[layer]`` is one of them for ``x @ stacked[layer]``, where ``layer`` may be traced: on a GPU the kernel
    reads that layer in place. (A stack among the ``xs`` of a scan is right too; XLA then copies each layer's slice.)

    Args:
        ws: of any libraries and devices; they go where JAX puts arrays. Memory for all of them is needed twice.

    Raises:
        ValueError: none, or different ones. TypeError: no weights.
    """
    for w in ws:
        if not isinstance(w, QuantizedTensor):
            raise TypeError(f"ws holds a {type(w).__name__}; pass QuantizedTensors.")
    if len({w.spec for w in ws}) != 1:
        given = ", ".join(dict.fromkeys(f"{w.format} {w.shape} group_size={w.group_size}" for w in ws)) or "nothing"
        raise ValueError(f"ws holds {given}; pass weights of one shape, format, group size and scale dtype.")
    stacked: QuantizedTensor = jax.tree.map(lambda *parts: jnp.stack(parts), *[w.to("jax") for w in ws])
    return stacked


def abstract(
    weight: jax.ShapeDtypeStruct,
    format: str = "int4",
    group_size: int | None = None,
    *,
    scale_dtype: str | None = None,
    layers: int | None = None,
) -> QuantizedTensor:
    """What :func:`marlin_cupy.quantize` would make of ``weight``, without values: what a checkpoint is restored into.

    A checkpoint has the arrays of a weight and not what they mean. Where their shapes are others than here it is
    refused; where another format, scale dtype or padding has the same shapes, nothing tells.

    Args:
        weight: the shape (K, N) and dtype.
        format, group_size, scale_dtype: as of :func:`marlin_cupy.quantize`.
        layers: of a stack; None: one weight.

    Raises:
        ValueError: there is no such weight. TypeError: ``weight`` has no shape or no dtype.
    """
    if not (hasattr(weight, "shape") and hasattr(weight, "dtype")):
        raise TypeError(f"weight is a {type(weight).__name__}; pass jax.ShapeDtypeStruct((K, N), dtype).")
    spec = Spec.checked(format, tuple(weight.shape), group_size, scale_dtype, like=weight.dtype.name)
    lead = () if layers is None else (layers,)
    return QuantizedTensor.of_parts(
        spec, {name: _Shape((*lead, *part.shape), jnp.dtype(part.dtype)) for name, part in spec.parts.items()}
    )


def partition_specs(w: QuantizedTensor, mesh: Mesh, spec: PartitionSpec) -> QuantizedTensor:
    """The PartitionSpec of each array of ``w``, as a tree of its structure: what ``in_specs`` of jax.shard_map takes.

    Args:
        w: a weight, or a stack of weights.
        mesh: of devices.
        spec: of the logical (K, N): ``PartitionSpec(None, "model")`` gives each device some outputs (column parallel),
            ``PartitionSpec("model", None)`` some inputs, whose sums are then to be added up (row parallel).

    Raises:
        ValueError: an axis that the mesh does not have, or shares that are not whole slabs of 64 outputs and 128 inputs
            and whole groups; the message says what would fit.
    """
    if len(spec) > 2:
        raise ValueError(f"spec is {spec}; a weight has two axes, (K, N).")
    axes_k, axes_n = (*spec, None, None)[:2]
    for axis, axes in enumerate((axes_k, axes_n)):
        w.whole.equal_part(axis, _count(mesh, axes))
    lead, cut = (None,) * (len(w.packed.shape) - 3), {"N": axes_n, "K": axes_k}
    return QuantizedTensor.of_parts(
        w.whole,
        {
            name: _PartitionSpec(*lead, *(cut.get(axis or "") for axis in part.axes))
            for name, part in w.whole.parts.items()
        },
    )


def shard(w: QuantizedTensor, mesh: Mesh, spec: PartitionSpec) -> QuantizedTensor:
    """``w`` spread over the devices of ``mesh``, each of which gets a share that is a weight by itself.

    Inside jax.jit products with it are computed where the shares are. Arguments and errors are those of
    :func:`partition_specs`. Where the mesh has devices of other processes, each of these has to call it with the same.
    Of an :func:`abstract` weight it makes the shapes of the whole, with their shardings.
    """
    specs: dict[str, Any] = partition_specs(w, mesh, spec).parts
    parts = {name: _spread(part, NamedSharding(mesh, specs[name])) for name, part in in_jax(w).parts.items()}
    return QuantizedTensor.of_parts(w.whole, parts)


def from_shares(like: QuantizedTensor, share: Callable[[slice, slice], QuantizedTensor]) -> QuantizedTensor:
    """The weight that ``like`` describes, of which each process makes or reads no more than its devices get.

    One share is made at a time. Every process that has devices of the mesh has to call it.

    Args:
        like: shapes and where they are to be, ``shard(abstract(...), mesh, spec)``.
        share: called with (rows, columns), gives W[rows, columns] in any library, as
            ``marlin_cupy.quantize(dense[rows, columns])`` or ``marlin_cupy.load(path, rows=rows, columns=columns)`` do.
            With group_size -1, where a scale is that of all rows, only the latter gives a part of the rows.

    Raises:
        ValueError: ``like`` does not say where, or what ``share`` gave is not that share. TypeError: it is no weight.
    """
    shardings: dict[str, Any] = {name: getattr(part, "sharding", None) for name, part in like.parts.items()}
    if not all(isinstance(sharding, NamedSharding) for sharding in shardings.values()):
        raise ValueError("like does not say where its shares are to be; pass shard(abstract(...), mesh, spec).")
    sharding = shardings["packed"]
    shape, (K, N) = tuple(like.packed.shape), like.whole.shape
    places: Any = sharding.addressable_devices_indices_map(shape)
    holders: dict[Any, list[Any]] = {}  # by where in packed their share begins and ends
    for device, index in places.items():
        n, k = (run.indices(size)[:2] for run, size in zip(index[-3:-1], shape[-3:-1], strict=True))
        holders.setdefault((*n, *k), []).append(device)
    arrays: dict[str, list[jax.Array]] = {name: [] for name in kept(like.whole)}
    for (n, n_end, k, k_end), devices in holders.items():
        rows, columns = slice(k * SLAB_K, min(k_end * SLAB_K, K)), slice(n * SLAB_N, min(n_end * SLAB_N, N))
        found = _checked_share(like, rows, columns, share(rows, columns))
        for name, of_name in arrays.items():
            of_name += [jax.device_put(found.parts[name], device) for device in devices]
        del found  # before the next one is made
    whole: dict[str, Any] = like.parts
    parts: dict[str, Any] = {
        name: jax.make_array_from_single_device_arrays(tuple(whole[name].shape), shardings[name], of_name)
        for name, of_name in arrays.items()
    }
    of_derived = {name: shardings[name] for name in like.whole.parts if name not in arrays}
    parts |= _derived(like.whole, len(shape), tuple(of_derived.items()))(parts["packed"]) if of_derived else {}
    return QuantizedTensor.of_parts(like.whole, parts)


def _checked_share(like: QuantizedTensor, rows: slice, columns: slice, found: QuantizedTensor) -> QuantizedTensor:
    """``found`` in JAX; ValueError or TypeError if that is not what is there of ``like``."""
    if not isinstance(found, QuantizedTensor):
        raise TypeError(f"share({rows}, {columns}) gave a {type(found).__name__}; it has to give a QuantizedTensor.")
    spec, _ = like.whole.cut(rows, columns)
    shape = (*like.packed.shape[:-3], *spec.layout.packed_shape)
    if found.whole != spec or tuple(found.packed.shape) != shape:
        wanted = QuantizedTensor.of_parts(spec, {"packed": _Shape(shape, jnp.uint8)})
        raise ValueError(f"share({rows}, {columns}) gave {found!r}; it has to give {wanted!r}.")
    return in_jax(found)


@functools.cache
def _derived(whole: Spec, rank: int, shardings: tuple[tuple[str, NamedSharding], ...]) -> Any:
    """A program that makes parts from what is packed; devices that split K exchange their largest scales for it."""
    make = functools.partial(derived, whole)
    return jax.jit(make if rank == 3 else jax.vmap(make), out_shardings=dict(shardings))


def in_jax(w: QuantizedTensor) -> QuantizedTensor:
    """``w`` itself where its arrays are JAX's, or shapes; else handed over."""
    return w if isinstance(w.packed, jax.Array | jax.ShapeDtypeStruct) else w.to("jax")


def _spread(part: Any, sharding: NamedSharding) -> Any:
    if isinstance(part, jax.ShapeDtypeStruct):
        return _Shape(part.shape, part.dtype, sharding=sharding)
    if sharding.is_fully_addressable:
        return jax.device_put(part, sharding)
    return jax.make_array_from_callback(part.shape, sharding, lambda index: part[index])


def _count(mesh: Mesh, axes: Any) -> int:
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    for name in names:
        if name not in mesh.shape:
            raise ValueError(f"spec names the axis {name!r}; the mesh has {', '.join(map(str, mesh.shape))}.")
    return math.prod(mesh.shape[name] for name in names)
