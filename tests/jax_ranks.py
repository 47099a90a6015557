"""What each of two JAX processes checks: each holds its share of a weight, and their product is that of the whole.

python tests/jax_ranks.py 0 PORT & python tests/jax_ranks.py 1 PORT
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
from marlin_cupy.integrations.jax import partition_specs, shard

RANKS = 2
K, N, M = 512, 256, 5
P: Any = PartitionSpec


def main(rank: int, port: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", RANKS, rank, initialization_timeout=240)
    assert (jax.process_count(), jax.process_index(), len(jax.local_devices())) == (RANKS, rank, 1)
    mesh = Mesh(np.array(jax.devices()), ("model",))
    for name in ("int4", "nf4"):
        check_shares(mesh, rank, name)
    jax.distributed.shutdown()
    print("correct")


def check_shares(mesh: Mesh, rank: int, name: str) -> None:
    whole = mc.quantize(gaussian(K, N, seed=1), name, 64)
    x, dy = rows((M, K), seed=2, dtype="float16"), rows((M, N), seed=3, dtype="float16")

    def both(x: jax.Array, dy: jax.Array, w: mc.QuantizedTensor) -> tuple[jax.Array, jax.Array]:
        y, back = jax.vjp(lambda x: x @ w, x)
        return y, back(dy)[0]

    program = jax.jit(both, out_shardings=NamedSharding(mesh, P()))
    for axis, of_w in ((1, P(None, "model")), (0, P("model"))):
        for w in (of_shares(mesh, whole.shard(axis, rank, RANKS), whole, of_w), shard(whole, mesh, of_w)):
            assert len(w.packed.addressable_shards) == 1
            assert w.packed.addressable_shards[0].data.nbytes * RANKS == whole.nbytes
            y, dx = (np.asarray(each.addressable_data(0)) for each in program(of_all(mesh, x), of_all(mesh, dy), w))
            check(y, x, whole, case=f"{of_w}", shares=RANKS if axis == 0 else 1)
            check_gradient(dx, dy, whole, case=f"{of_w}", shares=RANKS if axis == 1 else 1)


def of_all(mesh: Mesh, x: np.ndarray) -> jax.Array:
    """The same on every rank."""
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, P()), lambda index: x[index])


def of_shares(mesh: Mesh, share: mc.QuantizedTensor, whole: mc.QuantizedTensor, of_w: Any) -> mc.QuantizedTensor:
    """From what a rank has, and nobody has the whole: as a program that loads its share of a file would."""
    part = share.to("jax")
    specs = partition_specs(whole.to("jax"), mesh, of_w)
    parts = [
        jax.make_array_from_process_local_data(NamedSharding(mesh, of_part), np.asarray(array))
        for array, of_part in zip(part.parts[:2], specs.parts[:2], strict=True)
    ]
    return mc.QuantizedTensor.of_parts(whole.spec, (*parts, None))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
