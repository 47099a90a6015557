"""The linear layers of a whole model, as ``torch_stack`` and ``jax_stack`` time them.

Decoder layers of Llama 3 8B without attention and norms: q, k and v in one matrix, of which q goes on; o; gate and up
in one matrix; silu(gate) * up; down; and the two residual sums.
"""

from __future__ import annotations

from dataclasses import dataclass

LAYERS = 32
M_VALUES = (1, 16, 64)
#: Of random weights; keeps the residual stream in range through all layers.
GAIN = 0.3
#: Of the result of int4 against 16-bit weights; more than that is a mistake.
TOLERANCE = 0.2


@dataclass(frozen=True)
class Widths:
    """Of a decoder layer: K and N of its matrices follow."""

    hidden: int = 4096
    qkv: int = 6144
    inner: int = 14336

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(K, N) by the names of the matrices, in the order in which they are used."""
        return {
            "qkv": (self.hidden, self.qkv),
            "o": (self.hidden, self.hidden),
            "gate_up": (self.hidden, 2 * self.inner),
            "down": (self.inner, self.hidden),
        }
