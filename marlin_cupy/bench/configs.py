"""Times of all that the kernels could do, not only of what they would choose: what ``bench.fit`` fits their models to.

Measures the candidates of every kernel for every layer, format, group size, dtype and M that is asked for: the
candidates of a cell in turns, plain launches in CUDA graphs over cold weights, as timing.py tells::

    python -m marlin_cupy.bench.configs --output times.json
    python -m marlin_cupy.bench.configs --format nf4 --dtype bfloat16 --m 1 --m 16 --most 14 --output times.json
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from marlin_cupy import formats, frameworks, kernels
from marlin_cupy.api import problem_of
from marlin_cupy.bench import report
from marlin_cupy.bench.contenders import Ours, Setup, activations
from marlin_cupy.bench.shapes import LLAMA, Shape, parse
from marlin_cupy.device import Gpu, gpu, gpu_count, import_cupy, no_gpu
from marlin_cupy.kernels import Candidate, Operand, Problem, measured
from marlin_cupy.kernels.cuda import ProductKernel
from marlin_cupy.progress import bar
from marlin_cupy.scalars import F16, HALF_NAMES
from marlin_cupy.spec import Spec
from marlin_cupy.timing import CupyRun, EventTimer, Sampling, interleave, prepare

M_VALUES = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
_SAMPLING = Sampling(sample_ms=6.0, samples=7)
#: Candidates of a kernel in a cell, the best predicted ones.
_MOST = 24


@dataclass(frozen=True)
class Times:
    """One cell: a layer at one M in one format.

    Attributes:
        name: of the layer.
        us: median microseconds of each candidate that was measured, by its key.
    """

    name: str
    K: int
    N: int
    M: int
    format: str
    group_size: int
    dtype: str
    us: dict[str, float]

    def problem(self, on: Gpu) -> Problem:
        """What was measured, on the GPU that it was measured on."""
        scale_dtype = formats.get(self.format).checked_scale_dtype(None, self.dtype, self.group_size)
        w = Spec(self.format, (self.K, self.N), self.group_size, scale_dtype)
        return Problem(self.M, Operand(self.dtype), w, self.dtype, on)


def save(path: Path, header: dict[str, Any], cells: Sequence[Times]) -> None:
    """Write JSON."""
    report.write_json(path, {"header": header, "rows": [dataclasses.asdict(cell) for cell in cells]})


def load(path: Path) -> tuple[Gpu, list[Times]]:
    """The GPU and the cells of what :func:`save` wrote; ValueError where it is something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Gpu(**found["header"]["gpu"]), [Times(**row) for row in found["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no times of bench.configs ({error!r}).") from error


def chosen(problem: Problem, names: Sequence[str], most: int) -> list[Candidate]:
    """Of each kernel of these names that serves ``problem``, the ``most`` candidates that are predicted to be best."""
    assert problem.gpu is not None
    known, found = measured.of(problem.gpu), []
    for kernel in modelled(names):
        if kernel.refuses(problem) is None:
            found += sorted(kernel.rated(problem, known), key=lambda each: each.predicted_us)[:most]
    return found


def modelled(names: Sequence[str]) -> list[ProductKernel]:
    """The kernels of these names, all if there are none, that have a model of their time; ValueError for others."""
    found = {each.name: each for each in kernels.GEMM.kernels if isinstance(each, ProductKernel)}
    for name in names:
        if name not in found:
            raise ValueError(f"kernel is {name!r}; use one of {', '.join(found)}.")
    return [found[name] for name in names or found]


def measure(setup: Setup, ms: Sequence[int], names: Sequence[str], most: int) -> list[Times]:
    """The cells of a layer and format, all candidates of a cell in turns."""
    weights = Ours(setup).weights
    time, found = EventTimer(setup.stream), []
    for m in ms:
        x, y = activations(setup, m)
        problem = problem_of(weights[0], m, setup.dtype)
        graphs = {}
        for each in chosen(problem, names, most):
            plan = kernels.GEMM.plan(problem, each)
            steps = [functools.partial(plan.multiply, frameworks.of(x), x, w.placed, None, y, False) for w in weights]
            graphs[each.key] = prepare(CupyRun(setup.stream, steps, None), time, _SAMPLING)
        us = {key: summary.median for key, summary in interleave(graphs, time, _SAMPLING).items()}
        shape = setup.shape
        found.append(Times(shape.name, shape.K, shape.N, m, setup.format, setup.group_size, setup.dtype, us))
    return found


def show(cells: Sequence[Times], on: Gpu, console: Console) -> None:
    """The best of every kernel in every cell, and what had been predicted for it."""
    table = Table("layer", "M", "weights", "kernel", "measured", "best", "us", "predicted")
    for cell in cells:
        for kernel in modelled(()):
            us = {key: value for key, value in cell.us.items() if key.startswith(f"{kernel.name}:")}
            if us:
                best = min(us, key=lambda key: us[key])
                rated = {each.key: each.predicted_us for each in kernel.rated(cell.problem(on), measured.of(on))}
                weights = f"{cell.format} g{cell.group_size} {cell.dtype}"
                times = f"{us[best]:.2f}", f"{rated[best]:.2f}"
                table.add_row(cell.name, str(cell.M), weights, kernel.name, str(len(us)), best.split(":")[1], *times)
    console.print(table)


def main() -> int:
    """Measure, print a table, write a file; 1 without a GPU."""
    parser = report.parser("configs", __doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layer", type=parse, action="append", help="NAME=KxN, repeatable; those of Llama 3 if none")
    parser.add_argument("--m", type=int, action="append", help=f"rows of x, repeatable; {M_VALUES} if not given")
    parser.add_argument("--format", action="append", choices=formats.names(), help="repeatable; int4 if not given")
    parser.add_argument("--group-size", type=int, action="append", help="repeatable; the format's default if not given")
    parser.add_argument("--dtype", action="append", choices=HALF_NAMES, help="repeatable; float16 if not given")
    parser.add_argument("--kernel", action="append", default=[], help="repeatable; all that have a model if not given")
    parser.add_argument("--most", type=int, default=_MOST, help=f"candidates of a kernel in a cell; {_MOST}")
    options = parser.parse_args()
    modelled(options.kernel)
    if gpu_count() == 0:
        print(no_gpu("The benchmark"))
        return 1
    cupy, found, on = import_cupy("the benchmark"), list[Times](), gpu(0)
    layers: Sequence[Shape] = options.layer or LLAMA
    wanted = [
        (layer, format, group_size, dtype)
        for layer, format, dtype in itertools.product(layers, options.format or ["int4"], options.dtype or [F16.name])
        for group_size in options.group_size or [formats.get(format).default_group_size]
    ]
    with cupy.cuda.Stream(non_blocking=True) as stream, bar("measuring", len(wanted), True) as begin:
        for layer, format, group_size, dtype in wanted:
            begin(f"{layer.name} {format} {dtype}")
            setup = Setup(layer, format, group_size, dtype, on, stream)
            found += measure(setup, options.m or M_VALUES, options.kernel, options.most)
            if options.output is not None:
                save(options.output, report.header(candidates=options.most, sampling=str(_SAMPLING)), found)
    show(found, on, Console(width=report.WIDTH, highlight=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
