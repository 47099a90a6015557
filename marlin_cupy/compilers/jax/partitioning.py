"""What a compiler that spreads a program over devices makes of a product: column, row and batch parallel.

    x (M, K)  packed (N / 64, K / 128, bytes)      y (M, N)
       m  k           n        k                      m  n

Sharded n splits outputs, sharded k splits the sum, which the devices then add up, sharded m splits rows. Each device
multiplies by the share of the packed weight that it has: nothing of a weight is ever gathered. For the
gradient, y @ W.T, n and k change places.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import custom_partitioning
from jax.sharding import NamedSharding

from marlin_cupy.layout import SLAB_K, SLAB_N
from marlin_cupy.spec import Spec

# Of these JAX's annotations say too little.
_custom_partitioning: Any = custom_partitioning.custom_partitioning
_PartitionSpec: Any = jax.sharding.PartitionSpec
_lax: Any = jax.lax
_sharding: Any = jax.sharding

#: The arrays of a weight in the order of Spec.parts, None for those that are not there.
Parts = tuple[Any, ...]
#: (spec of the share, x, parts, layer, bias) -> y, or for the gradient (.., y, ..) -> x.
Multiply = Callable[[Spec, Any, Parts, Any | None, Any | None], Any]


def partitioned(
    multiply: Multiply,
    spec: Spec,
    x: Any,
    parts: Parts,
    layer: Any | None = None,
    bias: Any | None = None,
    *,
    transposed: bool = False,
) -> Any:
    """``multiply`` by shares, where the program is compiled for several devices.

    Inside jax.shard_map the arrays are shares already.
    """
    if manual_axes():
        return multiply(spec, x, parts, layer, bias)
    given = tuple(each is not None for each in (*parts, layer, bias))
    operands = [each for each in (*parts, layer, bias) if each is not None]
    return _operation(multiply, spec, given, transposed)(x, *operands)


def on_automatic_axes(product: Any, x: Any, parts: Parts, *others: Any) -> Any:
    """``product(x, parts, *others)`` on a mesh that may have explicit axes, as that of jax.make_mesh.

    The shardings of what is between are then left to the compiler, and that of the result is what theirs imply.
    """
    packed = parts[0]
    types: list[Any] = [jax.typeof(x), jax.typeof(packed)]
    meshes = [kind.sharding.mesh for kind in types if getattr(kind.sharding.mesh, "explicit_axes", ())]
    if not meshes:
        return product(x, parts, *others)
    *leading, _ = _axes(types[0].sharding, x.ndim)
    axes_n, axes_k = _axes(types[1].sharding, packed.ndim)[-3:-1]
    taken = {*_names(axes_n), *_names(axes_k)}
    rows = [None if taken & {*_names(each)} else each for each in leading]
    out = NamedSharding(meshes[0], _PartitionSpec(*rows, axes_n))
    return _sharding.auto_axes(product, axes=meshes[0].explicit_axes, out_sharding=out)(x, parts, *others)


def varying_alike(*trees: Any) -> Any:
    """Inside jax.shard_map: arrays that vary over the same axes of the mesh, those of all together; None stays None.

    Gradients of what did not vary are then added up by JAX.
    """
    if not manual_axes():
        return trees
    axes = frozenset[str]().union(*map(_varying, jax.tree.leaves(trees)))
    return jax.tree.map(lambda each: each if _varying(each) == axes else _vary(each, axes - _varying(each)), trees)


def manual_axes() -> Any:
    """Axes of the mesh inside jax.shard_map; nothing outside."""
    return getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ())


def _varying(array: Any) -> frozenset[str]:
    kind: Any = jax.typeof(array)
    found: frozenset[str] = kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma
    return found


def _vary(array: Any, axes: frozenset[str]) -> Any:
    names, lax = tuple(sorted(axes)), _lax
    return lax.pcast(array, names, to="varying") if hasattr(lax, "pcast") else lax.pvary(array, names)


@functools.lru_cache(maxsize=4096)
def _operation(multiply: Multiply, spec: Spec, given: tuple[bool, ...], transposed: bool) -> Any:
    """For which of the parts, the layer and the bias there are."""
    lead = (None,) * given[-2]  # of stacks

    def whole(x: Any, *others: Any) -> Any:
        return multiply(spec, x, *_spread(others, given))

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        axes_m, _ = _axes(operands[0].sharding, 2)
        axes_n, axes_k = _axes(operands[1].sharding, len(operands[1].shape))[-3:-1]
        axes_sum, axes_out = (axes_n, axes_k) if transposed else (axes_k, axes_n)
        if {*_names(axes_m)} & {*_names(axes_n), *_names(axes_k)}:
            axes_m = None
        *_, slabs_n, slabs_k, slab_bytes = operands[1].shape
        of_share = spec.of_part((slabs_n // _count(mesh, axes_n), slabs_k // _count(mesh, axes_k), slab_bytes))

        def lower(x: Any, *others: Any) -> Any:
            parts, layer, bias = _spread(others, given)
            if axes_sum is None:
                return multiply(of_share, x, parts, layer, bias)
            y = multiply(of_share, x, parts, layer, None).astype(jnp.float32)
            y = _lax.psum(y, axes_sum)
            return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)

        cut = {"N": axes_n, "K": axes_k, None: None}
        others = [*((*lead, *(cut[axis] for axis in part.axes)) for part in spec.parts.values()), (), (axes_n,)]
        specs = [(axes_m, axes_sum), *_given(others, given)]
        named = [NamedSharding(mesh, _PartitionSpec(*each)) for each in specs]
        return mesh, lower, NamedSharding(mesh, _PartitionSpec(axes_m, axes_out)), tuple(named)

    operation = _custom_partitioning(whole)
    operation.def_partition(partition=partition, **_rule(spec, given, transposed))
    return operation


def _rule(spec: Spec, given: tuple[bool, ...], transposed: bool) -> dict[str, Any]:
    """The factors of the dimensions, n and k for slabs.

    K and N, and the dimensions of parts that run along them one by one, are those times the size of a slab where
    nothing is padded.
    """
    K, N = spec.shape
    slabs_n, slabs_k, _ = spec.layout.packed_shape
    sizes: dict[str, int] = {}
    inputs, outputs = "p", "q"
    if K % SLAB_K == 0:
        inputs, sizes["i"] = "(k i)", SLAB_K
    if N % SLAB_N == 0:
        outputs, sizes["j"] = "(n j)", SLAB_N
    along: dict[tuple[str | None, int], str] = {
        ("N", N): outputs,
        ("K", K): inputs,
        ("N", slabs_n): "n",
        ("K", slabs_k): "k",
    }
    lead = "l " if given[-2] else ""
    others = []
    for number, part in enumerate(spec.parts.values()):
        sizes_of = enumerate(zip(part.axes, part.shape, strict=True))
        others.append(lead + " ".join(along.get(each, f"r{number}{axis}") for axis, each in sizes_of))
    taken, made = (outputs, inputs) if transposed else (inputs, outputs)
    operands = [f"m {taken}", *_given([*others, "", outputs], given)]
    return {"sharding_rule": f"{', '.join(operands)} -> m {made}", **sizes}


def _given(values: list[Any], given: tuple[bool, ...]) -> list[Any]:
    return [each for each, is_given in zip(values, given, strict=True) if is_given]


def _spread(others: tuple[Any, ...], given: tuple[bool, ...]) -> tuple[Parts, Any | None, Any | None]:
    """Parts, layer and bias, None for those that are not there."""
    left = iter(others)
    *parts, layer, bias = [next(left) if is_given else None for is_given in given]
    return tuple(parts), layer, bias


def _axes(sharding: Any, rank: int) -> tuple[Any, ...]:
    spec = tuple(getattr(sharding, "spec", ()))
    return (*spec, *(None,) * (rank - len(spec)))


def _names(axes: Any) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _count(mesh: Any, axes: Any) -> int:
    count = 1
    for name in _names(axes):
        count *= mesh.shape[name]
    return count
