"""An operation: what can be computed, the kernels that can, and which of them does."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from marlin_cupy.device import Gpu
from marlin_cupy.errors import UnsupportedError
from marlin_cupy.kernels import tuned
from marlin_cupy.numerics import Rounding
from marlin_cupy.spec import Spec

#: Plans and choices that an operation keeps: one per problem, and a problem has a number of rows.
_KEPT = 4096


class Asked(ABC):
    """What is asked of an operation: a frozen dataclass."""

    #: Where; None in host memory.
    gpu: Gpu | None

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """All that its time depends on besides the GPU, as JSON holds it."""


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
    """One way to compute what was asked.

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


P = TypeVar("P", bound=Asked)
R = TypeVar("R")


class Kernel(ABC, Generic[P, R]):
    """One way to compute problems P by plans R; the host twin of ``cuda_src/kernels/<name>.cuh`` if it is for GPUs."""

    name: str
    #: The architecture that it is made for. Predictions choose it there before a kernel that is made for all.
    made_for: ClassVar[str | None] = None

    @abstractmethod
    def refuses(self, problem: P) -> str | None:
        """Why this kernel does not serve ``problem``; None if it does."""

    @abstractmethod
    def candidates(self, problem: P) -> list[Candidate]:
        """What is worth trying for a problem that it does not refuse, at least one, in any order."""

    @abstractmethod
    def source(self, problem: P, configuration: Configuration) -> tuple[str, str] | None:
        """(name, CUDA source) that a configuration of this kernel needs, for compiling ahead; None on the CPU."""

    @abstractmethod
    def plan(self, problem: P, configuration: Configuration) -> R:
        """Compile and load what a configuration of this kernel needs."""

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
        return iter(())

    @abstractmethod
    def rounding(self, problem: P) -> Rounding:
        """What it rounds at most, whichever configuration computes a problem that it does not refuse."""


class Operation(Generic[P, R]):
    """The kernels for problems P, in no order; their plans R are made here, once.

    Attributes:
        name: short, as files know it.
        noun: as messages do.
        kernels: all of them.
    """

    def __init__(self, name: str, noun: str, kernels: tuple[Kernel[P, R], ...]) -> None:
        self.name, self.noun, self.kernels = name, noun, kernels
        self._chosen = functools.lru_cache(_KEPT)(self._choose)
        self._made = functools.lru_cache(_KEPT)(self._make)

    def refusals(self, problem: P) -> dict[str, str | None]:
        """Per kernel: why it does not serve ``problem``, or None."""
        return {kernel.name: kernel.refuses(problem) for kernel in self.kernels}

    def candidates(self, problem: P) -> list[Candidate]:
        """What all kernels offer for ``problem``; empty where every kernel refuses.

        The least predicted time first, of kernels made for the GPU and then of others. Their costs were not fitted
        together, and in no cell of examples/results/h200_portable.json is sm80_gemm within 7 % of what h200.json has.
        """
        serving = [kernel for kernel in self.kernels if kernel.refuses(problem) is None]
        found = [(kernel.made_for is None, each) for kernel in serving for each in kernel.candidates(problem)]
        return [each for _, each in sorted(found, key=lambda one: (one[0], one[1].predicted_us))]

    def choose(self, problem: P) -> Candidate:
        """The candidate with the least time measured where ``problem`` was tuned, else the first of all.

        UnsupportedError with every kernel's reason where there is none.
        """
        return self._chosen(problem, tuned.generation)

    def ready(self, problem: P, candidate: Candidate | None = None) -> R:
        """``problem`` by a candidate, or by the one that is chosen: compiled and loaded when first asked for, and kept.

        What is chosen is chosen again when something was tuned.
        """
        return self._made(problem, candidate, tuned.generation)

    def plan(self, problem: P, candidate: Candidate) -> R:
        """A candidate for ``problem``, compiled and loaded; :meth:`ready` keeps it besides."""
        return self._kernel(candidate).plan(problem, candidate.configuration)

    def source(self, problem: P, candidate: Candidate) -> tuple[str, str] | None:
        """(name, CUDA source) that a candidate for ``problem`` needs; None on the CPU."""
        return self._kernel(candidate).source(problem, candidate.configuration)

    def rounding(self, problem: P, candidate: Candidate) -> Rounding:
        """What the kernel of a candidate for ``problem`` rounds at most."""
        return self._kernel(candidate).rounding(problem)

    def variants(self, spec: Spec, dtype: str, gpu: Gpu) -> Iterator[tuple[str, str]]:
        """(name, source) of every CUDA kernel that weights of ``spec`` can need on ``gpu``, for compiling ahead."""
        for kernel in self.kernels:
            yield from kernel.variants(spec, dtype, gpu)

    def times(self, problem: P) -> dict[str, float]:
        """Microseconds by :attr:`Candidate.key` that were measured for ``problem``; empty where it was not tuned."""
        return {} if problem.gpu is None else tuned.times(self._identity(problem, problem.gpu))

    def remember(self, problem: P, us: dict[str, float]) -> bool:
        """Use these times from now on, and keep them for later processes; False where no file can be written."""
        assert problem.gpu is not None
        return tuned.remember(self._identity(problem, problem.gpu), us)

    def _identity(self, problem: P, gpu: Gpu) -> dict[str, Any]:
        on = {"gpu": gpu.name, "arch": gpu.arch, "sm_count": gpu.sm_count}
        return {"operation": self.name, **on, **problem.identity}

    def _choose(self, problem: P, generation: int) -> Candidate:
        found = self.candidates(problem)
        if not found:
            reasons = "; ".join(f"{name} {reason}" for name, reason in self.refusals(problem).items())
            raise UnsupportedError(f"no kernel serves this {self.noun}: {reasons}.")
        us = self.times(problem)
        return min((each for each in found if each.key in us), key=lambda each: us[each.key], default=found[0])

    def _make(self, problem: P, candidate: Candidate | None, generation: int) -> R:
        return self.plan(problem, candidate or self.choose(problem))

    def _kernel(self, candidate: Candidate) -> Kernel[P, R]:
        return next(kernel for kernel in self.kernels if kernel.name == candidate.kernel)
