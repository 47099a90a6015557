"""First-call times: a fresh process with an empty cubin cache, then another one with the cache that the first left.

Timed is the first mc.matmul of a process up to the result on the GPU, after imports, after the CUDA context and
after the weight is on the GPU; of that, NVRTC, and loading the cubin into the driver::

    python -m marlin_cupy.bench.compile_times --output compile_times.json
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from marlin_cupy import formats as registry
from marlin_cupy.api import explain, matmul
from marlin_cupy.bench import report
from marlin_cupy.device import gpu_count, import_cupy, no_gpu
from marlin_cupy.jit import cache, launch
from marlin_cupy.jit import compile as compiling
from marlin_cupy.quantizing import quantize

K, N = 1024, 1024
#: Values of M that ask for different configurations of the portable kernel.
M_VALUES = (1, 16, 32, 64)


@dataclass(frozen=True)
class FirstCall:
    """Milliseconds of the first call of a process. ``nvrtc_ms`` and ``load_ms`` are parts of ``total_ms``."""

    total_ms: float
    nvrtc_ms: float
    load_ms: float
    kernel: str
    config: str


@dataclass(frozen=True)
class CompileTime:
    """A configuration: its first call with an empty cache, and with the cache that this call filled."""

    format: str
    dtype: str
    M: int
    cold: FirstCall
    warm: FirstCall


def first_call(format: str, dtype: str, m: int) -> FirstCall:
    """In this process, which must not have multiplied before."""
    cupy = import_cupy("the benchmark")
    rng = numpy.random.default_rng(0)
    weight = quantize(rng.standard_normal((K, N), dtype=numpy.float32), format, scale_dtype=dtype).to("cuda")
    bits = cupy.asarray(rng.integers(0x3000, 0x3F80, (m, K), dtype=numpy.uint16))  # positive, moderate, either dtype
    x = bits.view(numpy.float16 if dtype == "float16" else ml_dtypes.bfloat16)
    out = cupy.empty((m, N), dtype=x.dtype)
    cupy.cuda.Device().synchronize()

    spent = {"nvrtc": 0.0, "load": 0.0}
    with (
        patch.object(compiling, "compile", _timed(compiling.compile, spent, "nvrtc")),
        patch.object(launch.Function, "__init__", _timed(launch.Function.__init__, spent, "load")),
    ):
        start = time.perf_counter()
        matmul(x, weight, None, out)
        cupy.cuda.Device().synchronize()
        total = time.perf_counter() - start
    found = explain(x.shape, dtype, weight)
    return FirstCall(1e3 * total, 1e3 * spent["nvrtc"], 1e3 * spent["load"], found.kernel, found.config)


def _timed(function: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """``function``, its time added to ``spent[part]``."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[part] += time.perf_counter() - start

    return wrapper


def measure(format: str, dtype: str, m: int) -> CompileTime:
    """Two fresh processes that share a cache folder of their own."""
    with _empty_cache() as environment:
        cold, warm = (_probe(format, dtype, m, environment) for _ in range(2))
    return CompileTime(format, dtype, m, cold, warm)


@contextmanager
def _empty_cache() -> Iterator[dict[str, str]]:
    """An environment with an empty cubin cache, no bundle, and no compute cache, in which NVRTC keeps results too."""
    with tempfile.TemporaryDirectory(prefix="marlin_cupy-compile-") as folder:
        environment = {name: value for name, value in os.environ.items() if name != cache.BUNDLE_VARIABLE}
        yield environment | {cache.CACHE_VARIABLE: folder, "CUDA_CACHE_DISABLE": "1"}


def _probe(format: str, dtype: str, m: int, environment: dict[str, str]) -> FirstCall:
    command = [sys.executable, "-m", "marlin_cupy.bench.compile_times", "--probe", format, dtype, str(m)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{format}, {dtype}, M = {m}: the process failed.\n{done.stderr}")
    return FirstCall(**json.loads(done.stdout.splitlines()[-1]))


def show(times: Sequence[CompileTime], console: Console) -> None:
    """A row per configuration."""
    table = Table(title="milliseconds of the first call of a process", box=box.SIMPLE_HEAD)
    for heading in ("format", "dtype"):
        table.add_column(heading)
    for heading in ("M", "cold", "of it NVRTC", "of it load", "warm", "of it load"):
        table.add_column(heading, justify="right")
    for row in times:
        cold, warm = row.cold, row.warm
        values = (cold.total_ms, cold.nvrtc_ms, cold.load_ms, warm.total_ms, warm.load_ms)
        table.add_row(row.format, row.dtype, str(row.M), *(f"{value:.1f}" for value in values))
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write JSON if asked to. The exit code is 1 without a GPU."""
    parser = report.parser("compile_times", __doc__, m_values=M_VALUES)
    parser.add_argument("--format", choices=registry.names(), **report.several(registry.names(), "weight formats"))
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"))
    parser.add_argument("--probe", nargs=3, metavar=("FORMAT", "DTYPE", "M"), help="one first call, printed as JSON")
    options = parser.parse_args(arguments)
    console = report.terminal()
    if gpu_count() == 0:
        print(no_gpu("The benchmark"))
        return 1
    if options.probe is not None:
        format, dtype, m = options.probe
        print(json.dumps(asdict(first_call(format, dtype, int(m)))))
        return 0
    cells = [(name, m) for name in options.format or registry.names() for m in options.m or M_VALUES]
    times = [measure(name, options.dtype, m) for name, m in track(cells, "compiling", console=console, transient=True)]
    show(times, console)
    report.write_rows(options.output, times, shape={"K": K, "N": N})
    return 0


if __name__ == "__main__":
    sys.exit(main())
