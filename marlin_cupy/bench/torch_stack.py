"""The linear layers of a whole model in PyTorch: ours against float16 torch.nn.Linear, eager, captured and compiled.

32 decoder layers, see ``stack``. Weights are random. Both stacks run the same code, in one process, in turns::

    python -m marlin_cupy.bench.torch_stack --output torch_stack.json

A time is that of the whole stack for M rows: what the GPU takes, or the host where it is slower.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from marlin_cupy.bench import report
from marlin_cupy.bench.stack import GAIN, LAYERS, M_VALUES, TOLERANCE, Widths
from marlin_cupy.device import gpu_count, import_cupy, no_gpu
from marlin_cupy.integrations.torch import Linear
from marlin_cupy.progress import bar
from marlin_cupy.timing import EventTimer, Replay, Sampling, Summary, interleave

torch: Any = importlib.import_module("torch")

SAMPLING = Sampling(sample_ms=40.0)
_CAPTURED = "CUDA graph"
_COMPILED = {"torch.compile": "default", "reduce-overhead": "reduce-overhead"}
OURS, DENSE = "marlin_cupy", "float16"


@dataclass(frozen=True)
class Row:
    """The whole stack for M rows, microseconds; ``mode`` is how PyTorch runs it."""

    M: int
    mode: str
    us: dict[str, float]
    spread: dict[str, list[float]]
    error: float


class Call:
    """A Replay of a function."""

    launches = 1

    def __init__(self, call: Callable[[], Any]) -> None:
        self.replay = call


def stacks(widths: Widths, layers: int, device: str, format: str, group_size: int | None) -> dict[str, Any]:
    """The same weights twice, one torch.nn.Sequential of [qkv, o, gate and up, down] per contender."""
    generator = torch.Generator(device).manual_seed(0)
    found: dict[str, list[Any]] = {OURS: [], DENSE: []}
    with bar("quantizing", layers, device != "cpu") as begin:
        for index in range(layers):
            begin(f"layer {index}")
            for K, N in widths.shapes.values():
                dense = torch.nn.Linear(K, N, bias=False, dtype=torch.float16, device=device).requires_grad_(False)
                dense.weight.normal_(0, GAIN * K**-0.5, generator=generator)
                found[DENSE].append(dense)
                found[OURS].append(Linear.from_linear(dense, format, group_size))
    return {name: torch.nn.ModuleList(modules) for name, modules in found.items()}


def forward(modules: Any, x: Any) -> Any:
    """All layers, one after the other."""
    for first in range(0, len(modules), 4):
        qkv, o, gate_up, down = (modules[first + index] for index in range(4))
        x = x + o(qkv(x)[:, : x.shape[1]])
        gate, up = gate_up(x).chunk(2, -1)
        x = x + down(torch.nn.functional.silu(gate) * up)
    return x


def modes(modules: Any, x: Any) -> dict[str, Callable[[], Any]]:
    """Ways to run ``forward``, warmed up; each returns the result."""

    def eager() -> Any:
        return forward(modules, x)

    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        y = eager()

    def captured() -> Any:
        graph.replay()
        return y

    found = {"eager": eager, _CAPTURED: captured}
    for name, mode in _COMPILED.items():
        found[name] = compiled(modules, x, mode)
        for _ in range(3):  # compiles, warms up, records
            found[name]()
    return found


def compiled(modules: Any, x: Any, mode: str) -> Callable[[], Any]:
    """``forward`` by torch.compile, for x of this very shape."""
    function = torch.compile(forward, fullgraph=True, dynamic=False, mode=mode)

    def call() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return function(modules, x)

    return call


def measure(both: dict[str, Any], M: int, widths: Widths, sampling: Sampling = SAMPLING) -> list[Row]:
    """All modes of both stacks at one M, in turns; RuntimeError where a result is wrong."""
    torch.compiler.reset()
    generator = torch.Generator("cuda").manual_seed(M)
    x = torch.randn((M, widths.hidden), dtype=torch.float16, device="cuda", generator=generator)
    calls: dict[str, Replay] = {}
    errors: dict[str, float] = {}
    expected = forward(both[DENSE], x).float()
    for name, modules in both.items():
        for mode, call in modes(modules, x).items():
            error = float((call().float() - expected).norm() / expected.norm())
            if not error < TOLERANCE:
                raise RuntimeError(f"{name}, {mode}, M={M}: the result is {error:.3g} from that of float16 weights.")
            calls[f"{name}/{mode}"], errors[f"{name}/{mode}"] = Call(call), error
    times = interleave(calls, EventTimer(import_cupy("the benchmark").cuda.Stream.null), sampling)
    return [row(M, mode, times, errors[f"{OURS}/{mode}"]) for mode in ("eager", _CAPTURED, *_COMPILED)]


def row(M: int, mode: str, times: dict[str, Summary], error: float) -> Row:
    """Both contenders of a mode."""
    of = {name: times[f"{name}/{mode}"] for name in (OURS, DENSE)}
    return Row(
        M,
        mode,
        {name: each.median for name, each in of.items()},
        {name: [each.p10, each.p90] for name, each in of.items()},
        error,
    )


def show(rows: Sequence[Row], console: Console) -> None:
    """A table."""
    table = Table(title="microseconds for the linear layers of all decoder layers", box=box.SIMPLE_HEAD)
    for heading in ("M", "mode", "ours", "float16", "times faster", "error"):
        table.add_column(heading, justify="left" if heading == "mode" else "right")
    for each in rows:
        ours, dense = each.us[OURS], each.us[DENSE]
        table.add_row(str(each.M), each.mode, f"{ours:.0f}", f"{dense:.0f}", f"{dense / ours:.2f}", f"{each.error:.1e}")
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write JSON if asked to. The exit code is 1 without a GPU."""
    parser = report.parser("torch_stack", __doc__, LAYERS, M_VALUES)
    parser.add_argument("--format", default="int4")
    parser.add_argument("--group-size", type=int, default=None)
    options = parser.parse_args(arguments)
    if gpu_count() == 0 or not torch.cuda.is_available():
        print(no_gpu("The benchmark"))
        return 1
    widths, rows = Widths(), []
    with torch.no_grad():
        both = stacks(widths, options.layers, "cuda", options.format, options.group_size)
        for M in options.m or M_VALUES:
            rows += measure(both, M, widths)
    show(rows, report.terminal())
    spec = both[OURS][0].spec
    report.write_rows(
        options.output,
        rows,
        layers=options.layers,
        shapes=list(widths.shapes.values()),
        format=spec.format,
        group_size=spec.group_size,
        sampling=str(SAMPLING),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
