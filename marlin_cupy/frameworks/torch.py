"""PyTorch tensors: eager, and while a CUDA graph is captured. What is compiled or differentiated is in compilers."""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes
import numpy
import torch

from marlin_cupy.device import CPU, Device, cuda, import_cupy
from marlin_cupy.errors import DeviceError
from marlin_cupy.frameworks.framework import StreamFramework

_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "uint8": torch.uint8, "float32": torch.float32}
_BFLOAT16 = numpy.dtype(ml_dtypes.bfloat16)
#: Tensors with memory of their own; other subclasses are traced, fake, distributed...
_PLAIN = (torch.Tensor, torch.nn.Parameter)

#: Whether there are modes that see every operator (fake tensors, counters), transformations of torch.func, and what
#: torch.jit.trace has recorded.
_modes: Any = torch._C._len_torch_dispatch_stack
_transforms: Any = torch._C._are_functorch_transforms_active
_traced: Any = torch._C._get_tracing_state


@functools.cache
def _device(index: int) -> torch.device:
    return torch.device("cuda", index)


def _raw_stream_query() -> Any:
    """The look-up that PyTorch's own generated code uses, or the public one where a build lacks it."""
    query = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return query or (lambda index: torch.cuda.current_stream(index).cuda_stream)


def _product_of(cls: Any, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
    if function.__name__ != "matmul" or kwargs or not isinstance(args[1], cls):
        return NotImplemented
    return args[1].__rmatmul__(args[0])


class TorchFramework(StreamFramework):
    """Tensors by raw pointer on PyTorch's current stream."""

    name = "torch"

    def meet(self, kind: Any) -> None:
        """Say what ``x @ w`` is: torch.compile traces it no other way, and PyTorch asks this before __rmatmul__."""
        if "__torch_function__" not in vars(kind):
            kind.__torch_function__ = classmethod(_product_of)

    def __init__(self) -> None:
        self._raw_stream = _raw_stream_query()

    def device(self, array: Any) -> Device:
        """CPU or the CUDA GPU; DeviceError for any other backend."""
        if array.is_cuda:
            return cuda(array.get_device())
        if array.device.type != "cpu":
            raise DeviceError(f"a PyTorch tensor is on {array.device}; tensors on cpu and cuda can be used.")
        return CPU

    def name_of(self, dtype: Any) -> str:
        """The dtype without its "torch." prefix."""
        return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")

    def follows(self, x: Any, packed: Any, bias: Any | None) -> bool:
        """All while something traces or transforms; tensors that autograd follows, or that stand for others."""
        if torch.compiler.is_compiling() or _modes() or _transforms() or _traced() is not None:
            return True
        graded = torch.is_grad_enabled()
        if type(x) not in _PLAIN or (graded and x.requires_grad):
            return True
        for array in (packed, bias):
            if isinstance(array, torch.Tensor) and (type(array) not in _PLAIN or (graded and array.requires_grad)):
                return True
        return False

    def to_native(self, array: Any) -> Any:
        """A NumPy or CuPy array over the tensor's memory."""
        array = array.detach()
        if self.device(array) != CPU:
            return import_cupy("a PyTorch tensor on a GPU").from_dlpack(array)
        if array.dtype == torch.bfloat16:  # PyTorch's own numpy() has no bfloat16
            return array.view(torch.int16).numpy().view(_BFLOAT16)
        return array.numpy()

    def from_native(self, native: Any) -> Any:
        """A tensor over the memory of a NumPy or CuPy array."""
        if isinstance(native, numpy.ndarray) and native.dtype == _BFLOAT16:
            return torch.from_numpy(native.view(numpy.int16)).view(torch.bfloat16)
        if isinstance(native, numpy.ndarray):
            return torch.from_numpy(native)
        with native.device:  # whose current stream PyTorch is to wait for
            return torch.utils.dlpack.from_dlpack(native)

    def index(self, array: Any) -> int:
        """The number of the GPU that holds the tensor; -1 for one in host memory."""
        return array.get_device()  # type: ignore[no-any-return]

    def is_contiguous(self, array: Any) -> bool:
        """As PyTorch says."""
        return array.is_contiguous()  # type: ignore[no-any-return]

    def pointer(self, array: Any) -> int:
        """Device address of the first element."""
        return array.data_ptr()  # type: ignore[no-any-return]

    def strides(self, array: Any) -> tuple[int, ...]:
        """Strides in elements."""
        return tuple(array.stride())

    def empty(self, shape: tuple[int, ...], dtype: str, device: Device) -> Any:
        """From PyTorch's caching allocator (from the graph's pool while capturing)."""
        return torch.empty(shape, dtype=_DTYPES[dtype], device=_device(device.index))

    def empty_like(self, array: Any, shape: tuple[int, ...]) -> Any:
        """As :meth:`empty`."""
        return array.new_empty(shape)

    def stream(self, device: Device) -> int:
        """PyTorch's current stream on that GPU."""
        return self._raw_stream(device.index)  # type: ignore[no-any-return]

    def rows(self, array: Any) -> Any:
        """Leading axes folded into one."""
        return array if array.dim() == 2 else array.reshape(-1, array.shape[-1])


FRAMEWORK = TorchFramework()
