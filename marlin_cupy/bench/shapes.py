"""The layers that the benchmark times."""

from __future__ import annotations

import re
from typing import NamedTuple

_SHAPE = re.compile(r"([^=\s]+)=(\d+)[xX](\d+)")


class Shape(NamedTuple):
    """A linear layer: y (M, N) = x (M, K) @ W (K, N)."""

    name: str
    K: int
    N: int

    def __str__(self) -> str:
        return f"{self.name}={self.K}x{self.N}"


#: The linear layers of Llama 3 8B and 70B, with q, k and v, and gate and up, in one matrix each.
LLAMA = (
    Shape("8b_qkv", 4096, 6144),
    Shape("8b_o", 4096, 4096),
    Shape("8b_gate_up", 4096, 28672),
    Shape("8b_down", 14336, 4096),
    Shape("70b_qkv", 8192, 10240),
    Shape("70b_o", 8192, 8192),
    Shape("70b_gate_up", 8192, 57344),
    Shape("70b_down", 28672, 8192),
)
#: A small layer, which latency dominates, and a large one, which bandwidth does.
QUICK = tuple(shape for shape in LLAMA if shape.name in ("8b_o", "70b_down"))

M_VALUES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
QUICK_M_VALUES = (1, 16, 64)


def parse(text: str) -> Shape:
    """``NAME=KxN`` as a Shape; ValueError otherwise."""
    match = _SHAPE.fullmatch(text.strip())
    if match is None or int(match[2]) == 0 or int(match[3]) == 0:
        raise ValueError(f"shape is {text!r}; use NAME=KxN, for instance qkv=4096x6144.")
    return Shape(match[1], int(match[2]), int(match[3]))
