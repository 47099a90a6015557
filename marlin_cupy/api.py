"""matmul and explain: the arguments checked, the work sent to where the weight lives."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from marlin_cupy import kernels, ready
from marlin_cupy.kernels import Problem
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
            at multiples of 16 bytes and not overlap, UnsupportedError otherwise; a contiguous x is right.
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
    return w.multiply(x, bias, out, batch_invariant, dependent)


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
    chosen = kernels.GEMM.choose(problem)
    us = kernels.GEMM.times(problem)
    reasons = {
        other: reason or f"serves this too, {chosen.kernel} is preferred"
        for other, reason in kernels.GEMM.refusals(problem).items()
        if other != chosen.kernel
    }
    others = [each for each in kernels.GEMM.candidates(problem) if each != chosen]
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


def problem_of(w: QuantizedTensor, m: int, dtype: str, batch_invariant: bool = False) -> Problem:
    """What :func:`matmul` asks the kernels for M rows of ``dtype``."""
    return ready.problem(w.spec, w.device, m, dtype, batch_invariant)
