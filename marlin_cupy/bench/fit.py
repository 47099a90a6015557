"""Fit the numbers of kernels/measured to times of ``bench.configs``.

Fits on some layers and reports on others what the fitted numbers choose: how much longer that takes than the best
candidate that was measured, on average and at worst, before and after the fit::

    python -m marlin_cupy.bench.fit times.json --fit decode --layer 8b_qkv --layer 70b_down
    python -m marlin_cupy.bench.fit times.json --fit costs --fit tiles --kernel sm90_wgmma --layer 8b_o --write

``decode`` fits the factors of all formats and dtypes in the file, but that of int4 with float16, which is 1, given the
costs; ``fine`` that of fine granules; ``costs`` and ``tiles`` a kernel's own numbers, to int4 with float16 and a group
size of 128 alone. What is minimized is the mean square of log(predicted / measured), in which a candidate that
takes twice as long as the best of its cell weighs half as much: Gauss and Newton's method, damped, over the logarithms
of the numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console
from rich.table import Table

from marlin_cupy.bench import report
from marlin_cupy.bench.configs import Times, load, modelled
from marlin_cupy.device import Gpu
from marlin_cupy.kernels import Problem, measured
from marlin_cupy.kernels.cuda import ProductKernel
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.scalars import F16

#: Where a number is in a file of kernels/measured: keys, and places in lists.
Place = tuple[str | int, ...]
Array = Any

WHATS = DECODE, FINE, COSTS, TILES = "decode", "fine", "costs", "tiles"
#: What is no time: the shape of a block, and the bounds within which numbers hold.
_NO_COSTS = ("config", "shapes", "up_to", "beside_bytes")
#: The format and dtype that costs are of, and the granules that are not fine for it.
_BASE = "int4", F16.name, 128

_STEP = 1e-3  # of a logarithm, for derivatives
_LARGEST_STEP = 0.5
_MOST_STEPS = 40
_ENOUGH = 1e-9
#: A number in a TOML file, where a value can be; comments and text come first, so that none is found in them.
_NUMBER = re.compile(r"#[^\n]*|\"[^\"\n]*\"|(?<=[=\[,])(\s*)(-?\d[\d_]*(?:\.\d+)?(?:[eE][-+]?\d+)?)(?=\s*[,\]}#\n])")


@dataclass(frozen=True)
class Cell:
    """Times of one kernel's candidates for one problem, by their keys."""

    layer: str
    kernel: ProductKernel
    problem: Problem
    us: dict[str, float]

    def predicted(self, known: Measured) -> dict[str, float]:
        """What ``known`` predicts for them."""
        rated = {each.key: each.predicted_us for each in self.kernel.rated(self.problem, known)}
        return {key: rated[key] for key in self.us}


@dataclass(frozen=True)
class Loss:
    """How much longer what is predicted to be best takes than the best: on average, and at worst.

    Attributes:
        off: the root mean square of log(predicted / measured).
    """

    cells: int
    mean: float
    worst: float
    off: float


def cells_of(times: Sequence[Times], on: Gpu, kernel: ProductKernel) -> list[Cell]:
    """The cells in which ``kernel`` was measured."""
    found = []
    for each in times:
        us = {key: value for key, value in each.us.items() if key.startswith(f"{kernel.name}:")}
        if us:
            found.append(Cell(each.name, kernel, each.problem(on), us))
    return found


def loss(cells: Sequence[Cell], known: Measured) -> Loss:
    """That of the choices that follow from ``known``."""
    losses, squares = [], []
    for cell in cells:
        predicted = cell.predicted(known)
        first = min(predicted, key=lambda key: predicted[key])
        losses.append(cell.us[first] / min(cell.us.values()) - 1)
        squares += [math.log(predicted[key] / us) ** 2 for key, us in cell.us.items()]
    return Loss(len(cells), sum(losses) / len(losses), max(losses), math.sqrt(sum(squares) / len(squares)))


# ---- the numbers


def numbers(table: Any, place: Place = ()) -> Iterator[tuple[Place, float]]:
    """All numbers of a table with their places, in the order of the file."""
    if isinstance(table, Mapping):
        for key, value in table.items():
            yield from numbers(value, (*place, key))
    elif isinstance(table, list):
        for index, value in enumerate(table):
            yield from numbers(value, (*place, index))
    elif isinstance(table, int | float) and not isinstance(table, bool):
        yield place, table


def places(known: Measured, kernel: ProductKernel, what: str, cells: Sequence[Cell]) -> list[Place]:
    """Those of the numbers that ``what`` fits: "decode", "fine", "costs" or "tiles"."""
    name, found = kernel.name, [place for place, _ in numbers(known.tables)]
    if what == DECODE:
        there = {(cell.problem.w.format, cell.problem.x.dtype) for cell in cells} - {_BASE[:2]}
        return [each for each in found if each[0] == "decode" and each[1:3] in there and each[3] == name]
    if what == FINE:
        return [each for each in found if each[:2] == ("fine_granules", name)]
    own = [each for each in found if each[0] == name and not set(each) & set(_NO_COSTS)]
    return [each for each in own if (each[-1] == "slab_ns") == (what == TILES)]


def are_base(cell: Cell) -> bool:
    """Whether costs and times of tiles can be fitted to it."""
    spec = cell.problem.w
    return (spec.format, cell.problem.x.dtype, spec.group_size) == _BASE


def changed(known: Measured, values: Mapping[Place, float]) -> Measured:
    """``known`` with other numbers at some places."""
    tables = copy.deepcopy(known.tables)
    for place, value in values.items():
        inner: Any = tables
        for key in place[:-1]:
            inner = inner[key]
        inner[place[-1]] = value
    return Measured(known.name, tables)


def written(text: str, values: Mapping[Place, float]) -> str:
    """The text of a file with other numbers at some places, and nothing else changed."""
    tables = tomllib.loads(text)
    there = dict(numbers(tables))
    at = [match for match in _NUMBER.finditer(text) if match[2] is not None]
    if [float(match[2].replace("_", "")) for match in at] != list(there.values()):
        raise ValueError("the order of the numbers is not that of their tables; keep the parts of a table together.")
    parts, end = [], 0
    for match, place in zip(at, there, strict=True):
        if place in values:
            parts += [text[end : match.start(2)], _digits(values[place])]
            end = match.end(2)
    return "".join([*parts, text[end:]])


def rounded(values: Mapping[Place, float]) -> dict[Place, float]:
    """As they are written: to four digits."""
    return {place: float(_digits(value)) for place, value in values.items()}


def _digits(value: float) -> str:
    return f"{float(f'{value:.4g}'):.10g}"


# ---- the fit


def fit(cells: Sequence[Cell], known: Measured, at: Sequence[Place]) -> dict[Place, float]:
    """The numbers at these places that predict the times of ``cells`` best, from those of ``known`` on.

    A number that no prediction depends on stays what it is.
    """
    there = dict(numbers(known.tables))
    logs = numpy.log([there[place] for place in at])
    weights = numpy.concatenate([[min(cell.us.values()) / us for us in cell.us.values()] for cell in cells]) ** 0.5

    def residuals(logs: Array) -> Array:
        now = changed(known, dict(zip(at, numpy.exp(logs).tolist(), strict=True)))
        off = [math.log(predicted / cell.us[key]) for cell in cells for key, predicted in cell.predicted(now).items()]
        return numpy.asarray(off) * weights

    left, damping = residuals(logs), 1e-3
    for _ in range(_MOST_STEPS):
        slopes = numpy.stack([(residuals(logs + _STEP * one) - left) / _STEP for one in numpy.eye(len(logs))], axis=1)
        square, before = slopes.T @ slopes, float(left @ left)
        while damping < 1e6:
            curvature = square + damping * numpy.diag(numpy.diag(square) + 1e-12)
            step = numpy.linalg.solve(curvature, -slopes.T @ left).clip(-_LARGEST_STEP, _LARGEST_STEP)
            attempt = residuals(logs + step)
            if float(attempt @ attempt) < before:
                logs, left, damping = logs + step, attempt, damping / 10
                break
            damping *= 10
        if before - float(left @ left) <= _ENOUGH * before:
            break
    return dict(zip(at, numpy.exp(logs).tolist(), strict=True))


def main() -> int:
    """Fit, print a table, write the numbers if asked to."""
    parser = report.parser("fit", __doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("times", type=Path, help="JSON file of python -m marlin_cupy.bench.configs")
    parser.add_argument("--fit", action="append", choices=WHATS, help="repeatable; decode if none")
    parser.add_argument("--kernel", action="append", default=[], help="repeatable; all that were measured if none")
    parser.add_argument("--layer", action="append", required=True, help="name of a layer to fit to, repeatable")
    parser.add_argument("--validate", action="append", help="name of a layer to report on; all others if none")
    parser.add_argument("--file", type=Path, help="of kernels/measured; that of the GPU that was measured if not given")
    parser.add_argument("--write", action="store_true", help="write the numbers to that file")
    options = parser.parse_args()
    on, times = load(options.times)
    path = options.file or file_of(on)
    text = path.read_text(encoding="utf-8")
    before = measured.parse(path.name, text)
    names = {each.name for each in times}
    others = options.validate or sorted(names - set(options.layer))
    if unknown := {*options.layer, *others} - names:
        parser.error(f"no times of {', '.join(sorted(unknown))}; the file has {', '.join(sorted(names))}.")
    if both := set(others) & set(options.layer):
        parser.error(f"{', '.join(sorted(both))} cannot be both fitted to and reported on; leave it out of one.")
    found: dict[Place, float] = {}
    table = Table("kernel", "layers", "cells", "loss before", "worst", "after", "worst", "off before", "after")
    for kernel in modelled(options.kernel):
        cells = cells_of(times, on, kernel)
        values: dict[Place, float] = {}
        for what in options.fit or [DECODE]:
            mine = [cell for cell in cells if cell.layer in options.layer]
            mine = [cell for cell in mine if are_base(cell)] if what in (COSTS, TILES) else mine
            at = places(before, kernel, what, mine)
            if mine and at:
                values |= fit(mine, changed(before, values), at)
        values = rounded(values)
        found |= values
        after = changed(before, values)
        for title, layers in (("fitted", options.layer), ("others", others)):
            part = [cell for cell in cells if cell.layer in layers]
            if part:
                one, two = loss(part, before), loss(part, after)
                shares = one.mean, one.worst, two.mean, two.worst, one.off, two.off
                table.add_row(kernel.name, title, str(len(part)), *(f"{100 * share:.2f} %" for share in shares))
    console = Console(width=report.WIDTH, highlight=False)
    console.print(table)
    there = dict(numbers(before.tables))
    for place, value in found.items():
        console.print(f"{'.'.join(map(str, place))} = {_digits(value)}  # was {there[place]:g}", markup=False)
    if options.output is not None:
        rows = [{"place": list(place), "value": value, "was": there[place]} for place, value in found.items()]
        header = {"gpu": dataclasses.asdict(on), "command": report.command(sys.argv), "others": others}
        report.write_json(options.output, {"header": header, "rows": rows})
    if options.write:
        path.write_text(written(text, found), encoding="utf-8")
        console.print(f"wrote {path}", markup=False)
    return 0


def file_of(on: Gpu) -> Path:
    """The file of a GPU of that name; ValueError where there is none."""
    for path in measured.files():
        if on.name.startswith(measured.parse(path.name, path.read_text(encoding="utf-8")).gpu.names):
            return path
    near = measured.of(on).name
    raise ValueError(f"kernels/measured has no file of {on.name}; copy {near}, write its [gpu], and pass it as --file.")


if __name__ == "__main__":
    sys.exit(main())
