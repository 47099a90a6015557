"""Products in JAX on two GPUs and more: by shares of the packed weight, in plain jit and in shard_map."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from cases import HALF, gaussian, rows
from product import Product
from ranks import run_ranks

import marlin_cupy as mc

pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus]

K, N, M = 2048, 1024, 24


def meshes(jax: ModuleType) -> list[Any]:
    count = len(jax.devices("gpu"))
    assert count > 1, "JAX sees one GPU"
    found = [jax.sharding.Mesh(np.asarray(jax.devices()[:each]), ("a",)) for each in (2, 4) if each <= count]
    if count >= 4:
        found.append(jax.sharding.Mesh(np.asarray(jax.devices()[:4]).reshape(2, 2), ("b", "a")))
    return found


def check(y: Any, x: np.ndarray, w: mc.QuantizedTensor, bias: np.ndarray | None, dtype: str, partial_sums: int) -> None:
    """Each device rounds its sum once before they are added up."""
    dense = w.to("cpu").dequantize("float32").astype(np.float64)
    exact = Product(x.astype(np.float64), dense, None if bias is None else bias.astype(np.float64))
    found = np.asarray(y).astype(np.float64)
    if partial_sums == 1:
        exact.check(found, dtype, gpu=True, kernel="sm90_wgmma")
    else:
        relative = np.linalg.norm(found - exact.exact) / np.linalg.norm(exact.exact)
        assert relative <= {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype] * 2


@pytest.mark.parametrize("dtype", HALF)
def test_plain_jit_computes_where_the_shares_are(jax: ModuleType, dtype: str) -> None:
    from marlin_cupy.integrations.jax import shard

    P, place = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    host = mc.quantize(gaussian(K, N, seed=1), "int4", 128, scale_dtype=dtype)
    x, bias = rows((M, K), seed=2, dtype=dtype), rows((N,), seed=3, dtype=dtype)
    multiply = jax.jit(mc.matmul)
    for mesh in meshes(jax):
        for cut, parts in ((P(None, "a"), 1), (P("a", None), 2)):
            w = shard(host.to("cuda"), mesh, cut)
            for of_x in (P(), P(None, "a"), P(mesh.axis_names[0], None)):
                placed = jax.device_put(x, place(mesh, of_x))
                y = multiply(placed, w, jax.device_put(bias, place(mesh, P())))
                check(y, x, host, bias, dtype, parts)
                text = multiply.lower(placed, w, jax.device_put(bias, place(mesh, P()))).compile().as_text()
                assert not re.search(r"u8\[[^\]]*\][^=]*= ?[^ ]*(all-gather|all-to-all)", text)
                assert "marlin_cupy_matmul" in text


@pytest.mark.parametrize("dtype", HALF)
def test_shard_map_column_and_row(jax: ModuleType, dtype: str) -> None:
    from marlin_cupy.integrations.jax import partition_specs, shard

    P = jax.sharding.PartitionSpec
    host = mc.quantize(gaussian(K, N, seed=1), "int4", 128, scale_dtype=dtype)
    x = rows((M, K), seed=2, dtype=dtype)
    for mesh in meshes(jax):
        for cut in (P(None, "a"), P("a", None)):
            row_parallel = cut[0] is not None

            def body(x: Any, w: mc.QuantizedTensor, add: bool = row_parallel) -> Any:
                y = x @ w
                return jax.lax.psum(y.astype("float32"), "a").astype(y.dtype) if add else y

            w = shard(host.to("cuda"), mesh, cut)
            specs = (P(None, cut[0]), partition_specs(w, mesh, cut))
            run = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=P(None, cut[1])))
            for _ in range(3):
                check(run(x, w), x, host, None, dtype, 2 if row_parallel else 1)


def test_gradients_by_shares(jax: ModuleType) -> None:
    from marlin_cupy.integrations.jax import shard

    P = jax.sharding.PartitionSpec
    host = mc.quantize(gaussian(K, N, seed=1), "int4", 128)
    x, dy = rows((M, K), seed=2, dtype="float16"), rows((M, N), seed=3, dtype="float16")
    exact = dy.astype(np.float64) @ host.dequantize("float32").astype(np.float64).T
    gradient = jax.jit(lambda x, w, dy: jax.vjp(lambda x: x @ w, x)[1](dy)[0])
    for mesh in meshes(jax):
        for cut in (P(None, "a"), P("a", None)):
            dx = np.asarray(gradient(x, shard(host.to("cuda"), mesh, cut), dy)).astype(np.float64)
            assert np.linalg.norm(dx - exact) <= 3 * 2.0**-11 * np.linalg.norm(exact)


def test_a_stack_of_shares(jax: ModuleType) -> None:
    from marlin_cupy.integrations.jax import shard, stack

    P = jax.sharding.PartitionSpec
    ws = [mc.quantize(gaussian(K, N, seed=seed), "int4", 128) for seed in range(3)]
    x = rows((M, K), seed=2, dtype="float16")
    run = jax.jit(lambda x, ws: jax.lax.map(lambda layer: x @ ws[layer], jax.numpy.arange(3)))
    for mesh in meshes(jax):
        y = run(x, shard(stack(ws), mesh, P(None, "a")))
        for layer, w in enumerate(ws):
            check(y[layer], x, w, None, "float16", 1)


def test_two_processes_with_a_gpu_each(jax: ModuleType, tmp_path: Path) -> None:
    run_ranks(tmp_path, "cuda")
