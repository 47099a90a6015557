"""The definition in NumPy: float32 on dequantized weights, a run of columns at a time."""

from __future__ import annotations

from typing import Any

import numpy

from marlin_cupy.formats.scalars import HALF_DTYPES
from marlin_cupy.frameworks import Framework
from marlin_cupy.kernels.problem import Kernel, Plan, Problem
from marlin_cupy.tensor import QuantizedTensor


class Reference(Kernel, Plan):
    """Serves every weight in host memory; no full float32 copy of the weight is made. One configuration."""

    name = "reference"

    def refuses(self, problem: Problem) -> str | None:
        """Weights on a GPU, other activation dtypes."""
        if problem.gpu is not None:
            return f"computes in host memory, and the weight is on cuda:{problem.gpu.index}"
        if problem.dtype not in HALF_DTYPES:
            return f"takes {' or '.join(HALF_DTYPES)} activations, not {problem.dtype}"
        return None

    def plan(self, problem: Problem) -> Plan:
        """Itself."""
        return self

    def __str__(self) -> str:
        return "NumPy, float32 accumulation, columns in blocks"

    def multiply(
        self, framework: Framework, x: Any, w: QuantizedTensor, bias: Any | None, out: Any | None, dependent: bool
    ) -> Any:
        """Through NumPy views of the arrays."""
        x_host = framework.to_native(x)
        shape = (*x_host.shape[:-1], w.shape[1])
        y = numpy.empty(shape, dtype=x_host.dtype) if out is None else framework.to_native(out)
        bias_host = None if bias is None else framework.to_native(bias).astype(numpy.float32)
        rows = x_host.astype(numpy.float32).reshape(-1, w.shape[0])
        with numpy.errstate(over="ignore", invalid="ignore"):  # inf and NaN travel as in any matmul
            for columns, values in w.blocks():
                block = rows @ values
                if bias_host is not None:
                    block += bias_host[columns]
                y[..., columns] = block.reshape(*shape[:-1], block.shape[1]).astype(y.dtype)
        return framework.from_native(y) if out is None else out


KERNEL = Reference()
