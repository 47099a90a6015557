"""The bounds hold for products that are rounded as they say, and do not for one rounding more."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from cases import DTYPES, FORMATS, GPUS, HALF, gaussian, product_of, rows, ways

import marlin_cupy as mc
from marlin_cupy import formats, kernels, numerics, tuning
from marlin_cupy.kernels import Dense
from marlin_cupy.numerics import Rounding
from marlin_cupy.scalars import by_name
from marlin_cupy.spec import Spec

H200 = dataclasses.replace(GPUS["sm_90a"], name="NVIDIA H200", memory_gbs=4916.0)
K, N, M = 1024, 192, 16


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    return by_name(dtype).round(values.astype(np.float32)).astype(np.float64)


def cut_product(x: np.ndarray, weights: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Products and sums cut off at multiples of ``step``, 16 terms at a time as tensor cores take them."""
    y = np.zeros((x.shape[0], weights.shape[1]))
    for k in range(x.shape[1]):
        y = np.trunc((y + x[:, k, None] * weights[k]) / step) * step
    return y


@pytest.mark.parametrize("dtype", HALF)
def test_bounds_hold_for_what_is_stated_and_notice_what_is_not(dtype: str) -> None:
    x = rows((M, K), seed=0, dtype=dtype).astype(np.float64)
    w = gaussian(K, N, seed=1).astype(np.float64) / 32
    product = numerics.Product.of(x, w, np.ones(N))
    none, once, twice = Rounding(dtype), Rounding(dtype, weights=1), Rounding(dtype, table=True, weights=1)
    results = {
        none: x @ w + 1,
        once: x @ rounded(w, dtype) + 1,
        twice: x @ rounded(rounded(w, dtype) * 1.1, dtype) / 1.1 + 1,
    }
    for stated, exact in results.items():
        error = rounded(exact, dtype) - product.exact
        assert (abs(error) <= product.bound(stated)).all()
        assert numerics.norm(error) <= product.relative_bound(stated) * numerics.norm(product.exact)
    for stated in (none, once):
        assert product.relative_bound(stated) < product.relative_bound(twice)
        assert (product.bound(stated) < product.bound(twice)).all()
    wrong = rounded(x @ w + 1, dtype)
    wrong[3, 5] *= 1 + 4 * by_name(dtype).roundoff
    wrong[7, 2] = np.nan
    beyond = ~(abs(wrong - product.exact) <= product.bound(none))
    assert beyond[3, 5]
    assert beyond[7, 2]
    assert beyond.sum() == 2
    first = product.rows(3)
    assert (first.bound(once) == product.bound(once)[:3]).all()
    assert first.K == K


def test_bounds_hold_for_subnormal_codes() -> None:
    """Whose products tensor cores cut off: the bound of them is not much more than that, either."""
    x = rows((M, K), seed=0, dtype="float16").astype(np.float64)
    codes = np.random.default_rng(1).integers(-7, 8, (K, N)).astype(np.float64)
    product = numerics.Product.of(x, codes)
    y = cut_product(x, codes, 2.0**-14 * abs(x).max(1)[:, None])
    stated = Rounding("float16", cut=numerics.subnormal_cut(4))
    cuts = product.bound(stated) - product.bound(Rounding("float16"))
    assert (abs(y - product.exact) <= cuts + 2.0**-14 * K * abs(x).max(1)[:, None]).all()
    assert numerics.subnormal_cut(4) == 2.0**-14 / 7
    assert numerics.subnormal_cut(3) == 2.0**-14 / 3
    assert numerics.subnormal_cut(2) == 2.0**-14


def test_the_bound_of_normal_values_is_that_of_arrays() -> None:
    for dtype, table in itertools.product(HALF, (False, True)):
        x = rows((M, 4096), seed=0, dtype=dtype).astype(np.float64)
        w = np.random.default_rng(2).standard_normal((4096, N)) / 64
        stated = Rounding(dtype, table=table, cut=numerics.subnormal_cut(4))
        right = numerics.Product.of(x, w).relative_bound(stated)
        assert numerics.normal_bound(stated, 4096) == pytest.approx(right, rel=0.1)
        assert right < numerics.unstated_bound(dtype)


# ---- what kernels state


@pytest.mark.parametrize(("format", "group_size", "scale_dtype"), ways(128, -1))
@pytest.mark.parametrize("dtype", HALF)
def test_kernels_state_what_they_round(format: str, group_size: int, scale_dtype: str, dtype: str) -> None:
    table = formats.get(format).table is not None
    cut = CUTS.get(format, 0.0) if dtype == "float16" else 0.0
    scales, allowed = roundings_of_scaling(scale_dtype, dtype, group_size in FORMATS[format].output_scales)
    w = Spec(format, (4096, 4096), group_size, scale_dtype)
    for rows_of_x in (1, 16, 32, 33, 64, 4096):
        problem = product_of(rows_of_x, dtype, w, H200)
        stated = {each.name: each.rounding(problem) for each in kernels.GEMM.kernels if each.refuses(problem) is None}
        portable = Rounding(dtype, table, scales if rows_of_x > 32 and allowed else 0)
        expected = {"sm80_gemm": portable}
        if allowed:
            expected["sm90_wgmma"] = Rounding(dtype, table, scales)
        if rows_of_x <= 16:
            expected["sm90_stream"] = Rounding(dtype, table, cut=cut)
        assert stated == expected
        for each in kernels.GEMM.candidates(problem):
            assert kernels.GEMM.rounding(problem, each) == stated[each.kernel]
        assert tuning.tolerance(problem) == numerics.apart(Rounding(dtype, table, scales if allowed else 0), 4096)
    on_host = product_of(16, dtype, w, None)
    assert kernels.GEMM.rounding(on_host, kernels.GEMM.choose(on_host)) == Rounding(dtype)
    dense = Dense(w, dtype, H200)
    assert kernels.DEQUANTIZE.rounding(dense, kernels.DEQUANTIZE.choose(dense)) == Rounding(dtype, table)


#: Of the largest weight of an output, by the codes that it has at least.
CUTS = {"int4": 2.0**-14 / 7, "uint4": 2.0**-14 / 7, "int3": 2.0**-14 / 3, "int2": 2.0**-14}


def roundings_of_scaling(scale_dtype: str, dtype: str, of_outputs: bool) -> tuple[int, bool]:
    """How often a weight is rounded that is multiplied by its scale in ``dtype``, and whether it may be."""
    if of_outputs:
        return 0, True
    return {
        ("float8_e8m0fnu", "float16"): (0, True),
        ("float8_e8m0fnu", "bfloat16"): (0, True),
        ("float16", "float16"): (1, True),
        ("float16", "bfloat16"): (2, False),
        ("bfloat16", "float16"): (1, True),
        ("bfloat16", "bfloat16"): (1, True),
        ("float32", "float16"): (2, True),
        ("float32", "bfloat16"): (2, False),
    }[scale_dtype, dtype]


def test_right_results_are_no_further_apart_than_that() -> None:
    w = mc.quantize(gaussian(K, N, seed=3), "nf4", 64)
    x = rows((M, K), seed=4, dtype="float16")
    dense = w.dequantize("float32").astype(np.float64)
    one = mc.matmul(x, w).astype(np.float64)
    other = (x.astype(np.float64) @ rounded(rounded(dense, "float16") * 1.3, "float16") / 1.3).astype(DTYPES["float16"])
    distance = abs(one - other).max() / abs(one).max()
    assert 0 < distance < numerics.apart(Rounding("float16", table=True, weights=1), K)
