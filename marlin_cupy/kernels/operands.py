"""Where the operands of a product lie."""

from __future__ import annotations

from typing import Any, NamedTuple

from marlin_cupy.frameworks import StreamFramework
from marlin_cupy.tensor import QuantizedTensor


class Rows(NamedTuple):
    """A matrix of 16-bit elements in device memory whose rows are contiguous.

    Attributes:
        pointer: address of the first row.
        stride: elements from a row to the next, of no account where there is one row.
        number: of rows.
    """

    pointer: int
    stride: int
    number: int

    @staticmethod
    def of(framework: StreamFramework, array: Any, number: int) -> Rows:
        """``array`` (..., columns), of ``number`` > 0 rows in all."""
        rows = framework.rows(array)
        return Rows(framework.pointer(rows), framework.strides(rows)[0], number)

    def start_at(self, nbytes: int) -> bool:
        """Whether every row starts at a multiple of so many bytes."""
        return self.pointer % nbytes == 0 and (self.number == 1 or 2 * self.stride % nbytes == 0)


def output(framework: StreamFramework, x: Any, w: QuantizedTensor, out: Any | None) -> Any:
    """``out``, or a new array for ``x @ w``."""
    if out is not None:
        return out
    return framework.empty((*x.shape[:-1], w.shape[1]), framework.dtype(x), w.device)
