"""What is to be computed, and what a kernel has to say about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import Framework
from marlin_cupy.tensor import QuantizedTensor, Spec


@dataclass(frozen=True)
class Problem:
    """y (M, N) = x (M, K) @ W (K, N) for a weight of ``spec`` with activations of ``dtype``.

    ``gpu`` is None where the weight lives in host memory.
    """

    M: int
    dtype: str
    spec: Spec
    gpu: Gpu | None


class Plan(ABC):
    """A kernel made ready for one problem; ``str`` tells its configuration."""

    #: Whether it has dependent launches.
    dependent: ClassVar[bool] = False

    @abstractmethod
    def multiply(
        self, framework: Framework, x: Any, w: QuantizedTensor, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """``x @ w + bias`` for arrays of ``framework`` on the weight's device that have been checked.

        ``dependent`` allows a dependent launch; a kernel that has none ignores it.
        """


class Kernel(ABC):
    """One way to compute a tile; the host twin of ``cuda_src/kernels/<name>.cuh`` where it runs on a GPU."""

    name: str

    @abstractmethod
    def refuses(self, problem: Problem) -> str | None:
        """Why this kernel does not serve ``problem``; None if it does."""

    @abstractmethod
    def plan(self, problem: Problem) -> Plan:
        """Choose a configuration; compile and load what it needs."""

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
        return iter(())
