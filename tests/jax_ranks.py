"""What each of two JAX processes checks: each holds its share of a weight, and their product is that of the whole.

JAX_PLATFORMS=cpu python tests/jax_ranks.py 0 PORT & JAX_PLATFORMS=cpu python tests/jax_ranks.py 1 PORT
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import numpy as np
from cases import gaussian, rows
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_arrays import check, check_gradient

import marlin_cupy as mc
from marlin_cupy.integrations.jax import abstract, from_shares, shard

RANKS = 2
K, N, M = 512, 256, 5
P: Any = PartitionSpec


def main(rank: int, port: int) -> None:
    on_gpus = jax.config.jax_platforms.startswith("cuda")
    if not on_gpus:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    mine = [rank] if on_gpus else None
    jax.distributed.initialize(f"127.0.0.1:{port}", RANKS, rank, mine, initialization_timeout=240)
    assert (jax.process_count(), jax.process_index(), len(jax.local_devices())) == (RANKS, rank, 1)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    for name in ("int4", "nf4"):
        check_shares(mesh, rank, name, on_gpus)
    jax.distributed.shutdown()
    print("correct")


def check_shares(mesh: Mesh, rank: int, name: str, on_gpus: bool) -> None:
    dense = gaussian(K, N, seed=1)
    whole = mc.quantize(dense, name, 64, device="cpu")
    x, dy = rows((M, K), seed=2, dtype="float16"), rows((M, N), seed=3, dtype="float16")

    def both(x: jax.Array, dy: jax.Array, w: mc.QuantizedTensor) -> tuple[jax.Array, jax.Array]:
        y, back = jax.vjp(lambda x: x @ w, x)
        return y, back(dy)[0]

    program = jax.jit(both, out_shardings=NamedSharding(mesh, P()))
    for axis, of_w in ((1, P(None, "model")), (0, P("model"))):
        ways = of_shares(dense, whole, mesh, of_w), shard(whole, mesh, of_w)
        assert_same(*ways)
        np.testing.assert_array_equal(ways[0].packed.addressable_data(0), whole.shard(axis, rank, RANKS).packed)
        for w in ways:
            assert len(w.packed.addressable_shards) == 1
            assert w.packed.addressable_shards[0].data.nbytes * RANKS == whole.nbytes
            y, dx = (np.asarray(each.addressable_data(0)) for each in program(of_all(mesh, x), of_all(mesh, dy), w))
            if on_gpus:
                decoded = whole.dequantize("float32").astype(np.float64)
                check_nearly(y, x @ decoded)
                check_nearly(dx, dy @ decoded.T)
            else:
                check(y, x, whole, case=f"{of_w}", shares=RANKS if axis == 0 else 1)
                check_gradient(dx, dy, whole, case=f"{of_w}", shares=RANKS if axis == 1 else 1)


def check_nearly(found: np.ndarray, exact: np.ndarray) -> None:
    """Weights, parts and sums are rounded to float16; that kernels round as they should is for tests on one GPU."""
    assert np.linalg.norm(found.astype(np.float64) - exact) <= 3 * 2.0**-11 * np.linalg.norm(exact)


def of_all(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """The same on every rank."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])


def of_shares(dense: np.ndarray, whole: mc.QuantizedTensor, mesh: Mesh, of_w: Any) -> mc.QuantizedTensor:
    """Each rank quantizes what it has; the whole says only what the result is."""
    made = []

    def share(rows: slice, columns: slice) -> mc.QuantizedTensor:
        made.append((rows, columns))
        part = dense[rows, columns]
        return mc.quantize(part, whole.format, whole.group_size, scale_dtype=whole.scale_dtype, device="cpu")

    shape = jax.ShapeDtypeStruct(whole.shape, whole.scale_dtype)
    w = from_shares(shard(abstract(shape, whole.format, whole.group_size), mesh, of_w), share)
    assert len(made) == 1
    return w


def assert_same(w: mc.QuantizedTensor, expected: mc.QuantizedTensor) -> None:
    """On this rank."""
    assert w.whole == expected.whole
    for part, other in zip(w.parts.values(), expected.parts.values(), strict=True):
        assert part.sharding == other.sharding
        np.testing.assert_array_equal(part.addressable_data(0), other.addressable_data(0))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
