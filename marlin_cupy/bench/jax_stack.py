"""The linear layers of a whole model in one JAX program: ours against bfloat16 jnp.dot, unrolled and in lax.scan.

32 decoder layers, see ``stack``. Weights are random. All programs compute the same, in one process, in turns::

    python -m marlin_cupy.bench.jax_stack --output jax_stack.json

A step is one call of a compiled program whose result is the next one's argument; its time is that of many in a row. A
few come first and are timed apart: memory is elsewhere than when the program ran last, and XLA records launches anew.
``unrolled`` takes every weight as an argument of its own, ``scan, in place`` indexes stacks of weights inside lax.scan,
``scan, slices`` gives the stacks to lax.scan, which takes them apart.
"""

from __future__ import annotations

import importlib
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy
from rich import box
from rich.console import Console
from rich.table import Table

from marlin_cupy.api import matmul
from marlin_cupy.bench import report
from marlin_cupy.bench.contenders import relative_error
from marlin_cupy.bench.stack import GAIN, LAYERS, M_VALUES, TOLERANCE, Widths
from marlin_cupy.compilers.jax import launching
from marlin_cupy.device import gpu_count, no_gpu
from marlin_cupy.integrations.jax import stack
from marlin_cupy.progress import bar
from marlin_cupy.quantizing import quantize

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")

HIDDEN, INNER, SHAPES = Widths.hidden, Widths.inner, Widths().shapes
_SAMPLES, _SAMPLE_S = 7, 0.04
_FIRST_STEPS = 4
OURS, DENSE = "marlin_cupy", "bfloat16"
Weights = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One program for M rows.

    Attributes:
        us: microseconds per step, the median.
        spread: their least and largest.
        first_us: microseconds that the steps before took, together.
        compile_s: seconds to trace and compile the program, kernels being in the cache.
        handler_calls: of Python by XLA, in all the steps that were timed.
        error: relative, of the result against that of bfloat16 weights.
    """

    M: int
    program: str
    weights: str
    us: float
    spread: list[float]
    first_us: float
    compile_s: float
    handler_calls: int | None
    error: float


def layer(x: Any, w: Weights) -> Any:
    """One decoder layer's linear layers; x: [M, HIDDEN]."""
    x = x + (x @ w["qkv"])[:, :HIDDEN] @ w["o"]
    gate_up = x @ w["gate_up"]
    x = x + (jax.nn.silu(gate_up[:, :INNER]) * gate_up[:, INNER:]) @ w["down"]
    return (x / jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))).astype(x.dtype)


def unrolled(x: Any, layers: list[Weights]) -> Any:
    """All layers, one after the other."""
    for w in layers:
        x = layer(x, w)
    return x


def scan_slices(x: Any, stacks: Weights) -> Any:
    """The stacks taken apart by lax.scan."""
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, stacks)[0]


def scan_in_place(x: Any, stacks: Weights) -> Any:
    """The stacks indexed inside lax.scan."""
    count = jax.tree.leaves(stacks)[0].shape[0]
    return jax.lax.scan(
        lambda x, index: (layer(x, {name: w[index] for name, w in stacks.items()}), None), x, jnp.arange(count)
    )[0]


def unavailable() -> str | None:
    """Why JAX cannot be timed here."""
    if gpu_count() == 0:
        return no_gpu("The benchmark")
    return None if jax.default_backend() == "gpu" else "The benchmark needs JAX with CUDA, jax[cuda13]."


def weights(layers: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, list[Weights]]:
    """The same weights twice, on the first GPU: packed, and as bfloat16 arrays."""
    found: dict[str, list[Weights]] = {OURS: [], DENSE: []}
    draw = jax.jit(lambda key, shape: GAIN * shape[0] ** -0.5 * jax.random.normal(key, shape), static_argnums=1)
    with bar("quantizing", layers, True) as begin:
        for index in range(layers):
            begin(f"layer {index}")
            ours, dense = {}, {}
            for number, (name, shape) in enumerate(shapes.items()):
                values = draw(jax.random.key(len(shapes) * index + number), shape)
                ours[name] = quantize(values, "int4", 128, scale_dtype="bfloat16").to("jax")
                dense[name] = values.astype(jnp.bfloat16)
            found[OURS].append(ours)
            found[DENSE].append(dense)
    return found


def stacked(layers: list[Weights], packed: bool) -> Weights:
    """All layers of a name in one array."""
    return {
        name: stack([w[name] for w in layers]) if packed else jnp.stack([w[name] for w in layers]) for name in SHAPES
    }


def handler_calls() -> int:
    """How often XLA has called Python to launch."""
    found = launching._plan_of.cache_info()
    return found.hits + found.misses


class Program:
    """A compiled program that is called again and again."""

    def __init__(self, function: Any, x: Any, operand: Any, compiler_options: dict[str, Any] | None = None) -> None:
        start = time.perf_counter()
        self._run = jax.jit(function).lower(x, operand).compile(compiler_options)
        self.compile_s = time.perf_counter() - start
        self._operand, self._x = operand, x
        self.result = self._run(x, operand)
        self.calls = 0
        self.firsts: list[float] = []
        self._count = max(1, math.ceil(_SAMPLE_S / (min(self._steps(x, 2)[1] for _ in range(3)) / 2 * 1e-6)))

    def _steps(self, x: Any, count: int) -> tuple[Any, float]:
        """The last result, and microseconds."""
        start = time.perf_counter()
        for _ in range(count):
            x = self._run(x, self._operand)
        jax.block_until_ready(x)
        return x, (time.perf_counter() - start) * 1e6

    def sample(self) -> float:
        """Microseconds per step."""
        x, first_us = self._steps(self._x, _FIRST_STEPS)
        self.firsts.append(first_us)
        before = handler_calls()
        us = self._steps(x, self._count)[1] / self._count
        self.calls += handler_calls() - before
        return us


def sampled(programs: dict[Any, Program]) -> dict[Any, list[float]]:
    """Per program the median, the least and the largest time of a step, taken in turns after one that warms up."""
    samples: dict[Any, list[float]] = {key: [] for key in programs}
    for each in programs.values():
        each.sample()
        each.calls = 0
    for index in range(_SAMPLES):
        for key in reversed(programs) if index % 2 else programs:
            samples[key].append(programs[key].sample())
    return {key: [statistics.median(times), min(times), max(times)] for key, times in samples.items()}


def measure(M: int, both: dict[str, list[Weights]], stacks: dict[str, Weights]) -> list[Row]:
    """All programs for M rows, in turns; RuntimeError where a result is wrong."""
    x = jax.random.normal(jax.random.key(M), (M, HIDDEN), jnp.bfloat16)
    functions = {"unrolled": unrolled, "scan, in place": scan_in_place, "scan, slices": scan_slices}
    programs = {
        (program, name): Program(function, x, both[name] if program == "unrolled" else stacks[name])
        for program, function in functions.items()
        for name in (OURS, DENSE)
        if not (program == "scan, in place" and name == DENSE)
    }
    times = sampled(programs)
    expected = numpy.asarray(programs["unrolled", DENSE].result).astype(numpy.float64)
    rows = []
    for (program, name), each in programs.items():
        error = relative_error(numpy.asarray(each.result).astype(numpy.float64), expected)
        if not error < TOLERANCE:
            raise RuntimeError(f"{program}, {name}, M={M}: the result is {error:.3g} from that of bfloat16 weights.")
        us, *spread = times[program, name]
        calls = each.calls if name == OURS else None
        first_us = statistics.median(each.firsts)
        rows.append(Row(M, program, name, us, spread, first_us, each.compile_s, calls, error))
    return rows


def one_call_us(M: int, w: Any) -> float:
    """Microseconds of a program with one product, from call to result on the host."""
    x = jnp.ones((M, w.shape[0]), ml_dtypes.bfloat16)
    run = jax.jit(matmul)
    run(x, w).block_until_ready()
    times = []
    for _ in range(500):
        start = time.perf_counter()
        run(x, w).block_until_ready()
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def show(rows: Sequence[Row], console: Console) -> None:
    """A table."""
    title = f"microseconds per step of all decoder layers' linear layers; first: of {_FIRST_STEPS} steps before"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for heading in ("M", "program", "weights", "us", "bfloat16 / ours", "first", "compile s", "Python calls", "error"):
        table.add_column(heading, justify="left" if heading in ("program", "weights") else "right")
    for each in rows:
        other = "scan, slices" if each.program.startswith("scan") else "unrolled"
        dense = next(row for row in rows if (row.M, row.program, row.weights) == (each.M, other, DENSE))
        times = f"{dense.us / each.us:.2f}" if each.weights == OURS else ""
        calls = "" if each.handler_calls is None else str(each.handler_calls)
        table.add_row(
            *(str(each.M), each.program, each.weights, f"{each.us:.0f}", times),
            *(f"{each.first_us:.0f}", f"{each.compile_s:.1f}", calls, f"{each.error:.1e}"),
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write JSON if asked to. The exit code is 1 without a GPU."""
    options = report.parser("jax_stack", __doc__, LAYERS, M_VALUES).parse_args(arguments)
    reason = unavailable()
    if reason is not None:
        print(reason)
        return 1
    both = weights(options.layers, SHAPES)
    stacks = {name: stacked(layers, name == OURS) for name, layers in both.items()}
    rows: list[Row] = []
    for M in options.m or M_VALUES:
        rows += measure(M, both, stacks)
    single = one_call_us(1, both[OURS][0]["o"])
    show(rows, report.terminal())
    print(f"a program with one product, 1 x {HIDDEN} x {HIDDEN}, from call to result: {single:.1f} us")
    fields = {"layers": options.layers, "shapes": SHAPES, "format": "int4", "group_size": 128, "one_call_us": single}
    report.write_rows(options.output, rows, **fields)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
