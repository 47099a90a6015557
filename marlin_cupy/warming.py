"""warmup: every kernel that some weights need at some numbers of rows, compiled at once and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from marlin_cupy import kernels
from marlin_cupy.api import problem_of
from marlin_cupy.kernels import Candidate, Problem
from marlin_cupy.progress import bar
from marlin_cupy.tensor import QuantizedTensor
from marlin_cupy.tuning import checked_dtype, checked_ms


def warmup(
    ws: QuantizedTensor | Iterable[QuantizedTensor],
    ms: int | Iterable[int],
    *,
    dtype: str | None = None,
    batch_invariant: bool = False,
    progress: bool = False,
) -> int:
    """Compile and load whatever :func:`matmul` will need, so that no later call waits for it.

    Kernels are compiled on all cores at once, read from the cache where they were compiled before, and loaded on the
    weights' GPUs. Nothing is computed. Weights in host memory need nothing, which is no error.

    Args:
        ws: a weight, or several, on any devices.
        ms: numbers of rows of x, one or several, each at least 1.
        dtype: of x, "float16" or "bfloat16"; that of each weight's scales if None.
        batch_invariant: as it will be passed to :func:`matmul`.
        progress: show a progress bar on standard error.

    Returns:
        How many different kernels that takes.

    Raises:
        TypeError: not weights. ValueError: ms or dtype. UnsupportedError: no kernel serves it. CompileError: NVRTC
            refuses one. MissingDependencyError: no CuPy or no NVRTC.
    """
    weights = [ws] if isinstance(ws, QuantizedTensor) else list(ws) if isinstance(ws, Iterable) else [ws]
    for w in weights:
        if not isinstance(w, QuantizedTensor):
            raise TypeError(f"ws holds a {type(w).__name__}; pass a QuantizedTensor, or several.")
    wanted = [(w, m, checked_dtype(dtype, w)) for w in weights for m in checked_ms(ms)]

    first: dict[Any, tuple[Problem, Candidate]] = {}  # by source and GPU: what brings the kernel in
    for w, m, x_dtype in wanted:
        problem = problem_of(w, m, x_dtype, batch_invariant)
        candidate = kernels.GEMM.choose(problem)
        source = kernels.GEMM.source(problem, candidate)
        if source is not None:
            first.setdefault((source, w.device), (problem, candidate))
    workers = max(1, min(len(first), os.cpu_count() or 1))
    # Threads: NVRTC runs outside the interpreter's lock. On two cores two threads built eight kernels in 0.75 s, which
    # took 1.43 s one after the other, and 1.21 s in two processes (NVRTC 13.0, one run of each). Processes would also
    # run the caller's main module again, and hand nothing over where the cache folder cannot be written.
    with bar("compiling", len(first), progress) as begin, ThreadPoolExecutor(workers) as pool:
        builds = {pool.submit(kernels.GEMM.ready, *each): name for ((name, _), _), each in first.items()}
        try:
            for build in as_completed(builds):
                begin(builds[build])
                build.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for w, m, x_dtype in wanted:
        kernels.GEMM.ready(problem_of(w, m, x_dtype, batch_invariant))
    return len(first)
