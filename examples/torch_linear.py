"""A PyTorch model with 4-bit weights: quantized in place, compiled, captured into a CUDA graph, trained around, saved.

    pip install torch
    python examples/torch_linear.py               # on a GPU where there is one; --device cpu needs none

A block of a transformer's linear layers, 1024 wide, with random weights. Expect the packed weights to take 26 % of the
bytes of float16, the result to be about 0.1 from that of the float16 model (round to nearest in 4 bits costs that for
Gaussian weights), torch.compile and the CUDA graph to give what eager mode gives, the loss to fall while nothing but
biases is trained, and the model that is loaded from its file to be the one that was saved. Every result is checked: the
exit code is 1 where one is wrong. On two CPU cores it takes about 13 seconds, most of it in torch.compile.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from marlin_cupy.integrations.torch import Linear, load_quantized_, quantize_model_, save_quantized

WIDTH, INNER, ROWS = 1024, 2816, 8


class Block(torch.nn.Module):
    """Gate, up and down as in Llama, with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(WIDTH, 2 * INNER)
        self.down = torch.nn.Linear(INNER, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., WIDTH]; as it."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(torch.nn.functional.silu(gate) * up)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float(torch.linalg.norm(found.float() - expected.float()) / torch.linalg.norm(expected.float()))


def captured(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The result of a CUDA graph of the model."""
    model(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    return y


def trained(model: torch.nn.Module, x: torch.Tensor, target: torch.Tensor, steps: int = 30) -> tuple[float, float]:
    """The loss before and after training what can be trained: the packed weights cannot."""
    optimizer = torch.optim.SGD(model.parameters(), lr=4.0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x).float() - target.float()).square().mean() * 100
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args(arguments).device
    right = True

    def check(what: str, value: float, least: float, most: float) -> None:
        nonlocal right
        good = least <= value <= most
        right = right and good
        print(f"{what:<44} {value:8.3g}   {'' if good else f'WRONG: expected {least:g} to {most:g}'}".rstrip())

    torch.manual_seed(0)
    dense = Block().half().to(device)
    x = torch.randn(ROWS, WIDTH, device=device).half()
    with torch.no_grad():
        expected = dense(x)

    model = Block().half()
    model.load_state_dict(dense.state_dict())
    report = quantize_model_(model, "int4", device=device)  # layer by layer, from host memory to the device
    print(report)
    print(model)
    check("bytes of float16 that are left", report.bytes_after / report.bytes_before, 0.25, 0.27)

    with torch.no_grad():
        y = model(x)
        check("eager: distance from float16", distance(y, expected), 0.05, 0.2)
        compiled = torch.compile(model, fullgraph=True)
        check("torch.compile: distance from eager", distance(compiled(x), y), 0, 1e-3)
        if device != "cpu":
            check("CUDA graph: distance from eager", distance(captured(model, x), y), 0, 1e-3)
            faster = torch.compile(model, fullgraph=True, mode="reduce-overhead")
            for _ in range(3):  # compiles, warms up, records
                z = faster(x)
            check("reduce-overhead: distance from eager", distance(z, y), 0, 1e-3)

    before, after = trained(model, x, expected)
    check("loss after training the biases, of before", after / before, 0, 0.9)

    with tempfile.TemporaryDirectory() as folder:
        save_quantized(model, Path(folder) / "block.safetensors")
        other = Block().half().to(device)
        load_quantized_(other, Path(folder) / "block.safetensors")
    assert isinstance(other.down, Linear)
    with torch.no_grad():
        check("loaded: distance from what was saved", distance(other(x), model(x)), 0, 0)
    print("correct" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
