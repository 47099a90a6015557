"""What the benchmark leaves behind: a table in the terminal, a JSON file, two plots."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import marlin_cupy
from marlin_cupy.bench.contenders import CUBLAS, FLOOR, HUMMING, OURS, TINYGEMM
from marlin_cupy.device import gpu, installed
from marlin_cupy.errors import DeviceError, MissingDependencyError

WIDTH = 100
#: How ours and the floor are launched, as in the results.
PLAIN, DEPENDENT = "plain", "dependent"
_MOST_TICKS = 8
_PEERS = (TINYGEMM, HUMMING)
_LABELS = {OURS: "ours", FLOOR: "floor", CUBLAS: "cuBLAS"}
_COLORS = {FLOOR: "#9a9a9a", CUBLAS: "#4c72b0", TINYGEMM: "#dd8452", HUMMING: "#55a868"}
_OUR_COLORS = ("#c1272d", "#7b3294", "#b8860b", "#008080")
_PANELS_PER_ROW = 4
_PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")


@dataclass(frozen=True)
class Row:
    """One cell: a layer at one M in one format. Times in microseconds per multiplication.

    Attributes:
        name: of the layer.
        launch: "plain", or "dependent" for programmatic dependent launch.
        us: median per contender.
        spread: [p10, p90] per contender.
        error: relative Frobenius error of ours against float64 on the dequantized weights.
        errors: that of every contender that computes.
        kernel, config: which of our kernels ran, and how.
        details: configurations of other contenders where they are known.
        cold: whether the weight copies of ours push each other out of L2.
        wrong: contenders whose check failed; they have no time.
        skipped: contenders that sat out, with the reason.
        options: of the format, where it has some.
        weight_bytes: what ours and the floor read; None in files from before it was kept.
    """

    K: int
    N: int
    M: int
    name: str
    format: str
    group_size: int
    dtype: str
    launch: str
    us: dict[str, float]
    spread: dict[str, list[float]]
    error: float | None
    kernel: str
    config: str
    errors: dict[str, float] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    cold: bool = True
    wrong: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    weight_bytes: int | None = None

    @property
    def weight(self) -> str:
        """``int4:128``, ``nf4:64:search=mse``."""
        return ":".join(
            [self.format, str(self.group_size), *(f"{name}={value}" for name, value in self.options.items())]
        )


@dataclass(frozen=True)
class Report:
    """Everything that a run of the benchmark found."""

    header: dict[str, Any]
    rows: list[Row]

    def save(self, path: Path) -> list[Path]:
        """Write JSON; returns the file."""
        write_json(path, {"header": self.header, "rows": [dataclasses.asdict(row) for row in self.rows]})
        return [path]

    @staticmethod
    def load(path: Path) -> Report:
        """Read what :meth:`save` wrote; ValueError where it is something else."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return Report(dict(found["header"]), [Row(**row) for row in found["rows"]])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no benchmark results ({error!r}).") from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content``, not-a-number as null; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_rows(path: Path | None, rows: Iterable[Any], **fields: Any) -> None:
    """Write ``rows``, dataclasses, below a header with ``fields``; nothing where ``path`` is None."""
    if path is not None:
        write_json(path, {"header": header(**fields), "rows": [dataclasses.asdict(row) for row in rows]})


def terminal() -> Console:
    """Where results are shown."""
    return Console(width=WIDTH, highlight=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


# ---- header


def parser(
    module: str, about: str | None, layers: int | None = None, m_values: Sequence[int] = ()
) -> argparse.ArgumentParser:
    """What every benchmark takes, --output; with ``m_values`` also --m, and where it is of a whole model, --layers."""
    found = argparse.ArgumentParser(
        prog=f"python -m marlin_cupy.bench.{module}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--output", type=Path, help="JSON file")
    if m_values:
        found.add_argument("--m", type=int, **several(m_values, "rows of x"))
    if layers is not None:
        found.add_argument("--layers", type=int, default=layers)
    return found


def several(default: Iterable[Any], about: str) -> dict[str, Any]:
    """Of an argument that takes several values, ``--m 1 16``, or is repeated. None, for ``default``, if not given."""
    words = f"{about}; {' '.join(map(str, default))} if not given"
    return {"nargs": "+", "action": "extend", "help": words}


def header(**fields: Any) -> dict[str, Any]:
    """What a result has to be read with: the machine, the software, the command; and ``fields``."""
    found: dict[str, Any] = {
        "gpu": _gpu(),
        "driver": _driver(),
        "versions": {
            "marlin_cupy": marlin_cupy.__version__,
            "python": platform.python_version(),
            **{name: version for name, version in installed().items() if version is not None},
        },
        "commit": _commit(),
        "command": command(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return found | fields


def command(arguments: Sequence[str]) -> str:
    """The command line, without the folder that the program lies in."""
    program = Path(arguments[0])
    if program.suffix != ".py" or "marlin_cupy" not in program.parts[:-1]:
        return shlex.join([program.name, *arguments[1:]])
    folders = program.parts[:-1]
    package = folders[len(folders) - 1 - folders[::-1].index("marlin_cupy") :]
    module = ".".join([*package, program.stem]).removesuffix(".__main__")
    return shlex.join(["python", "-m", module, *arguments[1:]])


def _gpu() -> dict[str, Any] | None:
    """The first one; None where there is none, as for a comparison of machine code."""
    try:
        return dataclasses.asdict(gpu(0))
    except (DeviceError, MissingDependencyError):
        return None


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0].strip() if found else None


def _commit() -> str | None:
    """Commit of the checkout that this package lies in, "-dirty" with changes; None where it is installed."""
    package = Path(marlin_cupy.__file__).resolve().parent
    top = _output(["git", "-C", str(package), "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != package.parent:
        return None
    return _output(["git", "-C", str(package), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"])


def _output(arguments: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing or fails."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


# ---- table


def show(report: Report, console: Console) -> None:
    """One table per format and way to launch, at most WIDTH wide, then what could not be measured and why."""
    tables = groups(report.rows, lambda row: (row.format, row.group_size, row.dtype, row.launch))
    for (format, group_size, dtype, launch), rows in tables:
        title = f"{format}, group size {group_size}, {dtype}, microseconds"
        console.print(_table(rows, f"{title}{_launched(launch)}"))
    for line in _footnotes(report):
        console.print(Text(line))


def _table(rows: Sequence[Row], title: str) -> Table:
    peers = [peer for peer in _PEERS if any(peer in row.us or peer in row.wrong for row in rows)]
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("layer", no_wrap=True)
    for heading in ("M", "ours", "floor", "cuBLAS", *peers, "ours / floor", "cuBLAS / ours"):
        table.add_column(heading, justify="right")
    for _, layer in groups(rows, lambda row: (row.name, row.K, row.N)):
        for index, row in enumerate(layer):
            label = (row.name, f"{row.K}x{row.N}")[index] if index < 2 else ""
            label = f"{row.name} {row.K}x{row.N}" if len(layer) == 1 else label
            times = [_cell(row, name) for name in (OURS, FLOOR, CUBLAS, *peers)]
            ratios = [_ratio(row, OURS, FLOOR), _ratio(row, CUBLAS, OURS)]
            table.add_row(label, str(row.M), *times, *ratios, end_section=index == len(layer) - 1)
    return table


def _cell(row: Row, name: str) -> Text:
    if name in row.wrong:
        return Text("wrong", style="bold red")
    if name not in row.us:
        return Text("-", style="dim")
    return Text(microseconds(row.us[name]), style="bold" if name == OURS else "")


def microseconds(value: float) -> str:
    """Three or four digits."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _ratio(row: Row, above: str, below: str) -> str:
    return ratio(row.us.get(above), row.us.get(below))


def ratio(above: float | None, below: float | None) -> str:
    """Two digits after the point; a dash where there is nothing to divide."""
    return "-" if above is None or below is None else f"{above / below:.2f}"


def _footnotes(report: Report) -> list[str]:
    lines = []
    spreads = [(_spread(row), row) for row in report.rows if OURS in row.us]
    if spreads:
        widest, row = max(spreads, key=lambda item: item[0])
        lines.append(f"Spread of ours, p10 to p90: at most {widest:.1%} of the median ({row.name}, M = {row.M}).")
    if any(not row.cold for row in report.rows):
        names = ", ".join(dict.fromkeys(row.name for row in report.rows if not row.cold))
        lines.append(f"Weights stayed in L2, so times are those of a warm cache: {names}.")
    described = report.header.get("contenders", {}).items()
    lines += [f"{_LABELS.get(name, name)}: {description}." for name, description in described]
    skipped = dict.fromkeys((name, reason) for row in report.rows for name, reason in row.skipped.items())
    lines += [f"Without {_LABELS.get(name, name)}: {reason}." for name, reason in skipped]
    for row in report.rows:
        for name in row.wrong:
            error = row.errors.get(name, math.nan)
            lines.append(f"WRONG: {name} on {row.name}, M = {row.M}, {row.format}: relative error {error:.2e}.")
    return lines


def _spread(row: Row) -> float:
    p10, p90 = row.spread[OURS]
    return (p90 - p10) / row.us[OURS]


def groups(rows: Iterable[Row], key: Any) -> list[tuple[Any, list[Row]]]:
    """Rows by key, in order of first appearance."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return list(found.items())


# ---- plots


def plot_times(report: Report, path: Path) -> None:
    """A panel per layer: time against M, both on logarithmic axes."""
    layers = groups(report.rows, lambda row: (row.name, row.K, row.N))
    columns = min(_PANELS_PER_ROW, max(1, len(layers)))
    lines = -(-len(layers) // columns)
    size = (max(6.4, 3.6 * columns + 0.6), 3.0 * lines + 1.2)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes: list[Axes] = list(figure.subplots(max(1, lines), columns, squeeze=False).flat)
    for panel, ((name, K, N), rows) in zip(axes, layers, strict=False):
        _plot_layer(panel, rows)
        panel.set_title(f"{name}   K={K} N={N}", fontsize=9)
        _scale(panel, sorted({row.M for row in rows}))
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(_PLAIN)
    for panel in axes[len(layers) :]:
        panel.set_axis_off()
    for panel in axes[::columns]:
        panel.set_ylabel("microseconds")
    handles = {
        label: handle for panel in axes for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=2 * columns, frameon=False, fontsize=9
    )
    figure.suptitle(_title(report), fontsize=10)
    _write(figure, path)


def _plot_layer(panel: Axes, rows: Sequence[Row]) -> None:
    formats = groups(rows, lambda row: (row.format, row.group_size, row.launch))
    several = len(formats) > 1
    for color, ((format, group_size, launch), ours) in zip(itertools.cycle(_OUR_COLORS), formats, strict=False):
        label = f"marlin_cupy, {format}, group size {group_size}" + _launched(launch)
        _line(panel, ours, OURS, label, color=color, marker="o", linewidth=2.2, zorder=5)
    for name in (FLOOR, CUBLAS, *_PEERS):
        label = {FLOOR: "read floor", CUBLAS: f"cuBLAS {rows[0].dtype}"}.get(name, name)
        dashes = "--" if name == FLOOR else "-"
        first = f" ({formats[0][0][0]})" if several and name != CUBLAS else ""
        _line(panel, formats[0][1], name, label + first, color=_COLORS[name], linestyle=dashes, marker=".")


def _launched(launch: str) -> str:
    return f", {launch}" if launch != PLAIN else ""


def _line(panel: Axes, rows: Sequence[Row], name: str, label: str, **style: Any) -> None:
    points = sorted((row.M, row.us[name]) for row in rows if name in row.us)
    if points:
        panel.plot(*zip(*points, strict=True), label=label, **style)


def plot_speedup(report: Report, path: Path) -> None:
    """cuBLAS over ours against M, a line per layer and format."""
    figure = Figure(figsize=(8.4, 5.0), dpi=120, layout="constrained")
    panel = figure.subplots()
    several = len({row.format for row in report.rows}) > 1
    for (name, format, launch), rows in groups(report.rows, lambda row: (row.name, row.format, row.launch)):
        points = sorted((row.M, row.us[CUBLAS] / row.us[OURS]) for row in rows if OURS in row.us and CUBLAS in row.us)
        if points:
            label = (f"{name}, {format}" if several else name) + _launched(launch)
            panel.plot(*zip(*points, strict=True), marker=".", label=label, linestyle="-" if "70b" in name else "--")
    panel.axhline(1.0, color="#9a9a9a", linewidth=1)
    _scale(panel, sorted({row.M for row in report.rows}))
    panel.set_ylim(bottom=0)
    panel.set_ylabel("times faster than cuBLAS")
    if panel.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    figure.suptitle(_title(report), fontsize=10)
    _write(figure, path)


def _title(report: Report) -> str:
    dtypes = ", ".join(dict.fromkeys(row.dtype for row in report.rows))
    return f"{report.header.get('gpu', {}).get('name', 'GPU')}, {dtypes} activations, cold weights, CUDA graphs"


def _scale(panel: Axes, ms: Sequence[int]) -> None:
    """M on a logarithmic axis, a tick per value, or per second value where they would not fit."""
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_locator(FixedLocator(ms if len(ms) <= _MOST_TICKS else ms[::2]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(_PLAIN)
    panel.tick_params(labelsize=8)
    panel.set_xlabel("M, rows of x", fontsize=9)
    panel.grid(True, which="major", color="#e5e5e5", linewidth=0.8)


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def save_all(report: Report, output: Path) -> list[Path]:
    """The JSON file and both plots: in the folder ``output``, or beside ``output`` where it names a .json file."""
    stem = output.with_suffix("") if output.suffix == ".json" else output / "bench"
    times, speedup = (stem.with_name(f"{stem.name}_{what}.png") for what in ("times", "speedup"))
    data = stem.with_name(f"{stem.name}.json")
    report.save(data)
    plot_times(report, times)
    plot_speedup(report, speedup)
    return [data, times, speedup]
