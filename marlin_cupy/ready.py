"""Products made ready: whatever no address changes is decided once, and found again by what x is.

A call then checks what is left (the device, strides, bias and out), allocates, and launches. What is wrong is put
into words only where a check fails.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from marlin_cupy import frameworks, kernels, writes
from marlin_cupy.device import CPU, Device, cuda, gpu, import_cupy
from marlin_cupy.errors import DeviceError
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.kernels import Operand, Problem
from marlin_cupy.kernels.operands import PackedWeight, Rows
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.spec import Spec

Array = Any  # an array of any library

#: Products that are kept: one per shape of x and kind of weight.
_KEPT = 4096


def problem(
    spec: Spec, device: Device, m: int, dtype: str, batch_invariant: bool = False, aligned: bool = True
) -> Problem:
    """What the kernels are asked for M rows of ``dtype`` and a weight on ``device``; see Operand for ``aligned``."""
    where = None if device == CPU else gpu(device.index)
    return Problem(m, Operand(dtype, aligned=aligned), spec, dtype, where, batch_invariant)


class Ready(ABC):
    """The products of weights of one spec with x of one library, shape and dtype."""

    def __init__(self, spec: Spec, device: Device, framework: Framework, shape: tuple[int, ...], dtype: Any) -> None:
        K, N = spec.shape
        self.framework = framework
        self.device = device
        self.dtype = dtype
        self.K, self.N = K, N
        self.number = math.prod(shape[:-1])
        self.y_shape = (*shape[:-1], N)
        self.bias_shape = (N,)

    @abstractmethod
    def multiply(self, w: Any, x: Array, bias: Array | None, out: Array | None, dependent: bool) -> Array:
        """``x @ w + bias`` for the arrays that this is for; ``w`` is a Weight on a GPU, a HostWeight elsewhere."""

    def refuse_device(self, x: Array) -> None:
        """DeviceError for x somewhere else than the weight."""
        where = self.framework.device(x)
        raise DeviceError(
            f"x is on {where} and the weight on {self.device}; move one, for instance w.to({str(where)!r})."
        )

    def given(self, array: Array, role: str, shape: tuple[int, ...], x: Array) -> Array:
        """``array`` in the hands of its library if it matches x and has ``shape``; see :func:`matching`."""
        framework = self.framework
        array = matching(framework, array, role, shape, framework.dtype(x))
        if role == "out":
            framework.refuse_writing(array, role)
        if framework.device(array) != framework.device(x):
            raise DeviceError(
                f"{role} is on {framework.device(array)} and x on {framework.device(x)}; they must be on one device."
            )
        return array


class OnGpu(Ready):
    """By a launch on the current stream of a library whose arrays are used by address."""

    framework: StreamFramework

    def __init__(
        self, spec: Spec, device: Device, framework: Framework, shape: Any, dtype: Any, problem: Problem
    ) -> None:
        super().__init__(spec, device, framework, shape, dtype)
        self.index = device.index
        self._problem = problem
        self._aligned: Any = kernels.GEMM.ready(problem)  # a CudaPlan

    @functools.cached_property
    def _unaligned(self) -> Any:
        """The kernel for x that is not aligned, see Operand; UnsupportedError where there is none."""
        x = dataclasses.replace(self._problem.x, aligned=False)
        return kernels.GEMM.ready(dataclasses.replace(self._problem, x=x))

    def multiply(self, w: Any, x: Array, bias: Array | None, out: Array | None, dependent: bool) -> Array:
        """Allocate and launch."""
        framework, number = self.framework, self.number
        if bias is not None and not self._fits(bias, self.bias_shape):
            bias = self._bias(bias, x)
        rows, stride = out, self.N
        if out is not None and not self._fits(out, self.y_shape):
            rows, stride = self._strided(self.given(out, "out", self.y_shape, x), "out")
        if framework.index(x) != self.index:
            self.refuse_device(x)
        x_stride = self.K
        if not framework.is_contiguous(x):
            x, x_stride = self._strided(x, "x")
        if out is None:
            rows = out = framework.empty_like(x, self.y_shape)
        if number > 0:
            x_rows, y_rows = Rows(framework.pointer(x), x_stride, number), Rows(framework.pointer(rows), stride, number)
            bias_address = 0 if bias is None else framework.pointer(bias)
            plan = self._aligned if x_rows.is_aligned(self.K) else self._unaligned
            plan.enqueue(framework, x_rows, w, bias_address, y_rows, dependent)
        return out

    def _fits(self, array: Array, shape: tuple[int, ...]) -> bool:
        """Whether nothing is to be asked of an array any more."""
        framework = self.framework
        return (
            frameworks.is_of(array, framework)
            and array.shape == shape
            and array.dtype == self.dtype
            and framework.index(array) == self.index
            and framework.is_contiguous(array)
        )

    def _bias(self, bias: Array, x: Array) -> Array:
        bias = self.given(bias, "bias", self.bias_shape, x)
        if self.number > 0 and self.framework.strides(bias)[0] != 1:
            raise ValueError(f"bias has strides {self.framework.strides(bias)}; it must be contiguous.")
        return bias

    def _strided(self, array: Array, role: str) -> tuple[Array, int]:
        """``array`` as rows, and the elements from one to the next; ValueError for what kernels cannot address."""
        framework = self.framework
        strides = framework.strides(array)
        if self.number > 0 and role == "x" and strides[-1] != 1 and self.K != 1:
            raise ValueError(f"x has strides {strides}; its last axis must be contiguous, copy it first.")
        if self.number > 0 and role == "out" and not _is_row_major(array.shape, strides):
            raise ValueError(f"out has strides {strides}; it must be contiguous, or 2-D with whole rows.")
        rows = framework.rows(array)
        return rows, framework.strides(rows)[0]


class OnHost(Ready):
    """In host memory, by the reference."""

    def __init__(
        self, spec: Spec, device: Device, framework: Framework, shape: Any, dtype: Any, problem: Problem
    ) -> None:
        super().__init__(spec, device, framework, shape, dtype)
        self._plan = kernels.GEMM.ready(problem)

    def multiply(self, w: Any, x: Array, bias: Array | None, out: Array | None, dependent: bool) -> Array:
        """Compute."""
        given = None if bias is None else self.given(bias, "bias", self.bias_shape, x)
        target = None if out is None else self.given(out, "out", self.y_shape, x)
        if self.framework.device(x) != CPU:
            self.refuse_device(x)
        y = self._plan.multiply(self.framework, x, w, given, target, dependent)
        return y if out is None else out


class ThroughCupy(Ready):
    """For x of NumPy and a weight on a GPU: CuPy computes, copies hand over."""

    def __init__(
        self, spec: Spec, device: Device, framework: Framework, shape: Any, dtype: Any, batch_invariant: bool
    ) -> None:
        super().__init__(spec, device, framework, shape, dtype)
        self.batch_invariant = batch_invariant

    def multiply(self, w: Any, x: Array, bias: Array | None, out: Array | None, dependent: bool) -> Array:
        """Copy, multiply, copy back."""
        framework = self.framework
        given = None if bias is None else self.given(bias, "bias", self.bias_shape, x)
        target = None if out is None else self.given(out, "out", self.y_shape, x)
        if framework.name != "numpy":
            self.refuse_device(x)
        cupy = import_cupy("a weight on a GPU")
        with cupy.cuda.Device(self.device.index):
            moved, moved_bias = (
                None if array is None else cupy.asarray(framework.to_native(array), order="C") for array in (x, given)
            )
            y = w.multiply(frameworks.of(moved), moved, moved_bias, None, self.batch_invariant, dependent)
            if target is None:
                return framework.from_native(y)
            framework.to_native(target)[...] = y.get()
            return out


@functools.lru_cache(_KEPT)
def product(
    spec: Spec,
    device: Device,
    framework: Framework,
    shape: tuple[int, ...],
    dtype: Any,
    batch_invariant: bool,
    generation: int,
) -> Ready:
    """For weights of ``spec`` on ``device`` and x of ``framework`` with that shape and dtype.

    Args:
        generation: ``tuned.generation``, which counts up when something was tuned.

    Raises:
        ValueError: x of this shape or dtype cannot be multiplied.
    """
    name = framework.name_of(dtype)
    check_x(name, shape, spec)
    asked = problem(spec, device, math.prod(shape[:-1]), name, batch_invariant)
    if device == CPU:
        return OnHost(spec, device, framework, shape, dtype, asked)
    if isinstance(framework, StreamFramework):
        return OnGpu(spec, device, framework, shape, dtype, asked)
    return ThroughCupy(spec, device, framework, shape, dtype, batch_invariant)


def weight_at(addresses: Sequence[int], index: int, layer: int = 0) -> PackedWeight:
    """A weight on GPU ``index`` whose parts, in the order of Spec.parts, have these addresses; see Weight for layer."""
    of_parts: Any = PackedWeight
    weight: PackedWeight = of_parts(*addresses, cuda(index), writes.of_gpu(index), layer)
    return weight


# ---- what is checked


def check_x(dtype: str, shape: tuple[int, ...], spec: Spec) -> None:
    """ValueError where x of that dtype and shape cannot be multiplied by a weight of ``spec``."""
    K, N = spec.shape
    if dtype not in HALF_NAMES:
        raise ValueError(f"x is {dtype}; use {' or '.join(HALF_NAMES)}, for instance x.astype({HALF_NAMES[0]!r}).")
    if len(shape) == 0 or shape[-1] != K:
        raise ValueError(f"x has shape {tuple(shape)} and the weight (K={K}, N={N}); x must be (..., {K}).")


def matching(framework: Framework, array: Array, role: str, shape: tuple[int, ...], dtype: str) -> Array:
    """``array`` if it is of x's library and dtype and has ``shape``; TypeError or ValueError otherwise."""
    theirs, array = frameworks.resolve(array, role)
    if theirs is not framework:
        raise TypeError(f"{role} is a {theirs.name} array and x a {framework.name} array; use one library.")
    if tuple(array.shape) != shape or theirs.dtype(array) != dtype:
        raise ValueError(f"{role} is {theirs.dtype(array)}{tuple(array.shape)}; it must be {dtype}{shape}, as x.")
    return array


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether an array can be seen as (M, N) with contiguous rows without a copy."""
    if strides[-1] != 1 and shape[-1] != 1:
        return False
    rows = [(size, stride) for size, stride in zip(shape[:-1], strides[:-1], strict=True) if size != 1]
    return all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(rows))
