"""matmul and explain: the arguments checked, the work sent to where the weight lives."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from marlin_cupy import compilers, frameworks, kernels
from marlin_cupy.device import CPU, Device, gpu, import_cupy
from marlin_cupy.errors import DeviceError
from marlin_cupy.formats.scalars import HALF_DTYPES
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.kernels import Plan, Problem, tuned
from marlin_cupy.tensor import QuantizedTensor

Array = Any  # an array of any library

#: Columns and candidates of a printed explanation.
_WIDTH, _SHOWN = 100, 6


def matmul(
    x: Array,
    w: QuantizedTensor,
    bias: Array | None = None,
    out: Array | None = None,
    *,
    batch_invariant: bool = False,
    dependent: bool = True,
) -> Array:
    """y = x @ W + bias, computed where the weight lives.

    Args:
        x: float16 or bfloat16[..., K], last axis contiguous, any strides between rows. On the weight's GPU it is
            used in place on its library's current stream; a NumPy array is taken there and the result back. Where
            explain names a kernel for Hopper, x whose rows overlap or do not start at multiples of 16 bytes is
            multiplied by sm80_gemm instead, which takes longer.
        w: the weight, logical shape (K, N). For tensors that torch.compile traces PyTorch has to hold it,
            ``w.to("torch")``; gradients flow to x and bias.
        bias: the dtype, library and device of x, [N], contiguous; added in float32 before the one rounding.
        out: the dtype, library and device of x, [..., N]; written and returned. Not for JAX, whose arrays are
            immutable. It must not overlap x.
        batch_invariant: every row of y has the same bits whatever the number of rows and whatever the others hold.
            UnsupportedError where no kernel can promise it. On a GPU sm90_wgmma alone can: the rows of x must start
            at multiples of 16 bytes and not overlap, ValueError otherwise; a contiguous x is right.
        dependent: allow a dependent launch, which kernels for Hopper have (explain says so): the GPU starts to read
            the weight before the kernels ahead on the stream have finished, and only the weight; x, bias and out are
            touched after that. So no kernel of yours that is ahead may write the weight. Whatever marlin_cupy does to
            a weight (quantize, pack, load, to, update_, the constructor) is safe. If something else wrote into
            w.packed, call w.mark_written(). (Where only codes were written and no scales, passing False for the first
            multiplication on a stream after that is enough.) A captured graph keeps the memory of its products, y and
            partial sums. So two instances of one graph must not run at the same time; capture twice for that.

    Returns:
        [..., N] in x's library, dtype and device.

    Raises:
        TypeError: no array, or no QuantizedTensor. ValueError: shape, dtype or strides. DeviceError: x, bias or
            out somewhere else than the weight.
    """
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor, from quantize, pack or load.")
    framework, x = frameworks.resolve(x)
    dtype = framework.dtype(x)
    if dtype not in HALF_DTYPES:
        raise ValueError(f"x is {dtype}; use {' or '.join(HALF_DTYPES)}, for instance x.astype({HALF_DTYPES[0]!r}).")
    K, N = w.shape
    if len(x.shape) == 0 or x.shape[-1] != K:
        w.whole.of_part(tuple(w.packed.shape))  # says what is wrong with a share
        raise ValueError(f"x has shape {tuple(x.shape)} and the weight (K={K}, N={N}); x must be (..., {K}).")
    if framework.follows(x, w.packed, bias):
        return _followed(framework, x, w, bias, out, batch_invariant, dependent)
    device = framework.device(x)
    if bias is not None:
        bias = _checked(framework, bias, "bias", (N,), dtype, device)
    target = None if out is None else _checked(framework, out, "out", (*x.shape[:-1], N), dtype, device)

    if device != w.device and (framework.name != "numpy" or w.device == CPU):
        raise DeviceError(
            f"x is on {device} and the weight on {w.device}; move one, for instance w.to({str(device)!r})."
        )
    if device == w.device and (device == CPU or isinstance(framework, StreamFramework)):
        if device != CPU and 0 not in x.shape:  # an empty array has no strides to speak of
            _check_strides(framework, x, bias, target)
        plan = plan_of(w, math.prod(x.shape[:-1]), dtype, batch_invariant)
        y = plan.multiply(framework, x, w, bias, target, dependent)
    elif device == w.device:  # JAX, which gives memory of x to others unless it launches what reads it
        y = compilers.of(framework).matmul(x, w, bias, batch_invariant, dependent)
    else:
        y = _through_cupy(framework, x, w, bias, target, batch_invariant, dependent)
    return y if out is None else out


def _followed(
    framework: Framework, x: Array, w: QuantizedTensor, bias: Any, out: Any, batch_invariant: bool, dependent: bool
) -> Array:
    """For arrays that a compiler traces or automatic differentiation follows."""
    if out is not None:
        raise TypeError(f"out was given and {framework.name} follows this product; use what matmul returns instead.")
    if bias is not None:
        bias = _matching(framework, bias, "bias", (w.shape[1],), framework.dtype(x))
    return compilers.of(framework).matmul(x, w, bias, batch_invariant, dependent)


class Considered(NamedTuple):
    """A candidate in an :class:`Explanation`.

    Attributes:
        kernel: name of the kernel.
        config: its configuration, in words.
        predicted_us: microseconds that its model expects; infinite where there is no model, on the CPU.
        measured_us: what :func:`tune` measured for this M; None where it did not.
    """

    kernel: str
    config: str
    predicted_us: float
    measured_us: float | None


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; print it.

    Attributes:
        kernel: name of the kernel that is used.
        config: its configuration, in words.
        reason: why this one: the least time measured by :func:`tune`, or the least predicted, where a kernel made for
            the GPU comes before one made for all.
        floor_us: estimate of the microseconds that reading the weight takes; None on the CPU.
        candidates: what was considered, the one that is used first, then by time.
        passed_over: kernels that are not used, with the reason.
        dependent: whether it has dependent launches, see :func:`matmul`.
    """

    kernel: str
    config: str
    reason: str
    floor_us: float | None
    candidates: tuple[Considered, ...]
    passed_over: dict[str, str]
    dependent: bool = False

    def __str__(self) -> str:
        lines = _wrapped(f"{self.kernel}: {self.config}") + _wrapped(f"because {self.reason}")
        if self.floor_us is not None:
            lines += [f"reading the weight takes about {self.floor_us:.1f} us", "", "predicted  measured  us"]
        for each in self.candidates[:_SHOWN] if self.floor_us is not None else ():
            measured = "" if each.measured_us is None else f"{each.measured_us:.2f}"
            lines += _wrapped(f"{each.predicted_us:9.2f} {measured:>9}  {each.kernel}: {each.config}", " " * 21)
        if self.floor_us is not None:
            lines += ["", *([f"and {len(self.candidates) - _SHOWN} more", ""] if len(self.candidates) > _SHOWN else [])]
        for name, reason in self.passed_over.items():
            lines += _wrapped(f"not {name}: {reason}")
        return "\n".join(lines)


def _wrapped(text: str, indent: str = "    ") -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=indent, drop_whitespace=True, break_long_words=False)


def explain(shape: Sequence[int], dtype: Any, w: QuantizedTensor, *, batch_invariant: bool = False) -> Explanation:
    """Which kernel and configuration :func:`matmul` uses for x of that shape and dtype, and why no other.

    Args:
        shape: shape (..., K) of x.
        dtype: dtype of x, of any library or by name.
        w: the weight.
        batch_invariant: as in :func:`matmul`.

    Raises:
        UnsupportedError: no kernel serves it; the message has every kernel's reason.
    """
    if not isinstance(w, QuantizedTensor):
        raise TypeError(f"w is a {type(w).__name__}; pass a QuantizedTensor, from quantize, pack or load.")
    K, N = w.shape
    if not isinstance(shape, Sequence) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"shape is {shape!r}; pass the shape of x, a tuple of integers (..., {K}).")
    if len(shape) == 0 or shape[-1] != K or min(shape) < 0:
        raise ValueError(f"shape is {tuple(shape)} and the weight (K={K}, N={N}); use (..., {K}).")
    name = str(getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or dtype).removeprefix("torch.")
    problem = problem_of(w, math.prod(shape[:-1]), name, batch_invariant)
    chosen = kernels.choose(problem)
    us = tuned.times(problem)
    reasons = {
        other: reason or f"serves this too, {chosen.kernel} is preferred"
        for other, reason in kernels.refusals(problem).items()
        if other != chosen.kernel
    }
    others = [each for each in kernels.candidates(problem) if each != chosen]
    others.sort(key=lambda each: (us.get(each.key, math.inf), each.predicted_us))
    if chosen.key in us:
        why = f"mc.tune measured {us[chosen.key]:.2f} us, the least of {len(us)} candidates"
    elif problem.gpu is None:
        why = "it is the one that computes in host memory"
    else:
        of = f"{1 + len(others)} candidates"
        if any(each.predicted_us < chosen.predicted_us for each in others):
            of = f"those made for {problem.gpu.arch}"
        why = f"{chosen.predicted_us:.2f} us are predicted, the least of {of}; not tuned"
    return Explanation(
        kernel=chosen.kernel,
        config=str(chosen.configuration),
        reason=why,
        floor_us=kernels.floor_us(problem),
        candidates=tuple(
            Considered(each.kernel, str(each.configuration), each.predicted_us, us.get(each.key))
            for each in (chosen, *others)
        ),
        passed_over=reasons,
        dependent=chosen.configuration.dependent,
    )


def plan_of(w: QuantizedTensor, m: int, dtype: str, batch_invariant: bool = False) -> Plan:
    """The kernel for M rows of ``dtype``, made ready once per weight, and again when something was tuned."""
    key = m, dtype, batch_invariant, tuned.generation
    found: Plan | None = w.plans.get(key)
    if found is None:
        for old in [other for other in list(w.plans) if other[-1] != key[-1]]:
            w.plans.pop(old, None)
        problem = problem_of(w, m, dtype, batch_invariant)
        found = w.plans[key] = kernels.plan(problem, kernels.choose(problem))
    return found


def problem_of(w: QuantizedTensor, m: int, dtype: str, batch_invariant: bool = False) -> Problem:
    """What :func:`matmul` asks the kernels for M rows of ``dtype``."""
    return Problem(m, dtype, w.spec, None if w.device == CPU else gpu(w.device.index), batch_invariant)


def _through_cupy(
    framework: Framework, x: Array, w: QuantizedTensor, bias: Any, out: Any, batch_invariant: bool, dependent: bool
) -> Array:
    """For x in host memory and a weight on a GPU: CuPy computes, copies hand over."""
    cupy = import_cupy("a weight on a GPU")
    with cupy.cuda.Device(w.device.index):
        arrays = [
            None if array is None else cupy.ascontiguousarray(cupy.asarray(framework.to_native(array)))
            for array in (x, bias)
        ]
        y = matmul(arrays[0], w, arrays[1], batch_invariant=batch_invariant, dependent=dependent)
        if out is None:
            return framework.from_native(y)
        framework.to_native(out)[...] = y.get() if framework.device(out) == CPU else y
        return out


def _check_strides(framework: Framework, x: Array, bias: Any, out: Any) -> None:
    """ValueError for memory that the kernels cannot address."""
    assert isinstance(framework, StreamFramework)
    if framework.strides(x)[-1] != 1 and x.shape[-1] != 1:
        raise ValueError(f"x has strides {framework.strides(x)}; its last axis must be contiguous, copy it first.")
    if out is not None and not _is_row_major(framework, out):
        raise ValueError(f"out has strides {framework.strides(out)}; it must be contiguous, or 2-D with whole rows.")
    if bias is not None and framework.strides(bias)[0] != 1:
        raise ValueError(f"bias has strides {framework.strides(bias)}; it must be contiguous.")


def _is_row_major(framework: StreamFramework, out: Array) -> bool:
    """Whether ``out`` can be seen as (M, N) with contiguous rows without a copy."""
    strides = framework.strides(out)
    if strides[-1] != 1 and out.shape[-1] != 1:
        return False
    rows = [(size, stride) for size, stride in zip(out.shape[:-1], strides[:-1], strict=True) if size != 1]
    return all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(rows))


def _checked(
    framework: Framework, array: Array, role: str, shape: tuple[int, ...], dtype: str, device: Device
) -> Array:
    """``array`` if it matches x and has ``shape``; TypeError, ValueError or DeviceError otherwise."""
    array = _matching(framework, array, role, shape, dtype)
    if role == "out":
        framework.refuse_writing(array, role)
    if framework.device(array) != device:
        raise DeviceError(f"{role} is on {framework.device(array)} and x on {device}; they must be on one device.")
    return array


def _matching(framework: Framework, array: Array, role: str, shape: tuple[int, ...], dtype: str) -> Array:
    """``array`` if it is of x's library and dtype and has ``shape``; TypeError or ValueError otherwise."""
    theirs, array = frameworks.resolve(array, role)
    if theirs is not framework:
        raise TypeError(f"{role} is a {theirs.name} array and x a {framework.name} array; use one library.")
    if tuple(array.shape) != shape or theirs.dtype(array) != dtype:
        raise ValueError(f"{role} is {theirs.dtype(array)}{tuple(array.shape)}; it must be {dtype}{shape}, as x.")
    return array


QuantizedTensor.multiply = staticmethod(matmul)
