"""Weights in JAX that are put together from shares, quantized or read from a file one by one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import FORMATS, gaussian
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax_arrays import activations, check

import marlin_cupy as mc
from marlin_cupy.integrations.jax import abstract, from_shares, shard, stack

K, N, GROUP = 1024, 512, 64
P: Any = PartitionSpec
#: Axes of a mesh, how the weight (K, N) lies on it, and how many different shares there are.
PLACES: dict[str, tuple[dict[str, int], Any, int]] = {
    "columns": ({"model": 4}, P(None, "model"), 4),
    "rows": ({"model": 4}, P("model"), 4),
    "both": ({"data": 2, "model": 2}, P("data", "model"), 4),
    "columns, twice": ({"data": 2, "model": 2}, P(None, "model"), 2),
    "rows, twice": ({"data": 2, "model": 2}, P("model"), 2),
    "columns of two axes": ({"data": 2, "model": 2}, P(None, ("model", "data")), 4),
    "everywhere": ({"model": 4}, P(), 1),
}
every_place = pytest.mark.parametrize("place", PLACES)


def mesh_of(place: str, kind: AxisType = AxisType.Auto) -> Mesh:
    axes = PLACES[place][0]
    devices = np.array(jax.devices("cpu")[: math.prod(axes.values())])
    return Mesh(devices.reshape(tuple(axes.values())), tuple(axes), axis_types=(kind,) * len(axes))


def matrix(dtype: str = "float16", seed: int = 1) -> np.ndarray:
    """Outputs of very different sizes, one of which is zero for some devices, and one for all."""
    dense = gaussian(K, N, seed=seed).astype(np.float32) * 4.0 ** (np.arange(N) % 5 - 2)
    dense[: K // 2, 3] = 0
    dense[:, 5] = 0
    return dense.astype(dtype)


def like(place: str, format: str = "int4", group_size: int = GROUP, **options: Any) -> mc.QuantizedTensor:
    kind = options.pop("kind", AxisType.Auto)
    shape = jax.ShapeDtypeStruct((K, N), jnp.float16)
    return shard(abstract(shape, format, group_size, **options), mesh_of(place, kind), PLACES[place][1])


def assert_same(w: mc.QuantizedTensor, expected: mc.QuantizedTensor) -> None:
    """Bit for bit on every device, and in the same places."""
    assert jax.tree.structure(w) == jax.tree.structure(expected)
    for part, other in zip(jax.tree.leaves(w), jax.tree.leaves(expected), strict=True):
        assert (part.dtype, part.shape, part.sharding) == (other.dtype, other.shape, other.sharding)
        for here, there in zip(part.addressable_shards, other.addressable_shards, strict=True):
            assert here.device == there.device
            np.testing.assert_array_equal(np.asarray(here.data), np.asarray(there.data))


@every_place
@pytest.mark.parametrize("held", ["numpy", "jax"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shares_that_were_quantized_alone(place: str, held: str, kind: AxisType) -> None:
    dense, made = matrix(), []

    def share(rows: slice, columns: slice) -> mc.QuantizedTensor:
        made.append((rows, columns))
        return mc.quantize(dense[rows, columns], "int4", GROUP).to(held)

    w, whole = from_shares(like(place, kind=kind), share), mc.quantize(dense, "int4", GROUP)
    assert_same(w, shard(whole, mesh_of(place, kind), PLACES[place][1]))
    assert len(made) == PLACES[place][2]
    assert sum(dense[part].size for part in made) == dense.size
    x = jax.device_put(activations((5, K)), NamedSharding(mesh_of(place, kind), P()))
    check(jax.jit(mc.matmul)(x, w), x, whole, shares=4)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("place", ["columns", "rows"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_format(name: str, place: str, dtype: str) -> None:
    dense, size = matrix(dtype), FORMATS[name].group(GROUP)
    w = from_shares(
        like(place, name, size, scale_dtype=FORMATS[name].scale(size, dtype)),
        lambda rows, columns: mc.quantize(dense[rows, columns], name, size),
    )
    assert_same(w, shard(mc.quantize(dense, name, size), mesh_of(place), PLACES[place][1]))


@every_place
@pytest.mark.parametrize(("name", "group_size"), [("int4", GROUP), ("int4", -1), ("fp8_e4m3", -1)])
def test_shares_of_a_file(place: str, name: str, group_size: int, tmp_path: Path) -> None:
    whole, path = mc.quantize(matrix(), name, group_size), tmp_path / "w"
    whole.save(path)
    w = from_shares(like(place, name, group_size), lambda rows, columns: mc.load(path, rows=rows, columns=columns))
    assert_same(w, shard(whole, mesh_of(place), PLACES[place][1]))


@every_place
def test_shares_of_a_stack(place: str) -> None:
    layers = [matrix(seed=seed) for seed in range(3)]
    w = from_shares(
        like(place, layers=3),
        lambda rows, columns: stack([mc.quantize(dense[rows, columns], "int4", GROUP) for dense in layers]),
    )
    assert_same(
        w, shard(stack([mc.quantize(dense, "int4", GROUP) for dense in layers]), mesh_of(place), PLACES[place][1])
    )


REFUSALS: dict[str, tuple[Callable[[np.ndarray], Any], list[str]]] = {
    "the whole": (lambda dense: mc.quantize(dense, "int4", GROUP), ["K=1024, N=512", "K=1024, N=128"]),
    "another format": (lambda dense: mc.quantize(dense[:, :128], "nf4", GROUP), ["(nf4, ", "(int4, "]),
    "another group size": (lambda dense: mc.quantize(dense[:, :128]), ["group_size=128", "group_size=64"]),
    "another scale dtype": (
        lambda dense: mc.quantize(dense[:, :128], "int4", GROUP, scale_dtype="bfloat16"),
        ["scale_dtype=bfloat16", "scale_dtype=float16"],
    ),
    "a stack": (
        lambda dense: stack([mc.quantize(dense[:, :128], "int4", GROUP)] * 2),
        ["uint8(2, 2, 8, 4352)", "uint8(2, 8, 4352)"],
    ),
    "no weight": (lambda dense: dense[:, :128], ["gave a ndarray", "QuantizedTensor"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_no_share_is_refused_in_a_sentence(case: str) -> None:
    give, fragments = REFUSALS[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        from_shares(like("columns"), lambda rows, columns: give(matrix()))
    message = str(caught.value)
    assert message.startswith("share(slice(0, 1024, None), slice(0, 128, None)) gave ")
    assert message.endswith(".")
    for fragment in fragments:
        assert fragment in message


def test_where_shares_are_to_be_is_said_before_they_are_made() -> None:
    for nowhere in (abstract(jax.ShapeDtypeStruct((K, N), jnp.float16)), mc.quantize(matrix()).to("jax")):
        with pytest.raises(ValueError, match=r"like does not say where .*; pass shard\(abstract"):
            from_shares(nowhere, lambda rows, columns: pytest.fail("was asked for"))
    with pytest.raises(ValueError, match="K=1024 cannot be cut into 4 equal parts at multiples of 512; into 1, 2"):
        like("rows", "int4", 512)


def test_a_shape_alone_is_no_weight() -> None:
    with pytest.raises(TypeError, match=r"weight is a tuple; pass jax\.ShapeDtypeStruct\(\(K, N\), dtype\)\."):
        abstract((K, N))
