"""Small cases of every kernel configuration, for NVIDIA's compute-sanitizer.

    for tool in memcheck synccheck initcheck; do
        compute-sanitizer --tool $tool --error-exitcode 1 python tests/sanitizer_cases.py
    done
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitizer_cases.py --untraded

racecheck does not end where warpgroups trade registers (sm90_wgmma.Untraded says why): ``--untraded`` takes blocks that
do not. The compiler refuses the widest tiles then; they are counted.

``--kernel sm90_stream --every 4`` leaves every fourth case of that kernel. marlin_cupy has to be installed, or the
checkout in PYTHONPATH. Run it once without the tool first, so that compiling is done. It exits with an error when a
result is wrong. Everything but the kernels happens on the host, so that the tool has nothing else to look at.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections import Counter
from collections.abc import Iterator

import cupy
import numpy as np
from cases import DTYPES, FORMATS, HALF, gaussian, product_of, quantized, rows
from product import Product

import marlin_cupy as mc
from marlin_cupy import frameworks, kernels
from marlin_cupy.device import gpu
from marlin_cupy.kernels import Dense, measured, sm80_gemm, sm90_stream, sm90_wgmma
from marlin_cupy.kernels.cuda import CudaConfiguration, ProductKernel
from marlin_cupy.numerics import Rounding, dense_bound

#: (K, N): edges in both directions; and enough steps for blocks to share a tile.
SHAPES = ((75, 70), (1100, 200))
#: The same with rows that the Hopper kernels can copy, and more tiles for their blocks.
COPIED_SHAPES = ((72, 70), (1096, 700))
GROUP_SIZE = {"int4": 128, "uint4": 48, "int8": 64, "nf4": 32, "int3": 128, "int2": 16, "mxfp4": 32, "fp8_e4m3": -1}
_NAN = 0x7FFF  # in fp16 and in bf16


def to_gpu(array: np.ndarray) -> cupy.ndarray:
    if array.dtype == DTYPES["bfloat16"]:
        return cupy.asarray(array.view(np.uint16)).view(array.dtype)
    return cupy.asarray(array)


def to_host(array: cupy.ndarray) -> np.ndarray:
    return array.view(cupy.uint16).get().view(array.dtype)


KERNELS = (sm80_gemm.KERNEL, sm90_stream.KERNEL, sm90_wgmma.KERNEL)

Case = tuple[ProductKernel, int, CudaConfiguration]  # with the number of rows


def portable_cases(dtype: str, w: mc.QuantizedTensor, only_every: int) -> Iterator[Case]:
    """Every configuration for its own M and for one row more than a tile, tiles whole and shared in several ways."""
    found = [
        (size.up_to, rated)
        for size in measured.of(gpu()).read(sm80_gemm.Costs, sm80_gemm.KERNEL.name).sizes
        for rated in sm80_gemm.configs(size.up_to, w.spec, dtype, gpu())
    ]
    for largest_m, rated in found[::only_every]:
        for M in (max(1, largest_m - 3), rated.config.tokens + 1):
            grid = sm80_gemm.grids(rated, M, w.layout, gpu(), dtype, measured.of(gpu()))[0][1]
            steps = grid.tiles * grid.steps
            for blocks in sorted({grid.tiles, max(1, 2 * steps // 3), steps}):
                yield sm80_gemm.KERNEL, M, sm80_gemm.Tiling(rated.config, dataclasses.replace(grid, blocks=blocks))


def stream_cases(dtype: str, w: mc.QuantizedTensor) -> Iterator[Case]:
    """Every configuration, for one row and for one less than it takes, with all tiles in one cluster and in several."""
    for largest_m in (8, 16):
        for config in sm90_stream.configs(largest_m, w.layout, gpu()):
            for M in (1, largest_m - 1):
                if sm90_stream.KERNEL.refuses(product_of(M, dtype, w.spec, gpu())) is None:
                    for clusters in sorted({1, sm90_stream.tiles(config, w.layout)}):
                        yield sm90_stream.KERNEL, M, sm90_stream.Streams(config, clusters)


def wgmma_cases(dtype: str, w: mc.QuantizedTensor, only_every: int, untraded: bool) -> Iterator[Case]:
    """Every configuration for less than a tile of rows and for a few more: tiles whole and shared in several ways."""
    if sm90_wgmma.KERNEL.refuses(product_of(1, dtype, w.spec, gpu())) is not None:
        return
    for rated in sm90_wgmma.configs(w.layout, gpu())[::only_every]:
        config = sm90_wgmma.Untraded(**rated.config.numbers) if untraded else rated.config
        for M in (config.tokens - 3, config.tokens + 5):
            whole = sm90_wgmma.grid_of(config, M, w.layout, gpu(), stripes=False)
            grids = [whole]
            if config.cluster == 1:  # two blocks with several tiles each, and one that is cut among three and more
                tiles, steps = whole.tiles, w.layout.packed_shape[1]
                grids.append(dataclasses.replace(whole, blocks=min(2, tiles), whole=-(-tiles // min(2, tiles))))
                cut = [tiles - 1, tiles * 2 // 3, tiles * 3, tiles * steps]
                for blocks in sorted(blocks for blocks in set(cut) if blocks > 0 and tiles % blocks):
                    alone = tiles // blocks if tiles % blocks * steps >= blocks else max(0, tiles // blocks - 1)
                    grids.append(dataclasses.replace(whole, blocks=blocks, whole=alone))
            for grid in dict.fromkeys(grids):
                yield sm90_wgmma.KERNEL, M, sm90_wgmma.Tiling(config, grid)


def check_kernels(
    format: str, dtype: str, only_every: int, names: list[str], turns: Iterator[bool], untraded: bool
) -> Counter[str]:
    """Launches with whole tiles and with shared ones, and cases refused by the compiler, of the kernels in ``names``
    where it is their turn.
    """
    counts: Counter[str] = Counter()
    for K, N in SHAPES + COPIED_SHAPES:
        on_host = quantized(gaussian(K, N, seed=K), format, GROUP_SIZE[format], dtype)
        w = on_host.to("cuda")
        x, bias = rows((261, K), seed=N, dtype=dtype), rows((N,), seed=K, dtype=dtype)
        exact = Product(*(part.astype(np.float64) for part in (x, on_host.dequantize("float32"), bias)))
        portable = portable_cases(dtype, w, only_every) if (K, N) in SHAPES else ()
        on_hopper = (*stream_cases(dtype, w), *wgmma_cases(dtype, w, only_every, untraded))
        for kernel, M, configuration in (*portable, *on_hopper):
            if kernel.name not in names or not next(turns):
                continue
            problem = product_of(M, dtype, w.spec, gpu())
            try:
                plan = kernel.plan(problem, configuration)
            except mc.CompileError:  # a wide tile, without the registers that the copying warpgroup would have given
                if not isinstance(configuration.config, sm90_wgmma.Untraded):
                    raise
                counts["refused"] += 1
                continue
            x_gpu, bias_gpu = to_gpu(x[:M]), to_gpu(bias)
            for dependent in (False, True) if configuration.dependent else (False,):
                out = cupy.asarray(np.full((M, N), _NAN, np.uint16)).view(DTYPES[dtype])
                plan.multiply(frameworks.of(x_gpu), x_gpu, w.placed, bias_gpu, out, False)
                if dependent:  # behind a launch, which it can overlap with
                    plan.multiply(frameworks.of(x_gpu), x_gpu, w.placed, bias_gpu, out, True)
                    plan.multiply(frameworks.of(x_gpu), x_gpu, w.placed, bias_gpu, out, True)
                rounding = kernel.rounding(problem)
                if is_exact(configuration):
                    rounding = dataclasses.replace(rounding, weights=0)
                case = f"{format} {dtype} {plan}, dependent={dependent}"
                exact.check(to_host(out).astype(np.float64), rounding, case)
                counts["shared" if is_shared(configuration) else "whole"] += 1
    return counts


def is_exact(configuration: CudaConfiguration) -> bool:
    """Whether it is a configuration of sm80_gemm that does not round weights after scaling, whatever M."""
    return isinstance(configuration, sm80_gemm.Tiling) and not configuration.config.scale_weights


def is_shared(configuration: CudaConfiguration) -> bool:
    """Whether blocks exchange parts of tiles."""
    if isinstance(configuration, sm80_gemm.Tiling):
        return configuration.grid.is_cut
    assert isinstance(configuration, sm90_stream.Streams | sm90_wgmma.Tiling)
    stripes = isinstance(configuration, sm90_wgmma.Tiling) and configuration.grid.shared_tiles > 0
    return stripes or configuration.config.cluster > 1


def check_addresses() -> int:
    """Rows of x and out that start anywhere, through the public function."""
    launches = 0
    for K, N in SHAPES + COPIED_SHAPES:
        w = mc.quantize(gaussian(K, N, seed=K)).to("cuda")
        exact_weights = w.to("cpu").dequantize("float32").astype(np.float64)
        wide = rows((9, K + 9), seed=N, dtype="float16")
        for start in (0, 1, 8):
            x = to_gpu(wide)[:, start : start + K]
            out = cupy.asarray(np.full((9, N + 5), _NAN, np.uint16)).view(np.float16)[:, start % 4 : start % 4 + N]
            mc.matmul(x, w, out=out)
            product = Product(wide[:, start : start + K].astype(np.float64), exact_weights)
            product.check(to_host(out.copy()).astype(np.float64), Rounding("float16"), f"start={start}")
            launches += 1
    return launches


def check_dense() -> int:
    """Runs of K as dense arrays."""
    launches = 0
    for format, (K, N), dtype in itertools.product(FORMATS, SHAPES, HALF):
        on_host = quantized(gaussian(K, N, seed=K), format, GROUP_SIZE[format], HALF[K % 2])
        w, right = on_host.to("cuda"), on_host.dequantize("float32").T
        slabs = w.layout.packed_shape[1]
        plan = kernels.DEQUANTIZE.ready(Dense(w.spec, dtype, gpu()))
        for run in {range(slabs), range(slabs // 2, slabs), range(1)}:
            found = plan.dense(frameworks.of(w.packed), w.placed, run)
            values = to_host(found.base)[:, : found.shape[1]].astype(np.float32)
            expected = right[:, 128 * run.start : 128 * run.stop]
            assert (abs(values - expected) <= dense_bound(expected, dtype)).all(), f"dense {format} {dtype} {run}"
            launches += 1
    return launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--kernel", action="append", choices=[kernel.name for kernel in KERNELS])
    parser.add_argument("--untraded", action="store_true", help="sm90_wgmma without trading registers, for racecheck")
    options = parser.parse_args()
    names = options.kernel or [kernel.name for kernel in KERNELS]
    turns = itertools.cycle([True] + [False] * (options.every - 1))
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    for index, format in enumerate(FORMATS):
        for dtype in HALF if format == "int4" else (HALF[index % 2],):
            only_every = 1 if format == "int4" and dtype == "float16" else 3
            counts += check_kernels(format, dtype, only_every, names, turns, options.untraded)
    others, dense = check_addresses(), check_dense()
    assert counts["whole"], "no launch with whole tiles"
    assert counts["shared"], "no launch with shared tiles"
    cupy.cuda.Device().synchronize()
    took = time.perf_counter() - start
    print(
        f"right in {took:.1f} s: launches with whole tiles {counts['whole']}, with shared ones {counts['shared']}, "
        f"odd addresses {others}, dense runs {dense}; refused by the compiler {counts['refused']}"
    )


if __name__ == "__main__":
    main()
