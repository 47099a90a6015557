"""What all kernels of cuda_src have in common on the host: configurations, sources, plans, launches."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from marlin_cupy.device import Gpu
from marlin_cupy.frameworks import Framework, StreamFramework
from marlin_cupy.jit import launch, source
from marlin_cupy.kernels.arguments import Struct
from marlin_cupy.kernels.measured import Measured
from marlin_cupy.kernels.operands import Launcher, Rows, Weight
from marlin_cupy.kernels.operation import Asked, Candidate, Configuration, Kernel
from marlin_cupy.kernels.problem import Plan, Problem, Stacked
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
P = TypeVar("P", bound=Asked)
R = TypeVar("R")


class CudaPlan(Plan, Generic[C]):
    """Everything about a product that does not depend on pointers; a kernel's own class adds what it launches with."""

    def __init__(self, function: launch.Function, configuration: C, problem: Problem) -> None:
        self.function = function
        self.configuration = configuration
        self.problem = problem
        self.layout = problem.w.layout
        self.threads = configuration.config.threads
        #: What a Stack holds besides the layer.
        self.layers = problem.select.layers if isinstance(problem.select, Stacked) else 1

    def __str__(self) -> str:
        return str(self.configuration)

    def multiply(
        self, framework: Framework, x: Any, w: Weight, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """Enqueue on the current stream of ``framework``."""
        assert isinstance(framework, StreamFramework)
        m = self.problem.M
        y = out
        if y is None:
            y = framework.empty((*x.shape[:-1], self.problem.w.shape[1]), self.problem.y, w.device)
        if m > 0:
            bias_pointer = 0 if bias is None else framework.pointer(bias)
            self.enqueue(framework, Rows.of(framework, x, m), w, bias_pointer, Rows.of(framework, y, m), dependent)
        return y

    @abstractmethod
    def enqueue(self, launcher: Launcher, x: Rows, w: Weight, bias: int, y: Rows, dependent: bool) -> None:
        """Launch for one row of x or more; ``bias`` is an address, 0 where there is none."""


class CudaKernel(Kernel[P, R]):
    """A kernel for weights of a format, its granule and a dtype of activations, in blocks of some shape."""

    #: The function in the twin.
    entry: ClassVar[str]
    #: What it is launched with.
    arguments: ClassVar[type[Struct]]

    def source_of(self, spec: Spec, dtype: str, config: Block, stacked: bool = False) -> tuple[str, str]:
        """(name, source) for a format, its granule, an activation dtype and a block; ``stacked`` for weights in stacks.

        The name is that of a readable file, to which the cache adds a hash; the source is complete.
        """
        return f"{self.name}-{spec.format}-g{spec.layout.granule}-{dtype}", source.specialized(
            self.name,
            config.cpp(),
            source.scalar("Activation", dtype),
            *source.weight(spec),
            f"constexpr int SHARED_BYTES = {config.shared_bytes(spec.layout)};",
            f"constexpr bool STACKED = {str(stacked).lower()};",
            *source.codec(spec),
            *self.arguments.cpp(),
        )

    def load(self, code: tuple[str, str], config: Block, layout: Layout, gpu: Gpu) -> launch.Function:
        """What :meth:`source_of` made for a block, compiled and loaded."""
        shared_bytes, most = config.shared_bytes(layout), config.most_shared_bytes(gpu)
        return launch.load(*code, gpu.arch, gpu.index, self.entry, shared_bytes, most)


class ProductKernel(CudaKernel[Problem, Plan]):
    """A kernel of ``gemm`` whose configurations are :class:`CudaConfiguration`."""

    entry = "gemm"
    #: Its plan.
    plan_type: ClassVar[type[CudaPlan[Any]]]

    def source(self, problem: Problem, configuration: Configuration) -> tuple[str, str]:
        """(name, source) for its block."""
        assert isinstance(configuration, CudaConfiguration)
        return self.source_of(problem.w, problem.x.dtype, configuration.config, isinstance(problem.select, Stacked))

    def plan(self, problem: Problem, configuration: Configuration) -> CudaPlan[Any]:
        """Compile and load its block."""
        assert problem.gpu is not None
        assert isinstance(configuration, CudaConfiguration)
        code = self.source(problem, configuration)
        function = self.load(code, configuration.config, problem.w.layout, problem.gpu)
        return self.plan_type(function, configuration, problem)

    @abstractmethod
    def rated(self, problem: Problem, known: Measured) -> list[Candidate]:
        """All that could be measured for a problem, not only what is offered, with times as ``known`` predicts them."""
