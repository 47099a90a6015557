"""matmul inside jax.jit on a GPU: the bits of an eager call, no Python in the steady state, all transformations."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import pytest
from cases import DTYPES, FORMATS, HALF, gaussian, quantized, rows
from gpu_arrays import activations, bits, to_host, to_jax, weights

import marlin_cupy as mc
from marlin_cupy.device import gpu
from marlin_cupy.scalars import by_name

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)


def handler_calls() -> int:
    """How often XLA has called Python so far."""
    from marlin_cupy.compilers.jax import launching

    found = launching._plan_of.cache_info()
    return found.hits + found.misses


def in_one_range(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@every_format
@every_dtype
@pytest.mark.parametrize(("K", "N"), [(1000, 300), (333, 65), (2048, 1024)])
def test_a_compiled_product_has_the_bits_of_an_eager_one(
    jax: ModuleType, name: str, dtype: str, K: int, N: int
) -> None:
    w = quantized(weights(K, N), name, 64, dtype)
    in_jax, bias = w.to("jax"), activations(1, N, dtype)[0]
    with_bias, without = jax.jit(mc.matmul), jax.jit(lambda x, w: x @ w)
    for M in (0, 1, 7, 33, 129, 1000):
        x = activations(M, K, dtype)
        y = with_bias(to_jax(jax, x), in_jax, to_jax(jax, bias))
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(bits(y), bits(mc.matmul(x, w, bias)), err_msg=f"M={M}")
        np.testing.assert_array_equal(bits(without(to_jax(jax, x), in_jax)), bits(mc.matmul(x, w)), err_msg=f"M={M}")


@every_dtype
def test_tiles_that_blocks_share(jax: ModuleType, dtype: str) -> None:
    """The exchange memory is XLA's; several products in one program, and programs again and again."""
    if gpu().arch == "sm_90a":
        shapes = ((8192, 1280, 96), (4096, 2048, 300), (1030, 3000, 40))
    else:
        shapes = ((8192, 513, 16), (8192, 65, 64), (14336, 512, 100))
    ws = [mc.quantize(weights(K, N), "int4", 64, scale_dtype=dtype) for K, N, _ in shapes]
    xs = [activations(M, K, dtype) for K, _, M in shapes]
    expected = [bits(mc.matmul(x, w)) for x, w in zip(xs, ws, strict=True)]
    program = jax.jit(lambda xs, ws: [x @ w for _ in range(4) for x, w in zip(xs, ws, strict=True)])
    operands = [to_jax(jax, x) for x in xs], [w.to("jax") for w in ws]
    for _ in range(20):
        for index, y in enumerate(program(*operands)):
            np.testing.assert_array_equal(bits(y), expected[index % 3])


def test_no_python_runs_in_the_steady_state(jax: ModuleType) -> None:
    w = mc.quantize(weights(1024, 1024)).to("jax")
    x = to_jax(jax, activations(4, 1024, "float16"))

    @jax.jit
    def program(x: Any, w: mc.QuantizedTensor) -> Any:
        for _ in range(8):
            x = (x @ w) * 0.03
        return x

    y = program(x, w)
    for _ in range(5):
        y = program(x, w).block_until_ready()
    before = handler_calls()
    for _ in range(50):
        y = program(x, w)
    y.block_until_ready()
    assert handler_calls() - before == 0


def test_batch_invariant(jax: ModuleType) -> None:
    if gpu().arch != "sm_90a":
        return
    w = mc.quantize(weights(2048, 1024))
    x = activations(300, 2048, "float16")
    multiply = jax.jit(lambda x, w: mc.matmul(x, w, batch_invariant=True))
    whole = bits(multiply(to_jax(jax, x), w.to("jax")))
    for M in (1, 7, 64):
        np.testing.assert_array_equal(bits(multiply(to_jax(jax, x[:M]), w.to("jax"))), whole[:M])


@every_dtype
def test_vmap_folds_into_rows(jax: ModuleType, dtype: str) -> None:
    w = mc.quantize(weights(1000, 300), "int4", 64)
    x = activations(24, 1000, dtype)
    y = jax.jit(jax.vmap(lambda x: x @ w.to("jax")))(to_jax(jax, x).reshape(4, 6, 1000))
    np.testing.assert_array_equal(bits(y).reshape(24, 300), bits(mc.matmul(x, w)))


@every_format
@every_dtype
def test_gradients_are_those_of_the_dense_product(jax: ModuleType, name: str, dtype: str) -> None:
    K, N, M = 1000, 300, 33
    w = quantized(weights(K, N), name, 64)
    x, dy = activations(M, K, dtype), activations(M, N, dtype)
    bias = activations(1, N, dtype)[0]

    @jax.jit
    def gradients(x: Any, bias: Any, w: mc.QuantizedTensor, dy: Any) -> Any:
        return jax.vjp(lambda x, bias: mc.matmul(x, w, bias), x, bias)[1](dy)

    dx, dbias = gradients(to_jax(jax, x), to_jax(jax, bias), w.to("jax"), to_jax(jax, dy))
    exact_dy = in_one_range(to_host(dy))
    exact = exact_dy @ in_one_range(w.to("cpu").dequantize("float32")).T
    # each weight and the result are rounded once
    bound = 2 * by_name(dtype).roundoff
    assert np.linalg.norm(in_one_range(dx) - exact) <= bound * np.linalg.norm(exact)
    exact_bias = exact_dy.sum(0)
    assert np.linalg.norm(in_one_range(dbias) - exact_bias) <= bound * np.linalg.norm(exact_bias)


def test_scan_over_slices_and_layers_in_place(jax: ModuleType) -> None:
    K, L = 1024, 6
    ws = [mc.quantize(gaussian(K, K, seed=seed), "int4", 128, device="cuda") for seed in range(L)]
    x = activations(5, K, "float16")
    expected = x
    for w in ws:
        expected = mc.matmul(expected, w) * cupy.float16(1 / 32)
    stack = _stack(jax, ws)

    @jax.jit
    def sliced(x: Any, stack: mc.QuantizedTensor) -> Any:
        return jax.lax.scan(lambda x, w: (x @ w * np.float16(1 / 32), None), x, stack)[0]

    @jax.jit
    def in_place(x: Any, stack: mc.QuantizedTensor) -> Any:
        layers = jax.numpy.arange(L)
        return jax.lax.scan(lambda x, layer: (x @ stack[layer] * np.float16(1 / 32), None), x, layers)[0]

    for program in (sliced, in_place):
        for _ in range(3):
            np.testing.assert_array_equal(bits(program(to_jax(jax, x), stack)), bits(expected))


def _stack(jax: ModuleType, ws: list[mc.QuantizedTensor]) -> mc.QuantizedTensor:
    return jax.tree.map(lambda *parts: jax.numpy.stack(parts), *[w.to("jax") for w in ws])


def test_checkpoint_and_donation(jax: ModuleType) -> None:
    w = mc.quantize(weights(1024, 1024)).to("jax")
    x = to_jax(jax, activations(8, 1024, "float16"))
    layer = jax.checkpoint(lambda x, w: x @ w * np.float16(0.03))
    loss = jax.jit(jax.grad(lambda x, w: layer(layer(x, w), w).astype("float32").sum()))
    plain = jax.jit(jax.grad(lambda x, w: ((x @ w * np.float16(0.03)) @ w * np.float16(0.03)).astype("float32").sum()))
    np.testing.assert_array_equal(bits(loss(x, w)), bits(plain(x, w)))
    expected = bits(jax.jit(lambda x, w: x @ w)(x, w))
    donated = jax.jit(lambda x, w: (x @ w, w), donate_argnums=1)
    w = jax.tree.map(jax.numpy.copy, w)  # into memory of JAX: it does not donate what was handed over
    for _ in range(4):
        y, w = donated(x, w)
        np.testing.assert_array_equal(bits(y), expected)


def test_weights_made_inside_the_program_just_before(jax: ModuleType) -> None:
    """No stale weight: the packed array is written by the kernel that runs right before the product."""
    w = mc.quantize(weights(2048, 2048)).to("jax")
    other = mc.quantize(gaussian(2048, 2048, seed=1), device="cuda").to("jax")
    x = to_jax(jax, activations(2, 2048, "float16"))

    @jax.jit
    def program(x: Any, w: mc.QuantizedTensor, other: mc.QuantizedTensor, which: Any) -> Any:
        chosen = jax.tree.map(lambda a, b: jax.numpy.where(which, a, b), w, other)
        return x @ chosen

    for _ in range(10):
        for which, each in ((True, w), (False, other)):
            np.testing.assert_array_equal(bits(program(x, w, other, which)), bits(jax.jit(mc.matmul)(x, each)))


def test_rows_of_every_kind(jax: ModuleType) -> None:
    """Leading axes, one row, a slice inside the program, a transposed x."""
    w = mc.quantize(weights(1000, 300), "int4", 64)
    host = rows((6, 1000), seed=3, dtype="bfloat16")
    x, native = jax.device_put(host), cupy.asarray(host.view(np.uint16)).view(ml_dtypes.bfloat16)
    run = jax.jit(lambda x, w: (x.reshape(2, 3, 1000) @ w, x[4] @ w, x[1:5] @ w, (x.T * 1).T @ w))
    axes, one, some, turned = run(x, w.to("jax"))
    assert axes.shape == (2, 3, 300)
    np.testing.assert_array_equal(bits(axes).reshape(6, 300), bits(mc.matmul(native, w)))
    np.testing.assert_array_equal(bits(one), bits(mc.matmul(native[4], w)))
    np.testing.assert_array_equal(bits(some), bits(mc.matmul(native[1:5], w)))
    np.testing.assert_array_equal(bits(turned), bits(mc.matmul(native, w)))
    assert DTYPES["bfloat16"] == one.dtype


@pytest.mark.parametrize("platforms", [("cuda",), ("cpu", "cuda")])
def test_an_exported_program_has_the_bits_of_the_plain_one(jax: ModuleType, platforms: tuple[str, ...]) -> None:
    from marlin_cupy.integrations.jax import export_checks

    w = mc.quantize(weights(1000, 300), "int4", 64).to("jax")
    x, bias = (to_jax(jax, each) for each in (activations(7, 1000, "float16"), activations(1, 300, "float16")[0]))
    export = jax.export.export(jax.jit(mc.matmul), platforms=platforms, disabled_checks=export_checks)
    program = jax.export.deserialize(export(x, w, bias).serialize())
    np.testing.assert_array_equal(bits(program.call(x, w, bias)), bits(jax.jit(mc.matmul)(x, w, bias)))
