"""The kernel with wgmma on a GPU: every configuration and grid right, the same bits again and again, and for any M."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import cupy
import numpy as np
import pytest
from cases import DTYPES, FORMATS, HALF, fresh_gemm, rows
from cases import quantized as quantized_like
from gpu_arrays import (
    activations,
    assert_same_bits,
    differences,
    float64,
    is_poison,
    kernel_of,
    poison_pool,
    poisoned,
    poisoned_with_guard,
    rounding_of,
    to_gpu,
    weights,
)
from product import Product

import marlin_cupy as mc
from marlin_cupy import formats, frameworks, kernels
from marlin_cupy.api import problem_of
from marlin_cupy.device import gpu
from marlin_cupy.jit import compile as nvrtc
from marlin_cupy.kernels import sm90_wgmma
from marlin_cupy.kernels.sm90_wgmma import KERNEL, Tiling
from marlin_cupy.spec import Spec

pytestmark = [pytest.mark.gpu, pytest.mark.hopper]

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)

EVERY_M = (1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 49, 64, 65, 96, 97, 127, 128, 129, 191, 193, 255, 257, 300, 511, 700)
#: Relative error (Frobenius) of Gaussian products with K up to 4160: u times 0.43 (a rounding's average over numbers of
#: all sizes) times the square root of the roundings, of y and of each weight, and of a table's values too; and rather
#: less than a tenth for the sum. On the CPU, with all roundings but the sum's, this suite's weights have 0.60 u at most
#: with two roundings and 0.70 u with three.
_ERROR = {"float16": {2: 3.0e-4, 3: 3.7e-4}, "bfloat16": {2: 2.5e-3, 3: 2.95e-3}}


def quantized(K: int, N: int, name: str = "int4", dtype: str = "float16", group_size: int = 128) -> mc.QuantizedTensor:
    return quantized_like(weights(K, N), name, group_size, dtype)


@functools.cache
def build_all(spec: Spec, dtype: str) -> None:
    """All configurations on all cores: one after the other they would take most of the time of these tests."""
    builds = list(KERNEL.variants(spec, dtype, gpu()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda build: nvrtc.cubin(build[0], build[1], gpu().arch), builds))


def tilings(M: int, w: mc.QuantizedTensor, dtype: str) -> Iterator[Tiling]:
    """Every configuration that fits, whole tiles and stripes."""
    build_all(w.spec, dtype)
    for rated in sm90_wgmma.configs(w.layout, gpu()):
        grids = {sm90_wgmma.grid_of(rated.config, M, w.layout, gpu(), stripes) for stripes in (False, True)}
        grids.add(sm90_wgmma.invariant_grid(rated.config, M, w.layout, gpu()))
        for grid in sorted(grids, key=lambda grid: (grid.blocks, grid.whole)):
            yield Tiling(rated.config, grid)


def launched(
    tiling: Tiling, x: cupy.ndarray, w: mc.QuantizedTensor, bias: cupy.ndarray | None = None, dependent: bool = False
) -> cupy.ndarray:
    dtype = frameworks.of(x).dtype(x)
    plan = KERNEL.plan(problem_of(w, x.shape[0], dtype), tiling)
    out, guard = poisoned_with_guard(x.shape[0], w.shape[1], dtype)
    plan.multiply(frameworks.of(x), x, w.placed, bias, out, dependent)
    assert is_poison(guard), str(tiling)
    return out


# ---- right


@every_format
@every_dtype
@pytest.mark.parametrize("shape", [(8, 1), (1000, 300), (4160, 513), (128, 4100)], ids=str)
def test_every_configuration_is_right(name: str, dtype: str, shape: tuple[int, int]) -> None:
    """For one row, at the edges of a tile and for several tiles of rows; with and without bias, NaN all around."""
    K, N = shape
    group_size = {"int4": 128, "uint4": 32, "int8": 64, "nf4": 16, "int3": 128, "int2": 16, "fp8_e4m3": -1}.get(
        name, 32
    )
    w = quantized(K, N, name, dtype, group_size)
    bias = to_gpu((rows((N,), seed=1, dtype="float32") * 100).astype(DTYPES[dtype]))
    memory = activations(1000, K, dtype)
    exact = [Product(float64(memory), float64(w.dequantize("float32")), each) for each in (None, float64(bias))]
    for rated in sm90_wgmma.configs(w.layout, gpu()):
        tokens = rated.config.tokens
        for M in (1, tokens - 1, tokens + 1, 3 * tokens + 5):
            x = poisoned((M + 300, K), dtype)  # rows beyond M must not be used
            x[:M].view(cupy.uint16)[...] = memory[:M].view(cupy.uint16)
            for tiling in tilings(M, w, dtype):
                if tiling.config == rated.config:
                    poison_pool()
                    with_bias = M != 1
                    y = launched(tiling, x[:M], w, bias if with_bias else None)
                    case = f"M={M}, {tiling}"
                    exact[with_bias].check(float64(y), KERNEL.rounding(problem_of(w, M, dtype)), case)


@every_format
@every_dtype
def test_the_product_is_right_for_every_m(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GEMM", fresh_gemm("sm80_gemm"))
    for (K, N), group_size in (((4096, 3000), 128), ((1032, 520), 32), ((72, 65), -1)):
        w = quantized(K, N, name, dtype, group_size)
        x = activations(max(EVERY_M), K, dtype)
        product = Product(float64(x), float64(w.dequantize("float32")))
        roundings = 2 if formats.get(name).table is None else 3
        for M in EVERY_M:
            out, guard = poisoned_with_guard(M, N, dtype)
            poison_pool()
            mc.matmul(x[:M], w, out=out)
            kernel = kernel_of(M, dtype, w)
            assert kernel == "sm90_wgmma" or M <= 16
            case = f"M={M}, K={K}, N={N}"
            product.check(float64(out), rounding_of(M, dtype, w), case)
            assert is_poison(guard), case
            error = cupy.linalg.norm(float64(out) - product.exact[:M]) / cupy.linalg.norm(product.exact[:M])
            assert M * N < 100_000 or float(error) <= _ERROR[dtype][roundings], case


@every_dtype
def test_strides_of_x_and_out(dtype: str) -> None:
    K, N = 1000, 300
    w = quantized(K, N, dtype=dtype)
    wide = activations(400, 2 * K + 16, dtype)
    for M in (1, 33, 150):
        plan_kernel = kernel_of(M, dtype, w)
        copied = {
            "apart": wide[:M, :K],
            "start": wide[:M, 8 : K + 8],
            "every second row": wide[: 2 * M : 2, 16 : K + 16],
        }
        left = {
            "odd start": wide[:M, 1 : K + 1],
            "even start": wide[:M, 4 : K + 4],
            "backwards": wide[:M, :K][::-1],
            "one row for all": cupy.broadcast_to(wide[0, 8 : K + 8], (M, K)),
            "odd rows apart": wide.reshape(-1)[: M * (K + 1)].reshape(M, K + 1)[:, :K],
        }
        for case, x in {**copied, **left}.items():
            aligned = cupy.ascontiguousarray(x)
            expected, found = mc.matmul(aligned, w), mc.matmul(x, w)
            if case in copied or plan_kernel != "sm90_wgmma":
                assert_same_bits(found, expected, f"M={M}, {case}")
            product = Product(float64(aligned), float64(w.dequantize("float32")))
            product.check(float64(found), KERNEL.rounding(problem_of(w, M, dtype)), f"M={M}, {case}")
            if case in left and M > 1:
                with pytest.raises(ValueError, match="pass a contiguous copy"):
                    mc.matmul(x, w, batch_invariant=True)
            elif case in copied:
                invariant = mc.matmul(aligned, w, batch_invariant=True)
                assert_same_bits(mc.matmul(x, w, batch_invariant=True), invariant, f"M={M}, {case}")
        expected = mc.matmul(wide[:M, :K], w)
        for start, pitch in ((0, N + 8), (8, N + 12), (3, N + 7), (1, N + 1)):
            memory = poisoned((M, pitch), dtype)
            out = memory[:, start : start + N]
            mc.matmul(wide[:M, :K], w, out=out)
            assert_same_bits(out, expected, f"start={start}, pitch={pitch}")
            assert is_poison(memory[:, :start])
            assert is_poison(memory[:, start + N :])


def test_more_tiles_than_fit_at_once_and_a_few_more_than_a_wave() -> None:
    """Every number of tiles left over for stripes, also fewer slabs than blocks."""
    w = quantized(256, 128)
    x = activations(150 * 16, 256, "float16")
    product = Product(float64(x), float64(w.dequantize("float32")))
    for rated in sm90_wgmma.configs(w.layout, gpu()):
        config = rated.config
        for M in (config.tokens * tiles for tiles in range(1, 150, 4) if config.tokens * tiles <= x.shape[0]):
            for stripes in (False, True):
                tiling = Tiling(config, sm90_wgmma.grid_of(config, M, w.layout, gpu(), stripes))
                y = launched(tiling, x[:M], w)
                product.check(float64(y), KERNEL.rounding(problem_of(w, M, "float16")), f"M={M}, {tiling}")


def test_a_fresh_thread_can_multiply() -> None:
    """One in which nothing has touched the GPU: the map of x is encoded before anything is launched."""
    w = quantized(4096, 1000)
    x = activations(77, 4096, "float16")
    expected = mc.matmul(x, w)
    other = mc.QuantizedTensor(w.spec, w.packed)
    cupy.cuda.Device().synchronize()
    found: list[cupy.ndarray] = []
    thread = threading.Thread(target=lambda: found.append(mc.matmul(x.copy(), other)))
    thread.start()
    thread.join(timeout=120)
    assert len(found) == 1
    cupy.cuda.Device().synchronize()
    assert_same_bits(found[0], expected)


def test_a_graph_follows_scales_that_change_by_powers_of_ten() -> None:
    """What launches keep of the scales is in memory that update_ and mark_written write."""
    K, N, M = 1024, 520, 64
    x = activations(M, K, "float16") / 64
    w = mc.quantize(weights(K, N))
    y = poisoned((M, N), "float16")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        cupy.cuda.Device().synchronize()
        mc.matmul(x, w, out=y)
        stream.begin_capture()
        mc.matmul(x, w, out=y)
        graph = stream.end_capture()
        for index, size in enumerate((1.0, 1000.0, 0.01, 30.0)):
            if index % 2:
                w.update_(weights(K, N) * size)
            else:
                cupy.copyto(w.packed, mc.quantize(weights(K, N) * size).packed)
                w.mark_written()
            y.view(cupy.uint16).fill(0x7FFF)
            graph.launch(stream)
            stream.synchronize()
            product = Product(float64(x), float64(w.dequantize("float32")))
            product.check(float64(y), rounding_of(M, "float16", w), f"{size}")


# ---- the same bits


@every_dtype
@pytest.mark.parametrize("M", [17, 64, 130])
def test_every_grid_repeats_bit_for_bit(dtype: str, M: int) -> None:
    """200 times over, on streams side by side and from a graph, plain and dependent."""
    w = quantized(4160, 1000, dtype=dtype)
    x = activations(M, 4160, dtype)
    wrong = cupy.zeros((), cupy.int64)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(3)]
    for tiling in tilings(M, w, dtype):
        expected = launched(tiling, x, w)
        plan = KERNEL.plan(problem_of(w, M, dtype), tiling)
        framework = frameworks.of(x)
        outs = [[poisoned((M, 1000), dtype) for _ in range(4)] for _ in streams]
        cupy.cuda.Device().synchronize()
        for turn in range(200 // 12 + 1):
            for stream, mine in zip(streams, outs, strict=True):
                with stream:
                    for out in mine:
                        plan.multiply(framework, x, w.placed, None, out, turn % 2 == 0)
        for stream in streams:
            stream.synchronize()
        wrong += sum(differences(out, expected) for mine in outs for out in mine)
        cupy.cuda.Device().synchronize()  # before the streams, which do not wait for this one, write again
        with streams[0]:
            for out in outs[0]:
                out.view(cupy.uint16).fill(0x7FFF)
            streams[0].begin_capture()
            for out in outs[0]:
                plan.multiply(framework, x, w.placed, None, out, True)
            graph = streams[0].end_capture()
            for _ in range(50):
                graph.launch(streams[0])
            streams[0].synchronize()
        wrong += sum(differences(out, expected) for out in outs[0])
        assert int(wrong) == 0, str(tiling)


@every_dtype
@every_format
def test_dependent_launches_have_the_bits_of_plain_ones(name: str, dtype: str) -> None:
    """Each product is the next one's x: what is read before the wait, or written before it, shows."""
    K = 2048
    values_of = [weights(K, K) / K**0.5, weights(K, K)[::-1] / K**0.5]
    layers = [quantized_like(values, name, 128, dtype) for values in values_of]
    bias = activations(1, K, dtype)[0]
    for M in (20, 64, 200, 500):
        for tiling in tilings(M, layers[0], dtype):
            plan = KERNEL.plan(problem_of(layers[0], M, dtype), tiling)
            results = []
            for dependent in (False, True, True):
                values = [activations(M, K, dtype), *(poisoned((M, K), dtype) for _ in range(6))]
                for index in range(6):
                    x = values[index] if index % 3 else values[index].copy()  # a kernel of another between two of ours
                    plan.multiply(frameworks.of(x), x, layers[index % 2].placed, bias, values[index + 1], dependent)
                results.append(values[-1])
            assert_same_bits(results[0], results[1], str(tiling))
            assert_same_bits(results[0], results[2], str(tiling))


# ---- batch_invariant


def each_alone(x: cupy.ndarray, w: mc.QuantizedTensor, dtype: str) -> cupy.ndarray:
    """The product of every row, one at a time."""
    found = poisoned((x.shape[0], w.shape[1]), dtype)
    for row in range(x.shape[0]):
        mc.matmul(x[row : row + 1], w, out=found[row : row + 1], batch_invariant=True)
    return found


def taken(x: cupy.ndarray, order: np.ndarray) -> cupy.ndarray:
    """Those rows of x."""
    return x.view(cupy.uint16)[cupy.asarray(order)].view(x.dtype)


@every_dtype
@pytest.mark.parametrize(
    ("name", "shape"),
    [("int4", (4096, 4096)), ("uint4", (1000, 300)), ("int8", (512, 20000)), ("nf4", (8192, 65)), ("int4", (8, 1))],
    ids=str,
)
def test_a_row_has_the_same_bits_whatever_m_and_its_place(name: str, shape: tuple[int, int], dtype: str) -> None:
    K, N = shape
    w = quantized(K, N, name, dtype)
    x = activations(300, K, dtype)
    alone = each_alone(x, w, dtype)
    product = Product(float64(x), float64(w.dequantize("float32")))
    product.check(float64(alone), KERNEL.rounding(problem_of(w, 300, dtype)))
    wrong = cupy.zeros((), cupy.int64)
    for M in range(1, 301):
        start = (7 * M) % (301 - M)
        wrong += differences(mc.matmul(x[start : start + M].copy(), w, batch_invariant=True), alone[start : start + M])
    assert int(wrong) == 0
    for order in (np.random.default_rng(0).permutation(300), np.arange(4500) % 300):
        assert_same_bits(mc.matmul(taken(x, order), w, batch_invariant=True), taken(alone, order))
    assert mc.matmul(x[:0], w, batch_invariant=True).shape == (0, N)


@every_dtype
@every_format
def test_all_that_batch_invariant_offers_has_the_same_bits(name: str, dtype: str) -> None:
    """Every configuration of every split of K, also of those that no layer here would choose; tune may pick any."""
    w = quantized(4160, 300, name, dtype, 32)
    x = activations(300, 4160, dtype)
    splits = {(each.config.wgs_k, each.config.cluster) for each in sm90_wgmma.configs(w.layout, gpu())}
    assert len(splits) > 1
    for split in sorted(splits):
        alone: cupy.ndarray | None = None
        for M in (300, 1, 16, 17, 100, 129, 250):
            for _, tiling in sm90_wgmma.invariant_options(M, w.layout, gpu(), "float16", split):
                y = launched(tiling, x[300 - M :].copy(), w)
                alone = y if alone is None else alone
                assert_same_bits(y, alone[300 - M :], f"M={M}, {tiling}")


def test_the_other_rows_do_not_matter() -> None:
    w = quantized(4096, 1000)
    x = rows((100, 4096), seed=3, dtype="float16")
    expected = mc.matmul(to_gpu(x), w, batch_invariant=True)
    x[::3] = np.nan
    x[1::3] *= 1000
    found = mc.matmul(to_gpu(x), w, batch_invariant=True)
    assert_same_bits(found[2::3], expected[2::3])


def test_where_it_cannot_be_promised_there_is_an_error() -> None:
    w = quantized(4100, 300)
    with pytest.raises(mc.UnsupportedError, match="K=4100 is no multiple of 8"):
        mc.matmul(activations(20, 4100, "float16"), w, batch_invariant=True)
    with pytest.raises(mc.UnsupportedError, match="would round float16 scales too much"):
        mc.matmul(activations(20, 4096, "bfloat16"), quantized(4096, 300), batch_invariant=True)
