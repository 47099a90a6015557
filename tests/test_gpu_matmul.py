"""y = x @ W + bias on a GPU with CuPy arrays: right to the last rounding for every format, dtype, shape and stride."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import cupy
import numpy as np
import pytest
from cases import (
    DTYPES,
    FORMATS,
    GPU_ROWS,
    GPU_SHAPES,
    HALF,
    ROWS,
    SHAPES,
    gaussian,
    gpu_groups,
    product_of,
    quantized,
    rows,
)
from gpu_arrays import (
    activations,
    assert_same_bits,
    cut_and_whole,
    differences,
    float64,
    is_poison,
    kernel_of,
    poison_pool,
    poisoned,
    poisoned_with_guard,
    rounding_of,
    to_gpu,
    to_host,
    weights,
)
from product import Product

import marlin_cupy as mc
from marlin_cupy import formats, kernels
from marlin_cupy.api import problem_of
from marlin_cupy.device import gpu
from marlin_cupy.jit.compile import cubin
from marlin_cupy.spec import Spec

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Fill the cache with what this file needs most, on all cores: NVRTC works on one kernel at a time per process."""
    problems = [
        product_of(M, dtype, Spec(format, shape, group_size, scale_dtype), gpu())
        for format in FORMATS
        for group_size, scale_dtype in gpu_groups(format)
        for dtype in HALF
        for shape in GPU_SHAPES
        for M in GPU_ROWS[1:]
    ]
    sources = {kernels.GEMM.source(problem, kernels.GEMM.choose(problem)) for problem in problems}
    needed = {(*source, gpu().arch) for source in sources if source is not None}
    workers = min(len(os.sched_getaffinity(0)), 32)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for built in pool.map(cubin, *zip(*sorted(needed), strict=True), chunksize=4):
            assert built[:4] == b"\x7fELF"


@every_format
@every_dtype
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_the_product_is_that_of_the_dequantized_weight(name: str, dtype: str, shape: tuple[int, int]) -> None:
    K, N = shape
    x = activations(max(GPU_ROWS), K, dtype)
    for group_size, scale_dtype in gpu_groups(name):
        w = mc.quantize(weights(K, N), name, group_size, scale_dtype=scale_dtype)
        product = Product(float64(x), float64(w.dequantize("float32")))
        for M in GPU_ROWS:
            case = f"M={M}, group_size={group_size}, scales {scale_dtype}"
            out, guard = poisoned_with_guard(M, N, dtype)
            poison_pool()
            assert mc.matmul(x[:M], w, out=out) is out
            product.check(float64(out), rounding_of(M, dtype, w), case)
            assert is_poison(guard), case


@every_format
@every_dtype
def test_small_and_odd_shapes(name: str, dtype: str) -> None:
    for K, N in SHAPES:
        w = quantized(weights(K, N), name, 48, "float16")
        x = activations(max(ROWS), K, dtype)
        product = Product(float64(x), float64(w.dequantize("float32")))
        for M in ROWS:
            out, guard = poisoned_with_guard(M, N, dtype)
            mc.matmul(x[:M], w, out=out)
            product.check(float64(out), rounding_of(M, dtype, w), f"M={M}, K={K}, N={N}")
            assert is_poison(guard), f"M={M}, K={K}, N={N}"


@every_format
@every_dtype
@pytest.mark.parametrize("M", [1, 16, 33, 100])
def test_the_bias_is_added_once_before_the_rounding(name: str, dtype: str, M: int) -> None:
    for w in cut_and_whole(dtype, M, name):
        K, N = w.shape
        x = activations(M, K, dtype)
        bias = to_gpu((rows((N,), seed=1, dtype="float32") * 1000).astype(DTYPES[dtype]))
        out, guard = poisoned_with_guard(M, N, dtype)
        mc.matmul(x, w, bias, out)
        product = Product(float64(x), float64(w.dequantize("float32")), float64(bias))
        product.check(float64(out), rounding_of(M, dtype, w), f"K={K}, N={N}")
        assert is_poison(guard)


@every_dtype
def test_shared_tiles_come_out_right(dtype: str) -> None:
    """At every M, including tiles that stripes cut in the middle of a row of tiles."""
    for M in (1, 5, 8, 9, 16, 24, 33, 64, 65, 129):
        for w in cut_and_whole(dtype, M):
            x = activations(M, w.shape[0], dtype)
            poison_pool()
            out, guard = poisoned_with_guard(M, w.shape[1], dtype)
            mc.matmul(x, w, out=out)
            product = Product(float64(x), float64(w.dequantize("float32")))
            product.check(float64(out), rounding_of(M, dtype, w), f"M={M}, {w!r}")
            assert is_poison(guard)


@every_dtype
def test_large_m(dtype: str) -> None:
    """More rows than a wave of tiles, and more tiles than there are counters."""
    for M, K, N in ((4097, 1024, 1024), (16500, 256, 2112)):
        w = mc.quantize(weights(K, N), "int4", 128)
        x = activations(M, K, dtype)
        out, guard = poisoned_with_guard(M, N, dtype)
        mc.matmul(x, w, out=out)
        product = Product(float64(x), float64(w.dequantize("float32")))
        product.check(float64(out), rounding_of(M, dtype, w), f"M={M}")
        assert is_poison(guard)


# ---- strides


@every_dtype
@pytest.mark.parametrize("K", [999, 1000])
def test_x_may_have_any_strides_between_rows_and_start_anywhere(dtype: str, K: int) -> None:
    N = 300
    w = mc.quantize(weights(K, N), "int4", 64)
    wide = activations(80, 2 * K + 9, dtype)
    for M in (1, 7, 33):
        views = {
            "rows far apart": wide[:M, :K],
            "odd start": wide[:M, 1 : K + 1],
            "even start": wide[:M, 2 : K + 2],
            "aligned start": wide[:M, 8 : K + 8],
            "every second row": wide[: 2 * M : 2, 3 : K + 3],
            "backwards": wide[:M, :K][::-1],
            "one row for all": cupy.broadcast_to(wide[0, 5 : K + 5], (M, K)),
        }
        for case, x in views.items():
            out, guard = poisoned_with_guard(M, N, dtype)
            mc.matmul(x, w, out=out)
            copy = cupy.ascontiguousarray(x)
            if kernel_of(M, dtype, w) != "sm80_gemm":  # which those for Hopper leave views to that they cannot copy
                product = Product(float64(copy), float64(w.dequantize("float32")))
                product.check(float64(out), rounding_of(M, dtype, w), f"M={M}, {case}")
            else:
                assert_same_bits(out, mc.matmul(copy, w), f"M={M}, {case}")
            assert is_poison(guard), case


@every_dtype
def test_leading_axes_are_kept(dtype: str) -> None:
    K, N = 333, 65
    w = mc.quantize(weights(K, N), "int4", 64)
    bias = activations(1, N, dtype)[0]
    flat = activations(24, K, dtype)
    expected = mc.matmul(flat, w, bias)
    for leading in ((24,), (2, 12), (2, 3, 4), (1, 24, 1)):
        assert_same_bits(mc.matmul(flat.reshape(*leading, K), w, bias), expected.reshape(*leading, N), str(leading))
    assert_same_bits(mc.matmul(flat[3], w, bias), mc.matmul(flat[3:4], w, bias)[0])
    for empty in ((0,), (3, 0), (0, 5)):
        y = mc.matmul(cupy.empty((*empty, K), DTYPES[dtype]), w, bias)
        assert y.shape == (*empty, N)
        assert y.dtype == DTYPES[dtype]
    every_second = activations(24, K, dtype).reshape(2, 12, K)[:, ::2]  # cannot be seen as a matrix: copied
    assert_same_bits(mc.matmul(every_second, w), mc.matmul(cupy.ascontiguousarray(every_second), w))


@every_dtype
@pytest.mark.parametrize("M", [1, 7, 33, 100])
def test_rows_of_out_may_lie_apart(dtype: str, M: int) -> None:
    for w in cut_and_whole(dtype, M):
        K, N = w.shape
        x = activations(M, K, dtype)
        expected = mc.matmul(x, w)
        for start, pitch in ((0, N + 8), (4, N + 8), (3, N + 7), (1, N + 1)):
            memory = poisoned((M, pitch), dtype)
            out = memory[:, start : start + N]
            assert mc.matmul(x, w, out=out) is out
            assert_same_bits(out, expected, f"start={start}, pitch={pitch}")
            assert is_poison(memory[:, :start])
            assert is_poison(memory[:, start + N :])
        memory = poisoned((2 * M, N), dtype)
        mc.matmul(x, w, out=memory[::2])
        assert_same_bits(memory[::2], expected)
        assert is_poison(memory[1::2])


def test_the_operator_is_matmul() -> None:
    w = mc.quantize(weights(333, 65))
    x = activations(5, 333, "float16")
    y = x @ w
    assert isinstance(y, cupy.ndarray)
    assert_same_bits(y, mc.matmul(x, w))


# ---- values


@every_dtype
def test_a_row_depends_on_no_other_row(dtype: str) -> None:
    """NaN and infinity stay in their row, and a row's bits do not depend on what the others hold."""
    K, N, M = 4096, 513, 33
    w = mc.quantize(weights(K, N), "int4", 128)
    x = activations(M, K, dtype)
    expected = mc.matmul(x, w)
    bad = rows((M, K), seed=K, dtype=dtype)
    bad[5] = np.nan
    bad[17, 99] = np.inf
    y = mc.matmul(to_gpu(bad), w)
    good = [row for row in range(M) if row not in (5, 17)]
    assert_same_bits(y[good], expected[good])
    assert bool(cupy.isnan(float64(y[5])).all())
    assert not bool(cupy.isfinite(float64(y[17])).all())


@every_format
@every_dtype
@pytest.mark.parametrize(("M", "K"), [(6, 100), (20, 104)])
def test_infinities_and_nan_travel_as_in_numpy(name: str, dtype: str, M: int, K: int) -> None:
    weight = gaussian(K, 65, seed=2)
    weight[7, :9] = 0
    w = quantized(to_gpu(weight), name, formats.get(name).default_group_size, dtype)
    x = rows((M, K), seed=3, dtype=dtype)
    x[0, 3], x[1, 7], x[2, 99], x[3, 5:7] = np.inf, -np.inf, np.nan, (np.inf, -np.inf)
    y = to_host(mc.matmul(to_gpu(x), w)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float32) @ w.dequantize("float32").get()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(y[np.isinf(expected)], expected[np.isinf(expected)])


def test_sums_beyond_fp16_become_infinite() -> None:
    w = mc.quantize(cupy.full((128, 64), 100, cupy.float16))
    x = cupy.full((3, 128), 60000, cupy.float16)
    assert bool((mc.matmul(x, w) == cupy.inf).all())
    assert bool((mc.matmul(-x, w) == -cupy.inf).all())


@every_dtype
@pytest.mark.parametrize("M", [1, 16, 64, 100])
def test_results_repeat_bit_for_bit(dtype: str, M: int) -> None:
    for w in cut_and_whole(dtype, M):
        x = activations(M, w.shape[0], dtype)
        first = mc.matmul(x, w)
        wrong = cupy.zeros((), cupy.int64)
        for _ in range(200):
            wrong += differences(mc.matmul(x, w), first)
        assert int(wrong) == 0, repr(w)


# ---- explain


def test_explain_names_the_kernel_and_its_configuration() -> None:
    w = mc.quantize(weights(4160, 513))
    found = mc.explain((64, 4160), "bfloat16", w)
    assert found.kernel == "sm80_gemm"
    assert "tile" in found.config
    assert gpu().arch != "sm_90a" or "would round float16 scales too much" in found.passed_over["sm90_wgmma"]
    assert "host memory" in found.passed_over["reference"]
    assert "up to 16 rows, not 64" in found.passed_over["sm90_stream"]
    mc.matmul(activations(64, 4160, "bfloat16"), w)
    assert str(kernels.GEMM.ready(problem_of(w, 64, "bfloat16"))) == found.config
