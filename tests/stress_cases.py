"""Many launches of the Hopper kernels, for races that come once in thousands: every result has the bits of the first.

    python tests/stress_cases.py --launches 100000

marlin_cupy has to be installed, or the checkout in PYTHONPATH. Weights are small enough to stay in L2, where copies
arrive soonest, or rotate through copies that do not; launches are plain and dependent in turns. It exits with an error
when any bit has changed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator

import cupy
from cases import product_of, quantized
from gpu_arrays import activations, differences, weights

import marlin_cupy as mc
from marlin_cupy import frameworks, kernels
from marlin_cupy.device import gpu
from marlin_cupy.kernels import Candidate, Plan, Problem

#: (format, dtype, group size)
KINDS = (("int4", "float16", 128), ("int4", "bfloat16", 32), ("uint4", "float16", 64), ("int8", "float16", 128))
#: (K, N, weight copies): in L2, not in L2, and with edges.
LAYERS = ((4096, 4096, 1), (4096, 14336, 4), (1096, 3000, 1))
ROWS = (1, 8, 16, 24, 64, 128, 300)
_BURST = 50  # launches of one kind; after every fourth burst the last result is looked at, else each


def candidates(problem: Problem) -> Iterator[tuple[Candidate, Plan]]:
    for kernel in kernels.GEMM.kernels:
        if kernel.name.startswith("sm90") and kernel.refuses(problem) is None:
            for candidate in kernel.candidates(problem):
                yield candidate, kernel.plan(problem, candidate.configuration)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launches", type=int, default=100_000)
    wanted = parser.parse_args().launches
    cases = [(kind, layer, M) for kind in KINDS for layer in LAYERS for M in ROWS]
    done, changed, start = 0, 0, time.monotonic()
    for (name, dtype, group_size), (K, N, copies), M in cases:
        first = quantized(weights(K, N), name, group_size, dtype)
        all_weights = [first, *(mc.QuantizedTensor(first.spec, first.packed.copy()) for _ in range(copies - 1))]
        x = activations(M, K, dtype)
        y, wrong = cupy.empty((M, N), x.dtype), cupy.zeros((), cupy.int64)
        plans = list(candidates(product_of(M, dtype, first.spec, gpu())))
        each = max(_BURST, wanted // (len(cases) * len(plans)))
        for candidate, plan in plans:
            expected = plan.multiply(frameworks.of(x), x, first.placed, None, None, False)
            for launch in range(each):
                w = all_weights[launch % copies]
                plan.multiply(frameworks.of(x), x, w.placed, None, y, launch // _BURST % 2 == 1)
                if launch // _BURST % 4 < 3 or launch % _BURST == _BURST - 1:
                    wrong += differences(y, expected)
            if int(wrong):
                print(f"{int(wrong)} values changed: {name} {dtype} K={K} N={N} M={M} {candidate}", flush=True)
                changed, wrong = changed + 1, cupy.zeros((), cupy.int64)
            done += each
    print(f"{done} launches, {changed} cases with changed bits, {time.monotonic() - start:.0f} s")
    return 1 if changed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
