"""One packed quantized weight, one GEMM, shared by NumPy, CuPy, JAX and PyTorch."""

from marlin_cupy.api import Explanation, explain, matmul
from marlin_cupy.errors import (
    CompileError,
    DeviceError,
    FileFormatError,
    MissingDependencyError,
    UnsupportedError,
)
from marlin_cupy.tensor import QuantizedTensor, Unpacked, dequantize, load, pack, quantize

__version__ = "0.1.0"

__all__ = [
    "CompileError",
    "DeviceError",
    "Explanation",
    "FileFormatError",
    "MissingDependencyError",
    "QuantizedTensor",
    "Unpacked",
    "UnsupportedError",
    "dequantize",
    "explain",
    "load",
    "matmul",
    "pack",
    "quantize",
]
