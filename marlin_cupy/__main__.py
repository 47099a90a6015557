"""The command line: ``python -m marlin_cupy`` or ``marlin-cupy``: info, demo, tune, bench and compile."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Annotated, Any

import numpy

import marlin_cupy as mc
from marlin_cupy import formats, kernels, numerics
from marlin_cupy.api import problem_of
from marlin_cupy.bench import shapes
from marlin_cupy.bench.contenders import fill_normal
from marlin_cupy.device import (
    CPU,
    Device,
    Gpu,
    arch_of,
    gpu,
    gpu_count,
    gpu_of_arch,
    import_cupy,
    installed,
    no_gpu,
    on,
)
from marlin_cupy.errors import CompileError, MissingDependencyError
from marlin_cupy.jit import cache
from marlin_cupy.jit import compile as nvrtc
from marlin_cupy.kernels import Operand, Problem
from marlin_cupy.scalars import F16, HALF_NAMES
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Table
except ImportError as error:
    sys.exit(f"The command line needs {error.name}, which is not installed; pip install 'marlin_cupy[cli]'.")

_PROGRAM = "marlin-cupy"
#: The layer that info asks the kernels about, and demo's default: the output projection of Llama 3 8B.
_K, _N, _M = 4096, 4096, 16
#: What random errors of single elements may be, in root mean squares, where the bound is that of all together.
_DEVIATIONS = 2

app = typer.Typer(
    name=_PROGRAM,
    help="Quantized matrix multiplication for NumPy, CuPy, JAX and PyTorch.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False)

GroupSize = Annotated[
    int | None, typer.Option(help="K per scale: a multiple of 16, or -1 for all of K; the format's default.")
]


@contextlib.contextmanager
def _refusals_in_one_sentence() -> Iterator[None]:
    """Show an error that the user can act on without a traceback, and exit with code 2."""
    try:
        yield
    except (ValueError, ImportError, OSError, CompileError) as error:
        typer.echo(f"{_PROGRAM}: {error}", err=True)
        raise typer.Exit(2) from error


def main() -> None:
    """Run the command line."""
    app(prog_name=_PROGRAM)


# ---- info


@app.command()
@_refusals_in_one_sentence()
def info() -> None:
    """Show what is installed, which GPU is there, which kernels serve it, and the caches."""
    packages = Table("package", "version")
    packages.add_row("marlin_cupy", mc.__version__)
    packages.add_row("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for name, version in installed().items():
        packages.add_row(name, version or "[dim]not installed[/dim]")
    console.print(packages)

    gpus = [gpu(index) for index in range(gpu_count())]
    if gpus:
        table = Table("GPU", "name", "architecture", "SMs", "shared memory per block", "L2 cache")
        for found in gpus:
            shared, l2 = f"{found.shared_per_block / 2**10:.0f} KiB", f"{found.l2_bytes / 2**20:.0f} MiB"
            table.add_row(f"cuda:{found.index}", found.name, found.arch, str(found.sm_count), shared, l2)
        console.print(table)
    else:
        _print_line(f"GPU: none. {no_gpu('A weight on a GPU')}")

    table = Table("weight on", "kernel", "serves it", title=f"int4 {_K} x {_N}, float16 activations, M = {_M}")
    spec = Spec("int4", (_K, _N), formats.get("int4").default_group_size, F16.name)
    for place in (None, *gpus):
        for name, reason in kernels.GEMM.refusals(Problem(_M, Operand(F16.name), spec, F16.name, place)).items():
            table.add_row("cpu" if place is None else f"cuda:{place.index}", name, f"no: {reason}" if reason else "yes")
    console.print(table)

    try:
        _print_line(f"NVRTC: {nvrtc.nvrtc_version()}")
    except MissingDependencyError as error:
        _print_line(f"NVRTC: none; {error}")
    _print_line(f"cache: {_folder(cache.cache_dir())}; {cache.CACHE_VARIABLE} moves it")
    bundle = cache.bundle_dir()
    _print_line(f"bundle: {_folder(bundle) if bundle else f'none; {cache.BUNDLE_VARIABLE} names one'}")


def _folder(path: Path) -> str:
    entries, size = cache.size(path)
    return f"{path}, {entries} kernels, {size / 2**20:.1f} MiB"


def _print_line(text: str) -> None:
    """Print without markup and without wrapping, so that paths can be copied."""
    console.print(text, markup=False, soft_wrap=True)


# ---- demo


@app.command()
@_refusals_in_one_sentence()
def demo(
    format: Annotated[str, typer.Option(help="Weight format.")] = "int4",
    group_size: GroupSize = None,
    k: Annotated[int, typer.Option(min=1, help="Inputs of the layer.")] = _K,
    n: Annotated[int, typer.Option(min=1, help="Outputs of the layer.")] = _N,
    m: Annotated[int, typer.Option(min=1, help="Rows of x.")] = _M,
    device: Annotated[str | None, typer.Option(help='"cpu", "cuda" or "cuda:N"; a GPU if there is one.')] = None,
) -> None:
    """Quantize and multiply one random layer, and check it against float64. Exit code 1 if the check fails."""
    place = Device.parse(device or ("cuda" if gpu_count() else "cpu"))
    if place != CPU:
        gpu(place.index)  # an error that says how many there are
    formats.get(format)
    rng = numpy.random.default_rng(0)
    weight = (rng.standard_normal((k, n), dtype=numpy.float32) / math.sqrt(k)).astype(numpy.float16)
    x = rng.standard_normal((m, k), dtype=numpy.float32).astype(numpy.float16)

    with on(place), console.status("") as status:
        status.update(f"quantizing {k} x {n} weights to {format} on {place}")
        native_weight, native_x = _moved(weight, place), _moved(x, place)
        w = mc.quantize(native_weight, format, group_size)
        quantize_ms = _median_ms(lambda: mc.quantize(native_weight, format, group_size), place, 3, 1)
        status.update(f"multiplying {m} rows")
        start = time.perf_counter()
        y = mc.matmul(native_x, w)
        host_y = y if place == CPU else y.get()
        first_ms = 1e3 * (time.perf_counter() - start)
        matmul_ms = _median_ms(lambda: mc.matmul(native_x, w), place, *((3, 1) if place == CPU else (20, 50)))
        status.update("checking against float64")
        error, bound, weight_error = _errors(x, weight, w, host_y)
        explanation = mc.explain(x.shape, x.dtype, w)

    passed = error <= bound  # false for NaN too
    title = f"{format}, group size {w.group_size}: ({m}, {k}) @ ({k}, {n}) on {place}"
    table = Table("", "", show_header=False, title=title)
    table.add_row("weight in float16", f"{weight.nbytes / 1e6:.3g} MB")
    table.add_row("weight packed", f"{w.nbytes / 1e6:.3g} MB, {weight.nbytes / w.nbytes:.2f} times smaller")
    table.add_row("error of the packed weight", f"{weight_error:.2e} relative to the original")
    table.add_row("error of the product", f"{error:.2e} relative to float64")
    table.add_row("its bound", f"{bound:.2e}; one rounding to float16 is {F16.roundoff:.2e}")
    on_gpu = place != CPU
    table.add_row("quantize", _time(quantize_ms))
    table.add_row("multiply, first call", _time(first_ms) + (", kernel built or read from disk" if on_gpu else ""))
    table.add_row("multiply", _time(matmul_ms) + (", weight warm in the L2 cache" if on_gpu else ""))
    console.print(table)
    _print_line(str(explanation))
    console.print("[green]correct[/green]" if passed else "[red]WRONG: the error is above its bound[/red]")
    if not passed:
        raise typer.Exit(1)


def _errors(x: Any, weight: Any, w: QuantizedTensor, y: Any) -> tuple[float, float, float]:
    """Relative errors in the Frobenius norm, a run of columns at a time: (of y, its bound, of the quantized weight)."""
    problem = problem_of(w, x.shape[0], F16.name)
    rounding = kernels.GEMM.rounding(problem, kernels.GEMM.choose(problem))
    exact_x = x.astype(numpy.float64)
    y_error = y_size = bound = weight_error = weight_size = 0.0
    for columns, native in w.blocks():
        values = (native if w.device == CPU else native.get()).astype(numpy.float64)
        product = numerics.Product.of(exact_x, values)
        y_error += numerics.norm(y[:, columns] - product.exact) ** 2
        y_size += numerics.norm(product.exact) ** 2
        bound += numerics.norm(product.bound(rounding, deviations=_DEVIATIONS)) ** 2
        original = weight[:, columns].astype(numpy.float64)
        weight_error += numerics.norm(values - original) ** 2
        weight_size += numerics.norm(original) ** 2
    return math.sqrt(y_error / y_size), math.sqrt(bound / y_size), math.sqrt(weight_error / weight_size)


def _median_ms(call: Callable[[], object], place: Device, repeats: int, calls: int) -> float:
    """Median over ``repeats`` of the time per call of ``calls`` in a row: CUDA events on a GPU, elapsed on the CPU."""
    times = []
    if place == CPU:
        for _ in range(repeats):
            start = time.perf_counter()
            for _ in range(calls):
                call()
            times.append(1e3 * (time.perf_counter() - start))
    else:
        events = import_cupy("timing").cuda
        first, last = events.Event(), events.Event()
        for _ in range(repeats):
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            times.append(events.get_elapsed_time(first, last))
    return statistics.median(times) / calls


def _moved(array: Any, place: Device) -> Any:
    """A NumPy array on ``place``."""
    return array if place == CPU else import_cupy("a GPU").asarray(array)


def _time(milliseconds: float) -> str:
    """With a unit that suits it."""
    for unit, factor in (("s", 1e-3), ("ms", 1.0)):
        if milliseconds * factor >= 1:
            return f"{milliseconds * factor:.3g} {unit}"
    return f"{milliseconds * 1e3:.3g} us"


# ---- compile


@app.command(name="compile")
@_refusals_in_one_sentence()
def compile_bundle(
    arch: Annotated[list[str], typer.Option(help='Architecture, repeatable: "sm_80", "sm_90a", ...')],
    output: Annotated[Path, typer.Option(help="Folder of the bundle; made if it does not exist.")],
    format: Annotated[list[str] | None, typer.Option(help="Weight format, repeatable; all if not given.")] = None,
    group_size: GroupSize = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="Dtype of activations and scales, repeatable; both if not given.")
    ] = None,
) -> None:
    """Compile every kernel for named architectures, GPU or not, into a folder that other machines can use."""
    version = nvrtc.nvrtc_version()
    gpus = [_gpu_of_arch(name, version) for name in dict.fromkeys(arch)]
    sources = [(*source, each.arch) for each in gpus for source in variants(format, group_size, dtype, each)]
    output.mkdir(parents=True, exist_ok=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    # NVRTC runs outside the interpreter lock: threads are enough.
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("compiling", total=len(sources))
        builds = [pool.submit(nvrtc.add_to_bundle, output, *source) for source in sources]
        try:
            for build in as_completed(builds):
                build.result()
                progress.advance(task)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    _print_line(f"{len(builds)} kernels for {', '.join(each.arch for each in gpus)}.")
    _print_line(f"The bundle is now {_folder(output)}.")
    _print_line(
        f"With {cache.BUNDLE_VARIABLE}={output.resolve()} marlin_cupy {mc.__version__} uses them instead of compiling."
    )


def variants(
    format_names: Iterable[str] | None, group_size: int | None, dtypes: Iterable[str] | None, target: Gpu
) -> list[tuple[str, str]]:
    """(name, source) of every kernel that weights can need on ``target``.

    Their scales have the dtype of the activations, where the format can have such.
    All formats, the default group size of each and both dtypes where None.
    """
    found: dict[tuple[str, str], None] = {}  # candidates for different M can shrink to the same kernel
    for name in format_names or formats.names():
        for dtype in dtypes or HALF_NAMES:
            if dtype not in HALF_NAMES:
                raise ValueError(f"dtype is {dtype!r}; use {' or '.join(HALF_NAMES)}.")
            spec = Spec.checked(name, (1, 1), group_size, like=dtype)  # checks the name and the size
            found |= dict.fromkeys(kernels.variants(spec, dtype, target))
    return list(found)


def _gpu_of_arch(arch: str, version: str) -> Gpu:
    """A GPU of that architecture; ValueError where its kernels could not be built, or would not be looked for."""
    found = gpu_of_arch(arch)
    number = int(arch.removeprefix("sm_").rstrip("af"))
    named = arch_of(*divmod(number, 10))
    if arch != named:
        raise ValueError(f"arch is {arch!r}; on such GPUs marlin_cupy looks for {named!r}, use that.")
    try:
        nvrtc.compile('extern "C" __global__ void probe() {}', arch)
    except CompileError as error:
        raise ValueError(f"NVRTC {version} cannot build for {arch}.") from error
    return found


# ---- tune


@app.command()
@_refusals_in_one_sentence()
def tune(
    shape: Annotated[list[str], typer.Option(help="NAME=KxN, repeatable: inputs and outputs of a layer.")],
    m: Annotated[list[int], typer.Option(min=1, help="Rows of x, repeatable.")],
    format: Annotated[str, typer.Option(help="Weight format.")] = "int4",
    group_size: GroupSize = None,
    dtype: Annotated[str, typer.Option(help="Dtype of activations and scales.")] = F16.name,
) -> None:
    """Time the kernels for layers of these shapes on this machine's GPU, and use the fastest from now on.

    Exit code 1 without a GPU, and where a kernel was wrong.
    """
    layers = [shapes.parse(text) for text in shape]
    formats.get(format)
    if dtype not in HALF_NAMES:
        raise ValueError(f"dtype is {dtype!r}; use {' or '.join(HALF_NAMES)}.")
    if gpu_count() == 0:
        _print_line(no_gpu("Tuning"))
        raise typer.Exit(1)
    wrong = False
    for layer in layers:
        weight = import_cupy("tuning").empty((layer.K, layer.N), dtype=numpy.float16)
        fill_normal(weight, F16.name, 1 / math.sqrt(layer.K))
        spec = Spec.checked(format, weight.shape, group_size, like=dtype)
        w = mc.quantize(weight, format, group_size, scale_dtype=spec.scale_dtype)
        del weight
        found = mc.tune(w, m)
        _show_tuning(layer.name, found)
        wrong = wrong or any(each.wrong for row in found.rows for each in row.candidates)
    if wrong:
        raise typer.Exit(1)


def _show_tuning(name: str, found: mc.Tuning) -> None:
    """All candidates of every M, the chosen one first."""
    table = Table("M", "us", "predicted", "kernel and configuration", title=f"{name}: {found.title}")
    for row in found.rows:
        for index, each in enumerate(row.candidates):
            notes = ["chosen"] * (index == 0) + ["used before"] * (each == row.before)
            words = f"{each.kernel}: {each.config}" + (f" [bold]({', '.join(notes)})[/bold]" if notes else "")
            words += f" [red]WRONG: {escape(each.wrong)}[/red]" if each.wrong else ""
            us = "" if each.us is None else f"{each.us:.2f}"
            table.add_row(str(row.M) if index == 0 else "", us, f"{each.predicted_us:.2f}", words)
        table.add_row("", f"{row.floor_us:.2f}", "", "[dim]to read the weight, estimated[/dim]", end_section=True)
    console.print(table)
    _print_line(f"kept in {found.path}" if found.path else "not kept: the cache folder cannot be written")


# ---- bench


@app.command()
@_refusals_in_one_sentence()
def bench(
    shape: Annotated[
        list[str] | None, typer.Option(help="NAME=KxN, repeatable; Llama 3 8B and 70B layers if not given.")
    ] = None,
    m: Annotated[list[int] | None, typer.Option(min=1, help="Rows of x, repeatable; 1 to 4096 if not given.")] = None,
    format: Annotated[list[str] | None, typer.Option(help="Weight format, repeatable; int4 if not given.")] = None,
    group_size: GroupSize = None,
    dtype: Annotated[str, typer.Option(help="Dtype of activations and scales.")] = F16.name,
    output: Annotated[Path | None, typer.Option(help="Folder for the JSON file and the plots.")] = None,
    launch: Annotated[
        list[str] | None, typer.Option(help='"plain" or "dependent", repeatable; plain if not given.')
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few shapes and repeats, within a minute.")] = False,
    sample_ms: Annotated[
        float | None, typer.Option("--sample-ms", help="Length of a sample, 12 by default; 400 lets the clock settle.")
    ] = None,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="Ours with batch_invariant=True.")] = False,
    kernel: Annotated[str | None, typer.Option(help="Time this kernel of ours, chosen or not.")] = None,
) -> None:
    """Time this machine's GPU: our kernels, cuBLAS, the read floor and what else is installed."""
    layers: list[tuple[str, int, int]] | None = [shapes.parse(text) for text in shape] if shape else None
    for name in format or ():
        formats.get(name)
    if dtype not in HALF_NAMES:
        raise ValueError(f"dtype is {dtype!r}; use {' or '.join(HALF_NAMES)}.")
    try:
        run = importlib.import_module("marlin_cupy.bench.run").run  # with matplotlib, which no other command needs
    except ImportError as error:
        raise ImportError(f"bench needs {error.name}; pip install 'marlin_cupy[bench]'.") from error
    code: int = run(layers, m, format, group_size, dtype, output, quick, launch, sample_ms, batch_invariant, kernel)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
