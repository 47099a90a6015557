"""One packed weight, handed from JAX to PyTorch to CuPy to NumPy: the same memory, and the same answer from all four.

    pip install "marlin_cupy[jax]" torch          # and the CUDA extras of both, and marlin_cupy[cuda13], for a GPU
    python examples/four_libraries.py             # on a GPU where JAX has one, else on the CPU

Each library gets the weight from the one ahead of it. Expect one address wherever memory is on the same device. On a
GPU the last step, to NumPy, is the copy that it has to be; without one the step to CuPy, which has no memory on a host,
is left out. Every library's answer has to be within 1e-3 of float64 (one rounding to float16 is 4.9e-4 at most), and
whether its bits are those of the library ahead is printed. CuPy and PyTorch launch the same kernel, and PyTorch and
NumPy share the one of the host, so those have to be; JAX compiles a product of its own on the CPU. The exit code is 1
where something is wrong. On two CPU cores it takes about 4 seconds.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import marlin_cupy as mc

K, N, ROWS = 2048, 1024, 8
BOUND = 1e-3


def address(packed: Any, library: str) -> int:
    """Where the bytes of ``packed`` are, as its library says."""
    if library == "jax":
        return int(packed.unsafe_buffer_pointer())
    if library == "torch":
        return int(packed.data_ptr())
    return int(packed.data.ptr if library == "cupy" else packed.ctypes.data)


def activations(x: jax.Array, library: str, on_gpu: bool) -> Any:
    """``x`` in another library, on the device of the weight there."""
    if library == "jax":
        return x
    if library == "numpy":
        return np.asarray(x)
    if library == "torch":
        return torch.from_numpy(np.array(x)).to("cuda" if on_gpu else "cpu")
    import cupy

    return cupy.asarray(np.asarray(x))


def on_host(y: Any, library: str) -> np.ndarray:
    """As NumPy has it."""
    if library == "cupy":
        return np.asarray(y.get())
    return y.cpu().numpy() if library == "torch" else np.asarray(y)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; 1 where a result is wrong."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    # PyTorch has no read-only tensors, and warns where it shares an array that JAX lets nobody write into.
    warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
    on_gpu = jax.default_backend() == "gpu"
    libraries = ["jax", "torch", "cupy", "numpy"] if on_gpu else ["jax", "torch", "numpy"]
    if not on_gpu:
        print("no GPU: the step to CuPy is left out")
    key_weight, key_x = jax.random.split(jax.random.key(0))
    x = jax.random.normal(key_x, (ROWS, K), jnp.float16)
    w = mc.quantize(jax.random.normal(key_weight, (K, N), jnp.float16), "int4").to("jax")
    exact = np.asarray(x, np.float64) @ mc.dequantize(w.to("numpy"), "float32").astype(np.float64)

    right = True
    last_place, last_y = 0, np.empty(0)
    for step, library in enumerate(libraries):
        w = w.to(library)
        place = address(w.packed, library)
        y = on_host(mc.matmul(activations(x, library, on_gpu), w), library)
        error = float(np.linalg.norm(y - exact) / np.linalg.norm(exact))
        copied = on_gpu and library == "numpy"
        same_bits = bool(step) and bool((y == last_y).all())
        good = error < BOUND and (not step or copied or place == last_place)
        if step and {library, libraries[step - 1]} in ({"torch", "cupy"}, {"torch", "numpy"}):
            good = good and same_bits
        memory = "copied to the host" if copied else "the same memory" if place == last_place else "here first"
        bits = "" if not step else ", same bits as ahead" if same_bits else ", rounded otherwise than ahead"
        print(f"{library:<6} {place:#x}, {memory}; error {error:.2e}{bits}{'' if good else '   WRONG'}")
        right, last_place, last_y = right and good, place, y
    print("correct" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
