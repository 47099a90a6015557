"""What a product is asked to be: its operands, which weight each row meets, where."""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import Framework
from marlin_cupy.kernels.operation import Asked
from marlin_cupy.scalars import HALF_NAMES
from marlin_cupy.spec import Spec


class Scales(enum.Enum):
    """What comes along with the elements of an operand."""

    NONE = "none"
    ROWS = "a scale and a sum per row"


@dataclass(frozen=True)
class Operand:
    """Activations x (M, K).

    Attributes:
        dtype: of the elements.
        scales: what comes along with them.
        aligned: rows start at multiples of 16 bytes, as those of a contiguous x do if K is a multiple of 8, and do not
            overlap. For other K it says nothing, and is true.
    """

    dtype: str
    scales: Scales = Scales.NONE
    aligned: bool = True


@dataclass(frozen=True)
class One:
    """All rows are multiplied by the one weight that there is."""


@dataclass(frozen=True)
class Stacked:
    """All rows are multiplied by one of several weights in one array; which one is read from device memory."""

    layers: int


@dataclass(frozen=True)
class Grouped:
    """Groups of rows are multiplied by weights of their own."""

    groups: int


Select = One | Stacked | Grouped
ONE = One()


@dataclass(frozen=True)
class Problem(Asked):
    """y (M, N) = x (M, K) @ W (K, N).

    Attributes:
        M: rows of x.
        x: what they are.
        w: the weight.
        y: dtype of the result.
        gpu: where the weight lives; None in host memory.
        batch_invariant: a row of y must have the same bits whatever M is and whatever the other rows hold.
        select: which weight a row is multiplied by.
    """

    M: int
    x: Operand
    w: Spec
    y: str
    gpu: Gpu | None
    batch_invariant: bool = False
    select: Select = ONE
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        values = self.M, self.x, self.w, self.y, self.gpu, self.batch_invariant, self.select
        object.__setattr__(self, "_hash", hash(values))

    def __hash__(self) -> int:
        return self._hash  # plans are looked up by it again and again

    @property
    def identity(self) -> dict[str, Any]:
        """All that its time depends on besides the GPU, as JSON holds it."""
        return {
            "format": self.w.format,
            "granule": self.w.layout.granule,
            "group_size": self.w.group_size,
            "K": self.w.shape[0],
            "N": self.w.shape[1],
            "scale_dtype": self.w.scale_dtype,
            "dtype": self.x.dtype,
            "scales": self.x.scales.value,
            "aligned": self.x.aligned,
            "y": self.y,
            "groups": self.select.groups if isinstance(self.select, Grouped) else None,
            "batch_invariant": self.batch_invariant,
            "M": self.M,
        }


def refuses_operands(problem: Problem) -> str | None:
    """What the seams have room for and no kernel serves yet."""
    x = problem.x
    if x.dtype not in HALF_NAMES:
        return f"takes {' or '.join(HALF_NAMES)} activations, not {x.dtype}"
    if x.scales is not Scales.NONE:
        return f"takes activations by themselves, not with {x.scales.value}"
    if problem.y != x.dtype:
        return f"gives y the dtype of x, {x.dtype}, not {problem.y}"
    if isinstance(problem.select, Grouped):
        return f"multiplies all rows by one weight, not {problem.select.groups} groups of rows by weights of their own"
    return None


class Plan(ABC):
    """A kernel made ready for one problem; ``str`` tells its configuration."""

    @abstractmethod
    def multiply(self, framework: Framework, x: Any, w: Any, bias: Any | None, out: Any | None, dependent: bool) -> Any:
        """``x @ w + bias`` for arrays of ``framework`` on the weight's device that have been checked.

        ``dependent`` allows a dependent launch; a kernel that has none ignores it.
        """
