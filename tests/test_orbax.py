"""Checkpoints of plain JAX trees by Orbax: onto one device and onto a mesh, weights and stacks of them."""

from __future__ import annotations

import functools
import gc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_arrays import K, N, activations, check, weight

import marlin_cupy as mc
from marlin_cupy.integrations.jax import abstract, shard, stack

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own import
    import orbax.checkpoint as ocp

pytestmark = pytest.mark.filterwarnings("ignore")  # of Orbax, which also leaves coroutines behind where it refuses
P: Any = PartitionSpec
WIDE = (512, 256)  # can be split among four devices
Tree = dict[str, Any]


def saved(tree: Any, path: Path) -> Path:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "state", tree)
    return path / "state"


def restored(path: Path, *target: Any) -> Any:
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, *target)


def tree(w: Any) -> Tree:
    return {"layer": {"w": w, "bias": activations((N,))}}


def assert_same(found: Any, expected: Any) -> None:
    """Specs are in the structure."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


TARGETS: dict[str, Callable[[Tree], Any]] = {
    "the tree itself": lambda tree: tree,
    "eval_shape": functools.partial(jax.eval_shape, lambda tree: tree),
    "Orbax's own": lambda tree: jax.tree.map(ocp.utils.to_shape_dtype_struct, tree),
    "abstract": lambda tree: {
        "layer": {
            "w": abstract(jax.ShapeDtypeStruct((K, N), jnp.float32), "int4", 64),
            "bias": jax.ShapeDtypeStruct((N,), jnp.float16),
        }
    },
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_tree_comes_back_as_it_was(target: str, tmp_path: Path) -> None:
    expected, x = tree(weight()), activations((5, K))
    found = restored(saved(expected, tmp_path), TARGETS[target](expected))
    assert_same(found, expected)
    check(jax.jit(mc.matmul)(x, found["layer"]["w"]), x, weight())


@pytest.mark.parametrize("target", TARGETS)
def test_other_ways_to_save_and_restore(target: str, tmp_path: Path) -> None:
    expected = tree(weight())
    like = TARGETS[target](expected)
    with ocp.CheckpointManager(tmp_path / "managed") as manager:
        manager.save(3, args=ocp.args.StandardSave(expected))
        manager.wait_until_finished()
        assert_same(manager.restore(3, args=ocp.args.StandardRestore(like)), expected)
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", expected)
        arguments = ocp.checkpoint_utils.construct_restore_args(like)
        assert_same(checkpointer.restore(tmp_path / "tree", item=like, restore_args=arguments), expected)


def test_without_a_target_there_are_arrays_by_name(tmp_path: Path) -> None:
    found = restored(saved(tree(weight()), tmp_path))["layer"]["w"]
    assert set(found) == {"packed", "output_scales", "layer"}
    w = mc.QuantizedTensor.of_parts(weight().spec, found)
    assert_same(w, weight())


@pytest.mark.parametrize("of_w", [P(None, "model"), P("model")])
@pytest.mark.parametrize("layers", [None, 3])
def test_onto_a_mesh(of_w: Any, layers: int | None, tmp_path: Path) -> None:
    """Whatever it was saved from; nothing is put on one device first."""
    mesh = Mesh(np.array(jax.devices("cpu")[:4]), ("model",))
    each = [weight("int4", 64, WIDE, seed) for seed in range(layers or 1)]
    whole = stack(each) if layers else each[0]
    like = shard(abstract(jax.ShapeDtypeStruct(WIDE, jnp.float16), "int4", 64, layers=layers), mesh, of_w)
    expected = shard(whole, mesh, of_w)
    for name, made in (("whole", whole), ("other shares", shard(whole, mesh, P(*reversed((*of_w, None)[:2]))))):
        found = restored(saved(made, tmp_path / name), like)
        assert_same(found, expected)
        for part, of_part in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert part.sharding == of_part.sharding
    x = jax.device_put(activations((5, WIDE[0])), NamedSharding(mesh, P()))
    y = jax.jit(lambda x, w: x @ (w[1] if layers else w))(x, found)
    check(y, x, each[1 if layers else 0], shares=4 if of_w[0] else 1)


@pytest.mark.parametrize(
    ("format", "group_size", "shape"), [("int8", 64, (K, N)), ("int4", 16, (K, N)), ("int4", 64, WIDE)]
)
def test_a_target_of_other_shapes_is_refused(format: str, group_size: int, shape: Any, tmp_path: Path) -> None:
    like = abstract(jax.ShapeDtypeStruct(shape, jnp.float16), format, group_size)
    with pytest.raises(ValueError, match="shape"):
        restored(saved(weight(), tmp_path), like)
    gc.collect()  # while warnings are ignored


@pytest.mark.parametrize("format", ["int4", "uint4", "int8", "nf4"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_abstract_is_what_quantize_makes(format: str, dtype: str) -> None:
    dense = jnp.ones((130, 65), dtype)
    like = abstract(jax.ShapeDtypeStruct(dense.shape, dense.dtype), format)
    made = mc.quantize(dense, format).to("jax")
    assert jax.tree.structure(like) == jax.tree.structure(made)
    for shape, array in zip(jax.tree.leaves(like), jax.tree.leaves(made), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


def test_there_is_no_such_weight() -> None:
    for shape, options, reason in (
        ((3, K, N), {}, r"a weight has \(K, N\)"),
        ((K, N), {"group_size": 3}, "group_size is 3"),
        ((K, N), {"scale_dtype": "float32"}, "scale_dtype is 'float32'"),
    ):
        with pytest.raises(ValueError, match=reason):
            abstract(jax.ShapeDtypeStruct(shape, jnp.float16), **options)
