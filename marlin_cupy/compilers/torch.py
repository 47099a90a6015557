"""PyTorch: the product as operators of torch.library, for torch.compile, torch.export and autograd.

    marlin_cupy::matmul             y = x @ W + bias
    marlin_cupy::matmul_transposed  x = y @ W^T: the gradient of the first with respect to x

Each is the derivative of the other, so that there are derivatives of any order with respect to activations; codes are
integers and have none. Both take the packed buffer and what describes it as plain arguments, which is all that a graph
can hold. ``Library.impl`` costs a call less of the host than ``torch.library.custom_op``.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy
import torch

from marlin_cupy import kernels
from marlin_cupy.device import cuda, gpu
from marlin_cupy.errors import DeviceError
from marlin_cupy.formats.scalars import HALF_DTYPES
from marlin_cupy.frameworks.torch import FRAMEWORK
from marlin_cupy.kernels import Dense, Operand, Problem, dequantize
from marlin_cupy.kernels.cuda import CudaPlan
from marlin_cupy.kernels.operands import PackedWeight, Rows
from marlin_cupy.layout import SLAB_K
from marlin_cupy.spec import Spec
from marlin_cupy.tensor import QuantizedTensor
from marlin_cupy.writes import of_gpu

_SPEC = "str format, int K, int N, int group_size, str scale_dtype"
#: Strides of x reach the kernel as they are in eager mode: no copy where inductor would have liked other ones.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
#: Problems that are kept: one per number of rows and shape of weight.
_PROBLEMS = 4096

_library: Any = torch.library  # parts of it have no types
_LIBRARY = _library.Library("marlin_cupy", "DEF")
_LIBRARY.define(
    f"matmul(Tensor x, Tensor packed, Tensor? range_factors, Tensor? bias, {_SPEC}, "
    "bool batch_invariant, bool dependent) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(f"matmul_transposed(Tensor y, Tensor packed, Tensor? range_factors, {_SPEC}) -> Tensor", tags=_TAGS)


def matmul(
    x: torch.Tensor, w: QuantizedTensor, bias: torch.Tensor | None, batch_invariant: bool, dependent: bool
) -> Any:
    """y = x @ W + bias as an operator. TypeError for a compiled one with a weight of another library."""
    if not isinstance(w.packed, torch.Tensor):
        if torch.compiler.is_compiling():
            raise TypeError(
                f"torch.compile needs a weight in PyTorch's hands, and w.packed is a {type(w.packed).__module__} "
                "array; use w.to('torch')."
            )
        w = w.to("torch")  # no copy
    return multiply(x, w.packed, w.range_factors, bias, w.spec, batch_invariant, dependent)


def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    range_factors: torch.Tensor | None,
    bias: torch.Tensor | None,
    spec: Spec,
    batch_invariant: bool = False,
    dependent: bool = True,
) -> torch.Tensor:
    """y = x @ W + bias for the weight that ``packed`` holds; the caller has checked that it fits ``spec``.

    Args:
        x: float16 or bfloat16[..., K].
        packed: uint8, on the device of x.
        range_factors: float32, see Layout.range_factors; None on the CPU.
        bias: the dtype and device of x, [N].
        spec: what ``packed`` holds.
        batch_invariant, dependent: see :func:`marlin_cupy.matmul`.

    Raises:
        ValueError: shape or dtype. DeviceError: not all on one device.
    """
    K, N = spec.shape
    dtype = FRAMEWORK.dtype(x)
    if dtype not in HALF_DTYPES:
        raise ValueError(f"x is {dtype}; use {' or '.join(HALF_DTYPES)}, for instance x.to(torch.{HALF_DTYPES[0]}).")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} and the weight (K={K}, N={N}); x must be (..., {K}).")
    if x.device != packed.device:
        raise DeviceError(f"x is on {x.device} and the weight on {packed.device}; move one of them.")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device or tuple(bias.shape) != (N,)):
        raise ValueError(
            f"bias is {FRAMEWORK.dtype(bias)}{tuple(bias.shape)} on {bias.device}; "
            f"it must be {dtype}{(N,)} on {x.device}, as x."
        )
    what = spec.format, K, N, spec.group_size, spec.scale_dtype, batch_invariant, dependent
    y: torch.Tensor
    if FRAMEWORK.follows(x, packed, bias):
        y = torch.ops.marlin_cupy.matmul.default(x, packed, range_factors, bias, *what)
    else:  # the same without PyTorch's dispatcher, which takes longer on the host than the rest
        y = (_matmul_cuda if x.is_cuda else _matmul_cpu)(x, packed, range_factors, bias, *what)
    return y


# ---- y = x @ W + bias


def _matmul_fake(x: Any, packed: Any, range_factors: Any, bias: Any, format: str, K: int, N: int, *rest: Any) -> Any:
    return x.new_empty((*x.shape[:-1], N))


def _matmul_cpu(
    x: Any,
    packed: Any,
    range_factors: Any,
    bias: Any,
    format: str,
    K: int,
    N: int,
    group_size: int,
    scale_dtype: str,
    batch_invariant: bool,
    dependent: bool,
) -> Any:
    w = QuantizedTensor(Spec(format, (K, N), group_size, scale_dtype), packed)
    dtype = FRAMEWORK.dtype(x)
    problem = Problem(x.numel() // K, Operand(dtype), w.spec, dtype, None, batch_invariant)
    return kernels.GEMM.ready(problem).multiply(FRAMEWORK, x, w, bias, None, dependent)


def _matmul_cuda(
    x: Any,
    packed: Any,
    range_factors: Any,
    bias: Any,
    format: str,
    K: int,
    N: int,
    group_size: int,
    scale_dtype: str,
    batch_invariant: bool,
    dependent: bool,
) -> Any:
    if batch_invariant or x.stride(-1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    index, m = packed.get_device(), x.numel() // K
    aligned = m == 0 or Rows.of(FRAMEWORK, x, m).is_aligned(K)
    problem = _problem(m, FRAMEWORK.dtype(x), aligned, format, K, N, group_size, scale_dtype, index, batch_invariant)
    w = PackedWeight(packed.data_ptr(), range_factors.data_ptr(), cuda(index), of_gpu(index))
    plan = kernels.GEMM.ready(problem)
    assert isinstance(plan, CudaPlan)
    return plan.multiply(FRAMEWORK, x, w, bias, None, dependent)


@functools.lru_cache(_PROBLEMS)
def _problem(
    m: int,
    dtype: str,
    aligned: bool,
    format: str,
    K: int,
    N: int,
    group_size: int,
    scale_dtype: str,
    index: int,
    batch_invariant: bool,
) -> Problem:
    """The same object each time, which is quick to look up."""
    spec = Spec(format, (K, N), group_size, scale_dtype)
    return Problem(m, Operand(dtype, aligned=aligned), spec, dtype, gpu(index), batch_invariant)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, packed, range_factors, bias, *ctx.spec, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(packed, range_factors)


def _matmul_backward(ctx: Any, gradient: Any) -> Any:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.marlin_cupy.matmul_transposed.default(gradient, *ctx.saved_tensors, *ctx.spec)
    if ctx.needs_input_grad[3]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, None, None, of_bias, *[None] * 7


# ---- x = y @ W^T


def _transposed_fake(y: Any, packed: Any, range_factors: Any, format: str, K: int, *rest: Any) -> Any:
    return y.new_empty((*y.shape[:-1], K))


def _transposed_cpu(
    y: Any, packed: Any, range_factors: Any, format: str, K: int, N: int, group_size: int, scale_dtype: str
) -> Any:
    """In float32, a run of columns at a time, as the reference multiplies."""
    w = QuantizedTensor(Spec(format, (K, N), group_size, scale_dtype), packed)
    native = FRAMEWORK.to_native(y)
    rows = native.astype(numpy.float32).reshape(-1, N)
    x = numpy.zeros((rows.shape[0], K), dtype=numpy.float32)
    with numpy.errstate(over="ignore", invalid="ignore"):
        for columns, values in w.blocks():
            x += rows[:, columns] @ values.T
        return FRAMEWORK.from_native(x.astype(native.dtype).reshape(*native.shape[:-1], K))


def _transposed_cuda(
    y: Any, packed: Any, range_factors: Any, format: str, K: int, N: int, group_size: int, scale_dtype: str
) -> Any:
    """Dense pieces of the weight by a kernel of ours, each of bounded size; their products by PyTorch."""
    spec, index = Spec(format, (K, N), group_size, scale_dtype), packed.get_device()
    w = PackedWeight(packed.data_ptr(), range_factors.data_ptr(), cuda(index), of_gpu(index))
    rows = y.reshape(-1, N)
    x = rows.new_empty((rows.shape[0], K))
    plan = kernels.DEQUANTIZE.ready(Dense(spec, FRAMEWORK.dtype(y), gpu(index)))
    for run in dequantize.runs(spec):
        columns = x[:, SLAB_K * run.start : SLAB_K * run.stop]
        torch.mm(rows, plan.dense(FRAMEWORK, w, run), out=columns)
    return x.reshape(*y.shape[:-1], K)


def _transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, packed, range_factors, *ctx.spec = inputs
    ctx.save_for_backward(packed, range_factors)


def _transposed_backward(ctx: Any, gradient: Any) -> Any:
    y = torch.ops.marlin_cupy.matmul.default(gradient, *ctx.saved_tensors, None, *ctx.spec, False, False)
    return y, *[None] * 7


for _name, _cpu, _cuda, _fake, _setup, _backward in (
    ("matmul", _matmul_cpu, _matmul_cuda, _matmul_fake, _matmul_setup, _matmul_backward),
    (
        "matmul_transposed",
        _transposed_cpu,
        _transposed_cuda,
        _transposed_fake,
        _transposed_setup,
        _transposed_backward,
    ),
):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    _library.register_fake(f"marlin_cupy::{_name}", _fake, lib=_LIBRARY)
    _library.register_autograd(f"marlin_cupy::{_name}", _backward, setup_context=_setup, lib=_LIBRARY)
