"""PyTorch on the CPU: the operators, compiled and exported, gradients, modules, models and their files."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from cases import FORMATS, GPUS, HALF, gaussian, rows
from product import Product
from rich.console import Console

import marlin_cupy as mc
from marlin_cupy import kernels
from marlin_cupy.kernels import Dense, dequantize
from marlin_cupy.numerics import Rounding
from marlin_cupy.timing import Summary

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own import
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from marlin_cupy.bench import report, stack, torch_stack
    from marlin_cupy.compilers import torch as compiler
    from marlin_cupy.integrations import torch as integration
    from marlin_cupy.integrations.torch import Linear, load_quantized_, quantize_model_, save_quantized

#: Tracing warns of what PyTorch itself does.
pytestmark = [pytest.mark.filterwarnings("ignore:::torch"), pytest.mark.filterwarnings("ignore::UserWarning")]

every_format = pytest.mark.parametrize("name", FORMATS)
every_dtype = pytest.mark.parametrize("dtype", HALF)
K, N = 200, 70


def tensor(array: np.ndarray) -> torch.Tensor:
    """Bit for bit, bfloat16 included."""
    if array.dtype == np.float16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def float64(found: torch.Tensor) -> np.ndarray:
    return found.detach().double().numpy()


def weight(name: str = "int4", group_size: int = 64, shape: tuple[int, int] = (K, N)) -> mc.QuantizedTensor:
    return mc.quantize(gaussian(*shape, seed=1), name, FORMATS[name].group(group_size)).to("torch")


def activations(M: int, dtype: str = "float16", columns: int = K) -> torch.Tensor:
    return tensor(rows((M, columns), seed=M + columns, dtype=dtype))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def operands(w: mc.QuantizedTensor, x: torch.Tensor, bias: torch.Tensor | None = None) -> tuple[Any, ...]:
    """Arguments of the operator."""
    spec = w.spec
    return x, compiler.given(w.parts), bias, spec.format, *spec.shape, spec.group_size, spec.scale_dtype, False, True


# ---- the operators


@every_format
@every_dtype
def test_the_operator_gives_what_numpy_gives(name: str, dtype: str) -> None:
    w, bias = weight(name), activations(1, dtype, N)[0]
    on_host = w.to("numpy")
    for M in (0, 1, 7):
        x = activations(M, dtype)
        expected = mc.matmul(rows((M, K), seed=M + K, dtype=dtype), on_host)
        assert same(torch.ops.marlin_cupy.matmul(*operands(w, x)), tensor(expected))
        assert same(torch.ops.marlin_cupy.matmul(*operands(w, x, bias)), mc.matmul(x, w, bias))
    cube = activations(6, dtype).reshape(2, 3, K)
    assert same(torch.ops.marlin_cupy.matmul(*operands(w, cube)), mc.matmul(cube, w))
    turned = cube.reshape(6, K).T.contiguous().T
    assert same(torch.ops.marlin_cupy.matmul(*operands(w, turned)), mc.matmul(cube, w).reshape(6, N))


@pytest.mark.parametrize("grad", [False, True])
@every_dtype
def test_opcheck(dtype: str, grad: bool) -> None:
    w, x, bias = weight("uint4"), activations(3, dtype).requires_grad_(grad), activations(1, dtype, N)[0]
    for arguments in (operands(w, x), operands(w, x, bias.requires_grad_(grad)), operands(w, x.detach()[None])):
        torch.library.opcheck(torch.ops.marlin_cupy.matmul, arguments)
    y = activations(3, dtype, N).requires_grad_(grad)
    arguments = (y, compiler.given(w.parts), *operands(w, x)[3:8])
    torch.library.opcheck(torch.ops.marlin_cupy.matmul_transposed, arguments)


# ---- eager products: without PyTorch's dispatcher, unless something follows


def test_modes_see_the_operator() -> None:
    seen: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    w, x = weight(), activations(3)
    layer = Linear.from_quantized(w)
    right = [mc.matmul(x, w), layer(x)]
    with Log():
        found = [mc.matmul(x, w), layer(x)]
    assert seen.count("marlin_cupy.matmul.default") == 2
    assert all(map(same, found, right))


def test_a_transformation_of_torch_func_meets_the_operator() -> None:
    w, x = weight(), activations(6).reshape(2, 3, K)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for marlin_cupy::matmul"):
        torch.func.vmap(lambda x: mc.matmul(x, w))(x)


def test_a_layer_notices_other_memory() -> None:
    x, first, second = activations(3), weight(), mc.quantize(gaussian(K, N, seed=2), "int4", 64).to("torch")
    layer = Linear.from_quantized(mc.QuantizedTensor(first.spec, first.packed.clone()))
    assert same(layer(x), mc.matmul(x, first))
    layer.packed.data = second.packed.data
    assert same(layer(x), mc.matmul(x, second))
    layer.packed = first.packed
    assert same(layer(x), mc.matmul(x, first))
    copy_of_it = copy.deepcopy(layer)
    assert same(copy_of_it(x), layer(x))


# ---- gradients


@every_format
@every_dtype
def test_gradients_are_those_of_the_dense_product(name: str, dtype: str) -> None:
    for group_size in (16, 64, -1):
        w = weight(name, group_size)
        x, bias = activations(7, dtype).requires_grad_(), activations(1, dtype, N)[0].requires_grad_()
        gradient = activations(7, dtype, N)
        y = mc.matmul(x, w, bias)
        assert same(y.detach(), mc.matmul(x.detach(), w, bias.detach()))
        y.backward(gradient)
        assert x.grad is not None
        assert bias.grad is not None
        assert x.grad.dtype == x.dtype
        dense = w.dequantize("float32").double().numpy()
        Product(float64(gradient), dense.T).check(float64(x.grad), Rounding(dtype), name)
        assert same(bias.grad, gradient.float().sum(0).to(x.dtype))


def test_gradients_of_views_and_of_many_axes() -> None:
    w = weight()
    x = activations(6).reshape(2, 3, K).requires_grad_()
    (x @ w).sum().backward()
    assert x.grad is not None
    turned = x.detach().permute(1, 0, 2).requires_grad_()
    (turned @ w).sum().backward()
    assert turned.grad is not None
    assert same(turned.grad.permute(1, 0, 2), x.grad)
    empty = activations(0).requires_grad_()
    (empty @ w).sum().backward()
    assert empty.grad is not None
    assert empty.grad.shape == (0, K)


@pytest.mark.parametrize("run_bytes", [1, 2 * 128 * N * 2, 1 << 20])
def test_gradients_from_dense_runs_are_put_side_by_side(run_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU does around its kernel, with NumPy in place of that."""
    w = weight(shape=(600, N))
    dense = w.dequantize("float16").T

    class Plan:
        def __init__(self, problem: Dense) -> None:
            assert problem == Dense(w.spec, "float16", GPUS["sm_90a"])

        def dense(self, framework: Any, packed: Any, run: range) -> torch.Tensor:
            assert packed.pointer == w.packed.data_ptr()
            return dense[:, 128 * run.start : 128 * run.stop]

    monkeypatch.setattr(dequantize, "_RUN_BYTES", run_bytes)
    monkeypatch.setattr(compiler, "gpu", lambda index: GPUS["sm_90a"])
    monkeypatch.setattr(kernels.DEQUANTIZE, "ready", Plan)
    for y in (activations(6, columns=N).reshape(2, 3, N), activations(1, columns=N).expand(4, N)):
        spec = (w.format, *w.shape, w.group_size, w.scale_dtype)
        found = compiler._transposed_cuda(y, [w.packed, torch.ones(N)], *spec)
        expected = compiler._transposed_cpu(y, [w.packed], *spec)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_gradient_has_a_gradient() -> None:
    w = weight()
    x, gradient, v = activations(3).requires_grad_(), activations(3, columns=N).requires_grad_(), activations(3)
    (of_x,) = torch.autograd.grad(mc.matmul(x, w), x, gradient, create_graph=True)
    (of_gradient,) = torch.autograd.grad(of_x, gradient, v)
    assert same(of_gradient, mc.matmul(v, w))


def test_no_gradient_is_computed_that_nobody_asked_for() -> None:
    w, x, bias = weight(), activations(3), torch.ones(N, dtype=torch.float16, requires_grad=True)
    mc.matmul(x, w, bias).sum().backward()
    assert bias.grad is not None
    assert same(bias.grad, torch.full((N,), 3, dtype=torch.float16))
    with torch.no_grad():
        assert not mc.matmul(x, w, bias).requires_grad
    with torch.inference_mode():
        assert not mc.matmul(x.clone(), w, bias).requires_grad
    with pytest.raises(RuntimeError, match="floating point"):
        w.packed.requires_grad_()  # codes are integers, as PyTorch says itself


# ---- compiled and exported


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "product",
    [lambda x, w, bias: mc.matmul(x, w, bias), lambda x, w, bias: (x @ w) + bias, lambda x, w, b: torch.matmul(x, w)],
    ids=["mc.matmul", "x @ w", "torch.matmul"],
)
def test_a_product_is_compiled_without_a_break(backend: str, product: Callable[..., torch.Tensor]) -> None:
    torch.compiler.reset()
    w, bias = weight(), activations(1, columns=N)[0]

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(product(x * 2, w, bias))

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for M in (5, 6, 9):  # the second makes M symbolic
        assert same(compiled(activations(M)), function(activations(M)))


def test_gradients_are_compiled() -> None:
    torch.compiler.reset()
    w, x, bias = weight(), activations(5).requires_grad_(), activations(1, columns=N)[0].requires_grad_()
    torch.compile(lambda: torch.relu(mc.matmul(x, w, bias)).sum(), fullgraph=True, backend="aot_eager")().backward()
    found = x.grad, bias.grad
    x.grad = bias.grad = None
    torch.relu(mc.matmul(x, w, bias)).sum().backward()
    for gradient, expected in zip(found, (x.grad, bias.grad), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    torch.compiler.reset()
    layer = Linear.from_quantized(weight("nf4"), activations(1, columns=N)[0])
    x = activations(5)
    rows_of_x = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    program = torch.export.export(layer, (x,), dynamic_shapes=rows_of_x, strict=strict)
    assert any("marlin_cupy.matmul" in str(node.target) for node in program.graph.nodes)
    for M in (5, 9):
        assert same(program.module()(activations(M)), layer(activations(M)))


def test_tensors_that_stand_for_others_go_through_the_operator() -> None:
    w = weight()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = mc.matmul(mode.from_tensor(activations(5)), w)
    assert isinstance(y, torch._subclasses.FakeTensor)
    assert y.shape == (5, N)


def test_a_weight_of_another_library_is_handed_over() -> None:
    w, x = weight(), activations(5).requires_grad_()
    gradients = []
    for held in (w, w.to("numpy")):
        y = mc.matmul(x, held)
        gradients += torch.autograd.grad(y.sum(), x)
    assert same(*gradients)


# ---- refusals of products

REFUSALS: dict[str, tuple[Callable[[Any, Any], Any], type[Exception], list[str]]] = {
    "out": (lambda x, w: mc.matmul(x, w, out=torch.empty(5, N)), TypeError, ["out", "torch"]),
    "K": (lambda x, w: mc.matmul(x[:, 1:], w), ValueError, ["(5, 199)", "K=200"]),
    "float32": (lambda x, w: mc.matmul(x.float(), w), ValueError, ["float32", "float16 or bfloat16"]),
    "bias dtype": (lambda x, w: mc.matmul(x, w, torch.zeros(N)), ValueError, ["bias is float32", "float16(70,)"]),
    "bias shape": (lambda x, w: mc.matmul(x, w, x[0, :3]), ValueError, ["bias is float16(3,)", "float16(70,)"]),
    "another device": (lambda x, w: mc.matmul(x.to("meta"), w), mc.DeviceError, ["meta", "cpu"]),
    "of a layer: K": (lambda x, w: Linear.from_quantized(w)(x[:, 1:]), ValueError, ["(5, 199)", "K=200"]),
    "of a layer: dtype": (lambda x, w: Linear.from_quantized(w)(x.float()), ValueError, ["float32", "x.to(torch."]),
    "of a layer: a scalar": (lambda x, w: Linear.from_quantized(w)(x[0, 0]), ValueError, ["shape ()", "K=200"]),
    "of a layer: bias": (
        lambda x, w: Linear.from_quantized(w, x[0, :N].detach())(x.bfloat16()),
        ValueError,
        ["bias is float16(70,)", "bfloat16(70,)"],
    ),
    "of a layer: device": (lambda x, w: Linear.from_quantized(w)(x.to("meta")), mc.DeviceError, ["meta", "cpu"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_said_in_a_sentence(case: str) -> None:
    call, error, fragments = REFUSALS[case]
    with pytest.raises(error) as caught:
        call(activations(5).requires_grad_(), weight())
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert str(caught.value).endswith(".")
    assert "\n" not in str(caught.value)


def test_a_compiled_function_wants_it_in_the_hands_of_pytorch() -> None:
    torch.compiler.reset()
    w = weight().to("numpy")
    with pytest.raises(Exception, match=r"w\.packed is a numpy array; use w\.to\('torch'\)"):
        torch.compile(lambda x: mc.matmul(x, w), fullgraph=True, backend="eager")(activations(5))


# ---- Linear


@every_format
@every_dtype
def test_a_layer_is_the_quantized_product(name: str, dtype: str) -> None:
    dense = torch.nn.Linear(K, N, dtype=getattr(torch, dtype))
    size = FORMATS[name].group(64)
    layer = Linear.from_linear(dense, name, size)
    x = activations(5, dtype)
    expected = mc.quantize(dense.weight.T, name, size)
    assert same(layer(x).detach(), mc.matmul(x, expected, dense.bias.detach()))
    assert torch.equal(layer.packed, expected.to("torch").packed)
    assert layer.quantized.packed.data_ptr() == layer.packed.data_ptr()
    assert layer.bias is dense.bias
    for part in (
        name,
        "in_features=200",
        "out_features=70",
        f"group_size={size}",
        f"scale_dtype={expected.scale_dtype}",
    ):
        assert part in repr(layer)
    assert "bias=True" in repr(layer)
    assert Linear.from_linear(torch.nn.Linear(K, N, bias=False).half())(activations(5)).shape == (5, N)


def test_a_layer_from_what_it_needs_to_be_loaded() -> None:
    source = Linear.from_quantized(weight("uint4", 32), torch.ones(N, dtype=torch.float16))
    layer = Linear(K, N, format="uint4", group_size=32)
    assert not layer.packed.any()
    assert layer.load_state_dict(source.state_dict()).missing_keys == []
    assert same(layer(activations(5)), source(activations(5)))
    bare = Linear(K, N, bias=False, format="nf4", dtype=torch.bfloat16)
    assert (bare.bias, bare.spec.group_size, bare.spec.scale_dtype) == (None, 64, "bfloat16")
    with torch.device("meta"):
        layer = Linear(K, N, format="uint4", group_size=32)
    assert layer.packed.is_meta
    layer.load_state_dict(source.state_dict(), assign=True)
    assert same(layer(activations(5)), source(activations(5)))


def test_changes_of_dtype_leave_the_weight_alone() -> None:
    layer = Linear.from_quantized(weight(), torch.ones(N, dtype=torch.float16))
    packed = layer.packed.clone()
    for change in (
        lambda: layer.bfloat16(),
        lambda: layer.float(),
        lambda: layer.double(),
        lambda: layer.to(torch.bfloat16),
        lambda: layer.type(torch.float16),
        lambda: layer.half(),
    ):
        change()
        assert same(layer.packed, packed)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    layer.to(torch.bfloat16)
    assert layer(activations(5, "bfloat16")).dtype == torch.bfloat16
    layer.to_empty(device="cpu")
    assert layer.packed.dtype == torch.uint8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_layers_of_their_own(copied: Callable[[Linear], Linear]) -> None:
    layer = Linear.from_quantized(weight(), torch.ones(N, dtype=torch.float16)).eval()
    layer.batch_invariant = True
    other = copied(layer)
    assert other.packed.data_ptr() != layer.packed.data_ptr()
    assert (other.spec, other.training, other.batch_invariant) == (layer.spec, False, True)
    expected = layer(activations(5))
    layer.packed.zero_()
    assert same(other(activations(5)), expected)


def test_autocast_casts_activations_and_bias() -> None:
    layer = Linear.from_quantized(weight(), torch.ones(N))
    x = torch.randn(5, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.bias is not None
    assert layer.bias.grad is not None


def test_a_batch_invariant_layer() -> None:
    layer = Linear.from_quantized(weight())
    layer.batch_invariant = True
    x = activations(9)
    assert same(layer(x)[3:4], layer(x[3:4]))


def test_a_state_travels_through_files(tmp_path: Path) -> None:
    model = torch.nn.Sequential(Linear.from_quantized(weight(), torch.ones(N, dtype=torch.float16)))
    assert set(model.state_dict()) == {"0.packed", "0.bias", "0._extra_state"}
    torch.save(model.state_dict(), tmp_path / "state.pt")
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state.safetensors")
    for state in (
        torch.load(tmp_path / "state.pt", weights_only=True),
        safetensors.torch.load_file(tmp_path / "state.safetensors"),
    ):
        other = torch.nn.Sequential(Linear(K, N, group_size=64))
        other.load_state_dict(state)
        assert same(other(activations(5)), model(activations(5)))


def test_scales_of_outputs_are_part_of_the_state(tmp_path: Path) -> None:
    w = weight("fp8_e4m3", -1)
    layer = Linear.from_quantized(w, torch.ones(N, dtype=torch.float16))
    x, expected = activations(5), layer(activations(5))
    assert same(expected, mc.matmul(x, w, torch.ones(N, dtype=torch.float16)))
    assert set(layer.state_dict()) == {"packed", "output_scales", "bias", "_extra_state"}
    for other in (
        Linear(K, N, format="fp8_e4m3"),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        layer.bfloat16().half(),
    ):
        other.load_state_dict(layer.state_dict())
        assert other.output_scales is not None
        assert other.output_scales.dtype == torch.float32
        assert same(other(x), expected)
    lacking = {name: value for name, value in layer.state_dict().items() if name != "output_scales"}
    with pytest.raises(RuntimeError, match="output_scales"):
        layer.load_state_dict(lacking)
    with torch.no_grad():
        assert layer.output_scales is not None
        layer.output_scales.mul_(2)
    layer.mark_written()
    assert same(layer(x), mc.matmul(x, layer.quantized, layer.bias.detach()))
    assert not same(layer(x), expected)


@pytest.mark.parametrize(
    ("group_size", "options"), [(-1, {}), (128, {"scale": "block"})], ids=["scales of outputs", "options"]
)
def test_a_model_of_such_layers_comes_back_from_its_file(
    group_size: int, options: dict[str, str], tmp_path: Path
) -> None:
    w = mc.quantize(gaussian(256, 128, seed=3), "fp8_e4m3", group_size, **options)
    quantized, path = torch.nn.Sequential(Linear.from_quantized(w)), tmp_path / "model.safetensors"
    save_quantized(quantized, path)
    x = activations(5, columns=256)
    other = torch.nn.Sequential(torch.nn.Linear(256, 128, bias=False))
    load_quantized_(other, path)
    assert same(other(x), quantized(x))
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for name in [name for name in json.loads(data[8 : 8 + length]) if name in ("0.packed", "0.output_scales")]:
        damaged = bytearray(data)
        damaged[8 + length + json.loads(data[8 : 8 + length])[name]["data_offsets"][0]] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(mc.FileFormatError, match="0 does not hold what it says: the checksum"):
            load_quantized_(other, path)


def _other(**changes: Any) -> dict[str, Any]:
    return Linear(**({"in_features": K, "out_features": N, "group_size": 64} | changes)).state_dict()


STATES: dict[str, tuple[Callable[[], dict[str, Any]], list[str]]] = {
    "format": (lambda: _other(format="uint4"), ["int4 (200, 70)", "checkpoint has uint4", "make the layer alike"]),
    "group size": (lambda: _other(group_size=128), ["group_size 64", "group_size 128"]),
    "scales": (lambda: _other(scale_dtype="bfloat16"), ["float16 scales", "bfloat16 scales"]),
    "shape": (lambda: _other(in_features=201), ["(200, 70)", "(201, 70)"]),
    "dense": (lambda: torch.nn.Linear(K, N).state_dict(), ["dense weight", "torch.nn.Linear"]),
    "no description": (
        lambda: {name: value for name, value in _other().items() if name != "_extra_state"},
        ["does not say", "_extra_state is missing"],
    ),
    "a damaged description": (
        lambda: _other() | {"_extra_state": torch.tensor([1, 2], dtype=torch.uint8)},
        ["cannot be read", "save it again"],
    ),
    "a newer layout": (
        lambda: _other() | {"_extra_state": torch.tensor(list(json.dumps({"version": 99}).encode()))},
        ["version 99", "upgrade"],
    ),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", STATES)
def test_states_of_other_layers_are_refused_before_anything_is_written(case: str, strict: bool) -> None:
    state, fragments = STATES[case]
    layer = Linear.from_quantized(weight(), torch.ones(N, dtype=torch.float16))
    before = layer(activations(5))
    with pytest.raises(RuntimeError) as caught:
        layer.load_state_dict(state(), strict=strict)
    sentence = next(line for line in str(caught.value).splitlines() if "this layer is" in line)
    for fragment in fragments:
        assert fragment in sentence
    assert sentence.endswith(".")
    assert same(layer(activations(5)), before)


@pytest.mark.parametrize(
    ("make", "fragments"),
    [
        (lambda: Linear(K, N, format="int5"), ["int5", "int4"]),
        (lambda: Linear(K, N, group_size=17), ["17", "multiple of 16"]),
        (lambda: Linear(K, N, dtype=torch.float32), ["scale_dtype", "float32", "bfloat16"]),
        (lambda: Linear(0, N), ["(0, 70)"]),
        (lambda: Linear.from_quantized(weight(), torch.ones(3)), ["bias has shape (3,)", "(70,)"]),
        (lambda: Linear.from_quantized(torch.ones(3, 3)), ["Tensor", "QuantizedTensor"]),
        (lambda: Linear.from_linear(torch.nn.Linear(K, N).double()), ["float64", "float32"]),
    ],
)
def test_layers_that_cannot_be_are_refused(make: Callable[[], Linear], fragments: list[str]) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    for fragment in fragments:
        assert fragment in str(caught.value)


# ---- models


class Model(torch.nn.Module):
    """A layer in two places, two layers with one weight, a head tied to an embedding, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 64)
        self.attention = torch.nn.MultiheadAttention(64, 2, batch_first=True)
        self.mlp = torch.nn.ModuleDict({"up": torch.nn.Linear(64, 128), "down": torch.nn.Linear(128, 64, bias=False)})
        self.again = self.mlp["up"]
        self.twin = torch.nn.Linear(128, 64)
        self.twin.weight = self.mlp["down"].weight
        self.head = torch.nn.Linear(64, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.mlp["down"](torch.relu(self.mlp["up"](x))) + self.twin(torch.relu(self.again(x))))


TOKENS = torch.arange(12).reshape(2, 6)


def model() -> Model:
    torch.manual_seed(0)
    return Model().half().eval()


def test_a_model_is_quantized_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    whole, quantized = model(), model()
    report = quantize_model_(quantized, "int8", 32, progress=True)
    assert set(report.replaced) == {"mlp.up", "again", "mlp.down", "twin"}
    assert "NonDynamicallyQuantizableLinear" in report.kept["attention.out_proj"]
    assert "Embedding" in report.kept["head"]
    assert report.bytes_before == 2 * 2 * 64 * 128
    assert report.bytes_before > report.bytes_after > report.bytes_before // 2
    assert "4 layers quantized" in str(report)
    assert "kept head" in str(report)
    assert quantized.again is quantized.mlp["up"]
    assert quantized.twin.packed.data_ptr() == quantized.mlp["down"].packed.data_ptr()
    assert not quantized.twin.training
    with torch.no_grad():
        expected, found = whole(TOKENS).float(), quantized(TOKENS).float()
    assert float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected)) < 0.02
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("mlp.*", {"mlp.up", "again", "mlp.down"}),
        (["*.down", "twin"], {"mlp.down", "twin"}),
        (lambda name, layer: layer.bias is None, {"mlp.down"}),
        ((), set()),
    ],
)
def test_a_filter_chooses_layers(chosen: Any, expected: set[str]) -> None:
    quantized = model()
    report = quantize_model_(quantized, filter=chosen)
    assert set(report.replaced) == expected
    left = {name for name, reason in report.kept.items() if reason == "the filter left it out"}
    assert left - {"head"} == {"mlp.up", "again", "mlp.down", "twin"} - expected
    assert quantized(TOKENS).shape == (2, 6, 50)


def test_one_dense_layer_is_freed_before_the_next_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    alive = []
    whole = integration.quantize

    def counting(weight: torch.Tensor, *arguments: Any, **named: Any) -> mc.QuantizedTensor:
        alive.append(sum(type(layer) is torch.nn.Linear for layer in layers))
        return whole(weight, *arguments, **named)

    monkeypatch.setattr(integration, "quantize", counting)
    quantize_model_(layers)
    assert alive == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("call", "error", "fragments"),
    [
        (lambda: quantize_model_(torch.nn.Linear(3, 3)), ValueError, ["itself", "Linear.from_linear"]),
        (lambda: quantize_model_("model"), TypeError, ["str", "torch.nn.Module"]),
        (lambda: quantize_model_(model(), "int5"), ValueError, ["mlp.up: ", "int5"]),
        (lambda: quantize_model_(model().to("meta")), ValueError, ["mlp.up: ", "meta"]),
        (lambda: save_quantized(model(), "file"), ValueError, ["no quantized layer", "quantize_model_"]),
        (lambda: load_quantized_(model(), "nowhere"), FileNotFoundError, ["no file nowhere"]),
    ],
)
def test_models_that_cannot_be_quantized(call: Callable[[], Any], error: type[Exception], fragments: list[str]) -> None:
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_quantized_model_is_compiled_and_trained() -> None:
    torch.compiler.reset()
    layers = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).half()
    quantize_model_(layers, group_size=32)
    x = activations(5, columns=64)
    assert same(torch.compile(layers, fullgraph=True)(x), layers(x))
    assert {name for name, _ in layers.named_parameters()} == {"0.bias", "2.bias"}
    before = float(layers(x).float().square().sum())
    optimizer = torch.optim.SGD(layers.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layers(x).float().square().sum().backward()
        optimizer.step()
    assert float(layers(x).float().square().sum()) < before


# ---- files of models


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Model]:
    quantized = model()
    quantize_model_(quantized, "uint4", 32)
    save_quantized(quantized, tmp_path / "model.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
    return tmp_path / "model.safetensors", quantized


def test_a_model_comes_back_from_its_file(saved: tuple[Path, Model]) -> None:
    path, quantized = saved
    with torch.no_grad():
        expected = quantized(TOKENS)
        torch.manual_seed(1)
        dense, already = Model().half().eval(), model()
        quantize_model_(already, "uint4", 32)
        with torch.device("meta"):
            empty = Model().half().eval()
        for other in (dense, already, empty):
            load_quantized_(other, path)
            assert same(other(TOKENS), expected)
            assert other.again is other.mlp["up"]
    assert dense.head.weight is dense.embedding.weight
    assert path.stat().st_size < 120_000  # tied tensors are written once


def test_files_and_models_that_do_not_match_are_refused(saved: tuple[Path, Model], tmp_path: Path) -> None:
    path, _ = saved
    other = model()
    other.mlp["up"] = torch.nn.Linear(64, 96)
    with pytest.raises(ValueError, match=r"mlp\.up of \(K, N\) = \(64, 128\)"):
        load_quantized_(other, path)
    other = model()
    quantize_model_(other, "int4", 32)
    with pytest.raises(RuntimeError, match="make the layer alike"):
        load_quantized_(other, path)

    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    offsets = json.loads(data[8 : 8 + length])["mlp.up.packed"]["data_offsets"]
    damaged = bytearray(data)
    damaged[8 + length + offsets[0] + 100] ^= 1
    for contents, message in (
        (bytes(damaged), "mlp.up does not hold what it says: the checksum"),
        (data[:-1], "save_quantized"),
        (b"", "save_quantized"),
    ):
        (tmp_path / "other").write_bytes(contents)
        with pytest.raises(mc.FileFormatError, match=message):
            load_quantized_(model(), tmp_path / "other")
    safetensors.torch.save_file({"weight": torch.zeros(3)}, tmp_path / "other")
    with pytest.raises(mc.FileFormatError, match="no file of save_quantized"):
        load_quantized_(model(), tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_quantized(saved[1], tmp_path / "no" / "folder")


# ---- several ranks


def test_ranks_share_layers(tmp_path: Path) -> None:
    script = Path(__file__).with_name("torch_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    subprocess.run([sys.executable, str(script), "gloo", str(tmp_path)], env=environment, check=True, timeout=300)


# ---- what comes with it


def test_the_example_runs() -> None:
    example = Path(__file__).parents[1] / "examples" / "torch_linear.py"
    environment = {**os.environ, "PYTHONPATH": str(Path(mc.__file__).parents[1])}
    command = [sys.executable, str(example), "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("correct\n")


def test_the_benchmark_runs_the_same_stack_twice(capsys: pytest.CaptureFixture[str]) -> None:
    torch.compiler.reset()
    both = torch_stack.stacks(stack.Widths(128, 192, 256), 2, "cpu", "int8", None)
    x = activations(3, columns=128)
    with torch.no_grad():
        ours, dense = (torch_stack.forward(both[name], x) for name in (torch_stack.OURS, torch_stack.DENSE))
        assert 0 < float((ours - dense).float().norm() / dense.float().norm()) < 0.01
        found = torch_stack.compiled(both[torch_stack.OURS], x, "default")()
        torch.testing.assert_close(found, ours, rtol=1e-2, atol=1e-2)
    times = {f"{name}/eager": Summary(us, us - 1, us + 1) for name, us in (("marlin_cupy", 10.0), ("float16", 25.0))}
    row = torch_stack.row(3, "eager", times, 0.01)
    assert row.spread == {"marlin_cupy": [9.0, 11.0], "float16": [24.0, 26.0]}
    torch_stack.show([row], Console(width=report.WIDTH))
    assert "2.50" in capsys.readouterr().out


def test_a_whole_layer_in_a_file() -> None:
    """Whole modules, as torch.save keeps them."""
    layer = Linear.from_quantized(weight(), torch.ones(N, dtype=torch.float16))
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    assert same(torch.load(memory, weights_only=False)(activations(5)), layer(activations(5)))
