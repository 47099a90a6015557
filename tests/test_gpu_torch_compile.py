"""PyTorch on a GPU beyond eager products: the operators compiled, captured and differentiated; layers and models."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import numpy as np
import pytest
from cases import DTYPES, FORMATS, HALF, fresh_gemm, gpu_groups, quantized
from gpu_arrays import activations, weights
from product import Product

import marlin_cupy as mc
from marlin_cupy import formats, frameworks, kernels
from marlin_cupy.device import gpu
from marlin_cupy.kernels import Dense, dequantize
from marlin_cupy.numerics import Rounding, dense_bound

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own import
    import torch
    from torch._dynamo.utils import counters

    from marlin_cupy.frameworks.torch import FRAMEWORK
    from marlin_cupy.integrations.torch import Linear, load_quantized_, quantize_model_, save_quantized

#: Tracing warns of what PyTorch itself does.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:::torch"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)
K, N = 1024, 520


def tensor(array: cupy.ndarray) -> Any:
    """A copy, bit for bit."""
    bits = torch.from_dlpack(array.view(cupy.int16)).clone()
    return bits.view(torch.float16 if array.dtype == cupy.float16 else torch.bfloat16)


def rows(M: int, dtype: str, columns: int = K) -> Any:
    return tensor(activations(M, columns, dtype))


def exact(found: Any) -> cupy.ndarray:
    return cupy.from_dlpack(found.detach().double())


def weight(name: str = "int4", group_size: int = 64, shape: tuple[int, int] = (K, N)) -> mc.QuantizedTensor:
    return quantized(weights(*shape) / 32, name, group_size).to("torch")


def layer(name: str, dtype: str, shape: tuple[int, int] = (K, N)) -> Linear:
    return Linear.from_quantized(weight(name, shape=shape), rows(1, dtype, shape[1])[0])


def same(a: Any, b: Any) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.view(torch.int16), b.view(torch.int16)))


# ---- the kernel for dense weights


@every_format
@every_dtype
@pytest.mark.parametrize("shape", [(1, 1), (127, 61), (128, 64), (333, 65), (1000, 300), (4160, 513)], ids=str)
def test_dense_weights_are_the_dequantized_ones(name: str, dtype: str, shape: tuple[int, int]) -> None:
    for group_size, scale_dtype in gpu_groups(name):
        w = mc.quantize(weights(*shape), name, group_size, scale_dtype=scale_dtype)
        in_float32 = w.dequantize("float32").astype(cupy.float64)
        slabs = -(-shape[0] // 128)
        for run in {range(slabs), range(slabs // 2, slabs), range(slabs - 1, slabs), range(1)}:
            found = kernels.DEQUANTIZE.ready(Dense(w.spec, dtype, gpu())).dense(FRAMEWORK, w.placed, run)
            start, stop = 128 * run.start, min(128 * run.stop, shape[0])
            assert tuple(found.shape) == (shape[1], stop - start)
            case = f"group_size={group_size}, scales {scale_dtype}, {run}"
            if formats.get(name).table is None:
                bits = cupy.ascontiguousarray(w.dequantize(dtype).view(cupy.uint16)[start:stop].T)
                assert same(found.contiguous(), tensor(bits.view(DTYPES[dtype]))), case
            else:  # its table is in float16
                right = in_float32[start:stop].T
                assert bool((abs(exact(found) - right) <= dense_bound(right, dtype)).all()), case


def test_cupy_and_other_streams_can_have_dense_weights() -> None:
    w = mc.quantize(weights(1000, 300))
    expected = w.dequantize("float16").T
    cupy.cuda.Device().synchronize()
    framework, plan = frameworks.of(w.packed), kernels.DEQUANTIZE.ready(Dense(w.spec, "float16", gpu()))
    with cupy.cuda.Stream(non_blocking=True) as stream:
        found = plan.dense(framework, w.placed, range(8))
        stream.synchronize()
    cupy.testing.assert_array_equal(found, expected)


# ---- the operators


@every_format
@every_dtype
def test_the_operator_gives_what_cupy_gives(name: str, dtype: str) -> None:
    w = weight(name)
    bias = rows(1, dtype, N)[0]
    for M in (0, 1, 7, 33, 129):
        x = rows(M, dtype)
        arguments = ([w.packed, w.output_scales], bias, name, K, N, w.group_size, w.scale_dtype, False, True)
        y = torch.ops.marlin_cupy.matmul(x, *arguments)
        assert same(y, mc.matmul(x, w, bias)), f"M={M}"
        if M > 1:
            turned = x.T.contiguous().T
            assert same(torch.ops.marlin_cupy.matmul(turned, *arguments), y)
            wide = torch.zeros((M, K + 9), dtype=x.dtype, device="cuda")
            wide[:, 3 : K + 3] = x
            assert same(
                torch.ops.marlin_cupy.matmul(wide[:, 3 : K + 3], *arguments), mc.matmul(wide[:, 3 : K + 3], w, bias)
            )


@pytest.mark.parametrize("grad", [False, True])
def test_opcheck(grad: bool) -> None:
    w = weight("uint4")
    x, y = rows(3, "float16").requires_grad_(grad), rows(3, "float16", N).requires_grad_(grad)
    spec = ("uint4", K, N, 64, w.scale_dtype)
    torch.library.opcheck(
        torch.ops.marlin_cupy.matmul, (x, [w.packed, w.output_scales], y.detach()[0], *spec, False, True)
    )
    torch.library.opcheck(torch.ops.marlin_cupy.matmul_transposed, (y, [w.packed, w.output_scales], *spec))


# ---- gradients


@every_format
@every_dtype
def test_gradients_against_float64(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("fp16", "bf16"):
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction", False)
    for shape, group_size, scale_dtype in (((K, N), 64, dtype), ((1000, 300), 16, "bfloat16"), ((333, 65), -1, dtype)):
        w = quantized(weights(*shape), name, group_size, scale_dtype).to("torch")
        dense = exact(w.dequantize("float32"))
        for M in (1, 7, 130):
            x, bias = rows(M, dtype, shape[0]).requires_grad_(), rows(1, dtype, shape[1])[0].requires_grad_()
            gradient = rows(M, dtype, shape[1])
            rounding = Rounding(dtype, formats.get(name).table is not None, weights=True)  # dense weights are rounded
            whole = Product(exact(gradient), dense.T)
            for run_bytes in (64 << 20, 1):  # at once, and slab by slab
                monkeypatch.setattr(dequantize, "_RUN_BYTES", run_bytes)
                x.grad = bias.grad = None
                mc.matmul(x, w, bias).backward(gradient)
                case = f"{shape}, group_size={group_size}, M={M}, runs of {run_bytes}"
                whole.check(exact(x.grad), rounding, case)
                torch.testing.assert_close(bias.grad, gradient.float().sum(0).to(x.dtype))


def test_a_gradient_has_a_gradient() -> None:
    w = weight()
    x, gradient, v = rows(3, "float16").requires_grad_(), rows(3, "float16", N).requires_grad_(), rows(3, "float16")
    (of_x,) = torch.autograd.grad(mc.matmul(x, w), x, gradient, create_graph=True)
    (of_gradient,) = torch.autograd.grad(of_x, gradient, v)
    assert same(of_gradient, mc.matmul(v, w))


def test_the_backward_keeps_no_dense_weight() -> None:
    w = mc.quantize(weights(4096, 14336)).to("torch")
    x = rows(16, "float16", 4096).requires_grad_()
    mc.matmul(x, w).sum().backward()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = mc.matmul(x, w)
    assert torch.cuda.memory_allocated() - before < 4 << 20
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 80 << 20  # of 117 MB dense, 64 at a time


# ---- compiled


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@every_format
@every_dtype
def test_layers_are_compiled(name: str, dtype: str, mode: str) -> None:
    torch.compiler.reset()
    counters.clear()
    model = torch.nn.Sequential(layer(name, dtype), torch.nn.ReLU(), layer(name, dtype, (N, 300)))
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for M in (1, 16):
            for turn in range(4):
                x = rows(M, dtype) * (turn + 1) / 4
                torch.compiler.cudagraph_mark_step_begin()
                assert same(compiled(x).clone(), model(x)), f"M={M}, {turn}"
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    "product",
    [lambda x, w, bias: mc.matmul(x, w, bias), lambda x, w, bias: (x @ w) + bias],
    ids=["mc.matmul", "x @ w"],
)
def test_products_are_compiled(product: Callable[..., Any], mode: str) -> None:
    torch.compiler.reset()
    w, bias = weight(), rows(1, "float16", N)[0]

    def function(x: Any) -> Any:
        return torch.relu(product(x * 2, w, bias))

    compiled = torch.compile(function, fullgraph=True, mode=mode)
    for M in (5, 5, 5, 6, 9):
        x = rows(M, "float16")
        assert same(compiled(x).clone(), function(x))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_is_compiled(mode: str) -> None:
    torch.compiler.reset()
    model = torch.nn.Sequential(layer("nf4", "bfloat16"), torch.nn.ReLU(), layer("int8", "bfloat16", (N, 300)))
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    gradient = rows(16, "bfloat16", 300)
    for _ in range(4):
        x = rows(16, "bfloat16").requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x).backward(gradient)
        found = [x.grad.clone(), *(parameter.grad.clone() for parameter in model.parameters())]
        x.grad = None
        model.zero_grad()
        model(x).backward(gradient)
        for one, expected in zip(found, [x.grad, *(parameter.grad for parameter in model.parameters())], strict=True):
            torch.testing.assert_close(one, expected, rtol=2e-2, atol=2e-2 * float(expected.abs().max()))
        model.zero_grad()


def test_export() -> None:
    torch.compiler.reset()
    its = layer("uint4", "float16")
    program = torch.export.export(
        its, (rows(5, "float16"),), dynamic_shapes={"x": {0: torch.export.Dim("rows", max=64)}}
    )
    for M in (5, 9):
        assert same(program.module()(rows(M, "float16")), its(rows(M, "float16")))


# ---- CUDA graphs


@every_dtype
@pytest.mark.parametrize("M", [1, 33])
def test_forward_and_backward_are_captured(dtype: str, M: int) -> None:
    its = layer("int4", dtype)
    x, gradient = torch.zeros_like(rows(M, dtype)).requires_grad_(), rows(M, dtype, N)

    def step() -> tuple[Any, ...]:
        y = its(x)
        return (y, *torch.autograd.grad(y, (x, its.bias), gradient))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for turn in range(5):
        with torch.no_grad():
            x.copy_(rows(M, dtype) * (turn + 1) / 4)
        expected = step()
        for each in captured:
            each.detach().fill_(float("nan"))
        graph.replay()
        for found, right in zip(captured, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))
        assert same(captured[0], expected[0])


def test_a_graph_sees_a_state_that_was_loaded_later() -> None:
    versions = [Linear.from_quantized(mc.quantize(weights(K, N)[::step].copy() / 32)) for step in (1, -1)]
    its = copy.deepcopy(versions[0])
    x = rows(8, "float16")
    expected = [each(x) for each in versions]
    its(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = its(x)
    address = its.packed.data_ptr(), its.output_scales.data_ptr()
    for turn in range(10):
        its.load_state_dict(versions[turn % 2].state_dict())
        assert (its.packed.data_ptr(), its.output_scales.data_ptr()) == address
        y.fill_(float("nan"))
        graph.replay()
        assert same(y, expected[turn % 2])
        assert same(its(x), expected[turn % 2])


# ---- dependent launches


@pytest.mark.hopper
def test_the_first_launch_after_a_write_is_plain(kinds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GEMM", fresh_gemm("sm80_gemm"))
    its, other = layer("int4", "float16"), layer("int4", "float16")
    x = rows(1, "float16")

    def launches() -> list[str]:
        kinds.clear()
        its(x)
        its(x)
        return kinds

    launches()
    assert launches() == ["dependent", "dependent"]

    def by_hand() -> None:
        with torch.no_grad():
            its.packed.copy_(other.packed)
        its.mark_written()

    for write in (
        lambda: its.load_state_dict(other.state_dict()),
        lambda: its.load_state_dict(other.cpu().state_dict()),
        lambda: its.cpu().cuda(),
        lambda: copy.deepcopy(its),
        lambda: quantize_model_(torch.nn.Sequential(torch.nn.Linear(64, 64, device="cuda"))),
        by_hand,
    ):
        write()
        assert launches() == ["plain", "dependent"]
    its.bfloat16().half()
    assert launches() == ["dependent", "dependent"]


@pytest.mark.hopper
def test_no_stale_weight_after_load_state_dict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "GEMM", fresh_gemm("sm80_gemm"))
    values = weights(2048, 64 * 132) / 45
    versions = [Linear.from_quantized(mc.quantize(each)) for each in (values, values[::-1].copy())]
    states = [version.state_dict() for version in versions]
    its = copy.deepcopy(versions[0])
    for M in (1, 16, 40):
        x = rows(M, "float16", 2048)
        expected = [version(x) for version in versions]
        wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for turn in range(40):
            its.load_state_dict(states[turn % 2])
            for _ in range(3):
                wrong += (its(x) != expected[turn % 2]).sum()
        assert int(wrong) == 0


@pytest.mark.hopper
def test_a_batch_invariant_layer() -> None:
    its = layer("int4", "float16")
    its.batch_invariant = True
    x = rows(129, "float16")
    whole = its(x)
    for M in (1, 16, 65):
        assert same(its(x[:M]), whole[:M])


# ---- layers and models


@every_format
def test_layers_move(name: str) -> None:
    x = rows(5, "float16")
    on_gpu = layer(name, "float16")
    expected = on_gpu(x)
    factors = on_gpu.output_scales.clone()
    assert factors.is_cuda
    source = weight(name)
    shared = Linear.from_quantized(source)
    assert torch.equal(factors, source.output_scales)
    source.update_(weights(K, N)[::-1].copy())  # into the memory of the layer, factors included
    assert same(shared(x), mc.matmul(x, quantized(weights(K, N)[::-1].copy(), name, 64)))
    on_host = copy.deepcopy(on_gpu).cpu()
    assert on_host.output_scales is None
    torch.testing.assert_close(on_host(x.cpu()), expected.cpu(), rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    again = on_host.to("cuda")
    assert same(again(x), expected)
    assert torch.equal(again.output_scales, factors)
    again.bfloat16()
    assert again.output_scales.dtype == torch.float32
    assert torch.equal(again.output_scales, factors)
    again.half()
    assert torch.equal(again.bias, on_gpu.bias.bfloat16().half())
    assert same(again(x), mc.matmul(x, again.quantized, again.bias.detach()))
    with pytest.raises(mc.DeviceError, match=r"cpu.*cuda"):
        on_gpu(x.cpu())
    with torch.autocast("cuda", torch.float16):
        assert same(on_gpu(x.float()), expected)


def test_a_model_in_host_memory_is_quantized_on_the_gpu(tmp_path: Path) -> None:
    def dense() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(*[torch.nn.Linear(2048, 2048).half() for _ in range(6)])

    model = dense()
    quantize_model_(torch.nn.Sequential(torch.nn.Linear(2048, 2048).half()), device="cuda")  # kernels are compiled
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    free = pool.free_bytes()  # beside what other tests keep
    before = pool.used_bytes() + torch.cuda.memory_allocated()
    report = quantize_model_(model, device="cuda")
    assert all(each.packed.is_cuda and each.bias.is_cuda for each in model)
    assert pool.used_bytes() + torch.cuda.memory_allocated() - before < 1.2 * report.bytes_after
    assert pool.free_bytes() <= free
    x = rows(5, "float16", 2048)
    expected = dense().cuda()(x)
    assert float((model(x) - expected).float().norm() / expected.float().norm()) < 0.3
    save_quantized(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = dense()
    load_quantized_(other, tmp_path / "model.safetensors", device="cuda")
    assert same(other(x), model(x))
    other = dense().cuda()
    load_quantized_(other, tmp_path / "model.safetensors")
    assert same(other(x), model(x))


@pytest.mark.two_gpus
def test_ranks_share_layers(tmp_path: Path) -> None:
    script = Path(__file__).with_name("torch_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    subprocess.run([sys.executable, str(script), "nccl", str(tmp_path)], env=environment, check=True, timeout=300)


@pytest.mark.two_gpus
def test_layers_work_on_the_second_gpu() -> None:
    its = layer("int4", "float16")
    x, gradient = rows(5, "float16"), rows(5, "float16", N)
    expected = its(x)
    there = copy.deepcopy(its).to("cuda:1")
    assert gpu(1).index == there.quantized.device.index == 1
    elsewhere = x.to("cuda:1").requires_grad_()
    y = there(elsewhere)
    assert same(y.detach().to("cuda:0"), expected.detach())
    y.backward(gradient.to("cuda:1"))
    x.requires_grad_()
    its(x).backward(gradient)
    torch.testing.assert_close(elsewhere.grad.to("cuda:0"), x.grad)


def test_numpy_knows_nothing_of_it() -> None:
    """A weight that went through PyTorch is the same for the others."""
    w = weight()
    back = w.to("cupy")
    assert back.placed.pointer == w.placed.pointer
    assert back.placed.factors_pointer == w.placed.factors_pointer == w.output_scales.data_ptr()
    np.testing.assert_array_equal(back.output_scales.get(), w.output_scales.cpu().numpy())
