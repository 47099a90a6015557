"""What is to be computed, and what a kernel has to say about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import Framework
from marlin_cupy.spec import Spec


@dataclass(frozen=True)
class Problem:
    """y (M, N) = x (M, K) @ W (K, N) for a weight of ``spec`` with activations of ``dtype``.

    ``gpu`` is None where the weight lives in host memory. With ``batch_invariant`` a row of y must have the same bits
    whatever M is and whatever the other rows hold. ``stacked``: the weight is one of several in one array, and
    which one is read from device memory.
    """

    M: int
    dtype: str
    spec: Spec
    gpu: Gpu | None
    batch_invariant: bool = False
    stacked: bool = False


class Configuration(ABC):
    """Everything that a kernel has decided about a launch, a frozen dataclass; ``str`` tells it in words."""

    #: Whether it has dependent launches.
    dependent: ClassVar[bool] = False

    @property
    @abstractmethod
    def key(self) -> str:
        """A short name, different for every configuration of the kernel and the same in every process."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute a problem.

    Attributes:
        kernel: name of the kernel.
        configuration: what it would be launched with.
        predicted_us: microseconds that the kernel's model expects with a cold weight; infinite where it has no model.
    """

    kernel: str
    configuration: Configuration
    predicted_us: float

    @property
    def key(self) -> str:
        """Names the kernel and the configuration; the same in every process, so that it can be kept in a file."""
        return f"{self.kernel}:{self.configuration.key}"

    def __str__(self) -> str:
        return f"{self.kernel}: {self.configuration}"


class Plan(ABC):
    """A kernel made ready for one problem; ``str`` tells its configuration."""

    @abstractmethod
    def multiply(self, framework: Framework, x: Any, w: Any, bias: Any | None, out: Any | None, dependent: bool) -> Any:
        """``x @ w + bias`` for arrays of ``framework`` on the weight's device that have been checked.

        ``dependent`` allows a dependent launch; a kernel that has none ignores it.
        """


class Kernel(ABC):
    """One way to compute a tile; the host twin of ``cuda_src/kernels/<name>.cuh`` where it runs on a GPU."""

    name: str
    #: The architecture that it is made for. Predictions choose it there before a kernel that is made for all.
    made_for: ClassVar[str | None] = None

    @abstractmethod
    def refuses(self, problem: Problem) -> str | None:
        """Why this kernel does not serve ``problem``; None if it does."""

    @abstractmethod
    def candidates(self, problem: Problem) -> list[Candidate]:
        """What is worth trying for a problem that it does not refuse, at least one, in any order."""

    @abstractmethod
    def source(self, problem: Problem, configuration: Configuration) -> tuple[str, str] | None:
        """(name, CUDA source) that a configuration of this kernel needs, for compiling ahead; None on the CPU."""

    @abstractmethod
    def plan(self, problem: Problem, configuration: Configuration) -> Plan:
        """Compile and load what a configuration of this kernel needs."""

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
        return iter(())
