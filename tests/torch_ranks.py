"""What every rank of a process group checks: layers cut among ranks are the whole layer, forward and backward."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from marlin_cupy.integrations.torch import Linear
from marlin_cupy.integrations.torch_parallel import ColumnParallelLinear, RowParallelLinear

RANKS = 2
K, HIDDEN, N, M = 300, 512, 200, 5


def run(backend: str, folder: Path) -> None:
    """In RANKS processes, over GPUs with "nccl"."""
    torch.multiprocessing.spawn(_rank, (backend, str(folder / "store")), RANKS)


def _rank(rank: int, backend: str, store: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        check(rank, device)
    finally:
        torch.distributed.destroy_process_group()


def check(rank: int, device: torch.device) -> None:
    torch.manual_seed(0)
    up, down = torch.nn.Linear(K, HIDDEN).half(), torch.nn.Linear(HIDDEN, N).half()
    whole = [Linear.from_linear(each, "int4", group_size).to(device) for each, group_size in ((up, 48), (down, 128))]
    x = torch.randn(M, K, device=device).half()
    gradient = torch.randn(M, N, device=device).half()

    gathered = ColumnParallelLinear.from_full(whole[0], gather=True)
    column, row = ColumnParallelLinear.from_full(whole[0]), RowParallelLinear.from_full(whole[1])
    assert column.packed.shape[0] * RANKS == whole[0].packed.shape[0]
    assert row.packed.shape[1] * RANKS == whole[1].packed.shape[1]

    def block(x: torch.Tensor) -> torch.Tensor:
        return row(torch.relu(column(x)))

    with torch.no_grad():
        expected = whole[0](x)
        close(gathered(x), expected)
        close(column(x), expected.chunk(RANKS, -1)[rank])
        expected = whole[1](torch.relu(expected))
        close(block(x), expected)
        close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), expected)

    found, right = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = block(found)
    close(y, expected)
    y.backward(gradient)
    whole[1](torch.relu(whole[0](right))).backward(gradient)
    close(found.grad, right.grad)
    close(column.bias.grad, whole[0].bias.grad.chunk(RANKS)[rank])
    close(row.bias.grad, whole[1].bias.grad)

    found = x.clone().requires_grad_()
    gathered(found).sum().backward()
    right.grad = None
    whole[0](right).sum().backward()
    close(found.grad, right.grad)

    with pytest.raises(ValueError, match="N=200 cannot be cut into 2 equal parts"):
        ColumnParallelLinear.from_full(whole[1])
    with pytest.raises(ValueError, match="K=300 cannot be cut into 2 equal parts"):
        RowParallelLinear.from_full(whole[0])


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3 * float(expected.abs().max()))


if __name__ == "__main__":
    run(sys.argv[1], Path(sys.argv[2]))
