"""The definition in NumPy: float32 on dequantized weights, a run of columns at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy

from marlin_cupy.frameworks import Framework
from marlin_cupy.kernels.operation import Candidate, Configuration, Kernel
from marlin_cupy.kernels.problem import Plan, Problem, refuses_operands
from marlin_cupy.numerics import Rounding


class HostWeight(Protocol):
    """What the reference asks of a weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""

    def blocks(self) -> Iterator[tuple[slice, Any]]:
        """The dequantized matrix a run of columns at a time: (columns, float32[K, columns])."""


@dataclass(frozen=True)
class Rows(Configuration):
    """How many rows of x a product takes: all, or one after the other."""

    one_by_one: bool

    @property
    def key(self) -> str:
        """A word."""
        return "single" if self.one_by_one else "all"

    def __str__(self) -> str:
        rows = "one row at a time" if self.one_by_one else "all rows at once"
        return f"NumPy, float32 accumulation, columns in blocks, {rows}"


@dataclass(frozen=True)
class ReferencePlan(Plan):
    """Through NumPy views of the arrays."""

    rows: Rows

    def __str__(self) -> str:
        return str(self.rows)

    def multiply(
        self, framework: Framework, x: Any, w: HostWeight, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """A run of columns at a time."""
        x_host = framework.to_native(x)
        shape = (*x_host.shape[:-1], w.shape[1])
        y = numpy.empty(shape, dtype=x_host.dtype) if out is None else framework.to_native(out)
        bias_host = None if bias is None else framework.to_native(bias).astype(numpy.float32)
        rows = x_host.astype(numpy.float32).reshape(-1, w.shape[0])
        with numpy.errstate(over="ignore", invalid="ignore"):  # inf and NaN travel as in any matmul
            for columns, values in w.blocks():
                block = _one_by_one(rows, values) if self.rows.one_by_one else rows @ values
                if bias_host is not None:
                    block += bias_host[columns]
                y[..., columns] = block.reshape(*shape[:-1], block.shape[1]).astype(y.dtype)
        return framework.from_native(y) if out is None else out


def _one_by_one(rows: Any, values: Any) -> Any:
    """``rows @ values`` with the same call on the same memory for every row: BLAS chooses its order of sums by M."""
    block = numpy.empty((rows.shape[0], values.shape[1]), dtype=numpy.float32)
    row = numpy.empty((1, rows.shape[1]), dtype=numpy.float32)
    for index in range(rows.shape[0]):
        row[0] = rows[index]
        block[index] = (row @ values)[0]
    return block


class Reference(Kernel[Problem, Plan]):
    """Serves every weight in host memory; no full float32 copy of the weight is made."""

    name = "reference"

    def refuses(self, problem: Problem) -> str | None:
        """Weights on a GPU, other activation dtypes."""
        if problem.gpu is not None:
            return f"computes in host memory, and the weight is on cuda:{problem.gpu.index}"
        if (reason := refuses_operands(problem)) is not None:
            return reason
        return None

    def candidates(self, problem: Problem) -> list[Candidate]:
        """The one way, of which no time is known."""
        return [Candidate(self.name, Rows(problem.batch_invariant), math.inf)]

    def source(self, problem: Problem, configuration: Configuration) -> None:
        """Nothing to compile."""

    def plan(self, problem: Problem, configuration: Configuration) -> Plan:
        """Nothing to make ready."""
        assert isinstance(configuration, Rows)
        return ReferencePlan(configuration)

    def rounding(self, problem: Problem) -> Rounding:
        """The result alone."""
        return Rounding(problem.x.dtype)


KERNEL = Reference()
