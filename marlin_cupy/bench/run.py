"""Run the benchmark: every layer, format and M, all contenders of a cell in turns."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from marlin_cupy import formats as registry
from marlin_cupy import kernels
from marlin_cupy.bench import contenders_torch, report
from marlin_cupy.bench import shapes as layers
from marlin_cupy.bench.contenders import (
    CUBLAS,
    FLOOR,
    HUMMING,
    OURS,
    TINYGEMM,
    Contender,
    CupyCublas,
    Ours,
    ReadFloor,
    Setup,
    UnavailableError,
)
from marlin_cupy.bench.report import DEPENDENT, PLAIN, Report, Row
from marlin_cupy.bench.shapes import Shape
from marlin_cupy.device import gpu, gpu_count, import_cupy, no_gpu
from marlin_cupy.timing import QUICK_SAMPLING, EventTimer, Replay, Run, Sampling, Summary, Timer, interleave, prepare

PROTOCOL = (
    "CUDA graphs over weight copies that together exceed four times the L2 cache and 200 MB; {}; each contender is "
    "checked on the graph that was timed, with fresh inputs and NaN in its output, against float64 (PyTorch: float32) "
    "on the weights that it multiplies"
)


def run(
    shapes: list[tuple[str, int, int]] | None,
    ms: list[int] | None,
    formats: list[str] | None,
    group_size: int | None,
    dtype: str,
    output: Path | None,
    quick: bool,
    launches: list[str] | None = None,
    sample_ms: float | None = None,
    batch_invariant: bool = False,
    kernel: str | None = None,
) -> int:
    """Measure, print a table, write files.

    Args:
        shapes: (name, K, N) of layers; those of Llama 3 8B and 70B if None.
        ms: rows of x; powers of two from 1 to 4096 if None.
        formats: weight formats; int4 if None.
        group_size: K per scale; the default of each format if None.
        dtype: of activations and scales, "float16" or "bfloat16".
        output: folder for bench.json, bench_times.png and bench_speedup.png, or a path that ends in .json and
            names all three; None writes nothing.
        quick: short samples and no humming; with two layers and three M, which it defaults to, less than a minute.
        launches: "plain" and "dependent", a row for each; plain if None. In dependent rows our kernel and the read
            floor are dependent launches, each behind one of its own; cells whose kernel has none are left out.
        sample_ms: length of a sample, 12 ms (6 if quick) if None. A GPU at its power limit needs a few hundred to
            settle at the clock that goes with what runs; contenders that take turns by 12 ms share one.
        batch_invariant: as in :func:`marlin_cupy.matmul`, for ours.
        kernel: name of the kernel that ours is, with its best predicted configuration; the one that matmul chooses
            if None.

    Returns:
        The exit code: 1 without a GPU or where a check failed, else 0.

    Raises:
        ValueError: a format, shape, group size, kernel or way to launch that does not exist, or a kernel that does
            not serve one of ``ms``.
    """
    kinds = list(dict.fromkeys(launches or [PLAIN]))
    if not set(kinds) <= {PLAIN, DEPENDENT}:
        raise ValueError(f"launch is {', '.join(kinds)}; use {PLAIN} or {DEPENDENT}.")
    names_of_kernels = [each.name for each in kernels.GEMM.kernels]
    if kernel is not None and kernel not in names_of_kernels:
        raise ValueError(f"kernel is {kernel!r}; use one of {', '.join(names_of_kernels)}.")
    sampling = QUICK_SAMPLING if quick else Sampling()
    if sample_ms is not None:
        sampling = dataclasses.replace(sampling, sample_ms=sample_ms)
    if gpu_count() == 0:
        print(no_gpu("The benchmark"))
        return 1
    chosen = [Shape(*shape) for shape in shapes] if shapes else list(layers.QUICK if quick else layers.LLAMA)
    m_values = sorted(set(ms or (layers.QUICK_M_VALUES if quick else layers.M_VALUES)))
    names = formats or ["int4"]
    group_sizes = {name: group_size or registry.get(name).default_group_size for name in names}

    cupy = import_cupy("the benchmark")
    found = Report(report.header(protocol=PROTOCOL.format(sampling), contenders={}), [])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        reported(found, report.show, report.save_all, output),  # also when interrupted: what was measured is kept
        Progress(*columns, transient=True) as progress,
        cupy.cuda.Device(0),
        cupy.cuda.Stream(non_blocking=True) as stream,
    ):
        task = progress.add_task("", total=len(chosen) * len(names) * len(m_values))
        for shape in chosen:
            for name in names:
                progress.update(task, description=f"{shape.name} {name}: weights")
                setup = Setup(shape, name, group_sizes[name], dtype, gpu(0), stream, batch_invariant, kernel)
                for m, rows in _layer(setup, m_values, kinds, sampling, quick, found.header["contenders"]):
                    found.rows.extend(rows)
                    progress.update(task, advance=1, description=f"{shape.name} {name}: M = {m}")
                contenders_torch.release_memory()
                cupy.get_default_memory_pool().free_all_blocks()
    return 1 if any(row.wrong for row in found.rows) else 0


@contextlib.contextmanager
def reported(
    found: Report,
    show: Callable[[Report, Console], None],
    save: Callable[[Report, Path], Iterable[Path]],
    output: Path | None,
) -> Iterator[None]:
    """Show whatever has been found at the end, and save it to ``output`` if that is given; ``save`` returns files."""
    try:
        yield
    finally:
        console = report.terminal()
        if found.rows:
            show(found, console)
            for path in save(found, output) if output is not None else ():
                console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _layer(
    setup: Setup,
    ms: Sequence[int],
    launches: Sequence[str],
    sampling: Sampling,
    quick: bool,
    descriptions: dict[str, str],
) -> Iterator[tuple[int, list[Row]]]:
    """Per M the rows of one layer in one format."""
    ours = Ours(setup)
    field = _field(setup, ours, ms, quick)
    descriptions.update({contender.name: contender.description for contender in field.contenders})
    time = EventTimer(setup.stream)
    for m in ms:
        kinds = [launch for launch in launches if launch == PLAIN or ours.has_dependent_launch(m)]
        yield m, [row for launch in kinds for row in measure([field], m, launch, time, sampling)]


def _field(setup: Setup, ours: Ours, ms: Sequence[int], quick: bool) -> Field:
    """All that can run on this layer, and for the others the reason why not."""
    found: list[Contender] = [ours, ReadFloor(setup, ours)]
    absent: dict[str, str] = {}
    for name in (CUBLAS, TINYGEMM, HUMMING):
        try:
            if name == CUBLAS:
                found.append(_cublas(setup))
            elif name == TINYGEMM:
                found.append(contenders_torch.Tinygemm(setup))
            elif quick:
                absent[name] = "its kernels take long to compile, and this is a quick run"
            else:
                found.append(contenders_torch.Humming(setup, ms))
        except Exception as error:  # a peer that fails, however it does, is a line of the report
            absent[name] = _reason(error)
    return Field(setup, found, absent)


def _cublas(setup: Setup) -> Contender:
    """Through PyTorch where it is installed, as most users meet it, else through CuPy."""
    try:
        return contenders_torch.TorchCublas(setup)
    except UnavailableError:
        return CupyCublas(setup)


@dataclasses.dataclass(frozen=True)
class Field:
    """Who is timed on a layer in one format, ours first; and why others are not."""

    setup: Setup
    contenders: Sequence[Contender]
    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A contender that is ready."""

    contender: Contender
    run: Run
    graph: Replay


def measure(fields: Sequence[Field], m: int, launch: str, time: Timer, sampling: Sampling) -> list[Row]:
    """A row per field, at one M, launched one way: prepare all contenders, time all of them in turns, check them."""
    ready = [_ready(field, m, launch, time, sampling) for field in fields]
    graphs = {(index, name): entry.graph for index, (entries, _) in enumerate(ready) for name, entry in entries.items()}
    times = interleave(graphs, time, sampling)
    return [
        _row(field, m, launch, entries, skipped, {name: times[index, name] for name in entries})
        for index, (field, (entries, skipped)) in enumerate(zip(fields, ready, strict=True))
    ]


def _ready(
    field: Field, m: int, launch: str, time: Timer, sampling: Sampling
) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Who can be timed, and why the others cannot."""
    entries: dict[str, _Entry] = {}
    skipped = dict(field.absent)
    for contender in field.contenders:
        reason = contender.refuses(m)
        if reason is None:
            try:
                run = contender.run(m, launch == DEPENDENT)
                entries[contender.name] = _Entry(contender, run, prepare(run, time, sampling))
            except Exception as error:
                if contender.name in (OURS, FLOOR):
                    raise
                reason = _reason(error)
        if reason is not None:
            skipped[contender.name] = reason
    return entries, skipped


def _row(
    field: Field,
    m: int,
    launch: str,
    entries: Mapping[str, _Entry],
    skipped: dict[str, str],
    times: Mapping[str, Summary],
) -> Row:
    """Check what was timed; what is wrong has no time."""
    setup, ours = field.setup, field.contenders[0]
    errors: dict[str, float] = {}
    wrong: list[str] = []
    for name, entry in entries.items():
        distance = entry.run.error(entry.graph)
        if distance is not None:
            errors[name] = distance
            if not distance <= entry.contender.tolerance(m):  # NaN is wrong too
                wrong.append(name)
    details = {name: entry.contender.details(m, launch == DEPENDENT) for name, entry in entries.items()}
    kernel, config = details.pop(OURS)
    return Row(
        K=setup.shape.K,
        N=setup.shape.N,
        M=m,
        name=setup.shape.name,
        format=setup.format,
        group_size=setup.group_size,
        dtype=setup.dtype,
        launch=launch,
        us={name: summary.median for name, summary in times.items() if name not in wrong},
        spread={name: [summary.p10, summary.p90] for name, summary in times.items() if name not in wrong},
        error=errors.get(OURS),
        kernel=kernel,
        config=config,
        errors=errors,
        details={name: text for name, (_, text) in details.items() if text},
        cold=ours.is_cold(setup.gpu.l2_bytes),
        wrong=wrong,
        skipped=skipped,
        options=dict(setup.options),
        weight_bytes=ours.weight_bytes,
    )


def _reason(error: Exception) -> str:
    """Why a contender is left out, in a line."""
    text = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return text if isinstance(error, UnavailableError) else f"{type(error).__name__}: {text}"
