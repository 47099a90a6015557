"""On two GPUs and more: products in JAX by shares of the packed weight, and what is on a GPU that is not current."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import cupy
import numpy as np
import pytest
from cases import FORMATS, HALF, gaussian, quantized, rows
from gpu_arrays import bits, to_gpu, to_jax
from product import Product
from ranks import run_ranks

import marlin_cupy as mc
from marlin_cupy.numerics import Rounding

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
        exact.check(found, Rounding(dtype, weights=True))
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
    run_ranks(tmp_path, "cuda,cpu")


# ---- the second GPU is current, where JAX may have left it, and all is on the first. CuPy warns of kernels that read
# from another GPU than the current one, and warnings are errors.


def assert_on_first(w: mc.QuantizedTensor) -> None:
    assert w.device.index == 0
    assert {cupy.from_dlpack(part).device.id for part in w.parts.values()} == {0}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("held", ["cupy", "jax"])
def test_weights_are_made_where_they_are(jax: ModuleType, name: str, held: str, tmp_path: Path) -> None:
    dense, other = gaussian(512, 320, seed=1, dtype="float16"), gaussian(512, 320, seed=2, dtype="float16")
    expected = quantized(dense, name, 64)
    with cupy.cuda.Device(0):
        weight = to_gpu(dense) if held == "cupy" else to_jax(jax, to_gpu(dense))
        new = to_gpu(other) if held == "cupy" else to_jax(jax, to_gpu(other))
    with cupy.cuda.Device(1):
        w = quantized(weight, name, 64)
        w.save(tmp_path / "w")
        for made in (
            w,
            w.to("jax"),
            w.to("jax").to("cupy"),
            mc.pack(*w.unpack(), format=name, group_size=w.group_size),
        ):
            cupy.cuda.Device(1).use()  # JAX may have changed that
            assert_on_first(made)
            np.testing.assert_array_equal(made.to("numpy").packed, expected.packed)
            np.testing.assert_array_equal(np.asarray(made.to("cpu").packed), expected.packed)
            np.testing.assert_array_equal(bits(made.dequantize()), expected.dequantize().view(np.uint16))
            for part, of_host in (
                (made.columns(64, 192), expected.columns(64, 192)),
                (made.rows(128, 512), expected.rows(128, 512)),
            ):
                assert_on_first(part)
                np.testing.assert_array_equal(part.to("numpy").packed, of_host.packed)
        moved = w.to("cuda:1")
        assert {moved.device.index, moved.packed.device.id, moved.output_scales.device.id} == {1}
        np.testing.assert_array_equal(moved.to("numpy").packed, expected.packed)
        np.testing.assert_array_equal(mc.load(tmp_path / "w", "cuda:0").to("numpy").packed, expected.packed)
        w.update_(new)
        w.mark_written()
        np.testing.assert_array_equal(w.to("numpy").packed, quantized(other, name, 64).packed)
        factors = quantized(other, name, 64).to("cuda:0").output_scales
        np.testing.assert_array_equal(w.output_scales.get(), factors.get())


@pytest.mark.parametrize("dtype", HALF)
def test_products_are_computed_where_the_weight_is(jax: ModuleType, dtype: str) -> None:
    dense, bias = gaussian(512, 320, seed=1), rows((320,), seed=3, dtype=dtype)
    x = rows((2, 12, 512), seed=2, dtype=dtype)
    half = np.ascontiguousarray(x[:, :6])
    with cupy.cuda.Device(0):
        w, its_bias = mc.quantize(to_gpu(dense), "int4", 64), to_gpu(bias)
        on_gpu = [to_gpu(x), to_gpu(x)[:, :6]]  # the second has no view of shape (M, K)
        expected = [bits(mc.matmul(each, w, its_bias)) for each in on_gpu]
        in_jax, jax_bias = to_jax(jax, on_gpu[0]), to_jax(jax, its_bias)
    with cupy.cuda.Device(1):
        for each, y in zip(on_gpu, expected, strict=True):
            found = mc.matmul(each, w, its_bias)
            assert found.device.id == 0
            np.testing.assert_array_equal(bits(found), y)
        for each, y in zip((x, half), expected, strict=True):
            np.testing.assert_array_equal(mc.matmul(each, w, bias).view(np.uint16), y)
        for its in (w, w.to("jax")):
            np.testing.assert_array_equal(bits(mc.matmul(in_jax, its, jax_bias)), expected[0])
    with cupy.cuda.Device(1):
        there, its_bias = to_gpu(x), to_gpu(bias)
    with cupy.cuda.Device(0):
        moved = w.to("cuda:1")
        assert {moved.packed.device.id, moved.output_scales.device.id} == {1}
        np.testing.assert_array_equal(bits(mc.matmul(there, moved, its_bias)), expected[0])
