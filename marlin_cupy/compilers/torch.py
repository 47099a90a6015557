"""PyTorch: the product as operators of torch.library, for torch.compile, torch.export and autograd.

    marlin_cupy::matmul             y = x @ W + bias
    marlin_cupy::matmul_transposed  x = y @ W^T: the gradient of the first with respect to x

Each is the derivative of the other, so that there are derivatives of any order with respect to activations; codes are
integers and have none. Both take the packed buffer and what describes it as plain arguments, which is all that a graph
can hold. ``Library.impl`` costs a call less of the host than ``torch.library.custom_op``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy
import torch

from marlin_cupy import kernels, ready
from marlin_cupy.device import gpu
from marlin_cupy.errors import DeviceError
from marlin_cupy.frameworks.torch import FRAMEWORK
from marlin_cupy.kernels import Dense, dequantize, tuned
from marlin_cupy.kernels.operands import PackedWeight
from marlin_cupy.layout import SLAB_K
from marlin_cupy.placed import Placed
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.spec import Spec

_SPEC = "str format, int K, int N, int group_size, str scale_dtype"
#: Strides of x reach the kernel as they are in eager mode: no copy where inductor would have liked other ones.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_library: Any = torch.library  # parts of it have no types
_LIBRARY = _library.Library("marlin_cupy", "DEF")
_LIBRARY.define(
    f"matmul(Tensor x, Tensor[] parts, Tensor? bias, {_SPEC}, bool batch_invariant, bool dependent) -> Tensor",
    tags=_TAGS,
)
_LIBRARY.define(f"matmul_transposed(Tensor y, Tensor[] parts, {_SPEC}) -> Tensor", tags=_TAGS)

#: The arrays of a weight in the order of Spec.parts; in host memory those that follow from packed may be left out.
Parts = Sequence[torch.Tensor]


class Weight(Protocol):
    """A QuantizedTensor, whatever its arrays are."""

    spec: Spec
    parts: dict[str, Any]

    def to(self, where: str) -> Weight:
        """In another library."""


def matmul(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, batch_invariant: bool, dependent: bool) -> Any:
    """y = x @ W + bias as an operator. TypeError for a compiled one with a weight of another library."""
    packed = w.parts["packed"]
    if not isinstance(packed, torch.Tensor):
        if torch.compiler.is_compiling():
            raise TypeError(
                f"torch.compile needs a weight in PyTorch's hands, and w.packed is a {type(packed).__module__} "
                "array; use w.to('torch')."
            )
        w = w.to("torch")  # no copy
    if bias is not None and not isinstance(bias, torch.Tensor):
        raise TypeError(f"bias is a {type(bias).__module__} array and x a torch array; use one library.")
    return multiply(x, given(w.parts), bias, w.spec, batch_invariant, dependent)


def given(parts: Mapping[str, torch.Tensor | None]) -> list[torch.Tensor]:
    """Those that are there."""
    return [part for part in parts.values() if part is not None]


def multiply(
    x: torch.Tensor,
    parts: Parts,
    bias: torch.Tensor | None,
    spec: Spec,
    batch_invariant: bool = False,
    dependent: bool = True,
) -> torch.Tensor:
    """y = x @ W + bias as an operator.

    Args:
        x: float16 or bfloat16[..., K].
        parts: the arrays of the weight, on the device of x.
        bias: the dtype and device of x, [N].
        spec: what ``parts`` hold.
        batch_invariant, dependent: see :func:`marlin_cupy.matmul`.

    Raises:
        ValueError: shape or dtype. DeviceError: not all on one device.
    """
    K, N = spec.shape
    dtype, device = FRAMEWORK.dtype(x), parts[0].device
    if dtype not in HALF_NAMES:
        raise ValueError(f"x is {dtype}; use {' or '.join(HALF_NAMES)}, for instance x.to(torch.{HALF_NAMES[0]}).")
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"x has shape {tuple(x.shape)} and the weight (K={K}, N={N}); x must be (..., {K}).")
    if x.device != device:
        raise DeviceError(f"x is on {x.device} and the weight on {device}; move one of them.")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device or tuple(bias.shape) != (N,)):
        raise ValueError(
            f"bias is {FRAMEWORK.dtype(bias)}{tuple(bias.shape)} on {bias.device}; "
            f"it must be {dtype}{(N,)} on {x.device}, as x."
        )
    y: torch.Tensor = torch.ops.marlin_cupy.matmul.default(
        x, parts, bias, spec.format, K, N, spec.group_size, spec.scale_dtype, batch_invariant, dependent
    )
    return y


@functools.lru_cache(4096)
def _spec_of(format: str, K: int, N: int, group_size: int, scale_dtype: str) -> Spec:
    """The same object for the same weights, which knows its hash and layout."""
    return Spec(format, (K, N), group_size, scale_dtype)


def _placed(spec: Spec, parts: Parts) -> Placed:
    names = [name for name, part in spec.parts.items() if len(parts) == len(spec.parts) or not part.derived]
    return Placed(spec, dict(zip(names, parts, strict=True)))


def _addressed(parts: Parts) -> PackedWeight:
    """A weight on a GPU, by its addresses."""
    return ready.weight_at([part.data_ptr() for part in parts], parts[0].get_device())


# ---- y = x @ W + bias


def _matmul_fake(x: Any, parts: Any, bias: Any, format: str, K: int, N: int, *rest: Any) -> Any:
    return x.new_empty((*x.shape[:-1], N))


def _matmul_cpu(
    x: Any,
    parts: Any,
    bias: Any,
    format: str,
    K: int,
    N: int,
    group_size: int,
    scale_dtype: str,
    batch_invariant: bool,
    dependent: bool,
) -> Any:
    w = _placed(_spec_of(format, K, N, group_size, scale_dtype), parts)
    return w.multiply(FRAMEWORK, x, bias, None, batch_invariant, dependent)


def _matmul_cuda(
    x: Any,
    parts: Any,
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
    spec, w = _spec_of(format, K, N, group_size, scale_dtype), _addressed(parts)
    product = ready.product(spec, w.device, FRAMEWORK, x.shape, x.dtype, batch_invariant, tuned.generation)
    return product.multiply(w, x, bias, None, dependent)


def _matmul_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, parts, bias, *ctx.spec, _, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(*parts)


def _matmul_backward(ctx: Any, gradient: Any) -> Any:
    of_x = of_bias = None
    if ctx.needs_input_grad[0]:
        of_x = torch.ops.marlin_cupy.matmul_transposed.default(gradient, list(ctx.saved_tensors), *ctx.spec)
    if ctx.needs_input_grad[2]:
        of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_x, [None] * len(ctx.saved_tensors), of_bias, *[None] * 7


# ---- x = y @ W^T


def _transposed_fake(y: Any, parts: Any, format: str, K: int, *rest: Any) -> Any:
    return y.new_empty((*y.shape[:-1], K))


def _transposed_cpu(y: Any, parts: Any, format: str, K: int, N: int, group_size: int, scale_dtype: str) -> Any:
    """In float32, a run of columns at a time, as the reference multiplies."""
    w = _placed(_spec_of(format, K, N, group_size, scale_dtype), parts)
    native = FRAMEWORK.to_native(y)
    rows = native.astype(numpy.float32).reshape(-1, N)
    x = numpy.zeros((rows.shape[0], K), dtype=numpy.float32)
    with numpy.errstate(over="ignore", invalid="ignore"):
        for columns, values in w.blocks():
            x += rows[:, columns] @ values.T
        return FRAMEWORK.from_native(x.astype(native.dtype).reshape(*native.shape[:-1], K))


def _transposed_cuda(y: Any, parts: Any, format: str, K: int, N: int, group_size: int, scale_dtype: str) -> Any:
    """Dense pieces of the weight by a kernel of ours, each of bounded size; their products by PyTorch."""
    spec, w = _spec_of(format, K, N, group_size, scale_dtype), _addressed(parts)
    rows = y.reshape(-1, N)
    x = rows.new_empty((rows.shape[0], K))
    plan = kernels.DEQUANTIZE.ready(Dense(spec, FRAMEWORK.dtype(y), gpu(w.device.index)))
    for run in dequantize.runs(spec):
        columns = x[:, SLAB_K * run.start : SLAB_K * run.stop]
        torch.mm(rows, plan.dense(FRAMEWORK, w, run), out=columns)
    return x.reshape(*y.shape[:-1], K)


def _transposed_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, parts, *ctx.spec = inputs
    ctx.save_for_backward(*parts)


def _transposed_backward(ctx: Any, gradient: Any) -> Any:
    parts = list(ctx.saved_tensors)
    y = torch.ops.marlin_cupy.matmul.default(gradient, parts, None, *ctx.spec, False, False)
    return y, [None] * len(parts), *[None] * 5


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
