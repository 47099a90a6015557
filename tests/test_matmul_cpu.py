"""y = x @ W + bias with the weight in host memory: the NumPy reference, for NumPy, JAX and DLPack arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, FORMATS, HALF, ROWS, SHAPES, gaussian, rows, ways
from only_dlpack import OnlyDlpack
from product import Product

import marlin_cupy as mc
from marlin_cupy.numerics import Rounding

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)


def jax_on_cpu(array: np.ndarray) -> jax.Array:
    return jax.device_put(array, jax.local_devices(backend="cpu")[0])


def float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


@every_format
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_that_of_the_dequantized_weight(name: str, dtype: str, shape: tuple[int, int]) -> None:
    K, N = shape
    for _, group_size, scale_dtype in (way for way in ways(-1, 16, 48, 128) if way[0] == name):
        w = mc.quantize(gaussian(K, N, seed=K), name, group_size, scale_dtype=scale_dtype)
        x = rows((max(ROWS), K), seed=N, dtype=dtype)
        product = Product(float64(x), float64(w.dequantize("float32")))
        for M in ROWS:
            y = mc.matmul(x[:M], w)
            assert isinstance(y, np.ndarray)
            assert y.dtype == DTYPES[dtype]
            assert y.shape == (M, N)
            product.check(float64(y), Rounding(dtype), f"{name}, M={M}, group_size={group_size}")


@every_dtype
@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4), (0,), (3, 0), (0, 5)], ids=str)
def test_leading_axes_are_kept(dtype: str, leading: tuple[int, ...]) -> None:
    w = mc.quantize(gaussian(100, 63, seed=1))
    bias = rows((63,), seed=2, dtype=dtype)
    x = rows((*leading, 100), seed=3, dtype=dtype)
    y = mc.matmul(x, w, bias)
    assert y.shape == (*leading, 63)
    assert y.dtype == DTYPES[dtype]
    flat = mc.matmul(x.reshape(-1, 100) if x.size else x.reshape(0, 100), w, bias)
    # A BLAS may add in another order for another number of rows: equal up to one rounding.
    np.testing.assert_allclose(float64(y).reshape(flat.shape), float64(flat), rtol=1e-2, atol=1e-2)
    out = np.full((*leading, 63), np.nan, DTYPES[dtype])
    assert mc.matmul(x, w, bias, out=out) is out
    np.testing.assert_array_equal(out, y)


@every_format
@every_dtype
def test_the_bias_is_added_before_the_rounding(name: str, dtype: str) -> None:
    K, N = 333, 65
    w = mc.quantize(gaussian(K, N, seed=4), name, FORMATS[name].group(64))
    x, bias = rows((33, K), seed=5, dtype=dtype), rows((N,), seed=6, dtype=dtype) * 100
    bias = bias.astype(DTYPES[dtype])
    product = Product(float64(x), float64(w.dequantize("float32")), float64(bias))
    product.check(float64(mc.matmul(x, w, bias)), Rounding(dtype), name)


@every_dtype
def test_out_is_written_in_place(dtype: str) -> None:
    w = mc.quantize(gaussian(100, 63, seed=7))
    x = rows((5, 100), seed=8, dtype=dtype)
    expected = mc.matmul(x, w)
    wide = np.full((5, 70), np.nan, DTYPES[dtype])
    for out in (np.full((5, 63), np.nan, DTYPES[dtype]), wide[:, 3:66], np.full((63, 5), np.nan, DTYPES[dtype]).T):
        assert mc.matmul(x, w, out=out) is out
        np.testing.assert_array_equal(out, expected)
    assert np.isnan(wide[:, :3]).all()
    assert np.isnan(wide[:, 66:]).all()


@every_dtype
def test_x_has_any_strides_on_the_cpu(dtype: str) -> None:
    w = mc.quantize(gaussian(101, 63, seed=9))
    wide = rows((14, 300), seed=10, dtype=dtype)
    for x in (wide[::2, 1:102], wide[:, 1:102], np.asfortranarray(wide[:, :101]), wide[::-1, 202:0:-2]):
        np.testing.assert_array_equal(mc.matmul(x, w), mc.matmul(np.ascontiguousarray(x), w))


@every_dtype
def test_the_operator_is_matmul(dtype: str) -> None:
    w = mc.quantize(gaussian(100, 63, seed=11))
    x = rows((2, 5, 100), seed=12, dtype=dtype)
    y = x @ w
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, mc.matmul(x, w))
    in_jax = jax_on_cpu(x) @ w
    assert isinstance(in_jax, jax.Array)
    np.testing.assert_array_equal(np.asarray(in_jax), y)


@pytest.mark.parametrize("wrong", [lambda w: w @ np.zeros((63, 5), np.float16), lambda w: w * 2, lambda w: w @ w])
def test_other_operators_are_refused(wrong: Any) -> None:
    w = mc.quantize(gaussian(63, 63, seed=13))
    with pytest.raises(TypeError):
        wrong(w)


@every_format
@every_dtype
def test_jax_arrays_give_jax_arrays(name: str, dtype: str) -> None:
    w = mc.quantize(gaussian(100, 63, seed=14), name)
    x, bias = rows((5, 100), seed=15, dtype=dtype), rows((63,), seed=16, dtype=dtype)
    y = mc.matmul(jax_on_cpu(x), w, jax_on_cpu(bias))
    assert isinstance(y, jax.Array)
    assert y.dtype == DTYPES[dtype]
    assert {device.platform for device in y.devices()} == {"cpu"}
    np.testing.assert_array_equal(np.asarray(y), mc.matmul(x, w, bias))


def test_any_object_with_dlpack_is_an_array() -> None:
    w = mc.quantize(gaussian(100, 63, seed=19))
    x, bias = rows((5, 100), seed=20, dtype="float16"), rows((63,), seed=21, dtype="float16")
    expected = mc.matmul(x, w, bias)
    y = mc.matmul(OnlyDlpack(x), w, OnlyDlpack(bias))
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, expected)
    memory = np.full((5, 63), np.nan, np.float16)
    out = OnlyDlpack(memory)
    assert mc.matmul(OnlyDlpack(x), w, OnlyDlpack(bias), out=out) is out
    np.testing.assert_array_equal(memory, expected)


@every_dtype
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy's own product, the expectation
def test_infinities_and_nan_travel_as_in_numpy(dtype: str) -> None:
    weight = gaussian(100, 65, seed=22)
    weight[7, :9] = 0
    w = mc.quantize(weight)
    x = rows((6, 100), seed=23, dtype=dtype)
    x[0, 3], x[1, 7], x[2, 99], x[3, 5:7] = np.inf, -np.inf, np.nan, (np.inf, -np.inf)
    y = mc.matmul(x, w).astype(np.float32)
    expected = x.astype(np.float32) @ w.dequantize("float32")
    assert np.isinf(y[0]).any()
    assert np.isnan(y[1]).any()
    assert np.isnan(y[2]).all()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(y[np.isinf(expected)], expected[np.isinf(expected)])
    np.testing.assert_array_equal(y[4:], mc.matmul(x[4:], w).astype(np.float32))


def test_sums_beyond_fp16_become_infinite_without_a_warning() -> None:
    w = mc.quantize(np.full((128, 64), 100, np.float16))
    x = np.full((1, 128), 60000, np.float16)
    assert (mc.matmul(x, w) == np.inf).all()
    assert (mc.matmul(-x, w) == -np.inf).all()


@every_dtype
def test_the_tolerance_notices_one_wrong_weight(dtype: str) -> None:
    """What every comparison of these suites relies on: a code off by one, a NaN, a lost row do not pass."""
    K, N = 4096, 65
    w = mc.quantize(gaussian(K, N, seed=26))
    x = rows((16, K), seed=27, dtype=dtype)
    product = Product(float64(x), float64(w.dequantize("float32")))
    good = mc.matmul(x, w)
    product.check(float64(good), Rounding(dtype))
    codes, scales, _ = w.unpack()
    codes[1234, 56] ^= 1
    no_number, lost = good.copy(), good.copy()
    no_number[3, 4], lost[5] = np.nan, 0
    for bad in (mc.matmul(x, mc.pack(codes, scales, group_size=128)), no_number, lost, good[::-1]):
        with pytest.raises(AssertionError, match="outputs are wrong"):
            product.check(float64(bad), Rounding(dtype))


# ---- explain


@pytest.mark.parametrize(
    "dtype",
    ["float16", "bfloat16", np.float16, np.dtype("float16"), DTYPES["bfloat16"], jnp.float16, jnp.bfloat16],
    ids=str,
)
def test_explain_names_the_kernel_and_why_no_other(dtype: Any) -> None:
    w = mc.quantize(gaussian(100, 63, seed=24))
    found = mc.explain((7, 100), dtype, w)
    assert found.kernel == "reference"
    assert "NumPy" in found.config
    assert "host memory" in found.passed_over["sm80_gemm"]
    assert found.kernel not in found.passed_over
    lines = str(found).splitlines()
    assert lines[0].startswith("reference: ")
    assert any(line.startswith("not sm80_gemm: ") and "host memory" in line for line in lines)


def test_explain_refuses_what_matmul_refuses() -> None:
    w = mc.quantize(gaussian(100, 63, seed=25))
    with pytest.raises(mc.UnsupportedError) as caught:
        mc.explain((7, 100), "float64", w)
    for kernel in ("sm80_gemm", "reference"):
        assert kernel in str(caught.value)
    assert "float64" in str(caught.value)
