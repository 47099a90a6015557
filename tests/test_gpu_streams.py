"""Streams, threads and devices: a product runs on the caller's stream, and streams do not disturb one another."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import cupy
import numpy as np
import pytest
from cases import HALF
from gpu_arrays import activations, assert_same_bits, cut_and_whole, differences, to_host, weights
from only_dlpack import OnlyDlpack

import marlin_cupy as mc

pytestmark = pytest.mark.gpu

every_dtype = pytest.mark.parametrize("dtype", HALF)


def run_in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """``work(0)`` to ``work(count - 1)``, all started together in fresh threads; what they return, or raise."""
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        try:
            barrier.wait(timeout=60)
            results[index] = work(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def problems(dtype: str) -> list[tuple[cupy.ndarray, mc.QuantizedTensor]]:
    """With shared tiles and without, for several M."""
    return [(activations(M, w.shape[0], dtype), w) for M in (1, 16, 33) for w in cut_and_whole(dtype, M)]


@every_dtype
def test_streams_do_not_disturb_one_another(dtype: str) -> None:
    """Launches with shared tiles on 4 streams at once: partial sums and counters are each stream's own."""
    work = problems(dtype)
    expected = [mc.matmul(x, w) for x, w in work]
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(4)]
    results = []
    for launch in range(200):
        index = launch // 4 % len(work)  # the same product on all four streams at once, then the next
        x, w = work[index]
        with streams[launch % 4]:
            results.append((index, mc.matmul(x, w)))
    cupy.cuda.Device().synchronize()
    wrong = sum(int(differences(y, expected[index])) for index, y in results)
    assert wrong == 0


@every_dtype
def test_a_product_waits_for_what_the_stream_did_before(dtype: str) -> None:
    w, _ = cut_and_whole(dtype, 16)
    x = activations(16, w.shape[0], dtype)
    expected = mc.matmul(x, w)
    busy = cupy.ones((4096, 4096), cupy.float32)
    late, out = cupy.zeros_like(x), cupy.zeros_like(expected)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(10):
            busy = busy @ busy * 1e-4
        late[...] = x  # milliseconds from now
        mc.matmul(late, w, out=out)
        copy = out.copy()  # on the same stream, after the product
    stream.synchronize()
    assert_same_bits(copy, expected)


def test_each_thread_may_have_a_default_stream_of_its_own() -> None:
    w, _ = cut_and_whole("float16", 16)
    x = activations(16, w.shape[0], "float16")
    expected = mc.matmul(x, w)
    cupy.cuda.Device().synchronize()

    def work(_: int) -> cupy.ndarray:
        with cupy.cuda.Stream.ptds:
            results = [mc.matmul(x, w) for _ in range(50)]
            cupy.cuda.Stream.ptds.synchronize()
        return results[-1]

    for y in run_in_threads(4, work):
        assert_same_bits(y, expected)


@every_dtype
def test_a_fresh_thread_can_multiply(dtype: str) -> None:
    """A thread in which nothing has touched the GPU, the first call of a shape included."""
    x, w = activations(5, 1000, dtype), mc.quantize(weights(1000, 300), "int8", 32)
    cupy.cuda.Device().synchronize()
    (y,) = run_in_threads(1, lambda _: mc.matmul(x, w))
    assert_same_bits(y, mc.matmul(x, w))


def test_threads_may_race_for_the_first_call_of_a_shape() -> None:
    x = activations(7, 1000, "float16")
    w = mc.quantize(weights(1000, 300), "nf4", 32)
    expected = mc.matmul(x, mc.QuantizedTensor(w.spec, w.packed))
    cupy.cuda.Device().synchronize()
    for y in run_in_threads(8, lambda _: mc.matmul(x, w)):
        assert_same_bits(y, expected)


# ---- arrays that are not CuPy's


@every_dtype
def test_a_numpy_array_goes_to_the_gpu_and_comes_back(dtype: str) -> None:
    w = mc.quantize(weights(333, 65), "int4", 64)
    x, bias = activations(7, 333, dtype), activations(1, 65, dtype)[0]
    expected = to_host(mc.matmul(x, w, bias))
    y = mc.matmul(to_host(x), w, to_host(bias))
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y.view(np.uint16), expected.view(np.uint16))
    out = np.full_like(expected, np.nan)
    assert mc.matmul(to_host(x), w, to_host(bias), out=out) is out
    np.testing.assert_array_equal(out.view(np.uint16), expected.view(np.uint16))
    np.testing.assert_array_equal((to_host(x) @ w).view(np.uint16), to_host(x @ w).view(np.uint16))
    for strided in (np.asfortranarray(to_host(x)), np.repeat(to_host(x), 2, axis=1)[:, ::2]):
        y = mc.matmul(strided, w, to_host(bias))  # copied on its way anyhow
        np.testing.assert_array_equal(y.view(np.uint16), expected.view(np.uint16))
    assert mc.matmul(to_host(x)[:0], w).shape == (0, 65)


@every_dtype
def test_any_object_with_dlpack_is_an_array(dtype: str) -> None:
    w = mc.quantize(OnlyDlpack(weights(333, 65)), "int4", 64)
    assert w.device.kind == "cuda"
    x, bias = activations(7, 333, dtype), activations(1, 65, dtype)[0]
    expected = mc.matmul(x, w, bias)
    y = mc.matmul(OnlyDlpack(x), w, OnlyDlpack(bias))
    assert isinstance(y, cupy.ndarray)
    assert_same_bits(y, expected)
    memory = cupy.zeros_like(expected)
    out = OnlyDlpack(memory)
    assert mc.matmul(OnlyDlpack(x), w, OnlyDlpack(bias), out=out) is out
    assert_same_bits(memory, expected)
    if dtype == "float16":  # in host memory it is as good as a NumPy array, whose DLPack has no bfloat16
        y = mc.matmul(OnlyDlpack(x.get()), w, OnlyDlpack(bias.get()))
        np.testing.assert_array_equal(y, expected.get())


# ---- refusals


class Given(NamedTuple):
    """What the rows below are made of."""

    w: mc.QuantizedTensor  # (333, 65)
    x: cupy.ndarray  # float16 (7, 333)
    bias: cupy.ndarray


def half(*shape: int) -> cupy.ndarray:
    return cupy.empty(shape, cupy.float16)


REFUSALS: dict[str, tuple[Callable[[Given], Any], type[Exception], list[str]]] = {
    "GPU x, CPU weight": (lambda a: mc.matmul(a.x, a.w.to("cpu")), mc.DeviceError, ["cuda:0", "cpu", "w.to("]),
    "columns of x apart": (lambda a: mc.matmul(a.x.T.copy().T, a.w), ValueError, ["x has strides", "contiguous"]),
    "every second column": (
        lambda a: mc.matmul(half(7, 666)[:, ::2], a.w),
        ValueError,
        ["x has strides", "contiguous"],
    ),
    "x float32": (lambda a: mc.matmul(a.x.astype(cupy.float32), a.w), ValueError, ["float32", "float16 or bfloat16"]),
    "K": (lambda a: mc.matmul(a.x[:, 1:], a.w), ValueError, ["(7, 332)", "K=333"]),
    "bias in host memory": (lambda a: mc.matmul(a.x, a.w, a.bias.get()), TypeError, ["bias", "numpy", "cupy"]),
    "bias strided": (lambda a: mc.matmul(a.x, a.w, half(130)[::2]), ValueError, ["bias has strides", "contiguous"]),
    "bias shape": (lambda a: mc.matmul(a.x, a.w, a.bias[1:]), ValueError, ["bias", "(64,)", "(65,)"]),
    "bias bf16": (
        lambda a: mc.matmul(a.x, a.w, activations(1, 65, "bfloat16")[0]),
        ValueError,
        ["bias", "bfloat16", "float16"],
    ),
    "out in host memory": (
        lambda a: mc.matmul(a.x, a.w, out=np.empty((7, 65), np.float16)),
        TypeError,
        ["out", "numpy", "cupy"],
    ),
    "out shape": (lambda a: mc.matmul(a.x, a.w, out=half(7, 64)), ValueError, ["out", "(7, 64)", "(7, 65)"]),
    "out dtype": (lambda a: mc.matmul(a.x, a.w, out=half(7, 130).view(cupy.float32)), ValueError, ["out", "float32"]),
    "out transposed": (lambda a: mc.matmul(a.x, a.w, out=half(65, 7).T), ValueError, ["out has strides"]),
    "out every second column": (
        lambda a: mc.matmul(a.x, a.w, out=half(7, 130)[:, ::2]),
        ValueError,
        ["out has strides"],
    ),
    "out with gaps between axes": (
        lambda a: mc.matmul(half(7, 2, 333), a.w, out=half(7, 3, 65)[:, :2]),
        ValueError,
        ["out has strides"],
    ),
    "no such GPU": (lambda a: a.w.to("cuda:99"), mc.DeviceError, ["cuda:99"]),
    "update from the host": (lambda a: a.w.update_(weights(333, 65).get()), mc.DeviceError, ["cpu", "cuda:0"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_arguments_never_reach_the_gpu(case: str) -> None:
    call, error, fragments = REFUSALS[case]
    given = Given(mc.quantize(weights(333, 65)), activations(7, 333, "float16"), activations(1, 65, "float16")[0])
    expected = mc.matmul(given.x, given.w, given.bias)
    with pytest.raises(error) as caught:
        call(given)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert message.endswith(".")
    assert "\n" not in message
    assert_same_bits(mc.matmul(given.x, given.w, given.bias), expected)  # and the GPU still works
    cupy.cuda.Device().synchronize()
