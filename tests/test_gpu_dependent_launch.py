"""Dependent launches on a GPU: no weight is read before it is written, and the bits are those of plain launches.

The kernel that writes a weight here lets the next kernel start at once and takes long: a launch that must not be
dependent and is would read the old weight, which the first test shows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import pytest
from cases import FORMATS, HALF, fresh_gemm, quantized
from gpu_arrays import activations, assert_same_bits, differences, float64, poisoned, weights

import marlin_cupy as mc
from marlin_cupy import kernels, writes
from marlin_cupy.device import gpu

pytestmark = pytest.mark.gpu

every_m = pytest.mark.parametrize("M", [1, 8, 16, 40, 300])
K, N = 2048, 64 * 132

_SLOW_COPY = r"""
extern "C" __global__ void slow_copy(unsigned* target, const unsigned* source, long long words, long long cycles) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    const long long start = clock64();
    while (clock64() - start < cycles) {}
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < words; i += step) target[i] = source[i];
}
"""


@functools.cache
def slow_copy_kernel() -> Any:
    return cupy.RawKernel(_SLOW_COPY, "slow_copy")


def slow_copy(target: cupy.ndarray, source: cupy.ndarray, cycles: int = 200_000) -> None:
    """On the current stream: about a tenth of a millisecond of nothing, then the copy."""
    slow_copy_kernel()((64,), (256,), (target, source, target.nbytes // 4, cycles))


@pytest.fixture(autouse=True)
def kernels_with_dependent_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the models find faster: these tests are about the others."""
    if gpu().arch == "sm_90a":
        monkeypatch.setattr(kernels, "GEMM", fresh_gemm("sm80_gemm"))


@pytest.fixture
def stream() -> Iterator[cupy.cuda.Stream]:
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as found:
        yield found
        found.synchronize()


def has_dependent_launch(M: int, w: mc.QuantizedTensor) -> bool:
    return "dependent launch" in mc.explain((M, w.shape[0]), "float16", w).config


class Alternating:
    """A weight whose contents change between two versions, x for it, and the two products."""

    def __init__(self, M: int, format: str = "int4") -> None:
        self.values = [weights(K, N), weights(K, N)[::-1].copy()]
        versions = [quantized(values, format, 64) for values in self.values]
        self.packed = [version.packed for version in versions]
        self.w = mc.QuantizedTensor(versions[0].spec, versions[0].packed.copy())
        self.x = activations(M, K, "float16")
        self.expected = [mc.matmul(self.x, version, dependent=False) for version in versions]
        self.y = cupy.empty_like(self.expected[0])
        assert int(differences(*self.expected)) > 0
        assert has_dependent_launch(M, self.w) == (gpu().arch == "sm_90a")
        self.wrong = cupy.zeros((), cupy.int64)
        slow_copy(self.w.packed, self.packed[0])  # compiled now
        mc.matmul(self.x, self.w, out=self.y)
        cupy.cuda.Device().synchronize()

    def write(self, version: int) -> None:
        """By a kernel of the user."""
        slow_copy(self.w.packed, self.packed[version])
        self.w.mark_written()

    def multiply(self, version: int, dependent: bool = True) -> None:
        mc.matmul(self.x, self.w, out=self.y, dependent=dependent)
        self.check(version, self.y)

    def check(self, version: int, y: cupy.ndarray) -> None:
        self.wrong += differences(y, self.expected[version])


def test_without_the_mark_the_old_weight_is_read(stream: cupy.cuda.Stream) -> None:
    """That a dependent launch does overlap, without which nothing else here would show anything."""
    if gpu().arch != "sm_90a":
        return
    given = Alternating(1)
    given.multiply(0)
    given.multiply(0)
    slow_copy(given.w.packed, given.packed[1], cycles=5_000_000)
    mc.matmul(given.x, given.w, out=given.y)  # breaks the contract
    assert int(differences(given.y, given.expected[1])) > 0


@every_m
@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_that_a_kernel_writes_is_read_after_it(stream: cupy.cuda.Stream, M: int, format: str) -> None:
    given = Alternating(M, format)
    for turn in range(100):
        given.write(turn % 2)
        for _ in range(turn % 4):
            given.multiply(turn % 2)
    assert int(given.wrong) == 0


def test_a_plain_launch_on_request_is_as_good_as_the_mark(stream: cupy.cuda.Stream) -> None:
    given = Alternating(1)
    for turn in range(100):
        slow_copy(given.w.packed, given.packed[turn % 2])
        given.multiply(turn % 2, dependent=False)
        given.multiply(turn % 2)
    assert int(given.wrong) == 0


@every_m
def test_an_updated_weight_is_read_after_the_update(stream: cupy.cuda.Stream, M: int, kinds: list[str]) -> None:
    given = Alternating(M)
    kinds.clear()
    for turn in range(30):
        given.w.update_(given.values[turn % 2])
        for _ in range(3):
            given.multiply(turn % 2)
        fresh = mc.quantize(given.values[(turn + 1) % 2], "int4", 64)  # into memory that was another weight's
        given.check((turn + 1) % 2, mc.matmul(given.x, fresh))
        given.check((turn + 1) % 2, mc.matmul(given.x, fresh))
        del fresh
    assert int(given.wrong) == 0
    if gpu().arch == "sm_90a":
        assert kinds == ["plain", "dependent", "dependent", "plain", "dependent"] * 30


def test_another_tensor_over_the_same_memory_knows_of_the_write(stream: cupy.cuda.Stream) -> None:
    given = Alternating(1)
    other = mc.QuantizedTensor(given.w.spec, given.w.packed)
    for _ in range(100):
        given.multiply(0)
        slow_copy(given.w.packed, given.packed[1])
        other.mark_written()
        given.multiply(1)
        slow_copy(given.w.packed, given.packed[0])
        other.mark_written()
    assert int(given.wrong) == 0


def test_two_streams_that_wait_for_one_another(stream: cupy.cuda.Stream) -> None:
    """The weight is written on one stream and read on both, first by the one and then by the other."""
    given, unrelated = Alternating(1), mc.quantize(weights(1000, 300))
    x, out = activations(1, 1000, "float16"), cupy.empty((1, 300), cupy.float16)
    other = cupy.cuda.Stream(non_blocking=True)
    y = cupy.empty_like(given.y)
    for turn in range(100):
        version = turn % 2
        given.write(version)
        if turn % 3 == 0:
            with other:  # a plain launch there that is not behind the write: only the event orders what follows
                mc.matmul(x, unrelated, out=out)
        other.wait_event(stream.record())
        with other:
            mc.matmul(given.x, given.w, out=y)
            wrong = differences(y, given.expected[version])
        given.multiply(version)  # the first on this stream after the write
        stream.wait_event(other.record())
        given.wrong += wrong
    other.synchronize()
    assert int(given.wrong) == 0


# ---- CUDA graphs


def captured(stream: cupy.cuda.Stream, work: Callable[[], object]) -> Any:
    stream.begin_capture()
    try:
        work()
    finally:
        graph = stream.end_capture()
    return graph


@every_m
@pytest.mark.parametrize("settled", [False, True])
def test_a_graph_is_behind_a_write_ahead_of_it(
    stream: cupy.cuda.Stream, M: int, settled: bool, kinds: list[str]
) -> None:
    """``settled``: the first launch of the graph is dependent too, and nothing in the graph is ahead of it."""
    given = Alternating(M)
    ys = [cupy.empty_like(given.y) for _ in range(3)]
    given.w.mark_written()
    if settled:
        given.multiply(0)
    kinds.clear()
    graph = captured(stream, lambda: [mc.matmul(given.x, given.w, out=y) for y in ys])
    if gpu().arch == "sm_90a":
        assert kinds == ["dependent" if settled else "plain", "dependent", "dependent"]
    for turn in range(100):
        version = turn % 2
        if turn % 10 == 5:
            given.w.update_(given.values[version])
        else:
            slow_copy(given.w.packed, given.packed[version])  # no mark: what was captured does not ask
        graph.launch(stream)
        for y in ys:
            given.check(version, y)
    assert int(given.wrong) == 0


def test_an_eager_launch_after_a_capture_is_behind_the_write(stream: cupy.cuda.Stream) -> None:
    """The plain launch that was captured has not run: it orders nothing outside."""
    given = Alternating(1)
    for turn in range(20):
        given.write(turn % 2)
        captured(stream, lambda: [mc.matmul(given.x, given.w, out=given.y) for _ in range(2)])
        given.multiply(turn % 2)
    assert int(given.wrong) == 0


def test_a_graph_may_write_the_weight_that_it_reads(stream: cupy.cuda.Stream) -> None:
    given = Alternating(1)
    source = given.packed[0].copy()

    def work() -> None:
        mc.matmul(given.x, given.w, out=given.y)
        slow_copy(given.w.packed, source)
        given.w.mark_written()
        for _ in range(2):
            mc.matmul(given.x, given.w, out=given.y)

    graph = captured(stream, work)
    for turn in range(100):
        source[...] = given.packed[turn % 2]
        graph.launch(stream)
        given.check(turn % 2, given.y)
    given.w.mark_written()
    given.multiply(1)
    assert int(given.wrong) == 0


# ---- the same bits


def chain(M: int, dtype: str, format: str) -> Callable[[list[cupy.ndarray], bool], None]:
    """Layers of which each takes what the one before gives; small ones and one above the size that fills an SM."""
    sizes = (1024, 2048, 8192, 8192, 1000, 3000, 1024)
    layers = [quantized(weights(k, n) / k**0.5, format, 64, dtype) for k, n in itertools.pairwise(sizes)]
    bias = [activations(1, n, dtype)[0] for n in sizes[1:]]

    def run(values: list[cupy.ndarray], dependent: bool) -> None:
        for index, w in enumerate(layers):
            mc.matmul(values[index], w, bias[index], values[index + 1], dependent=dependent)

    return run


def outputs(M: int, dtype: str) -> list[cupy.ndarray]:
    return [activations(M, 1024, dtype), *(poisoned((M, n), dtype) for n in (2048, 8192, 8192, 1000, 3000, 1024))]


@every_m
@pytest.mark.parametrize(("format", "dtype"), [("int4", "float16"), ("uint4", "bfloat16"), ("int8", "float16")])
def test_a_chain_has_the_bits_of_plain_launches(
    stream: cupy.cuda.Stream, M: int, format: str, dtype: str, kinds: list[str]
) -> None:
    run = chain(M, dtype, format)
    expected, found = outputs(M, dtype), outputs(M, dtype)
    run(expected, False)
    run(found, True)  # the first of each kind compiles, and is plain
    kinds.clear()
    wrong = cupy.zeros((), cupy.int64)

    def check() -> None:
        nonlocal wrong
        for y, right in zip(found[1:], expected[1:], strict=True):
            wrong += differences(y, right)
            y.view(cupy.uint16).fill(0x7FFF)

    for turn in range(50):
        run(found, turn % 7 != 3)
        check()
    if gpu().arch == "sm_90a":
        assert "dependent" in kinds
    graph = captured(stream, lambda: run(found, True))
    for _ in range(50):
        graph.launch(stream)
        check()
    for _ in range(3):  # graphs behind one another
        graph.launch(stream)
    check()
    assert int(wrong) == 0
    assert bool(cupy.isfinite(float64(expected[-1])).all())


@pytest.mark.parametrize("dtype", HALF)
@every_m
def test_between_kernels_of_others(stream: cupy.cuda.Stream, M: int, dtype: str) -> None:
    """x is written by the kernel ahead, y read by the kernel behind, and x overwritten by the one behind that."""
    w = mc.quantize(weights(K, N), "int4", 64, scale_dtype=dtype)
    bias = activations(1, N, dtype)[0]
    sources = [activations(M, K, dtype), activations(M, K, dtype)[:, ::-1].copy()]
    expected = [mc.matmul(source, w, bias, dependent=False) for source in sources]
    x, y, copy = cupy.empty_like(sources[0]), cupy.empty_like(expected[0]), cupy.empty_like(expected[0])
    x_bias = cupy.empty_like(bias)
    wrong = cupy.zeros((), cupy.int64)
    cupy.cuda.Device().synchronize()

    def work(source: cupy.ndarray) -> None:
        slow_copy(x.view(cupy.uint16), source.view(cupy.uint16), cycles=20_000)
        x_bias[...] = bias
        mc.matmul(x, w, x_bias, y)
        copy[...] = y
        x.view(cupy.uint16).fill(0x7FFF)
        x_bias.view(cupy.uint16).fill(0x7FFF)
        y.view(cupy.uint16).fill(0x7FFF)

    for turn in range(100):
        work(sources[turn % 2])
        wrong += differences(copy, expected[turn % 2])
    current = sources[0].copy()
    graph = captured(stream, lambda: work(current))
    for turn in range(100):
        current[...] = sources[turn % 2]
        graph.launch(stream)
        wrong += differences(copy, expected[turn % 2])
    assert int(wrong) == 0


@every_m
def test_a_launch_waits_for_both_branches_that_join_ahead_of_it(stream: cupy.cuda.Stream, M: int) -> None:
    """Half of x comes from another stream, whose kernel is slow and lets the next one start; eager and in a graph."""
    left, right = mc.quantize(weights(1000, 512)), mc.quantize(weights(1000, 512), "nf4", 64)
    last = mc.quantize(weights(1024, 300) / 300)
    x, y = activations(M, 1000, "float16"), poisoned((M, 300), "float16")
    between = poisoned((M, 1024), "float16")
    dummy = cupy.zeros(1024, cupy.uint32)
    other = cupy.cuda.Stream(non_blocking=True)

    def work() -> None:
        other.wait_event(stream.record())
        with other:
            slow_copy(dummy, dummy)
            mc.matmul(x, right, out=between[:, 512:])
        mc.matmul(x, left, out=between[:, :512])
        stream.wait_event(other.record())
        mc.matmul(between, last, out=y)

    work()
    cupy.cuda.Device().synchronize()
    expected = mc.matmul(between, last, dependent=False)
    assert bool(cupy.isfinite(float64(expected)).all())
    graph = captured(stream, work)
    wrong = cupy.zeros((), cupy.int64)
    for turn in range(100):
        between.view(cupy.uint16).fill(0x7FFF)
        if turn % 2:
            work()
        else:
            graph.launch(stream)
        wrong += differences(y, expected)
    other.synchronize()
    assert int(wrong) == 0


# ---- the switch


def test_plain_launches_on_request(stream: cupy.cuda.Stream, kinds: list[str]) -> None:
    w, x = mc.quantize(weights(K, N)), activations(1, K, "float16")
    plain = mc.matmul(x, w, dependent=False)
    for _ in range(3):
        assert_same_bits(mc.matmul(x, w, dependent=False), plain)
    assert kinds == ["plain"] * 4
    assert stream.ptr not in writes.of_gpu(0).past  # and they are not counted
    kinds.clear()
    for _ in range(3):
        assert_same_bits(mc.matmul(x, w), plain)
    if has_dependent_launch(1, w):
        assert kinds == ["plain", "dependent", "dependent"]
