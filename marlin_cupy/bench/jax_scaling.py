"""A model's linear layers in JAX on one GPU and on several: tensor parallel and batch parallel, ours and bfloat16.

32 decoder layers of Llama 3 8B without attention and norms, random weights, one compiled program. Tensor parallel:
q, gate and up are split by outputs (column parallel), o and down by inputs (row parallel), so that two sums over the
devices remain per layer, which XLA adds to the program when it sees how the weights lie. Batch parallel: every GPU has
all weights and its part of the rows::

    export XLA_FLAGS="--xla_gpu_graph_min_graph_size=1 --xla_gpu_enable_command_buffer=+COLLECTIVES"
    python -m marlin_cupy.bench.jax_scaling --output jax_scaling.json      # 1, 2, 4, ... of the GPUs there are

Without these flags XLA records no runs of fewer than five kernels, so that between the sums of tensor parallelism it
launches every product through Python.
A step is one call of the program whose result is the next one's argument; its time is that of many in a row.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from rich import box
from rich.console import Console
from rich.table import Table

from marlin_cupy.bench import report
from marlin_cupy.bench.contenders import relative_error
from marlin_cupy.bench.jax_stack import DENSE, OURS, Program, Weights, sampled, unavailable, weights
from marlin_cupy.bench.stack import LAYERS, Widths
from marlin_cupy.integrations.jax import shard

jax: Any = importlib.import_module("jax")
jnp: Any = importlib.import_module("jax.numpy")
sharding: Any = importlib.import_module("jax.sharding")

M_VALUES = (16, 256)
HIDDEN, INNER = Widths.hidden, Widths.inner
_AXIS = "devices"
#: Of each matrix: (K, N), and where it is cut.
_COLUMNS, _ROWS = (None, _AXIS), (_AXIS, None)
MATRICES = {
    "q": ((HIDDEN, HIDDEN), _COLUMNS),
    "o": ((HIDDEN, HIDDEN), _ROWS),
    "gate": ((HIDDEN, INNER), _COLUMNS),
    "up": ((HIDDEN, INNER), _COLUMNS),
    "down": ((INNER, HIDDEN), _ROWS),
}
TENSOR, BATCH, ONE = "tensor", "batch", "none"
#: Between a program on several GPUs and on one, which add up in other orders.
_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """One program: microseconds per step, calls of Python by XLA in all steps that were timed, and how far its result
    is from that of the same weights on one GPU.
    """

    M: int
    devices: int
    parallel: str
    weights: str
    us: float
    spread: list[float]
    handler_calls: int | None
    error: float


def forward(x: Any, layers: list[Weights]) -> Any:
    """All layers; x: [M, HIDDEN]."""
    for w in layers:
        x = x + (x @ w["q"]) @ w["o"]
        x = x + (jax.nn.silu(x @ w["gate"]) * (x @ w["up"])) @ w["down"]
        x = (x / jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))).astype(x.dtype)
    return x


def placed(layers: list[Weights], mesh: Any, parallel: str) -> list[Weights]:
    """The weights on all devices of ``mesh``: cut, or copied."""
    everywhere = sharding.NamedSharding(mesh, sharding.PartitionSpec())

    def place(name: str, w: Any) -> Any:
        if parallel == BATCH:
            return jax.device_put(w, everywhere)
        cut = sharding.PartitionSpec(*MATRICES[name][1])
        return shard(w, mesh, cut) if hasattr(w, "packed") else jax.device_put(w, sharding.NamedSharding(mesh, cut))

    return [{name: place(name, w) for name, w in each.items()} for each in layers]


def measure(
    M: int, both: dict[str, list[Weights]], counts: Sequence[int], compiler_options: dict[str, Any] | None = None
) -> list[Row]:
    """All programs for M rows; RuntimeError where a result is wrong."""
    x = jax.random.normal(jax.random.key(M), (M, HIDDEN), jnp.bfloat16)
    rows: list[Row] = []
    expected: dict[str, Any] = {}
    for count in counts:
        mesh = sharding.Mesh(numpy.asarray(jax.devices()[:count]), (_AXIS,))
        for parallel in (TENSOR, BATCH) if count > 1 else (TENSOR,):
            spec = (_AXIS, None) if parallel == BATCH else ()
            placed_x = jax.device_put(x, sharding.NamedSharding(mesh, sharding.PartitionSpec(*spec)))
            programs = {
                name: Program(forward, placed_x, placed(both[name], mesh, parallel), compiler_options)
                for name in (OURS, DENSE)
            }
            for name, times in sampled(programs).items():
                result = numpy.asarray(programs[name].result).astype(numpy.float64)
                first = expected.setdefault(name, result)
                error = relative_error(result, first)
                if not error < _TOLERANCE:
                    what = f"{name}, {parallel} parallel, {count} GPUs, M={M}"
                    raise RuntimeError(f"{what}: the result is {error:.3g} from that of one GPU.")
                us, *spread = times
                calls = programs[name].calls if name == OURS else None
                rows.append(Row(M, count, parallel if count > 1 else ONE, name, us, spread, calls, error))
            del programs
    return rows


def show(rows: Sequence[Row], console: Console) -> None:
    """A table."""
    table = Table(title="microseconds per step of all decoder layers' linear layers", box=box.SIMPLE_HEAD)
    for heading in ("M", "GPUs", "parallel", "ours", "of one GPU", "bfloat16", "of one GPU", "Python calls", "error"):
        table.add_column(heading, justify="left" if heading == "parallel" else "right")
    find = {(row.M, row.devices, row.parallel, row.weights): row for row in rows}
    for (M, count, parallel, name), ours in find.items():
        if name == OURS:
            dense = find[M, count, parallel, DENSE]
            one, one_dense = find[M, 1, ONE, OURS], find[M, 1, ONE, DENSE]
            table.add_row(
                *(str(M), str(count), parallel, f"{ours.us:.0f}", f"{one.us / ours.us:.2f}x"),
                *(f"{dense.us:.0f}", f"{one_dense.us / dense.us:.2f}x", str(ours.handler_calls), f"{ours.error:.1e}"),
            )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write JSON if asked to. The exit code is 1 without a GPU."""
    parser = report.parser("jax_scaling", __doc__, LAYERS, M_VALUES)
    parser.add_argument(
        "--compiler-option", action="append", default=[], metavar="NAME=VALUE", help="of XLA, for all programs"
    )
    options = parser.parse_args(arguments)
    reason = unavailable()
    if reason is not None:
        print(reason)
        return 1
    counts = [count for count in (1, 2, 4, 8) if count <= len(jax.devices())]
    chosen = {name: int(value) for name, value in (each.split("=") for each in options.compiler_option)}
    shapes = {name: shape for name, (shape, _) in MATRICES.items()}
    both = weights(options.layers, shapes)
    rows: list[Row] = []
    for M in options.m or M_VALUES:
        rows += measure(M, both, counts, chosen)
    show(rows, report.terminal())
    fields = {"layers": options.layers, "shapes": shapes, "format": "int4", "group_size": 128}
    fields |= {"compiler_options": chosen, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    report.write_rows(options.output, rows, **fields)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    sys.exit(main())
