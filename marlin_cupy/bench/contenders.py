"""Who is timed: our matmul, the read floor and cuBLAS here, what needs PyTorch in ``contenders_torch``.

A contender holds the weight copies of one layer and makes a :class:`Run` for any M. One that computes something checks
itself: fresh inputs, output poisoned with NaN, and the distance to float64 (in PyTorch float32) on the very weights it
multiplies.
"""

from __future__ import annotations

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy

from marlin_cupy import formats, frameworks, kernels
from marlin_cupy.api import matmul, problem_of
from marlin_cupy.bench import read_floor
from marlin_cupy.bench.shapes import Shape
from marlin_cupy.device import Gpu, import_cupy, namespace
from marlin_cupy.kernels import Candidate, Problem
from marlin_cupy.numerics import normal_bound, unstated_bound
from marlin_cupy.quantizing import quantize
from marlin_cupy.scalars import F16, by_name
from marlin_cupy.tensor import QuantizedTensor
from marlin_cupy.timing import CupyRun, EventTimer, Replay, Run, copies, is_cold

Array = Any  # a CuPy array
Weight = TypeVar("Weight")  # as a contender holds it

OURS, FLOOR, CUBLAS, TINYGEMM, HUMMING = "marlin_cupy", "read_floor", "cublas", "tinygemm", "humming"

#: A relative error so many times the bound of our kernel is called wrong: what it is compared with is rounded too.
_SLACK = 2

_NAN_BITS = 0x7FFF  # NaN in float16 and in bfloat16
_CHUNK = 1 << 26
_COLUMNS_AT_ONCE = 4096
_seeds = itertools.count(1)


class UnavailableError(Exception):
    """A contender cannot run here; the message says why, as the end of a sentence."""


@dataclass(frozen=True)
class Setup:
    """What the contenders of one layer have in common."""

    shape: Shape
    format: str
    group_size: int
    dtype: str
    gpu: Gpu
    stream: Any  # a CuPy stream that is not the default one; everything runs on it
    batch_invariant: bool = False  # ours
    kernel: str | None = None  # ours; the one that is chosen if None
    options: Mapping[str, Any] = field(default_factory=dict)  # ours: more arguments of quantize


class Contender(ABC):
    """One way to compute (or, for the floor, to read) a layer.

    Attributes:
        name: as in the results.
        description: what is timed, in words.
        weight_bytes: what a launch reads of its weight.
        copies: how many copies of the weight there are.
        dtype: of the result, which has no error where nothing is computed.
    """

    name: str
    description: str
    weight_bytes: int
    copies: int
    dtype: str

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self.dtype = setup.dtype

    def _cold(self, first: Weight, weight_bytes: int, copy: Callable[[Weight], Weight]) -> list[Weight]:
        """``first`` and as many copies of it as push each other out of L2."""
        self.weight_bytes = weight_bytes
        self.copies = copies(weight_bytes, self._setup.gpu.l2_bytes)
        return [first, *(copy(first) for _ in range(self.copies - 1))]

    def refuses(self, m: int) -> str | None:
        """Why this contender sits out at M rows; None if it does not."""
        return None

    def tolerance(self, m: int) -> float:
        """The relative Frobenius error at M rows above which its result is called wrong."""
        return unstated_bound(self.dtype)

    def details(self, m: int, dependent: bool) -> tuple[str, str]:
        """Kernel and configuration at M rows, where they are known."""
        return "", ""

    def is_cold(self, l2_bytes: int) -> bool:
        """Whether its weight copies push each other out of L2."""
        return is_cold(self.weight_bytes, self.copies, l2_bytes)

    @abstractmethod
    def run(self, m: int, dependent: bool) -> Run:
        """Ready to launch at M rows; ``dependent`` is for those who have dependent launches."""


class Ours(Contender):
    """mc.matmul with CuPy arrays and a given ``out``."""

    name = OURS

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        cupy = import_cupy("the benchmark")
        K, N = setup.shape.K, setup.shape.N
        weight = cupy.empty((K, N), dtype=numpy.float16)
        fill_normal(weight, F16.name, 1 / math.sqrt(K))
        format, group_size = formats.get(setup.format), setup.group_size
        size = format.default_group_size if group_size is None else group_size
        scale_dtype = format.checked_scale_dtype(None, setup.dtype, size)
        first = quantize(weight, setup.format, size, **{"scale_dtype": scale_dtype, **setup.options})
        self.weights = self._cold(first, first.nbytes, _copied)
        self.description = f"marlin_cupy.matmul, {setup.format} weights with {first.scale_dtype} scales, out= given"
        if setup.options:
            self.description += f", quantized with {', '.join(f'{k}={v!r}' for k, v in setup.options.items())}"
        if setup.batch_invariant:
            self.description += ", batch_invariant=True"
        if setup.kernel is not None:
            self.description += f", by {setup.kernel}, whichever kernel would be chosen"

    def tolerance(self, m: int) -> float:
        """That of the kernel that runs, by what it says that it rounds."""
        rounding = kernels.GEMM.rounding(self._problem(m), self._candidate(m))
        return _SLACK * normal_bound(rounding, self._setup.shape.K)

    def details(self, m: int, dependent: bool) -> tuple[str, str]:
        """The candidate that runs."""
        found = self._candidate(m)
        return found.kernel, str(found.configuration)

    def has_dependent_launch(self, m: int) -> bool:
        """Whether the kernel for M rows has dependent launches."""
        return self._candidate(m).configuration.dependent

    def _candidate(self, m: int) -> Candidate:
        """The one that matmul chooses, or the named kernel's best; ValueError where that does not serve M rows."""
        name, problem = self._setup.kernel, self._problem(m)
        if name is None:
            return kernels.GEMM.choose(problem)
        found = [each for each in kernels.GEMM.candidates(problem) if each.kernel == name]
        if not found:
            raise ValueError(f"{name} does not serve M = {m}: it {kernels.GEMM.refusals(problem)[name]}.")
        return found[0]

    def _problem(self, m: int) -> Problem:
        return problem_of(self.weights[0], m, self._setup.dtype, self._setup.batch_invariant)

    def run(self, m: int, dependent: bool) -> Run:
        """One launch per weight copy, all with the same x and y."""
        x, y = activations(self._setup, m)
        if self._setup.kernel is None:
            options = {"dependent": dependent, "batch_invariant": self._setup.batch_invariant}
            steps = [functools.partial(matmul, x, weight, None, y, **options) for weight in self.weights]
        else:
            plan = kernels.GEMM.plan(self._problem(m), self._candidate(m))
            steps = [
                functools.partial(plan.multiply, frameworks.of(x), x, weight.placed, None, y, dependent)
                for weight in self.weights
            ]
        return CupyRun(self._setup.stream, steps, functools.partial(_error, self._setup.dtype, x, y, self._dense))

    @functools.cached_property
    def _dense(self) -> Array:
        """The weight that the copies stand for, float32 (K, N)."""
        return self.weights[0].dequantize("float32")


class ReadFloor(Contender):
    """Reads the packed weights of ``ours`` and computes nothing."""

    name = FLOOR
    description = "a kernel that reads the packed weight, with loads or bulk copies, and does nothing else"

    def __init__(self, setup: Setup, ours: Ours) -> None:
        super().__init__(setup)
        self._buffers = [weight.packed for weight in ours.weights]
        self.weight_bytes, self.copies = ours.weight_bytes, ours.copies
        self._readers: dict[bool, read_floor.Reader] = {}

    def _reader(self, dependent: bool) -> read_floor.Reader:
        if dependent not in self._readers:
            gpu, stream = self._setup.gpu, self._setup.stream
            self._readers[dependent] = read_floor.fastest(gpu, self._buffers, stream, EventTimer(stream), dependent)
        return self._readers[dependent]

    def details(self, m: int, dependent: bool) -> tuple[str, str]:
        """The launch shape that was fastest."""
        return self.name, str(self._reader(dependent).shape)

    def run(self, m: int, dependent: bool) -> Run:
        """The same for every M."""
        return self._reader(dependent).run(self._buffers, self._setup.stream)


class CupyCublas(Contender):
    """cuBLAS through CuPy: gemmEx with float32 accumulation on W stored as (N, K)."""

    name = CUBLAS

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        reason = cublas_missing()
        if reason is not None:
            raise UnavailableError(f"CuPy cannot load cuBLAS: {reason}")
        cupy = import_cupy("the benchmark")
        K, N = setup.shape.K, setup.shape.N
        first = cupy.empty((N, K), dtype=by_name(setup.dtype).dtype)
        fill_normal(first, setup.dtype, 1 / math.sqrt(K))
        self._weights = self._cold(first, first.nbytes, lambda weight: weight.copy())
        self.description = f"cupy.dot(x, W.T), {setup.dtype} weights stored as (N, K)"

    def run(self, m: int, dependent: bool) -> Run:
        """One GEMM per weight copy."""
        cupy = import_cupy("the benchmark")
        x, y = activations(self._setup, m)
        steps = [functools.partial(cupy.dot, x, weight.T, out=y) for weight in self._weights]
        return CupyRun(self._setup.stream, steps, functools.partial(_error, self._setup.dtype, x, y, self._dense))

    @functools.cached_property
    def _dense(self) -> Array:
        """The weight in float32 (K, N), a view of (N, K)."""
        return as_float32(self._weights[0], self._setup.dtype).T


def _copied(w: QuantizedTensor) -> QuantizedTensor:
    """In memory of its own."""
    return QuantizedTensor(w.spec, **{name: part.copy() for name, part in w.parts.items() if part is not None})


def activations(setup: Setup, m: int) -> tuple[Array, Array]:
    """x (M, K), random, and y (M, N)."""
    cupy = import_cupy("the benchmark")
    x = cupy.empty((m, setup.shape.K), dtype=by_name(setup.dtype).dtype)
    fill_normal(x, setup.dtype, 1.0)
    return x, cupy.empty((m, setup.shape.N), dtype=by_name(setup.dtype).dtype)


def _error(dtype: str, x: Array, y: Array, dense: Array, graph: Replay) -> float:
    """Relative error of what ``graph`` writes to ``y`` for fresh ``x``."""
    fill_normal(x, dtype, 1.0)
    y.view(numpy.uint16).fill(_NAN_BITS)
    graph.replay()
    return relative_error(as_float32(y, dtype), product(as_float32(x, dtype), dense))


def relative_error(y: Array, expected: Array) -> float:
    """Frobenius norm of the difference over that of ``expected``, sums in float64."""
    xp = namespace(y)
    difference = xp.sum(xp.square(y - expected), dtype=xp.float64)
    return math.sqrt(float(difference) / float(xp.sum(xp.square(expected), dtype=xp.float64)))


def product(x: Array, dense: Array) -> Array:
    """x (M, K) @ dense (K, N) in float64, some columns at a time: by cuBLAS where CuPy has it, else row by row."""
    xp = namespace(x)
    x = x.astype(xp.float64)
    y = xp.empty((x.shape[0], dense.shape[1]), dtype=xp.float64)
    by_rows = not isinstance(x, numpy.ndarray) and cublas_missing() is not None
    for start in range(0, y.shape[1], _COLUMNS_AT_ONCE):
        columns = slice(start, start + _COLUMNS_AT_ONCE)
        part = dense[:, columns].astype(xp.float64)
        y[:, columns] = xp.stack([xp.sum(row[:, None] * part, axis=0) for row in x]) if by_rows else x @ part
    return y


@functools.cache
def cublas_missing() -> str | None:
    """Why CuPy has no cuBLAS, in a line; None if it has."""
    try:
        from cupy_backends.cuda.libs import cublas
    except ImportError as error:
        return str(error).splitlines()[0]
    return None if hasattr(cublas, "gemmEx") else "it lacks gemmEx"


def as_float32(array: Array, dtype: str) -> Array:
    """A contiguous float16 or bfloat16 array as float32."""
    return by_name(dtype).from_bits(array.view(numpy.uint16))


def fill_normal(array: Array, dtype: str, scale: float) -> None:
    """Fill a contiguous CuPy array of a 16-bit ``dtype`` with fresh normal values times ``scale``."""
    cupy = import_cupy("the benchmark")
    bits = array.reshape(-1).view(numpy.uint16)
    for start in range(0, bits.size, _CHUNK):
        part = bits[start : start + _CHUNK]
        values = cupy.empty(part.shape, dtype=numpy.float32)
        _normal()(numpy.uint64(next(_seeds)), numpy.float32(scale), values)
        part[...] = by_name(dtype).to_bits(values)


@functools.cache
def _normal() -> Any:
    """Normal values from a counter: SplitMix64 (Steele et al. 2014), then Box and Muller. Needs no cuRAND."""
    return import_cupy("the benchmark").ElementwiseKernel(
        "uint64 seed, float32 scale",
        "float32 value",
        """
        unsigned long long z = seed * 0xD1B54A32D192ED03ull + (i + 1ull) * 0x9E3779B97F4A7C15ull;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
        z ^= z >> 31;
        const float u = ((unsigned int)(z >> 40) + 1u) * 5.9604645e-8f;
        const float v = (unsigned int)(z & 0xFFFFFFu) * 5.9604645e-8f;
        value = scale * sqrtf(-2.0f * logf(u)) * cosf(6.2831853f * v);
        """,
        "marlin_cupy_bench_normal",
    )
