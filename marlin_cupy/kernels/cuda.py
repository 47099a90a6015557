"""What all kernels of cuda_src have in common on the host: configurations, sources, plans, launches."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.kernels.operands import Launcher, Rows, Weight
from marlin_cupy.kernels.problem import Candidate, Configuration, Kernel, Plan, Problem
from marlin_cupy.layout import Layout
from marlin_cupy.spec import Spec

#: The driver's share of the shared memory of each block.
RESERVED_SHARED = 1024


def shared_budget(gpu: Gpu, blocks_per_sm: int = 1) -> int:
    """The most dynamic shared memory that a block can have where so many of them are to be resident on an SM."""
    return min(gpu.shared_per_block, gpu.shared_per_sm // blocks_per_sm - RESERVED_SHARED)


class Block(ABC):
    """The shape of a block: a frozen dataclass of integers, printed as the C++ struct Config of its kernel."""

    @property
    @abstractmethod
    def threads(self) -> int:
        """Threads of a block."""

    @abstractmethod
    def shared_bytes(self, layout: Layout) -> int:
        """Dynamic shared memory of a block; the kernel asserts the same number."""

    def most_shared_bytes(self, gpu: Gpu) -> int:
        """The most that a launch asks for; 0 where none asks for more than :meth:`shared_bytes`."""
        return 0

    @property
    def numbers(self) -> dict[str, int]:
        """What makes this shape different from others, by name."""
        assert dataclasses.is_dataclass(self)
        return dataclasses.asdict(self)

    @property
    def key(self) -> str:
        """The numbers."""
        return "-".join(map(str, self.numbers.values()))

    @property
    def constants(self) -> dict[str, int]:
        """What the kernel is told, by name."""
        return self.numbers

    def cpp(self) -> str:
        """The C++ struct."""
        fields = ", ".join(f"{name} = {value:d}" for name, value in self.constants.items())
        return f"struct Config {{ static constexpr int {fields}; }};"


@dataclass(frozen=True)
class CudaConfiguration(Configuration):
    """A block, and in a kernel's own class how many of them share the work."""

    config: Block

    @property
    def exchange_floats(self) -> int:
        """float32 values by which blocks add up tiles that they share."""
        return 0


C = TypeVar("C", bound=CudaConfiguration)


@dataclass(frozen=True)
class CudaPlan(Plan, Generic[C]):
    """Everything about a launch that does not depend on pointers."""

    function: launch.Function
    configuration: C
    problem: Problem

    def __str__(self) -> str:
        return str(self.configuration)

    @functools.cached_property
    def layout(self) -> Layout:
        """That of the weight."""
        return self.problem.spec.layout

    def multiply(
        self, framework: Framework, x: Any, w: Weight, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """Enqueue on the current stream of ``framework``."""
        assert isinstance(framework, StreamFramework)
        m = self.problem.M
        y = out
        if y is None:
            y = framework.empty((*x.shape[:-1], self.problem.spec.shape[1]), self.problem.dtype, w.device)
        if m > 0:
            bias_pointer = 0 if bias is None else framework.pointer(bias)
            self.enqueue(framework, Rows.of(framework, x, m), w, bias_pointer, Rows.of(framework, y, m), dependent)
        return y

    @abstractmethod
    def enqueue(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch for one row of x or more; ``bias`` is an address, 0 where there is none."""


class CudaKernel(Kernel):
    """A kernel whose configurations are :class:`CudaConfiguration`."""

    #: Its plan.
    plan_type: ClassVar[type[CudaPlan[Any]]]

    def source_of(self, spec: Spec, dtype: str, config: Block, stacked: bool = False) -> tuple[str, str]:
        """(name, source) for a format, its granule, an activation dtype and a block; see Problem for ``stacked``.

        The name is that of a readable file, to which the cache adds a hash; the source is complete.
        """
        name = f"{self.name}-{spec.format}-g{spec.layout.granule}-{dtype}"
        return name, source.specialized(self.name, spec, dtype, config.cpp(), config.shared_bytes(spec.layout), stacked)

    def source(self, problem: Problem, configuration: Configuration) -> tuple[str, str]:
        """(name, source) for its block."""
        assert isinstance(configuration, CudaConfiguration)
        return self.source_of(problem.spec, problem.dtype, configuration.config, problem.stacked)

    def plan(self, problem: Problem, configuration: Configuration) -> CudaPlan[Any]:
        """Compile and load its block."""
        assert problem.gpu is not None
        assert isinstance(configuration, CudaConfiguration)
        config = configuration.config
        function = launch.load(
            *self.source(problem, configuration),
            problem.gpu.arch,
            problem.gpu.index,
            "gemm",
            config.shared_bytes(problem.spec.layout),
            config.most_shared_bytes(problem.gpu),
        )
        return self.plan_type(function, configuration, problem)

    @abstractmethod
    def rated(self, problem: Problem, known: Measured) -> list[Candidate]:
        """All that could be measured for a problem, not only what is offered, with times as ``known`` predicts them."""
