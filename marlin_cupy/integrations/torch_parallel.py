"""Tensor parallelism for PyTorch: layers that hold one rank's part of a packed weight, over torch.distributed.

Two of them make a block of a model with one exchange, as in Megatron-LM (arXiv:1909.08053)::

    x  ->  ColumnParallelLinear  ->  any function of single elements  ->  RowParallelLinear  ->  y
    whole       cut along N                      parts                       cut along K       sum of all ranks

Gradients flow as through the whole layers, where every rank computes the same loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed

from marlin_cupy.integrations.torch import Linear

Group = Any  # torch.distributed.ProcessGroup; None is the default one


class ColumnParallelLinear(Linear):
    """One rank's outputs of a layer: x is whole on every rank, y is a part, or whole with ``gather``."""

    group: Group
    gather: bool

    @classmethod
    def from_full(cls, full: Linear, group: Group = None, *, gather: bool = False) -> ColumnParallelLinear:
        """This rank's part of ``full``, in memory of its own.

        Args:
            full: the same on all ranks, on any device; N has to be a multiple of 64 times the number of ranks.
            group: of the ranks that share it.
            gather: whether forward returns the outputs of all ranks.

        Raises:
            ValueError: it cannot be cut into so many parts; the message says into how many it can.
        """
        rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        w = full.quantized.shard(1, rank, count)
        bias = None if full.bias is None else _copied(full.bias.chunk(count)[rank])
        layer = cls.from_quantized(w, bias)
        layer.group, layer.gather = group, gather
        return layer.train(full.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K]; returns [..., N / ranks], or [..., N] with ``gather``."""
        if torch.is_grad_enabled() and x.requires_grad:
            x = _sum_gradients(x, self.group)
        y = super().forward(x)
        return _gathered(y, self.group) if self.gather else y


class RowParallelLinear(Linear):
    """One rank's inputs of a layer: x is a part on every rank, y is whole. The bias is added once, after the sum."""

    group: Group

    @classmethod
    def from_full(cls, full: Linear, group: Group = None) -> RowParallelLinear:
        """This rank's part of ``full``, in memory of its own.

        Args:
            full: the same on all ranks, on any device; K has to be a multiple of 128 and of the group size, times the
                number of ranks.
            group: of the ranks that share it.

        Raises:
            ValueError: it cannot be cut into so many parts; the message says into how many it can.
        """
        rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        bias = None if full.bias is None else _copied(full.bias)
        layer = cls.from_quantized(full.quantized.shard(0, rank, count), bias)
        layer.group = group
        return layer.train(full.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K / ranks], this rank's part; returns [..., N]."""
        y = self.product(x, None)
        if y.requires_grad:
            y = _sum(y, self.group)
        else:
            torch.distributed.all_reduce(y, group=self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def _copied(bias: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


class _SumGradients(torch.autograd.Function):
    """x itself; every rank has a part of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Any, group: Group) -> Any:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        whole = gradient.contiguous().clone()
        torch.distributed.all_reduce(whole, group=ctx.group)
        return whole, None


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient every rank has."""

    @staticmethod
    def forward(ctx: Any, y: Any, group: Group) -> Any:
        whole = y.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient, None


class _Gather(torch.autograd.Function):
    """The parts of all ranks side by side; a rank's gradient is its part."""

    @staticmethod
    def forward(ctx: Any, y: Any, group: Group) -> Any:
        ctx.group = group
        return _gathered(y, group)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        rank, count = torch.distributed.get_rank(ctx.group), torch.distributed.get_world_size(ctx.group)
        return gradient.chunk(count, -1)[rank].contiguous(), None


_sum_gradients: Any = _SumGradients.apply
_sum: Any = _Sum.apply
_gather: Any = _Gather.apply


def _gathered(y: Any, group: Group) -> Any:
    if torch.is_grad_enabled() and y.requires_grad:
        return _gather(y, group)
    parts = [torch.empty_like(y) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, y.contiguous(), group=group)
    return torch.cat(parts, -1)
