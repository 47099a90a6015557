"""tune: the candidates of a weight timed on this GPU, the fastest kept for every later process."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy

from marlin_cupy import frameworks, kernels, timing
from marlin_cupy.api import problem_of
from marlin_cupy.device import Gpu, import_cupy
from marlin_cupy.errors import DeviceError
from marlin_cupy.kernels import Candidate, Plan, Problem, tuned
from marlin_cupy.numerics import apart
from marlin_cupy.progress import bar
from marlin_cupy.scalars import HALF_NAMES, by_name
from marlin_cupy.tensor import QuantizedTensor

Array = Any  # a NumPy or CuPy array

#: Candidates timed per M, the best predicted ones.
_TIMED = 8
#: The part of the free memory that copies of the weight may take.
_MEMORY_SHARE = 0.5
#: Rows of x that differ; more repeat them. Those checked against the dequantized weight.
_ROWS, _CHECKED_ROWS = 64, 4
_NAN_BITS = 0x7FFF  # NaN in float16 and in bfloat16


@dataclass(frozen=True)
class TunedCandidate:
    """A candidate that was tried.

    Attributes:
        kernel: name of the kernel.
        config: its configuration, in words.
        predicted_us: what its model had expected.
        us: the measured median, microseconds; None if its result was wrong.
        wrong: in which way it was wrong; None if it was right.
    """

    kernel: str
    config: str
    predicted_us: float
    us: float | None
    wrong: str | None


@dataclass(frozen=True)
class TunedRows:
    """One number of rows of x.

    Attributes:
        M: rows of x.
        floor_us: estimated time to read the weight, microseconds.
        candidates: all that were tried, those that were right first, the fastest first.
        before: the one that had been used until now, by prediction or by an earlier tune.
    """

    M: int
    floor_us: float
    candidates: tuple[TunedCandidate, ...]
    before: TunedCandidate

    @property
    def chosen(self) -> TunedCandidate:
        """The fastest, which :func:`marlin_cupy.matmul` uses from now on."""
        return self.candidates[0]


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` found; print it.

    Attributes:
        title: weight, GPU and dtype, in words.
        rows: an entry per M, in the order asked for.
        path: the file that keeps the times; None where it could not be written, and this process alone knows them.
    """

    title: str
    rows: tuple[TunedRows, ...]
    path: str | None

    def __str__(self) -> str:
        lines = [self.title, f"{'M':>6} {'floor':>8} {'before':>8} {'now':>8} {'predicted':>9}  us, and what it is"]
        for row in self.rows:
            before = "wrong" if row.before.us is None else f"{row.before.us:.2f}"
            times = f"{row.floor_us:8.2f} {before:>8} {row.chosen.us:8.2f} {row.chosen.predicted_us:9.2f}"
            lines.append(f"{row.M:6} {times}  {row.chosen.kernel}: {row.chosen.config}")
            lines += [f"  WRONG {each.wrong}: {each.kernel}: {each.config}" for each in row.candidates if each.wrong]
        kept = f"kept in {self.path}" if self.path else "not kept: the cache folder cannot be written"
        return "\n".join([*(line if len(line) <= 100 else line[:97] + "..." for line in lines), kept])


def tune(
    w: QuantizedTensor,
    ms: int | Iterable[int],
    *,
    dtype: str | None = None,
    batch_invariant: bool = False,
    progress: bool = True,
) -> Tuning:
    """Time the best predicted candidates on the weight's GPU, and let :func:`matmul` use the fastest from now on.

    For each M the candidates run in turns over copies of the weight that together exceed the L2 cache, as
    ``marlin-cupy bench`` does, after the result of each was checked: against the dequantized weight, and against the
    other candidates. The copies take at most half of the memory that is free. The times are kept beside the compiled
    kernels, for all weights of the same format, shape, group size and scale dtype on GPUs of this name, for exactly
    these M, until marlin_cupy changes.

    Args:
        w: a weight on a GPU. Only its description matters, and it is not changed.
        ms: rows of x, one number or several, each at least 1.
        dtype: of x, "float16" or "bfloat16"; that of the scales if None.
        batch_invariant: tune what :func:`matmul` does with ``batch_invariant=True``.
        progress: show a progress bar on standard error.

    Returns:
        All candidates with predicted and measured times; ``str`` makes a table of it.

    Raises:
        TypeError: no QuantizedTensor. ValueError: ms or dtype. DeviceError: a weight in host memory.
        UnsupportedError: no kernel serves it. RuntimeError: every candidate is wrong.
    """
    rows = checked_ms(ms)
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor, from quantize, pack or load.")
    problems = [problem_of(w, m, checked_dtype(dtype, w), batch_invariant) for m in rows]
    gpu = problems[0].gpu
    if gpu is None:
        raise DeviceError(f"tune times kernels on a GPU, and the weight is on {w.device}; pass w.to('cuda').")
    found, kept = [], True
    with bar("tuning", len(rows), progress) as begin, Rig(w, problems[0].x.dtype, gpu) as rig:
        for problem in problems:
            begin(f"M = {problem.M}")
            row, us = _tuned(rig, problem)
            found.append(row)
            kept = kernels.GEMM.remember(problem, us) and kept
    if not kept:
        warnings.warn(f"{tuned.path()} cannot be written; this process alone knows the times.", stacklevel=2)
    K, N = w.shape
    title = f"{w.format} {K} x {N}, group size {w.group_size}, {problems[0].x.dtype} on {gpu.name}"
    return Tuning(title, tuple(found), str(tuned.path()) if kept else None)


def checked_ms(ms: int | Iterable[int]) -> list[int]:
    """Distinct numbers of rows, in the order given; TypeError or ValueError otherwise."""
    rows = [ms] if isinstance(ms, int) else list(ms) if isinstance(ms, Iterable) else None
    if rows is None or any(isinstance(m, bool) or not isinstance(m, int) for m in rows):
        raise TypeError(f"ms is {ms!r}; pass a number of rows of x, or several.")
    if not rows or min(rows) < 1:
        raise ValueError(f"ms is {ms!r}; pass numbers of rows of x, at least 1 each.")
    return list(dict.fromkeys(rows))


def checked_dtype(dtype: str | None, w: QuantizedTensor) -> str:
    """The dtype of x, that of the scales if None; ValueError for others than the two."""
    if dtype is not None and dtype not in HALF_NAMES:
        raise ValueError(f"dtype is {dtype!r}; use {' or '.join(HALF_NAMES)}.")
    return dtype or w.scale_dtype


def _tuned(rig: Rig, problem: Problem) -> tuple[TunedRows, dict[str, float]]:
    """What the candidates of a problem take, and the times of those that are right by their keys."""
    before = kernels.GEMM.choose(problem)
    tried = list(dict.fromkeys([*kernels.GEMM.candidates(problem)[:_TIMED], before]))
    us, wrong = rig.measure(problem, tried)
    if not us:
        raise RuntimeError(f"every candidate for M = {problem.M} is wrong: {'; '.join(wrong.values())}")
    found = {
        each.key: TunedCandidate(
            each.kernel, str(each.configuration), each.predicted_us, us.get(each.key), wrong.get(each.key)
        )
        for each in tried
    }
    ordered = sorted(found.values(), key=lambda each: math.inf if each.us is None else each.us)
    floor_us = kernels.floor_us(problem)
    assert floor_us is not None
    return TunedRows(problem.M, floor_us, tuple(ordered), found[before.key]), us


class Rig:
    """Copies of a weight on its GPU, and a stream to time candidates on."""

    def __init__(self, w: QuantizedTensor, dtype: str, gpu: Gpu) -> None:
        self._cupy = import_cupy("tuning")
        self._dtype, self._gpu = dtype, gpu
        self._stack = contextlib.ExitStack()
        self._weight = w

    def __enter__(self) -> Rig:
        self._stack.enter_context(self._cupy.cuda.Device(self._gpu.index))
        # The caller's stream may still be writing the weight.
        self._cupy.cuda.Device().synchronize()
        self._stream = self._stack.enter_context(self._cupy.cuda.Stream(non_blocking=True))
        first = self._weight.to("cupy")
        self._weights = [first]
        free = self._cupy.cuda.runtime.memGetInfo()[0]
        wanted = timing.copies(first.nbytes, self._gpu.l2_bytes)
        for _ in range(min(wanted - 1, int(free * _MEMORY_SHARE) // first.nbytes)):
            self._weights.append(QuantizedTensor(first.spec, first.packed.copy()))
        self._columns, self._values = next(first.blocks())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.synchronize()
        self._weights.clear()
        self._cupy.get_default_memory_pool().free_all_blocks()  # of the GPU that is current until the next line
        self._stack.close()

    def measure(self, problem: Problem, candidates: Sequence[Candidate]) -> tuple[dict[str, float], dict[str, str]]:
        """By key: median microseconds of the candidates that are right, and what is wrong with the others."""
        x = self._activations(problem.M)
        y = self._cupy.empty((problem.M, problem.w.shape[1]), dtype=x.dtype)
        check = Check(self._expected(x), self._columns, tolerance(problem))
        time, sampling = timing.EventTimer(self._stream), timing.QUICK_SAMPLING
        graphs, wrong = {}, {}
        for each in candidates:
            plan = kernels.GEMM.plan(problem, each)
            reason = check(self._result(plan, x, y))
            if reason is None:
                steps = [
                    functools.partial(plan.multiply, frameworks.of(x), x, w.placed, None, y, True)
                    for w in self._weights
                ]
                graphs[each.key] = timing.prepare(timing.CupyRun(self._stream, steps, None), time, sampling)
            else:
                wrong[each.key] = reason
        summaries = timing.interleave(graphs, time, sampling)
        return {key: summary.median for key, summary in summaries.items()}, wrong

    def _activations(self, m: int) -> Array:
        """x (M, K), such that products are about 1, if possible; random on the host: CuPy's generators need cuRAND."""
        K = self._weights[0].shape[0]
        size = math.sqrt(K * float((self._values**2).mean()))
        some = numpy.random.default_rng(m).standard_normal((min(m, _ROWS), K), dtype=numpy.float32)
        some *= min(max(1 / size, 2**-10), 2**10) if size > 0 else 1
        all_rows = some[numpy.arange(m) % _ROWS].astype(by_name(self._dtype).dtype)
        return self._cupy.asarray(all_rows.view(numpy.uint16)).view(all_rows.dtype)

    def _result(self, plan: Plan, x: Array, y: Array) -> Array:
        """float32 (M, N) of one launch over an output of NaN."""
        y.view(numpy.uint16).fill(_NAN_BITS)
        plan.multiply(frameworks.of(x), x, self._weights[0].placed, None, y, True)
        return by_name(self._dtype).from_bits(y.view(numpy.uint16))

    def _expected(self, x: Array) -> Array:
        """float32 (some rows, the first columns) of the product with the dequantized weight, without cuBLAS."""
        rows = by_name(self._dtype).from_bits(x[:_CHECKED_ROWS].view(numpy.uint16))
        return self._cupy.stack([(row[:, None] * self._values).sum(axis=0) for row in rows])


class Check:
    """Says what is wrong with results that should be equal: float32 (M, N) arrays.

    Args:
        expected: the first rows of their ``columns``, computed in another way.
        bound: of the largest difference, over the largest magnitude.
    """

    def __init__(self, expected: Array, columns: slice, bound: float) -> None:
        self._expected, self._columns, self._bound = expected, columns, bound
        self._first: Array | None = None

    def __call__(self, result: Array) -> str | None:
        """What is wrong with a result; None if it is right."""
        off = _distance(result[: self._expected.shape[0], self._columns], self._expected)
        if not off <= self._bound:  # NaN is wrong too
            return f"off the dequantized product by {off:.1e} of its largest value, beyond {self._bound:.1e}"
        if self._first is None:
            self._first = result
        off = _distance(result, self._first)
        if not off <= self._bound:
            return f"off the first candidate by {off:.1e} of its largest value, beyond {self._bound:.1e}"
        return None


def _distance(y: Array, expected: Array) -> float:
    """The largest difference over the largest magnitude; 0 for weights that are 0 throughout, if y is."""
    largest = float(abs(expected).max())
    return float(abs(y - expected).max()) / (largest or float(numpy.finfo(numpy.float32).tiny))


def tolerance(problem: Problem) -> float:
    """The largest difference of two right results of any kernel, over the largest magnitude of a result."""
    roundings = {kernels.GEMM.rounding(problem, each) for each in kernels.GEMM.candidates(problem)}
    return max(apart(each, problem.w.shape[0]) for each in roundings)
