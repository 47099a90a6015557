"""The speed of every tile of the portable kernel on a large layer, to fit the table by which it predicts.

Prints nanoseconds of one SM per slab, launch included, beside those of ``CONFIGS`` in ``kernels/sm80_gemm.py``::

    python -m marlin_cupy.bench.configs
"""

from __future__ import annotations

import argparse
import functools
import sys

from rich.console import Console
from rich.table import Table

from marlin_cupy import frameworks
from marlin_cupy.bench.contenders import Ours, Setup, fill_normal
from marlin_cupy.bench.shapes import Shape
from marlin_cupy.device import gpu, gpu_count, import_cupy, no_gpu
from marlin_cupy.kernels import Problem, sm80_gemm
from marlin_cupy.timing import CupyRun, EventTimer, Sampling, interleave, prepare

LAYER = Shape("70b_gate_up", 8192, 57344)


def measure() -> list[tuple[int, sm80_gemm.RatedConfig, float]]:
    """(M, tile, nanoseconds of one SM per slab) for every tile, those of one M in turns."""
    cupy = import_cupy("the benchmark")
    properties, results = gpu(0), []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        setup = Setup(LAYER, "int4", 128, "float16", properties, stream)
        weights = Ours(setup).weights
        slabs_n, slabs_k, _ = weights[0].layout.packed_shape
        time, sampling = EventTimer(stream), Sampling(sample_ms=12.0, samples=9)
        for m in sm80_gemm.CONFIGS:
            x = cupy.empty((m, LAYER.K), dtype=cupy.float16)
            fill_normal(x, "float16", 1.0)
            y = cupy.empty((m, LAYER.N), dtype=cupy.float16)
            found = sm80_gemm.configs(m, weights[0].spec, "float16", properties)
            graphs = {}
            for number, rated in enumerate(found):
                grid = sm80_gemm.grids(rated, m, weights[0].layout, properties, "float16")[0][1]
                tiling = sm80_gemm.Tiling(rated.config, grid)
                plan = sm80_gemm.KERNEL.plan(Problem(m, "float16", weights[0].spec, properties), tiling)
                steps = [
                    functools.partial(plan.multiply, frameworks.of(x), x, w.placed, None, y, False) for w in weights
                ]
                graphs[str(number)] = prepare(CupyRun(stream, steps, None), time, sampling)
            for index, summary in interleave(graphs, time, sampling).items():
                slab_ns = 1e3 * summary.median * properties.sm_count / (slabs_n * slabs_k)
                results.append((m, found[int(index)], slab_ns))
    return results


def main() -> int:
    """Print the table; 1 without a GPU."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None).parse_args()
    if gpu_count() == 0:
        print(no_gpu("The benchmark"))
        return 1
    table = Table("M", "configuration", "slab ns", "in the table")
    for m, rated, slab_ns in measure():
        table.add_row(str(m), str(rated.config), f"{slab_ns:.0f}", f"{rated.slab_ns:g}")
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
