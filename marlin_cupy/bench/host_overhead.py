"""Host time of mc.matmul per call and library, beside the launch alone.

The layer is so small that the GPU is done before the host comes with the next call, so that the time of the loop is
the time of the host. "Launch" is the same kernel launch with arguments that are packed already: what is left of a
call when everything that Python does is taken away. For a weight in host memory that is its arithmetic::

    python -m marlin_cupy.bench.host_overhead --output host_overhead.json
"""

from __future__ import annotations

import functools
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import numpy
from rich import box
from rich.console import Console
from rich.table import Table

from marlin_cupy import frameworks
from marlin_cupy.api import matmul
from marlin_cupy.bench import report
from marlin_cupy.device import gpu_count, import_cupy, no_gpu
from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.jit.launch import Function
from marlin_cupy.packing import decoded
from marlin_cupy.quantizing import quantize
from marlin_cupy.tensor import QuantizedTensor

K, N, M = 256, 256, 1
#: Of a weight in host memory.
HOST_K = HOST_N = 128
CALLS = 2000
#: The driver queues about a thousand launches; a burst stays below that, so that the host never waits.
_BURST = 500
_REPEATS = 7
_WARMUP = 200


@dataclass(frozen=True)
class Overhead:
    """Microseconds per call on the host, median of several loops of CALLS calls."""

    library: str
    call: str
    us: float
    launch_us: float

    @property
    def beyond_launch_us(self) -> float:
        """What Python adds to the launch."""
        return self.us - self.launch_us


def measure() -> tuple[list[Overhead], dict[str, str]]:
    """Rows for every library that is installed, and for the others the reason why they are missing."""
    rng = numpy.random.default_rng(0)
    weight = quantize(rng.standard_normal((K, N), dtype=numpy.float32), "int4").to("cuda")
    x = rng.standard_normal((M, K), dtype=numpy.float32).astype(numpy.float16)
    on_gpu = import_cupy("the benchmark").asarray(x)
    rows: list[Overhead] = []
    missing: dict[str, str] = {}
    for library in ("cupy", "torch", "jax", "numpy"):
        try:
            array = x if library == "numpy" else frameworks.by_name(library).from_native(on_gpu)
        except Exception as error:  # not installed, or without support for this GPU: either is a line of the report
            missing[library] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        rows += [_overhead(library, name, call) for name, call in _calls(array, weight)]
    return [*rows, on_host(x[:, :HOST_K])], missing


def _calls(x: Any, weight: QuantizedTensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a user writes, and for libraries with a stream of their own also with ``out``."""
    yield "matmul(x, w)", functools.partial(matmul, x, weight)
    framework = frameworks.of(x)
    if isinstance(framework, StreamFramework):
        out = framework.empty((M, N), "float16", weight.device)
        yield "matmul(x, w, out=out)", functools.partial(matmul, x, weight, None, out)
    if framework.name == "torch":
        layers = importlib.import_module("marlin_cupy.integrations.torch")
        yield "Linear(x)", functools.partial(layers.Linear.from_quantized(weight), x)
    if framework.name == "jax":
        yield "matmul(x, w), w in JAX", functools.partial(matmul, x, weight.to("jax"))


def on_host(x: Any) -> Overhead:
    """A product of NumPy with a weight in host memory, beside its arithmetic: decoding, product and rounding."""
    rng = numpy.random.default_rng(1)
    weight = quantize(rng.standard_normal((HOST_K, HOST_N), dtype=numpy.float32), "int4")

    def arithmetic() -> Any:
        values = decoded(weight.layout, weight.packed, HOST_N)
        return (x.astype(numpy.float32) @ values).astype(x.dtype)

    us, bare_us = (per_call_us(call, lambda: None) for call in (functools.partial(matmul, x, weight), arithmetic))
    return Overhead("numpy", f"matmul(x, w), {HOST_K} x {HOST_N} in host memory", us, bare_us)


def _overhead(library: str, name: str, call: Callable[[], object]) -> Overhead:
    call()  # compiles
    launches = record_launches(call)
    return Overhead(library, name, per_call_us(call, _synchronize), per_call_us(launches, _synchronize))


def record_launches(call: Callable[[], object]) -> Callable[[], None]:
    """A function that repeats the kernel launches of ``call`` with the arguments packed then, and nothing else.

    Launches take their arguments from one block per kernel, which still holds those of the last launch.
    """
    launches: list[Callable[[], None]] = []
    original = Function.launch

    def record(self: Function, *arguments: Any) -> None:
        launches.append(functools.partial(original, self, *arguments))
        original(self, *arguments)

    with patch.object(Function, "launch", record):
        call()
    if not launches:
        raise RuntimeError("the call launched no kernel of this package.")

    def repeat() -> None:
        for launch in launches:
            launch()

    return launches[0] if len(launches) == 1 else repeat


def _synchronize() -> None:
    import_cupy("the benchmark").cuda.Device().synchronize()


def per_call_us(
    call: Callable[[], object],
    synchronize: Callable[[], None],
    calls: int = CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median over loops of the time on the host; waiting for the GPU is not in it."""
    for _ in range(_WARMUP):
        call()
    found = []
    for _ in range(_REPEATS):
        elapsed, left = 0.0, calls
        while left > 0:
            burst = min(left, _BURST)
            synchronize()
            start = clock()
            for _ in range(burst):
                call()
            elapsed += clock() - start
            left -= burst
        found.append(1e6 * elapsed / calls)
    synchronize()
    return statistics.median(found)


def show(rows: Sequence[Overhead], missing: dict[str, str], console: Console) -> None:
    """A table, and what is missing."""
    table = Table(title=f"microseconds on the host per call, {M} x {K} x {N}, int4", box=box.SIMPLE_HEAD)
    for heading in ("library", "call"):
        table.add_column(heading)
    for heading in ("per call", "launch (arithmetic) alone", "beyond it"):
        table.add_column(heading, justify="right")
    for row in rows:
        times = (row.us, row.launch_us, row.beyond_launch_us)
        table.add_row(row.library, row.call, *(f"{value:.2f}" for value in times))
    console.print(table)
    for library, reason in missing.items():
        console.print(f"without {library}: {reason}", markup=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write JSON if asked to. The exit code is 1 without a GPU."""
    options = report.parser("host_overhead", __doc__).parse_args(arguments)
    console = Console(width=report.WIDTH, highlight=False)
    if gpu_count() == 0:
        print(no_gpu("The benchmark"))
        return 1
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the GPU's memory
    rows, missing = measure()
    show(rows, missing, console)
    if options.output is not None:
        measured = [asdict(row) | {"beyond_launch_us": row.beyond_launch_us} for row in rows]
        shapes = {"shape": {"M": M, "K": K, "N": N}, "shape_in_host_memory": {"M": M, "K": HOST_K, "N": HOST_N}}
        header = report.header(**shapes, calls=CALLS, missing=missing)
        report.write_json(options.output, {"header": header, "rows": measured})
    return 0


if __name__ == "__main__":
    sys.exit(main())
