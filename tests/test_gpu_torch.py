"""PyTorch tensors on a GPU: eager, on any stream, and while a CUDA graph is captured and replayed."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import cupy
import numpy as np
import pytest
from cases import FORMATS, HALF, fresh_gemm, gaussian, quantized
from gpu_arrays import activations, assert_same_bits, cut_and_whole, weights

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.jit import launch

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)


@pytest.fixture(scope="module")
def torch() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own import
        import torch
    assert torch.cuda.is_available()
    return torch


def to_torch(torch: ModuleType, array: cupy.ndarray) -> Any:
    """A tensor over the same memory, bit for bit."""
    bits = torch.from_dlpack(array.view(cupy.int16))
    return bits.view(torch.float16 if array.dtype == cupy.float16 else torch.bfloat16)


def to_cupy(torch: ModuleType, tensor: Any, like: cupy.ndarray) -> cupy.ndarray:
    return cupy.from_dlpack(tensor.detach().view(torch.int16)).view(like.dtype)


def same(torch: ModuleType, a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))


# ---- eager


@every_format
@every_dtype
def test_tensors_give_what_cupy_gives(torch: ModuleType, name: str, dtype: str) -> None:
    w = quantized(weights(1000, 300), name, 64)
    bias = activations(1, 300, dtype)[0]
    for M in (0, 1, 7, 33, 129):
        x = activations(M, 1000, dtype)
        y = mc.matmul(to_torch(torch, x), w, to_torch(torch, bias))
        assert isinstance(y, torch.Tensor)
        assert y.device == torch.device("cuda", 0)
        expected = mc.matmul(x, w, bias)
        if M:
            assert_same_bits(to_cupy(torch, y, expected), expected, f"M={M}")
        assert tuple(y.shape) == expected.shape


@every_dtype
def test_out_views_axes_and_the_operator(torch: ModuleType, dtype: str) -> None:
    w = mc.quantize(weights(333, 65), "int4", 64)
    x = to_torch(torch, activations(24, 333, dtype))
    expected = mc.matmul(x, w)
    assert same(torch, x @ w, expected)
    assert same(torch, mc.matmul(x.reshape(2, 3, 4, 333), w), expected.reshape(2, 3, 4, 65))
    assert same(torch, mc.matmul(x[3], w), mc.matmul(x[3:4], w)[0])
    out = torch.full_like(expected, float("nan"))
    assert mc.matmul(x, w, out=out) is out
    assert same(torch, out, expected)
    wide = torch.full((24, 80), float("nan"), dtype=x.dtype, device="cuda")
    mc.matmul(x, w, out=wide[:, 5:70])
    assert same(torch, wide[:, 5:70].contiguous(), expected)
    assert bool(wide[:, :5].isnan().all())
    assert bool(wide[:, 70:].isnan().all())
    assert same(
        torch, mc.matmul(x[::2], w, out=torch.empty_like(expected[::2].contiguous())), mc.matmul(x[::2].contiguous(), w)
    )


def test_parameters_are_tensors_and_no_gradient_is_lost(torch: ModuleType) -> None:
    w = mc.quantize(weights(333, 65))
    x = to_torch(torch, activations(7, 333, "float16")).clone()
    bias = torch.ones(65, dtype=torch.float16, device="cuda")
    expected = mc.matmul(x, w, bias)
    for followed in (torch.nn.Parameter(x), x.clone().requires_grad_()):
        with torch.no_grad():
            assert same(torch, mc.matmul(followed, w, bias), expected)
        assert same(torch, mc.matmul(followed.detach(), w, bias), expected)
        gradients = []
        for held in (w, w.to("torch")):
            y = mc.matmul(followed, held, bias)
            assert same(torch, y.detach(), expected)
            gradients += torch.autograd.grad(y.sum(), followed)
        assert bool(gradients[0].isfinite().all())
        assert same(torch, *gradients)
    of_bias = torch.nn.Parameter(bias)
    mc.matmul(x, w, of_bias).sum().backward()
    assert bool((of_bias.grad == 7).all())
    with pytest.raises(Exception, match=r"w\.packed is a cupy array; use w\.to\('torch'\)"):
        torch.compile(lambda x: mc.matmul(x, w, bias), fullgraph=True, backend="eager")(x)
    with torch.inference_mode():
        assert same(torch, mc.matmul(x.clone(), w, torch.nn.Parameter(bias)), expected)


@every_dtype
def test_weights_of_a_linear_layer_are_quantized_where_they_are(torch: ModuleType, dtype: str) -> None:
    layer = torch.nn.Linear(333, 65, dtype=getattr(torch, dtype), device="cuda")
    w = mc.quantize(layer.weight.T, "int4", 64)
    assert w.device.kind == "cuda"
    assert w.scale_dtype == dtype
    host = layer.weight.detach().T.float().cpu().numpy()
    expected = mc.quantize(host, "int4", 64, scale_dtype=dtype)
    np.testing.assert_array_equal(w.packed.get(), expected.packed)


def test_moving_to_torch_shares_memory(torch: ModuleType) -> None:
    w = mc.quantize(weights(333, 65))
    in_torch = w.to("torch")
    assert isinstance(in_torch.packed, torch.Tensor)
    assert in_torch.packed.data_ptr() == in_torch.placed.pointer == w.placed.pointer
    assert in_torch.to("cupy").placed.pointer == w.placed.pointer
    x = activations(7, 333, "float16")
    assert_same_bits(mc.matmul(x, in_torch), mc.matmul(x, w))
    dequantized = in_torch.dequantize("bfloat16")
    assert isinstance(dequantized, torch.Tensor)
    assert dequantized.dtype == torch.bfloat16
    other = gaussian(333, 65, seed=1)
    assert in_torch.update_(torch.from_numpy(other).cuda()).placed.pointer == w.placed.pointer
    np.testing.assert_array_equal(w.packed.get(), mc.quantize(other).packed)


@every_dtype
def test_tensors_in_host_memory_use_the_reference(torch: ModuleType, dtype: str) -> None:
    w = mc.quantize(weights(333, 65), "int4", 64).to("cpu")
    x = to_torch(torch, activations(7, 333, dtype)).cpu()
    y = mc.matmul(x, w)
    assert y.device == torch.device("cpu")
    assert y.dtype == x.dtype
    on_gpu = mc.matmul(x.cuda(), w.to("cuda")).cpu()
    torch.testing.assert_close(y, on_gpu, rtol=2e-2, atol=2e-2)
    assert w.to("torch").packed.device == torch.device("cpu")


# ---- streams and threads


@every_dtype
def test_torch_streams_do_not_disturb_one_another(torch: ModuleType, dtype: str) -> None:
    work = [(to_torch(torch, activations(M, w.shape[0], dtype)), w) for M in (1, 33) for w in cut_and_whole(dtype, M)]
    expected = [mc.matmul(x, w) for x, w in work]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for number in range(200):
        index = number // 4 % len(work)
        with torch.cuda.stream(streams[number % 4]):
            results.append((index, mc.matmul(*work[index])))
    torch.cuda.synchronize()
    assert all(same(torch, y, expected[index]) for index, y in results)


def test_a_product_waits_for_what_its_torch_stream_did_before(torch: ModuleType) -> None:
    w, _ = cut_and_whole("bfloat16", 16)
    x = to_torch(torch, activations(16, w.shape[0], "bfloat16"))
    expected = mc.matmul(x, w)
    busy, late = torch.ones(4096, 4096, device="cuda"), torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(10):
            busy = busy @ busy * 1e-4
        late.copy_(x)
        y = mc.matmul(late, w).clone()
    stream.synchronize()
    assert same(torch, y, expected)


def test_a_fresh_thread_can_multiply(torch: ModuleType) -> None:
    w = mc.quantize(weights(1000, 300), "uint4", 32)
    x = to_torch(torch, activations(5, 1000, "float16"))
    torch.cuda.synchronize()
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(mc.matmul(x, w)))
    thread.start()
    thread.join(timeout=120)
    assert len(results) == 1
    assert same(torch, results[0], mc.matmul(x, w))


# ---- CUDA graphs


@every_format
@pytest.mark.parametrize("M", [1, 33])
def test_a_product_can_be_captured_and_replayed(torch: ModuleType, name: str, M: int) -> None:
    for w in cut_and_whole("bfloat16", M, name):
        first = to_torch(torch, activations(M, w.shape[0], "bfloat16")).clone()
        second = first.flip(1).contiguous()
        expected = [mc.matmul(x, w) for x in (first, second)]
        x = torch.zeros_like(first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mc.matmul(x, w)
        for _ in range(20):
            for values, right in zip((first, second), expected, strict=True):
                x.copy_(values)
                y.fill_(float("nan"))
                graph.replay()
                assert same(torch, y, right)


@every_dtype
def test_the_first_call_of_a_shape_may_be_captured(
    torch: ModuleType, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled and loaded, and counters taken, while the stream is captured."""
    for cut in (0, 1):
        source = cut_and_whole(dtype, 5, "int8")[cut]
        w = mc.QuantizedTensor(source.spec, source.packed)
        x = to_torch(torch, activations(5, w.shape[0], dtype))
        monkeypatch.setattr(kernels, "GEMM", fresh_gemm())
        launch.load.cache_clear()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mc.matmul(x, w)
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert same(torch, y, mc.matmul(x, w))


@every_dtype
def test_a_graph_of_several_products(torch: ModuleType, dtype: str) -> None:
    first, second = mc.quantize(weights(4160, 513), "int4", 64), mc.quantize(weights(513, 300), "nf4", 64)
    bias = to_torch(torch, activations(1, 513, dtype)[0]).clone()
    x = to_torch(torch, activations(16, 4160, dtype)).clone()

    def layers() -> Any:
        return mc.matmul(torch.relu(mc.matmul(x, first, bias)) / 64, second)

    expected = layers()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers()
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        assert same(torch, y, expected)


def test_replay_beside_eager_launches_and_another_graph(torch: ModuleType) -> None:
    """Three users of one weight on three streams: their partial sums and counters must be three."""
    w, _ = cut_and_whole("float16", 16)
    x = to_torch(torch, activations(16, w.shape[0], "float16")).clone()
    expected = mc.matmul(x, w)
    graphs, outputs = [], []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs.append([mc.matmul(x, w) for _ in range(4)])
        graphs.append(graph)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    eager, replayed = [], []
    for _ in range(100):
        for graph, stream, ys in zip(graphs, streams, outputs, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
                replayed.append([y.clone() for y in ys])
        with torch.cuda.stream(streams[2]):
            eager += [mc.matmul(x, w) for _ in range(4)]
    torch.cuda.synchronize()
    assert all(same(torch, y, expected) for y in eager)
    assert all(same(torch, y, expected) for ys in replayed for y in ys)


def test_a_graph_of_dependent_launches_is_behind_an_update(torch: ModuleType) -> None:
    values = [torch.from_numpy(gaussian(2048, 2048, seed=seed)).cuda() / 45 for seed in (1, 2)]
    versions = [mc.quantize(each) for each in values]
    w = mc.quantize(values[0])
    x = to_torch(torch, activations(8, 2048, "float16")).clone()

    def layers(w: Any, dependent: bool = True) -> Any:
        y = mc.matmul(x, w, dependent=dependent)
        for _ in range(5):
            y = mc.matmul(y, w, dependent=dependent)
        return y

    expected = [layers(version, dependent=False) for version in versions]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layers(w)
    for turn in range(40):
        w.update_(values[turn % 2])
        if turn % 3 == 0:
            assert same(torch, layers(w), expected[turn % 2])
        y.fill_(float("nan"))
        graph.replay()
        assert same(torch, y, expected[turn % 2])


# ---- refusals


REFUSALS: dict[str, tuple[Callable[[ModuleType, Any, Any], Any], type[Exception], list[str]]] = {
    "CPU x, GPU weight": (lambda t, x, w: mc.matmul(x.cpu(), w), mc.DeviceError, ["cpu", "cuda:0", "w.to("]),
    "GPU x, CPU weight": (lambda t, x, w: mc.matmul(x, w.to("cpu")), mc.DeviceError, ["cuda:0", "cpu", "w.to("]),
    "meta x": (lambda t, x, w: mc.matmul(x.to("meta"), w), mc.DeviceError, ["meta", "cuda"]),
    "x transposed": (lambda t, x, w: mc.matmul(x.T.contiguous().T, w), ValueError, ["x has strides", "contiguous"]),
    "x float32": (lambda t, x, w: mc.matmul(x.float(), w), ValueError, ["float32", "float16 or bfloat16"]),
    "x int8": (lambda t, x, w: x.to(t.int8) @ w, ValueError, ["int8", "float16 or bfloat16"]),
    "K": (lambda t, x, w: mc.matmul(x[:, 1:], w), ValueError, ["(7, 332)", "K=333"]),
    "bias on the CPU": (lambda t, x, w: mc.matmul(x, w, x[0, :65].cpu()), mc.DeviceError, ["bias", "cpu", "cuda:0"]),
    "bias bf16": (lambda t, x, w: mc.matmul(x, w, x[0, :65].bfloat16()), ValueError, ["bias", "bfloat16", "float16"]),
    "bias strided": (lambda t, x, w: mc.matmul(x, w, x[0, :130:2]), ValueError, ["bias has strides", "contiguous"]),
    "bias in cupy": (lambda t, x, w: mc.matmul(x, w, cupy.zeros(65, cupy.float16)), TypeError, ["cupy", "torch"]),
    "out on the CPU": (lambda t, x, w: mc.matmul(x, w, out=x[:, :65].cpu()), mc.DeviceError, ["out", "cpu", "cuda:0"]),
    "out shape": (lambda t, x, w: mc.matmul(x, w, out=x[:, :64]), ValueError, ["out", "(7, 64)", "(7, 65)"]),
    "out bf16": (lambda t, x, w: mc.matmul(x, w, out=x[:, :65].bfloat16()), ValueError, ["out", "bfloat16"]),
    "out transposed": (
        lambda t, x, w: mc.matmul(x, w, out=x[:, :65].T.contiguous().T),
        ValueError,
        ["out has strides"],
    ),
    "weight int32": (lambda t, x, w: mc.quantize(x.int()), ValueError, ["int32", "float32"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_wrong_tensors_never_reach_the_gpu(torch: ModuleType, case: str) -> None:
    call, error, fragments = REFUSALS[case]
    w = mc.quantize(weights(333, 65))
    x = to_torch(torch, activations(7, 333, "float16")).clone()
    with pytest.raises(error) as caught:
        call(torch, x, w)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert message.endswith(".")
    assert "\n" not in message
    assert bool(torch.isfinite(mc.matmul(x, w)).all())  # and the GPU still works
    torch.cuda.synchronize()
