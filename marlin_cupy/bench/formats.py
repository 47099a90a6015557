"""Formats beside one another, and each beside its read floor: cold weights in CUDA graphs, as ``bench`` times them.

All formats of a layer and M take turns, so that they meet the same clocks::

    python -m marlin_cupy.bench.formats --output formats.json
    python -m marlin_cupy.bench.formats --formats int4:128 int4:32 nf4::search=mse --m 1 16 --layers o=4096x4096

A format is NAME[:GROUP_SIZE[:OPTION=VALUE ...]]; options are further arguments of ``quantize``. The floor of a format
reads exactly its bytes. "per byte" divides microseconds per byte by those of the first int4 of the same run: a format
that is as fast as int4 for what it reads has 1.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from marlin_cupy import formats as registry
from marlin_cupy.bench import report, shapes
from marlin_cupy.bench.contenders import FLOOR, OURS, Ours, ReadFloor, Setup
from marlin_cupy.bench.report import DEPENDENT, PLAIN, Report, Row
from marlin_cupy.bench.run import PROTOCOL, Field, measure, reported
from marlin_cupy.bench.shapes import Shape
from marlin_cupy.device import gpu, gpu_count, import_cupy, no_gpu
from marlin_cupy.progress import bar
from marlin_cupy.quantizing import quantize
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.timing import EventTimer, Sampling

#: Gate and up of Llama 3 8B and 70B.
LAYERS = tuple(shape for shape in shapes.LLAMA if shape.name in ("8b_gate_up", "70b_gate_up"))
M_VALUES = (1, 8, 16, 64)
REFERENCE = "int4"
FORMATS = (REFERENCE, *(name for name in registry.names() if name != REFERENCE))


class Weight(NamedTuple):
    """A way to quantize a layer."""

    format: str
    group_size: int
    options: dict[str, Any]


def parse(text: str) -> Weight:
    """``NAME[:GROUP_SIZE[:OPTION=VALUE ...]]``, tried on a small weight; ValueError or TypeError for what is none."""
    name, *rest = text.split(":")
    group, *options = rest or [""]
    default = registry.get(name).default_group_size
    if not re.fullmatch(r"(-?\d+)?", group) or not all("=" in option for option in options):
        raise ValueError(f"format is {text!r}; use NAME[:GROUP_SIZE[:OPTION=VALUE ...]], for instance int4:128.")
    named = {option: _value(value) for option, _, value in (each.partition("=") for each in options)}
    found = Weight(name, int(group) if group else default, named)
    quantize(numpy.zeros((1, 1), dtype=numpy.float32), found.format, found.group_size, **found.options)
    return found


def _value(text: str) -> Any:
    """As JSON writes it: a number, true, false, null; else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def run(
    layers: Sequence[Shape],
    ms: Sequence[int],
    weights: Sequence[Weight],
    dtypes: Sequence[str],
    launches: Sequence[str],
    sampling: Sampling,
    output: Path | None,
) -> int:
    """Measure, show, and write ``output``, also when interrupted. The exit code is 1 where a result was wrong."""
    contenders = {OURS: "marlin_cupy.matmul, out= given", FLOOR: ReadFloor.description}
    found = Report(report.header(protocol=PROTOCOL.format(sampling), contenders=contenders), [])
    cupy = import_cupy("the benchmark")
    with (
        reported(found, show, Report.save, output),
        bar("timing", len(layers) * len(dtypes) * len(ms)) as begin,
        cupy.cuda.Device(0),
        cupy.cuda.Stream(non_blocking=True) as stream,
    ):
        time = EventTimer(stream)
        for shape in layers:
            for dtype in dtypes:
                setups = [Setup(shape, name, group, dtype, gpu(0), stream, options=o) for name, group, o in weights]
                ours = [Ours(setup) for setup in setups]
                fields = [Field(each, [own, ReadFloor(each, own)]) for each, own in zip(setups, ours, strict=True)]
                for m in ms:
                    begin(f"{shape.name} {dtype} M = {m}")
                    for launch in launches:
                        able = [launch == PLAIN or own.has_dependent_launch(m) for own in ours]
                        found.rows.extend(measure(list(compress(fields, able)), m, launch, time, sampling))
                del ours, fields  # the next ones need their memory
                cupy.get_default_memory_pool().free_all_blocks()
    return 1 if any(row.wrong for row in found.rows) else 0


# ---- table


def show(found: Report, console: Console) -> None:
    """A table per layer, dtype and way to launch: for every M a line per format; then what is wrong with them."""
    for (name, K, N, dtype, launch), rows in report.groups(
        found.rows, lambda row: (row.name, row.K, row.N, row.dtype, row.launch)
    ):
        console.print(_table(rows, f"{name} {K}x{N}, {dtype}, {launch} launches, microseconds"))
    for row in found.rows:
        where = f"{row.weight} on {row.name}, {row.dtype}, M = {row.M}"
        if row.wrong:
            console.print(Text(f"WRONG: {where}: relative error {row.errors[OURS]:.2e}."))
        if not row.cold:
            console.print(Text(f"Warm: the weights stayed in L2, {where}."))


def _table(rows: Sequence[Row], title: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("M", justify="right")
    table.add_column("format", overflow="fold")
    for heading in ("MB", "ours", "floor", "/ floor", "/ int4", "per byte", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    for m, cells in report.groups(rows, lambda row: row.M):
        reference = next((row for row in cells if row.format == REFERENCE), None)
        for index, row in enumerate(cells):
            us = row.us.get(OURS)
            table.add_row(
                str(m) if index == 0 else "",
                Text(row.weight),  # ":-1:" is an emoji to rich
                "-" if row.weight_bytes is None else f"{row.weight_bytes / 1e6:.1f}",
                "wrong" if us is None else report.microseconds(us),
                report.microseconds(row.us[FLOOR]),
                report.ratio(us, row.us[FLOOR]),
                report.ratio(us, None if reference is None else reference.us.get(OURS)),
                report.ratio(_us_per_byte(row), None if reference is None else _us_per_byte(reference)),
                "-" if row.error is None else f"{row.error:.1e}",
                row.kernel,
                end_section=index == len(cells) - 1,
            )
    return table


def _us_per_byte(row: Row) -> float | None:
    return row.us[OURS] / row.weight_bytes if OURS in row.us and row.weight_bytes else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, and write JSON if asked to. The exit code is 1 without a GPU and where a result was wrong."""
    parser = report.parser("formats", __doc__, m_values=M_VALUES)
    parser.add_argument("--layers", metavar="NAME=KxN", **report.several(LAYERS, "layers"))
    parser.add_argument("--formats", metavar="FORMAT", **report.several(FORMATS, "formats"))
    parser.add_argument("--dtypes", choices=HALF_NAMES, **report.several(HALF_NAMES, "of activations and scales"))
    parser.add_argument("--launches", choices=(PLAIN, DEPENDENT), **report.several([PLAIN], "ways to launch"))
    parser.add_argument("--sample-ms", type=float, default=Sampling.sample_ms, help="length of a sample")
    options = parser.parse_args(arguments)
    ms = options.m or M_VALUES
    if min(ms) < 1:
        parser.error(f"m is {min(ms)}; use 1 or more rows.")
    try:
        layers = [shapes.parse(text) for text in options.layers or map(str, LAYERS)]
        weights = [parse(text) for text in options.formats or FORMATS]
        sampling = Sampling(sample_ms=options.sample_ms)
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    if gpu_count() == 0:
        print(no_gpu("The benchmark"))
        return 1
    dtypes, launches = options.dtypes or HALF_NAMES, options.launches or [PLAIN]
    return run(layers, ms, weights, dtypes, launches, sampling, options.output)


if __name__ == "__main__":
    sys.exit(main())
